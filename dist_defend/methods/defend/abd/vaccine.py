"""The shuffling vaccine (Hong et al. 2023, section 4.1): shuffled copies of the teacher find shortcuts.

With the input channels of its last convolutions shuffled, the teacher forgets what it has to combine many channels for,
but keeps decisions that few channels carry, such as a trigger's. Synthetic images on which teacher and shuffled copies
agree are suspects: the suppression loss makes the two disagree there.
"""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_defend.data.order import rank_slice
from dist_defend.methods.defend.abd.options import VaccineConfig
from dist_defend.models.wide_resnet import WideResNet
from dist_defend.ops.collectives import all_gather_rows, all_reduce_sum, rank, world_size
from dist_defend.ops.losses import divergence_rows
from dist_defend.ops.streams import Stream, draws

log = logging.getLogger(__name__)

MOST_SCORINGS = 8  # shuffles that are tried
LEAST_TAIL_RATIO = 0.02  # a vaccine is accepted above it
_FLOOR = 1e-12  # lower bound of a divergence before its logarithm: 0 would make mean and deviation infinite


class ShuffledEnsemble:
    """Copies of a frozen network in eval mode, each with permuted input channels in its last convolutions.

    Permutations are drawn from (seed, number of the shuffle, member, layer), so every rank has the same. The copies
    of a WideResNet share the teacher's pass up to the first group that holds a shuffled convolution.
    """

    def __init__(self, teacher: nn.Module, config: VaccineConfig, seed: int) -> None:
        """teacher: normalised images (B, 3, H, W) -> logits (B, C); its parameters need no gradient."""
        self.teacher, self.config, self.seed, self.shuffles = teacher, config, seed, 0
        self.members = [copy.deepcopy(teacher).eval().requires_grad_(False) for _ in range(config.members)]
        convolutions = [name for name, value in teacher.state_dict().items() if value.ndim == 4]
        self.shuffled = convolutions[max(0, len(convolutions) - config.layers) :]
        self.first_group = _first_group(teacher, self.shuffled)
        self.shuffle()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits and the mean of the members' logits, (B, C) each, differentiable in images."""
        if self.first_group is None:
            logits, features = self.teacher(images), images
        else:
            assert isinstance(self.teacher, WideResNet)
            maps, logits = self.teacher.layers(images)
            features = maps[self.first_group - 1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.through_members):
            return logits, torch.stack([self._tail(member, features) for member in self.members]).mean(0)

    def _tail(self, member: nn.Module, features: Tensor) -> Tensor:
        if self.first_group is None:
            logits: Tensor = member(features)
            return logits
        assert isinstance(member, WideResNet)
        return member.layers_from(features, self.first_group)[1]

    @torch.no_grad()
    def shuffle(self) -> None:
        """Permute the input channels (axis 1) of these weights, on top of earlier shuffles."""
        for number, member in enumerate(self.members):
            weights = member.state_dict()
            for layer, name in enumerate(self.shuffled):
                order = self.permutation(number, layer, weights[name].shape[1])
                weights[name].copy_(weights[name][:, order.to(weights[name].device)])
        self.shuffles += 1

    def permutation(self, member: int, layer: int, channels: int) -> Tensor:
        """The next order of a layer's input channels, (channels,) int64."""
        order = draws(self.seed, Stream.SHUFFLES, self.shuffles, member, layer).permutation(channels)
        return torch.from_numpy(order)

    def restore(self, shuffles: int) -> None:
        """Repeat the first ``shuffles`` shuffles, from the teacher's weights."""
        for member in self.members:
            member.load_state_dict(self.teacher.state_dict())
        self.shuffles = 0
        while self.shuffles < shuffles:
            self.shuffle()


def _first_group(teacher: nn.Module, shuffled: Sequence[str]) -> int | None:
    """The first group of a WideResNet with a shuffled convolution, if a group comes before it."""
    if not isinstance(teacher, WideResNet) or not shuffled:
        return None
    names = ("conv1", "block1", "block2", "block3")
    first = min(names.index(name.partition(".")[0]) for name in shuffled) - 1
    return first if first >= 1 else None


def agreement(teacher: Tensor, shuffled: Tensor) -> Tensor:
    """Where both have the same most likely class: logits (B, C) each -> (B,) bool."""
    return teacher.argmax(1) == shuffled.argmax(1)


