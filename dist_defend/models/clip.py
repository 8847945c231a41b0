"""CLIP's text towers (Radford et al. 2021) as open_clip builds them, and what they make of class names."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.errors import UserError
from dist_defend.models.artifact import load_strict
from dist_defend.models.clip_image import build_clip, clip_config
from dist_defend.models.foreign_file import read_checkpoint, unwrap
from dist_defend.models.foreign_report import check_values
from dist_defend.screen import printable

_NO_IMAGES = {"image_size": 1, "patch_size": 1, "width": 64, "layers": 1}
_MOST_TEXT = 2000  # letters
_FACTS = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size", "attn_mask")  # no weights


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
        self.clip = build_clip(config, _NO_IMAGES, text)
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
    state = unwrap(read_checkpoint(path), path, ("state_dict", "model"))
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
