"""Images as bytes in memory: where each one lies, and decoding those that are JPEG."""

from dataclasses import dataclass

import numpy as np

from dist_defend.data.jpeg import decode_jpeg


@dataclass(frozen=True)
class Pixels:
    """B images: image i is heights[i] x widths[i] x 3 bytes from addresses[i] of ``memory`` (n,) uint8 on."""

    memory: np.ndarray
    addresses: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray) -> "Pixels":
        """Images (B, H, W, 3) uint8, in place where they are contiguous."""
        images = np.ascontiguousarray(images)
        count, height, width, _ = images.shape
        addresses = np.arange(count, dtype=np.int64) * (height * width * 3)
        return cls(images.reshape(-1), addresses, np.full(count, height), np.full(count, width))

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, rows: np.ndarray) -> "Pixels":
        return Pixels(self.memory, self.addresses[rows], self.heights[rows], self.widths[rows])

    def image(self, i: int) -> np.ndarray:
        """Image i, (H, W, 3) uint8, in place."""
        shape = (int(self.heights[i]), int(self.widths[i]), 3)
        start = int(self.addresses[i])
        return self.memory[start : start + shape[0] * shape[1] * 3].reshape(shape)

    def stack(self) -> np.ndarray:
        """A copy of all images, which have one size, as (B, H, W, 3) uint8."""
        out = np.empty((len(self), self.heights[0], self.widths[0], 3), np.uint8)
        for i in range(len(self)):
            out[i] = self.image(i)
        return out


@dataclass(frozen=True)
class StoredImages:
    """B images as a file holds them, sizes[i] bytes each, raw or JPEG; rows (B,) are their numbers in the data set."""

    memory: np.ndarray
    rows: np.ndarray
    addresses: np.ndarray
    sizes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    is_raw: np.ndarray

    def __getitem__(self, i: np.ndarray | slice) -> "StoredImages":
        columns = (self.rows, self.addresses, self.sizes, self.heights, self.widths, self.is_raw)
        return StoredImages(self.memory, *(column[i] for column in columns))

    def decode(self) -> Pixels:
        """Raw images in place; if there is a JPEG among them, all in fresh memory. UserError for a damaged JPEG."""
        if self.is_raw.all():
            return Pixels(self.memory, self.addresses, self.heights, self.widths)
        lengths = 3 * self.heights * self.widths
        addresses = np.cumsum(lengths) - lengths
        pixels = Pixels(np.empty(lengths.sum(), np.uint8), addresses, self.heights, self.widths)
        for i, row in enumerate(self.rows):
            data = self.memory[self.addresses[i] : self.addresses[i] + self.sizes[i]]
            if self.is_raw[i]:
                pixels.image(i).reshape(-1)[:] = data
            else:
                decode_jpeg(data, pixels.image(i), int(row))
        return pixels
