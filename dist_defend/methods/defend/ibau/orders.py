"""Inner passes in several orders of the images: which perturbation is used, and whether the orders agree."""

from typing import Any

import torch
from torch import Tensor

from dist_defend.ops.collectives import all_reduce_sum, world_size

APART = 2.0  # largest over smallest norm of a round, above which the result depends on the order


class Orders:
    """The norms of delta (rounds, orders) after each inner pass, and the delta of largest norm in the present round.

    All on the device, so that the host need not wait before the run's end. delta (1, 3, H, W) is the same on all ranks.
    """

    def __init__(self, delta: Tensor, rounds: int, count: int) -> None:
        """count: inner passes of a round."""
        self.count = count
        self.norms = delta.detach().new_zeros(rounds, count)
        self.largest = torch.zeros_like(delta.detach())

    @torch.no_grad()
    def note(self, delta: Tensor, round_: int, number: int) -> dict[str, Tensor]:
        """Record delta after pass ``number`` of a round. After the last pass set it to the delta of the largest norm.

        Returns the scalars of the round after the last pass, else none. Of equal norms the first one is taken.
        """
        norms = self.norms[round_]
        norms[number] = all_reduce_sum(delta.norm()) / world_size()  # one number, so that all ranks choose alike
        is_larger = norms[number] > (norms[:number].max() if number else -1)
        self.largest.copy_(torch.where(is_larger, delta, self.largest))
        if number < self.count - 1:
            return {}
        delta.copy_(self.largest)
        return {"delta_norm": norms.max(), "delta_norm_min": norms.min(), "delta_norm_max": norms.max()}

    def disagreement(self) -> str | None:
        """One line on the rounds whose norms differ by over a factor APART; None for none. Waits for the device."""
        found = [(number, max(norms), min(norms)) for number, norms in enumerate(self.norms.tolist(), 1)]
        apart = [(number, most, least) for number, most, least in found if most > APART * least]
        if not apart:
            return None
        told = ", ".join(f"{most:.4g} against {least:.4g} in round {number}" for number, most, least in apart)
        return (
            f"what I-BAU's inner pass finds depends on the order of the images: of {self.count} orders the largest "
            f"norm of delta was more than {APART:g} times the smallest ({told}); the largest was taken, and a run "
            "with one order would have been luck"
        )

    def state_dict(self) -> dict[str, Any]:
        """What the rest of a round, and the end of the run, depend on."""
        return {"norms": self.norms, "largest": self.largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms.copy_(state["norms"])
        self.largest.copy_(state["largest"])
