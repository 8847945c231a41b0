"""MIMIC's phase 1 as wssun/MIMIC does it: the mutual information of each stage's output and the final feature.

For every stage, epoch and batch the frozen network runs again on the same images, and one more forward hook is left on
the stage, all of which run in every later forward pass.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dist_defend.bench.published.mimic import LAYERS
from dist_defend.bench.published.simclr import to_tensor


class MemoryDataset(Dataset[Tensor]):
    """Images (N, H, W, 3) uint8, normalised and not augmented."""

    def __init__(self, images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images, self.transform = images, to_tensor(mean, std)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.transform(Image.fromarray(self.images[index]))
        return image


def memory_loader(
    images: np.ndarray, mean: Sequence[float], std: Sequence[float], batch_size: int
) -> DataLoader[Tensor]:
    """In order, last batch partial, two workers anew in every pass."""
    dataset = MemoryDataset(images, mean, std)
    return DataLoader(dataset, batch_size, shuffle=False, num_workers=2, pin_memory=torch.cuda.is_available())


class TNet(nn.Module):
    """Statistics network on concatenated pairs (B, x_dim + y_dim) -> (B, 1)."""

    def __init__(self, in_dim: int, hidden: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, pair: Tensor) -> Tensor:
        pair = self.layers(pair)
        return pair


def donsker_varadhan(critic: nn.Module, x: Tensor, y: Tensor, permutation: Tensor | None = None) -> Tensor:
    """mean T(x, y) - log mean exp T(x, y permuted), by plain exponentials; a scalar in nats."""
    if permutation is None:
        permutation = torch.randperm(len(y))
    joint: Tensor = critic(torch.cat([x, y], dim=1))
    independent: Tensor = critic(torch.cat([x, y[permutation]], dim=1))
    return joint.mean() - torch.log(torch.exp(independent).mean())


class StageTap:
    """Reads a stage's flattened output by a forward hook; with leaks, every reading leaves its hook behind."""

    def __init__(self, network: nn.Module, layer: int, leaks: bool) -> None:
        self.network, self.leaks = network, leaks
        self.stage = list(network.get_submodule("f.f").children())[layer]
        self.output = torch.empty(0)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> the stage's output (B, C H' W') and the unit final feature (B, D)."""
        handle = self.stage.register_forward_hook(self._keep)
        feature, _ = self.network(images)
        if not self.leaks:
            handle.remove()
        return self.output.detach(), feature.detach()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.output = nn.Flatten()(output)


def estimate_layer(
    network: nn.Module, layer: int, batches: Iterable[Tensor], epochs: int, last_epochs: int, leaks: bool = True
) -> float:
    """Estimate in nats for one stage; trains and evaluates on the same batches of normalised images (B, 3, 32, 32)."""
    network.eval()
    tap = StageTap(network, layer, leaks)
    device = next(network.parameters()).device
    x, y = tap(torch.rand(100, 3, 32, 32, device=device))
    critic = TNet(x.shape[1] + y.shape[1]).to(device)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, weight_decay=1e-5)
    history = []
    for _ in range(epochs):
        for images in batches:
            x, y = tap(images.to(device))
            loss = -donsker_varadhan(critic, x, y)
            assert not torch.isnan(loss), "the estimate diverged"
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        values = []
        for images in batches:
            x, y = tap(images.to(device))
            with torch.no_grad():
                value = donsker_varadhan(critic, x, y).item()
            values.append(value if value > 0 else 0.0)  # nan too
        history.append(float(np.mean(values)))
    return float(np.mean(history[-last_epochs:]))


def estimate_information(
    network: nn.Module, batches: Iterable[Tensor], epochs: int = 200, last_epochs: int = 10, leaks: bool = True
) -> list[float]:
    """Estimates of the four stages, one after the other."""
    return [estimate_layer(network, layer, batches, epochs, last_epochs, leaks) for layer in LAYERS]


def attention_weights(estimates: Sequence[float], base: float = 1000.0, scale: float = 10000.0) -> np.ndarray:
    """base + scale * share of each stage; 0 / 0 = NaN when every estimate is 0."""
    values = np.asarray(estimates)
    with np.errstate(invalid="ignore"):
        return np.asarray(base + scale * values / values.sum())
