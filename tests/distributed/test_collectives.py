"""Two ranks with halves of a batch against one rank with all of it, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.models.encoder import SimCLR, build_simclr
from dist_defend.ops import collectives, losses
from dist_defend.ops.collectives import SyncBatchNorm, all_gather_rows, all_reduce_sum, convert_sync_batchnorm
from dist_defend.ops.losses import nt_xent
from tests.numerics.det import det_images, det_init
from tests.ranks import Pool

SHARES = [(4, 4), (5, 3)]  # rows of rank 0 and of rank 1


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def own_part(x: Tensor, shares: tuple[int, int]) -> Tensor:
    parts: tuple[Tensor, ...] = x.split(shares)
    return parts[dist.get_rank()].clone().requires_grad_()


# --- gathers and sums


def gather_twice_differentiated(shares: tuple[int, int], known: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = own_part(det_images((8, 3), 0), shares)
    rows = all_gather_rows(x, rows=shares if known else None)
    (first,) = torch.autograd.grad(rows.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    return rows.detach(), first.detach(), second


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("known", [True, False])
def test_gathered_rows_are_in_rank_order_and_gradients_sum_over_ranks(
    two_ranks: Pool, shares: tuple[int, int], known: bool
) -> None:
    x = det_images((8, 3), 0)
    results = two_ranks.run(gather_twice_differentiated, shares, known)
    for (rows, first, second), own in zip(results, x.split(shares), strict=True):
        assert rows.equal(x)
        close(first, 2 * 3 * own**2)  # both ranks' losses hold every row
        close(second, 2 * (6 * own**2) * (12 * own))


def sum_of_ranks() -> tuple[Tensor, Tensor]:
    x = torch.full((2,), dist.get_rank() + 1.0, requires_grad=True)
    total = all_reduce_sum(x)
    (total * (dist.get_rank() + 1)).sum().backward()
    assert x.grad is not None
    return total.detach(), x.grad


def test_all_reduce_sum_adds_values_and_gradients(two_ranks: Pool) -> None:
    for total, grad in two_ranks.run(sum_of_ranks):
        assert total.tolist() == [3.0, 3.0] and grad.tolist() == [3.0, 3.0]


def test_on_one_rank_collectives_do_nothing() -> None:
    x = det_images((3, 2), 0)
    assert all_gather_rows(x) is x and all_reduce_sum(x) is x


# --- batch norm


def normalise(norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradient, gradient of the squared gradient, and statistics after two batches."""
    loss_weights = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype).view([1, -1] + [1] * (x.ndim - 2))
    norm(x.detach() * 2 + 1)
    y = norm(x)
    (first,) = torch.autograd.grad((y.pow(3) * loss_weights).sum(), x, create_graph=True)
    first.pow(2).sum().backward()
    assert x.grad is not None
    parameters = {f"grad of {k}": p.grad for k, p in norm.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "first": first.detach(), "second": x.grad, **parameters, **dict(norm.named_buffers())}


def normalise_part(norm: nn.Module, x: Tensor, shares: tuple[int, int], is_synchronised: bool) -> dict[str, Tensor]:
    return normalise(convert_sync_batchnorm(norm) if is_synchronised else norm, own_part(x, shares))


def norm_for(x: Tensor, **options: Any) -> nn.Module:
    norm = (nn.BatchNorm1d if x.ndim < 4 else nn.BatchNorm2d)(x.shape[1], **options).double()
    det_init(norm, 3)
    return norm


def assert_same_norm(
    two_ranks: Pool, x: Tensor, shares: tuple[int, int], is_synchronised: bool = True, **options: Any
) -> None:
    expected = normalise(norm_for(x, **options), x.clone().requires_grad_())
    parts = two_ranks.run(normalise_part, norm_for(x, **options), x, shares, is_synchronised)
    for key in ("y", "first", "second"):
        close(torch.cat([part[key] for part in parts]), expected[key])
    for key in expected.keys() - {"y", "first", "second"}:
        if key.startswith("grad"):
            close(parts[0][key] + parts[1][key], expected[key])
        else:
            assert all(torch.allclose(part[key], expected[key], rtol=1e-12) for part in parts), key


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (8, 3, 4, 5)])
def test_batch_norm_over_ranks_is_that_of_the_whole_batch(
    two_ranks: Pool, shape: tuple[int, ...], shares: tuple[int, int]
) -> None:
    assert_same_norm(two_ranks, det_images(shape, 1) + 3, shares)


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"track_running_stats": False, "eps": 0.1}])
def test_batch_norm_options_over_ranks(two_ranks: Pool, options: dict[str, Any]) -> None:
    assert_same_norm(two_ranks, det_images((8, 3, 4, 5), 1) + 3, (5, 3), **options)


