"""PPO's value model: a scalar head, and where its hidden states come from. Values are read at the state that predicts token t."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from trainer.layout import Layout

RunBackbone = Callable[[Layout], Tensor]
"""Last hidden states of a layout's R * S tokens. -> [R * S, H]."""


class ValueHead(nn.Module):
    """One number per hidden state, 0 before the first update. [N, H] -> [N] in float32 or wider."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, device=device))
        self.bias = nn.Parameter(torch.zeros((), device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.weight.dtype) @ self.weight + self.bias


class ValueModel:
    """A head on a backbone of its own (`run_backbone`) or, without one, on the policy's last hidden states."""

    def __init__(self, head: ValueHead, run_backbone: RunBackbone | None, backbone_parameters: dict[str, nn.Parameter]) -> None:
        self._head = head
        self._run_backbone = run_backbone
        self._backbone_parameters = backbone_parameters

    @property
    def is_separate(self) -> bool:
        return self._run_backbone is not None

    def values(self, layout: Layout, policy_hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """[R * S, H] of the policy, already detached where its backbone must not learn from values -> [N], and at the rows' ends [b].

        A separate model looks at the layout alone.
        """
        hidden = policy_hidden if self._run_backbone is None else self._run_backbone(layout)
        assert hidden is not None, "a head on the policy's backbone needs its hidden states"
        return self._head(hidden.index_select(0, layout.sources)), self._head(hidden.index_select(0, layout.ends))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The head's and, where it is separate, its backbone's."""
        for name, parameter in self._head.named_parameters():
            yield f"head.{name}", parameter
        for name, parameter in self._backbone_parameters.items():
            yield f"backbone.{name}", parameter
