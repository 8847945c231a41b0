"""How well a vaccine separates triggered from clean images. An oracle's number, since it needs the trigger."""

from typing import Any

import torch
from torch import Tensor

from dist_defend.counts import gather_in_order
from dist_defend.data.loader import Loader
from dist_defend.engine.dist import Ranks
from dist_defend.methods.defend.abd.vaccine import ShuffledEnsemble, mean_divergence
from dist_defend.models.classifier import Classifier


def diagnose(
    ensemble: ShuffledEnsemble, teacher: Classifier, clean: Loader, triggered: Loader, ranks: Ranks
) -> dict[str, Any]:
    """Mean divergence of the shuffled copies on clean and on triggered images; AUC of a low one meaning triggered.

    teacher: the classifier whose network the ensemble was made from.
    """
    on_clean, on_triggered = (_divergences(ensemble, teacher, loader, ranks) for loader in (clean, triggered))
    return {
        "divergence_clean": on_clean.mean().item(),
        "divergence_triggered": on_triggered.mean().item(),
        "auc": auc(on_clean, on_triggered),
    }


def auc(high: Tensor, low: Tensor) -> float:
    """Probability that a draw of ``high`` (N,) exceeds one of ``low`` (M,); ties count half."""
    order = low.sort().values
    below, up_to = (torch.searchsorted(order, high, right=right) for right in (False, True))
    return ((below + up_to).double() / (2 * len(low))).mean().item()


@torch.no_grad()
def _divergences(ensemble: ShuffledEnsemble, teacher: Classifier, loader: Loader, ranks: Ranks) -> Tensor:
    parts = []
    for batch in loader.epoch(0):
        images = teacher.normalize(batch.images.to(ranks.device, ranks.dtype))
        divergences = mean_divergence(*ensemble(images))
        parts.append((divergences, batch.labels.to(ranks.device), batch.index.to(ranks.device)))
    return gather_in_order(parts, loader.num_samples, loader.batch_size, ranks)[0]
