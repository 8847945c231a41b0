"""The plans of pruning methods: the suspect, the defender's images, and checks before the start."""

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from dist_defend.data.loader import DatasetConfig
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.methods.defend.defender import check_last_batch, defence_data
from dist_defend.methods.defend.pruning.masks import Neuron, check_neurons, check_number, neuron_table, read_mask_values
from dist_defend.methods.defend.pruning.options import MaskConfig, PruningConfig
from dist_defend.methods.defend.pruning.outcome import EVALUATION_BATCH, Outcome
from dist_defend.models.classifier import Classifier
from dist_defend.models.masked_norm import norm_names
from dist_defend.trial import Trial

Learning = tuple[list[Stage], dict[str, Tensor]]  # the stages that learn masks, and the masks (C,) by layer of the net


def score_plan(
    config: PruningConfig,
    context: Context,
    data: DatasetConfig | None,
    score: Callable[[nn.Module, Tensor], list[Neuron]],
    scores_file: str,
) -> Plan:
    """No stages, as only the weights are read: scores are made here. Pruning and evaluation are part of the result.

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
    """The stages that learn the masks (none with a mask file). Pruning and evaluation are part of the result.

    learn: gets the suspect, the names of its batch norms, the defender's images and their rows. UserError for a suspect
    or images that do not fit, and for masks of another model.
    """
    trial = Trial(config.model, context)
    net = trial.model.net
    dataset, rows = defence_data(config, trial)
    trial.test_on(config.test, config.attack, batch_size=EVALUATION_BATCH)
    outcome = Outcome(config, trial, (dataset, rows), config.batch_size if config.adapt_statistics else None)
    names = norm_names(net)
    if config.adapt_statistics:
        check_last_batch(len(rows), config.batch_size, 1, context.method)
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
