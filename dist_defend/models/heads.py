"""Downstream classifiers on frozen features: one, or many trained at once as batched matrix products."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class MLPHead(nn.Module):
    """BadEncoder's classifier: Linear, ReLU, Dropout, Linear, ReLU, Linear; features (B, D) -> logits (B, C)."""

    def __init__(
        self, feature_dim: int, num_classes: int, hidden: tuple[int, int] = (512, 256), dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(feature_dim, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], num_classes)
        self.dropout = dropout

    def forward(self, features: Tensor) -> Tensor:
        x = functional.dropout(self.fc1(features).relu(), self.dropout, self.training)
        return self.fc3(self.fc2(x).relu())


class HeadStack(nn.Module):
    """R classifiers side by side; each starts from, and learns, what MLPHead would alone after torch.manual_seed(seed).

    Parameters are MLPHead's with R in front. Summing the R mean losses gives each head its own gradient.
    """

    fc1_weight: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        seeds: Sequence[int],
        hidden: tuple[int, int] = (512, 256),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.shape = (feature_dim, num_classes, hidden, dropout)
        self.dropout = dropout
        alone = [_seeded_head(seed, *self.shape) for seed in seeds]
        for layer in ("fc1", "fc2", "fc3"):
            for name in ("weight", "bias"):
                stacked = torch.stack([getattr(getattr(head, layer), name).detach() for head in alone])
                self.register_parameter(f"{layer}_{name}", nn.Parameter(stacked))

    def forward(self, features: Tensor, factors: Tensor | None = None) -> Tensor:
        """features (R, B, D), or (B, D) for all heads alike -> logits (R, B, C).

        factors (R, B, hidden[0]) multiply the first hidden layer in place of dropout's own draws (0, or 1 / (1 - p)).
        """
        x = self._linear("fc1", features.expand(len(self.fc1_weight), -1, -1).transpose(1, 2)).relu()
        x = functional.dropout(x, self.dropout, self.training) if factors is None else x * factors.transpose(1, 2)
        return self._linear("fc3", self._linear("fc2", x).relu()).transpose(1, 2)

    def extract(self, head: int) -> MLPHead:
        """A copy of one of the heads, in eval mode."""
        alone = MLPHead(*self.shape).to(self.fc1_weight).eval()
        alone.load_state_dict({name.replace("_", "."): value[head] for name, value in self.state_dict().items()})
        return alone

    @torch.no_grad()
    def predict(self, head: int, features: Tensor) -> Tensor:
        """Classes (N,) int64 that one head gives to features (N, D)."""
        return self.extract(head)(features).argmax(1)

    def _linear(self, layer: str, x: Tensor) -> Tensor:
        """(R, in, B) -> (R, out, B): batch last, so that a weight's gradient comes out in the weight's own layout."""
        weight, bias = self.get_parameter(f"{layer}_weight"), self.get_parameter(f"{layer}_bias")
        return torch.baddbmm(bias[:, :, None], weight, x)


def _seeded_head(seed: int, feature_dim: int, num_classes: int, hidden: tuple[int, int], dropout: float) -> MLPHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLPHead(feature_dim, num_classes, hidden, dropout)
