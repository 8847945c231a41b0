"""Input-aware dynamic backdoor (Nguyen and Tran 2020): two networks that make a trigger for each image.

Layers and keys are VinAIResearch/input-aware-backdoor-attack-release's, which BackdoorBench ports.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from dist_defend.errors import UserError
from dist_defend.files import read_regular, write_atomic
from dist_defend.models.artifact import load_strict, looks_pickled
from dist_defend.models.foreign_file import parse_safetensors
from dist_defend.models.foreign_report import check_values
from dist_defend.models.pixel_space import Normalize
from dist_defend.screen import printable

_MOST_BYTES = 64 << 20  # of a file of generators
_EPSILON = 1e-7  # keeps the outputs off 0 and 1


class Generator(nn.Sequential):
    """Normalised images (B, 3, H, W) -> (B, channels, H, W) in (0, 1). H and W: multiples of 8.

    Three times two convolutions and a pooling (32, 64, 128 channels), one convolution, three times a bilinear
    enlargement and two convolutions. Other multiples of 4 get two steps from 16 channels, as upstream has for MNIST.
    """

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        if image_size % 4:
            raise UserError(f"the input-aware generators need images of a multiple of 4 px; these have {image_size}")
        widths = [32, 64, 128] if image_size % 8 == 0 else [16, 32]
        into = 3
        for step, width in enumerate(widths):
            self.add_module(f"convblock_down_{2 * step}", _Block(into, width))
            self.add_module(f"convblock_down_{2 * step + 1}", _Block(width, width))
            self.add_module(f"downsample_{step}", nn.MaxPool2d(2))
            into = width
        self.add_module("convblock_middle", _Block(into, into))
        for step, width in enumerate([*widths[-2::-1], channels]):
            is_last = step == len(widths) - 1
            self.add_module(f"upsample_{step}", nn.Upsample(scale_factor=2, mode="bilinear"))
            self.add_module(f"convblock_up_{2 * step}", _Block(into, into))
            self.add_module(f"convblock_up_{2 * step + 1}", _Block(into, width, has_relu=not is_last))
            into = width

    def forward(self, images: Tensor) -> Tensor:
        for layer in self:
            images = layer(images)
        return images.tanh() / (2 + _EPSILON) + 0.5


class _Block(nn.Sequential):
    def __init__(self, channels_in: int, channels_out: int, has_relu: bool = True) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(channels_out, momentum=0.05)
        if has_relu:
            self.relu = nn.ReLU()


class Generators(nn.Module):
    """Both networks in pixel space: mask(images) (B, 1, H, W) and pattern(images) (B, 3, H, W), each in (0, 1)."""

    def __init__(self, image_size: int, normalization: str) -> None:
        super().__init__()
        self.image_size = image_size
        self.normalize = Normalize(normalization)
        self.net_m, self.net_g = Generator(1, image_size), Generator(3, image_size)

    def mask(self, images: Tensor) -> Tensor:
        """The mask network's output, pushed towards 0 and 1."""
        values: Tensor = self.net_m(self.normalize(images))
        return (20 * values - 10).tanh() / (2 + _EPSILON) + 0.5

    def pattern(self, images: Tensor) -> Tensor:
        """The pattern network's output, an image in pixel space."""
        pattern: Tensor = self.net_g(self.normalize(images))
        return pattern


@dataclass(frozen=True)
class InputAwareTrigger:
    """x + (pattern(x) - x) mask(x); generators in eval mode."""

    generators: Generators

    def __call__(self, images: Tensor) -> Tensor:
        return self._stamped(images, images)

    def cross(self, images: Tensor, others: Tensor, rows: Tensor) -> Tensor:
        """Mask and pattern of another image, which must not activate the backdoor."""
        return self._stamped(images, others)

    @torch.no_grad()
    def _stamped(self, images: Tensor, sources: Tensor) -> Tensor:
        return images + (self.generators.pattern(sources) - images) * self.generators.mask(sources)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "InputAwareTrigger":
        own = next(self.generators.parameters())
        is_there = (own.device, own.dtype) == (torch.device(device), dtype)
        return self if is_there else InputAwareTrigger(copy.deepcopy(self.generators).to(device, dtype))

    @property
    def image_size(self) -> tuple[int, int]:
        return self.generators.image_size, self.generators.image_size


def save_generators(path: str | Path, generators: Generators) -> None:
    """Write both networks' weights as safetensors (keys net_m.*, net_g.*), atomically."""
    state = {key: value.detach().cpu().contiguous() for key, value in generators.state_dict().items()}
    write_atomic(Path(path), safetensors.torch.save(state))


def load_generators(path: str | Path, image_size: int, normalization: str) -> Generators:
    """What save_generators wrote, in eval mode. UserError for a file that is missing, pickled, damaged or misfit."""
    try:
        weights = read_regular(path, _MOST_BYTES)
        if looks_pickled(weights):
            raise UserError(f"generators {path} are pickled and are not read: store them as safetensors")
        state = parse_safetensors(weights)
    except OSError as error:
        raise UserError(f"generators {path}: cannot be read ({error.strerror}); train them first") from error
    except UserError:
        raise
    except Exception as error:  # SafetensorError, and KeyError for a type of numbers that torch does not have
        told = printable(str(error), 200)
        raise UserError(f"generators {path}: not a safetensors file ({told}); train them again") from error
    generators = Generators(image_size, normalization)
    check_values(state, generators.state_dict(), path)
    load_strict(generators, state, path)
    return generators.eval().requires_grad_(False)
