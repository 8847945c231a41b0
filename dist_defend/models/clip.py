"""CLIP (Radford et al. 2021) as open_clip builds it: image towers as encoders, and the text tower.

open_clip has a configuration for each of its names, and makes fresh weights for it; nothing here downloads any. A tower
that is not needed is replaced by the smallest there is.
"""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.errors import UserError
from dist_defend.models.artifact import load_strict
from dist_defend.models.encoder import OPEN_CLIP, Encoder, Normalize
from dist_defend.models.foreign_file import read_checkpoint, unwrap
from dist_defend.models.foreign_report import check_values
from dist_defend.screen import printable

_NO_IMAGES = {"image_size": 1, "patch_size": 1, "width": 64, "layers": 1}
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
_RESNET_STRIDE = 32  # pixels
_MOST_TEXT = 2000  # letters
_FACTS = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size", "attn_mask")  # no weights


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
        near = difflib.get_close_matches(name, known, n=3)
        raise UserError(f"open_clip has no model '{name}'" + (f": did you mean {', '.join(near)}?" if near else ""))
    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def published_image_size(arch: str) -> int:
    """Pixels that the tower was made for. UserError as clip_config."""
    size: int = _vision(clip_config(arch)).image_size
    return size


def _vision(config: dict[str, Any]) -> Any:
    import open_clip

    return open_clip.CLIPVisionCfg(**config["vision_cfg"])


def _build(config: dict[str, Any], vision: Any, text: Any) -> Any:
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
        self.f = _build(config, replace(vision, image_size=image_size, output_tokens=False), _NO_TEXT).visual

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


class TextTower(nn.Module):
    """CLIP's text tower with its tokenizer: texts -> unit features (N, D)."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        config = clip_config(arch)
        import open_clip

        text = open_clip.CLIPTextCfg(**config["text_cfg"])
        if "multimodal_cfg" in config or text.hf_model_name or text.hf_tokenizer_name:
            raise UserError(f"{arch} has a text tower or a tokenizer that is not CLIP's own: choose another arch")
        self.arch, self.feature_dim = arch, int(config["embed_dim"])
        self.tokenize = open_clip.SimpleTokenizer(context_length=text.context_length, **(text.tokenizer_kwargs or {}))
        if text.vocab_size < self.tokenize.vocab_size:
            raise UserError(
                f"{arch} knows {text.vocab_size} tokens, CLIP's tokenizer {self.tokenize.vocab_size}: "
                "choose another arch"
            )
        self.clip = _build(config, _NO_IMAGES, text)
        del self.clip.visual, self.clip.logit_scale

    def forward(self, texts: Sequence[str]) -> Tensor:
        """UserError for a text of more tokens than the tower reads."""
        for text in texts:
            if len(text) > _MOST_TEXT:  # the tokenizer's time grows with the square of a word's length
                raise UserError(f"'{printable(text, 80)}' has {len(text)} letters: shorten name or prompt")
            count = len(self.tokenize.encode(text)) + 2  # its beginning and its end
            if count > self.tokenize.context_length:
                most = self.tokenize.context_length
                raise UserError(
                    f"'{printable(text, 200)}' has {count} tokens; {self.arch} reads {most}: shorten name or prompt"
                )
        tokens = self.tokenize(list(texts)).to(next(self.clip.parameters()).device)
        features: Tensor = self.clip.encode_text(tokens, normalize=True)
        return features


def load_text_tower(arch: str, path: str | Path) -> TextTower:
    """The text tower (on the CPU, in eval mode) in a file of a whole CLIP, in OpenAI's or open_clip's layout.

    UserError for a file that cannot be read as data, holds no text tower, or does not fit the arch.
    """
    tower = TextTower(arch)
    state, _ = unwrap(read_checkpoint(path), path, ("state_dict", "model"))
    ours = [key for key in state if not key.startswith("visual.") and key.split(".")[-1] not in _FACTS]
    state = {key: state[key] for key in ours}
    if not any(key.endswith("token_embedding.weight") for key in state):
        raise UserError(f"{path} holds no text tower: name the file of the whole CLIP, image and text")
    check_values(state, tower.clip.state_dict(), path)
    load_strict(tower.clip, state, path)
    return tower.eval()


def class_features(tower: TextTower, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Unit features (C, D) of the classes: means over the templates' unit features (Radford et al. 2021, 3.1.4).

    Each template has "{class}" where the name goes.
    """
    prompts = [[template.replace("{class}", name) for name in class_names] for template in templates]
    return functional.normalize(torch.stack([tower(texts) for texts in prompts]).mean(0), dim=1)
