"""The golden cases of ZSKT with ABD, rebuilt from their seeds."""

from typing import Any

import torch
from torch import Tensor, nn

from dist_defend.batch import Batch
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine import dist
from dist_defend.methods.defend.abd.options import RetrospectionConfig, VaccineConfig
from dist_defend.methods.defend.zskt.options import Config
from dist_defend.methods.defend.zskt.step import TransferStep
from dist_defend.models.generator import ZSKTGenerator
from dist_defend.models.wide_resnet import WideResNet
from tests.numerics.det import det_init, golden

MODES = ("base", "sv", "sr", "svsr")
SHUFFLED = tuple(f"block3.layer.{n}.weight" for n in ("0.conv1", "0.conv2", "0.convShortcut", "1.conv1", "1.conv2"))
NOWHERE = DatasetConfig("nowhere")


def networks() -> tuple[WideResNet, WideResNet, ZSKTGenerator]:
    """Teacher (frozen), student, generator, in float64."""
    teacher, student = WideResNet(16, 2, 10).double(), WideResNet(16, 1, 10).double()
    generator = ZSKTGenerator().double()
    for seed, model in ((51, teacher), (52, student), (53, generator)):
        det_init(model, seed)
    with torch.no_grad():
        teacher.fc.bias[0] += 2
    return teacher.eval().requires_grad_(False), student, generator


class Case:
    """A golden case: what it draws, and the step that it is about."""

    def __init__(self, mode: str, **changes: Any) -> None:
        self.case: dict[str, Any] = golden("abd")[mode]
        draws = torch.Generator().manual_seed(54)
        self.teacher, self.student, self.generator = networks()
        self.permutations: list[dict[str, Tensor]] = []
        if "sv" in mode:
            widths = {name: self.teacher.state_dict()[name].shape[1] for name in SHUFFLED}
            self.permutations = [
                {name: torch.randperm(width, generator=draws) for name, width in widths.items()} for _ in range(3)
            ]
            first = [{name: order[:8].tolist() for name, order in member.items()} for member in self.permutations]
            assert first == self.case["shuffle_permutations_first8"]
        self.start = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        if "sr" in mode:
            self.start = 0.05 * torch.randn(1, 3, 32, 32, generator=draws, dtype=torch.float64)
        self.z = [torch.randn(8, 100, generator=draws, dtype=torch.float64) for _ in range(3)][:2]
        retrospection: dict[str, Any] = {
            "inner_rounds": 3,
            "patched_fraction": 0.25,
            "min_patched": 0,
            "statistics": "published",
        }
        options: dict[str, Any] = {
            "pseudo_batches": 2,
            "batch_size": 8,
            "student_steps": 2,
            "vaccine": VaccineConfig() if "sv" in mode else None,
            "retrospection": RetrospectionConfig(**(retrospection | changes.pop("retrospection", {})))
            if "sr" in mode
            else None,
        }
        self.config = Config("nowhere", NOWHERE, **(options | changes))

    def step(self) -> TransferStep:
        """With the golden permutations, start of delta and patched rows in place of our own draws."""
        step = TransferStep(self.teacher, self.student, self.generator, self.config, dist.start("fp64", None), seed=0)
        if step.vaccine is not None:
            ensemble = step.vaccine.ensemble
            assert ensemble.shuffled == list(SHUFFLED)
            for member in ensemble.members:
                member.load_state_dict(self.teacher.state_dict())
            ensemble.permutation = lambda member, layer, channels: self.permutations[member][SHUFFLED[layer]]  # type: ignore[method-assign]
            ensemble.shuffle()
        if step.retrospection is not None:
            step.retrospection.start = lambda image_size, number: self.start  # type: ignore[method-assign]
            step.retrospection.patched = self.patched  # type: ignore[method-assign]
        return step

    def patched(self, own: slice, *place: int) -> Tensor:
        """The recorded rows; the published diagnostic has rows of its own, see diagnosed()."""
        number, step = place
        return self._mask(2 * (2 * number + step))[own]

    def diagnosed(self, number: int, step: int) -> Tensor:
        """Rows of the diagnostic after that student step."""
        return self._mask(2 * (2 * number + step) + 1)

    def _mask(self, entry: int) -> Tensor:
        mask = torch.zeros(8, 1, 1, 1, dtype=torch.float64)
        mask[self.case["patched_rows"][entry]] = 1
        return mask

    def batches(self) -> list[Batch]:
        """What the step is called with."""
        rows = torch.arange(8)
        return [Batch((z,), torch.zeros_like(rows), rows) for z in self.z]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """State without the counts of batches."""
    return {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
