"""Image encoders in pixel space, and SimCLR's pair of encoder and projector.

Images are (B, 3, H, W) in [0, 1]; normalisation is part of the encoder.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dist_defend.errors import UserError, no_model
from dist_defend.models.architectures import ENCODERS, find_encoder, unknown
from dist_defend.models.clip_image import OPEN_CLIP, OpenClipEncoder
from dist_defend.models.pixel_space import Encoder, Normalize, Resize

PROJECTION_DIM = 128


class StagedEncoder(Encoder):
    """conv, norm, relu, four stages, pool: an nn.Sequential of eight."""

    f: nn.Sequential

    def __init__(self, f: nn.Sequential, feature_dim: int, normalization: str) -> None:
        super().__init__()
        self.normalize = Normalize(normalization)
        self.f = f
        self.feature_dim = feature_dim

    def layers(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x = self.f[:3](self.prepared(x))
        maps = []
        for stage in self.f[3:7].children():
            x = stage(x)
            maps.append(x)
        return maps, self.f[7](x).flatten(1)


def create_timm(name: str, image_size: int, num_outputs: int) -> nn.Module:
    """A timm model with fresh weights for images of that size (pixels). UserError for an unknown name."""
    import timm  # seconds of import that CIFAR models do without

    if not timm.is_model(name):
        raise no_model("timm", name, timm.list_models())
    published = timm.models.get_pretrained_cfg(name)
    sized: dict[str, Any] = {"img_size": image_size} if published is not None and published.fixed_input_size else {}
    return timm.create_model(name, pretrained=False, num_classes=num_outputs, **sized)


class TimmEncoder(Encoder):
    """A timm model without its classifier. Taps: the last four stages, or a ViT's blocks at depth quarters.

    num_outputs: length of a last projection that counts as part of the encoder; 0 for none.
    """

    f: Any

    def __init__(self, name: str, normalization: str, image_size: int, num_outputs: int = 0) -> None:
        super().__init__()
        self.normalize = Normalize(normalization)
        self.f = create_timm(name, image_size, num_outputs)
        strides = [stage["reduction"] for stage in getattr(self.f, "feature_info", [])]
        if len(strides) < 4 or not hasattr(self.f, "forward_intermediates"):
            raise UserError(f"timm:{name} has no four feature maps: choose one with timm's forward_intermediates")
        depth, is_isotropic = len(strides), len(set(strides)) == 1
        quarters = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        self.taps = quarters if is_isotropic else list(range(depth - 4, depth))
        self.feature_dim = num_outputs or int(getattr(self.f, "head_hidden_size", self.f.num_features))

    def layers(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        last, maps = self.f.forward_intermediates(self.prepared(x), indices=self.taps, output_fmt="NCHW")
        return maps, self.f.forward_head(last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(self.prepared(x))
        return x


ARCHITECTURES = (*ENCODERS, "clip_resnet50", "timm:NAME", f"{OPEN_CLIP}NAME")
CLIP_DIM = 1024


def build_encoder(
    arch: str, normalization: str = "cifar10", image_size: int = 32, resize: int | None = None
) -> Encoder:
    """An encoder with fresh weights (torch's global generator). UserError for an unknown arch or normalization.

    arch: one of ARCHITECTURES; clip_resnet50 is CLIP's image tower, as timm has it, open_clip:NAME any of open_clip's
    own. image_size, in pixels, sets a ViT's grid. With ``resize`` the encoder brings its images to that side: its
    network is made for resize px, while images, and triggers with them, have image_size px.
    """
    encoder = _build_encoder(arch, normalization, resize or image_size)
    encoder.resize = None if resize is None else Resize(resize)
    return encoder


def _build_encoder(arch: str, normalization: str, image_size: int) -> Encoder:
    if arch == "clip_resnet50":
        return TimmEncoder("resnet50_clip", normalization, image_size, num_outputs=CLIP_DIM)
    if arch.startswith("timm:"):
        return TimmEncoder(arch.removeprefix("timm:"), normalization, image_size)
    if arch.startswith(OPEN_CLIP):
        return OpenClipEncoder(arch, normalization, image_size)
    found = find_encoder(arch)
    if found is None:
        raise unknown(arch, ARCHITECTURES, "the encoders")
    return StagedEncoder(found.make(), found.feature_dim, normalization)


class SimCLR(nn.Module):
    """Encoder f and projector g. A model imported without a projector has an identity for g. resize: f's, in pixels."""

    def __init__(
        self, f: Encoder, g: nn.Module, arch: str, normalization: str, image_size: int, resize: int | None = None
    ) -> None:
        super().__init__()
        self.f = f
        self.g = g
        self.arch, self.normalization, self.image_size, self.resize = arch, normalization, image_size, resize

    @property
    def kind(self) -> str:
        """What a model card calls it."""
        return "encoder" if isinstance(self.g, nn.Identity) else "simclr"

    def layers(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Stage maps, h / |h| and z / |z| of one pass over images (B, 3, H, W)."""
        maps, h = self.f.layers(x)
        return maps, F.normalize(h, dim=-1), F.normalize(self.g(h), dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """h / |h| (B, feature_dim) and z / |z| (B, 128) of images (B, 3, H, W)."""
        h = self.f(x)
        return F.normalize(h, dim=-1), F.normalize(self.g(h), dim=-1)


def build_simclr(
    arch: str, normalization: str = "cifar10", image_size: int = 32, projector: bool = True, resize: int | None = None
) -> SimCLR:
    """SimCLR with fresh weights; projector Linear(D, 512), norm, relu, Linear(512, 128). As build_encoder otherwise."""
    f = build_encoder(arch, normalization, image_size, resize)
    g = build_projector(f.feature_dim) if projector else nn.Identity()
    return SimCLR(f, g, arch, normalization, image_size, resize)


def build_projector(feature_dim: int) -> nn.Module:
    """With fresh weights: Linear(D, 512), norm, relu, Linear(512, 128)."""
    hidden = nn.Linear(feature_dim, 512, bias=False)
    return nn.Sequential(hidden, nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, PROJECTION_DIM))
