"""Every training option with its vetted default and its range. Which options go together: `core/compatibility.py`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

BASE_LEARNING_RATE = {"full": 1e-6, "lora": 2e-5}


class Options(BaseModel):
    """The effective options of a job: frozen, stored with it, dumped whole by the API and the trainer.

    Where `None` stands it means "from the data or the machine", and the docstring says how.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    # The contract's seven.
    n_epochs: Annotated[int, Field(ge=1, le=50)] = 1
    """Passes over the training file."""
    batch_size: Annotated[int, Field(ge=1, le=256)] = 8
    """Q, prompts per step."""
    learning_rate_multiplier: Positive = 1.0
    """Scales the base learning rate of `finetuning` (full 1e-6, lora 2e-5)."""
    compute_multiplier: Annotated[float, Field(gt=1e-5, le=10)] = 1.0
    """Scales the automatic group size."""
    reasoning_effort: Literal["default", "low", "medium", "high"] = "default"
    """Passed to the chat template; refused for a template without such a variable."""
    eval_interval: Count | None = None
    """Steps between evaluations. None: a tenth of all steps, at least 1."""
    eval_samples: Count = 1
    """Completions per validation row."""

    # Rollouts.
    learning_rate: Positive | None = None
    """None: the base rate of `finetuning` times `learning_rate_multiplier`."""
    group_size: Annotated[int, Field(ge=1, le=256)] | None = None
    """G, completions per prompt. None: max(2, round(8 * compute_multiplier)), with `gae` max(1, round(compute_multiplier))."""
    max_prompt_tokens: Count | None = None
    """None: what the model's context leaves beside `max_completion_tokens`."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=131_072)] = 512
    """T, sampled tokens per completion at most."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Divides the logits everywhere: sampling, old, current and reference log-probs."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Samples from the smallest set of tokens whose share of what top_k leaves reaches top_p, and scores over that set. 1: off."""
    top_k: Count | None = None
    """Samples from the top_k most likely tokens, and scores over them. None: off."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Samples from tokens at least min_p times as likely as the likeliest, and scores over them. 0: off."""
    dynamic_sampling: Annotated[int, Field(ge=0, le=16)] = 0
    """Rounds in which a step may replace groups without signal (all grades equal) by those of other prompts. 0: off (DAPO)."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1: the next batch is generated before the update, while graders work. 0: strictly on-policy."""
    stop: Annotated[tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...], Field(max_length=4, strict=False)] = ()
    """Strings that end a completion; the grader's text excludes them."""

    # Advantage.
    advantage_estimator: Literal["group", "gae", "batch"] = "group"
    """`group` (GRPO), `gae` (PPO), `batch` (REINFORCE++)."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """What a group-centred reward is divided by: standard deviation of the group, of the batch, or nothing (Dr. GRPO)."""
    advantage_baseline: Literal["mean", "leave_one_out"] = "mean"
    """Mean of the group, or of its other members (RLOO)."""
    whiten_advantages: bool = True
    """Advantages of a batch get mean 0 and variance 1 over counted tokens (`gae`)."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token (`gae`)."""
    gae_lambda: Fraction = 1.0
    """Lambda of the advantages (`gae`)."""
    value_gae_lambda: Fraction = 1.0
    """Lambda of the value head's targets (`gae`)."""
    truncation_bootstrap: bool = False
    """A truncated completion ends with the value of its last state in place of its grade (`gae`)."""

    # Objective.
    surrogate: Literal["clip", "cispo"] = "clip"
    """PPO clipping of the ratio, or CISPO (clipped ratio as a weight on the log-prob)."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Ratio per token, or of the mean log difference of the sequence (GSPO)."""
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: NotNegative = 0.2
    """The ratio is clipped above 1 + clip_high."""
    clip_dual: Annotated[float, Field(gt=1)] | None = None
    """For negative advantages the loss is at most -clip_dual * A. None: off."""
    loss_aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "sequence_mean"
    """Denominator of the minibatch: tokens (DAPO), tokens then sequences (GRPO), sequences * max_completion_tokens (Dr. GRPO)."""
    kl_coefficient: NotNegative = 0.04
    """Weight of KL(policy || reference). 0 loads no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators of the KL divergence."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """A term of the loss, or a penalty on the reward of each token."""
    kl_target: Positive | None = None
    """k1 per completion that the coefficient is steered to after each step. None: a fixed coefficient."""
    kl_horizon: Positive = 10_000.0
    """Completions over which the coefficient follows `kl_target`: a step moves it by at most 20 % * completions / kl_horizon, and 20 %."""
    entropy_coefficient: NotNegative = 0.0
    """Weight of the entropy bonus."""
    mismatch_correction: Literal["none", "truncate", "reject"] = "truncate"
    """Importance weight for sampler against trainer log-probs: none, capped, or sequences outside the cap dropped."""
    mismatch_cap: Annotated[float, Field(gt=1)] = 2.0
    """The cap of `mismatch_correction`."""
    mask_truncated: bool = False
    """Completions cut at `max_completion_tokens` count for nothing (counts = 0)."""
    overlong_penalty: Fraction = 0.0
    """Over this last fraction of `max_completion_tokens` the reward falls linearly, by 1 at the end (DAPO). 0: off."""

    # Value model.
    value_model: Literal["separate", "shared_backbone"] | None = None
    """None unless the estimator is `gae`; then `separate`."""
    value_gradient: Literal["full", "head_only"] = "full"
    """Whether the value loss reaches the shared backbone."""
    value_coefficient: Positive = 0.1
    """Weight of the value loss in the shared backbone."""
    value_clip: Positive | None = 0.2
    """New values are clipped to this distance from the recorded ones."""
    value_learning_rate: Positive | None = None
    """None: ten times `learning_rate` (separate), `learning_rate` (shared head)."""
    value_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps in which only the value model learns."""

    # Update.
    epochs_per_batch: Annotated[int, Field(ge=1, le=16)] = 1
    """Passes over the rollouts of a step."""
    minibatches_per_batch: Annotated[int, Field(ge=1, le=256)] = 1
    """Optimizer steps per pass; minibatches are whole groups."""
    microbatch_tokens: Annotated[int, Field(ge=16)] = 4096
    """Upper bound of prompt and completion tokens in one forward pass (one group at least)."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    weight_decay: NotNegative = 0.0
    """AdamW weight decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up."""
    max_grader_failure_fraction: Fraction = 0.2
    """Above this fraction of failed grades in a step the step waits, and then the job pauses (`grader_unavailable`)."""

    # Model and machine.
    finetuning: Literal["lora", "full"] = "lora"
    """Adapters on a frozen model, or all weights."""
    lora_rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of the adapters."""
    lora_alpha: Positive = 32.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_targets: Annotated[tuple[str, ...], Field(strict=False)] = ("all-linear",)
    """Modules with adapters; `all-linear` is every linear layer but the head."""
    precision: Literal["float32", "bf16"] = "bf16"
    """bf16: forward and backward in bf16 with float32 master weights."""
    gradient_checkpointing: bool = False
    """Computes the layers' activations again in the backward pass: less memory, about a third more time."""
    deterministic: bool = True
    """Deterministic kernels and a fixed thread count."""

    # Length of the run and what it keeps.
    max_steps: Count | None = None
    """None: ceil(n_epochs * rows / batch_size)."""
    checkpoint_interval: Count | None = None
    """Steps between checkpoints. None: as `eval_interval`."""
    resume_point_interval: Count = 10
    """Steps between resume points."""
    keep_checkpoints: Count = 3
    """Checkpoints with the best `valid_reward_mean` that are kept, beside the newest."""
    target_reward: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """The run ends, succeeded, at the first evaluation whose `valid_reward_mean` reaches it. None: off."""
    patience: Count | None = None
    """The run ends, succeeded, after so many evaluations in a row without a new best `valid_reward_mean`. None: off."""

    @property
    def needs_values(self) -> bool:
        return self.value_model is not None

    @property
    def needs_reference(self) -> bool:
        return self.kl_coefficient > 0


def _partial(model: type[BaseModel], name: str, doc: str) -> type[BaseModel]:
    """`model` with every field optional and "auto" allowed, for a request that names only what it changes."""
    fields: dict[str, Any] = {}
    for field_name, field in model.model_fields.items():
        annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        fields[field_name] = (annotation | Literal["auto"] | None, Field(default=None, description=field.description))
    return create_model(name, __config__=ConfigDict(extra="forbid", strict=True), __doc__=doc, **fields)


Hyperparameters = _partial(
    Options, "Hyperparameters", "The options that a request names; what is left out or 'auto' gets the vetted value."
)
