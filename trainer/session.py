"""Puts a run together from its directory: every part of the loop, ready at the step where it starts or goes on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.errors import InvalidRequest, TrainingError
from core.folders import folder_digest
from core.grader_specs import PinnedGraderSpec
from core.redaction import Redactor, secret_values
from core.run_directory import MODEL, REWARDS, STATE_HASH, TRAIN, VALID, ResolvedJob
from graders.build import build_grader
from graders.grade import Grader
from outbound.safe_http import NetworkPolicy
from trainer.advantages import Estimator, make_estimator
from trainer.batch import Prompt
from trainer.checkpoints import (
    Progress,
    ResumePoint,
    find_resume_point,
    prune_checkpoints,
    restore_outputs,
    save_checkpoint,
    save_resume_point,
    state_digest,
)
from trainer.collection import Collector, Pending, from_plain, to_plain
from trainer.config import (
    Schedule,
    grader_version,
    load_job,
    locate_models,
    longest_prompt,
    machine_facts,
    make_schedule,
    pass_threshold,
    set_up_machine,
)
from trainer.control import ControlReader, Pulse
from trainer.data import PromptOrder, load_prompts
from trainer.evaluation import Evaluator
from trainer.grading import GradingService
from trainer.journal import RewardJournal
from trainer.metrics import Recorder, Stopwatch
from trainer.policy import Policy
from trainer.preflight import Preflight, check_run
from trainer.random import Purpose
from trainer.rollout import RolloutEngine, Sampling
from trainer.tokens import end_token_ids, ignored_sampling_defaults, load_tokenizer
from trainer.update import Learner

Secrets = dict[str, dict[str, Any]]
MakeGrader = Callable[[PinnedGraderSpec, Secrets, NetworkPolicy], Grader]


@dataclass
class Run:
    """The parts of one run and where it stands."""

    directory: Path
    job: ResolvedJob
    device: torch.device
    schedule: Schedule
    policy: Policy
    collector: Collector
    learner: Learner
    preflight: Callable[[], Preflight]
    """Checks the parts of this run on a few prompts. Raises: PreflightFailed."""

    estimator: Estimator
    grading: GradingService
    evaluator: Evaluator | None
    """None without validation rows."""

    recorder: Recorder
    control: ControlReader
    clock: Stopwatch
    facts: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    pending: Pending | None = None
    """The rollouts of the next step, where they were sampled a step ahead."""

    @property
    def is_at_end(self) -> bool:
        """Whether the current step is the last one."""
        return self.progress.step == self.schedule.total_steps or bool(self.progress.ended_early)

    def advance(self, **changes: Any) -> None:
        self.progress = self.progress.model_copy(update=changes)

    def save_checkpoint(self) -> Path:
        """The model of the current step, with the step's metrics."""
        progress = self.progress
        valid = progress.valid_metrics if progress.evaluated_step == progress.step else {}
        facts = {**self.facts, STATE_HASH: self._state_digest()} if self.is_at_end else self.facts
        folder = save_checkpoint(self.directory, progress.step, self.policy.save, {**progress.train_metrics, **valid}, facts)
        prune_checkpoints(self.directory, self.job.options.keep_checkpoints)
        return folder

    def save_resume_point(self) -> Path:
        lines = self.grading.journal.lines_after(self.progress.step)
        weights, learner = self.policy.trainable_state(), self.learner.state()
        pending = None if self.pending is None else to_plain(self.pending)
        return save_resume_point(self.directory, self.progress, weights, learner, pending, lines, self.facts)

    def _state_digest(self) -> str:
        return state_digest({"weights": self.policy.trainable_state(), "learner": self.learner.state(), "pending": None})

    def close(self) -> None:
        self.grading.close()
        self.recorder.close()


def open_run(directory: Path, secrets: Secrets, control: ControlReader, pulse: Pulse, make_grader: MakeGrader = build_grader) -> Run:
    """Raises: InvalidRequest for rows that do not fit the model, TrainingError for a directory that is not whole."""
    job = load_job(directory)
    device = set_up_machine(job)
    _check_model(directory / MODEL, job)
    options, clock = job.options, Stopwatch()
    policy = Policy.load(directory / MODEL, options, job.seed, device)
    tokenizer = load_tokenizer(directory / MODEL)
    prompts = _load_rows(directory / TRAIN, "training_file", job, policy, tokenizer)
    if not prompts:
        raise TrainingError(f"{TRAIN} has no rows.")
    schedule = make_schedule(options, len(prompts))
    point = find_resume_point(directory)
    restore_outputs(directory, point)
    redactor = Redactor(secret_values(secrets))
    recorder = Recorder(directory, redactor, grader_version(job.grader), schedule.total_steps)
    network = NetworkPolicy(job.allowed_private_networks, job.allow_http_graders)
    journal = RewardJournal(directory / REWARDS)
    maker = partial(make_grader, locate_models(job.grader, directory), secrets, network)
    grading = GradingService(job, maker, journal, redactor, pulse.progress, recorder.event)
    engine = RolloutEngine(policy, tokenizer, options.precision)
    sampling = partial(make_sampling, job, end_token_ids(tokenizer, policy.generation_config))
    order = PromptOrder(job.seed, len(prompts), schedule.batch_size)
    learner = Learner(policy, options, job.seed, schedule.total_steps, pulse.progress)
    run = Run(
        directory=directory,
        job=job,
        device=device,
        schedule=schedule,
        policy=policy,
        collector=Collector(prompts, order, engine, grading, options, sampling, control, clock),
        learner=learner,
        preflight=partial(check_run, learner, engine, tokenizer, prompts, sampling(Purpose.PREFLIGHT, 0), control.check),
        estimator=make_estimator(options),
        grading=grading,
        evaluator=_make_evaluator(directory, job, policy, tokenizer, engine, grading, sampling),
        recorder=recorder,
        control=control,
        clock=clock,
        facts=machine_facts(options, device),
    )
    _announce_oddities(run, engine)
    if point is not None:
        _restore(run, point)
    return run


