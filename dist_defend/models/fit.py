"""Whether a model takes images of a size: found out before a run starts, by the network itself."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_defend.errors import UserError
from dist_defend.models.classifier import Classifier
from dist_defend.models.encoder import SimCLR

log = logging.getLogger(__name__)


def check_image_size(
    model: SimCLR | Classifier, folder: str, shape: Sequence[int] | None, path: str, remedy: str | None = None
) -> None:
    """UserError, in one line, for images (H, W, ...) that the model of that folder cannot take.

    A model that takes any size is told of in the log where its card has another one than the images. path: the data
    set's. shape: that of the images as they reach the model, augmented; None, for images that differ in size, is not
    checked. remedy: what would bring them to the model's size; otherwise `resize` in the data section.
    """
    if shape is None:
        return
    height, width = shape[:2]
    size = model.image_size
    is_as_told = (height, width) == (size, size)
    remedy = remedy or f"say `resize: {size}` beside its `path`"
    named = f"{folder} ({model.arch})"
    problem = problem_with(model, height, width)
    if problem is not None and is_as_told:
        raise UserError(
            f"{named} does not take images of {size} px, although its card says so ({problem}): import it again with "
            "the --image-size that it was trained with"
        )
    if problem is not None:
        raise UserError(
            f"{named} takes images of {size} px, but those of {path} have {height}x{width} px when they reach it "
            f"({problem}): {remedy}"
        )
    if not is_as_told:
        log.warning(
            "%s was made for images of %d px, but those of %s have %dx%d px when they reach it: its features may mean "
            "less there; to bring them to its size %s",
            *(named, size, path, height, width, remedy),
        )


def check_views(model: SimCLR, folder: str, shape: Sequence[int] | None, size: int | None, path: str, key: str) -> None:
    """check_image_size for views of ``size`` px, which ``key`` says; for the images themselves where that is None."""
    if size is None:
        check_image_size(model, folder, shape, path)
    else:
        check_image_size(model, folder, (size, size), path, f"set '{key}' to {model.image_size}")


@torch.no_grad()
def problem_with(model: SimCLR | Classifier, height: int, width: int) -> str | None:
    """Why the model cannot take a black image of that size: the network's error, or logits of another shape; else None.

    Modes stay as they are.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameter = next(model.parameters())
    network = model.f if isinstance(model, SimCLR) else model
    try:
        made = network.eval()(torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any network's own
        return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    finally:
        for module, training in modes:
            module.training = training
    if isinstance(model, SimCLR) or (isinstance(made, Tensor) and made.shape == (1, model.num_classes)):
        return None
    told = f"of shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"in a {type(made).__name__}"
    return f"one image gives something {told}"
