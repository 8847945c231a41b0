"""Parts of defences that train a suspected encoder further: projector, loss of two views, model card."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.bounds import positive
from dist_defend.data.augment import SIMCLR, AugmentConfig, View
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.models.encoder import SimCLR, build_projector
from dist_defend.models.fit import check_views
from dist_defend.ops.losses import nt_xent

PRETRAINING = OptimizerConfig("adam", lr=1e-3, weight_decay=1e-6)  # BadEncoder's


@dataclass(frozen=True, kw_only=True)
class EncoderTuningConfig:
    """All weights are trained by a loss of two views of the defender's images. The last epoch is delivered.

    Keys:
        model: model folder of the suspected encoder
        data: the defender's clean images; labels are not read
        temperature: temperature of the contrastive loss
        augment: augmentation that makes each of the two views
        projector: training of a fresh projector, with the encoder frozen, if the model folder has none
        update: batch size, epochs, optimizer and the like of encoder and projector
    """

    model: str
    data: DatasetConfig
    temperature: float = 0.5
    augment: AugmentConfig = SIMCLR
    projector: UpdateConfig = UpdateConfig(batch_size=256, epochs=1, optimizer=PRETRAINING)
    update: UpdateConfig

    def __post_init__(self) -> None:
        positive(self, "temperature")


class ProjectorObjective(Objective):
    """NT-Xent of two views, which trains a copy of the projector alone. The encoder is frozen, in eval mode."""

    def __init__(self, model: SimCLR, temperature: float) -> None:
        super().__init__()
        self.projector, self.temperature = copy.deepcopy(model.g), temperature
        self._encoder = [model.f]  # in a list, so that DDP, the optimizer and checkpoints leave it out

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            features = [self._encoder[0].eval()(view) for view in batch.views]
        first, second = (functional.normalize(self.projector(h), dim=-1) for h in features)
        return {"loss": nt_xent(first, second, self.temperature)}


def encoder_plan(
    config: EncoderTuningConfig,
    context: Context,
    make: Callable[[SimCLR], Objective],
    shown: tuple[str, ...] = ("loss",),
) -> Plan:
    """The stage of a fresh projector, where the suspect has none, and that of the tuning.

    make: the suspect, on the ranks' device -> the objective. UserError for a suspect or images that do not fit.
    """
    model, suspect, sha256 = context.load_encoder(config.model)
    dataset, rows = context.dataset("defence", config.data)
    key = f"{context.method}.augment.size"
    check_views(model, config.model, dataset.image_shape, config.augment.size, config.data.path, key)
    has_projector = not isinstance(model.g, nn.Identity)
    if not has_projector:
        if context.ranks.sharding.strategy != "ddp":
            raise UserError(f"{config.model} has no projector, and a fresh one needs all weights: use --strategy ddp")
        torch.manual_seed(context.seed)
        model.g = build_projector(model.f.feature_dim)
    model.to(context.ranks.device, context.ranks.dtype)
    context.synchronise(model)
    view = View(config.augment)

    def stage(name: str, objective: Objective, update: UpdateConfig) -> Stage:
        loader = context.train_loader(dataset, rows, update.batch_size, (view, view), update.accumulation)
        return Stage(name, loader, context.gradient_step(objective, update, loader.num_batches), update.epochs)

    stages = [stage(context.method, make(model), config.update)]
    stages[0].shown = shown
    if not has_projector:
        fresh = ProjectorObjective(model, config.temperature)

        def finish() -> None:
            model.train().g.load_state_dict(fresh.projector.state_dict())

        stages.insert(0, stage("projector", fresh, config.projector))
        stages[0].finish = finish

    def result() -> dict[str, Any]:
        card = context.card(
            model,
            {"epochs": config.update.epochs, "seed": context.seed},
            backdoored=suspect.backdoored,  # nothing is measured here, so the suspect's flag stays
            attack=suspect.attack,
            parent_sha256=sha256,
            guessed=suspect.guessed,
            defended_by=context.method,
        )
        return {"model_sha256": context.save_model(model, card), "metrics": {"defence_images": len(rows)}}

    return Plan(stages, result)
