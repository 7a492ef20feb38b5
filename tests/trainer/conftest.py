from pathlib import Path

import pytest
import torch

from tests.tiny import build_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose distribution is far from uniform: 2 to 3 nats."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), head_scale=12.0)
