"""Re-activation (Min et al., NeurIPS 2024): how little brings a backdoor back. It needs the trigger: an oracle.

    L = CE(f(x), y) over N clean images, of which q are stamped and get the attacker's label, for a few epochs

ASR then says nothing alone. Beside it stand the same with q = 0, the same from a clean network that never saw the
trigger (what q images teach anew is no memory), and ACC. An encoder is tuned together with its downstream head.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_defend.attacks.attack import AttackConfig, attack_from, check_classes
from dist_defend.attacks.poison import CLEAN, CROSS, STAMPED, PoisonedDataset, poisoned
from dist_defend.batch import Batch
from dist_defend.bounds import at_least_one
from dist_defend.counts import Count, percents, told, warn_near_chance
from dist_defend.data.augment import AugmentConfig, View
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.order import Sampling
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.graphed import GraphMode
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.methods.defend.defender import check_last_batch
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.methods.measure import probe
from dist_defend.models.artifact import ModelCard, read_card
from dist_defend.models.classifier import Classifier
from dist_defend.models.encoder import SimCLR
from dist_defend.models.fit import check_image_size
from dist_defend.models.heads import HeadedEncoder, MLPHead
from dist_defend.ops.streams import Stream, draws
from dist_defend.ops.transfer import to_device
from dist_defend.trial import Examination, Trial

log = logging.getLogger(__name__)
MOST_LOST = 3.0  # points of ACC that re-tuning may cost, for its ASR to say anything


@dataclass(frozen=True, kw_only=True)
class Config:
    """Defaults are ours, for encoders: the published ones break an encoder with its head (docs/methods/reactivate.md).

    Keys:
        model: model folder of a classifier or an encoder, usually one that a defence has made
        control: model folder of one of its kind that never saw the trigger; null: the ASR is not compared
        data: labelled training images of the task; an encoder's head is trained on all of them
        test: labelled images that only measure
        attack: null: the attack in the model's card
        num_images: N, drawn from ``data``
        num_poisoned: q of them, of other classes than the target, get trigger and target
        augment: how the clean ones are changed, once for all epochs
        train_mode: batch norms take the batch's statistics and change their own; false: they stay as they are
        batch_size: global; the last batch may be short
        epochs: passes over the N images
        optimizer: optimizer, rate and schedule
        head: of an encoder: how its head is trained before; null: as published
        graph: whether the updates are CUDA graphs
    """

    model: str
    control: str | None = None
    data: DatasetConfig
    test: DatasetConfig
    attack: AttackConfig | None = None
    num_images: int = 1000
    num_poisoned: int = 5
    augment: AugmentConfig = AugmentConfig()
    train_mode: bool = False
    batch_size: int = 128
    epochs: int = 5
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adam", lr=1e-4))
    head: probe.HeadConfig | None = None
    graph: GraphMode = "auto"

    def __post_init__(self) -> None:
        at_least_one(self, "num_poisoned", "batch_size", "epochs")
        if self.num_images <= self.num_poisoned:
            raise ValueError(f"key 'num_images' is {self.num_images}; it must be more than num_poisoned")
        if self.augment.size is not None:
            raise ValueError(f"key 'augment.size' is {self.augment.size}; the images keep their size: leave it out")


PRESETS: dict[str, dict[str, Any]] = {
    "published": {  # of classifiers; 1,000 are 2 % of CIFAR-10's images
        "train_mode": True,
        "augment": {"crop": "pad", "pad": 4, "flip": 0.5},
        "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    },
}


class FixedImages:
    """N images in an order of each epoch's own, made once: clean ones augmented, stamped ones as they are.

    rows: (N,) of the data set. Every rank holds all images, and takes its share of each batch.
    """

    def __init__(self, dataset: PreparedDataset, rows: np.ndarray, config: Config, context: Context) -> None:
        places, ranks = np.arange(len(rows)), context.ranks
        self.sampling = Sampling(places, config.batch_size, True, False, context.seed, ranks.rank, ranks.world_size)
        self.num_batches, self.device = self.sampling.num_batches, ranks.device
        flags = dataset.flags[rows] if isinstance(dataset, PoisonedDataset) else np.zeros(len(rows), np.uint8)
        self.is_stamped, self.labels = torch.from_numpy(flags == STAMPED), torch.from_numpy(dataset.labels[rows])
        self.loader = context.whole_loader(dataset, rows, views=(View(config.augment), View()))

    @cached_property
    def images(self) -> Tensor:
        """(N, 3, H, W) in [0, 1], on the device."""
        parts: list[Tensor] = []
        for batch, is_stamped in zip(self.loader.epoch(0), self.is_stamped.split(self.loader.batch_size), strict=True):
            augmented, plain = batch.views
            parts.append(torch.where(to_device(is_stamped, plain.device)[:, None, None, None], plain, augmented))
        return to_device(torch.cat(parts), self.device)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's shares of the epoch's batches."""
        for own in self.sampling.shares(epoch, start_batch):
            index = torch.from_numpy(own)
            place = to_device(index, self.device)
            yield Batch((self.images[place],), self.labels[index], index)


