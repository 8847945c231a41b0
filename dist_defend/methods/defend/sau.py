"""SAU (Wei et al., NeurIPS 2023): shared adversarial unlearning, of examples that fool suspect and tuned model alike.

    delta = argmin b1 L_adv + b2 L_js over |delta| <= bound, per image,   w: l1 CE(x) + l2 CE(x + delta) + l3 L_shared

The weights w of the tuned model, a copy of the frozen suspect at first, minimise the sum at the right. L_adv: minus the
cross-entropy of both networks at x + delta; L_js: their Jensen-Shannon divergence there. L_shared lowers the tuned
model's probability of the class that the suspect predicts for x + delta, where that is neither the label nor the
suspect's prediction for x. Both are in eval mode.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.bounds import at_least_one, not_negative, positive
from dist_defend.data.augment import AugmentConfig
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.objective import at_least_float32
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.trainer import Stage
from dist_defend.methods.defend.tuning.options import TuningConfig
from dist_defend.methods.defend.tuning.plan import Tuned, tuning_plan
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.models.classifier import Classifier

_LEAST = 1e-8  # lower bound of a probability within a logarithm
_NEAR = 1e-3  # probability below which L_shared is constant


@dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
    """Defaults are SCLBD/BackdoorBench's. The learning rate is constant, as its cosine schedule is never stepped.

    Keys:
        bound: largest absolute value of delta, for pixels in [0, 1]
        step_size: size of each sign-gradient step of delta
        attack_steps: sign-gradient steps of delta for each batch
        beta_adv: b1, weight of L_adv in the search for delta
        beta_js: b2, weight of L_js in the search for delta
        weight_clean: l1, weight of the cross-entropy at x
        weight_adversarial: l2, weight of the cross-entropy at x + delta
        weight_shared: l3, weight of L_shared
    """

    bound: float = 0.2
    step_size: float = 0.2
    attack_steps: int = 5
    beta_adv: float = 0.01
    beta_js: float = 1.0
    weight_clean: float = 1.0
    weight_adversarial: float = 0.0
    weight_shared: float = 1.0
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop="none"))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adam", 1e-4, amsgrad=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "bound", "step_size")
        at_least_one(self, "attack_steps")
        not_negative(self, "beta_adv", "beta_js", "weight_clean", "weight_adversarial", "weight_shared")


PRESETS: dict[str, dict[str, Any]] = {"backdoorbench": {}}


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the softmax of each row, (B, C) twice -> (B,)."""
    p, q = (logits.softmax(1).clamp_min(_LEAST) for logits in (first, second))
    middle = ((p + q) / 2).log()
    return ((p * (p.log() - middle)).sum(1) + (q * (q.log() - middle)).sum(1)) / 2


class SharedStep(TuningStep):
    """Sign steps of delta from +bound, then one update of the weights.

    The steps do not end early: where both networks are fooled into one class, an image's gradient is 0 and delta stays.
    """

    in_train_mode = False

    def __init__(self, config: Config, model: Classifier, **options: Any) -> None:
        self.config, self.reference = config, copy.deepcopy(model).eval().requires_grad_(False)
        super().__init__(model, config.optimizer, epochs=config.epochs, **options)

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """The perturbation delta (B, 3, H, W) of images (B, 3, H, W), in [-bound, bound]."""
        config, networks = self.config, (self.model, self.reference)
        with torch.no_grad():
            before = [network(images).argmax(1) for network in networks]
        delta = torch.full_like(images, config.bound)
        for _ in range(config.attack_steps):
            delta.requires_grad_(True)
            logits = [at_least_float32(network(images + delta)) for network in networks]
            after = [each.detach().argmax(1) for each in logits]
            fooled = [now != then for now, then in zip(after, before, strict=True)]
            is_shared = fooled[0] & fooled[1] & (after[0] == after[1])
            errors = [functional.cross_entropy(each, labels, reduction="none") for each in logits]
            adversarial = -sum((error * ~done).sum() for error, done in zip(errors, fooled, strict=True)) / 2
            apart = (divergence(*logits) * ~is_shared).sum()
            slope = torch.autograd.grad(config.beta_adv * adversarial + config.beta_js * apart, delta)[0]
            delta = (delta.detach() - config.step_size * slope.sign()).clamp(-config.bound, config.bound)
        return delta

    def loss(self, images: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Tensor]:
        config, delta = self.config, self.perturb(images, labels)
        with torch.no_grad():
            said, wanted = self.reference(images).argmax(1), self.reference(images + delta).argmax(1)
        clean, perturbed = at_least_float32(self.model(torch.cat([images, images + delta]))).chunk(2)
        errors = [functional.cross_entropy(logits, labels, reduction="sum") for logits in (clean, perturbed)]
        p = perturbed.softmax(1).gather(1, wanted[:, None])[:, 0]
        logs = (1e-6 + (1 - p).clamp_max(1 - _NEAR)).log() + (1 + 1e-6 - p.clamp_min(_NEAR)).log()
        shared = -(logs * ((wanted != labels) & (wanted != said))).sum() / 2
        terms = {"cross_entropy": errors[0], "adversarial": errors[1], "shared": shared}
        weights = config.weight_clean, config.weight_adversarial, config.weight_shared
        total = sum(factor * term for factor, term in zip(weights, terms.values(), strict=True))
        return {name: term * weight for name, term in {"loss": total, **terms}.items()}


def build(config: Config, context: Context) -> Plan:
    """One stage."""

    def make(tuned: Tuned) -> tuple[Sequence[Stage], TuningStep]:
        return (), SharedStep(config, tuned.model, **tuned.options)

    return tuning_plan(config, context, make, ("loss", "shared"))
