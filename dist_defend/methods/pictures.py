"""PNG pictures of images that a method made."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_defend.files import write_atomic

_GAP, _ENLARGED = 1, 2  # pixels between images, and the factor by which the grid is enlarged


@torch.no_grad()
def save_grid(file: Path, images: Tensor, columns: int = 8) -> None:
    """Write images (N, 3, H, W) as a PNG grid, ``columns`` of them side by side. Values are clipped to [0, 1]."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    lines = -(-count // columns)
    sheet = np.full((lines * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for number, image in enumerate(pixels):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet)
    buffer = io.BytesIO()
    enlarged = (picture.width * _ENLARGED, picture.height * _ENLARGED)
    picture.resize(enlarged, Image.Resampling.NEAREST).save(buffer, "png", optimize=True)
    write_atomic(file, buffer.getvalue())