class ReactivationStep(TuningStep):
    """Fine-tuning in the mode that is asked for. start: called before the stage's first update."""

    def __init__(self, config: Config, model: nn.Module, start: Callable[[], object], **options: Any) -> None:
        self.in_train_mode, self.start = config.train_mode, start
        super().__init__(model, config.optimizer, epochs=config.epochs, graph=config.graph, **options)

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        if not at.done(self.steps_per_epoch):
            self.start()
        return super().__call__(batch, at)


def build(config: Config, context: Context) -> Plan:
    """The encoders' heads, where there are encoders; then q images, none, and q on the control, a stage each."""
    folders = {"model": config.model, **({"control": config.control} if config.control else {})}
    found = {role: _opened(folder, config, context) for role, folder in folders.items()}
    card = found["model"][1]
    train, rows = context.dataset("train", config.data, is_labelled=True)
    test, test_rows = context.dataset("test", config.test, is_labelled=True)
    context.check_classes(train.classes, config.data.path, test.classes, config.test.path)
    attack = config.attack or (attack_from(card.attack) if card.attack else None)
    if attack is None:
        raise UserError(f"key 'reactivate.attack' is missing, and {config.model} names none: say what is stamped")
    check_classes(attack, train.num_classes, "reactivate.attack.")
    examination = Examination(test, test_rows, attack, train.num_classes, context)
    models = {role: model for role, (model, _) in found.items()}
    networks, start, first, head = _networks(models, config, context, (train, rows))
    made, chosen = _poisoned(train, rows, attack, config, context)
    stamped, clean = FixedImages(made, chosen, config, context), FixedImages(train, chosen, config, context)
    stages, steps = [*first], {}
    for name, role, source in (
        ("poisoned", "model", stamped),
        ("clean", "model", clean),
        ("control", "control", stamped),
    ):
        if role in networks:
            network = copy.deepcopy(networks[role])
            context.synchronise(network)
            options = {"ranks": context.ranks, "steps_per_epoch": source.num_batches}
            steps[name] = ReactivationStep(config, network, partial(start, role, network), **options)
            stages.append(Stage(f"reactivate/{name}", source, steps[name], config.epochs, is_kept=True))

    def result() -> dict[str, Any]:
        for role, network in networks.items():
            start(role, network)
        before = {role: examination.measure(network) for role, network in networks.items()}
        after = {name: examination.measure(step.model) for name, step in steps.items()}
        kind = card.defended_by or ("backdoored" if card.backdoored else "clean")
        warn_near_chance(kind, examination.task, before["model"]["acc"], train.num_classes)
        if context.ranks.is_main:
            _tell(config, before["model"], after)
        examination.save_examples()
        row = {**examination.row(kind, before["model"]), "acc_retuned": after["poisoned"]["acc"].plain(), **head}
        for name, counts in after.items():
            row["asr_retuned" + ("" if name == "poisoned" else f"_{name}")] = counts["asr"].plain()
        every = {**{f"{role}, before": counts for role, counts in before.items()}, **after}
        plain = {when: {name: count.plain() for name, count in counts.items()} for when, counts in every.items()}
        metrics = {"poisoned_rows": np.flatnonzero(made.flags == STAMPED).tolist(), "counts": plain}
        return {"rows": [row], "targets": examination.targets(), **head, "metrics": metrics}

    return Plan(stages, result)


