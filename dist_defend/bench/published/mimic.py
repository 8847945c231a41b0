"""MIMIC's distillation step as wssun/MIMIC does it.

The student's encoder runs three times per step (the first view again for its feature maps, which moves the batch-norm
statistics a third time), the teacher's twice, the first time with a graph: the clone loss sends gradients into the
teacher that nobody reads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.bench.published.simclr import nt_xent

LAYERS = (3, 4, 5, 6)  # children of the encoder whose outputs count


def stage_outputs(encoder: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs (B, C, H', W') of LAYERS, walking through the encoder child by child."""
    outputs = []
    for number, child in enumerate(encoder.children()):
        x = child(x)
        if number in LAYERS:
            outputs.append(x)
    return outputs


def attention(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W)."""
    energy = torch.pow(torch.abs(features), 2).sum(dim=1, keepdim=True)
    length: Tensor = torch.norm(energy, dim=(2, 3), keepdim=True)
    return energy / (length + 1e-6)


def leak_hooks(encoder: nn.Module, count: int) -> None:
    """What phase 1 leaves behind on each stage: that many forward hooks, each flattening the output."""
    stages = list(encoder.children())
    for layer in LAYERS:
        for _ in range(count):
            stages[layer].register_forward_hook(_flatten_output)


def _flatten_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    nn.Flatten()(output)


def mimic_step(
    student: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    first: Tensor,
    second: Tensor,
    weights: Sequence[float] = (1000.0, 1000.0, 1000.0, 1000.0),
    clone_weight: float = 1.0,
    temperature: float = 0.5,
) -> float:
    """One update from two normalised views (B, 3, H, W); returns the loss before it.

    student and teacher give unit (h, z) when called and have their encoder, an nn.Sequential, at .f.f; the teacher is
    in eval mode and keeps the gradients that it gets.
    """
    feature, z1 = student(first)
    _, z2 = student(second)
    teacher_feature, _ = teacher(first)
    loss = nt_xent(z1, z2, temperature)
    clone = -torch.sum(functional.normalize(teacher_feature) * functional.normalize(feature), dim=-1).mean()
    student_maps = stage_outputs(student.get_submodule("f.f"), first)
    with torch.no_grad():
        teacher_maps = stage_outputs(teacher.get_submodule("f.f"), first)
    for weight, mine, theirs in zip(weights, student_maps, teacher_maps, strict=True):
        loss = loss + weight * (attention(mine) - attention(theirs)).pow(2).mean()
    loss = loss + clone_weight * clone
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
