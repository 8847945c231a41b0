"""The implicit hypergradient on functions whose derivatives are known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_defend.ops import second_order
from dist_defend.ops.hypergrad import (
    Hypergradient,
    Solver,
    conjugate_gradient,
    exact,
    hypergradient,
    neumann,
)
from dist_defend.ops.second_order import CheapSecondOrder, constant_parameters

ETA, RHO = 0.1, 0.7
SOLVERS: dict[str, Callable[[], Solver]] = {
    "neumann1": lambda: neumann(1, ETA),
    "neumann2": lambda: neumann(2, ETA),
    "neumann5": lambda: neumann(5, ETA),
    "neumann400": lambda: neumann(400, ETA),
    "cg": lambda: conjugate_gradient(12, ETA),
    "exact": lambda: exact(ETA),
}


class Quadratic:
    """L_in = d'Ad/2 + d'B t + c'd with spec(A) in (0, 2 / eta), L = |d - s|^2 / 2 + rho |t|^2 / 2 + d'E t."""

    def __init__(self, seed: int = 0, size: int = 6, parameters: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        basis, _ = torch.linalg.qr(draw(size, size))
        self.curvature: Tensor = basis @ torch.diag(torch.linspace(1.0, 15.0, size, dtype=torch.float64)) @ basis.T
        self.coupling, self.outer_coupling = draw(size, parameters), draw(size, parameters)
        self.slope, self.aim = draw(size), draw(size)
        self.delta, self.theta = draw(size).requires_grad_(), draw(parameters).requires_grad_()

    def inner(self, delta: Tensor, theta: Tensor) -> Tensor:
        return delta @ self.curvature @ delta / 2 + delta @ self.coupling @ theta + self.slope @ delta

    def outer(self, delta: Tensor, theta: Tensor) -> Tensor:
        return (
            (delta - self.aim).square().sum() / 2 + RHO * theta.square().sum() / 2 + delta @ self.outer_coupling @ theta
        )

    def solved(self, solver: Solver, penalty: float = 0.0, delta: Tensor | None = None) -> Hypergradient:
        delta = self.delta if delta is None else delta
        losses = self.outer(delta, self.theta), self.inner(delta, self.theta)
        return hypergradient(*losses, delta, [self.theta], solver, ETA, penalty)

    def expected(self, terms: int | None, penalty: float = 0.0) -> Tensor:
        """rho t + E'd - eta B' sum over j < terms of (I - eta A)^j (d - s + E t); terms None: the inverse of eta A."""
        delta, theta = self.delta.detach(), self.theta.detach()
        g = delta - self.aim + self.outer_coupling @ theta
        one = torch.eye(len(delta), dtype=torch.float64)
        scaled = ETA * (self.curvature + 2 * penalty * one)
        if terms is None:
            v: Tensor = torch.linalg.solve(scaled, g)
        else:
            v = sum((torch.linalg.matrix_power(one - scaled, j) @ g for j in range(terms)), torch.zeros_like(g))
        return RHO * theta + self.outer_coupling.T @ delta - ETA * self.coupling.T @ v


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("penalty", [0.0, 0.05])
@pytest.mark.parametrize(
    ("name", "terms"),
    [("neumann1", 1), ("neumann2", 2), ("neumann5", 5), ("neumann400", 400), ("cg", None), ("exact", None)],
)
def test_closed_form(name: str, terms: int | None, penalty: float) -> None:
    problem = Quadratic()
    (found,) = problem.solved(SOLVERS[name](), penalty).total
    assert relative(found, problem.expected(terms, penalty)) < 1e-12


def test_many_terms_reach_the_exact_gradient() -> None:
    problem = Quadratic()
    (found,) = problem.solved(SOLVERS["neumann400"]()).total
    assert relative(found, problem.expected(None)) < 1e-12


def test_at_the_inner_minimum_it_is_the_slope_of_the_value_function() -> None:
    """Central differences of t -> L(argmin_d L_in(d, t), t)."""
    problem = Quadratic()

    def minimum(theta: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve(problem.curvature, problem.coupling @ theta + problem.slope)
        return -solved

    theta, step = problem.theta.detach(), 1e-5
    slopes = []
    for unit in torch.eye(len(theta), dtype=torch.float64):
        ahead, behind = theta + step * unit, theta - step * unit
        difference = problem.outer(minimum(ahead), ahead) - problem.outer(minimum(behind), behind)
        slopes.append(difference / (2 * step))
    (found,) = problem.solved(exact(ETA), delta=minimum(theta).requires_grad_()).total
    assert relative(found, torch.stack(slopes)) < 1e-8


def flipped_sign(result: Hypergradient) -> Tensor:
    return result.direct[0] - result.implicit[0]


def no_direct_term(result: Hypergradient) -> Tensor:
    return result.implicit[0]


@pytest.mark.parametrize("change", [flipped_sign, no_direct_term])
def test_the_closed_form_catches(change: Callable[[Hypergradient], Tensor]) -> None:
    problem = Quadratic()
    assert relative(change(problem.solved(neumann(5, ETA))), problem.expected(5)) > 1e-3


@pytest.mark.parametrize("solver", [neumann(4, ETA), neumann(5, 0.9 * ETA)])
def test_the_closed_form_catches_another_series(solver: Solver) -> None:
    problem = Quadratic()
    assert relative(problem.solved(solver).total[0], problem.expected(5)) > 1e-6


@pytest.mark.parametrize(("steps", "products"), [(1, 0), (2, 1), (5, 4)])
def test_neumann_takes_one_product_fewer_than_terms(steps: int, products: int) -> None:
    asked: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        asked.append(v)
        return 3 * v

    g = torch.ones(2, dtype=torch.float64)
    iterates = neumann(steps, ETA)(product, g)
    assert (len(iterates), len(asked)) == (steps, products)
    assert torch.equal(iterates[0], g)


def test_one_term_is_one_mixed_derivative() -> None:
    """K = 1: direct - eta d/dt <dL_in/dd, g>."""
    problem = Quadratic()
    result = problem.solved(neumann(1, ETA))
    g = problem.delta.detach() - problem.aim + problem.outer_coupling @ problem.theta.detach()
    assert relative(result.implicit[0], -ETA * problem.coupling.T @ g) < 1e-14


def test_an_outer_loss_without_delta_has_the_direct_term_alone() -> None:
    problem = Quadratic()
    for solver in SOLVERS.values():
        outer, inner = problem.theta.pow(3).sum(), problem.inner(problem.delta, problem.theta)
        result = hypergradient(outer, inner, problem.delta, [problem.theta], solver(), ETA)
        assert torch.equal(result.total[0], 3 * problem.theta.detach() ** 2)
        assert all(torch.equal(v, torch.zeros_like(v)) for v in result.iterates)


@pytest.mark.parametrize("penalty", [1e-3, 0.3])
def test_regulariser_alone(penalty: float) -> None:
    """A constant model: H = 2 lambda I, v_K = g (1 - (1 - 2 eta lambda)^K) / (2 eta lambda), no implicit part."""
    delta = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
    aim = torch.arange(5.0, dtype=torch.float64)
    outer = (delta - aim).square().sum() / 2 + theta.sum()
    result = hypergradient(outer, 0 * delta.sum() + 0 * theta.sum(), delta, [theta], neumann(5, ETA), ETA, penalty)
    g, rate = delta.detach() - aim, 2 * ETA * penalty
    assert relative(result.iterates[-1], g * (1 - (1 - rate) ** 5) / rate) < 1e-11
    assert torch.equal(result.total[0], torch.ones(3, dtype=torch.float64))
    per_rank = hypergradient(
        (delta - aim).square().sum() / 2, 0 * delta.sum(), delta, [theta], neumann(5, ETA), ETA, 2 * penalty
    )
    assert relative(per_rank.iterates[-1], result.iterates[-1]) > 1e-5  # mutation: the regulariser of two ranks


def test_conjugate_gradients_stay_at_the_solution() -> None:
    problem = Quadratic()
    result = problem.solved(conjugate_gradient(60, ETA))
    assert relative(result.total[0], problem.expected(None)) < 1e-12
    assert torch.isfinite(torch.stack(result.iterates)).all()


class Network(nn.Module):
    """Everything that I-BAU's networks differentiate twice: strides, groups, dilation, frozen norms, pools."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ELU(),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(6),
            nn.Softplus(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 4, 2, dilation=2, padding="same"),
            nn.ELU(),
            nn.Conv2d(4, 4, 2, dilation=2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def network(channels_last: bool = False) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """An eval-mode network, images (4, 3, 16, 16), labels and a perturbation, in float64."""
    torch.manual_seed(0)
    net = Network().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    if channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    delta = (0.3 * torch.randn(1, 3, 16, 16, dtype=torch.float64)).requires_grad_()
    return net.eval(), images, torch.tensor([0, 1, 2, 0]), delta


def derivatives(channels_last: bool, is_cheap: bool) -> dict[str, Tensor]:
    """Loss, its slope in delta, Hessian product and mixed derivative."""
    net, images, labels, delta = network(channels_last)
    with CheapSecondOrder() if is_cheap else torch.enable_grad():
        loss = F.cross_entropy(net(images + delta), labels)
    with constant_parameters():
        (slope,) = torch.autograd.grad(loss, delta, create_graph=True)
    v = torch.randn(delta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with constant_parameters():
        (product,) = torch.autograd.grad(slope, delta, v, retain_graph=True)
    mixed = torch.autograd.grad(slope, list(net.parameters()), v)
    names = [name for name, _ in net.named_parameters()]
    return {"loss": loss, "slope": slope, "product": product, **dict(zip(names, mixed, strict=True))}


@pytest.mark.parametrize("channels_last", [False, True])
def test_cheap_second_derivatives_are_torchs(channels_last: bool) -> None:
    expected, found = derivatives(False, False), derivatives(channels_last, True)
    assert len(found) == 3 + 13
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13 * largest, msg=name)


def test_attention_can_be_differentiated_twice() -> None:
    """torch's fused kernels cannot; the slope's slope against central differences."""
    generator = torch.Generator().manual_seed(5)
    x, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=generator) for _ in range(2))

    def slope_at(point: Tensor) -> Tensor:
        point = point.detach().requires_grad_()
        with CheapSecondOrder():
            loss = F.scaled_dot_product_attention(point, point, point).sin().sum()
        (slope,) = torch.autograd.grad(loss, point, create_graph=True)
        points.append(point)
        return slope

    points: list[Tensor] = []
    (found,) = torch.autograd.grad(slope_at(x), points[0], v)
    expected = (slope_at(x + 1e-5 * v) - slope_at(x - 1e-5 * v)) / 2e-5
    assert relative(found, expected.detach()) < 1e-7


