"""Tiny models of open_clip: importing this module makes the names in clip_configs/ known to it."""

from pathlib import Path

import open_clip
import torch
from torch import Tensor

open_clip.add_model_config(Path(__file__).with_name("clip_configs"))


def clip_state(name: str, seed: int = 0) -> dict[str, Tensor]:
    """A whole CLIP in OpenAI's layout, from seeded weights in which every tensor matters."""
    torch.manual_seed(seed)
    config = open_clip.get_model_config(name)
    state: dict[str, Tensor] = open_clip.CLIP(**config).state_dict()
    for key, value in state.items():
        if key.endswith("running_var") or (value.dim() == 1 and key.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif value.dim() == 1:
            value.normal_(std=0.1)
        elif value.dim() > 1:
            value.normal_(std=value[0].numel() ** -0.5)
    return state


def save_clip(path: Path, name: str = "tiny_vit", seed: int = 0) -> str:
    """A file of clip_state."""
    torch.save(clip_state(name, seed), path)
    return str(path)
