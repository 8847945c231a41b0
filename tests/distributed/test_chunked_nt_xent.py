"""NT-Xent in chunks of rows is NT-Xent: value and gradient, on one rank and two; and it keeps no matrix."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.ops import losses
from dist_defend.ops.collectives import rank, world_size
from tests.ranks import Pool


def embeddings(seed: int = 0, batch: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 5, generator=generator, dtype=torch.float64).to(dtype)


def by_hand(z: Tensor, temperature: float) -> Tensor:
    """Row by row, as the paper's eq. 1 is written."""
    rows = functional.normalize(z, dim=2).flatten(0, 1)
    n = len(rows)
    terms = []
    for i in range(n):
        similarity = rows @ rows[i] / temperature
        others = torch.cat([similarity[:i], similarity[i + 1 :]])
        terms.append(others.logsumexp(0) - similarity[(i + n // 2) % n])
    return torch.stack(terms).mean()


def loss_and_gradient(chunk_rows: int | None) -> tuple[float, Tensor]:
    """The rank mean of the loss, and of the gradient, put together from the ranks' shares."""
    z = embeddings()
    share = z.shape[1] // world_size()
    own = z[:, rank() * share : (rank() + 1) * share].clone().requires_grad_()
    unit = functional.normalize(own, dim=2)
    loss = losses.nt_xent(unit[0], unit[1], 0.3, chunk_rows)
    (gradient,) = torch.autograd.grad(loss, own)
    whole = torch.zeros_like(z)
    whole[:, rank() * share : (rank() + 1) * share] = gradient / world_size()
    values = torch.cat([loss.detach().view(1) / world_size(), whole.flatten()])
    if world_size() > 1:
        torch.distributed.all_reduce(values)
    return values[0].item(), values[1:].view_as(z)


@pytest.mark.parametrize("chunk_rows", [1, 5, 12, 23, 24, None])
def test_chunks_are_exact_on_one_rank_and_two(chunk_rows: int | None, two_ranks: Pool) -> None:
    z = embeddings().requires_grad_()
    expected = by_hand(z, 0.3)
    (gradient,) = torch.autograd.grad(expected, z)
    for value, found in [loss_and_gradient(chunk_rows), *two_ranks.run(loss_and_gradient, chunk_rows)]:
        assert value == pytest.approx(expected.item(), rel=1e-13)
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-14)


def test_no_more_similarities_are_held_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 3 * 128)  # 3 of 128 rows
    unit = functional.normalize(embeddings(batch=64), dim=2).requires_grad_()
    largest = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses.nt_xent(unit[0], unit[1], 0.3)
    assert 0 < largest <= 128 * 5  # the embeddings themselves; the matrix would be 128 x 128


def test_a_chunk_that_forgets_its_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison says where every chunk takes the first rows' positives."""
    z = embeddings()
    unit = functional.normalize(z, dim=2)
    split: Callable[..., tuple[Tensor, ...]] = Tensor.split

    def first_only(self: Tensor, size: int) -> tuple[Tensor, ...]:
        parts = split(self, size)
        return parts if self.is_floating_point() else tuple(parts[0][: len(p)] for p in parts)

    monkeypatch.setattr(Tensor, "split", first_only)
    assert losses.nt_xent(unit[0], unit[1], 0.3, 5).item() != pytest.approx(by_hand(z, 0.3).item(), rel=1e-3)
