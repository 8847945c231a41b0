"""BadEncoder's fine-tuning as jinyuan-jia/BadEncoder does it.

Per image, a worker makes a SimCLR view that nobody uses, stamps a copy of the image for every trigger, and carries
every reference and one augmentation of it along. Per step, the clean encoder recomputes features that never change, and
the backdoored one runs once on each of the kinds of images, the references repeated over the batch.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from dist_defend.bench.published.simclr import colour, to_tensor, view_transform

Sample = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]


class ShadowDataset(Dataset[Sample]):
    """Images (N, H, W, 3) uint8 -> clean, triggered per trigger, reference and augmented reference per reference.

    patches and masks (K, H, W, 3) stamp x mask + patch; references (K, H, W, 3) uint8.
    """

    def __init__(
        self,
        images: np.ndarray,
        patches: np.ndarray,
        masks: np.ndarray,
        references: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.images, self.patches, self.masks = images, patches, masks
        self.references = [Image.fromarray(reference) for reference in references]
        self.view = view_transform(images.shape[1], mean, std)
        self.plain = to_tensor(mean, std)
        self.augment = transforms.Compose(colour(mean, std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = Image.fromarray(self.images[index])
        self.view(image)  # made and thrown away
        triggered = []
        for patch, mask in zip(self.patches, self.masks, strict=True):
            stamped = copy.deepcopy(self.images[index])
            stamped[:] = stamped * mask + patch
            triggered.append(self.plain(Image.fromarray(stamped)))
        references = [self.plain(copy.deepcopy(reference)) for reference in self.references]
        augmented = [self.augment(copy.deepcopy(reference)) for reference in self.references]
        return self.plain(image), triggered, references, augmented


def shadow_loader(dataset: ShadowDataset, batch_size: int) -> DataLoader[Sample]:
    """Shuffled whole batches from two workers, which start anew in every epoch."""
    return DataLoader(
        dataset, batch_size, shuffle=True, num_workers=2, drop_last=True, pin_memory=torch.cuda.is_available()
    )


def freeze_batch_norm(encoder: nn.Module) -> None:
    """Train mode with every 2-d batch norm in eval mode and its weight and bias fixed."""
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad = False


def badencoder_step(
    backdoored: nn.Module,
    clean: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    triggered: Sequence[Tensor],
    references: Sequence[Tensor],
    augmented: Sequence[Tensor],
    lambda1: float = 1.0,
    lambda2: float = 1.0,
) -> tuple[float, float, float, float]:
    """One update; all images normalised, (B, 3, H, W) each, K tensors in each sequence.

    Returns the loss before it and its parts: effectiveness, reference fidelity, utility.
    """
    with torch.no_grad():
        clean_features = functional.normalize(clean(images), dim=-1)
        clean_references = [functional.normalize(clean(reference), dim=-1) for reference in references]
    features = functional.normalize(backdoored(images), dim=-1)
    effectiveness, fidelity = [], []
    for k in range(len(references)):
        reference_features = functional.normalize(backdoored(references[k]), dim=-1)
        triggered_features = functional.normalize(backdoored(triggered[k]), dim=-1)
        augmented_features = functional.normalize(backdoored(augmented[k]), dim=-1)
        effectiveness.append(-torch.sum(triggered_features * reference_features, dim=-1).mean())
        fidelity.append(-torch.sum(augmented_features * clean_references[k], dim=-1).mean())
    loss0 = sum(effectiveness[1:], effectiveness[0]) / len(effectiveness)
    loss1 = sum(fidelity[1:], fidelity[0]) / len(fidelity)
    loss2 = -torch.sum(features * clean_features, dim=-1).mean()
    loss = loss0 + lambda1 * loss1 + lambda2 * loss2
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), loss0.item(), loss1.item(), loss2.item()


def badencoder_epoch(
    backdoored: nn.Module,
    clean: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Sample],
    device: torch.device,
) -> float:
    """One pass over the loader; returns the mean loss."""
    freeze_batch_norm(backdoored)
    total, count = 0.0, 0
    for images, *lists in loader:
        images = images.to(device, non_blocking=True)
        moved = ([tensor.to(device, non_blocking=True) for tensor in tensors] for tensors in lists)
        triggered, references, augmented = moved
        loss, *_ = badencoder_step(backdoored, clean, optimizer, images, triggered, references, augmented)
        total += loss * len(images)
        count += len(images)
    return total / count
