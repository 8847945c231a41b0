"""RNP (Reconstructive Neuron Pruning, Li et al. 2023): unlearn clean images, recover them by masks, prune low masks.

The objective is the published one; what the published code computes needlessly is left out. Nothing is tested while the
phases run (the stop rule reads the training accuracy), recovering takes gradients of the masks alone, and all
thresholds are tried in one pass over the data.
"""

import copy
import logging
import re
from array import array
from dataclasses import replace

import numpy as np
from torch import Tensor

from dist_defend.data.augment import View
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.files import read_regular
from dist_defend.methods.defend.rnp.masks import check_neurons, check_number, neuron_table, read_mask_values
from dist_defend.methods.defend.rnp.options import PRESETS, Config
from dist_defend.methods.defend.rnp.outcome import EVALUATION_BATCH, Outcome
from dist_defend.methods.defend.rnp.steps import RecoverStep, UnlearnStep
from dist_defend.models.classifier import Classifier
from dist_defend.models.masked_norm import mask_norms, norm_names
from dist_defend.screen import printable
from dist_defend.trial import Trial

__all__ = ["PRESETS", "Config", "build"]
log = logging.getLogger(__name__)

_MOST_BYTES = 16 << 20  # of a file of row numbers
_RATIO = 0.01  # of the training images, where nothing else says which ones the defender has


def build(config: Config, context: Context) -> Plan:
    """Two stages, unlearn and recover (none with a mask file); pruning and evaluation come with the result."""
    trial = Trial(config.model, context, "rnp.attack")
    model = trial.model
    dataset, rows = _defence_data(config, trial)
    trial.test_on(config.test, config.attack, batch_size=EVALUATION_BATCH)
    outcome = Outcome(config, trial, dataset, rows)
    names = norm_names(model.net)
    if config.adapt_statistics:
        _check_last_batch(len(rows), config.batch_size, world_size=1)
    if config.pruning_by == "number":
        check_number(model.net, names, config.pruning_max, config.pruning_step * config.off_by_one)
    if config.mask_file is not None:
        neurons = read_mask_values(config.mask_file)
        check_neurons(neurons, model.net, names, config.mask_file)
        trial.look(dataset, rows)
        return Plan([], lambda: outcome.result(neurons))
    phases = Phases(config, context, model, names, dataset, rows)
    trial.look(dataset, rows)
    return Plan(phases.stages, lambda: outcome.result(neuron_table(phases.masks)))


class Phases:
    """Unlearning a copy of the model, then masks on the copy's weights. masks: (C,) by layer of ``model.net``."""

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
        _check_last_batch(len(rows), config.batch_size, context.ranks.world_size)
        loader = context.train_loader(dataset, rows, config.batch_size, (View(config.augment),), drop_last=False)
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
        )
        recover = RecoverStep(
            masked, masks, context.ranks, alpha=config.alpha, lr=config.recovering_lr, graph=config.graph
        )
        self.accuracy = float("nan")

        def finish() -> None:
            self._check_unlearned()
            masked.load_state_dict(unlearned.state_dict())

        epochs = config.unlearning_epochs + config.epochs_inclusive
        self.stages = [
            Stage("unlearn", loader, self.unlearn, epochs, stop_when=self._is_unlearned, finish=finish),
            Stage("recover", loader, recover, config.recovering_epochs),
        ]

    def _is_unlearned(self) -> bool:
        self.accuracy = self.unlearn.read_accuracy()
        return self.accuracy <= self.config.clean_threshold

    def _check_unlearned(self) -> None:
        if self.unlearn.seen > 0:  # the last epoch that there is ends without a question
            self.accuracy = self.unlearn.read_accuracy()
        if self.accuracy <= self.config.clean_threshold:
            return
        told = f"unlearning ended at {self.accuracy:.3f} training accuracy, above clean_threshold"
        told = f"{told} {self.config.clean_threshold}: raise unlearning_epochs or unlearning_lr"
        if self.config.not_unlearned == "fail":
            raise UserError(f"{told}, or say not_unlearned: use_last")
        if self.is_main:
            log.warning("%s; going on with the last state, whose masks may mean little", told)


def _defence_data(config: Config, trial: Trial) -> tuple[PreparedDataset, np.ndarray]:
    data = config.data
    if config.ratio is not None or (data.fraction == 1 and data.max_samples is None and config.index is None):
        data = replace(data, fraction=config.ratio or _RATIO, subset="random")
    dataset, rows = trial.dataset("defence", data)
    if config.index is not None:
        rows = dataset.rows_of(_read_index(config.index, dataset.num_source_rows))
    return dataset, rows


def _read_index(path: str, count: int) -> np.ndarray:
    """Rows (M,) int64, ascending, of a text file of the source's row numbers, as BackdoorBench's log/index.txt is."""
    numbers = array("q")
    try:
        for word in re.finditer(rb"\S+", read_regular(path, _MOST_BYTES)):
            numbers.append(int(word[0]))
    except (OSError, ValueError, OverflowError) as error:
        told = printable(str(error), 100)
        raise UserError(f"key 'rnp.index': {path} is no text file of row numbers ({told}); write one a line") from error
    rows = np.unique(np.frombuffer(numbers, np.int64)) if numbers else np.empty(0, np.int64)
    if not len(rows) or rows[0] < 0 or rows[-1] >= count:
        raise UserError(f"key 'rnp.index': {path} must name rows 0 to {count - 1} of the data, at least one")
    return rows


def _check_last_batch(count: int, batch_size: int, world_size: int) -> None:
    """Every rank needs a share of the last batch, and batch norm at least two images."""
    rest = count % batch_size
    if 0 < rest < max(2, world_size):
        raise UserError(
            f"key 'rnp.batch_size' is {batch_size}: of {count} images {rest} are left for the last batch, too few for "
            f"batch norm on {world_size} rank(s); choose another batch size or number of images"
        )
