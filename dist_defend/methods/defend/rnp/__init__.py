"""RNP (Reconstructive Neuron Pruning, Li et al. 2023): unlearn clean images, recover them by masks, prune low masks.

The objectives are the published ones; what the published code computes without need is left out. Nothing is tested
while the phases run (the stop rule reads the training accuracy), recovering takes gradients of the masks alone, and all
thresholds are tried in one pass over the data.
"""

import copy
import logging

import numpy as np
from torch import Tensor

from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.methods.defend.defender import defence_loader
from dist_defend.methods.defend.pruning.plan import Learning, mask_plan
from dist_defend.methods.defend.rnp.options import PRESETS, Config
from dist_defend.methods.defend.rnp.steps import RecoverStep, UnlearnStep
from dist_defend.models.classifier import Classifier
from dist_defend.models.masked_norm import mask_norms

__all__ = ["PRESETS", "Config", "build"]
log = logging.getLogger(__name__)


def build(config: Config, context: Context) -> Plan:
    """Two stages, unlearn and recover (none with a mask file). Pruning and evaluation are part of the result."""

    def learn(model: Classifier, names: list[str], dataset: PreparedDataset, rows: np.ndarray) -> Learning:
        phases = Phases(config, context, model, names, dataset, rows)
        return phases.stages, phases.masks

    return mask_plan(config, context, learn)


class Phases:
    """Unlearning a copy of the model, then learning masks on its weights. masks: (C,) by layer of ``model.net``."""

    masks: dict[str, Tensor]

    def __init__(
        self,
        config: Config,
        context: Context,
        model: Classifier,
        names: list[str],
        dataset: PreparedDataset,
        rows: np.ndarray,
    ) -> None:
        self.config, self.is_main = config, context.ranks.is_main
        loader = defence_loader(config, context, dataset, rows)
        unlearned, masked = copy.deepcopy(model), copy.deepcopy(model)
        for copied in (unlearned, masked):
            context.synchronise(copied)
        masks = mask_norms(masked.net, names)
        self.masks = {name: mask.detach() for name, mask in masks.items()}
        self.unlearn = UnlearnStep(
            unlearned,
            context.ranks,
            lr=config.unlearning_lr,
            schedule=config.schedule,
            max_grad_norm=config.max_grad_norm,
            graph=config.graph,
            num_batches=loader.num_batches,
        )
        recover = RecoverStep(
            masked,
            masks,
            context.ranks,
            alpha=config.alpha,
            lr=config.recovering_lr,
            graph=config.graph,
            num_batches=loader.num_batches,
        )
        self.accuracy = float("nan")

        def finish() -> None:
            self._check_unlearned()
            self.unlearn.update.let_go()
            masked.load_state_dict(unlearned.state_dict())

        epochs = config.unlearning_epochs + config.epochs_inclusive
        shown = "loss", "accuracy"
        self.stages = [
            Stage("unlearn", loader, self.unlearn, epochs, stop_when=self._is_unlearned, finish=finish, shown=shown),
            Stage("recover", loader, recover, config.recovering_epochs, shown=shown),
        ]

    def _is_unlearned(self) -> bool:
        self.accuracy = self.unlearn.read_accuracy()
        return self.accuracy <= self.config.clean_threshold

    def _check_unlearned(self) -> None:
        if self.unlearn.seen > 0:  # stop_when is not asked after the last epoch
            self.accuracy = self.unlearn.read_accuracy()
        if self.accuracy <= self.config.clean_threshold:
            return
        told = f"unlearning ended at {self.accuracy:.3f} training accuracy, above clean_threshold"
        told = f"{told} {self.config.clean_threshold}: raise unlearning_epochs or unlearning_lr"
        if self.config.not_unlearned == "fail":
            raise UserError(f"{told}, or say not_unlearned: use_last")
        if self.is_main:
            log.warning("%s; going on with the last state, whose masks may mean little", told)
