"""CLIP's image towers (Radford et al. 2021) as open_clip builds them.

open_clip has a configuration for each of its names, and makes fresh weights for it; nothing here downloads any. A tower
that is not needed is replaced by the smallest there is.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from dist_defend.errors import UserError, no_model
from dist_defend.models.pixel_space import Encoder, Normalize

OPEN_CLIP = "open_clip:"
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
_RESNET_STRIDE = 32  # pixels


def clip_config(arch: str) -> dict[str, Any]:
    """open_clip's configuration of "open_clip:NAME". UserError where it is not installed, or has no such model."""
    name = arch.removeprefix(OPEN_CLIP)
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f"arch '{arch}' needs open_clip, which is not installed; pip install 'dist-defend[clip]'"
        ) from error
    known = open_clip.list_models()
    if name not in known:
        raise no_model("open_clip", name, known)
    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def published_image_size(arch: str) -> int:
    """Pixels that the tower was made for. UserError as clip_config."""
    size: int = _vision(clip_config(arch)).image_size
    return size


def _vision(config: dict[str, Any]) -> Any:
    import open_clip

    return open_clip.CLIPVisionCfg(**config["vision_cfg"])


def build_clip(config: dict[str, Any], vision: Any, text: Any) -> Any:
    import open_clip

    make = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    return make(config["embed_dim"], vision, text, quick_gelu=config.get("quick_gelu", False))


class OpenClipEncoder(Encoder):
    """CLIP's image tower with its projection. Taps: a ResNet's four stages, or a ViT's blocks at depth quarters."""

    f: Any

    def __init__(self, arch: str, normalization: str, image_size: int) -> None:
        super().__init__()
        self.normalize = Normalize(normalization)
        config = clip_config(arch)
        vision = _vision(config)
        if vision.timm_model_name:
            raise UserError(f"{arch} has an image tower of timm: write timm:{vision.timm_model_name}")
        is_resnet = isinstance(vision.layers, list)
        depth, least = (4, _RESNET_STRIDE) if is_resnet else (vision.layers, vision.patch_size)
        if image_size < least or depth < 4:
            raise UserError(f"{arch} needs images of {least} px or more, not {image_size}, and 4 blocks to tap")
        quarters = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        self.taps = [1, 2, 3, 4] if is_resnet else quarters  # a ResNet's first output is its stem's
        self.image_size, self.feature_dim = image_size, int(config["embed_dim"])
        self.f = build_clip(config, replace(vision, image_size=image_size, output_tokens=False), _NO_TEXT).visual

    def _input(self, x: Tensor) -> Tensor:
        x = self.prepared(x)
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"images of {x.shape[-2]}x{x.shape[-1]} px for a tower of {self.image_size} px: "
                f"prepare them with --image-size {self.image_size}"
            )
        return x

    def layers(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        passed = self.f.forward_intermediates(self._input(x), indices=self.taps)
        return passed["image_intermediates"], passed["image_features"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(self._input(x))
        return x
