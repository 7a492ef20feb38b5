"""The runs that get killed: a tiny model, eight steps of four prompts over ten rows: more than three passes through the data."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from core.grader_specs import PinnedGraderSpec, PinnedMultiGrader, PythonGrader, StringCheckGrader
from core.run_directory import JOB, ResolvedJob, publish_json
from tests.trainer.runs import make_run_directory

STEPS = 8
ROWS, BATCH_SIZE = 10, 4
INTERVAL = 2
"""Of evaluations, checkpoints and resume points."""

COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "batch_size": BATCH_SIZE,
    "eval_interval": INTERVAL,
    "checkpoint_interval": INTERVAL,
    "resume_point_interval": INTERVAL,
    "epochs_per_batch": 2,
    "minibatches_per_batch": 2,
    "microbatch_tokens": 64,
    "lr_schedule": "cosine",
    "warmup_steps": 2,
    "kl_coefficient": 0.05,
    "max_grader_failure_fraction": 1.0,
    "top_k": 30,
    "stop": ("m", "x"),
}
BY_ALGORITHM: dict[str, dict[str, Any]] = {
    "grpo": {"group_size": 4},
    "ppo": {"group_size": 2, "kl_target": 0.02, "kl_horizon": 50.0, "value_warmup_steps": 1},
}
BY_FINETUNING: dict[str, dict[str, Any]] = {"lora": {"lora_rank": 4, "learning_rate": 1e-2}, "full": {"learning_rate": 3e-3}}

MANY_EARLY_LETTERS = """
def grade(sample, item):
    return sum(1 for character in sample["output_text"] if character <= item["letter"]) // 3 / 2
"""
HAS_LETTER = StringCheckGrader(type="string_check", input="{{sample.output_text}}", reference="{{item.letter}}", operation="ilike")
GRADER = PinnedMultiGrader(
    type="multi",
    graders={"has": HAS_LETTER, "early": PythonGrader(type="python", source=MANY_EARLY_LETTERS)},
    calculate_output="0.5 * has + early",
)


@dataclass(frozen=True)
class Setting:
    algorithm: str
    finetuning: str
    max_staleness: int

    def __str__(self) -> str:
        return f"{self.algorithm}-{self.finetuning}-stale{self.max_staleness}"

    @property
    def options(self) -> dict[str, Any]:
        options = {**COMMON, **BY_ALGORITHM[self.algorithm], **BY_FINETUNING[self.finetuning]}
        if self.algorithm == "ppo":
            options["value_model"] = "shared_backbone" if self.max_staleness else "separate"
        elif not self.max_staleness:
            options["dynamic_sampling"] = 2
        return {**options, "finetuning": self.finetuning, "max_staleness": self.max_staleness}

    @property
    def completions_per_step(self) -> int:
        return BATCH_SIZE * int(BY_ALGORITHM[self.algorithm]["group_size"])


SETTINGS = [Setting(*parts) for parts in product(("grpo", "ppo"), ("lora", "full"), (0, 1))]


def make_directory(folder: Path, setting: Setting, grader: PinnedGraderSpec = GRADER, **job: Any) -> Path:
    """A run directory of `setting`; `job` are further fields of job.json."""
    model = {"hidden": 32, "head_scale": 12.0}
    make_run_directory(folder, algorithm=setting.algorithm, rows=ROWS, valid_rows=2, model=model, **setting.options)
    resolved = ResolvedJob.model_validate_json((folder / JOB).read_text())
    publish_json(folder / JOB, resolved.model_copy(update={"grader": grader, **job}))
    return folder


def epoch_of(step: int) -> int:
    """The pass over the data, from 0, in which the last prompt of `step` lies."""
    return (step * BATCH_SIZE - 1) // ROWS
