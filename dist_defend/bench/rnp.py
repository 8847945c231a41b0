"""RNP from the backdoored network to its table: the defender's choice alone, and all thresholds on the test data."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import BadNets
from dist_defend.attacks.poison import triggered
from dist_defend.bench import runner
from dist_defend.bench.published import rnp as reference
from dist_defend.bench.runner import Case, Settings
from dist_defend.data.augment import IDENTITY
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.data.order import epoch_order
from dist_defend.data.store import open_dataset
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.engine.dist import Ranks
from dist_defend.engine.graphed import GraphMode
from dist_defend.engine.step import Position
from dist_defend.engine.trainer import Stage
from dist_defend.methods.defend.pruning.masks import neuron_table
from dist_defend.methods.defend.pruning.outcome import EVALUATION_BATCH, Outcome
from dist_defend.methods.defend.rnp import Config, Phases
from dist_defend.models.artifact import ModelCard, save_artifact
from dist_defend.models.masked_norm import norm_names
from dist_defend.trial import Trial

UNLEARNING_EPOCHS, RECOVERING_EPOCHS = 13, 20  # of the published log
TEST_SHARE = 18  # images of each test set per image of the defender, as published: 9000 and 500
TEST_BATCH = 128
EQUAL_IMAGES, EQUAL_SHARE = 200, 2  # at most so many of the defender, and TEST_SHARE, where equality is shown
CLASSES = 10


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """rnp-default: choose on the defender's data, test once; rnp-full-table: test every threshold."""
    ranks = runner.start()
    (case,) = runner.cases(settings, "rnp", ("", *sizes(ranks)))
    with tempfile.TemporaryDirectory() as folder:
        few = replace(case, num_images=min(case.num_images, EQUAL_IMAGES))
        Pair(few, Path(folder, "equal"), EQUAL_SHARE).show_equal()
        pair = Pair(case, Path(folder))
        published = pair.published(ranks)
        for name, full in (("rnp-default", False), ("rnp-full-table", True)):
            note = f"{case.num_images} images of the defender, {TEST_SHARE} times as many in each test set; "
            note += f"{UNLEARNING_EPOCHS} and {RECOVERING_EPOCHS} epochs; "
            note += "all thresholds tested" if full else "tested before and after"
            ours = pair.ours(ranks, full)
            yield runner.compare(
                replace(case, name=name), published, ours, settings, images=pair.images_of(full), note=note
            )


def sizes(ranks: Ranks) -> tuple[str, int, int]:
    """Network, batch and the defender's images: on a GPU those of the published log."""
    return ("resnet18", 128, 500) if ranks.device.type == "cuda" else ("small_resnet", 16, 24)


