import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from trainer.lean_layers import _RmsNorm, _SwiGlu, restore_layers, use_lean_layers
from trainer.probes import make_layers_lean

IDS = torch.tensor([[3, 6, 7, 8, 1, 4], [3, 20, 1, 4, 9, 9]])


def qwen3():
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=40, head_dim=8, **sizes)).eval()


def llama(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lean_modules(model):
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def gradients(model):
    output = model(input_ids=IDS).logits
    (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_numbers_and_gradients_are_those_of_the_librarys_own_layers(tiny, family):
    plain = llama(tiny) if family == "llama" else qwen3()
    lean = copy.deepcopy(plain)
    use_lean_layers(lean)
    assert len(lean_modules(lean)) == 3 * len(lean.model.layers)
    torch.testing.assert_close(lean(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    expected = gradients(plain)
    for name, found in gradients(lean).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)


def test_derivatives_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(3)
    hidden, other = (torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: _RmsNorm.apply(*inputs, 1e-3, torch.float64), (hidden, weight))
    assert torch.autograd.gradcheck(_SwiGlu.apply, (hidden, other))


def test_under_autocast_a_norm_gives_what_its_linear_layers_would_round_it_to(tiny):
    plain = llama(tiny)
    lean = copy.deepcopy(plain)
    use_lean_layers(lean)
    hidden = torch.randn(5, plain.config.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (model.model.layers[0].input_layernorm(hidden) for model in (lean, plain))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs.bfloat16(), rtol=2**-8, atol=0)


def test_a_copy_computes_with_its_own_weights(tiny):
    model = llama(tiny)
    use_lean_layers(model)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.model.layers[0].input_layernorm.weight)
    hidden = torch.ones(1, model.config.hidden_size)
    assert other.model.layers[0].input_layernorm(hidden).abs().sum() == 0
    assert model.model.layers[0].input_layernorm(hidden).abs().sum() > 0


def test_less_is_kept_for_the_backward_pass(tiny):
    kept = []
    for change in (lambda _: None, use_lean_layers):
        model, sizes = llama(tiny), {}
        change(model)

        def keep(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.model.layers[0].mlp(model.model.layers[0].input_layernorm(torch.ones(64, 64, requires_grad=True)))
        assert output.requires_grad
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.8 * kept[0]


def test_other_families_and_layers_whose_numbers_would_change_stay_as_they_are(tiny):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4)).eval()
    make_layers_lean(gpt2)
    assert lean_modules(gpt2) == []
    odd = llama(tiny)
    for layer in odd.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, inputs, output: output * 2)
        layer.input_layernorm.__class__ = type("OddRMSNorm", (type(layer.input_layernorm),), {"forward": lambda self, hidden: hidden * 3})
    make_layers_lean(odd)
    assert lean_modules(odd) == []


def test_restored_layers_are_the_librarys(tiny):
    model = llama(tiny)
    use_lean_layers(model)
    restore_layers(model)
    assert lean_modules(model) == []
