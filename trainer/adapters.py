"""LoRA adapters on a frozen base: made without any generator but ours, switched without losing gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from core.errors import InvalidRequest, boundary
from core.options import Options
from trainer.random import Purpose, normals

POLICY, VALUE = "default", "value"
_STREAMS = {POLICY: 0, VALUE: 2**24}


def add_adapters(model: Any, options: Options, seed: int) -> PeftModel:
    """`model` with the policy's adapter and, for a separate value model, a second one. B is 0, so that both start as the base.

    Raises: InvalidRequest where `lora_targets` names nothing or something that cannot be adapted.
    """
    names = [POLICY, VALUE] if options.value_model == "separate" else [POLICY]
    with boundary(InvalidRequest, "lora_targets"):
        # Made on the meta device: peft's own initialisation would draw from torch's generator.
        adapted: Any = get_peft_model(model, _config(options), adapter_name=POLICY, low_cpu_mem_usage=True)
        for name in names[1:]:
            adapted.add_adapter(name, _config(options), low_cpu_mem_usage=True)
    _check_layers(adapted)
    for name in names:
        _initialise(adapted, name, seed)
    unset = [name for name, parameter in adapted.named_parameters() if parameter.is_meta]
    if unset or isinstance(adapted.get_base_model().get_output_embeddings(), LoraLayer):
        raise InvalidRequest(
            f"lora_targets {list(options.lora_targets)}: embeddings and the output head cannot be adapted.", param="lora_targets"
        )
    thaw(adapted)
    whole: PeftModel = adapted
    return whole


def _config(options: Options) -> LoraConfig:
    targets: Any = list(options.lora_targets)
    if targets == ["all-linear"]:
        targets = "all-linear"
    alpha: Any = options.lora_alpha
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )


def _check_layers(model: PeftModel) -> None:
    """Raises: InvalidRequest for stacked experts, whose weights are no [out, in] of one layer."""
    for name, layer in _layers(model):
        if getattr(layer.get_base_layer(), "weight", None) is None:
            kind = type(layer.get_base_layer()).__name__
            raise InvalidRequest(
                f"lora_targets: {name} is a {kind}, which cannot be adapted. Name linear layers, such as the attention's, "
                "or set finetuning to 'full'.",
                param="lora_targets",
            )


def _initialise(model: PeftModel, name: str, seed: int) -> None:
    """A normal with the variance 1 / (3 * inputs) of peft's uniform default, B zero."""
    for stream, (_, layer) in enumerate(_layers(model)):
        if name not in layer.lora_A:
            continue
        device = layer.get_base_layer().weight.device
        a, b = layer.lora_A[name], layer.lora_B[name]
        numbers = normals(seed, Purpose.INITIALISATION, _STREAMS[name] + stream, a.weight.numel())
        start = torch.from_numpy(numbers).view(a.weight.shape) * (3 * a.weight.shape[1]) ** -0.5
        a.weight = nn.Parameter(start.to(device, torch.float32))
        b.weight = nn.Parameter(torch.zeros(b.weight.shape, device=device))


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return sorted((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def adapter_parameters(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """The weights of adapter `name` by their names in `model`."""
    return {full: parameter for full, parameter in model.named_parameters() if ".lora_" in full and f".{name}." in full}


def save_adapter(model: PeftModel, folder: Path) -> None:
    """The policy's adapter, as peft loads it: the same weights give the same files, in whatever directory and process.

    peft would write the base model's path on this host, and the adapted modules in the order of a set.
    """
    config: Any = model.peft_config[POLICY]
    config.base_model_name_or_path = ""
    config.target_modules = sorted(config.target_modules)
    model.save_pretrained(str(folder), selected_adapters=[POLICY], save_embedding_layers=False)
    (folder / "README.md").unlink()


def thaw(model: nn.Module) -> None:
    """Every adapter learns; the base does not.

    Switching freezes the adapters that are not in use, and a frozen leaf drops the gradient of a graph made earlier.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


@contextmanager
def only_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, forward passes of `model`, or of the part of a model that it is, use adapter `name` in place of the policy's."""
    _switch(model, name)
    try:
        yield
    finally:
        _switch(model, POLICY)


def _switch(model: nn.Module, name: str) -> None:
    for _, layer in _layers(model):
        layer.set_adapter(name)
    thaw(model)


def adapter_in_use(model: nn.Module) -> str:
    """The adapter that a forward pass of `model` would use now; the policy's too where it has none."""
    names = {name for _, layer in _layers(model) for name in layer.active_adapters}
    return VALUE if names == {VALUE} else POLICY


@contextmanager
def no_adapter(model: PeftModel) -> Iterator[None]:
    """Inside, forward passes are those of the base."""
    with model.disable_adapter():
        yield
    thaw(model)


def base_linear(linear: Any) -> Any:
    """The layer itself, without the adapter around it."""
    return linear.get_base_layer() if isinstance(linear, LoraLayer) else linear


def merged_weight(linear: Any) -> Tensor:
    """The weight [out, in] that `linear` applies, the policy's adapter included."""
    weight: Tensor = base_linear(linear).weight.detach()
    if base_linear(linear) is linear:
        return weight
    delta: Tensor = linear.get_delta_weight(POLICY)
    return weight + delta.detach()
