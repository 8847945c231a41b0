"""The narrow waist of every defence of a classifier: what is suspected, how it is tested, what came out.

A Trial has the suspect with its card, the attack that it is tested with and the test set; it checks that they fit,
counts before and after, and makes the rows, the metrics and the card of the result. An Examination is its testing
half: the test set, and what an attack makes of it.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_defend import inside
from dist_defend.attacks.attack import AttackConfig, attack_from, check_classes
from dist_defend.attacks.given import TriggeredImages, triggered_images
from dist_defend.bounds import OPEN_ASR, REMOVED_ASR
from dist_defend.counts import (
    Count,
    agreeing,
    attack_counts,
    der,
    extract_features,
    only_accuracy,
    per_class_accuracy,
    percents,
    predict,
    told,
)
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context
from dist_defend.errors import UserError
from dist_defend.models.artifact import ModelCard
from dist_defend.models.classifier import Classifier
from dist_defend.models.encoder import SimCLR
from dist_defend.ops.streams import Stream, draws

LOOKED_AT = 500  # images, of the look at a suspect before a defence starts
MOSTLY_WRONG = 50.0  # percent right, below which the suspect is not what it should be, or not fed as it should be
log = logging.getLogger(__name__)
_PICTURED = 8  # test images shown in the report
_SCATTERED = 500  # test features kept for the report's scatter plot


class Examination:
    """A labelled test set and what an attack makes of it; counts are those of evaluate.backdoor_counts."""

    def __init__(
        self,
        test: PreparedDataset,
        rows: np.ndarray,
        attack: AttackConfig | None,
        num_classes: int,
        context: Context,
        batch_size: int = 512,
        task: str | None = None,
    ) -> None:
        """rows (N,) of the test set count. task: its name in rows; None: the data set's.

        UserError for an attack that does not fit its images or classes.
        """
        self.test, self.rows, self.attack, self.context = test, rows, attack, context
        self.task = task or test.manifest.name
        self.scatter: dict[str, Tensor] = {}
        self.pictures: dict[str, Tensor] = {}
        self.made: TriggeredImages | None = None
        self.triggered = None
        self.clean = context.eval_loader(test, rows, batch_size)
        if attack is not None:
            check_classes(attack, num_classes)
            self.made = triggered_images(test, rows, attack, num_classes)
            if not self.made.is_stamped:
                context.digests["triggered"] = self.made.dataset.digest
            self.triggered = context.eval_loader(self.made.dataset, self.made.rows, batch_size)

    def predict(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Classes (N,), (M,) int64 of clean and triggered images in the loaders' order; the ranks share the images."""
        with self.context.clock.measuring():
            on_clean = predict(model, self.clean, self.context.ranks)[0]
            return on_clean, None if self.triggered is None else predict(model, self.triggered, self.context.ranks)[0]

    def measure(self, model: nn.Module) -> dict[str, Count]:
        """acc, asr, asr_all, ra on all images."""
        return self.counts(*self.predict(model))

    def counts(self, on_clean: Tensor, on_triggered: Tensor | None = None) -> dict[str, Count]:
        """Count from the classes (N,), (M,) int64 that were predicted on the loaders' images, in their order."""
        acc = agreeing(on_clean, self.labels.to(on_clean.device))
        if on_triggered is None or self.made is None:
            return only_accuracy(acc)
        labels, wanted = (
            torch.from_numpy(by_row[self.made.rows]).to(on_triggered.device)
            for by_row in (self.made.dataset.labels, self.made.wanted)
        )
        return {"acc": acc, **attack_counts(on_triggered, labels, wanted)}

    @property
    def labels(self) -> Tensor:
        """(N,) int64, of the clean images."""
        return torch.from_numpy(self.test.labels[self.rows])

    @property
    def target(self) -> int | None:
        """The one class that the attacker wants of all images, if it is one."""
        if self.attack is None or self.made is None or self.attack.labels == "all_to_all":
            return None
        wanted = np.unique(self.made.wanted[self.made.rows])
        return int(wanted[0]) if len(wanted) == 1 else None

    def row(self, kind: str, counts: dict[str, Count]) -> dict[str, Any]:
        """An entry of result.json's rows."""
        own = {"run": self.context.folder.name, "kind": kind, "task": self.task, "seed": self.context.seed}
        return {**own, **{name: count.plain() for name, count in counts.items()}}

    def names(self) -> dict[str, dict[str, Any]]:
        """Entries of result.json: for each task the class that the attacker wants, and all classes, by their names."""
        wanted = {}
        if self.target is not None:
            wanted[self.task] = self.test.classes[self.target]
        elif self.attack is not None:
            is_shift = self.attack.labels == "all_to_all"
            wanted[self.task] = f"its own plus {self.attack.shift}" if is_shift else "each image's own"
        return {"targets": wanted, "classes": {self.task: list(self.test.classes)}}

    def per_class(self, on_clean: Tensor) -> dict[str, dict[str, int]]:
        """Class name -> its clean images and how many were classified as it, from predict's first."""
        found = per_class_accuracy(on_clean, self.labels.to(on_clean.device), self.test.num_classes)
        return {name: count.plain() for name, count in zip(self.test.classes, found, strict=True)}

    def pairs(self, count: int = _PICTURED) -> tuple[np.ndarray, np.ndarray] | None:
        """The first images without and with the trigger, each (count, H, W, 3) uint8; None without an attack.

        Given images stand beside the nearest test image of their class, which is the one they were made of, if that is
        in the test set.
        """
        if self.made is None:
            return None
        rows = self.made.rows[:count]
        stamped = self.made.dataset.images(rows)
        if self.made.is_stamped:
            return self.test.images(rows), stamped
        labels = self.made.dataset.labels[rows]
        return np.stack([self._nearest(*pair) for pair in zip(stamped, labels, strict=True)]), stamped

    def _nearest(self, image: np.ndarray, label: int) -> np.ndarray:
        rows = self.rows[self.test.labels[self.rows] == label]
        if not len(rows):
            return np.zeros_like(image)
        candidates = self.test.images(rows)
        apart = [np.square(candidate.astype(np.float32) - image).sum() for candidate in candidates]
        nearest: np.ndarray = candidates[int(np.argmin(apart))]
        return nearest

    def features(self, kind: str, encoder: nn.Module) -> list[Tensor]:
        """L2-normalised features (N, D) of the clean and, with an attack, (M, D) of the triggered images.

        Some of them are kept for the report, as those of this kind of model (clean, backdoored, ...).
        """
        loaders = [loader for loader in (self.clean, self.triggered) if loader is not None]
        found = [extract_features(encoder, loader, self.context.ranks)[0] for loader in loaders]
        count = min(_SCATTERED, *map(len, found), len(self.labels))
        kept = {name: part.float() for name, part in zip(("clean", "triggered"), found, strict=False)}
        for name, part in {**kept, "labels": self.labels}.items():
            self.scatter[f"{kind}/{self.task}/{name}"] = part[:count].cpu()
        return found

    def look_inside(self, kind: str, model: Classifier) -> None:
        """Keep for the report what this model does with a few test images. All ranks call it; nothing is random."""
        stamped = {} if self.made is None else {"triggered": (self.made.dataset, self.made.rows)}
        with self.context.clock.measuring():
            seen = inside.predicted(model, {"clean": (self.test, self.rows), **stamped}, self.context, _SCATTERED)
            maps = inside.heat_maps(model, self.pairs(), self.context)
        self.scatter.update({f"{kind}/{self.task}/{name}": tensor for name, tensor in seen.items()})
        self.pictures.update({f"{self.task}/cam_{name}": images for name, images in maps.items()})

    def show_perturbation(self, delta: Tensor) -> None:
        """Keep for the report what a defence took for the trigger: delta (1, 3, H, W)."""
        self.pictures[f"{self.task}/perturbation"] = inside.signed_picture(delta[0])[None]

    def examples(self) -> dict[str, Tensor]:
        """Images without and with the trigger, for the report, and what else was kept; nothing without an attack."""
        pairs = self.pairs()
        if pairs is None:
            return {}
        clean, stamped = (torch.from_numpy(images).contiguous() for images in pairs)
        return {f"{self.task}/clean": clean, f"{self.task}/triggered": stamped, **self.pictures}

    def save_examples(self) -> None:
        """examples.safetensors in the run folder."""
        save_pictures([self])