def test_the_comparison_catches_a_forgotten_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: no weight gradient of the image gradient, one of the two terms of the mixed derivative."""
    expected = derivatives(False, False)
    original = second_order._ImageGradient.backward

    def forget(context: Any, v: Tensor) -> Any:
        for_grad, _, *rest = original(context, v)
        return for_grad, None, *rest

    monkeypatch.setattr(second_order._ImageGradient, "backward", staticmethod(forget))
    found = derivatives(False, True)
    assert relative(found["product"], expected["product"]) < 1e-12
    assert relative(found["layers.0.weight"], expected["layers.0.weight"]) > 1e-3


def test_hessian_product_is_symmetric_and_the_difference_of_slopes() -> None:
    net, images, labels, delta = network()

    def slope_at(point: Tensor) -> Tensor:
        with CheapSecondOrder():
            loss = -F.cross_entropy(net(images + point), labels)
        with constant_parameters():
            return torch.autograd.grad(loss, point, create_graph=True)[0]

    slope = slope_at(delta)
    generator = torch.Generator().manual_seed(4)
    u, v = (torch.randn(delta.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    of_u, of_v = (torch.autograd.grad(slope, delta, x, retain_graph=True)[0] for x in (u, v))
    assert (u * of_v).sum().item() == pytest.approx((v * of_u).sum().item(), rel=1e-10)
    step = 1e-5
    ahead, behind = (slope_at((delta.detach() + sign * step * v).requires_grad_()).detach() for sign in (1, -1))
    assert relative(of_v, (ahead - behind) / (2 * step)) < 1e-6


def test_gradients_outside_of_the_switch_are_whole() -> None:
    """First derivatives under the mode, with respect to everything."""
    net, images, labels, delta = network()
    with CheapSecondOrder():
        loss = F.cross_entropy(net(images + delta), labels)
    found = torch.autograd.grad(loss, [delta, *net.parameters()])
    expected = torch.autograd.grad(F.cross_entropy(net(images + delta), labels), [delta, *net.parameters()])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-14)
    assert not second_order._constant[0]
