"""Weights and images that anyone can rebuild from a seed, and fingerprints to compare tensors by.

The golden numbers in golden/ are what the papers' published code (jinyuan-jia/BadEncoder, wssun/MIMIC) gave on them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Any]:
    """The numbers of golden/<name>.json."""
    numbers: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return numbers


def det_init(model: nn.Module, seed: int) -> None:
    """Fill the state dict, in its order, with one float64 draw per tensor from one CPU generator; integers become 0."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        is_scale = key.endswith("running_var") or (tensor.ndim < 2 and key.endswith("weight"))
        draw = (torch.rand if is_scale else torch.randn)(tensor.shape, generator=generator, dtype=torch.float64)
        if is_scale:
            draw += 0.5
        elif tensor.ndim >= 2:
            draw /= tensor[0].numel() ** 0.5
        else:
            draw *= 0.1
        tensor.copy_(draw)


def det_images(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float64 of that shape: it stands for images that are normalised already."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fingerprint(tensor: Tensor) -> tuple[float, float]:
    """Norm and sum, which stand for the tensor."""
    tensor = tensor.detach().double()
    return tensor.norm().item(), tensor.sum().item()


def assert_fingerprint(tensor: Tensor, expected: tuple[float, float], rel: float = 1e-9, what: str = "") -> None:
    """Norm to `rel`; sum to `rel` of itself or of the norm, whichever is larger."""
    norm, total = fingerprint(tensor)
    assert norm == pytest.approx(expected[0], rel=rel, abs=1e-15), f"{what} norm"
    assert total == pytest.approx(expected[1], rel=rel, abs=rel * expected[0] + 1e-15), f"{what} sum"