def save_pictures(examinations: Sequence[Examination]) -> None:
    """What the report shows of one run: examples.safetensors and features.safetensors, each unless it is empty."""
    context = examinations[0].context
    examples = {key: value for one in examinations for key, value in one.examples().items()}
    features = {key: value for one in examinations for key, value in one.scatter.items()}
    for name, tensors in (("examples", examples), ("features", features)):
        if tensors and context.ranks.is_main:
            save_file(tensors, context.folder / f"{name}.safetensors")


def encoders_to_measure(
    folders: dict[str, str], configured: AttackConfig | None, context: Context
) -> tuple[dict[str, SimCLR], AttackConfig | None]:
    """The encoders' models of these kinds, on the ranks' device, and what to measure: the configured attack, else the
    one that the cards name, if any. Classes do not matter here.

    Tells of a card that names another attack than the configured one. UserError if none is configured and cards differ.
    """
    models, attack = {}, configured
    for kind, folder in folders.items():
        model, card, _ = context.load_encoder(folder)
        models[kind] = model.to(context.ranks.device, context.ranks.dtype)
        if card.attack:
            named = attack_from(card.attack)
            attack = attack or named
            if not _is_same(attack, replace(named, target_class=attack.target_class)):
                told = f"{folder} names another attack in its card than is to be measured"
                if configured is None:
                    raise UserError(f"{told}, which is another encoder's: say which one as 'attack'")
                context.tell(f"{told}: say 'attack: null' to measure the named one")
    return models, attack


