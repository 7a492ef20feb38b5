"""The peer's side of a race: TRL's GRPOTrainer, its own training loop, stopped between its steps by a callback.

On-policy, no reference model, no checkpointing of activations, nothing logged or saved: all in its favour.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.contender import Track
from benchmarks.library import ForcedLengths, load_library_model
from benchmarks.machine_switches import set_up_peer
from benchmarks.phases import PhaseClock, now, peak_bytes
from benchmarks.workload import BETAS, GROUP_SIZE, LEARNING_RATE, LORA_ALPHA, LORA_RANK, NUM_PROMPTS, Workload, prompt_rows, reward

MANY_STEPS = 100_000
ROWS_AHEAD = 10_000


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer with a clock at its phases."""

    def __init__(
        self,
        workload: Workload,
        micro_batch: int,
        output: str,
        callbacks: list[TrainerCallback],
        *,
        adapter: Path | None = None,
        rewards: Callable[..., list[float]] | None = None,
        **changes: Any,
    ) -> None:
        """`adapter`: weights to start from; `rewards`: in place of the workload's; `changes` to the configuration."""
        self.clock = PhaseClock()
        self._optimizer_start = 0.0
        model = load_model(workload, adapter)
        rows = [{"prompt": row["messages"]} for row in prompt_rows()]
        super().__init__(
            model=model,
            reward_funcs=rewards or reward_texts,
            args=make_config(workload, micro_batch, output, **changes),
            train_dataset=Dataset.from_list(rows * (ROWS_AHEAD // len(rows))),
            processing_class=AutoTokenizer.from_pretrained(workload.model),
            callbacks=callbacks,
        )
        forced = [ForcedLengths(workload.lengths, self.eos_token_ids)]
        generate = self.model.generate
        self.model.generate = lambda **inputs: generate(**inputs, logits_processor=forced)
        self.accelerator.backward = self.clock.timed("backward", self.accelerator.backward)

    def _generate(self, *arguments: Any, **named: Any) -> Any:
        return self.clock.timed("generation", super()._generate)(*arguments, **named)

    def _generate_and_score_completions(self, *arguments: Any, **named: Any) -> Any:
        return self.clock.timed("generation and scoring", super()._generate_and_score_completions)(*arguments, **named)

    def _compute_loss(self, *arguments: Any, **named: Any) -> Any:
        return self.clock.timed("forward", super()._compute_loss)(*arguments, **named)

    def _clip_grad_norm(self, *arguments: Any, **named: Any) -> Any:
        self._optimizer_start = now()
        return super()._clip_grad_norm(*arguments, **named)

    def take_phases(self) -> dict[str, float]:
        """At the end of a step."""
        seconds = self.clock.take()
        scoring = seconds.pop("generation and scoring") - seconds["generation"]
        return {**seconds, "scoring": scoring, "optimizer": now() - self._optimizer_start}


def run_peer(track: Track, workload: Workload, micro_batch: int, switches: dict[str, Any]) -> None:
    """Steps until the race is over."""

    class Pace(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            track.ready({"micro_batch": micro_batch})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            track.finish_step(trainer.take_phases(), sum(workload.lengths), peak_bytes())

    set_up_peer(workload.num_threads, switches)
    with tempfile.TemporaryDirectory() as output:
        trainer = TimedTrainer(workload, micro_batch, output, [Pace()])
        trainer.train()


def save_peer_gradients(track: Track, workload: Workload, micro_batch: int, folder: Path, ours: dict[str, Any]) -> None:
    """The gradient of one whole step of TRL's on the prompts, completions and rewards of `ours`, into `folder`."""

    class Replay(TimedTrainer):
        trained_tokens = 0

        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
            assert [tuple(ids) for ids in prompt_ids] == ours["prompts"], "both sides render the same prompts in the same order"
            return [list(ids) for ids in ours["completions"]], None

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            self.trained_tokens += int(inputs["completion_mask"].sum())
            return super()._compute_loss(model, inputs)

    class Save(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
            torch.save(gradients, folder / "peer.pt")

    set_up_peer(workload.num_threads, ours)
    with tempfile.TemporaryDirectory() as output:
        changes = {"max_steps": 1, "max_grad_norm": 0.0}
        adapter = folder / "adapter" if workload.finetuning == "lora" else None
        trainer = Replay(workload, micro_batch, output, [Save()], adapter=adapter, rewards=lambda **_: ours["rewards"], **changes)
        trainer.train()
    track.ready({"trained_tokens": trainer.trained_tokens})


def make_config(workload: Workload, micro_batch: int, output: str, **changes: Any) -> GRPOConfig:
    """One optimizer step over the whole batch in micro-batches; the loss is GRPO's, as ours computes it."""
    settings: dict[str, Any] = {
        "output_dir": output,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": NUM_PROMPTS * GROUP_SIZE // micro_batch,
        "num_generations": GROUP_SIZE,
        "max_completion_length": max(workload.lengths),
        "shuffle_dataset": False,
        "beta": 0.0,
        "loss_type": "grpo",
        "scale_rewards": "none",
        "temperature": 1.0,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "bf16": workload.precision != "float32",
        "max_steps": MANY_STEPS,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return GRPOConfig(**{**settings, **changes})


def load_model(workload: Workload, adapter: Path | None) -> Any:
    """All in the precision of the workload, the adapter too: TRL leaves a new adapter on a bf16 model in float32, which is slower."""
    model = load_library_model(workload)
    if workload.finetuning == "full":
        return model
    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def reward_texts(completions: list[Any], **_: Any) -> list[float]:
    return [reward(messages[0]["content"]) for messages in completions]
