"""The losses of model inversion: batch-norm statistics, disagreement with the student, contrast to earlier images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_defend.data.order import rank_slice
from dist_defend.ops.collectives import all_gather_rows, rank, world_size
from dist_defend.ops.losses import divergence_rows


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch norms with running statistics, in the order of the modules."""
    found = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    return [norm for norm in found if norm.running_mean is not None]


@contextmanager
def norm_inputs(norms: Sequence[nn.BatchNorm2d]) -> Iterator[list[Tensor]]:
    """Collect the inputs of the batch norms in one pass, (B, C, H, W) each, in the order of their calls."""
    seen: list[Tensor] = []
    hooks = [norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])) for norm in norms]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def features(inputs: Sequence[Tensor]) -> Tensor:
    """Spatial means of all layers' maps (B, C_l, H, W), concatenated: (B, sum of C_l)."""
    return torch.cat([x.mean((2, 3)) for x in inputs], dim=1)


def global_moments(inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean and biased variance (C_l,) of each (b, C_l, H, W) over the batches of all ranks, differentiable.

    Each rank's count, mean and variance are gathered in one collective and merged (Chan, Golub and LeVeque 1983).
    """
    own = []
    for x in inputs:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        own += [mean, variance]
    share = inputs[0].new_full((1,), len(inputs[0]))
    table = all_gather_rows(torch.cat([share, *own])[None], rows=[1] * world_size())
    share, *columns = table.split([1, *(len(column) for column in own)], dim=1)
    share = share / share.sum()
    moments = []
    for means, variances in zip(columns[::2], columns[1::2], strict=True):
        mean = (share * means).sum(0)
        moments.append((mean, (share * (variances + (means - mean).square())).sum(0)))
    return moments


def statistics_distance(norms: Sequence[nn.BatchNorm2d], inputs: Sequence[Tensor]) -> Tensor:
    """Sum over layers of |running variance - variance| + |running mean - mean|, L2 norms over channels, scalar.

    Of the global batch; every rank has the whole value (Yin et al. 2020, DeepInversion, eq. 4, with unsquared norms).
    """
    total = inputs[0].new_zeros(())
    for norm, (mean, variance) in zip(norms, global_moments(inputs), strict=True):
        assert norm.running_mean is not None and norm.running_var is not None
        total = total + (norm.running_var - variance).norm() + (norm.running_mean - mean).norm()
    return total


def disagreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum of KL(teacher || student) over the images on which both predict one class; logits (B, C) each -> scalar."""
    agree = (teacher.argmax(1) == student.argmax(1)).to(teacher.dtype)
    return (agree * divergence_rows(student, teacher)).sum()


class Projection(nn.Module):
    """MLP of two layers: features (N, D) -> rows (N, dim) of unit length."""

    def __init__(self, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers(x))


def contrast(
    projection: nn.Module, local: Tensor, whole: Tensor, bank: Tensor, total: int, temperature: float
) -> Tensor:
    """This rank's share of the contrastive loss (Fang et al. 2021, CMI, section 3.2), scalar.

    local, whole (b, D): features of the local and the global view of this rank's share of a batch of ``total`` images;
    bank (n, 2 D): both views' features of earlier images, the same on every rank. Rows are the projected local views,
    columns the projected global views, without gradient; the positive of row i is column i. The loss is the mean over
    the new rows plus the mean over those of the bank.
    """
    dim, earlier = local.shape[1], bank[rank_slice(len(bank), rank(), world_size())]
    rows = projection(torch.cat([local, earlier[:, :dim]]))
    with torch.no_grad():
        new, old = projection(torch.cat([whole, earlier[:, dim:]])).split([len(whole), len(earlier)])
        columns = torch.cat([all_gather_rows(new, _shares(total)), all_gather_rows(old, _shares(len(bank)))])
    own_new, own_old = (rank_slice(count, rank(), world_size()).start for count in (total, len(bank)))
    wanted = torch.cat(
        [
            torch.arange(len(local), device=rows.device) + own_new,
            torch.arange(len(earlier), device=rows.device) + total + own_old,
        ]
    )
    losses = F.cross_entropy(rows @ columns.T / temperature, wanted, reduction="none")
    return losses[: len(local)].sum() / total + losses[len(local) :].sum() / max(1, len(bank))


def _shares(total: int) -> list[int]:
    """The number of rows of each rank, of ``total`` rows."""
    slices = (rank_slice(total, number, world_size()) for number in range(world_size()))
    return [own.stop - own.start for own in slices]
