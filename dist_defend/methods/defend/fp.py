"""FP, fine-pruning (Liu, Dolan-Gavitt and Garg, RAID 2018), as BackdoorBench has it: prune dormant features, fine-tune.

a_j = mean over clean images of input j of the last linear layer; the columns of its weight with the lowest a_j become 0
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_defend.bounds import positive
from dist_defend.data.loader import Loader
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.dist import Ranks
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.methods.defend.pruning.masks import Candidate, Neuron, pruning_order
from dist_defend.methods.defend.pruning.options import PruningConfig
from dist_defend.methods.defend.pruning.outcome import Outcome
from dist_defend.methods.defend.tuning.options import TuningConfig
from dist_defend.methods.defend.tuning.plan import Tuned, tuning_plan
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.models.classifier import Classifier
from dist_defend.ops.collectives import all_reduce_sum


@dataclass(frozen=True, kw_only=True)
class Config(TuningConfig, PruningConfig):
    """Defaults: SCLBD/BackdoorBench's sweep and tuning, but the defender's images choose the stop.

    Keys:
        once_prune_ratio: share of the features by which each stop of the sweep prunes more than the one before
        rank_by: what is pruned first: signed (as published): the lowest mean feature; absolute: the lowest mean
            absolute value; the same where features come from a ReLU
        selection: images whose accuracy chooses the stop; test_data, as published, is not available to a defender
        include_failing_stop: deliver the first stop that loses more than max_accuracy_drop, as published, not the one
            before it
        off_by_one: prune one feature less at each stop than its number says, as published
        max_accuracy_drop: relative loss of accuracy that is allowed to a stop and, with ``held_out``, to an epoch
    """

    max_accuracy_drop: float = 0.1
    once_prune_ratio: float = 0.01
    rank_by: Literal["absolute", "signed"] = "absolute"
    selection: Literal["defence_data", "test_data"] = "defence_data"
    include_failing_stop: bool = False
    off_by_one: bool = False

    def __post_init__(self) -> None:
        TuningConfig.__post_init__(self)
        PruningConfig.__post_init__(self)
        positive(self, "once_prune_ratio")

    def stops(self, order: Sequence[Neuron]) -> tuple[list[Candidate], Candidate | None]:
        step = math.ceil(len(order) * self.once_prune_ratio)
        return [Candidate(None, n - self.off_by_one) for n in range(step, len(order), step)], None

    def pick(self, right: Sequence[int]) -> int:
        return min(super().pick(right) + self.include_failing_stop, len(right) - 1)


PRESETS: dict[str, dict[str, Any]] = {
    "official": {},
    "backdoorbench": {
        "rank_by": "signed",
        "selection": "test_data",
        "include_failing_stop": True,
        "off_by_one": True,
    },
}


def last_linear(net: nn.Module) -> str:
    """Name of the last linear layer, which is taken to make the logits. UserError for a network without one."""
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise UserError("fp prunes inputs of the last linear layer, and this network has none: choose another defence")
    return str(names[-1])


@torch.no_grad()
def mean_features(model: Classifier, name: str, loader: Loader, ranks: Ranks, absolute: bool) -> Tensor:
    """Mean input (C,) of the named layer, or mean absolute input, over the images of all ranks, in eval mode."""
    total = torch.zeros(model.net.get_parameter(f"{name}.weight").shape[1], dtype=torch.float64, device=ranks.device)

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0].abs() if absolute else inputs[0]
        total.add_(features.double().sum(0))

    handle = model.eval().net.get_submodule(name).register_forward_pre_hook(add)
    try:
        for batch in loader.epoch(0):
            model(batch.images.to(ranks.device, ranks.dtype))
    finally:
        handle.remove()
    return all_reduce_sum(total) / loader.num_samples


class PrunedStep(TuningStep):
    """Fine-tuning in which the pruned columns stay 0."""

    def __init__(self, config: Config, model: Classifier, name: str, **options: Any) -> None:
        super().__init__(model, config.optimizer, epochs=config.epochs, **options)
        self.weight = model.net.get_parameter(f"{name}.weight")
        self.kept = torch.ones_like(self.weight[0])  # (C,): 1, or 0 for a pruned column

    def prune(self, columns: Sequence[int]) -> None:
        """Set these columns to 0, now and after each update."""
        self.kept[list(columns)] = 0
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Set the pruned columns to 0 again."""
        self.weight.mul_(self.kept)

    def follow(self, scalars: dict[str, Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        told = super().follow(scalars, gradients)
        self.hold()
        return told

    def metrics(self) -> dict[str, Any]:
        return {"pruned_neurons": int((self.kept == 0).sum()), "neurons": len(self.kept)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.kept.copy_(state["kept"])


def build(config: Config, context: Context) -> Plan:
    """One stage, the tuning; before its first update columns are ranked and pruned to the chosen stop."""

    def make(tuned: Tuned) -> tuple[Sequence[Stage], TuningStep]:
        name = last_linear(tuned.model.net)
        step = PrunedStep(config, tuned.model, name, **tuned.options)
        outcome = Outcome(config, tuned.trial, (tuned.data, tuned.rows), scores_file="feature_means.txt")

        def prune() -> None:
            means = mean_features(tuned.model, name, tuned.loader, context.ranks, config.rank_by == "absolute")
            neurons = [Neuron(name, column, value) for column, value in enumerate(means.tolist())]
            stop = outcome.choose(neurons).stop
            step.prune([neuron.channel for neuron in pruning_order(neurons)[: stop.pruned]])

        context.at_start.append(prune)
        return (), step

    return tuning_plan(config, context, make, chosen_by=config.selection)
