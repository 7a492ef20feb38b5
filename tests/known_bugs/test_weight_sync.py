"""R22: the sampler follows every update, keeps nothing of earlier weights, and merging an adapter for it leaves the reference alone."""

from pathlib import Path

import pytest
import torch

from tests.trainer.batches import dense_logprobs, make_prompts, make_sampling
from tests.trainer.learners import make_learner, run_step
from trainer import rollout as rollout_module
from trainer.batch import Batch, Graded, Rollout
from trainer.data import collate
from trainer.rollout import RolloutEngine
from trainer.tokens import load_tokenizer
from trainer.update import Learner


@pytest.fixture(params=["native", "generic"])
def engine_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "generic":
        monkeypatch.setattr(rollout_module, "is_native", lambda _: False)
    return str(request.param)


def generate(engine: RolloutEngine, tiny: Path) -> list[Rollout]:
    return engine.generate(make_prompts(tiny), 4, make_sampling(), on_finished=lambda _: None, check=lambda: None)


def collated(rollouts: list[Rollout], learner: Learner) -> Batch:
    return collate([Graded(rollout, (rollout.g % 3) / 2) for rollout in rollouts], learner.options, torch.device("cpu"))


@pytest.mark.usefixtures("engine_kind")
@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_r22_the_same_engine_samples_from_the_new_weights_after_each_update(tiny: Path, finetuning: str) -> None:
    """prime-rl#1650, vllm#42125, ms-swift#6343: old weights, an adapter cached by its name, or a cached prompt of before the update."""
    given = {"finetuning": finetuning, "learning_rate": 3e-2, "kl_coefficient": 0.0, "group_size": 4, "max_completion_tokens": 24}
    learner = make_learner(tiny, **given)
    engine = RolloutEngine(learner.policy, load_tokenizer(tiny), "float32")
    earlier = generate(engine, tiny)
    for step in (1, 2):
        run_step(learner, collated(earlier, learner), step)
        rollouts = generate(engine, tiny)
        batch = collated(rollouts, learner)
        with torch.no_grad():
            difference = dense_logprobs(learner.policy.model, batch) - batch.sampling_logprobs
        assert difference[batch.completion_mask].abs().max() <= 1e-3
        assert [rollout.token_ids for rollout in rollouts] != [rollout.token_ids for rollout in earlier]
        assert [rollout.logprobs[0] for rollout in rollouts] != [rollout.logprobs[0] for rollout in earlier]
        earlier = rollouts


@pytest.mark.usefixtures("engine_kind")
@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_r22_neither_updates_nor_sampling_move_the_reference(tiny: Path, finetuning: str) -> None:
    """trl#2698, unsloth#1877: the adapter was merged into the weights that the reference uses, and not taken out again."""
    given = {"finetuning": finetuning, "learning_rate": 3e-2, "kl_coefficient": 0.1, "group_size": 4, "max_completion_tokens": 24}
    learner = make_learner(tiny, **given)
    engine = RolloutEngine(learner.policy, load_tokenizer(tiny), "float32")
    batch = collated(generate(engine, tiny), learner)
    before = learner.policy.reference_logprobs(batch, 1.0)
    for step in (1, 2):
        run_step(learner, batch, step)
        scored = learner.policy.score(batch, 1.0).logprobs.detach()
        generate(engine, tiny)
        assert torch.equal(learner.policy.reference_logprobs(batch, 1.0), before)
        assert torch.equal(learner.policy.score(batch, 1.0).logprobs.detach(), scored)
        assert (scored - before).abs().max() > 1e-2
