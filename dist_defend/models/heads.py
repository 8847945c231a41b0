"""Downstream classifiers on frozen features: one, or many trained at once as batched matrix products."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN = (512, 256)  # BadEncoder's


class MLPHead(nn.Module):
    """Linear layers fc1, fc2, ... with a ReLU between each two; features (B, D) -> logits (B, C).

    hidden: widths of the hidden layers. BadEncoder's classifier has two; none is the linear probe. Dropout follows the
    first ReLU, so a linear probe has none.
    """

    def __init__(
        self, feature_dim: int, num_classes: int, hidden: Sequence[int] = HIDDEN, dropout: float = 0.5
    ) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(pairwise((feature_dim, *hidden, num_classes)), 1):
            self.add_module(f"fc{number}", nn.Linear(inputs, outputs))
        self.dropout = dropout

    def forward(self, features: Tensor) -> Tensor:
        first, *others = self.children()
        x: Tensor = first(features)
        for number, layer in enumerate(others):
            x = x.relu()
            x = layer(x if number else functional.dropout(x, self.dropout, self.training))
        return x


class HeadedEncoder(nn.Module):
    """An encoder and a head on its L2-normalised features: images (B, 3, H, W) in [0, 1] -> logits (B, C)."""

    def __init__(self, encoder: nn.Module, head: MLPHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(functional.normalize(self.encoder(images), dim=1))
        return logits


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
        hidden: Sequence[int] = HIDDEN,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.shape = (feature_dim, num_classes, tuple(hidden), dropout)
        self.dropout = dropout
        alone = [_seeded_head(seed, *self.shape) for seed in seeds]
        self.layers = [name for name, _ in alone[0].named_children()]
        for layer in self.layers:
            for name in ("weight", "bias"):
                stacked = torch.stack([head.get_parameter(f"{layer}.{name}").detach() for head in alone])
                self.register_parameter(f"{layer}_{name}", nn.Parameter(stacked))

    def forward(self, features: Tensor, factors: Tensor | None = None) -> Tensor:
        """features (R, B, D), or (B, D) for all heads alike -> logits (R, B, C).

        factors (R, B, hidden[0]) multiply the first hidden layer in place of dropout's own draws (0, or 1 / (1 - p)).
        """
        first, *others = self.layers
        x = self._linear(first, features.expand(len(self.fc1_weight), -1, -1).transpose(1, 2))
        for number, layer in enumerate(others):
            x = x.relu()
            x = self._linear(layer, x if number else self._dropped(x, factors))
        return x.transpose(1, 2)

    def extract(self, head: int) -> MLPHead:
        """A copy of one of the heads, in eval mode."""
        alone = MLPHead(*self.shape).to(self.fc1_weight).eval()
        alone.load_state_dict({name.replace("_", "."): value[head] for name, value in self.state_dict().items()})
        return alone

    @torch.no_grad()
    def predict(self, head: int, features: Tensor) -> Tensor:
        """Classes (N,) int64 that one head gives to features (N, D)."""
        return self.extract(head).forward(features).argmax(1)

    def _dropped(self, x: Tensor, factors: Tensor | None) -> Tensor:
        if factors is None:
            return functional.dropout(x, self.dropout, self.training)
        return x * factors.transpose(1, 2)

    def _linear(self, layer: str, x: Tensor) -> Tensor:
        """(R, in, B) -> (R, out, B): batch last, so that a weight's gradient comes out in the weight's own layout."""
        weight, bias = self.get_parameter(f"{layer}_weight"), self.get_parameter(f"{layer}_bias")
        return torch.baddbmm(bias[:, :, None], weight, x)


def _seeded_head(seed: int, feature_dim: int, num_classes: int, hidden: Sequence[int], dropout: float) -> MLPHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLPHead(feature_dim, num_classes, hidden, dropout)