class Trial:
    """A suspect in a model folder, on the ranks' device, and the data that it is defended and tested with."""

    def __init__(self, folder: str, context: Context) -> None:
        """UserError for a folder without a classifier."""
        self.folder, self.context, ranks = folder, context, context.ranks
        self.model, self.card, self.sha256 = context.load_classifier(folder)
        self.model.to(ranks.device, ranks.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._named: list[tuple[tuple[str, ...], str]] = [(self.card.classes, folder)] if self.card.classes else []
        self.suspect: dict[str, Any] = {"folder": folder, "sha256": self.sha256, "guessed": list(self.card.guessed)}
        self.before: dict[str, Count] = {}
        self.latest: dict[str, Count] = {}

    def dataset(self, role: str, config: DatasetConfig, is_labelled: bool = True) -> tuple[PreparedDataset, np.ndarray]:
        """As the context's, checked: images of the suspect's size and, with labels, its classes in its order."""
        dataset, rows = self.context.dataset(role, config, is_labelled)
        size, classes = self.model.image_size, self.model.num_classes
        if dataset.image_shape != (size, size, 3):
            raise UserError(
                f"{config.path} has images of {dataset.image_shape}, but {self.folder} wants {size} px: prepare it "
                f"with --image-size {size}, or say 'resize: {size}' beside its path"
            )
        if is_labelled and dataset.num_classes != classes:
            raise UserError(
                f"{config.path} has {dataset.num_classes} classes, but {self.folder} has {classes}: prepare the data "
                "set that it was trained on"
            )
        if is_labelled:
            for names, path in self._named:
                self.context.check_classes(names, path, dataset.classes, config.path)
            self._named.append((tuple(dataset.classes), config.path))
        return dataset, rows

    def test_on(
        self,
        config: DatasetConfig,
        attack: AttackConfig | None,
        without: tuple[PreparedDataset, np.ndarray] | None = None,
        batch_size: int = 512,
    ) -> Examination:
        """Open the test set. attack: the configured one; None takes the one that the card names, if any.

        without: the defender's images, which are left out of the test where both are rows of one data set.
        """
        test, rows = self.dataset("test", config)
        if without is not None and without[0].digest == test.digest:
            rows = np.setdiff1d(rows, without[1])
            if not len(rows):
                raise UserError(
                    f"{config.path}: all test images are the defender's; leave some of the data set to test"
                )
        if attack is not None:
            section = f"{self.context.method}." if self.context.method else ""
            check_classes(attack, self.model.num_classes, f"{section}attack.")
        elif self.card.attack:
            attack = attack_from(self.card.attack)
        with self.context.clock.measuring():
            self.examination = Examination(test, rows, attack, self.model.num_classes, self.context, batch_size)
        self.context.at_start.append(self.measure_before)
        return self.examination

    def measure_before(self) -> None:
        """Count what the suspect does, before anything is changed, and say so. No random number is drawn."""
        self.before = self.examination.measure(self.model)
        if self.context.ranks.is_main:
            log.info("%s on %s, before: %s", self.folder, self.examination.task, told(self.before))

    def look(self, dataset: PreparedDataset | None = None, rows: np.ndarray | None = None) -> None:
        """Classify a few clean images before anything starts, and say so where the suspect gets most of them wrong.

        dataset, rows: the defender's labelled images; None: the test set's, for a defence without data.
        """
        whose = "test" if dataset is None else "defence"
        if dataset is None or rows is None:
            dataset, rows = self.examination.test, self.examination.rows
        if not self.context.has_content:
            return
        if len(rows) > LOOKED_AT:
            draw = draws(self.context.seed, Stream.LOOKED_AT)
            rows = np.sort(draw.choice(rows, LOOKED_AT, replace=False))
        with self.context.clock.measuring():
            classes, labels, _ = predict(self.model, self.context.eval_loader(dataset, rows), self.context.ranks)
        acc = agreeing(classes, labels)
        self.suspect[f"acc_{whose}"] = acc.plain()
        self.judge(acc, dataset.path)

    def judge(self, acc: Count, data: Path) -> None:
        """Tell, where so few clean images of the data set are classified as their label, that something is amiss."""
        if acc.percent < MOSTLY_WRONG:
            self.context.tell(mostly_wrong(self.folder, self.card, acc, data))

    def evaluate(self, model: Classifier) -> dict[str, float]:
        """The model's counts in percent, for the log; remembered as the latest."""
        self.latest = self.examination.measure(model)
        return percents(self.latest)

    def original(self) -> Classifier:
        """The suspect as it was, read again."""
        model = self.context.load_classifier(self.folder)[0]
        return model.to(self.context.ranks.device, self.context.ranks.dtype)

    def result(
        self,
        model: Classifier,
        after: dict[str, Count] | None = None,
        before: dict[str, Count] | None = None,
        *,
        variant: str = "",
        chosen_by: str | None = None,
        metrics: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Save what the run's method made of the suspect; the entries of result.json.

        after, before: the counts, where they have been made already. variant: what the method's name in rows and card
        ends in. chosen_by: what the outcome was chosen by.
        """
        context, attack = self.context, self.examination.attack
        kind = context.method + variant
        before = before or self.before or self.examination.measure(self.original())
        after = after or self.latest or self.examination.measure(model)
        card = replace(
            defended_card(self.card, kind, attack, before, after),
            arch=model.arch,
            parent_sha256=self.sha256,
            chosen_by=chosen_by,
            provenance={"method": kind, "data": context.digests, **(provenance or {}), "seed": context.seed},
        )
        self.examination.look_inside(kind, model)
        self.examination.save_examples()
        return {
            "model_sha256": context.save_model(model, card),
            "rows": [self.examination.row(kind, after)],
            **self.examination.names(),
            "suspect": self.suspect,
            "metrics": {**rates(before, after), **(metrics or {})},
        }


def rates(before: dict[str, Count], after: dict[str, Count]) -> dict[str, float]:
    """acc_before and, where an attack was measured, asr_before and der: what the report reads of a defence."""
    found = {"acc_before": before["acc"].percent}
    if before["asr"].n:
        found |= {"asr_before": before["asr"].percent, "der": der(before, after)}
    return found


def defended_card(
    card: ModelCard, method: str, attack: AttackConfig | None, before: dict[str, Count], after: dict[str, Count]
) -> ModelCard:
    """The suspect's card after a defence. It stays backdoored until something measured says otherwise.

    With ASR ``after`` of OPEN_ASR or more it is backdoored. With REMOVED_ASR or less it is not, if the attack measured
    is the one that the card names, or, where the card names none, opened the suspect before. Else it is what it was.
    The attack stays, so that later runs can measure it; a card without one gets the attack that opened the model.
    """
    is_backdoored, named, asr = card.backdoored, card.attack, after["asr"]
    if attack is not None and asr.n:
        did_open = before["asr"].percent >= OPEN_ASR
        if asr.percent >= OPEN_ASR:
            is_backdoored = True
        elif asr.percent <= REMOVED_ASR and (_is_same(attack, attack_from(named)) if named else did_open):
            is_backdoored = False
        if not named and attack.trigger is not None and (did_open or asr.percent >= OPEN_ASR):
            named = asdict(attack)
    counts = {
        when: {name: count.plain() for name, count in found.items()}
        for when, found in (("before", before), ("after", after))
    }
    return replace(card, backdoored=is_backdoored, attack=named, defended_by=method, counts=counts)


def _is_same(attack: AttackConfig, named: AttackConfig) -> bool:
    """Whether both stamp and want the same; which training images were poisoned does not matter."""
    return all(getattr(attack, key) == getattr(named, key) for key in ("trigger", "labels", "target_class", "shift"))


def mostly_wrong(folder: str, card: ModelCard, acc: Count, data: Path) -> str:
    """The line that says that a model gets most clean images of its own task wrong, and what that may come from."""

    def told(key: str) -> str:
        return " (import's guess)" if key in card.guessed else ""

    chance = 100 / (card.num_classes or 1)
    much = f"{acc.correct} of {acc.n} clean images of {data} right ({acc.percent:.1f} %, chance {chance:.1f} %)"
    return (
        f"{folder} gets only {much}. Is it this: normalization {card.normalization}{told('normalization')}, images of "
        f"{card.image_size} px{told('image_size')}, or classes in another order? What is counted then means little"
    )
