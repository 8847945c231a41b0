"""One iteration of contrastive model inversion as zju-vipa/CMI and illidanlab/ABD do it.

Hooks on every batch norm note the distance of its input's statistics and its means; views are made image by image; the
whole matrix of similarities is made at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.data.augment import FLIP, HEIGHT, LEFT, TOP, WIDTH
from dist_defend.models.classifier import Classifier


class NormHook:
    """Of one batch norm: the distance of its input's statistics from the running ones, and its input's means."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        self.distance, self.feature = torch.zeros(()), torch.zeros(())
        norm.register_forward_hook(self.note)

    def note(self, norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        x = inputs[0]
        channels = x.shape[1]
        mean = x.mean([0, 2, 3])
        variance = x.permute(1, 0, 2, 3).contiguous().view(channels, -1).var(1, unbiased=False)
        self.distance = torch.norm(norm.running_var - variance, 2) + torch.norm(norm.running_mean - mean, 2)
        self.feature = x.view(x.shape[0], channels, -1).mean(2)


def crop(image: Tensor, row: Tensor, pad: int | None) -> Tensor:
    """One view of an image (3, H, W): a window into black surroundings, or a part enlarged; perhaps mirrored."""
    height, width = image.shape[1:]
    top, left, h, w = (int(row[column]) for column in (TOP, LEFT, HEIGHT, WIDTH))
    if pad is not None:
        around = functional.pad(image, (pad, pad, pad, pad))
        view = around[:, top + pad : top + pad + height, left + pad : left + pad + width]
    else:
        part = image[None, :, top : top + h, left : left + w]
        view = functional.interpolate(part, (height, width), mode="bilinear", align_corners=False)[0]
    return view.flip(2) if row[FLIP] else view


def iteration(
    generator: nn.Module,
    codes: Tensor,
    head: nn.Module,
    teacher: Classifier,
    student: Classifier,
    targets: Tensor,
    views: tuple[Tensor, Tensor],
    cached: Tensor,
    weights: dict[str, float],
    temperature: float,
    pad: int,
    hooks: Sequence[NormHook],
    optimizers: Sequence[torch.optim.Optimizer],
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Scalars, images and features before the update, which is then done.

    views: parameters of the global and the local view; cached (n, 2 D); weights: bn, one_hot, adversarial, contrast.
    """
    images = generator(codes)
    whole = torch.stack([crop(image, row, pad) for image, row in zip(images, views[0], strict=True)])
    local = torch.stack([crop(image, row, None) for image, row in zip(images, views[1], strict=True)])
    t_out = teacher(whole)
    bn = torch.stack([hook.distance for hook in hooks]).sum()
    f_g = torch.cat([hook.feature for hook in hooks], dim=1)
    one_hot = functional.cross_entropy(t_out, targets)
    s_out = student(whole)
    agree = (s_out.max(1)[1] == t_out.max(1)[1]).to(s_out.dtype)
    kl = functional.kl_div(functional.log_softmax(s_out, 1), functional.softmax(t_out, 1), reduction="none").sum(1)
    adversarial = -(kl * agree).mean()
    teacher(local)
    f_l = torch.cat([hook.feature for hook in hooks], dim=1)
    d = f_l.shape[1]
    everything = torch.cat([f_l, cached[:, :d], f_g, cached[:, d:]])
    projected = functional.normalize(head(everything))
    p_l, p_g = projected[: len(projected) // 2], projected[len(projected) // 2 :]
    logits = p_l @ p_g.t().detach() / temperature
    rows = functional.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
    size = len(targets)
    contrast = rows[:size].mean() + rows[size:].mean() if len(cached) else rows.mean()
    terms = {"bn": bn, "one_hot": one_hot, "adversarial": adversarial, "contrast": contrast}
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    kept = images.detach().clone(), torch.cat([f_l, f_g], dim=1).detach().clone()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    told = {**{name: weights[name] * term for name, term in terms.items()}, "synthesis_loss": loss}
    return {name: value.item() for name, value in told.items()}, *kept
