"""Batch norm over ranks is made where the model will run: what it becomes depends on the device."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dist_defend.data.loader import LoaderConfig
from dist_defend.engine import context
from dist_defend.engine.context import Context

PACKAGE = Path(context.__file__).parents[1]


@pytest.mark.parametrize(("ranks", "seen"), [(2, ["meta"]), (1, [])])
def test_the_model_is_on_the_device_before_its_norms_are_synchronised(
    ranks: int, seen: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    devices: list[str] = []

    def convert(model: nn.Module, second_order: bool) -> None:
        devices.extend({parameter.device.type for parameter in model.parameters()})
        assert second_order

    monkeypatch.setattr(context, "convert_sync_batchnorm", convert)
    world: Any = SimpleNamespace(world_size=ranks, device=torch.device("meta"))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    Context(world, 0, LoaderConfig(), tmp_path).synchronise(model, second_order=True)
    assert devices == seen


def test_nothing_else_synchronises() -> None:
    callers = [file.name for file in PACKAGE.rglob("*.py") if "convert_sync_batchnorm(" in file.read_text()]
    assert sorted(callers) == ["collectives.py", "context.py"]
