"""Collected only where there is a CUDA device: `make test-gpu`, at most ten minutes. Results repeat bit for bit."""

import os
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; the ranks of tests inherit it

import pytest
import torch

from tests.gpu.settings import repeatable

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    with repeatable():
        yield
