"""Masked weights and counts of batches that are computed for all norms of a network together."""

from typing import Any

import torch
from torch import Tensor, nn

from dist_defend.models.batch_statistics import counted_together
from dist_defend.models.masked_norm import mask_norms, masked_together


def test_masks_are_multiplied_together_and_batches_counted_together() -> None:
    """Bitwise the same outputs, gradients and counts, of a norm that is called twice and one that is not called too."""
    torch.manual_seed(0)
    norms: Any = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3)).double()
    masks = mask_norms(norms, [f"{n}" for n in range(3)])
    for mask, norm in zip(masks.values(), norms, strict=True):
        mask.data.uniform_()
        norm._parameters["weight"].data.uniform_()
    images = torch.rand(2, 3, 4, 4).double()

    def gradients() -> list[Tensor]:
        y = norms[0](norms[1](norms[0](images)).square()).square().sum()
        return [y, *torch.autograd.grad(y, [masks["0"], masks["1"], *norms[1].parameters()])]

    expected = gradients()
    with masked_together(norms), counted_together(norms):
        found = gradients()
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    counted = [norm.num_batches_tracked.item() for norm in norms]
    assert counted == [4, 2, 0] and all(norm.product is None for norm in norms)
    with masked_together(norms):
        norms[0].product = norms[0].product * 1.001  # mutation: another product
        assert not gradients()[0].equal(expected[0])
