"""The choice of a tuning defence's epoch by clean images that it does not train on."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dist_defend.counts import Count
from dist_defend.errors import UserError
from dist_defend.models.classifier import Classifier
from dist_defend.ops.streams import Stream, draws


def split_held_out(rows: np.ndarray, held_out: float, seed: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows (M,) -> those to train on and those that are held out, at random, each ascending.

    UserError if either is empty.
    """
    count = round(len(rows) * held_out)
    if not 0 < count < len(rows):
        raise UserError(
            f"key '{method}.held_out' is {held_out}: of {len(rows)} images {count} would be held out and "
            f"{len(rows) - count} trained on; choose another share, or give more images"
        )
    is_held = np.zeros(len(rows), bool)
    is_held[draws(seed, Stream.HELD_OUT).permutation(len(rows))[:count]] = True
    return rows[~is_held], rows[is_held]


class EpochChoice:
    """Keeps the weights of the last epoch that costs at most max_drop of the suspect's accuracy on held-out images.

    max_drop is relative. Where every epoch costs more, the most accurate one is kept, the last among equals. The attack
    is not looked at.
    """

    def __init__(
        self,
        model: Classifier,
        suspect: Callable[[], Classifier],
        count: Callable[[Classifier], Count],
        max_drop: float,
    ) -> None:
        """count: how many held-out images a model classifies as their label, the same on every rank."""
        self.model, self.suspect, self.count, self.max_drop = model, suspect, count, max_drop
        self.kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.before = self.right = -1  # images; -1: not counted yet
        self.epoch, self.is_within = 0, False

    def look(self, epoch: int) -> dict[str, float]:
        """Judge the model after an epoch, counted from 1 -> scalars to log."""
        if self.before < 0:
            self.before = self.count(self.suspect()).correct
        found = self.count(self.model)
        is_within = found.correct >= self.before * (1 - self.max_drop)
        if is_within or (not self.is_within and found.correct >= self.right):
            self.epoch, self.right, self.is_within = epoch, found.correct, is_within
            for name, value in self.model.state_dict().items():
                self.kept[name].copy_(value)
        return {"acc_held_out": found.percent}

    def deliver(self) -> None:
        """Give the model the weights of the chosen epoch."""
        self.model.load_state_dict(self.kept)

    def metrics(self) -> dict[str, int]:
        return {"chosen_epoch": self.epoch, "held_out_right": self.right, "held_out_right_before": self.before}

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, **{name: getattr(self, name) for name in _NUMBERS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state["kept"].items():
            self.kept[name].copy_(value)
        for name in _NUMBERS:
            setattr(self, name, state[name])


_NUMBERS = ("before", "right", "epoch", "is_within")