def test_local_statistics_fail_the_same_check(two_ranks: Pool) -> None:
    with pytest.raises(AssertionError):
        assert_same_norm(two_ranks, det_images((8, 3, 4, 5), 1) + 3, (4, 4), is_synchronised=False)


def variance_far_from_zero() -> tuple[Tensor, Tensor]:
    norm = SyncBatchNorm(1, momentum=1.0)
    x = own_part(det_images((64, 1), 4), (30, 34)).detach() + 1e6
    y = norm(x.float())
    return norm.running_var, y  # type: ignore[return-value]


def test_a_mean_that_dwarfs_the_spread_does_not_spoil_the_variance(two_ranks: Pool) -> None:
    """In float32 the mean square of such numbers has no digit left for their variance."""
    x = (det_images((64, 1), 4) + 1e6).float()
    assert abs((x.square().mean() - x.mean().square()).item() - 1) > 1000
    for variance, y in two_ranks.run(variance_far_from_zero):
        close(variance.double(), x.double().var(0), 2e-2)
        assert y.abs().max() < 5


def test_on_one_rank_and_in_eval_mode_it_is_plain_batch_norm() -> None:
    x = det_images((8, 3, 4, 5), 1).float()
    for training in (True, False):
        plain = norm_for(x).float().train(training)
        converted = convert_sync_batchnorm(norm_for(x).float().train(training))
        assert isinstance(converted, SyncBatchNorm) and converted.training is training
        assert converted(x).equal(plain(x))
        assert all(a.equal(b) for a, b in zip(converted.buffers(), plain.buffers(), strict=True))


def test_conversion_keeps_keys_tensors_and_timm_activations() -> None:
    model = build_simclr("timm:efficientnet_b0").eval()  # its norms carry an activation
    before, x = dict(model.named_parameters()), torch.rand(2, 3, 32, 32)
    state, expected = list(model.state_dict()), model(x)[0]
    assert convert_sync_batchnorm(model) is model
    assert list(model.state_dict()) == state
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, SyncBatchNorm) and not norm.training for norm in norms)
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=0)


# --- SimCLR's step


def local_mean(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """A loss per rank, without the others' negatives."""
    logits = torch.cat([z1, z2]) @ torch.cat([z1, z2]).T / temperature
    positives = torch.arange(len(logits)).roll(len(z1))
    return functional.cross_entropy(logits.fill_diagonal_(float("-inf")), positives)


def own_slice_only(x: Tensor, rows: list[int]) -> Tensor:
    """A gather whose gradient forgets what the other ranks' losses say about this rank's rows."""
    everyone = [torch.empty_like(x) for _ in rows]
    dist.all_gather(everyone, x.detach().contiguous())
    everyone[dist.get_rank()] = x
    return torch.cat(everyone)


def simclr_model() -> SimCLR:
    model = build_simclr("small_cifar", "none").double()
    det_init(model, 7)
    return model


class TwoViews(nn.Module):
    def __init__(self, model: SimCLR, loss: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.loss(self.model(first)[1], self.model(second)[1], 0.5)


def simclr_gradients(mistake: str) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    model = simclr_model()
    if mistake != "local statistics":
        convert_sync_batchnorm(model)
    loss_function = local_mean if mistake == "local negatives" else nt_xent
    wrapped = nn.parallel.DistributedDataParallel(TwoViews(model, loss_function))
    first, second = (det_images((8, 3, 16, 16), seed).split(4)[dist.get_rank()] for seed in (2, 3))
    with pytest.MonkeyPatch.context() as patch:
        if mistake == "own slice only":
            patch.setattr(losses, "all_gather_rows", own_slice_only)
        loss = wrapped(first, second)
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    mean_loss = all_reduce_sum(loss.detach()).item() / collectives.world_size()
    return mean_loss, gradients, dict(model.named_buffers())


def assert_same_step(two_ranks: Pool, mistake: str) -> None:
    model = simclr_model()
    loss = TwoViews(model, nt_xent)(det_images((8, 3, 16, 16), 2), det_images((8, 3, 16, 16), 3))
    loss.backward()
    for mean_loss, gradients, buffers in two_ranks.run(simclr_gradients, mistake):
        assert mean_loss == pytest.approx(loss.item(), rel=1e-10)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-8, atol=1e-10 * parameter.grad.abs().max().item()
            )
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-10, atol=1e-12)


def test_simclr_on_two_ranks_has_the_loss_gradient_and_statistics_of_one(two_ranks: Pool) -> None:
    assert_same_step(two_ranks, mistake="none")


@pytest.mark.parametrize("mistake", ["own slice only", "local negatives", "local statistics"])
def test_a_mistake_in_the_simclr_step_fails_the_same_check(two_ranks: Pool, mistake: str) -> None:
    with pytest.raises(AssertionError):
        assert_same_step(two_ranks, mistake)