def mean_divergence(teacher: Tensor, shuffled: Tensor) -> Tensor:
    """KL(teacher || shuffled copies) / C of each image: logits (B, C) each -> (B,)."""
    return divergence_rows(shuffled, teacher) / teacher.shape[1]


def suppression(teacher: Tensor, shuffled: Tensor) -> Tensor:
    """This rank's share of R: the mean divergence over all images of all ranks on which both agree, 0 without any.

    A loss has the term -weight R, which makes the networks disagree there. logits (B, C) each -> scalar.
    """
    agree = agreement(teacher, shuffled).to(teacher.dtype)
    return (agree * mean_divergence(teacher, shuffled)).sum() / all_reduce_sum(agree.sum()).clamp(min=1)


def tail_ratio(divergences: Tensor, weights: Tensor) -> Tensor:
    """Weighted share of images whose log10 divergence is over 3 standard deviations below the mean, over all ranks.

    divergences and weights: (N,) of this rank. A vaccine that tells shortcuts apart has a heavy lower tail.
    """
    logs, weights = divergences.double().clamp(min=_FLOOR).log10(), weights.double()

    def mean(values: Tensor) -> Tensor:
        total, count = all_reduce_sum(torch.stack([(weights * values).sum(), weights.sum()])).unbind()
        return total / count

    centre = mean(logs)
    deviation = mean((logs - centre).square()).sqrt()
    return mean((logs < centre - 3 * deviation).double())


class Vaccine:
    """An ensemble with its weight in the loss, and its selection.

    Without selection the first ensemble is used from the start. With selection none is used before select(). It scores
    the ensemble on the images given to keep(), shuffles again while its tail ratio is too low, 8 scorings at most.
    """

    def __init__(self, teacher: nn.Module, config: VaccineConfig, seed: int) -> None:
        self.config, self.ensemble = config, ShuffledEnsemble(teacher, config, seed)
        self.decision = "selecting" if config.selection_batches else "first"
        self.scores: list[float] = []
        self._kept: list[tuple[Tensor, float]] = []

    @property
    def is_used(self) -> bool:
        """Whether the loss has the suppression term now."""
        return self.decision in ("first", "accepted")

    @property
    def is_selecting(self) -> bool:
        """Whether select() is still to come."""
        return self.decision == "selecting"

    def keep(self, images: Tensor, weight: float = 1.0) -> None:
        """Remember this rank's share of a batch, normalised images (b, 3, H, W), for select(), ``weight`` times."""
        self._kept.append((images.detach().clone(), weight))

    @torch.no_grad()
    def select(self) -> None:
        """Score, shuffle, decide. Waits for the device; the same on every rank. Forgets the images."""
        while self.decision == "selecting":
            divergences = [mean_divergence(*self.ensemble(images)) for images, _ in self._kept]
            weights = [torch.full_like(d, weight) for d, (_, weight) in zip(divergences, self._kept, strict=True)]
            self.scores.append(tail_ratio(torch.cat(divergences), torch.cat(weights)).item())
            if self.scores[-1] > LEAST_TAIL_RATIO:
                self.decision = "accepted"
            elif len(self.scores) == MOST_SCORINGS:
                self.decision = "rejected"
            else:
                self.ensemble.shuffle()
        self._kept = []
        told = ", ".join(f"{score:.4f}" for score in self.scores)
        log.info("vaccine %s: tail ratios %s (more than %g is accepted)", self.decision, told, LEAST_TAIL_RATIO)

    def outcome(self) -> dict[str, Any]:
        """Decision and tail ratios, for result.json."""
        return {"decision": self.decision, "tail_ratios": self.scores}

    def state_dict(self) -> dict[str, Any]:
        """What a resume on any number of ranks needs; a collective call."""
        return {
            "shuffles": self.ensemble.shuffles,
            "decision": self.decision,
            "scores": list(self.scores),
            "kept": [(all_gather_rows(images), weight) for images, weight in self._kept],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        self.ensemble.restore(state["shuffles"])
        self.decision, self.scores = state["decision"], list(state["scores"])
        self._kept = [(images[rank_slice(len(images), rank(), world_size())], w) for images, w in state["kept"]]
