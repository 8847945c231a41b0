"""BadEncoder (Jia, Liu and Gong 2022): a backdoor in the features of a pre-trained encoder.

The objective is the published one; what the published code computes without need is left out. Clean features of the
shadow images and of the references are constant and computed once, a reference is encoded once per step instead of once
per image, and the clean, triggered and augmented images go through the encoder together: batch norm is frozen, so
images do not influence each other, and folded into the convolutions.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.attacks.attack import AttackConfig, check_only_trigger, trigger_of
from dist_defend.attacks.badencoder_npz import pair_references_triggers
from dist_defend.attacks.patterns import BadNets
from dist_defend.attacks.reference import ReferenceConfig, references_from
from dist_defend.attacks.stamping import stamp_images
from dist_defend.attacks.trigger import Trigger
from dist_defend.batch import Batch
from dist_defend.bounds import not_negative
from dist_defend.data.augment import REFERENCE, AugmentConfig, View
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.context import Context, Place, Plan
from dist_defend.engine.features import FrozenFeatures
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.models.fit import check_image_size
from dist_defend.models.folding import fold_frozen_norms
from dist_defend.models.pixel_space import Encoder, Normalize, normalization_names

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Defaults are the published attack on the CIFAR-10 encoder.

    Keys:
        clean_encoder: model folder of the encoder to attack
        shadow: the attacker's images; labels are not read
        reference: images of the classes that the attacker wants, one per target
        attack: trigger to stamp; a file with several triggers has one for each reference
        one_trigger: use the first trigger for all references
        lambda1: weight of reference fidelity (L1)
        lambda2: weight of utility, which keeps the features of clean images (L2)
        augment: augmentation of the references in L1
        shadow_normalization: normalisation constants while training: match_encoder: the encoder's own; or others by
            name, as the published code has for ImageNet encoders
        freeze_norm: layers whose statistics and affine parameters are frozen: bn: batch norms; all: all normalisation
            layers
        cache: where each rank keeps its share of the clean features, memory or disk
        update: batch size, epochs, optimizer and the like
    """

    clean_encoder: str
    shadow: DatasetConfig
    reference: ReferenceConfig
    attack: AttackConfig = field(default_factory=lambda: AttackConfig(BadNets(size=10, margin=1)))
    one_trigger: bool = False
    lambda1: float = 1.0
    lambda2: float = 1.0
    augment: AugmentConfig = REFERENCE
    shadow_normalization: str = "match_encoder"
    freeze_norm: Literal["bn", "all"] = "bn"
    cache: Place = "memory"
    update: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(
            batch_size=256, epochs=200, optimizer=OptimizerConfig("sgd", lr=1e-3, momentum=0.9, weight_decay=5e-4)
        )
    )

    def __post_init__(self) -> None:
        check_only_trigger(self.attack, "all shadow images are stamped, and the reference says the class")
        not_negative(self, "lambda1", "lambda2")
        known = ("match_encoder", *normalization_names())
        if self.shadow_normalization not in known:
            told = f"key 'shadow_normalization' is {self.shadow_normalization!r}"
            raise ValueError(f"{told}; it must be one of {', '.join(known)}")

    def check_references(self, classes: np.ndarray) -> None:
        """UserError for references of classes (K,) that the method cannot use. BadEncoder can use any."""


