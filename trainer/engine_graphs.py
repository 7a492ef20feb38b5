"""A decode step recorded as a CUDA graph for each shape that occurs; on a CPU it is just called. Not yet run on a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, int], Tensor]
"""(tokens [b], positions [b], width) -> logits [b, V]; reads and writes tensors that stay where they are."""


Recording = tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]
"""(graph, its tokens, its positions, its logits)."""


class Recordings:
    """Those of one step, which is given at each call: held here, it and its owner would hold each other."""

    def __init__(self) -> None:
        self._recorded: dict[tuple[int, int], Recording] = {}

    def run(self, step: Step, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """The result holds until the next call."""
        if tokens.device.type != "cuda":
            return step(tokens, positions, width)
        shape = (len(tokens), width)
        if shape not in self._recorded:
            self._recorded[shape] = _record(step, tokens, positions, width)
        graph, own_tokens, own_positions, logits = self._recorded[shape]
        own_tokens.copy_(tokens)
        own_positions.copy_(positions)
        graph.replay()
        return logits


def _record(step: Step, tokens: Tensor, positions: Tensor, width: int) -> Recording:
    """Runs the step once before, as recording demands: it writes the same to the cache again."""
    tokens, positions = tokens.clone(), positions.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(tokens, positions, width)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(tokens, positions, width)
    return graph, tokens, positions, logits
