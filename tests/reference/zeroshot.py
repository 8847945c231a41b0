"""Zero-shot CLIP as jinyuan-jia/BadEncoder evaluates it: one image per forward pass, stamped as 8-bit pixels.

Both towers are written out from the weights alone, in OpenAI's layout; images are (H, W, 3) uint8.
"""

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


def _norm(x: Tensor, state: State, key: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{key}.weight"]
        + state[f"{key}.bias"]
    )


def _block(x: Tensor, state: State, key: str, heads: int, is_causal: bool) -> Tensor:
    """A pre-norm transformer block with QuickGELU on tokens (L, D)."""
    length, width = x.shape
    mixed = _norm(x, state, f"{key}.ln_1") @ state[f"{key}.attn.in_proj_weight"].T + state[f"{key}.attn.in_proj_bias"]
    query, key_, value = (part.view(length, heads, -1).transpose(0, 1) for part in mixed.split(width, 1))
    scores = query @ key_.transpose(1, 2) / (width // heads) ** 0.5
    if is_causal:
        scores = scores + torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)
    attended = (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, width)
    x = x + attended @ state[f"{key}.attn.out_proj.weight"].T + state[f"{key}.attn.out_proj.bias"]
    hidden = _norm(x, state, f"{key}.ln_2") @ state[f"{key}.mlp.c_fc.weight"].T + state[f"{key}.mlp.c_fc.bias"]
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    return x + hidden @ state[f"{key}.mlp.c_proj.weight"].T + state[f"{key}.mlp.c_proj.bias"]


def text_feature(tokens: list[int], state: State, heads: int) -> Tensor:
    """Feature (D,) at the text's end, which is the largest token."""
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][: len(tokens)]
    for number in range(_depth(state, "transformer")):
        x = _block(x, state, f"transformer.resblocks.{number}", heads, is_causal=True)
    return _norm(x, state, "ln_final")[tokens.index(max(tokens))] @ state["text_projection"]


def image_feature(pixels: Tensor, state: State, heads: int) -> Tensor:
    """Feature (D,) of one image (3, H, W) of normalised pixels, by a ViT."""
    patches = state["visual.conv1.weight"]
    size = patches.shape[-1]
    grid = pixels.unfold(1, size, size).unfold(2, size, size)  # 3, rows, columns, size, size
    x = grid.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1) @ patches.flatten(1).T
    x = torch.cat([state["visual.class_embedding"][None], x]) + state["visual.positional_embedding"]
    x = _norm(x, state, "visual.ln_pre")
    for number in range(_depth(state, "visual.transformer")):
        x = _block(x, state, f"visual.transformer.resblocks.{number}", heads, is_causal=False)
    return _norm(x[0], state, "visual.ln_post") @ state["visual.proj"]


def _depth(state: State, key: str) -> int:
    return len({name.split(".resblocks.")[1].split(".")[0] for name in state if name.startswith(f"{key}.resblocks.")})


def similarities(images: np.ndarray, texts: Tensor, state: State, heads: int) -> Tensor:
    """100 cos of images (N, H, W, 3) uint8 with the classes' features (C, D) -> (N, C), image by image."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # in float32, as are pixels upstream
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    texts = texts / texts.norm(dim=1, keepdim=True)
    rows = []
    for image in images:
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        feature = image_feature((pixels.to(texts.dtype) - mean) / std, state, heads)
        rows.append(100.0 * feature / feature.norm() @ texts.T)
    return torch.stack(rows)


def stamp(images: np.ndarray, patch: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """x tm + t, image by image; patch and mask (H, W, 3) integers."""
    return np.stack([(image * mask + patch).astype(np.uint8) for image in images])
