"""Input-aware dynamic backdoor (Nguyen and Tran 2020): trigger generators trained together with the classifier.

Stage "mask" trains the mask network, which says where a trigger goes. Stage "joint" freezes it and trains the pattern
network with the classifier. Losses and constants are BackdoorBench's. Distances are between normalised images, as
published.
"""

import copy
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.attacks.attack import AttackConfig, backdoor_labels
from dist_defend.attacks.input_aware import Generators, InputAwareTrigger, save_generators
from dist_defend.attacks.patterns import InputAware
from dist_defend.attacks.poison import STAMPED, PoisonedDataset, image_size_of
from dist_defend.batch import Batch
from dist_defend.bounds import at_least_one, not_negative
from dist_defend.counts import Count, evaluate_classifier, percents
from dist_defend.data.augment import AugmentConfig, View
from dist_defend.data.classes import named_classes
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.dist import Ranks
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import Position
from dist_defend.engine.trainer import Stage
from dist_defend.engine.update import Update, check_finite
from dist_defend.errors import UserError
from dist_defend.files import sha256_file
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.trial import Examination

_EPSILON = 1e-7


@dataclass(frozen=True)
class Config:
    """Defaults are BackdoorBench's for CIFAR-10.

    Keys:
        data: training images, clean and labelled
        test: labelled test images, used for measurement only
        arch: architecture of the network (`dist-defend models`)
        normalization: normalisation constants of the network's first layer
        augment: augmentation of the training images
        labels: all_to_one: images of any class become the target class; all_to_all: class y becomes y + shift
        target_class: the class that the attacker wants, counted from 0
        shift: shift of all_to_all
        rate: share of each batch that is poisoned; as many images are cross samples, which carry the trigger of another
            image and keep their label
        lambda_div: weight of the diversity losses of masks and of patterns
        lambda_norm: weight of the mask values above density
        density: value of a mask above which lambda_norm penalises it
        batch_size: images of an update over all ranks
        mask_epochs: epochs of stage mask
        epochs: epochs of stage joint
        mask_optimizer: optimizer of the mask network
        generator_optimizer: optimizer of the pattern network
        optimizer: optimizer of the classifier
        evaluate_every: epochs between two measurements; there is one after the last epoch too
    """

    data: DatasetConfig
    test: DatasetConfig
    arch: str = "preact_resnet18"
    normalization: str = "cifar10_backdoorbench"
    augment: AugmentConfig = AugmentConfig(crop="pad", pad=4, flip=0.5)
    labels: Literal["all_to_one", "all_to_all"] = "all_to_one"
    target_class: int = 0
    shift: int = 1
    rate: float = 0.1
    lambda_div: float = 1.0
    lambda_norm: float = 100.0
    density: float = 0.032
    batch_size: int = 128
    mask_epochs: int = 25
    epochs: int = 100
    mask_optimizer: OptimizerConfig = OptimizerConfig(
        "adam", 0.01, betas=(0.5, 0.9), schedule="multistep", milestones=(10, 20)
    )
    generator_optimizer: OptimizerConfig = OptimizerConfig("adam", 0.01, betas=(0.5, 0.9))
    optimizer: OptimizerConfig = OptimizerConfig("sgd", 0.01, momentum=0.9, weight_decay=5e-4)
    evaluate_every: int = 10

    def __post_init__(self) -> None:
        not_negative(self, "lambda_div", "lambda_norm", "density", "target_class")
        at_least_one(self, "batch_size", "mask_epochs", "epochs", "evaluate_every")
        if self.rate > 0.5 or int(self.rate * self.batch_size) < 1:
            raise ValueError(f"key 'rate' is {self.rate}; it must be an image of a batch or more, and at most 0.5")


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference of each pair: two (B, C, H, W) -> (B,)."""
    return (a - b).square().mean((1, 2, 3)).sqrt()


class MaskObjective(Objective):
    """lambda_norm mean(relu(m - density)) + lambda_div^2 mean(d(x, x') / (d(m, m') + eps)), squared as published.

    m, m': masks of x and x'; d: distance(). x' is the batch in reverse order, in place of upstream's second loader.
    """

    def __init__(self, generators: Generators, config: Config) -> None:
        super().__init__()
        self.net_m = generators.net_m
        self._generators = [generators]  # not a submodule: the pattern network is not trained here
        self.config = config

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (generators,), images, others = self._generators, batch.images, batch.images.flip(0)
        mask, other_mask = generators.mask(images), generators.mask(others)
        norm = functional.relu(mask - self.config.density).mean()
        apart = distance(generators.normalize(images), generators.normalize(others))
        diversity = (apart / (distance(mask, other_mask) + _EPSILON)).mean()
        loss = self.config.lambda_norm * norm + self.config.lambda_div**2 * diversity
        return {"loss": loss, "mask_norm": norm, "mask_diversity": diversity, "mask_density": mask.mean()}


def joint_loss(model: Classifier, generators: Generators, batch: Batch, config: Config) -> dict[str, Tensor]:
    """CE + lambda_div mean(d(x, x') / (d(p, p') + eps)), p, p' the patterns (Nguyen and Tran, eq. 5 to 8).

    Of the batch, the first int(rate B) images carry their own mask and pattern and the attacker's label; as many
    follow that carry those of x', their counterparts in the reversed batch, and keep their label; the rest is clean.
    """
    images, labels = batch.images, batch.labels
    count = int(config.rate * len(labels))
    victims, crossed, rest = images[:count], images[count : 2 * count], images[2 * count :]
    others = images.flip(0)[count : 2 * count]
    with torch.no_grad():
        mask, other_mask = generators.mask(victims), generators.mask(others)
    pattern, other_pattern = generators.pattern(victims), generators.pattern(others)
    stamped = victims + (pattern - victims) * mask
    wrong = crossed + (other_pattern - crossed) * other_mask
    wanted = backdoor_labels(labels[:count], _attack(config, ""), model.num_classes)
    logits = at_least_float32(model(torch.cat([stamped, wrong, rest])))
    goal = torch.cat([wanted, labels[count:]])
    classification = functional.cross_entropy(logits, goal)
    normalize = generators.normalize
    patterns_apart = distance(normalize(pattern), normalize(other_pattern))
    diversity = (distance(normalize(victims), normalize(others)) / (patterns_apart + _EPSILON)).mean()
    hits = (logits.argmax(1) == goal).to(logits.dtype)
    return {
        "loss": classification + config.lambda_div * diversity,
        "cross_entropy": classification,
        "pattern_diversity": diversity,
        "train_asr": hits[:count].mean(),
        "train_cross_acc": hits[count : 2 * count].mean(),
    }


class JointStep:
    """One update of the classifier and of the pattern network, each with its own optimizer."""

    def __init__(
        self, model: Classifier, generators: Generators, config: Config, ranks: Ranks, steps_per_epoch: int
    ) -> None:
        self.model, self.generators, self.config, self.ranks = model, generators, config, ranks
        self.steps_per_epoch = steps_per_epoch
        kinds = ((model, config.optimizer), (generators.net_g, config.generator_optimizer))
        self.updates = [Update(module.parameters(), options) for module, options in kinds]

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        self.model.train()
        self.generators.net_g.train()
        self.generators.net_m.eval()
        with self.ranks.accelerator.autocast():
            terms = joint_loss(self.model, self.generators, batch, self.config)
        gradients = list(torch.autograd.grad(terms["loss"], [p for update in self.updates for p in update.parameters]))
        scalars = {key: value.detach() for key, value in terms.items()}
        norm = torch.nn.utils.get_total_norm(gradients)
        for update in self.updates:
            total = self.steps_per_epoch * self.config.epochs
            update.follow(at.done(self.steps_per_epoch), self.steps_per_epoch, total)
            own, gradients = gradients[: len(update.parameters)], gradients[len(update.parameters) :]
            _, scalars["nonfinite"] = update.step(own, norm=norm)
        return check_finite(scalars, "the gradient")

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "generators": self.generators.state_dict(),
            "optimizers": [update.state_dict() for update in self.updates],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.generators.load_state_dict(state["generators"])
        for update, saved in zip(self.updates, state["optimizers"], strict=True):
            update.load_state_dict(saved)


def build(config: Config, context: Context) -> Plan:
    """Stage mask, then stage joint; the run folder gets generators.safetensors beside the model."""
    ranks = context.ranks
    if ranks.world_size > 1 or ranks.accelerator.mixed_precision == "fp16":
        raise UserError("method input_aware pairs the images of a batch: run it on one rank, in fp32, fp64 or bf16")
    train, rows = context.dataset("train", config.data, is_labelled=True)
    test, test_rows = context.dataset("test", config.test, is_labelled=True)
    size = image_size_of(train)
    context.check_classes(train.classes, config.data.path, test.classes, config.test.path)
    if train.image_shape != test.image_shape:
        raise UserError(f"{config.data.path} and {config.test.path} differ in image size: use two splits")
    if config.target_class >= test.num_classes:
        raise UserError(f"key 'input_aware.target_class' is {config.target_class}; {test.path} has no such class")
    torch.manual_seed(context.seed)
    model = build_classifier(config.arch, test.num_classes, config.normalization, size)
    generators = Generators(size, config.normalization)
    for module in (model, generators):
        module.to(ranks.device, ranks.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader = context.train_loader(train, rows, config.batch_size, (View(config.augment),))
    clean_loader = context.eval_loader(test, test_rows)
    path = context.folder / "generators.safetensors"
    attack = _attack(config, str(path))

    def counts() -> dict[str, Count]:
        stamp = InputAwareTrigger(copy.deepcopy(generators).eval()).to("cpu")
        attacked = PoisonedDataset(test, stamp, np.full(len(test), STAMPED, np.uint8))
        return evaluate_classifier(model, clean_loader, context.eval_loader(attacked, test_rows), ranks, attack)

    def result() -> dict[str, Any]:
        save_generators(path, generators)
        examination = Examination(test, test_rows, attack, test.num_classes, context)  # by the saved file
        found = examination.measure(model)
        examination.save_examples()
        card = context.card(
            model,
            {"seed": context.seed, "generators_sha256": sha256_file(path)},
            classes=named_classes(test.classes, train.classes),
            backdoored=True,
            attack=asdict(attack),
        )
        return {
            "model_sha256": context.save_model(model, card),
            "rows": [examination.row("backdoored", found)],
            **examination.names(),
        }

    update = UpdateConfig(config.batch_size, config.mask_epochs, optimizer=config.mask_optimizer)
    mask_step = context.gradient_step(MaskObjective(generators, config), update, loader.num_batches)
    joint_step = JointStep(model, generators, config, ranks, loader.num_batches)

    def evaluate(epoch: int) -> dict[str, float]:
        return percents(counts())

    stages = [
        Stage("mask", loader, mask_step, config.mask_epochs, shown=("loss", "mask_density")),
        Stage("joint", loader, joint_step, config.epochs, evaluate, config.evaluate_every, shown=("loss", "train_asr")),
    ]
    return Plan(stages, result)


def _attack(config: Config, generators: str) -> AttackConfig:
    trigger = InputAware(generators, normalization=config.normalization)
    return AttackConfig(trigger, config.labels, config.target_class, config.rate, shift=config.shift)
