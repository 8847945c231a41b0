"""MIMIC (Han et al. 2025): distil a suspicious encoder into a fresh one with a little clean unlabelled data.

Phase 1 estimates, for each stage of the encoder, the mutual information between its output and the final feature; the
weight of the stage's attention loss follows from it. Phase 2 trains a randomly initialised student: SimCLR's loss on
the clean subset, a clone loss on the final feature and attention losses on the four stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_defend.batch import Batch
from dist_defend.bounds import not_negative, positive
from dist_defend.data.augment import SIMCLR, AugmentConfig, View
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.trainer import Stage
from dist_defend.methods.defend.mimic.information import InformationConfig, LayerInformation
from dist_defend.models.encoder import SimCLR, build_simclr
from dist_defend.models.fit import check_image_size, check_views
from dist_defend.ops.attention import attention_loss
from dist_defend.ops.losses import negative_cosine, nt_xent


@dataclass(frozen=True)
class Config:
    """Defaults are the published ones for CIFAR-10, but for information.source.

    Keys:
        teacher: model folder of the suspected encoder, which teaches
        data: the defender's clean images; labels are not read
        student: model folder that the student starts from; null: fresh weights, as published
        temperature: temperature of the contrastive loss
        contrastive_weight: weight of SimCLR's contrastive loss on the clean images
        clone_weight: weight of the clone loss on the final feature; opt5 of the published code
        attention_weights: weights of the attention losses of the four stages, to which phase 1 adds its own; opt1 to
            opt4 of the published code
        information: phase 1: the estimate of mutual information for the attention weights
        augment: augmentation that makes each of the two views
        update: phase 2: batch size, epochs, optimizer and the like of the student
    """

    teacher: str
    data: DatasetConfig
    student: str | None = None
    temperature: float = 0.5
    contrastive_weight: float = 1.0
    clone_weight: float = 1.0
    attention_weights: tuple[float, ...] = (1000.0, 1000.0, 1000.0, 1000.0)
    information: InformationConfig = field(default_factory=InformationConfig)
    augment: AugmentConfig = SIMCLR
    update: UpdateConfig = UpdateConfig(
        batch_size=128, epochs=1000, optimizer=OptimizerConfig("adam", lr=1e-2, weight_decay=1e-6)
    )

    def __post_init__(self) -> None:
        positive(self, "temperature")
        not_negative(self, "contrastive_weight", "clone_weight")
        if min(self.attention_weights, default=0) < 0:
            raise ValueError(f"key 'attention_weights' is {list(self.attention_weights)}; none may be negative")
        if len(self.attention_weights) != 4:
            raise ValueError(
                f"key 'attention_weights' has {len(self.attention_weights)} values; it needs 4, one per stage"
            )


class MimicObjective(Objective):
    """loss = contrastive_weight Con + sum_l w_l AT_l + clone_weight Clone, over four stages l.

    Con: NT-Xent of the two views; Clone: negative cosine of student's and teacher's features; AT: attention loss, p = 2
    (ops/attention.py). batch.views: two of (B, 3, H, W). Clone and AT compare the networks on the first view. The
    published code passes the first view through the student twice, which moves its running statistics a third time;
    that update is repeated from the first pass's statistics, without the pass.
    """

    attention_weights: Tensor

    def __init__(
        self,
        student: SimCLR,
        teacher: SimCLR,
        temperature: float,
        attention_weights: Sequence[float],
        clone_weight: float,
        contrastive_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.student, self.temperature = student, temperature
        self.clone_weight, self.contrastive_weight = clone_weight, contrastive_weight
        # In a list, so that DDP, the optimizer and checkpoints leave it out.
        self._teacher = [teacher.eval().requires_grad_(False)]
        self.register_buffer("attention_weights", torch.tensor(attention_weights, dtype=torch.float64))
        self._norms = [m for m in student.f.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._first_updates: list[list[Tensor]] = []  # of each forward pass since the last update

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        first, second = batch.views
        before = [b.clone() for b in self._statistics()]
        maps, feature, z1 = self.student.layers(first)
        with torch.no_grad():
            triples = zip(self._statistics(), before, self._keeps(), strict=True)
            self._first_updates.append([now - keep * old for now, old, keep in triples])
        _, z2 = self.student(second)
        with torch.no_grad():
            teacher_maps, teacher_feature, _ = self._teacher[0].layers(first)
        terms = {
            "contrastive": nt_xent(z1, z2, self.temperature),
            "clone": negative_cosine(at_least_float32(feature), at_least_float32(teacher_feature)),
        }
        loss = self.contrastive_weight * terms["contrastive"] + self.clone_weight * terms["clone"]
        for number, (mine, theirs) in enumerate(zip(maps, teacher_maps, strict=True)):
            term = attention_loss(at_least_float32(mine), at_least_float32(theirs))
            terms[f"attention{number + 1}"] = term
            loss = loss + self.attention_weights[number].to(term.dtype) * term
        return {"loss": loss, **terms}

    @torch.no_grad()
    def after_backward(self) -> None:
        """The third update of the running statistics: r <- keep r + (what the first pass added)."""
        for updates in self._first_updates:
            for running, keep, added in zip(self._statistics(), self._keeps(), updates, strict=True):
                running.mul_(keep).add_(added)
            for norm in self._norms:
                assert norm.num_batches_tracked is not None
                norm.num_batches_tracked += 1
        self._first_updates.clear()

    def _statistics(self) -> list[Tensor]:
        return [b for norm in self._norms for b in (norm.running_mean, norm.running_var) if b is not None]

    def _keeps(self) -> list[float]:
        return [1 - (norm.momentum or 0.0) for norm in self._norms for _ in range(2)]


def build(config: Config, context: Context) -> Plan:
    """Two stages: estimate the information of the layers (unless its estimator is "fixed"), then distil."""
    teacher, suspect, teacher_sha256 = context.load_encoder(config.teacher)
    dataset, rows = context.dataset("defence", config.data)
    view = View(config.augment)
    loader = context.train_loader(dataset, rows, config.update.batch_size, (view, view), config.update.accumulation)
    torch.manual_seed(context.seed)
    start = None  # the card of the model that the student starts from
    if config.student is None:
        student = build_simclr(teacher.arch, teacher.normalization, teacher.image_size, resize=teacher.resize)
    else:
        student, start, _ = context.load_encoder(config.student)
    for model in (teacher, student):
        model.to(context.ranks.device, context.ranks.dtype)
    _check_sizes(config, dataset, {config.teacher: teacher, **({config.student: student} if config.student else {})})
    measured = teacher if config.information.source == "teacher" else student
    information = LayerInformation(config.information, measured, context, dataset, rows)
    context.synchronise(student)
    objective = MimicObjective(
        student, teacher, config.temperature, config.attention_weights, config.clone_weight, config.contrastive_weight
    )
    step = context.gradient_step(objective, config.update, loader.num_batches)
    stages = [Stage("mimic", loader, step, config.update.epochs, shown=("loss", "clone"))]
    if config.information.estimator != "fixed":

        def finish() -> None:
            base = objective.attention_weights.new_tensor(config.attention_weights)
            objective.attention_weights.copy_(base + information.weights().to(base))

        stages.insert(0, information.stage(finish))

    cards = [suspect] if start is None else [suspect, start]

    def result() -> dict[str, Any]:
        card = context.card(
            student,
            {"seed": context.seed},
            backdoored=any(card.backdoored for card in cards),  # nothing is measured here, so the suspect's flag stays
            attack=next((card.attack for card in cards if card.attack), None),
            parent_sha256=teacher_sha256,
            guessed=cards[-1].guessed,
            defended_by=context.method,
        )
        weights = {f"attention_weight{i + 1}": w for i, w in enumerate(objective.attention_weights.tolist())}
        return {"model_sha256": context.save_model(student, card), "metrics": weights}

    return Plan(stages, result)


def _check_sizes(config: Config, dataset: PreparedDataset, models: dict[str, SimCLR]) -> None:
    """UserError for a model that cannot take the images or the views made of them."""
    shape, size = dataset.image_shape, config.augment.size
    for folder, model in models.items():
        check_views(model, folder, shape, size, config.data.path, "mimic.augment.size")
        if size is not None and config.information.estimator != "fixed" and shape and shape[:2] != (size, size):
            check_image_size(model, folder, shape, config.data.path)  # phase 1 takes the images at their own size
