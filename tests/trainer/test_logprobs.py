import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer import logprobs as module
from trainer.batch import Support
from trainer.logprobs import Head, score_tokens

TOKENS, HIDDEN, VOCABULARY = 23, 8, 37


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    )
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def dense(hidden, weight, bias, targets, temperature, scale, soft_cap, kept=None):
    """The same numbers from the whole [N, V] tensor, for autograd to differentiate; over `kept` [N, V] bool only."""
    logits = functional.linear(hidden, weight, bias) * scale
    if soft_cap is not None:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    if kept is not None:
        logits = logits.masked_fill(~kept, float("-inf"))
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)


def random_support(targets):
    """(support, kept [N, V] bool): a random third of the vocabulary per row and the target; the first row has the target alone."""
    kept = torch.rand(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(9)) < 0.3
    kept[0] = False
    kept[torch.arange(TOKENS), targets] = True
    return Support.of([row.nonzero()[:, 0] for row in kept]), kept


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "MAX_CHUNK_LOGITS", 5 * VOCABULARY)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("temperature", "scale", "soft_cap"), [(1.0, 1.0, None), (0.6, 1.0, None), (1.7, 0.25, 3.0)])
@pytest.mark.parametrize("loss", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_chunked_head_equals_dense_autograd_in_float64(has_bias, temperature, scale, soft_cap, loss, restricted):
    hidden, weight, bias, targets = tensors(1)
    support, kept = random_support(targets) if restricted else (None, None)
    weights = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    used = [hidden, weight, bias] if has_bias else [hidden, weight]
    bias = bias if has_bias else None
    ours = score_tokens(hidden, Head(weight, bias, scale, soft_cap), targets, temperature, torch.float64, support)
    expected = dense(hidden, weight, bias, targets, temperature, scale, soft_cap, kept)
    parts = {"logprobs": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (1.0, 0.3)}[loss]
    gradients = []
    for pair in (ours, expected):
        total = sum(part * (weight_ * numbers).sum() for part, weight_, numbers in zip(parts, weights, pair, strict=True) if part)
        gradients.append(torch.autograd.grad(total, used))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation gave back."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        found = operation(*arguments, **(named or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_tensor_grows_with_tokens_times_vocabulary(monkeypatch, dtype):
    monkeypatch.setattr(module, "MAX_CHUNK_LOGITS", 5 * VOCABULARY)
    largest = []
    for repeats in (1, 8):
        hidden, weight, _, targets = tensors(1, torch.float64 if dtype == torch.float64 else torch.float32)
        hidden, targets = hidden.detach().repeat(repeats, 1).requires_grad_(), targets.repeat(repeats)
        with Largest() as watched:
            score_tokens(hidden, Head(weight), targets, 1.0, dtype)[0].sum().backward()
        largest.append(watched.elements)
    assert largest == [max(5 * VOCABULARY, weight.numel(), tensors(1)[0].numel() * repeats) for repeats in (1, 8)]


def test_a_narrow_product_still_gives_wide_numbers_and_head_gradient():
    hidden, weight, _, targets = tensors(2, torch.float32)
    logprobs, entropies = score_tokens(hidden, Head(weight), targets, 1.0, torch.bfloat16)
    assert logprobs.dtype == entropies.dtype == torch.float32
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    exact = torch.autograd.grad(dense(hidden, weight, None, targets, 1.0, 1.0, None)[0].sum(), weight)[0]
    assert functional.cosine_similarity(weight.grad.flatten(), exact.flatten(), dim=0) > 0.999


def test_frozen_head_gets_no_gradient_and_hidden_still_does():
    hidden, weight, _, targets = tensors(3)
    frozen = weight.detach()
    score_tokens(hidden, Head(frozen), targets, 1.0, torch.float64)[0].sum().backward()
    expected = torch.autograd.grad(dense(hidden, frozen, None, targets, 1.0, 1.0, None)[0].sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)


def test_a_support_of_one_token_is_certain_and_teaches_nothing():
    hidden, weight, _, targets = tensors(6, torch.float32)
    alone = Support.of(list(targets[:, None]))
    logprobs, entropies = score_tokens(hidden, Head(weight), targets, 0.7, torch.float32, alone)
    (logprobs + entropies).sum().backward()
    assert not any(numbers.any() for numbers in (logprobs, entropies, hidden.grad, weight.grad))


@pytest.mark.parametrize("restricted", [False, True])
def test_no_tokens_give_no_numbers(restricted):
    _, weight, _, _ = tensors(4)
    hidden, nothing = torch.zeros(0, HIDDEN, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    support = Support(torch.zeros(1, dtype=torch.int64), nothing.int()) if restricted else None
    logprobs, entropies = score_tokens(hidden, Head(weight), nothing, 1.0, torch.float64, support)
    assert logprobs.shape == entropies.shape == (0,)


def test_huge_logits_do_not_overflow():
    hidden, weight, _, targets = tensors(5, torch.float32)
    logprobs, entropies = score_tokens(hidden * 1e3, Head(weight), targets, 1.0, torch.float32)
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(entropies).all()
