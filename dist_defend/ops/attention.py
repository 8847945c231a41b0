"""Attention transfer between feature maps (Zagoruyko and Komodakis 2017, as MIMIC uses it)."""

import torch.nn.functional as F
from torch import Tensor


def attention_map(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W): squares summed over channels, divided by (their L2 norm over H, W + 1e-6)."""
    energy = features.square().sum(1)
    length: Tensor = energy.flatten(1).norm(dim=1)
    return energy / (length[:, None, None] + 1e-6)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the attention maps of one layer, (B, C, H, W) each -> scalar in [0, 2 / (H W)].

    Equals 2 (1 - cos) / (H W) up to the 1e-6, so deep layers (small H W) weigh more at equal factors.
    """
    return (attention_map(student) - attention_map(teacher)).square().mean()


def unit_attention(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W) unit rows: the mean of squares over channels (as polo5/ZeroShotKnowledgeTransfer)."""
    return F.normalize(features.square().mean(1).flatten(1))
