"""CLP's Lipschitz constant of a channel of a convolution with its batch norm."""

import torch
from torch import Tensor


def channel_lipschitz(kernels: Tensor, gamma: Tensor, variance: Tensor) -> Tensor:
    """|gamma_k| / sqrt(variance_k) sigma_max(W_k), (C,) float64, W_k the (C_in, kh kw) matrix of kernels[k].

    kernels: (C, C_in, kh, kw); gamma, variance: (C,), the norm's scale and running variance, without its eps. This is
    CLP's measure (Zheng et al., ECCV 2022), not the norm of the convolution. sigma_max comes from the Gram matrix, of
    side kh kw, which is exact to rounding and cheaper than a decomposition of each W_k.
    """
    flat = kernels.double().flatten(2)
    largest: Tensor = torch.linalg.eigvalsh(flat.mT @ flat)[:, -1]
    return gamma.double().abs() / variance.double().sqrt() * largest.clamp(min=0).sqrt()
