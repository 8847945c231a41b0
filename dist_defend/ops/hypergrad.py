"""Implicit hypergradients: d/d theta of an outer loss L(delta*(theta), theta), delta* at the minimum of an inner loss.

Grazzi et al. 2020 (On the iteration complexity of hypergradient computation) and, for backdoors, Zeng et al. 2022
(I-BAU, section 4): one step of gradient descent Phi(delta, theta) = delta - eta grad_delta L_in(delta, theta) is the
fixed-point map, H is the Hessian of L_in in delta, g = grad_delta L, and

    hypergradient = grad_theta L - eta d/d theta <grad_delta L_in(delta, theta), v>,    v near (eta H)^-1 g.

The solver of eta H v = g is passed in. Nothing here waits for the device or branches on a value. On several ranks every
loss is the rank's share of a sum over ranks, and only the quantities named below are summed.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_defend.errors import UserError
from dist_defend.ops.collectives import all_reduce_sum, world_size
from dist_defend.ops.second_order import CheapSecondOrder, constant_parameters

Product = Callable[[Tensor], Tensor]  # v -> H v, both shaped as delta
Solver = Callable[[Product, Tensor], list[Tensor]]  # (H, g) -> v_1, v_2, ..., of which the last one counts


def neumann(steps: int, step_size: float) -> Solver:
    """v_K = sum over j < K of (I - eta H)^j g: K fixed-point steps from 0 with K - 1 Hessian products, for v_1 = g.

    The published solver. It approaches (eta H)^-1 g only if H has its spectrum in (0, 2 / eta); a network's does not,
    and K limits how far directions of negative curvature are amplified.
    """

    def solve(product: Product, g: Tensor) -> list[Tensor]:
        iterates = [g]
        for _ in range(steps - 1):
            v = iterates[-1]
            iterates.append(torch.sub(v, product(v), alpha=step_size) + g)
        return iterates

    return solve


def conjugate_gradient(steps: int, step_size: float) -> Solver:
    """That many steps of conjugate gradients (Hestenes and Stiefel 1952) on eta H v = g; for positive definite H.

    v stays as it is once the residual is 0, and where the curvature along a direction is 0.
    """

    def solve(product: Product, g: Tensor) -> list[Tensor]:
        v, residual, direction = torch.zeros_like(g), g, g
        size, iterates = g.square().sum(), []
        for _ in range(steps):
            image = step_size * product(direction)
            length = _ratio(size, (direction * image).sum())
            v, residual = v + length * direction, residual - length * image
            before, size = size, residual.square().sum()
            direction = residual + _ratio(size, before) * direction
            iterates.append(v)
        return iterates

    return solve


def exact(step_size: float) -> Solver:
    """v = (eta H)^-1 g by one Hessian product per entry of delta and a dense solve; not finite if H is singular."""

    def solve(product: Product, g: Tensor) -> list[Tensor]:
        units = torch.eye(g.numel(), dtype=g.dtype, device=g.device)
        hessian = torch.stack([product(unit.view_as(g)).flatten() for unit in units], dim=1)
        v, _ = torch.linalg.solve_ex(step_size * hessian, g.flatten())
        return [v.view_as(g)]

    return solve


class Hypergradient(NamedTuple):
    """Sums over all ranks. direct and implicit: one tensor per parameter, which add up to the hypergradient."""

    direct: list[Tensor]
    implicit: list[Tensor]
    iterates: list[Tensor]  # v_k of the solver, shaped as delta

    @property
    def total(self) -> list[Tensor]:
        """The hypergradient, one tensor per parameter."""
        return list(torch._foreach_add(self.direct, self.implicit))


def hypergradient(
    outer: Tensor,
    inner: Tensor,
    delta: Tensor,
    parameters: Sequence[Tensor],
    solver: Solver,
    step_size: float,
    penalty: float = 0.0,
) -> Hypergradient:
    """The hypergradient of the outer loss with respect to the parameters, for inner loss ``inner`` + penalty |delta|^2.

    outer, inner: scalars with graphs that reach delta and the parameters; on several ranks, this rank's shares, without
    the penalty, which is added once. step_size: the eta of the fixed-point map and of the solver. Summed over ranks: g,
    each product H v, and at the end direct and implicit part in one bucket. The inner loss's graph is the cheaper to
    differentiate if its network ran under ops.second_order.CheapSecondOrder.
    """
    g, *direct = torch.autograd.grad(outer, (delta, *parameters), materialize_grads=True)
    with constant_parameters():
        (slope,) = torch.autograd.grad(inner, delta, create_graph=True, materialize_grads=True)

    def product(v: Tensor) -> Tensor:
        with constant_parameters():
            (curved,) = _pull_back(slope, (delta,), v)
        return torch.add(all_reduce_sum(curved), v, alpha=2 * penalty)

    iterates = solver(product, all_reduce_sum(g))
    implicit = _pull_back(slope, parameters, -step_size * iterates[-1], is_last=True)
    count = len(direct)
    summed = all_reduce_together([*direct, *implicit])
    return Hypergradient(summed[:count], summed[count:], iterates)


def check_twice_differentiable(network: nn.Module, image_size: int, name: str) -> None:
    """UserError, naming the operator, for a network without a hypergradient: one is computed, of two images.

    A collective call where batch norm is synchronised. Weights, buffers, modes and random streams stay as they are.
    """
    parameters = list(network.parameters())
    like, buffers = parameters[0], list(network.buffers())
    before = [buffer.clone() for buffer in buffers]
    delta = like.new_zeros(1, 3, image_size, image_size, requires_grad=True)
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        with CheapSecondOrder():
            logits = network(like.new_zeros(2, 3, image_size, image_size) + delta)
        what = _once_differentiable(logits)
        try:
            if not what:
                _differentiate_twice(logits.logsumexp(1).sum(), delta, parameters)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            found = re.search(r"derivative for '?(?:aten::)?_?(\w+?)(?:_backward)?'? is not implemented", reason)
            what = f"its operator {found[1]}" if found else f"one of its operators ({reason})"
        finally:
            with torch.no_grad():
                for buffer, old in zip(buffers, before, strict=True):
                    buffer.copy_(old)
    if what:
        raise UserError(
            f"{name} cannot be differentiated twice, but this defence does that; torch has no second derivative of "
            f"{what}: choose another network or a first-order defence"
        )


def _differentiate_twice(loss: Tensor, delta: Tensor, parameters: Sequence[Tensor]) -> None:
    """The products of a hypergradient, of this rank alone."""
    with constant_parameters():
        (slope,) = torch.autograd.grad(loss, delta, create_graph=True, materialize_grads=True)
        _pull_back(slope, (delta,), torch.ones_like(slope))
    _pull_back(slope, parameters, torch.ones_like(slope), is_last=True)


def _once_differentiable(output: Tensor) -> str:
    """The first function of the output's graph that torch marks so; autograd.grad would take its slope for constant."""
    seen, rest = set(), [output.grad_fn]
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        module = getattr(backward, "__globals__", {}).get("__name__")
        if module == once_differentiable.__module__ and hasattr(backward, "__wrapped__"):
            return f"its function {node.name().removesuffix('Backward')}"
        rest += [before for before, _ in node.next_functions]
    return ""


def _pull_back(slope: Tensor, inputs: Sequence[Tensor], v: Tensor, is_last: bool = False) -> list[Tensor]:
    """Gradient of <slope, v>; zeros where the slope is constant."""
    if not slope.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(torch.autograd.grad(slope, inputs, v, retain_graph=not is_last, materialize_grads=True))


def all_reduce_together(tensors: list[Tensor]) -> list[Tensor]:
    """Sums over ranks with one collective; the gradients of a network, say."""
    if world_size() == 1:
        return tensors
    flat = all_reduce_sum(torch.cat([t.flatten() for t in tensors]))
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all together, as torch.nn.utils.get_total_norm has it, in a few kernels for all."""
    return total_norms(tensors)[0]


def total_norms(*lists: Sequence[Tensor]) -> Sequence[Tensor]:
    """The total norm of each of the lists, which are equally long."""
    norms = torch.stack(torch._foreach_norm([tensor for tensors in lists for tensor in tensors]))
    totals: Tensor = torch.linalg.vector_norm(norms.view(len(lists), -1), dim=1)
    return totals.unbind()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / b)
