import pytest
import torch

from tests.trainer.batches import choose_layout, make_batch, make_policy

GROUPS = [([3, 6, 1, 4], [[9, 10, 1], [12, 1]]), ([3, 20, 1, 4], [[21], [22, 23, 24, 1]])]
KINDS = [("full", "separate"), ("lora", "separate"), ("full", "shared_backbone"), ("lora", "shared_backbone")]


def make(tiny, finetuning, kind, **options):
    return make_policy(tiny, finetuning=finetuning, advantage_estimator="gae", value_model=kind, **options)


def open_head(policy) -> None:
    """Gives the head weights, so that gradients pass it."""
    head = next(parameter for parameter in policy.value_parameters() if parameter.ndim == 1)
    with torch.no_grad():
        head.copy_(torch.linspace(-1, 1, head.numel()))


@pytest.mark.parametrize(("finetuning", "kind"), KINDS)
def test_values_start_at_zero_and_the_head_gets_gradient(tiny, finetuning, kind):
    policy = make(tiny, finetuning, kind)
    batch = make_batch(GROUPS)
    scores = policy.score(batch, 1.0, with_values=True)
    assert not scores.values.any()
    ((scores.values - 1) ** 2 * batch.completion_mask).sum().backward()
    head = policy.value_parameters()[:2]
    assert all(parameter.grad.abs().max() > 0 for parameter in head)
    before = [parameter.clone() for parameter in head]
    torch.optim.SGD(head, lr=0.1).step()
    assert all(not torch.equal(parameter, old) for parameter, old in zip(head, before, strict=True))
    assert policy.score(batch, 1.0, with_values=True).values[batch.completion_mask].abs().min() > 0


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_separate_value_model_and_policy_share_no_gradient(tiny, finetuning):
    policy = make(tiny, finetuning, "separate")
    open_head(policy)
    policy.score(make_batch(GROUPS), 1.0, with_values=True).values.sum().backward()
    assert all(parameter.grad is None for parameter in policy.policy_parameters())
    assert sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in policy.value_parameters()) > 2
    assert policy.values_are_separate
    assert not {id(parameter) for parameter in policy.policy_parameters()} & {id(parameter) for parameter in policy.value_parameters()}


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_one_backward_through_both_losses_reaches_both_models(tiny, finetuning):
    """Switching adapters freezes the other one: a gradient through a graph made before the switch must still arrive."""
    policy = make(tiny, finetuning, "separate")
    open_head(policy)
    scores = policy.score(make_batch(GROUPS), 1.0, with_values=True)
    (scores.logprobs.sum() + scores.values.sum()).backward()
    lora_b = [parameter for name, parameter in policy.model.named_parameters() if "lora_B.default" in name]
    assert all(parameter.grad is not None for parameter in policy.policy_parameters())
    assert all(parameter.grad.any() for parameter in lora_b)
    assert all(parameter.grad is not None for parameter in policy.value_parameters()[:2])


@pytest.mark.parametrize(("gradient", "reaches"), [("full", True), ("head_only", False)])
def test_value_gradient_option_decides_whether_the_backbone_learns_from_values(tiny, gradient, reaches):
    policy = make(tiny, "full", "shared_backbone", value_gradient=gradient)
    open_head(policy)
    policy.score(make_batch(GROUPS), 1.0, with_values=True).values.sum().backward()
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in policy.policy_parameters()) is reaches
    assert len(policy.value_parameters()) == 2


def test_values_are_saved_beside_the_policy(tiny, tmp_path):
    policy = make(tiny, "lora", "separate")
    policy.save(tmp_path)
    assert (tmp_path / "value.safetensors").exists()
    assert {name.split(".")[0] for name in policy.trainable_state()} == {"policy", "value"}


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["separate", "shared_backbone"])
def test_bootstrap_value_is_read_at_the_state_after_the_last_token(tiny, monkeypatch, kind, packs):
    """Also after a row with a hole, and after one in which nothing counts: there it is that of the prompt."""
    choose_layout(monkeypatch, packs)
    policy = make(tiny, "full", kind, truncation_bootstrap=True)
    open_head(policy)
    batch = make_batch([*GROUPS, ([3, 8, 8, 4], [[31, 32, 33], []])])
    batch.completion_mask[4, 1] = False
    found = policy.score(batch, 1.0, with_values=True).bootstrap_values
    assert torch.equal(found, policy.values(batch)[1])
    head = policy.value_parameters()[0]
    for row in range(6):
        length = [3, 2, 1, 4, 3, 0][row]
        ids = torch.cat([batch.prompt_ids[row][batch.prompt_mask[row]], batch.completion_ids[row, :length]])
        expected = policy.model.base_model(input_ids=ids[None]).last_hidden_state[0, -1] @ head
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-4)


def test_bootstrap_values_are_given_only_where_the_option_asks(tiny):
    policy = make(tiny, "full", "separate")
    assert policy.values(make_batch(GROUPS))[1] is None
    assert policy.score(make_batch(GROUPS), 1.0, with_values=True).bootstrap_values is None
