"""SimCLR pretraining as jinyuan-jia/BadEncoder does it: PIL views in two worker processes, one forward per view."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

Pairs = DataLoader[tuple[Tensor, Tensor]]


def to_tensor(mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
    """PIL image -> normalised (3, H, W)."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])


def colour(mean: Sequence[float], std: Sequence[float]) -> list[nn.Module]:
    """Flip, colour jitter, grey scale: the augmentation without its crop."""
    return [
        transforms.RandomHorizontalFlip(0.5),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(0.2),
        to_tensor(mean, std),
    ]


def view_transform(size: int, mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
    """PIL image -> one normalised SimCLR view (3, size, size)."""
    return transforms.Compose([transforms.RandomResizedCrop(size), *colour(mean, std)])


class PairDataset(Dataset[tuple[Tensor, Tensor]]):
    """Two independent views of each image of (N, H, W, 3) uint8."""

    def __init__(self, images: np.ndarray, transform: transforms.Compose) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.images[index])
        return self.transform(image), self.transform(image)


def pair_loader(images: np.ndarray, mean: Sequence[float], std: Sequence[float], batch_size: int) -> Pairs:
    """Shuffled whole batches of view pairs from two workers, which start anew in every epoch."""
    dataset = PairDataset(images, view_transform(images.shape[1], mean, std))
    return DataLoader(
        dataset, batch_size, shuffle=True, num_workers=2, drop_last=True, pin_memory=torch.cuda.is_available()
    )


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent of unit rows (B, D) by explicit exponentials, without subtracting a maximum."""
    batch = len(z1)
    z = torch.cat([z1, z2])
    similarity = torch.exp(z @ z.t() / temperature)
    others = (torch.ones_like(similarity) - torch.eye(2 * batch, device=z.device)).bool()
    similarity = similarity.masked_select(others).view(2 * batch, -1)
    positive = torch.exp((z1 * z2).sum(-1) / temperature)
    positive = torch.cat([positive, positive])
    return (-torch.log(positive / similarity.sum(-1))).mean()


def simclr_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: Tensor, second: Tensor, temperature: float
) -> float:
    """One update from two normalised views (B, 3, H, W); model(x) gives unit (h, z). Returns the loss before it."""
    _, z1 = model(first)
    _, z2 = model(second)
    loss = nt_xent(z1, z2, temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def simclr_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: Pairs, temperature: float, device: torch.device
) -> float:
    """One pass over the loader; returns the mean loss."""
    model.train()
    total, count = 0.0, 0
    for first, second in loader:
        first, second = first.to(device, non_blocking=True), second.to(device, non_blocking=True)
        total += simclr_step(model, optimizer, first, second, temperature) * len(first)
        count += len(first)
    return total / count
