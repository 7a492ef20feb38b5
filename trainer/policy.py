"""The model under training: loaded, scored, saved. Shapes of `trainer.batch` go in and out; packing and prefix sharing stay inside.

Weights are float32; with precision `bf16` forward and backward run under autocast. Dropout is off (evaluation mode, gradients on).
"""

import copy
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from core.errors import TrainingError, boundary
from core.options import Options
from trainer.adapters import POLICY, VALUE, adapter_parameters, add_adapters, no_adapter, only_adapter, save_adapter
from trainer.batch import Batch, Scores, Support
from trainer.layout import Layout, group_shapes, pack, pad, plan_microbatches
from trainer.logprobs import Head, score_tokens
from trainer.packed_attention import sharing
from trainer.probes import check_head, describe_head, make_layers_lean, takes_packed_rows
from trainer.recomputation import recompute_layers
from trainer.values import ValueHead, ValueModel

VALUE_WEIGHTS = "value.safetensors"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "generation_config.json",
)


class Policy:
    """A causal language model with, where the options ask for them, a value model and a reference.

    `score` gives log-probs under the current weights, `reference_logprobs` under the frozen ones.
    """

    def __init__(self, model: Any, options: Options, seed: int, device: torch.device, folder: Path) -> None:
        self._folder = folder
        self.model = model
        self.device = device
        self.options = options
        self._head_shape = describe_head(model)
        check_head(model, self._head_shape)
        self._packs = takes_packed_rows(model)
        make_layers_lean(model)
        if options.gradient_checkpointing:
            recompute_layers(model)
        self._reference: Any = None
        self._adapted: PeftModel | None = None
        if options.finetuning == "lora":
            self._adapted = add_adapters(model, options, seed)
        elif options.needs_reference:
            self._reference = _frozen_copy(model)
        self._value_model = self._make_value_model() if options.needs_values else None

    @classmethod
    def load(cls, model_folder: Path, options: Options, seed: int, device: torch.device) -> Self:
        """Raises: TrainingError where the folder holds no whole causal language model, InvalidRequest where options do not fit it."""
        return cls(load_model(model_folder).to(device), options, seed, device, model_folder)

    @property
    def model_config(self) -> Any:
        return self.model.config

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    @property
    def values_are_separate(self) -> bool:
        return self._value_model is not None and self._value_model.is_separate

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        if self.options.precision == "bf16":
            return torch.bfloat16
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    def head(self) -> Head:
        """The output layer with its current weights."""
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None), self._head_shape.scale, self._head_shape.soft_cap)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.options.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def plan(self, batch: Batch, rows: Tensor | None, microbatch_tokens: int) -> list[Tensor]:
        """Microbatches as row indices into `batch`: the whole groups of `rows` (None: all), in an order that shapes alone decide."""
        chosen = torch.arange(len(batch.groups)) if rows is None else rows.cpu()
        groups = group_shapes(batch.select(chosen.to(batch.groups.device)))
        plan = plan_microbatches(groups, microbatch_tokens, self._packs)
        members = [[row for group in microbatch for row in group.rows] for microbatch in plan]
        return [chosen[torch.tensor(microbatch)].to(batch.groups.device) for microbatch in members]

    def score(self, batch: Batch, temperature: float, *, with_values: bool = False) -> Scores:
        """Log-probs, entropies and values of the completion tokens of exactly these rows (one microbatch).

        With gradient if it is enabled.
        """
        layout = self._layout(batch)
        hidden = self._hidden(self.model, layout)
        logprobs, entropies = self._score_layout(hidden, self.head(), layout, batch.support, temperature)
        scores = Scores(_spread(logprobs, layout, batch), _spread(entropies, layout, batch))
        if with_values:
            seen = hidden.detach() if self.options.value_gradient == "head_only" else hidden
            scores.values, scores.bootstrap_values = self._values(seen, layout, batch)
        return scores

    def values(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The two values of `Scores` alone: no token is scored, and a separate value model spares the policy's pass."""
        layout = self._layout(batch)
        hidden = None if self.values_are_separate else self._hidden(self.model, layout)
        return self._values(hidden, layout, batch)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch, temperature: float) -> Tensor:
        """[b, T] float32 under the weights before training: the base without its adapter, or the frozen copy."""
        layout = self._layout(batch)
        if self._adapted is not None:
            with no_adapter(self._adapted):
                hidden = self._hidden(self.model, layout)
            head = self.head()
        elif self._reference is not None:
            hidden = self._hidden(self._reference, layout)
            layer = self._reference.get_output_embeddings()
            head = Head(layer.weight, getattr(layer, "bias", None), self._head_shape.scale, self._head_shape.soft_cap)
        else:
            raise TrainingError("a reference was asked for, but kl_coefficient is 0")
        return _spread(self._score_layout(hidden, head, layout, batch.support, temperature)[0], layout, batch)

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the policy's optimizer moves: all weights, or the adapter's."""
        return list(self._policy_weights().values())

    def value_parameters(self) -> list[nn.Parameter]:
        """The separate value model with its head; with a shared backbone the head alone; empty without a value model."""
        return [] if self._value_model is None else [parameter for _, parameter in self._value_model.named_parameters()]

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name: `policy.*` and `value.*`. The tensors are the live ones."""
        state = {f"policy.{name}": parameter.detach() for name, parameter in self._policy_weights().items()}
        named = [] if self._value_model is None else list(self._value_model.named_parameters())
        return state | {f"value.{name}": parameter.detach() for name, parameter in named}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Raises: TrainingError where `state` is not of this model and these options."""
        own = self.trainable_state()
        wrong = own.keys() ^ state.keys() or {name for name in own if own[name].shape != state[name].shape}
        if wrong:
            raise TrainingError(f"the saved weights do not fit: {len(wrong)} differ, first {min(wrong)!r}", code="resume_mismatch")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def save(self, folder: Path) -> str:
        """A folder that Hugging Face libraries load, with the tokenizer's files and the value model's weights. -> `full` or `lora`."""
        folder.mkdir(parents=True, exist_ok=True)
        _copy_tokenizer(self._folder, folder)
        if self._value_model is not None:
            weights = {name: parameter.detach().cpu().contiguous() for name, parameter in self._value_model.named_parameters()}
            save_file(weights, folder / VALUE_WEIGHTS)
        if self._adapted is None:
            self.model.save_pretrained(folder)
            return "full"
        save_adapter(self._adapted, folder)
        return "lora"

    def _policy_weights(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters()) if self._adapted is None else adapter_parameters(self._adapted, POLICY)

    def _make_value_model(self) -> ValueModel:
        head = ValueHead(self.model.config.get_text_config().hidden_size, self.device)
        if self.options.value_model == "shared_backbone":
            return ValueModel(head, None, {})
        if self._adapted is not None:
            return ValueModel(head, self._run_value_adapter, adapter_parameters(self._adapted, VALUE))
        backbone = copy.deepcopy(self.model.base_model)
        return ValueModel(head, lambda layout: self._run(backbone, layout), dict(backbone.named_parameters()))

    def _run_value_adapter(self, layout: Layout) -> Tensor:
        if self._adapted is None:
            raise TrainingError("the value adapter needs an adapted model")
        with only_adapter(self._adapted, VALUE):
            return self._hidden(self.model, layout)

    def _values(self, policy_hidden: Tensor | None, layout: Layout, batch: Batch) -> tuple[Tensor, Tensor | None]:
        if self._value_model is None:
            raise TrainingError("values were asked for, but the options have no value model")
        values, end_values = self._value_model.values(layout, policy_hidden)
        return _spread(values, layout, batch), end_values if self.options.truncation_bootstrap else None

    def _layout(self, batch: Batch) -> Layout:
        groups = group_shapes(batch)
        if self._packs:
            return pack(batch, groups, self.compute_dtype)
        return pad(batch, groups)

    def _hidden(self, model: Any, layout: Layout) -> Tensor:
        return self._run(model.base_model, layout)

    def _run(self, backbone: Any, layout: Layout) -> Tensor:
        """-> [R * S, H], the last hidden states."""
        positions = {} if layout.position_ids is None else {"position_ids": layout.position_ids}
        with self.autocast(), sharing(layout.sharing):
            hidden: Tensor = backbone(input_ids=layout.input_ids, use_cache=False, **positions).last_hidden_state
        return hidden.flatten(0, 1)

    def _score_layout(
        self, hidden: Tensor, head: Head, layout: Layout, support: Support | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        chosen = None if support is None else support.select(layout.places)
        return score_tokens(hidden.index_select(0, layout.sources), head, layout.targets, temperature, self.compute_dtype, chosen)


def load_model(folder: Path) -> Any:
    """The causal language model in `folder`, float32, evaluation mode. Raises: TrainingError naming what is missing."""
    transformers_logging.disable_progress_bar()
    with boundary(TrainingError, f"model folder {folder.name}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    model, report = loaded
    if report["missing_keys"] or report["mismatched_keys"]:
        raise TrainingError(f"the weights in {folder.name} lack {sorted(report['missing_keys'])[:3]}", code="model_incomplete")
    return model.eval()


def _frozen_copy(model: Any) -> Any:
    return copy.deepcopy(model).requires_grad_(False)


def _spread(numbers: Tensor, layout: Layout, batch: Batch) -> Tensor:
    """[N] -> [b, T], 0 where nothing is scored."""
    shape = batch.completion_mask.shape
    return numbers.new_zeros(shape.numel()).index_copy(0, layout.places, numbers).view(shape)


def _copy_tokenizer(source: Path, target: Path) -> None:
    files: Iterable[Path] = {path for pattern in _TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}
    for path in sorted(files):
        shutil.copyfile(path, target / path.name)
