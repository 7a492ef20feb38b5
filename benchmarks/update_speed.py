"""Our update alone against the plain one of the library: padded rows, logits of the whole vocabulary, autograd, AdamW.

`python -m benchmarks.update_speed WORK_FOLDER --config fixed-full-bf16` runs the races whose names begin so on SmolLM2, keeps their raw
rounds in WORK_FOLDER/update_speed.json and prints the tables of all that this commit has kept. With `--shape` a model of that shape with
random weights takes its place, and learns from `--tokens` completion tokens: 512 in each, behind a prompt of 128. Made for a GPU.
Both sides hold float32 weights and, with bf16, compute under autocast; ids and rewards are random and the same for both.
"""

import argparse
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from benchmarks.contender import Contender, Track
from benchmarks.machine_switches import machine_switches, set_up_peer
from benchmarks.ours import make_job
from benchmarks.phases import PhaseClock, peak_bytes, time_backward
from benchmarks.plain_update import PlainUpdate
from benchmarks.race import choose, prepare, print_report, race_parser, run_rounds, say
from benchmarks.race_table import Race
from benchmarks.workload import GROUP_SIZE, Workload, completion_lengths
from core.options import Options
from trainer.advantages import make_estimator
from trainer.batch import Batch, Graded, Prompt, Rollout
from trainer.config import set_up_machine
from trainer.data import collate
from trainer.policy import Policy, load_model
from trainer.update import Learner

PROGRAM = "update_speed"
CONFIGS = ["-".join(parts) for parts in product(("fixed", "drawn"), ("full", "lora"), ("bf16", "float32"))]
SHAPES: dict[str, Any] = {
    "tiny": LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
    ),
}
SMOLLM2_PROMPT_TOKENS, SHAPE_PROMPT_TOKENS, SHAPE_COMPLETION_TOKENS = 48, 128, 512


@dataclass(frozen=True)
class Work:
    """What one race updates."""

    workload: Workload
    prompt_tokens: int
    device: str
    shape: str | None = None
    """None: the model in the workload's folder."""

    def make_model(self) -> Any:
        """Float32, evaluation mode, on the device."""
        if self.shape is None:
            return load_model(self.workload.model).to(self.device)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(SHAPES[self.shape], dtype=torch.float32).to(self.device).eval()


def make_batch(work: Work, vocabulary: int, options: Options) -> Batch:
    """Random ids and rewards in the workload's lengths; the same in every call."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (count,), generator=generator).tolist())

    graded, prompt = [], Prompt(0, (), "", {})
    for row, length in enumerate(work.workload.lengths):
        if row % GROUP_SIZE == 0:
            prompt = Prompt(row // GROUP_SIZE, ids(work.prompt_tokens), "", {})
        rollout = Rollout(prompt, row % GROUP_SIZE, ids(length), (0.0,) * length, "length", "")
        graded.append(Graded(rollout, float(torch.rand((), generator=generator))))
    return collate(graded, options, torch.device(work.device))


def update_ours(track: Track, work: Work) -> None:
    job = make_job(work.workload)
    set_up_machine(job)
    policy = Policy(work.make_model(), job.options, job.seed, torch.device(work.device), work.workload.model)
    learner = Learner(policy, job.options, job.seed, 1_000_000, lambda: None)
    batch = make_batch(work, policy.model_config.vocab_size, job.options)
    clock = PhaseClock()
    time_backward(clock)
    policy.score = clock.timed("forward", policy.score)  # type: ignore[method-assign]
    update = clock.timed("update", learner.update)
    track.ready(machine_switches())
    for step in range(1, 1_000_000):
        plan = learner.plan(batch, step)
        scored = learner.score(batch, plan)
        update(scored, make_estimator(job.options)(scored, 0.0), plan, step)
        seconds = clock.take()
        passes = {name: seconds[name] for name in ("forward", "backward")}
        track.finish_step({**passes, "optimizer": seconds["update"] - sum(passes.values())}, sum(work.workload.lengths), peak_bytes())


def update_plainly(track: Track, work: Work, switches: dict[str, Any]) -> None:
    set_up_peer(work.workload.num_threads, switches)
    clock = PhaseClock()
    time_backward(clock)
    model, options = work.make_model(), make_job(work.workload).options
    batch = make_batch(work, model.config.vocab_size, options)
    advantages = make_estimator(options)(batch, 0.0).advantages
    plain = PlainUpdate(model, work.workload, clock)
    track.ready({})
    while True:
        plain.update(batch, advantages)
        track.finish_step(clock.take(), sum(work.workload.lengths), peak_bytes())


def make_work(config: str, model: Path, given: argparse.Namespace) -> Work:
    kind, finetuning, precision = config.split("-")
    if given.shape is None:
        workload = Workload(model, completion_lengths(kind), finetuning, precision, given.threads)  # type: ignore[arg-type]
        return Work(workload, SMOLLM2_PROMPT_TOKENS, given.device)
    lengths = (SHAPE_COMPLETION_TOKENS,) * (given.tokens // SHAPE_COMPLETION_TOKENS)
    workload = Workload(model, lengths, finetuning, precision, given.threads)  # type: ignore[arg-type]
    return Work(workload, SHAPE_PROMPT_TOKENS, given.device, given.shape)


def run_race(title: str, work: Work, log: Path, rounds: int) -> Race:
    with Contender("ours", log, update_ours, work) as ours, Contender("plain", log, update_plainly, work, ours.facts) as peer:
        for contender in (ours, peer):
            say(f"{title}, {contender.name}, warm-up", contender.step())
        return run_rounds(title, ours, peer, rounds)


def parse_arguments() -> argparse.Namespace:
    parser = race_parser(PROGRAM, __doc__, CONFIGS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, help="a model of this shape with random weights; fixed lengths only")
    parser.add_argument("--tokens", type=int, default=16384, help="completion tokens of a step with --shape, in multiples of 4096")
    given = parser.parse_args()
    if given.tokens % (GROUP_SIZE * SHAPE_COMPLETION_TOKENS):
        parser.error(f"--tokens {given.tokens}: a multiple of {GROUP_SIZE * SHAPE_COMPLETION_TOKENS} is wanted.")
    if given.shape is not None:
        given.model = Path()
    return given


def main() -> None:
    given = parse_arguments()
    chosen = choose([config for config in CONFIGS if given.shape is None or config.startswith("fixed")], given.config)
    model, log, record = prepare(given, PROGRAM)
    for config in chosen:
        title = config if given.shape is None else f"{given.shape} {given.tokens} {config.removeprefix('fixed-')}"
        start = time.monotonic()
        record.add(run_race(title, make_work(config, model, given), log, given.rounds))
        print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)
    print_report(record, given.threads, [])


if __name__ == "__main__":
    main()
