"""A defence as a script of the published code runs it: ``python -m dist_defend.bench.published.process NAME FOLDER``.

Reads suspect.pt and train, test and triggered in arrays.npz, all in memory, and defends with the published formulation.
Imports nothing of the package but the network's class.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dist_defend.bench.published import ibau, rnp

TEST_BATCH = 128
Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, 3) uint8, labels (N,)


def main(name: str, folder: Path, batch_size: int) -> None:
    """Run it; what comes out is left alone, as the process is what is measured."""
    model = torch.load(folder / "suspect.pt", weights_only=False)
    with np.load(folder / "arrays.npz") as file:
        train, test, triggered = ((file[split], file[f"{split}_labels"]) for split in ("train", "test", "triggered"))
    defend = {"ibau": _ibau, "rnp": _rnp}[name]
    defend(model, train, test, triggered, folder, batch_size)


def _ibau(model: nn.Module, train: Arrays, test: Arrays, triggered: Arrays, folder: Path, batch_size: int) -> None:
    """One round; the whole data as float tensors on the host, as published."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    clean, bad = (_batches(arrays, TEST_BATCH) for arrays in (test, triggered))
    ibau.unlearn_round(model, optimizer, _batches(train, batch_size), clean, bad, torch.device("cpu"))


def _batches(arrays: Arrays, size: int) -> list[tuple[Tensor, Tensor]]:
    images, labels = (torch.from_numpy(array) for array in arrays)
    pixels = (images.permute(0, 3, 1, 2).float() / 255).contiguous()
    return list(zip(pixels.split(size), labels.split(size), strict=True))


def _rnp(model: Any, train: Arrays, test: Arrays, triggered: Arrays, folder: Path, batch_size: int) -> None:
    """One epoch of each phase."""
    mean, std = (values.flatten().tolist() for values in (model.normalize.mean, model.normalize.std))
    sets = (rnp.ImageSet(*arrays, mean, std, torch.float32) for arrays in (train, test, triggered))
    defence, clean, bad = (
        DataLoader(images, size, shuffle=size == batch_size)
        for images, size in zip(sets, (batch_size, TEST_BATCH, TEST_BATCH), strict=True)
    )
    rnp.defend(model.net, defence, clean, bad, folder, unlearning_epochs=1, recovering_epochs=1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