class Pair:
    """Both sides with the same network, images, order of batches and trigger; no augmentation."""

    def __init__(self, case: Case, folder: Path, test_share: int | None = None) -> None:
        """test_share: None for TEST_SHARE."""
        self.case, self.folder = case, folder
        test_share = TEST_SHARE if test_share is None else test_share
        self.poison = AttackConfig(BadNets())
        for number, (split, share) in enumerate({"train": 1, "test": test_share}.items()):
            images = runner.random_images(case.num_images * share, seed=number)
            runner.prepare(images, folder, split, CLASSES, storage="npy")
        self.model = runner.seasoned(case.encoder, CLASSES, runner.NORMALIZATION)

    def images_of(self, full: bool) -> int:
        """Images that go through our side's networks, training ones once."""
        epochs, stops = UNLEARNING_EPOCHS + RECOVERING_EPOCHS + 20, 20 if full else 2
        return self.case.num_images * (epochs + 2 * TEST_SHARE * stops)

    def published(self, ranks: Ranks) -> Callable[[], Any]:
        """The published flow on this network, device and in this precision."""
        device, dtype = ranks.device, ranks.dtype
        net = copy.deepcopy(self.model.net).to(device, dtype)
        mean, std = (values.flatten().tolist() for values in (self.model.normalize.mean, self.model.normalize.std))
        train, test = open_dataset(self.folder / "train"), open_dataset(self.folder / "test")
        kept = np.flatnonzero(test.labels != self.poison.target_class)

        def loader(images: np.ndarray, labels: np.ndarray, **options: Any) -> reference.OnDevice:
            return reference.OnDevice(
                DataLoader(reference.ImageSet(images, labels, mean, std, dtype), **options), device
            )

        stamped = triggered(test, self.poison).images(kept)
        clean = loader(test.images(kept), test.labels[kept], batch_size=TEST_BATCH)
        bad = loader(stamped, np.full(len(kept), self.poison.target_class), batch_size=TEST_BATCH)

        def defend() -> Any:
            defence = loader(
                train.images(np.arange(len(train))),
                train.labels,
                batch_sampler=reference.GivenBatches(_order_of(len(train)), self.case.batch_size),
            )
            return reference.defend(net, defence, clean, bad, self.folder, UNLEARNING_EPOCHS, RECOVERING_EPOCHS)

        return defend

    def ours(self, ranks: Ranks, full: bool, graph: GraphMode = "auto") -> Callable[[], Any]:
        """What a run of the method does between its configuration and its result."""
        config = Config(
            model=str(self.folder / "suspect"),
            data=DatasetConfig(str(self.folder / "train")),
            test=DatasetConfig(str(self.folder / "test")),
            ratio=1.0,
            augment=IDENTITY,
            batch_size=self.case.batch_size,
            unlearning_epochs=UNLEARNING_EPOCHS,
            recovering_epochs=RECOVERING_EPOCHS,
            epochs_inclusive=False,
            full_table=full,
            graph=graph,
            exclude_target_from_acc=True,
        )
        card = ModelCard("classifier", self.case.encoder, runner.NORMALIZATION, runner.IMAGE_SIZE, num_classes=CLASSES)
        save_artifact(self.folder / "suspect", self.model, card)
        context = Context(ranks, 0, LoaderConfig("resident", 1), self.folder, "rnp")

        def defend() -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
            trial = Trial(config.model, context)
            data = trial.dataset("d", config.data)
            trial.test_on(config.test, self.poison, batch_size=EVALUATION_BATCH)
            outcome = Outcome(config, trial, data)
            phases = Phases(config, context, trial.model, norm_names(trial.model.net), *data)
            phases.accuracy = 0.0
            for stage in phases.stages:
                _run(stage, ranks)
            outcome.result(neuron_table(phases.masks))
            return phases.masks, json.loads((self.folder / "sweep.json").read_text())

        return defend

    def show_equal(self) -> None:
        """Both flows in float64: RuntimeError unless masks agree and tables are the same, row by row."""
        ranks = dist.start("fp64", world_size=1)
        masks, table = self.published(ranks)()
        ours, rows = self.ours(ranks, full=True)()
        apart = max((masks[name] - ours[name]).abs().max().item() for name in masks)
        found = [(row["pruned"], *(row[key]["correct"] / row[key]["n"] for key in ("asr", "acc"))) for row in rows]
        is_equal = found == [row[1:] for row in table]
        print(f"rnp: masks apart by {apart:.1e} (limit 1e-06), {len(table)} rows {'equal' if is_equal else 'differ'}")
        if not (apart <= 1e-6 and is_equal and masks.keys() == ours.keys()):
            raise RuntimeError("rnp: the two sides do not compute the same; their times cannot be compared")


def _order_of(count: int) -> Callable[[int], np.ndarray]:
    """The package's order of each pass over the defender's images; recovering starts from epoch 0 again."""

    def order(number: int) -> np.ndarray:
        epoch = number if number < UNLEARNING_EPOCHS else number - UNLEARNING_EPOCHS
        return epoch_order(count, 0, epoch, shuffle=True)

    return order


def _run(stage: Stage, ranks: Ranks) -> None:
    """All epochs of a stage: the stop rule would make the two sides' work differ with rounding."""
    for epoch in range(stage.epochs):
        for number, batch in enumerate(stage.loader.epoch(epoch)):
            stage.step(runner.on_device(batch, ranks), Position(epoch=epoch, batch=number))
    if stage.finish is not None:
        stage.finish()
