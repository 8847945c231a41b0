"""Losses on embeddings and between classifiers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_defend.ops.collectives import all_gather_rows, rank, world_size


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, SimCLR, eq. 1): z1, z2 (B, D) unit rows, row i of both from one image -> scalar.

    The positive stays in the denominator, which leaves out only the row itself; log-sum-exp keeps it finite at any
    temperature. Over W ranks (equal B on each) a rank's value is the mean over its own 2 B rows against all 2 B W
    columns, and the rank mean of the gradients is the gradient of one rank that holds everything.
    """
    batch, device = len(z1), z1.device
    with torch.autocast(device.type, enabled=False):
        pair = torch.stack([z1, z2], dim=1)  # (B, 2, D)
        if pair.dtype is not torch.float64:
            pair = pair.float()
        everyone = all_gather_rows(pair, rows=[batch] * world_size())
        rows, columns = torch.cat(pair.unbind(1)), torch.cat(everyone.unbind(1))  # all first views, then all second
        logits = rows @ columns.T / temperature
        own = rank() * batch + torch.arange(batch, device=device)
        first, second = own, own + len(everyone)
        itself, positive = torch.cat([first, second]), torch.cat([second, first])
        logits = logits.scatter(1, itself[:, None], float("-inf"))
        return F.cross_entropy(logits, positive)


def negative_cosine(a: Tensor, b: Tensor) -> Tensor:
    """-mean cosine of the rows of a and b, (B, D) each, normalised here; b may be (1, D). In [-1, 1], a scalar."""
    return -F.cosine_similarity(a, b, dim=-1).mean()


def distillation_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) of logits (B, C) each, summed over the classes -> (B,).

    Without the factor T^2 (Hinton et al. 2015 have it); PyTorch's reductions are its mean over B, and that over C.
    """
    target = F.log_softmax(teacher / temperature, dim=1)
    return (target.exp() * (target - F.log_softmax(student / temperature, dim=1))).sum(1)
