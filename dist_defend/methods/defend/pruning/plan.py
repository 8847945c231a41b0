"""The plans of pruning methods: the suspect, the defender's images, what is checked before the start."""

import re
from array import array
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from dist_defend.data.augment import View
from dist_defend.data.loader import DatasetConfig, Loader
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.files import read_regular
from dist_defend.methods.defend.pruning.masks import Neuron, check_neurons, check_number, neuron_table, read_mask_values
from dist_defend.methods.defend.pruning.options import MaskConfig, PruningConfig
from dist_defend.methods.defend.pruning.outcome import EVALUATION_BATCH, Outcome
from dist_defend.models.classifier import Classifier
from dist_defend.models.masked_norm import norm_names
from dist_defend.screen import printable
from dist_defend.trial import Trial

_MOST_BYTES = 16 << 20  # of a file of row numbers
_RATIO = 0.01  # of the training images, where nothing else says which ones the defender has


Learning = tuple[list[Stage], dict[str, Tensor]]  # the stages that learn masks, and the masks (C,) by layer of the net


def score_plan(
    config: PruningConfig,
    context: Context,
    data: DatasetConfig | None,
    score: Callable[[nn.Module, Tensor], list[Neuron]],
    scores_file: str,
) -> Plan:
    """No stages: a method that reads the weights alone scores at once. Pruning and evaluation come with the result.

    data: the defender's images, if there are any. score: gets the suspect's ``net`` in eval mode and a black image
    (1, 3, H, W). scores_file: the name of the table of scores in the run folder.
    """
    trial = Trial(config.model, context)
    chosen = None if data is None else trial.dataset("defence", data)
    trial.test_on(config.test, config.attack, batch_size=EVALUATION_BATCH)
    net, size = trial.model.eval().net, trial.model.image_size
    neurons = score(net, next(net.parameters()).new_zeros(1, 3, size, size))
    outcome = Outcome(config, trial, chosen, scores_file=scores_file)
    trial.look(*(chosen or ()))
    return Plan([], lambda: outcome.result(neurons))


def mask_plan(
    config: MaskConfig,
    context: Context,
    learn: Callable[[Classifier, list[str], PreparedDataset, np.ndarray], Learning],
) -> Plan:
    """The stages that learn the masks (none with a mask file); pruning and evaluation come with the result.

    learn: gets the suspect, the names of its batch norms, the defender's images and their rows. UserError for a suspect
    or images that do not fit, and for masks of another model.
    """
    trial = Trial(config.model, context)
    net = trial.model.net
    dataset, rows = _defence_data(config, trial)
    trial.test_on(config.test, config.attack, batch_size=EVALUATION_BATCH)
    outcome = Outcome(config, trial, (dataset, rows), config.batch_size if config.adapt_statistics else None)
    names = norm_names(net)
    if config.adapt_statistics:
        _check_last_batch(len(rows), config.batch_size, 1, context.method)
    if config.pruning_by == "number":
        wanted = (config.pruning_max, config.pruning_step * config.off_by_one)
        check_number(net, names, *wanted, key=f"{context.method}.pruning_max")
    if config.mask_file is not None:
        neurons = read_mask_values(config.mask_file)
        check_neurons(neurons, net, names, config.mask_file)
        trial.look(dataset, rows)
        return Plan([], lambda: outcome.result(neurons))
    stages, masks = learn(trial.model, names, dataset, rows)
    trial.look(dataset, rows)
    return Plan(stages, lambda: outcome.result(neuron_table(masks)))


def defence_loader(config: MaskConfig, context: Context, dataset: PreparedDataset, rows: np.ndarray) -> Loader:
    """The defender's images, shuffled and augmented; the last batch may be short. UserError if it is too short."""
    _check_last_batch(len(rows), config.batch_size, context.ranks.world_size, context.method)
    return context.train_loader(dataset, rows, config.batch_size, (View(config.augment),), drop_last=False)


def _defence_data(config: MaskConfig, trial: Trial) -> tuple[PreparedDataset, np.ndarray]:
    data = config.data
    if config.ratio is not None or (data.fraction == 1 and data.max_samples is None and config.index is None):
        data = replace(data, fraction=config.ratio or _RATIO, subset="random")
    dataset, rows = trial.dataset("defence", data)
    if config.index is not None:
        numbers = read_index(config.index, dataset.num_source_rows, f"{trial.context.method}.index")
        rows = dataset.rows_of(numbers)
    return dataset, rows


def read_index(path: str, count: int, key: str) -> np.ndarray:
    """Rows (M,) int64, ascending, of a text file of the source's row numbers, as BackdoorBench's log/index.txt is.

    UserError that names the key unless all of them are from 0 to count - 1.
    """
    numbers = array("q")
    try:
        for word in re.finditer(rb"\S+", read_regular(path, _MOST_BYTES)):
            numbers.append(int(word[0]))
    except (OSError, ValueError, OverflowError) as error:
        told = printable(str(error), 100)
        raise UserError(f"key '{key}': {path} is no text file of row numbers ({told}); write one a line") from error
    rows = np.unique(np.frombuffer(numbers, np.int64)) if numbers else np.empty(0, np.int64)
    if not len(rows) or rows[0] < 0 or rows[-1] >= count:
        raise UserError(f"key '{key}': {path} must name rows 0 to {count - 1} of the data, at least one")
    return rows


def _check_last_batch(count: int, batch_size: int, world_size: int, method: str) -> None:
    """Every rank needs a share of the last batch, and batch norm at least two images."""
    rest = count % batch_size
    if 0 < rest < max(2, world_size):
        raise UserError(
            f"key '{method}.batch_size' is {batch_size}: of {count} images {rest} are left for the last batch, too few "
            f"for batch norm on {world_size} rank(s); choose another batch size or number of images"
        )