class BadEncoderObjective(Objective):
    """loss = L0 + lambda1 L1 + lambda2 L2 (BadEncoder, eq. 2 to 5), each a mean of negative cosine similarities.

    L0, effectiveness: f'(x + e_k) against f'(r_k), with a gradient through both. L1, reference fidelity: f'(A(r_k))
    against f(r_k). L2, utility: f'(x) against f(x). L0 and L1 are means over the K references.

    batch.views: x (B, 3, H, W), then K augmented references A(r_k), each (B, 3, H, W). clean_features(rows) gives
    f(x) / |f(x)| (B, D) of the clean encoder f for data-set rows (B,). references: (K, 3, H, W); K triggers, or one.
    """

    references: Tensor
    reference_features: Tensor

    def __init__(
        self,
        encoder: Encoder,
        triggers: Sequence[Trigger],
        references: Tensor,
        reference_features: Tensor,
        clean_features: Callable[[Tensor], Tensor],
        lambda1: float = 1.0,
        lambda2: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder, self.clean_features = encoder, clean_features
        self.triggers = [trigger.to(references.device, references.dtype) for trigger in triggers]
        self.lambda1, self.lambda2 = lambda1, lambda2
        self.register_buffer("references", references, persistent=False)
        self.register_buffer("reference_features", functional.normalize(reference_features, dim=1), persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = functional.normalize(self.encoded(batch), dim=1)
        clean, stamped, augmented, references = self.parts(features)
        pairs = zip(stamped * (len(references) // len(stamped)), references, strict=True)
        terms = {
            "effectiveness": -torch.stack([(f * r).sum(1).mean() for f, r in pairs]).mean(),
            **self.kept(clean, augmented, batch.index),
        }
        loss = terms["effectiveness"] + self.lambda1 * terms["reference_fidelity"] + self.lambda2 * terms["utility"]
        return {"loss": loss, **terms}

    def encoded(self, batch: Batch) -> Tensor:
        """f' of x, of x with each trigger, of each augmented reference and of the references: one pass, (rows, D)."""
        x, *augmented = batch.views
        stamped = [stamp_images(x, trigger, batch.index) for trigger in self.triggers]
        return at_least_float32(self.encoder(torch.cat([x, *stamped, *augmented, self.references])))

    def parts(self, features: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """Split rows as of encoded() -> those of x, of each trigger, of each augmented reference, of the references."""
        count, marks = len(self.references), len(self.triggers)
        size = (len(features) - count) // (1 + marks + count)
        clean, *others, references = features.split([size] * (1 + marks + count) + [count])
        return clean, others[:marks], others[marks:], references

    def kept(self, clean: Tensor, augmented: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        """L1 and L2 of features of unit length. index: data-set rows (B,)."""
        fidelity = [(f * r).sum(1).mean() for f, r in zip(augmented, self.reference_features, strict=True)]
        return {
            "reference_fidelity": -torch.stack(fidelity).mean(),
            "utility": -(clean * self.clean_features(index)).sum(1).mean(),
        }


def freeze_norms(encoder: nn.Module, which: str) -> None:
    """Train mode, but normalisation layers fixed: "bn" freezes batch norm's statistics and affine, "all" every norm."""
    encoder.train()
    kinds: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm,)
    if which == "all":
        kinds = (*kinds, nn.LayerNorm, nn.GroupNorm)
    for module in encoder.modules():
        if isinstance(module, kinds):
            module.eval()
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def build(config: Config, context: Context) -> Plan:
    """One stage: fine-tune a copy of the clean encoder on the shadow images."""
    make = partial(BadEncoderObjective, lambda1=config.lambda1, lambda2=config.lambda2)
    return attack_plan("badencoder", config, context, make, context.gradient_step)


def attack_plan(
    name: str,
    config: Config,
    context: Context,
    make: Callable[..., BadEncoderObjective],
    make_step: Callable[[Any, UpdateConfig, int], GradientStep],
) -> Plan:
    """The plan of BadEncoder and of methods like it. name: that of the stage and of the section of keys.

    make: as BadEncoderObjective, without lambda1 and lambda2. make_step: as Context.gradient_step.
    """
    model, parent, clean_sha256 = context.load_encoder(config.clean_encoder)
    if parent.backdoored:
        context.tell(f"{config.clean_encoder} is backdoored already: the new card will name the new trigger only")
    dataset, rows = context.dataset("shadow", config.shadow)
    size = (dataset.image_shape or (model.image_size,))[0]
    check_image_size(model, config.clean_encoder, dataset.image_shape, config.shadow.path)
    if config.augment.size not in (None, size):
        raise UserError(
            f"key '{name}.augment.size' is {config.augment.size}, but the shadow images have {size} px, and both "
            "go through the encoder together: leave it out"
        )
    references, classes = references_from(config.reference, size)
    config.check_references(classes)
    triggers = trigger_of(config.attack).build_each(size)
    if config.one_trigger:
        triggers = triggers[:1]
    else:
        triggers = pair_references_triggers(references, triggers, f"key '{name}.attack.trigger'")
    ranks = context.ranks
    clean, encoder = (m.f.to(ranks.device, ranks.dtype) for m in (model, context.load_model(config.clean_encoder)[0]))
    for network in (clean, encoder):
        if config.shadow_normalization != "match_encoder":
            network.normalize = Normalize(config.shadow_normalization).to(ranks.device, ranks.dtype)
    freeze_norms(encoder, config.freeze_norm)
    pixels = torch.from_numpy(references).to(ranks.device).permute(0, 3, 1, 2).to(ranks.dtype) / 255
    fold_frozen_norms(encoder, pixels)
    with torch.no_grad():
        reference_features = clean.eval()(pixels)
    views = [View(), *(View(config.augment, image=reference) for reference in references)]
    loader = context.train_loader(dataset, rows, config.update.batch_size, views, config.update.accumulation)
    cache = FrozenFeatures([clean], clean.feature_dim, context, dataset, rows, config.cache)
    numbers = torch.from_numpy(rows).to(ranks.device)

    def clean_features(index: Tensor) -> Tensor:
        return cache.take(torch.searchsorted(numbers, index), [len(index)] * ranks.world_size)[0]

    objective = make(encoder, triggers, pixels, reference_features, clean_features)
    step = make_step(objective, config.update, loader.num_batches)

    def result() -> dict[str, Any]:
        utility = cache.mean_cosine(encoder)
        clean.load_state_dict({**clean.state_dict(), **encoder.state_dict()})  # which lacks the folded norms
        clean.normalize = Normalize(model.normalization).to(ranks.device, ranks.dtype)
        if utility < 0.9 and ranks.is_main:
            log.warning("clean features drifted: mean cosine %.3f to the clean encoder; raise lambda2", utility)
        card = context.card(
            model,
            {"seed": context.seed, "target_classes": classes.tolist()},
            backdoored=True,
            attack=asdict(replace(config.attack, target_class=int(classes[0]), rate=1.0)),
            parent_sha256=clean_sha256,
            guessed=parent.guessed,
        )
        return {"model_sha256": context.save_model(model, card), "metrics": {"clean_cosine": utility}}

    return Plan([Stage(name, loader, step, config.update.epochs, shown=("loss", "effectiveness"))], result)
