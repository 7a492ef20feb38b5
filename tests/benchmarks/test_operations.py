"""Operation counts against a model small enough to count by hand, and against torch's own counter on a real one."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floor import floor_seconds
from benchmarks.measured_step import random_model
from benchmarks.operations import Needs, Shape, Work, optimizer_needs, rollout_needs, update_needs

TINY = Shape(hidden=2, intermediate=3, layers=1, heads=1, kv_heads=1, head_dim=2, vocabulary=5)
WORK = Work(prompts=1, group_size=2, prompt_tokens=2, completion_tokens=2)


def test_weights_are_those_of_the_model() -> None:
    # Queries, keys, values 2 x 6, output 2 x 2, gate and up 2 x 6, down 3 x 2; head 2 x 5; three norms of 2.
    assert (TINY.layer_weights, TINY.head_weights, TINY.parameters) == (12 + 4 + 12 + 6, 10, 50)
    shape = Shape(hidden=16, intermediate=24, layers=3, heads=4, kv_heads=2, head_dim=8, vocabulary=32)
    model = random_model(shape)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert Shape.of(model.config) == shape


def test_rollout_counts_each_prompt_once_and_no_completions_last_token() -> None:
    # The prompt's 2 tokens and 1 token of each completion pass the layers, 3 of these positions the head.
    products = 2 * 34 * (2 + 2) + 2 * 10 * 3
    # Pairs: 1 + 2 within the prompt; each completion's token sees the prompt and itself. 8 operations each.
    attention = 8 * (3 + 2 * 3)
    # Two passes over 44 weights; 2 tokens look at keys and values of 2 numbers at 3 positions.
    numbers = 2 * 44 + 2 * 3 * 2 * 2
    assert rollout_needs(TINY, WORK, weight_bytes=2) == Needs(products + attention, 2 * numbers)


def test_update_counts_the_shared_prompt_once_and_the_backward_pass_twice() -> None:
    # 2 + 2 * 2 tokens through the layers, 4 through the head; a completion's tokens see 3 and 4 positions.
    forward = 2 * 34 * 6 + 2 * 10 * 4 + 8 * (3 + 2 * (3 + 4))
    assert update_needs(TINY, WORK) == Needs(3 * forward, 0.0)


def test_optimizer_moves_seven_float32_numbers_per_parameter() -> None:
    # Weight, gradient, two moments in; weight and moments out.
    assert optimizer_needs(TINY) == Needs(0.0, 50 * 7 * 4)


def test_torch_counts_the_same_products_in_a_forward_and_backward_pass() -> None:
    shape = Shape(hidden=16, intermediate=24, layers=3, heads=4, kv_heads=2, head_dim=8, vocabulary=32)
    model = random_model(shape)
    model.set_attn_implementation("eager")
    tokens = 5
    counter = FlopCounterMode(display=False)
    with counter:
        hidden = model.get_input_embeddings()(torch.arange(tokens)[None]).detach().requires_grad_()
        model(inputs_embeds=hidden).logits.sum().backward()
    # Eager attention computes every pair, also those that causality hides.
    forward = 2 * (shape.layer_weights + shape.head_weights) * tokens + shape.pair_operations * tokens**2
    assert counter.get_total_flops() == 3 * forward


def test_floor_is_whichever_takes_longer() -> None:
    assert floor_seconds(Needs(200.0, 30.0), rate=100.0, bytes_per_second=10.0) == 3.0
    assert floor_seconds(Needs(200.0, 30.0), rate=10.0, bytes_per_second=10.0) == 20.0
    assert floor_seconds(Needs(0.0, 30.0), rate=10.0, bytes_per_second=10.0) == 3.0
