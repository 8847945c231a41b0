"""ANP (Wu and Wang, NeurIPS 2021): adversarial neuron pruning, by masks learned under perturbed scales.

    n, b = argmax CE((m + n) gamma x_hat + (1 + b) beta),   m = argmin alpha CE(m) + (1 - alpha) CE(m + n, 1 + b)

gamma, beta: scale and shift of a batch norm; x_hat: its normalised input; m: its mask (C,), in [0, 1]. n and b start
uniform in [-eps, eps] and move by sign steps of eps / steps. Channels with low masks are pruned.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.bounds import not_negative, positive, share
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position
from dist_defend.engine.trainer import Stage
from dist_defend.methods.defend.defender import defence_loader
from dist_defend.methods.defend.pruning.options import MaskConfig
from dist_defend.methods.defend.pruning.plan import Learning, mask_plan
from dist_defend.models.classifier import Classifier
from dist_defend.models.masked_norm import PerturbedNorm, mask_norms
from dist_defend.ops.collectives import all_reduce_sum, world_size
from dist_defend.ops.hypergrad import all_reduce_together
from dist_defend.ops.streams import Stream, draws


@dataclass(frozen=True, kw_only=True)
class Config(MaskConfig):
    """Names and defaults are those of csdongxian/ANP_backdoor.

    Keys:
        eps: perturbations start uniform in [-eps, eps] and then move by eps in all; 0: no perturbed loss
        steps: sign-gradient steps of the perturbations in each update, of size eps / steps
        project: clip the perturbations to [-eps, eps] after their steps; false as published: they reach 2 eps
        alpha: weight of the clean loss; the perturbed loss has weight 1 - alpha
        lr: learning rate of the masks; BackdoorBench: 0.01
        iterations: updates of the masks, rounded up to whole passes over the defender's images
    """

    eps: float = 0.4
    steps: int = 1
    project: bool = False
    alpha: float = 0.2
    lr: float = 0.2
    iterations: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "lr", "steps", "iterations")
        not_negative(self, "eps")
        share(self, "alpha")


PRESETS: dict[str, dict[str, Any]] = {"official": {}, "backdoorbench": {"lr": 0.01, "ratio": 0.05, "batch_size": 256}}


class AnpObjective(Objective):
    """alpha CE + (1 - alpha) CE under the perturbation found; the masks are trained, the network is in train mode."""

    def __init__(self, model: Classifier, names: Sequence[str], config: Config) -> None:
        super().__init__()
        masks = mask_norms(model.net, list(names), PerturbedNorm)
        model.train().requires_grad_(False)
        self.masks = nn.ParameterList(mask.requires_grad_(True) for mask in masks.values())
        self.config, self.by_layer = config, masks  # the parameters: over several ranks their memory changes
        self._model = [model]  # in a list, so that it is no submodule: only masks are trained
        self._norms: list[Any] = [model.net.get_submodule(name) for name in names]
        self.generator = torch.Generator(self.masks[0].device)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        count = all_reduce_sum(torch.full((), float(len(batch.labels)), device=batch.labels.device))

        def cross_entropy() -> Tensor:
            """This rank's share of the mean over the global batch."""
            logits = at_least_float32(self._model[0](batch.images))
            return functional.cross_entropy(logits, batch.labels, reduction="sum") / count

        alpha, robust = self.config.alpha, torch.zeros_like(count)
        if self.config.eps:
            self.perturb(self._worst(cross_entropy))
            robust = cross_entropy()
            self.perturb(None)
        natural = cross_entropy()
        loss = (alpha * natural + (1 - alpha) * robust) * world_size()
        return {"loss": loss, "cross_entropy": natural * world_size(), "robust": robust * world_size()}

    def draw(self) -> list[Tensor]:
        """n and b of each norm in turn, (C,) each, uniform in [-eps, eps]; the same on all ranks."""
        eps, like = self.config.eps, [mask for mask in self.masks for _ in range(2)]
        return [torch.empty_like(mask).uniform_(-eps, eps, generator=self.generator) for mask in like]

    def _worst(self, cross_entropy: Any) -> list[Tensor]:
        eps, rate, found = self.config.eps, self.config.eps / self.config.steps, self.draw()
        for _ in range(self.config.steps):
            found = [tensor.detach().requires_grad_(True) for tensor in found]
            self.perturb(found)
            slopes = all_reduce_together(list(torch.autograd.grad(cross_entropy(), found)))
            found = [tensor.detach() + rate * slope.sign() for tensor, slope in zip(found, slopes, strict=True)]
        return [tensor.clamp(-eps, eps) for tensor in found] if self.config.project else found

    def perturb(self, found: Sequence[Tensor] | None) -> None:
        """Set n and b of each norm, in the order of draw(); None removes them."""
        for number, norm in enumerate(self._norms):
            pair = (None, None) if found is None else found[2 * number : 2 * number + 2]
            norm.scale_noise, norm.shift_noise = pair


class AnpStep:
    """SGD on the masks, which are clamped to [0, 1] after each update; the momentum is not."""

    def __init__(self, update: GradientStep, objective: AnpObjective, seed: int) -> None:
        self.update, self.objective, self.seed = update, objective, seed

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        self.seed_draws(at)
        scalars = self.update(batch, at)
        with torch.no_grad():
            for mask in self.objective.masks:
                mask.clamp_(0, 1)
        return scalars

    def seed_draws(self, at: Position) -> None:
        """Seed the perturbations by (seed, step), so that they are the same on every rank and after a resume."""
        first = draws(self.seed, Stream.NEURON_NOISE, at.step).integers(2**62)
        self.objective.generator.manual_seed(int(first))

    def state_dict(self) -> dict[str, Any]:
        return self.update.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update.load_state_dict(state)


def build(config: Config, context: Context) -> Plan:
    """One stage, which learns the masks (none with a mask file). Pruning and evaluation are part of the result."""

    def learn(model: Classifier, names: list[str], dataset: PreparedDataset, rows: np.ndarray) -> Learning:
        loader = defence_loader(config, context, dataset, rows)
        masked = copy.deepcopy(model)
        context.synchronise(masked)
        objective = AnpObjective(masked, names, config)
        epochs = -(-config.iterations // loader.num_batches)
        sgd = OptimizerConfig("sgd", lr=config.lr, momentum=0.9)
        update = UpdateConfig(config.batch_size, epochs, optimizer=sgd)
        step = AnpStep(context.gradient_step(objective, update, loader.num_batches), objective, context.seed)
        stage = Stage("anp", loader, step, epochs, shown=("loss", "robust"))
        return [stage], dict(objective.by_layer)

    return mask_plan(config, context, learn)
