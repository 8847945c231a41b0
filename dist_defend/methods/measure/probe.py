"""Downstream accuracy and ASR of frozen, L2-normalised features: MLP as of BadEncoder and MIMIC, linear layer or kNN.

Features are computed once, by each rank for its share of the images. The heads of all encoders and seeds of a task are
trained together as one batched computation, each exactly as it would be alone: its own initial weights, its own dropout
draws, the same batches.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import BadNets
from dist_defend.batch import Batch
from dist_defend.bounds import positive
from dist_defend.counts import extract_features, knn_classes, warn_near_chance
from dist_defend.data.classes import check_class
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.order import epoch_order, rank_slice
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Place, Plan
from dist_defend.engine.dist import Ranks
from dist_defend.engine.features import FrozenFeatures, standardise
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.models.encoder import SimCLR
from dist_defend.models.fit import check_image_size
from dist_defend.models.heads import HIDDEN, HeadStack
from dist_defend.models.pixel_space import Encoder
from dist_defend.ops.transfer import to_device
from dist_defend.trial import Examination, encoders_to_measure, save_pictures

log = logging.getLogger(__name__)
LabelledRows = tuple[PreparedDataset, np.ndarray]  # a data set with labels, and rows (N,) of it


@dataclass(frozen=True)
class TaskConfig:
    """A labelled downstream data set and the class that the attacker wants.

    Keys:
        train: labelled images that the heads are trained on
        test: labelled images that the heads are measured on
        target_class: the class that the attacker wants triggered images to get
    """

    train: DatasetConfig
    test: DatasetConfig
    target_class: int


@dataclass(frozen=True)
class KnnConfig:
    """The k most similar training images vote with weight exp(cosine / temperature). Defaults are BadEncoder's.

    Keys:
        k: number of most similar training images that vote
        temperature: of the votes' weights; Wu et al. 2018, DINO and solo-learn take 0.07
    """

    k: int = 200
    temperature: float = 0.5

    def __post_init__(self) -> None:
        positive(self, "k", "temperature")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How heads are trained. Defaults are BadEncoder's; MIMIC trains for 1000 epochs. The last epoch counts.

    Keys:
        hidden: widths of the hidden layers; []: a linear probe
        dropout: probability, after the first hidden layer
        shuffle: a new order in every epoch; false, as published: the file's order, here the prepared one (docs/data.md)
        cache: where each rank keeps its share of a task's training features, memory or disk
        update: batch size, epochs, optimizer and the like of the heads
    """

    hidden: tuple[int, ...] = HIDDEN
    dropout: float = 0.5
    shuffle: bool = False
    cache: Place = "memory"
    update: UpdateConfig = UpdateConfig(batch_size=64, epochs=500, optimizer=OptimizerConfig("adam", lr=1e-4))

    def __post_init__(self) -> None:
        if self.update.accumulation != 1:
            raise ValueError(f"key 'update.accumulation' is {self.update.accumulation}; heads are small, it must be 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"key 'dropout' is {self.dropout}; it must be in [0, 1)")
        if min(self.hidden, default=1) < 1:
            raise ValueError(
                f"key 'hidden' is {list(self.hidden)}; a layer needs at least one unit, [] is a linear probe"
            )


@dataclass(frozen=True)
class Config(HeadConfig):
    """Encoders, tasks, and what classifies the features.

    Keys:
        encoders: kind (clean, backdoored, purified, ...) -> model folder
        tasks: name -> a downstream task
        attack: attack whose success is measured, with the target class of each task; null: the attack in the encoders'
            cards
        kind: head: a classifier is trained, without hidden layers a linear probe; knn: nothing is trained, and neither
            seeds nor keys of heads are read
        knn: options of kind knn; null: their defaults
        seeds: each task gets a head for each seed
        standardise: kind head: scale features to mean 0 and variance 1 by the training images' moments, as in SSLBKD
    """

    encoders: dict[str, str]
    tasks: dict[str, TaskConfig]
    attack: AttackConfig | None = AttackConfig(BadNets(size=10, margin=1))
    kind: Literal["head", "knn"] = "head"
    knn: KnnConfig | None = None
    seeds: tuple[int, ...] = (100,)
    standardise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("encoders", "tasks", "seeds"):
            if not getattr(self, key):
                raise ValueError(f"key '{key}' is empty")
        if min(self.seeds) < 0:
            raise ValueError(f"key 'seeds' is {list(self.seeds)}; none may be negative")
        if self.knn is not None and self.kind != "knn":
            raise ValueError("key 'knn' is of kind knn alone: set 'kind: knn', or leave it out")
        if self.standardise and self.kind == "knn":
            raise ValueError("key 'standardise' is of kind head alone: kNN has cosines; leave it out")

    @property
    def head(self) -> str:
        """What classifies the features, for result.json and the report."""
        if self.kind == "knn":
            knn = self.knn or KnnConfig()
            return f"knn (k {knn.k}, temperature {knn.temperature:g})"
        head = f"mlp ({', '.join(map(str, self.hidden))})" if self.hidden else "linear"
        return f"{head}, standardised" if self.standardise else head


class ProbeObjective(Objective):
    """Sum over R heads of the mean cross-entropy over the global batch.

    batch.views: features (R, b, D) and, where there is a hidden layer, dropout factors (R, b, hidden); labels (b,).
    Shares may be uneven or empty: a rank's loss is its sum over b, times the ranks, over the global batch, so the mean
    over ranks is exact.
    """

    def __init__(self, heads: HeadStack, ranks: Ranks) -> None:
        super().__init__()
        self.heads, self.world_size = heads, ranks.world_size

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.heads(*batch.views)
        count = torch.full((), float(len(batch.labels)), device=logits.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(count)
        labels = batch.labels.expand(len(logits), -1).reshape(-1)
        total = functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        loss = total * self.world_size / count
        return {"loss": loss, "mean_loss": loss / len(logits)}


class FeatureBatches:
    """Batches of features for the heads of one task; a rank takes its slice of each global batch.

    labels: (N,). take(positions, counts): features (E, b, D) of E encoders; counts[r]: rows that rank r asks for. Heads
    are ordered by encoder, then by seed.
    """

    def __init__(
        self, config: Config, labels: Tensor, context: Context, take: Callable[[Tensor, Sequence[int]], Tensor]
    ) -> None:
        self.config, self.labels, self.context, self.take = config, labels, context, take
        self.batch_size = config.update.batch_size
        self.num_batches = -(-len(labels) // self.batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's shares of the epoch's batches."""
        ranks, seeds = self.context.ranks, self.config.seeds
        order = epoch_order(len(self.labels), self.context.seed, epoch, self.config.shuffle)
        for number in range(start_batch, self.num_batches):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size]
            slices = [rank_slice(len(rows), rank, ranks.world_size) for rank in range(ranks.world_size)]
            own = slices[ranks.rank]
            index = to_device(torch.from_numpy(rows[own]), self.labels.device)
            features = self.take(index, [other.stop - other.start for other in slices])
            views: tuple[Tensor, ...] = (features.repeat_interleave(len(seeds), 0),)
            if self.config.hidden:
                kept = torch.stack([self._kept(seed, epoch, number, len(rows))[own] for seed in seeds])
                factors = to_device(kept, index.device).to(ranks.dtype) / (1 - self.config.dropout)
                views = (*views, factors.repeat(len(features), 1, 1))
            yield Batch(views, self.labels[index], index)

    def _kept(self, seed: int, epoch: int, number: int, rows: int) -> Tensor:
        """Which units dropout keeps: (rows, hidden) bool, drawn from (seed, epoch, batch), whatever else is trained."""
        draws = np.random.Philox(key=[seed, epoch * self.num_batches + number]).random_raw(
            -(-rows * self.config.hidden[0] // 4)
        )
        keep = draws.view(np.uint16)[: rows * self.config.hidden[0]] >= round(self.config.dropout * 65536)
        return torch.from_numpy(keep).view(rows, -1)


def build(config: Config, context: Context) -> Plan:
    """One stage per task, none for kNN; evaluation on clean and triggered test images at the end."""
    models, attack = encoders_to_measure(config.encoders, config.attack, context)
    widths = {model.f.feature_dim for model in models.values()}
    if len(widths) > 1:
        raise UserError(f"key 'encoders' mixes feature sizes {sorted(widths)}; probe them in separate runs")
    tasks = {name: Task(name, task, config, models, attack, context) for name, task in config.tasks.items()}

    def result() -> dict[str, Any]:
        rows = [row for task in tasks.values() for row in task.evaluate()]
        save_pictures([task.examination for task in tasks.values()])
        targets = {task: one.classes[config.tasks[task].target_class] for task, one in tasks.items()}
        return {"rows": rows, "targets": targets, "encoders": dict(config.encoders), "head": config.head}

    return Plan([stage for task in tasks.values() for stage in task.head.stages], result)


class Task:
    """One downstream task, from features to counts."""

    def __init__(
        self,
        name: str,
        task: TaskConfig,
        config: Config,
        models: dict[str, SimCLR],
        attack: AttackConfig | None,
        context: Context,
    ) -> None:
        self.config, self.models = config, models
        labelled = train, _ = context.dataset(f"{name}/train", task.train, is_labelled=True)
        test, test_rows = context.dataset(f"{name}/test", task.test, is_labelled=True)
        context.check_classes(train.classes, task.train.path, test.classes, task.test.path)
        self.classes = train.classes
        check_class(f"probe.tasks.{name}.target_class", task.target_class, train.num_classes, task.train.path)
        for kind, model in models.items():
            for data, part in ((train, task.train), (test, task.test)):
                check_image_size(model, config.encoders[kind], data.image_shape, part.path)
        if attack is not None:
            attack = replace(attack, target_class=task.target_class)
        self.examination = Examination(test, test_rows, attack, train.num_classes, context, task=name)
        encoders = [model.f for model in models.values()]
        how = TrainedHeads if config.kind == "head" else Neighbours
        self.head: TrainedHeads | Neighbours = how(name, config, encoders, context, labelled)

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, Any]]:
        """One row of counts per encoder and seed."""
        results, examination = [], self.examination
        for number, (kind, model) in enumerate(self.models.items()):
            features = examination.features(kind, model.f)
            for seed, classes in self.head.predict(number, *features).items():
                counts = examination.counts(*classes)
                results.append({**examination.row(kind, counts), "seed": seed, "head": self.config.head})
                warn_near_chance(kind, examination.task, counts["acc"], len(self.classes))
        return results


class TrainedHeads:
    """The heads of one task, for all encoders and seeds, and the stage that trains them. section: named in errors."""

    def __init__(
        self,
        task: str,
        config: Config,
        encoders: Sequence[Encoder],
        context: Context,
        data: LabelledRows,
        section: str = "probe",
    ) -> None:
        train, rows = data
        if len(rows) < config.update.batch_size:
            raise UserError(
                f"{train.path}: {len(rows)} images are fewer than key '{section}.update.batch_size' = "
                f"{config.update.batch_size}"
            )
        self.seeds, width = config.seeds, encoders[0].feature_dim
        seeds = [seed for _ in encoders for seed in config.seeds]
        self.stack = HeadStack(width, train.num_classes, seeds, config.hidden, config.dropout)
        if not config.shuffle:
            context.check_order(train, rows, config.update.batch_size)
        self.features = features = FrozenFeatures(encoders, width, context, train, rows, config.cache)
        self.is_standardised = config.standardise
        labels = torch.from_numpy(train.labels[rows]).to(context.ranks.device)
        batches = FeatureBatches(config, labels, context, self._take)
        step = context.gradient_step(ProbeObjective(self.stack, context.ranks), config.update, batches.num_batches)
        name = f"probe/{task}"
        self.stages = [
            Stage(name, batches, step, config.update.epochs, finish=features.forget, is_kept=True, shown=("mean_loss",))
        ]

    def predict(self, encoder: int, *features: Tensor) -> dict[int, list[Tensor]]:
        """By seed: the classes (N,) that this head of the encoder-th encoder gives to each of the features (N, D)."""
        self.stack.eval()
        if self.is_standardised:
            mean, variance = (moment[encoder] for moment in self.features.moments)
            features = tuple(standardise(x, mean, variance) for x in features)
        first = encoder * len(self.seeds)
        return {seed: [self.stack.predict(first + n, x) for x in features] for n, seed in enumerate(self.seeds)}

    def _take(self, positions: Tensor, counts: Sequence[int]) -> Tensor:
        features = self.features.take(positions, counts)
        return standardise(features, *self.features.moments) if self.is_standardised else features


class Neighbours:
    """kNN among the training images' features (Wu et al. 2018, section 3.4), for one encoder at a time."""

    stages: tuple[Stage, ...] = ()

    def __init__(
        self, task: str, config: Config, encoders: Sequence[Encoder], context: Context, data: LabelledRows
    ) -> None:
        self.config, self.encoders, self.context = config.knn or KnnConfig(), encoders, context
        self.loader = context.eval_loader(*data)
        if self.config.k > len(data[1]):
            told = "%s: key 'probe.knn.k' is %d, but there are %d training images: all of them vote"
            log.warning(told, task, self.config.k, len(data[1]))

    def predict(self, encoder: int, *features: Tensor) -> dict[int, list[Tensor]]:
        """By the run's seed, which has no effect: the classes (N,) of each of the features (N, D)."""
        bank, labels, _ = extract_features(self.encoders[encoder], self.loader, self.context.ranks)
        k, temperature = self.config.k, self.config.temperature
        return {self.context.seed: [knn_classes(x, bank, labels, k, temperature) for x in features]}
