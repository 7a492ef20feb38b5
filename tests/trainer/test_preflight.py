"""Each property holds where all is well, and fails by its name where one function is really broken."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import PreflightFailed
from core.presets import resolve_options
from core.run_directory import METRICS, End
from tests.tiny import TEMPLATE
from tests.trainer.batches import make_sampling
from tests.trainer.runs import FunctionGrader, letter_fraction, make_run_directory, read_metrics, train_here
from tests.trainer.test_loop import read_events
from trainer import layout, objectives
from trainer.batch import Batch, Prompt
from trainer.checkpoints import state_digest
from trainer.data import collate
from trainer.engine_sampling import sample_tokens
from trainer.layout import Group
from trainer.objectives import Denominators
from trainer.policy import Policy
from trainer.preflight import Preflight, check_run, choose_prompts
from trainer.properties import ADVICE
from trainer.random import Purpose
from trainer.rollout import RolloutEngine
from trainer.tokens import load_tokenizer, render_prompt
from trainer.update import Learner, Plan

QUESTIONS = ("what is 2 + 2?", "hi", "a long one, to be left out")
SMALL = {"finetuning": "full", "precision": "float32"}


class Subject:
    """What preflight looks at, around the tiny model."""

    def __init__(self, folder: Path, algorithm: str = "grpo", **given: Any) -> None:
        self.options = resolve_options(algorithm, {**SMALL, **given})
        self.policy = Policy.load(folder, self.options, 1, torch.device("cpu"))
        self.learner = Learner(self.policy, self.options, 1, 10, lambda: None)
        self.tokenizer = load_tokenizer(folder)
        self.engine = RolloutEngine(self.policy, self.tokenizer, self.options.precision)
        self.prompts = [make_prompt(self.tokenizer, index, question) for index, question in enumerate(QUESTIONS)]

    def check(self, **sampling: Any) -> Preflight:
        options = self.options
        coordinates = make_sampling(
            purpose=Purpose.PREFLIGHT,
            temperature=options.temperature,
            max_completion_tokens=options.max_completion_tokens,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
        )
        return check_run(self.learner, self.engine, self.tokenizer, self.prompts, replace(coordinates, **sampling), lambda: None)

    def violations(self, **sampling: Any) -> dict[str, tuple[float, float]]:
        """(measured, allowed) of each property that the message names; the worst where it names one twice."""
        with pytest.raises(PreflightFailed) as caught:
            self.check(**sampling)
        found = re.findall(r"(\w+): [^:]*? is ([-\w.+]+), allowed is ([-\w.+]+)\. ([^:]*)", caught.value.message)
        assert all(advice.startswith(ADVICE[name][:20]) for name, _, _, advice in found)
        return {name: (float(measured), float(allowed)) for name, measured, allowed, _ in found}


def make_prompt(tokenizer: Any, index: int, question: str) -> Prompt:
    messages = [{"role": "user", "content": question}]
    text, ids = render_prompt(tokenizer, messages)
    return Prompt(index, ids, text, {"messages": messages})


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {}),
    ("grpo", {"finetuning": "lora"}),
    ("grpo", {"precision": "bf16"}),
    ("grpo", {"temperature": 0.4, "finetuning": "lora", "precision": "bf16"}),
    ("grpo", {"temperature": 0.4}),
    ("grpo", {"temperature": 1.7, "top_p": 0.8}),
    ("grpo", {"top_k": 5, "minibatches_per_batch": 2, "epochs_per_batch": 2}),
    ("grpo", {"microbatch_tokens": 16, "minibatches_per_batch": 2}),
    ("grpo", {"max_completion_tokens": 3, "mask_truncated": True}),
    ("ppo", {}),
    ("ppo", {"finetuning": "lora", "temperature": 0.6}),
    ("ppo", {"value_model": "shared_backbone", "value_warmup_steps": 2}),
    ("ppo", {"value_model": "shared_backbone", "finetuning": "lora", "precision": "bf16"}),
    ("gspo", {"precision": "bf16", "minibatches_per_batch": 2}),
    ("reinforce_pp", {"epochs_per_batch": 3}),
    ("dapo", {}),
    ("cispo", {}),
]


@pytest.mark.parametrize(("algorithm", "given"), RUNS)
def test_every_property_holds_for_a_run_in_order(tiny: Path, algorithm: str, given: dict[str, Any]) -> None:
    found = Subject(tiny, algorithm, **given).check()
    assert list(found.measured) == list(ADVICE)
    assert found.warning is None
    allowed = 1e-4 / min(1.0, given.get("temperature", 1.0)) if given.get("precision") != "bf16" else 0.05 / given.get("temperature", 1.0)
    assert 0.0 < found.measured["sampler_agrees"] <= allowed
    assert found.measured["padding_changes_nothing"] <= allowed
    assert found.measured["first_ratio_is_one"] == 0.0


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_sampler_that_ignores_the_temperature_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    def at_one(logits: Tensor, temperature: float, *given: Any) -> Any:
        return sample_tokens(logits, 1.0, *given)

    monkeypatch.setattr("trainer.rollout.sample_tokens", at_one)
    assert Subject(tiny, precision=precision).check().measured.keys() == ADVICE.keys()
    found = Subject(tiny, precision=precision, temperature=0.6).violations()
    assert list(found) == ["sampler_agrees"]
    measured, allowed = found["sampler_agrees"]
    assert measured > 2 * allowed
    assert allowed == pytest.approx({"float32": 1e-4, "bf16": 0.05}[precision] / 0.6, rel=0.01)


def test_old_log_probs_scored_in_another_way_than_the_update_are_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score_old = Learner.score_old

    def a_bit_off(self: Learner, batch: Batch, plan: Plan) -> Tensor:
        return score_old(self, batch, plan) + 1e-6 * batch.completion_mask

    monkeypatch.setattr(Learner, "score_old", a_bit_off)
    found = Subject(tiny).violations()
    assert list(found) == ["first_ratio_is_one"]
    assert found["first_ratio_is_one"] == pytest.approx((1e-6, 0.0), rel=0.5)


@pytest.mark.parametrize("given", [{}, {"minibatches_per_batch": 2}])
def test_dropout_is_found_by_every_number(tiny: Path, given: dict[str, Any]) -> None:
    subject = Subject(tiny, **given)
    for block in subject.policy.model.base_model.layers:
        block.self_attn.attention_dropout = 0.3
    subject.policy.model.train()
    with torch.random.fork_rng():
        found = subject.violations()
    assert list(found) == ["sampler_agrees", "first_ratio_is_one", "padding_changes_nothing", "microbatches_change_nothing"]


def test_padding_that_the_model_sees_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_padding(batch: Batch) -> list[Group]:
        return [replace(group, prompt_length=batch.prompt_ids.shape[1]) for group in layout.group_shapes(batch)]

    monkeypatch.setattr("trainer.policy.group_shapes", with_padding)
    assert list(Subject(tiny).violations()) == ["sampler_agrees", "padding_changes_nothing"]


@pytest.mark.parametrize("given", [{}, {"precision": "bf16"}, {"finetuning": "lora"}, {"finetuning": "lora", "precision": "bf16"}])
def test_a_loss_divided_by_the_microbatch_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    """Twice the gradient: of the same direction, so that a cosine alone would not see it."""
    sequence_mean = objectives.sequence_mean

    def by_microbatch(per_token: Tensor, mask: Tensor, whole: Denominators) -> Tensor:
        return sequence_mean(per_token, mask, Denominators.of(mask))

    monkeypatch.setattr("trainer.objectives.sequence_mean", by_microbatch)
    found = Subject(tiny, **given).violations()
    assert list(found) == ["microbatches_change_nothing"]
    expected = 1.0 if given.get("precision") != "bf16" else 1 / 5
    assert found["microbatches_change_nothing"][0] == pytest.approx(expected, rel=0.05)


def test_a_value_loss_divided_by_the_microbatch_is_found_beside_a_larger_gradient(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token_mean = objectives.token_mean

    def by_microbatch(per_token: Tensor, mask: Tensor, whole: Denominators) -> Tensor:
        return token_mean(per_token, mask, Denominators.of(mask))

    subject = Subject(tiny, "ppo")
    monkeypatch.setattr("trainer.objectives.token_mean", by_microbatch)
    with pytest.raises(PreflightFailed) as caught:
        subject.check()
    assert "(value model)" in caught.value.message
    assert "(policy)" not in caught.value.message


def test_a_microbatch_whose_gradient_is_lost_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Learner._backward
    calls: list[int] = []

    def only_every_third(self: Learner, *given: Any) -> float:
        calls.append(1)
        before = {id(p): None if p.grad is None else p.grad.clone() for p in self.policy.policy_parameters()}
        loss = backward(self, *given)
        if len(calls) % 3 == 0:
            for parameter in self.policy.policy_parameters():
                parameter.grad = before[id(parameter)]
        return loss

    monkeypatch.setattr(Learner, "_backward", only_every_third)
    assert list(Subject(tiny).violations()) == ["microbatches_change_nothing"]


def shifted(batch: Batch) -> Batch:
    return replace(batch, completion_ids=batch.completion_ids.roll(1, dims=1))


def without_the_end(batch: Batch) -> Batch:
    length = batch.completion_mask.sum(1, keepdim=True)
    return replace(batch, completion_mask=torch.arange(batch.completion_mask.shape[1]) < length - 1)


def counting_padding(batch: Batch) -> Batch:
    return replace(batch, completion_mask=torch.ones_like(batch.completion_mask))


def without_a_prompt_token(batch: Batch) -> Batch:
    return replace(batch, prompt_mask=batch.prompt_mask & ~torch.eye(1, batch.prompt_mask.shape[1], dtype=torch.bool).flip(1))


@pytest.mark.parametrize("broken", [shifted, without_the_end, counting_padding, without_a_prompt_token])
def test_a_batch_of_other_tokens_than_the_sampled_ones_is_found(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Batch], Batch]
) -> None:
    monkeypatch.setattr("trainer.preflight.collate", lambda *given: broken(collate(*given)))
    assert list(Subject(tiny).violations()) == ["tokens_trained_are_tokens_sampled"]


def test_a_layout_that_reads_the_hidden_state_of_the_token_itself_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pad = layout.pad

    def one_late(*given: Any) -> layout.Layout:
        made = pad(*given)
        return replace(made, sources=made.sources + 1)

    monkeypatch.setattr("trainer.token_checks.pad", one_late)
    found = Subject(tiny).violations()
    assert list(found) == ["tokens_trained_are_tokens_sampled"]
    assert found["tokens_trained_are_tokens_sampled"][1] == 0.0


@pytest.mark.parametrize("token_ids", [(7, 8, 1, 1), (7, 1, 9), (7, 8)])
def test_a_completion_that_does_not_end_with_its_only_end_token_is_found(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, token_ids: tuple[int, ...]
) -> None:
    generate = RolloutEngine.generate

    def ended_wrongly(self: RolloutEngine, *given: Any, **named: Any) -> Any:
        first, *others = generate(self, *given, **named)
        return [replace(first, token_ids=token_ids, logprobs=(-1.0,) * len(token_ids), finish_reason="stop"), *others]

    monkeypatch.setattr(RolloutEngine, "generate", ended_wrongly)
    assert list(Subject(tiny).violations()) == ["tokens_trained_are_tokens_sampled"]


def test_completions_that_end_by_themselves_are_taken_with_their_end_token(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, ended = RolloutEngine.generate, []

    def noted(self: RolloutEngine, *given: Any, **named: Any) -> Any:
        rollouts = generate(self, *given, **named)
        ended.extend(rollout.finish_reason == "stop" and len(rollout.token_ids) > 1 for rollout in rollouts)
        return rollouts

    monkeypatch.setattr(RolloutEngine, "generate", noted)
    for seed in range(4):
        Subject(tiny).check(seed=seed, end_token_ids=frozenset({1, *range(6, 16)}))
    assert any(ended)
    monkeypatch.setattr("trainer.preflight.collate", lambda *given: without_the_end(collate(*given)))
    assert list(Subject(tiny).violations(seed=0, end_token_ids=frozenset(range(48)))) == ["tokens_trained_are_tokens_sampled"]


def test_prompts_with_a_token_too_many_or_too_few_are_found(tiny: Path) -> None:
    for change in (lambda ids: (2, *ids), lambda ids: ids[1:]):
        subject = Subject(tiny)
        subject.prompts = [replace(prompt, token_ids=change(prompt.token_ids)) for prompt in subject.prompts]
        assert subject.violations() == {"template_round_trips": (2.0, 0.0)}


def test_a_tokenizer_that_spells_the_templates_special_tokens_is_found(tiny: Path) -> None:
    """`<user>` in the text, but characters among the tokens: the model has never seen a turn begin like that."""
    subject = Subject(tiny)
    subject.tokenizer.split_special_tokens = True
    subject.prompts = [make_prompt(subject.tokenizer, index, question) for index, question in enumerate(QUESTIONS)]
    assert 3 not in subject.prompts[0].token_ids
    with pytest.raises(PreflightFailed, match=r"template_round_trips: .* text is 2, allowed is 0"):
        subject.check()


def test_a_template_whose_end_of_turn_ends_no_completion_is_found(tiny: Path) -> None:
    with pytest.raises(PreflightFailed, match=r"template_round_trips: .* ends no completion is 2, allowed is 0"):
        Subject(tiny).check(end_token_ids=frozenset({5}))


QUIRKS = [
    ("{% if not add_generation_prompt %}<system>{% endif %}" + TEMPLATE, "2 are written otherwise once an answer follows, 2 have other"),
    (TEMPLATE.replace("<assistant>", "<assistant>think"), "2 are written otherwise once an answer follows, 2 have other"),
    (TEMPLATE.replace("message['content']", "message['content'] | replace(' ', '_')"), None),
]


@pytest.mark.parametrize(("template", "warning"), QUIRKS)
def test_a_template_that_writes_earlier_turns_otherwise_only_warns(tiny: Path, template: str, warning: str | None) -> None:
    subject = Subject(tiny)
    subject.tokenizer.chat_template = template
    subject.prompts = [make_prompt(subject.tokenizer, index, question) for index, question in enumerate(QUESTIONS)]
    found = subject.check()
    assert (found.warning is None) == (warning is None)
    assert (warning or "") in (found.warning or "")
    assert found.measured["template_round_trips"] == 0


def test_a_template_that_takes_no_answer_only_warns(tiny: Path) -> None:
    subject = Subject(tiny)
    subject.tokenizer.chat_template = "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    assert "2 are written otherwise" in (subject.check().warning or "")


@pytest.mark.parametrize(
    ("algorithm", "given"), [("grpo", {"finetuning": "lora"}), ("ppo", {}), ("ppo", {"value_model": "shared_backbone"})]
)
def test_weights_optimizers_and_gradients_are_as_before(tiny: Path, algorithm: str, given: dict[str, Any]) -> None:
    subject = Subject(tiny, algorithm, kl_coefficient=0.1, **given)
    before = state_digest({"weights": subject.policy.trainable_state(), "optimizers": subject.learner.state()})
    base = state_digest(dict(subject.policy.model.state_dict()))
    frozen = {name for name, parameter in subject.policy.model.named_parameters() if not parameter.requires_grad}
    subject.check()
    assert state_digest({"weights": subject.policy.trainable_state(), "optimizers": subject.learner.state()}) == before
    assert state_digest(dict(subject.policy.model.state_dict())) == base
    assert {name for name, parameter in subject.policy.model.named_parameters() if not parameter.requires_grad} == frozen
    parameters = [*subject.policy.model.parameters(), *subject.policy.value_parameters()]
    assert [parameter for parameter in parameters if parameter.grad is not None] == []


def test_a_failure_leaves_no_gradient_either(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(tiny)
    monkeypatch.setattr("trainer.preflight._check_gradients", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        subject.check()
    assert all(parameter.grad is None for parameter in subject.policy.policy_parameters())


def test_it_looks_at_two_short_prompts_and_a_few_tokens(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(tiny, microbatch_tokens=16, max_completion_tokens=200)
    subject.prompts += [make_prompt(subject.tokenizer, 3, "a" * 300)]
    generate, seen = RolloutEngine.generate, []

    def noted(self: RolloutEngine, prompts: list[Prompt], group_size: int, sampling: Any, **named: Any) -> Any:
        seen.append(([(prompt.index, len(prompt.token_ids)) for prompt in prompts], group_size, sampling.max_completion_tokens))
        assert sampling.purpose is Purpose.PREFLIGHT
        return generate(self, prompts, group_size, sampling, **named)

    monkeypatch.setattr(RolloutEngine, "generate", noted)
    subject.check()
    subject.prompts = subject.prompts[-1:]
    subject.check()
    assert seen == [([(1, 5), (0, 17)], 2, 16), ([(3, 64), (4, 64)], 2, 16)]


def test_prompts_of_one_length_are_as_good(tiny: Path) -> None:
    prompts = [make_prompt(load_tokenizer(tiny), index, "same") for index in range(3)]
    assert [prompt.index for prompt in choose_prompts(prompts)] == [0, 1]


def test_a_run_says_what_it_measured_and_a_resumed_one_does_not_measure_again(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=2, resume_point_interval=1)
    assert train_here(folder).end is End.SUCCEEDED
    (event,) = [event for event in read_events(folder) if event["data"].get("code") == "preflight_passed"]
    assert event["data"].keys() == {"code", *ADVICE}
    assert train_here(folder).end is End.SUCCEEDED
    codes = [event["data"].get("code") for event in read_events(folder)]
    assert "resumed" in codes
    assert codes.count("preflight_passed") == 1


def test_a_violated_property_fails_the_job_before_anything_is_trained_or_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.session.end_token_ids", lambda *_: frozenset({5}))
    grader = FunctionGrader(letter_fraction)
    outcome = train_here(make_run_directory(tmp_path / "run", valid_rows=2), grader)
    assert (outcome.end, outcome.code, outcome.retryable, outcome.step) == (End.FAILED, "preflight_failed", False, 0)
    assert "template_round_trips" in (outcome.message or "")
    assert grader.requests == []
    assert (tmp_path / "run" / METRICS).read_text() == ""


@pytest.mark.parametrize(
    ("algorithm", "given"), [("ppo", {"finetuning": "lora", "minibatches_per_batch": 2}), ("grpo", {"kl_coefficient": 0.1, "top_p": 0.9})]
)
def test_a_run_with_preflight_is_bit_identical_to_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, given: dict[str, Any]
) -> None:
    digests = []
    for name in ("with", "without"):
        folder = make_run_directory(tmp_path / name, algorithm=algorithm, max_steps=2, **given)
        assert train_here(folder).end is End.SUCCEEDED
        weights = next(folder.glob("checkpoints/step_000002/*model.safetensors")).read_bytes()
        digests.append(([line.digest for line in read_metrics(folder)], weights))
        monkeypatch.setattr("trainer.loop.preflight", lambda run: None)
    assert digests[0] == digests[1]
    assert len(digests[0][0]) == 2
