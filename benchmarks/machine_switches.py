"""How matrix products are computed: what our trainer sets, the peer gets too."""

from typing import Any

import torch


def machine_switches() -> dict[str, Any]:
    """What is set in this process."""
    return {
        "fp32_precision": torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        "float32_matmul": torch.get_float32_matmul_precision(),
    }


def set_up_peer(num_threads: int, switches: dict[str, Any]) -> None:
    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision(switches["float32_matmul"])
    torch.backends.mkldnn.matmul.fp32_precision = switches["fp32_precision"]  # type: ignore[attr-defined]
