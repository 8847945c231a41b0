"""What a classifier does inside, for people to look at: its features, the classes it predicts, and GradCAM."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.counts import over_images
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context
from dist_defend.models.classifier import Classifier

_OVERLAID = 0.5  # share of a heat map in a picture


class Opened(nn.Module):
    """Images (B, 3, H, W) -> (B, D + C): L2-normalised input of the last linear layer that is called, then the logits.

    A network without a linear layer gives its logits twice.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        self.num_classes = model.num_classes

    def forward(self, images: Tensor) -> Tensor:
        entered: list[Tensor] = []

        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            entered[:] = [given[0].detach()]

        hooks = [m.register_forward_pre_hook(keep) for m in self.model.modules() if isinstance(m, nn.Linear)]
        try:
            logits = self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        features = entered[0].flatten(1) if entered and len(entered[0]) == len(images) else logits
        return torch.cat([functional.normalize(features.float(), dim=1), logits.float()], 1)


def grad_cam(model: Classifier, images: Tensor) -> Tensor | None:
    """Heat maps (B, H, W) in [0, 1] of what speaks for the class that the model predicts; None without a convolution.

    Selvaraju et al. 2017, equations 1 and 2, of the last convolution whose output is more than one pixel: ReLU of the
    sum over its channels of mean gradient times activation, here brought to the images' size and divided by its
    maximum. images (B, 3, H, W) in [0, 1], on the model's device. The model is put in eval mode and back.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], made: Tensor) -> None:
        if made.ndim == 4 and made.shape[-1] * made.shape[-2] > 1:
            seen[:] = [made]

    was_training = model.training
    model.eval()
    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        with torch.enable_grad():
            logits = model(images.detach().requires_grad_())
            if not seen:
                return None
            (slope,) = torch.autograd.grad(logits.amax(1).sum(), seen[0])
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    heat = cam(slope, seen[0], images.shape[2:])
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)


def cam(slope: Tensor, maps: Tensor, size: Sequence[int]) -> Tensor:
    """ReLU of the sum over channels of mean slope times map, bilinear at H, W: (B, C, h, w) twice -> (B, H, W) float32.

    slope: the gradient of what is explained at the maps.
    """
    heat = (slope.mean((2, 3), keepdim=True) * maps.detach()).sum(1, keepdim=True).clamp(min=0)
    return functional.interpolate(heat.float(), tuple(size), mode="bilinear", align_corners=False)[:, 0]


def predicted(
    model: Classifier, parts: Mapping[str, tuple[PreparedDataset, np.ndarray]], context: Context, most: int
) -> dict[str, Tensor]:
    """Of the first rows of each part, clean and maybe triggered, at most so many and of both alike: on every rank.

    clean, triggered: features (M, D); clean_classes, triggered_classes: what is predicted (M,); labels,
    triggered_labels (M,). Nothing where a part has no rows.
    """
    count, ranks, opened = min(most, *(len(rows) for _, rows in parts.values())), context.ranks, Opened(model)
    found: dict[str, Tensor] = {}
    for name, (dataset, rows) in parts.items() if count else ():
        loader = context.eval_loader(dataset, rows[:count])
        both = over_images(opened, loader, ranks, opened)[0].cpu()
        found[name] = both[:, : -model.num_classes].contiguous()
        found[f"{name}_classes"] = both[:, -model.num_classes :].argmax(1)
        found["labels" if name == "clean" else f"{name}_labels"] = torch.from_numpy(dataset.labels[rows[:count]])
    return found


def heat_maps(model: Classifier, pairs: tuple[np.ndarray, np.ndarray] | None, context: Context) -> dict[str, Tensor]:
    """GradCAM over the pairs' images, clean and triggered, each (N, H, W, 3) uint8: pictures of that shape, if any."""
    found = {}
    for name, images in zip(("clean", "triggered"), pairs or (), strict=False):
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(context.ranks.device, context.ranks.dtype) / 255
        heat = grad_cam(model, pixels)
        if heat is not None:
            found[name] = torch.from_numpy(overlaid(images, heat))
    return found


def overlaid(images: np.ndarray, heat: Tensor) -> np.ndarray:
    """Images (N, H, W, 3) uint8, darkened, with heat (N, H, W) in [0, 1] in red and yellow above them; the same."""
    hot = heat.detach().cpu().double().numpy()
    colours = np.stack([np.minimum(1, 2 * hot), np.maximum(0, 2 * hot - 1), np.zeros_like(hot)], 3)
    mixed: np.ndarray = (1 - _OVERLAID) * images + 255 * _OVERLAID * colours
    return mixed.round().astype(np.uint8)


def signed_picture(values: Tensor) -> Tensor:
    """A perturbation (3, H, W) as a picture (H, W, 3) uint8: grey where it is 0, its largest value black or white."""
    own = values.detach().cpu().double()
    scaled = 0.5 + 0.5 * own / own.abs().max().clamp(min=1e-12)
    return (255 * scaled).round().byte().permute(1, 2, 0).contiguous()
