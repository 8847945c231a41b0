"""Neural bounds on the mutual information of x and y, from paired samples x (N, x_dim), y (N, y_dim), in nats.

Every estimator is a module with bound(x, y, permutation), the estimate, and loss(x, y, permutation), to be minimised.
permutation (N,) int64 pairs x_i with y_permutation[i] in place of independent samples; only Donsker-Varadhan needs it.
Critics see [x, y]; their first layer is applied to x and y apart, so that no pair is ever concatenated.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class _PairLinear(nn.Linear):
    """Linear(x_dim + y_dim, hidden) of concatenated pairs, as W_x x and W_y y + b to be added."""

    def __init__(self, x_dim: int, y_dim: int, hidden: int) -> None:
        super().__init__(x_dim + y_dim, hidden)
        self.widths = (x_dim, y_dim)

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(N, x_dim), (N, y_dim) -> two (N, hidden)."""
        weight_x, weight_y = self.weight.split(self.widths, dim=1)
        return functional.linear(x, weight_x), functional.linear(y, weight_y, self.bias)


class DonskerVaradhan(nn.Module):
    """Lower bound mean T(x, y) - log mean exp T(x, y') (Belghazi et al. 2018, MINE), T an MLP of three layers."""

    def __init__(self, x_dim: int, y_dim: int, hidden: int = 512) -> None:
        super().__init__()
        self.pair = _PairLinear(x_dim, y_dim, hidden)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def scores(self, x: Tensor, y: Tensor, permutation: Tensor) -> tuple[Tensor, Tensor]:
        """T of the joint and of the permuted pairs, (N,) each."""
        from_x, from_y = self.pair.parts(x, y)
        joint, independent = self.rest(torch.cat([from_x + from_y, from_x + from_y[permutation]])).squeeze(1).chunk(2)
        return joint, independent

    def bound(self, x: Tensor, y: Tensor, permutation: Tensor) -> Tensor:
        joint, independent = self.scores(x, y, permutation)
        return joint.mean() - (independent.logsumexp(0) - math.log(len(x)))

    def loss(self, x: Tensor, y: Tensor, permutation: Tensor) -> Tensor:
        return -self.bound(x, y, permutation)


class Club(nn.Module):
    """Upper bound (Cheng et al. 2020, CLUB) with q(y | x) a diagonal Gaussian; training maximises q's likelihood."""

    def __init__(self, x_dim: int, y_dim: int, hidden: int = 512) -> None:
        super().__init__()
        half = hidden // 2
        self.mean = nn.Sequential(nn.Linear(x_dim, half), nn.ReLU(), nn.Linear(half, y_dim))
        self.log_variance = nn.Sequential(nn.Linear(x_dim, half), nn.ReLU(), nn.Linear(half, y_dim), nn.Tanh())

    def bound(self, x: Tensor, y: Tensor, permutation: Tensor | None = None) -> Tensor:
        """mean_i [log q(y_i | x_i) - mean_j log q(y_j | x_i)]; the mean over j is that of a square, in closed form."""
        mean, log_variance = self._gaussian(x)
        others = (y.mean(0) - mean).square() + y.var(0, correction=0)
        return ((others - (y - mean).square()) / (2 * log_variance.exp())).sum(1).mean()

    def loss(self, x: Tensor, y: Tensor, permutation: Tensor | None = None) -> Tensor:
        """Minus the log-likelihood, doubled and without its constant, as published."""
        mean, log_variance = self._gaussian(x)
        return ((y - mean).square() / log_variance.exp() + log_variance).sum(1).mean()

    def _gaussian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), self.log_variance(x)


class InfoNCE(nn.Module):
    """Lower bound mean_i F(x_i, y_i) - mean_i log mean_j exp F(x_j, y_i) (van den Oord et al. 2018), at most log N."""

    def __init__(self, x_dim: int, y_dim: int, hidden: int = 512) -> None:
        super().__init__()
        self.pair = _PairLinear(x_dim, y_dim, hidden)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(hidden, 1), nn.Softplus())

    def bound(self, x: Tensor, y: Tensor, permutation: Tensor | None = None) -> Tensor:
        from_x, from_y = self.pair.parts(x, y)
        scores: Tensor = self.rest(from_x + from_y[:, None]).squeeze(2)  # [i, j] = F(x_j, y_i)
        return scores.diagonal().mean() - (scores.logsumexp(1).mean() - math.log(len(x)))

    def loss(self, x: Tensor, y: Tensor, permutation: Tensor | None = None) -> Tensor:
        return -self.bound(x, y, permutation)


Critic = DonskerVaradhan | Club | InfoNCE