def make_sampling(
    job: ResolvedJob, ends: frozenset[int], purpose: Purpose, step: int, round_: int = 0, temperature: float | None = None
) -> Sampling:
    options = job.options
    return Sampling(
        seed=job.seed,
        purpose=purpose,
        step=step,
        round_=round_,
        temperature=options.temperature if temperature is None else temperature,
        max_completion_tokens=options.max_completion_tokens,
        stop=options.stop,
        end_token_ids=ends,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
    )


def _check_model(folder: Path, job: ResolvedJob) -> None:
    """Raises: InvalidRequest where the weights are no longer those that the job was submitted with."""
    if job.model.digest and folder_digest(folder.resolve()) != job.model.digest:
        message = f"The files of model '{job.model.name}' have changed since the job was submitted."
        raise InvalidRequest(message, code="model_changed", param="model")


def _load_rows(path: Path, param: str, job: ResolvedJob, policy: Policy, tokenizer: Any) -> list[Prompt]:
    """The prompts of a file; none where it does not exist."""
    if not path.exists():
        return []
    return load_prompts(path, param, tokenizer, longest_prompt(job.options, policy.model_config), job.options.reasoning_effort)


def _make_evaluator(
    directory: Path,
    job: ResolvedJob,
    policy: Policy,
    tokenizer: Any,
    engine: RolloutEngine,
    grading: GradingService,
    sampling: Callable[..., Sampling],
) -> Evaluator | None:
    """Raises: InvalidRequest where an option needs validation rows and there are none."""
    prompts = _load_rows(directory / VALID, "validation_file", job, policy, tokenizer)
    if not prompts:
        for name in ("target_reward", "patience"):
            if getattr(job.options, name) is not None:
                raise InvalidRequest(f"{name} needs validation rows: there are none to evaluate on.", param=name)
        return None
    return Evaluator(prompts, engine, grading, job.options, sampling, pass_threshold(job.grader))


def _announce_oddities(run: Run, engine: RolloutEngine) -> None:
    """Events for what the run does otherwise than its request might lead one to expect."""
    options = run.job.options
    if run.schedule.batch_size < options.batch_size:
        message = (
            f"batch_size {options.batch_size} is more than the {len(run.collector.prompts)} training rows: a step takes each row once."
        )
        run.recorder.event(message, "warn", data={"code": "batch_size_reduced"})
    ignored = ignored_sampling_defaults(run.policy.generation_config)
    if ignored:
        run.recorder.event(f"The model's own sampling defaults are not used: {ignored}.", data={"code": "sampling_defaults_ignored"})
    if not engine.is_native:
        message = "Rollouts of this model family use the library's forward pass, which is slower."
        run.recorder.event(message, "warn", data={"code": "generic_rollout_engine", "model_class": type(run.policy.model).__name__})
    if options.needs_reference and options.kl_estimator == "k3" and options.kl_placement == "reward":
        run.recorder.event("kl_estimator 'k3' in the reward has a biased gradient; 'k1' has not.", "warn", data={"code": "kl_biased"})


def _restore(run: Run, point: ResumePoint) -> None:
    point.load(run.policy.load_trainable_state, run.learner.load_state)
    run.progress = point.progress
    pending = point.pending(run.device)
    run.pending = None if pending is None else from_plain(pending, run.collector)
    differing = {name for name, value in run.facts.items() if point.manifest.facts.get(name) != value}
    run.recorder.event(f"Resumed after step {run.progress.step}.", data={"code": "resumed", "step": run.progress.step})
    if differing:
        message = f"Going on where {', '.join(sorted(differing))} differ: numbers will not be bit-identical to an uninterrupted run."
        run.recorder.event(message, "warn", data={"code": "resume_not_exact", "differing": sorted(differing)})
