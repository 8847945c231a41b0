"""RNP as bboylyg/RNP does it.

Both test sets are evaluated after every epoch of both phases and at every threshold; recovering takes gradients of all
weights; masks go through a text file; a neuron is pruned by loading a whole state dict; gradients are clipped while
there are none.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision import transforms

Batches = Iterable[tuple[Tensor, Tensor]]
Row = tuple[float, int, float, float]  # threshold, neurons pruned, ASR, ACC


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """gamma times neuron_mask; two more vectors, left over from another method, are allocated and not read."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.neuron_mask = nn.Parameter(torch.ones(norm.num_features))
        self.neuron_noise = nn.Parameter(torch.empty(norm.num_features))
        self.neuron_noise_bias = nn.Parameter(torch.empty(norm.num_features))

    def forward(self, input: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None and self.momentum is not None
        if self.training:
            self.num_batches_tracked += 1
        return functional.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight * self.neuron_mask,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )


def masked_copy(net: nn.Module) -> nn.Module:
    """The architecture with masked batch norms, and every weight of ``net`` that it knows."""
    masked = copy.deepcopy(net)
    dtype = next(net.parameters()).dtype
    for name, module in list(masked.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(masked.get_submodule(parent), child, MaskedBatchNorm2d(module).to(dtype))
    own = masked.state_dict()
    own.update({key: value for key, value in net.state_dict().items() if key in own})
    masked.load_state_dict(own)
    return masked


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images (N, H, W, 3) uint8, opened and normalised one at a time."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
    ) -> None:
        self.images, self.labels, self.dtype = images, labels, dtype
        self.to_tensor, self.normalise = transforms.ToTensor(), transforms.Normalize(mean, std)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.to_tensor(Image.fromarray(self.images[index]))
        return self.normalise(pixels.to(self.dtype)), int(self.labels[index])


class OnDevice:
    """A loader's batches, each moved to the device when its turn comes."""

    def __init__(self, loader: Batches, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            yield images.to(self.device), labels.to(self.device)


class GivenBatches:
    """Batch sampler: the rows that ``order(epoch)`` lists, batch by batch, an epoch per pass."""

    def __init__(self, order: Callable[[int], np.ndarray], batch_size: int) -> None:
        self.order, self.batch_size, self.epoch = order, batch_size, 0

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order(self.epoch).tolist()
        self.epoch += 1
        yield from (rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size))


def evaluate(net: nn.Module, loader: Batches) -> tuple[float, float]:
    """Mean of batch losses, and accuracy."""
    net.eval()
    correct = count = batches = 0
    loss = 0.0
    with torch.no_grad():
        for images, labels in loader:
            output = net(images)
            loss += functional.cross_entropy(output, labels).item()
            correct += int((output.max(1)[1] == labels).sum())
            count, batches = count + len(labels), batches + 1
    return loss / batches, correct / count


def unlearn_epoch(net: nn.Module, optimizer: torch.optim.Optimizer, loader: Batches) -> tuple[list[float], float]:
    """Gradient ascent on every batch: cross-entropies, and the running accuracy."""
    net.train()
    losses, correct, count = [], 0, 0
    for images, labels in loader:
        optimizer.zero_grad()
        output = net(images)
        loss = functional.cross_entropy(output, labels)
        correct, count = correct + int((output.max(1)[1] == labels).sum()), count + len(labels)
        losses.append(loss.item())
        nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], max_norm=20)  # there are none
        (-loss).backward()
        optimizer.step()
    return losses, correct / count


def recover_epoch(
    net: nn.Module, optimizer: torch.optim.Optimizer, loader: Batches, alpha: float
) -> tuple[list[float], float]:
    """The masks' descent on alpha times the cross-entropy, whose gradients of the weights pile up unused."""
    net.train()
    losses, correct, count = [], 0, 0
    for images, labels in loader:
        optimizer.zero_grad()
        output = net(images)
        loss = alpha * functional.cross_entropy(output, labels)
        correct, count = correct + int((output.max(1)[1] == labels).sum()), count + len(labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        for name, parameter in net.named_parameters():
            if "neuron_mask" in name:
                parameter.data.clamp_(0, 1)
    return losses, correct / count


def unlearning_optimizer(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def recovering_optimizer(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    masks = [parameter for name, parameter in net.named_parameters() if "neuron_mask" in name]
    return torch.optim.SGD(masks, lr=lr, momentum=0.9)


def write_masks(net: nn.Module, path: Path) -> None:
    lines, number = ["No \t Layer Name \t Neuron Idx \t Mask Score \n"], 0
    for name, value in net.state_dict().items():
        if "neuron_mask" in name:
            layer = ".".join(name.split(".")[:-1])
            for channel in range(len(value)):
                lines.append(f"{number} \t {layer} \t {channel} \t {value[channel].item():.4f} \n")
                number += 1
    path.write_text("".join(lines))


def read_masks(path: Path) -> list[tuple[str, int, float]]:
    rows = [line.strip().split() for line in path.read_text().splitlines()[1:]]
    return sorted(((row[1], int(row[2]), float(row[3])) for row in rows), key=lambda row: row[2])


def prune_neuron(net: nn.Module, layer: str, channel: int) -> None:
    state = net.state_dict()
    state[f"{layer}.weight"][channel] = 0.0
    net.load_state_dict(state)


def sweep(net: nn.Module, masks: list[tuple[str, int, float]], clean: Batches, bad: Batches) -> list[Row]:
    """One row per threshold 0, 0.05, ..., 0.90, pruned cumulatively."""
    rows, start = [], 0
    for threshold in np.arange(0, 0.90 + 0.05, 0.05):
        for layer, channel, mask in masks[start:]:
            if mask > threshold:
                break
            prune_neuron(net, layer, channel)
            start += 1
        (_, asr), (_, acc) = evaluate(net, bad), evaluate(net, clean)
        rows.append((float(threshold), start, asr, acc))
    return rows


def defend(
    net: nn.Module,
    defence: Batches,
    clean: Batches,
    bad: Batches,
    folder: Path,
    unlearning_epochs: int = 13,
    recovering_epochs: int = 20,
) -> tuple[dict[str, Tensor], list[Row]]:
    """The whole flow, from the backdoored network to the table; with so many epochs of unlearning, however it goes.

    Returns the masks by layer and the rows, before pruning first.
    """
    unlearned = copy.deepcopy(net)
    optimizer = unlearning_optimizer(unlearned, 0.01)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[10, 20], gamma=0.1)
    for _ in range(unlearning_epochs):
        unlearn_epoch(unlearned, optimizer, defence)
        evaluate(unlearned, clean)
        evaluate(unlearned, bad)
        schedule.step()
    masked = masked_copy(unlearned)
    optimizer = recovering_optimizer(masked, 0.2)
    for _ in range(recovering_epochs):
        recover_epoch(masked, optimizer, defence, alpha=0.2)
        evaluate(masked, clean)
        evaluate(masked, bad)
    write_masks(masked, folder / "mask_values.txt")
    pruned = copy.deepcopy(net)
    (_, asr), (_, acc) = evaluate(pruned, bad), evaluate(pruned, clean)
    rows = [(0.0, 0, asr, acc), *sweep(pruned, read_masks(folder / "mask_values.txt"), clean, bad)]
    layers = {k: v for k, v in masked.state_dict().items() if k.endswith(".neuron_mask")}
    return {key.removesuffix(".neuron_mask"): value for key, value in layers.items()}, rows
