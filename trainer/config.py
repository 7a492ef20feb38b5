"""What a run is made of, read from job.json and derived once: lengths, intervals, machine settings. Frozen; nothing is filled in later."""

import hashlib
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.compatibility import broken_rules, refusal
from core.errors import InvalidRequest, TrainingError, boundary
from core.grader_specs import PinnedEndpointGrader, PinnedGraderSpec, PinnedMultiGrader, PinnedRewardModelGrader, Thresholded
from core.options import Options
from core.run_directory import JOB, ResolvedJob


@dataclass(frozen=True)
class Schedule:
    """When things happen, in steps done."""

    batch_size: int
    """Q, at most the number of rows: no prompt stands twice in a step."""

    total_steps: int
    eval_interval: int
    checkpoint_interval: int
    resume_point_interval: int

    def is_evaluation_due(self, step: int) -> bool:
        return step % self.eval_interval == 0 or step == self.total_steps

    def is_checkpoint_due(self, step: int) -> bool:
        return step > 0 and step % self.checkpoint_interval == 0

    def is_resume_point_due(self, step: int) -> bool:
        return step > 0 and step % self.resume_point_interval == 0


def load_job(run_directory: Path) -> ResolvedJob:
    """Raises: TrainingError where job.json is missing, malformed or not resolved, InvalidRequest for options that contradict each other."""
    with boundary(TrainingError, JOB):
        job = ResolvedJob.model_validate_json((run_directory / JOB).read_text())
    if job.options.learning_rate is None or job.options.group_size is None:
        raise TrainingError(f"{JOB} must hold effective options: learning_rate and group_size are not set.")
    for rule in broken_rules(job.options, named=frozenset()):
        raise InvalidRequest(refusal(rule, job.options), code="incompatible_options", param=rule.option)
    return job


def make_schedule(options: Options, num_rows: int) -> Schedule:
    batch_size = min(options.batch_size, num_rows)
    total_steps = options.max_steps or math.ceil(options.n_epochs * num_rows / batch_size)
    eval_interval = options.eval_interval or max(1, total_steps // 10)
    return Schedule(batch_size, total_steps, eval_interval, options.checkpoint_interval or eval_interval, options.resume_point_interval)


def longest_prompt(options: Options, model_config: Any) -> int:
    """L, the prompt tokens that fit the model's context beside `max_completion_tokens`. Raises: InvalidRequest if none do."""
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return options.max_prompt_tokens or 2**31
    room = int(context) - options.max_completion_tokens
    if room < 1:
        message = f"max_completion_tokens {options.max_completion_tokens} leaves no room for a prompt in the model's context of {context}."
        raise InvalidRequest(message, param="method.reinforcement.hyperparameters.max_completion_tokens")
    return min(room, options.max_prompt_tokens or room)


def grader_version(spec: PinnedGraderSpec) -> str:
    """What stands with every sample: the pinned version of an endpoint, else the type with a digest of the whole spec."""
    if isinstance(spec, PinnedEndpointGrader):
        return spec.grader_version
    return f"{spec.type}@{hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:12]}"


def locate_models(spec: PinnedGraderSpec, run_directory: Path) -> PinnedGraderSpec:
    """`spec` with the folders of its reward models as paths of this host."""
    if isinstance(spec, PinnedMultiGrader):
        return spec.model_copy(update={"graders": {name: locate_models(member, run_directory) for name, member in spec.graders.items()}})
    if isinstance(spec, PinnedRewardModelGrader):
        return spec.model_copy(update={"folder": str(run_directory / spec.folder)})
    return spec


def pass_threshold(spec: PinnedGraderSpec) -> float:
    """The reward from which a completion counts as passed in reports: the grader's own threshold, else its best reward."""
    if not isinstance(spec, Thresholded):
        return 1.0
    return spec.best_reward if spec.pass_threshold is None else spec.pass_threshold


def set_up_machine(job: ResolvedJob) -> torch.device:
    """Thread count and deterministic kernels as the job says; -> the device to train on. Before any tensor work."""
    if job.num_threads:
        torch.set_num_threads(job.num_threads)
    torch.use_deterministic_algorithms(job.options.deterministic)
    if job.options.deterministic:
        os.environ.update({"OMP_DYNAMIC": "FALSE", "MKL_DYNAMIC": "FALSE", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine_facts(options: Options, device: torch.device) -> dict[str, Any]:
    """What bit-identical numbers depend on beside spec, weights and data: where these differ a resume is not exact."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "precision": options.precision,
        "deterministic": options.deterministic,
        "float32_matmul": torch.get_float32_matmul_precision(),
    }
