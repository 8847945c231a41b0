"""SimCLR (Chen et al. 2020) as BadEncoder pretrains its clean encoders."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.poison import STAMPED, poisoned, save_flags
from dist_defend.batch import Batch
from dist_defend.bounds import positive
from dist_defend.counts import extract_features, knn_count
from dist_defend.data.augment import SIMCLR, AugmentConfig, View
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.grad_cache import CoupledObjective
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.trainer import Stage
from dist_defend.models.encoder import SimCLR, build_simclr
from dist_defend.models.fit import check_image_size, check_views
from dist_defend.ops.losses import nt_xent


@dataclass(frozen=True)
class MonitorConfig:
    """kNN accuracy on labelled data while training; it has no effect on the training.

    Keys:
        memory: labelled images among which neighbours are searched
        test: labelled images that are classified
        every: epochs between two measurements
        k: number of nearest neighbours that vote
        temperature: temperature of the votes' weights, exp(cosine / temperature)
    """

    memory: DatasetConfig
    test: DatasetConfig
    every: int = 10
    k: int = 200
    temperature: float = 0.5

    def __post_init__(self) -> None:
        positive(self, "every", "k", "temperature")


@dataclass(frozen=True)
class Config:
    """Defaults are BadEncoder's pretraining on CIFAR-10.

    Keys:
        data: training images; labels are not read, unless an attack chooses by them
        arch: architecture of the encoder (`dist-defend models`)
        normalization: normalisation constants of the encoder's first layer
        warm_start: model folder to start from; null: fresh weights
        temperature: temperature of the contrastive loss
        grad_cache: take negatives from the whole batch although update.accumulation splits it (GradCache, Gao et al.
            2021)
        attack: trigger on training images, stamped before augmentation; null: none. Of labels only clean_label (images
            of the target class are stamped) and all_to_one (images of any class) are possible
        augment: augmentation that makes each of the two views
        update: batch size, epochs, optimizer and the like
        monitor: kNN accuracy while training; null: none
    """

    data: DatasetConfig
    arch: str = "resnet18_cifar"
    normalization: str = "cifar10"
    warm_start: str | None = None
    temperature: float = 0.5
    grad_cache: bool = False
    attack: AttackConfig | None = None
    augment: AugmentConfig = SIMCLR
    update: UpdateConfig = UpdateConfig(
        batch_size=256, epochs=1000, optimizer=OptimizerConfig("adam", lr=1e-3, weight_decay=1e-6)
    )
    monitor: MonitorConfig | None = None

    def __post_init__(self) -> None:
        positive(self, "temperature")
        if self.attack is not None and self.attack.labels == "all_to_all":
            raise ValueError(
                "key 'attack.labels' is all_to_all, but no label is trained on: say clean_label or all_to_one"
            )
        if self.grad_cache and self.update.accumulation == 1:
            raise ValueError(
                "key 'grad_cache' is true, but 'update.accumulation' is 1 and splits nothing: make it the number of "
                "micro-batches"
            )


class SimCLRObjective(CoupledObjective):
    """NT-Xent between two views, each with its own forward pass and so its own batch statistics.

    batch.views: two of (B, 3, H, W). Returns "loss", the mean over this rank's 2B rows against all ranks' negatives.
    """

    def __init__(self, model: SimCLR, temperature: float, grad_cache: bool = False) -> None:
        super().__init__()
        self.model, self.temperature, self.is_cached = model, temperature, grad_cache

    def embed(self, batch: Batch) -> Tensor:
        """z / |z| of both views, (B, 2, 128)."""
        return torch.stack([self.model(view)[1] for view in batch.views], dim=1)

    def whole_loss(self, embeddings: Tensor) -> Tensor:
        return nt_xent(embeddings[:, 0], embeddings[:, 1], self.temperature)


def build(config: Config, context: Context) -> Plan:
    """One stage: pretrain, with the kNN monitor where it is configured."""
    clean, rows = context.dataset("train", config.data, is_labelled=config.attack is not None)
    dataset, poisons = clean, np.zeros(0, np.uint8)
    if config.attack is not None:
        dataset = poisoned(clean, rows, config.attack, context.seed)
        poisons = dataset.flags
    is_poisoned = bool((poisons == STAMPED).any())
    torch.manual_seed(context.seed)
    parent, parent_sha256 = None, None
    if config.warm_start is None:
        size = config.augment.size or (dataset.image_shape or (224,))[0]
        model = build_simclr(config.arch, config.normalization, image_size=size)
    else:
        model, parent, parent_sha256 = context.load_encoder(config.warm_start)
        views_size, key = config.augment.size, "simclr.augment.size"
        check_views(model, config.warm_start, dataset.image_shape, views_size, config.data.path, key)
    context.synchronise(model)
    views, update = (View(config.augment), View(config.augment)), config.update
    loader = context.train_loader(dataset, rows, update.batch_size, views, update.accumulation)
    objective = SimCLRObjective(model, config.temperature, config.grad_cache)
    step = context.gradient_step(objective, update, loader.num_batches)
    stage = Stage("simclr", loader, step, update.epochs)
    if config.monitor is not None:
        stage.evaluate, stage.evaluate_every = _knn_monitor(config.monitor, model, context), config.monitor.every

    def result() -> dict[str, Any]:
        folder = context.folder if context.ranks.is_main else None
        card = context.card(
            model,
            {"epochs": config.update.epochs, "seed": context.seed, **save_flags(poisons, folder)},
            backdoored=is_poisoned or (parent is not None and parent.backdoored),  # further training proves no removal
            attack=asdict(config.attack)
            if config.attack and is_poisoned
            else None
            if parent is None
            else parent.attack,
            parent_sha256=parent_sha256,
            guessed=() if parent is None else parent.guessed,
        )
        metrics = {"num_poisoned": int((poisons == STAMPED).sum())} if config.attack else {}
        return {"model_sha256": context.save_model(model, card), **({"metrics": metrics} if metrics else {})}

    return Plan([stage], result)


def _knn_monitor(monitor: MonitorConfig, model: SimCLR, context: Context) -> Any:
    memory, test = (
        context.dataset(role, config, is_labelled=True)
        for role, config in (("memory", monitor.memory), ("test", monitor.test))
    )
    context.check_classes(memory[0].classes, monitor.memory.path, test[0].classes, monitor.test.path)
    for opened, part in ((memory, monitor.memory), (test, monitor.test)):
        check_image_size(model, "the model to train", opened[0].image_shape, part.path)
    loaders = [context.eval_loader(*opened) for opened in (memory, test)]

    def evaluate(epoch: int) -> dict[str, float]:
        (bank, bank_labels, _), (queries, labels, _) = (extract_features(model.f, x, context.ranks) for x in loaders)
        return {"knn_acc": knn_count(queries, labels, bank, bank_labels, monitor.k, monitor.temperature).percent}

    return evaluate
