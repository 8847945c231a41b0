"""The downstream classifier as jinyuan-jia/BadEncoder trains it on features in memory.

One head at a time. Each epoch starts two workers for each of three DataLoaders: the training features, the clean and
the triggered test features, both of which are evaluated after every epoch.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

Batches = DataLoader[tuple[Tensor, ...]]


class NeuralNet(nn.Module):
    """Linear, ReLU, Dropout, Linear, ReLU, Linear; features (B, D) -> logits (B, C)."""

    def __init__(self, feature_dim: int, num_classes: int, hidden: tuple[int, int] = (512, 256)) -> None:
        super().__init__()
        self.fc1 = nn.Linear(feature_dim, hidden[0])
        self.relu1 = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(hidden[1], num_classes)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.dropout(self.relu1(self.fc1(features)))
        logits: Tensor = self.fc3(self.relu2(self.fc2(hidden)))
        return logits


def feature_loader(features: np.ndarray, labels: np.ndarray, batch_size: int = 64) -> Batches:
    """Features (N, D) and labels (N,) in the file's order, last batch partial, two workers anew in every epoch."""
    dataset = TensorDataset(torch.Tensor(features), torch.Tensor(labels))
    return DataLoader(dataset, batch_size, shuffle=False, num_workers=2, pin_memory=torch.cuda.is_available())


def train_epoch(net: nn.Module, optimizer: torch.optim.Optimizer, loader: Batches, device: torch.device) -> float:
    """One epoch of cross-entropy; returns the sum of batch means times the batch size over N, as published."""
    net.train()
    total = 0.0
    for features, labels in loader:
        features, labels = features.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(features), labels.long())
        loss.backward()
        optimizer.step()
        total += loss.item()
    assert loader.batch_size is not None
    return total * loader.batch_size / _count(loader)


def accuracy(net: nn.Module, loader: Batches, device: torch.device) -> float:
    """Percent of the loader's samples that are classified as their label."""
    net.eval()
    total, correct = 0.0, 0.0
    with torch.no_grad():
        for features, labels in loader:
            features, labels = features.to(device), labels.to(device)
            output = net(features)
            total += functional.cross_entropy(output, labels.long(), reduction="sum").item()
            correct += output.argmax(dim=1, keepdim=True).eq(labels.view(-1, 1)).sum().item()
    return 100.0 * correct / _count(loader)


def _count(loader: Batches) -> int:
    assert isinstance(loader.dataset, TensorDataset)
    return len(loader.dataset)


def head_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Batches,
    clean: Batches,
    triggered: Batches,
    device: torch.device,
) -> tuple[float, float, float]:
    """One epoch of training and both evaluations: loss, clean accuracy, attack success rate in percent."""
    loss = train_epoch(net, optimizer, train, device)
    return loss, accuracy(net, clean, device), accuracy(net, triggered, device)