def _opened(folder: str, config: Config, context: Context) -> tuple[Classifier | SimCLR, ModelCard]:
    """The model on the ranks' device, and its card. UserError where images or classes do not fit it."""
    parts = {"train": config.data, "test": config.test}
    if read_card(folder).kind == "classifier":
        trial = Trial(folder, context)
        for role, part in parts.items():
            trial.dataset(role, part)
        return trial.model, trial.card
    encoder, card, _ = context.load_encoder(folder)
    for role, part in parts.items():
        check_image_size(encoder, folder, context.dataset(role, part, is_labelled=True)[0].image_shape, part.path)
    return encoder.to(context.ranks.device, context.ranks.dtype), card


def _networks(
    models: dict[str, Classifier | SimCLR], config: Config, context: Context, data: probe.LabelledRows
) -> tuple[dict[str, nn.Module], Callable[[str, nn.Module], None], Sequence[Stage], dict[str, str]]:
    """What is tuned by role; what gives one its trained head; the heads' stage; what result.json says of the heads."""
    encoders = {role: model.f for role, model in models.items() if isinstance(model, SimCLR)}
    if len({getattr(encoders.get(role), "feature_dim", None) for role in models}) > 1:
        raise UserError(f"key 'reactivate.control': {config.control} is another kind of model than {config.model}")
    if not encoders:
        if config.head is not None:
            raise UserError(f"key 'reactivate.head' is of encoders, but {config.model} has its own: leave it out")
        return {**models}, lambda role, network: None, (), {}
    own = config.head or probe.HeadConfig()
    task = {"head": probe.TaskConfig(config.data, config.test, 0)}
    options = probe.Config(dict.fromkeys(models, ""), task, seeds=(context.seed,), **vars(own))
    heads = probe.TrainedHeads("head", options, [*encoders.values()], context, data, "reactivate.head")

    def start(role: str, network: nn.Module) -> None:
        trained = heads.stack.extract([*encoders].index(role))
        network.get_submodule("head").load_state_dict(trained.state_dict())

    networks: dict[str, nn.Module] = {}
    for role, encoder in encoders.items():
        fresh = MLPHead(encoder.feature_dim, data[0].num_classes, own.hidden, dropout=0.0)
        networks[role] = HeadedEncoder(encoder, fresh).to(context.ranks.device, context.ranks.dtype)
    return networks, start, heads.stages, {"head": options.head}


def _poisoned(
    dataset: PreparedDataset, rows: np.ndarray, attack: AttackConfig, config: Config, context: Context
) -> tuple[PoisonedDataset, np.ndarray]:
    """The data set with q stamped and relabelled images of other classes, and the rows (N,) that are tuned on."""
    if config.num_images > len(rows):
        raise UserError(
            f"key 'reactivate.num_images' is {config.num_images}, but {config.data.path} gives {len(rows)}: lower it"
        )
    check_last_batch(config.num_images, config.batch_size, context.ranks.world_size, context.method)
    generator = draws(context.seed, Stream.REACTIVATED)
    chosen = np.sort(generator.choice(rows, config.num_images, replace=False))
    own: dict[str, Any] = {} if attack.labels == "all_to_all" else {"labels": "all_to_one", "avoid_target": True}
    few = replace(attack, count=config.num_poisoned, choose="random", **own)
    made = poisoned(dataset, chosen, few, context.seed)
    made.flags[made.flags == CROSS] = CLEAN
    return made, chosen


def _tell(config: Config, before: dict[str, Count], after: dict[str, dict[str, Count]]) -> None:
    """How far q images bring the attack back, beside what tells a memory from a lesson."""
    q, n = config.num_poisoned, config.num_images
    for name, counts in after.items():
        what = {"poisoned": f"{q} of {n} poisoned", "clean": f"none of {n} poisoned"}.get(name, "the control, likewise")
        log.info("re-tuned, %s: %s", what, told(counts, percents(before) if name != "control" else None))
    if config.control is None:
        log.warning("key 'reactivate.control' names no clean model: what %d images teach anew cannot be told", q)
    if before["acc"].percent - after["poisoned"]["acc"].percent > MOST_LOST:
        log.warning("re-tuning costs more than %g points of ACC: its ASR says little", MOST_LOST)
