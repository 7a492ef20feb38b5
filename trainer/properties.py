"""The properties that preflight checks: their names, how one was measured, and what to try where it does not hold."""

from dataclasses import dataclass

ADVICE = {
    "template_round_trips": "Use the tokenizer and chat template that the model was released with, and name the token that ends a "
    "turn in eos_token_id of its generation_config.json.",
    "tokens_trained_are_tokens_sampled": "This is a fault of the trainer: please report it with the model's name.",
    "sampler_agrees": "Sampler and trainer compute this model differently: try precision 'float32', then temperature 1, and report "
    "the model's name with what helped.",
    "first_ratio_is_one": "Two passes over the same tokens with the same weights differ: set dropout to 0 in the model's config.json, "
    "and leave 'deterministic' on.",
    "padding_changes_nothing": "Padding, or other rows of the batch, reach this model's answers: try precision 'float32'; if that does "
    "not help, this kind of model cannot be trained here.",
    "microbatches_change_nothing": "The gradient depends on which rows lie in one microbatch, or there is none: try precision 'float32', "
    "then a microbatch_tokens that holds a whole step, and look at lora_targets.",
}
"""By property, in the order of checking."""


@dataclass(frozen=True)
class Finding:
    """One property, measured."""

    name: str
    what: str
    measured: float
    allowed: float

    @property
    def holds(self) -> bool:
        """False also where the measure is not a number."""
        return self.measured <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: {self.what} is {self.measured:.3g}, allowed is {self.allowed:.3g}. {ADVICE[self.name]}"
