"""What is left of a backdoor: integer counts over whole test sets, whatever the number of ranks."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.attacks.attack import AttackConfig, backdoor_labels
from dist_defend.data.loader import Loader
from dist_defend.engine.dist import Ranks
from dist_defend.models.classifier import Classifier

log = logging.getLogger(__name__)
_AT_ONCE = 128  # images of a pass on a CPU: small maps stay in its cache, and 512 need more memory than an update
ORACLE = " (oracle)"  # ends the kind of a row of what was chosen by its rates on the test set


@dataclass(frozen=True)
class Count:
    """``correct`` of ``n``."""

    correct: int
    n: int

    @property
    def percent(self) -> float:
        """100 * correct / n; nan for an empty set."""
        return 100.0 * self.correct / self.n if self.n else float("nan")

    def plain(self) -> dict[str, int]:
        """For result.json."""
        return {"correct": self.correct, "n": self.n}


def backdoor_counts(clean: Tensor, triggered: Tensor, labels: Tensor, target: int | Tensor) -> dict[str, Count]:
    """Count from predicted classes (N,) int64 on the clean and on the triggered images of a test set with these labels.

    target: the attacker's class, or one for each image (N,), as an all-to-all attack has it.
    acc: clean images classified as their label (the papers' CA or BA); the others see attack_counts.
    """
    return {"acc": agreeing(clean, labels), **attack_counts(triggered, labels, target)}


def agreeing(classes: Tensor, labels: Tensor) -> Count:
    """How many of the predicted classes (N,) are the labels (N,)."""
    return Count(int((classes == labels).sum()), len(labels))


def attack_counts(triggered: Tensor, labels: Tensor, target: int | Tensor) -> dict[str, Count]:
    """Count from predicted classes (N,) int64 on triggered images with these true labels; target as backdoor_counts'.

    asr: images whose label is not the target, classified as the target.
    asr_all: all images classified as the target (BadEncoder's, MIMIC's and I-BAU's published convention; a harmless
    model scores the target's share of the data here).
    ra: images whose label is not the target, classified as their label.
    """
    others = labels != target
    is_target = triggered == target

    def count(hits: Tensor, among: Tensor) -> Count:
        return Count(int((hits & among).sum()), int(among.sum()))

    return {
        "asr": count(is_target, others),
        "asr_all": count(is_target, torch.ones_like(others)),
        "ra": count(triggered == labels, others),
    }


def only_accuracy(acc: Count) -> dict[str, Count]:
    """The counts of a test without triggered images: all but ``acc`` are empty."""
    return {"acc": acc, **dict.fromkeys(("asr", "asr_all", "ra"), Count(0, 0))}


def percents(counts: dict[str, Count]) -> dict[str, float]:
    """Of the counts that are not empty, for the log."""
    return {name: count.percent for name, count in counts.items() if count.n}


def told(counts: Mapping[str, Count], before: Mapping[str, float] | None = None) -> str:
    """``acc 95.00 -> 93.10 % of 10000, asr 1.20 % of 9000``: ACC and, where it was measured, ASR.

    before: in percent, by name, of what is known.
    """
    parts = []
    for name in ("acc", "asr"):
        if count := counts[name].n:
            first = f"{before[name]:.2f} -> " if before and name in before else ""
            parts.append(f"{name} {first}{counts[name].percent:.2f} % of {count}")
    return ", ".join(parts)


def warn_near_chance(kind: str, task: str, acc: Count, num_classes: int) -> None:
    """Say so where a model of this kind classifies clean images hardly better than a guess."""
    chance = 100 / num_classes
    if acc.percent < 1.5 * chance:
        told = "%s on %s: accuracy %.1f %% is near chance (%.1f %%); this run is broken"
        log.warning(told, kind, task, acc.percent, chance)


def per_class_accuracy(classes: Tensor, labels: Tensor, num_classes: int) -> list[Count]:
    """For each class, how many of its images (labels (N,) int64) are classified (classes (N,)) as it."""
    among = torch.bincount(labels, minlength=num_classes)
    hits = torch.bincount(labels[classes == labels], minlength=num_classes)
    return [Count(*pair) for pair in zip(hits.tolist(), among.tolist(), strict=True)]


def der(before: dict[str, Count], after: dict[str, Count]) -> float:
    """Defence effectiveness rating in [0, 1]: (max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2, rates in [0, 1].

    The formula that SCLBD/BackdoorBench documents; its code adds the second term. nan where a set was empty.
    """
    return rating(_drop(before, after, "asr"), _drop(before, after, "acc"))


def rir(before: dict[str, Count], after: dict[str, Count]) -> float:
    """Robustness improvement rating in [0, 1]: (max(0, rise of RA) - max(0, drop of ACC) + 1) / 2, rates in [0, 1].

    As documented by SCLBD/BackdoorBench; nan where a set was empty.
    """
    return rating(-_drop(before, after, "ra"), _drop(before, after, "acc"))


def _drop(before: dict[str, Count], after: dict[str, Count], key: str) -> float:
    return (before[key].percent - after[key].percent) / 100


def rating(gain: float, loss: float) -> float:
    """(max(0, gain) - max(0, loss) + 1) / 2 of rates in [0, 1]: what der and rir share. nan if either is."""
    if math.isnan(gain) or math.isnan(loss):
        return math.nan
    return (max(0.0, gain) - max(0.0, loss) + 1) / 2


def predict(model: nn.Module, loader: Loader, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Most likely classes (N,), labels (N,) and rows (N,), int64, of a data set in the loader's order, on every rank.

    model: images (B, 3, H, W) -> logits; put in eval mode and back. The ranks share the images; each counts once.
    """

    def classes(images: Tensor) -> Tensor:
        with ranks.accelerator.autocast():
            found = [model(some).argmax(1) for some in images.split(_AT_ONCE if images.is_cpu else len(images) or 1)]
        return found[0] if len(found) == 1 else torch.cat(found)

    return over_images(model, loader, ranks, classes)


def evaluate_classifier(
    model: Classifier, clean: Loader, triggered: Loader | None, ranks: Ranks, poison: AttackConfig | None
) -> dict[str, Count]:
    """backdoor_counts for a test set and its triggered twin (the same rows, original labels), if there is one."""
    on_clean, labels, _ = predict(model, clean, ranks)
    if triggered is None or poison is None:
        return only_accuracy(agreeing(on_clean, labels))
    wanted = backdoor_labels(labels, poison, model.num_classes)
    return backdoor_counts(on_clean, predict(model, triggered, ranks)[0], labels, wanted)


def unit_features(encoder: nn.Module, images: Tensor, ranks: Ranks) -> Tensor:
    """L2-normalised features (B, D) of images (B, 3, H, W), in the run's dtype whatever autocast makes of the pass."""
    with ranks.accelerator.autocast():
        features = encoder(images.to(ranks.dtype))
    return functional.normalize(features.to(ranks.dtype), dim=1)


def extract_features(encoder: nn.Module, loader: Loader, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """L2-normalised features (N, D), labels (N,) and rows (N,) of a data set in the loader's order, on every rank.

    The ranks share the images. The encoder is put in eval mode and back. Uneven shares are gathered by length, so each
    image counts once.
    """
    return over_images(encoder, loader, ranks, lambda images: unit_features(encoder, images, ranks))


@torch.no_grad()
def over_images(
    model: nn.Module, loader: Loader, ranks: Ranks, make: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``make`` gives for images (B, 3, H, W), as (N, ...), with labels (N,) and rows (N,) as in ``predict``."""
    was_training = model.training
    model.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in loader.epoch(0):
        made = make(batch.images.to(ranks.device, ranks.dtype))
        parts.append((made, batch.labels.to(ranks.device), batch.index.to(ranks.device)))
    model.train(was_training)
    return gather_in_order(parts, loader.num_samples, loader.batch_size, ranks)


def gather_in_order(
    parts: list[tuple[Tensor, Tensor, Tensor]], total: int, batch_size: int, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the ranks' (features or classes, labels, rows) of the global batches back into one rank's order."""
    ordered: list[tuple[Tensor, ...]] = [*parts]
    if ranks.world_size > 1:
        cpu_parts = [tuple(t.cpu() for t in part) for part in parts]
        gathered: list[list[tuple[Tensor, ...]]] = [[] for _ in range(ranks.world_size)]
        torch.distributed.all_gather_object(gathered, cpu_parts)
        # A rank skips a batch of which it has no share; only the last batch can be that small.
        batches = range(-(-total // batch_size))
        ordered = [part for batch in batches for own in gathered for part in own[batch : batch + 1]]
    features, labels, rows = (torch.cat(column).to(ranks.device) for column in zip(*ordered, strict=True))
    return features, labels, rows


@torch.no_grad()
def knn_predict(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, k: int = 200, temperature: float = 0.5
) -> Tensor:
    """Classes of each query, most likely first: (Q, num_classes) int64.

    queries (Q, D) and bank (N, D) are L2-normalised. The k most similar rows of the bank vote for their class with
    weight exp(similarity / temperature) (Wu et al. 2018, eq. 9; k 200 and 0.5 as in BadEncoder). All weights of a query
    are divided by its largest one, so that no temperature makes them overflow.
    """
    similarity, rows = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    votes = torch.zeros(len(queries), num_classes, dtype=similarity.dtype, device=queries.device)
    votes.scatter_add_(1, bank_labels[rows], ((similarity - similarity[:, :1]) / temperature).exp())
    return votes.argsort(dim=1, descending=True)


def knn_classes(queries: Tensor, bank: Tensor, bank_labels: Tensor, k: int, temperature: float) -> Tensor:
    """The class (Q,) int64 that knn_predict puts first; queries in blocks that fit in memory."""
    num_classes = int(bank_labels.max()) + 1
    blocks = queries.split(512)
    return torch.cat([knn_predict(block, bank, bank_labels, num_classes, k, temperature)[:, 0] for block in blocks])


def knn_count(queries: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, k: int, temperature: float) -> Count:
    """How many queries the k nearest neighbours classify as their label."""
    hits = knn_classes(queries, bank, bank_labels, k, temperature) == labels
    return Count(int(hits.sum()), len(labels))
