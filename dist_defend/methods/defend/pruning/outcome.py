"""From masks to a pruned model: the table of stops, the choice by clean data, the choice by oracle, the result."""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dist_defend.counts import ORACLE, Count, agreeing
from dist_defend.data.loader import Loader
from dist_defend.data.store import PreparedDataset
from dist_defend.files import write_atomic
from dist_defend.methods.defend.pruning.masks import Candidate, Neuron, prune, pruning_order, write_mask_values
from dist_defend.methods.defend.pruning.options import NormPruningConfig, PruningConfig
from dist_defend.methods.defend.pruning.stops import predict_pruned
from dist_defend.models.batch_statistics import StatisticsShift
from dist_defend.trial import Trial

log = logging.getLogger(__name__)

EVALUATION_BATCH = 128  # images of a forward pass: so small that maps stay in a CPU's cache


class Choice(NamedTuple):
    """A stop, and the counts on the test data: unpruned, at the stop, and where test ASR is lowest."""

    stop: Candidate
    before: dict[str, Count]
    after: dict[str, Count]
    oracle: dict[str, Count] | None


class Outcome:
    """The way from scores of the suspect's neurons to the pruned model; the suspect is pruned in place."""

    def __init__(
        self,
        config: PruningConfig,
        trial: Trial,
        data: tuple[PreparedDataset, np.ndarray] | None,
        shift_batch: int | None = None,
        scores_file: str = "mask_values.txt",
    ) -> None:
        """data: the defender's images and their rows; None for a method without.

        shift_batch: size of the batches by which running statistics are adapted to the pruning; None: they stay.
        scores_file: the name of the table of scores in the run folder.
        """
        self.config, self.trial, self.context, self.model = config, trial, trial.context, trial.model
        self.test, self.data = trial.examination, data
        self.shift_batch, self.scores_file = shift_batch, scores_file
        self.with_beta = isinstance(config, NormPruningConfig) and config.prune_beta
        self.defence = None if data is None else self.context.eval_loader(*data, EVALUATION_BATCH)

    def result(self, neurons: Sequence[Neuron]) -> dict[str, Any]:
        """Choose, prune, save the model; the entries of result.json."""
        choice = self.choose(neurons)
        metrics = {
            "prune_threshold": choice.stop.threshold,
            "pruned_neurons": choice.stop.pruned,
            "neurons": len(neurons),
        }
        if self.defence is not None:
            metrics["defence_images"] = self.defence.num_samples
        entries = self.trial.result(
            self.model, choice.after, choice.before, chosen_by=self.config.selection, metrics=metrics
        )
        if choice.oracle is not None:
            entries["rows"].append(self.test.row(self.context.method + ORACLE, choice.oracle))
        return entries

    def choose(self, neurons: Sequence[Neuron]) -> Choice:
        """Write the scores and sweep.json, choose a stop, and prune the suspect to it."""
        config, context = self.config, self.context
        order = pruning_order(neurons)
        candidates, fixed = config.stops(order)
        stops = [Candidate(None, 0), *candidates, *([] if fixed is None else [fixed])]
        chosen, right = len(stops) - 1, []  # of the defender's images
        if self.defence is not None:
            on_defence, labels = self._predict(order, stops, self.defence)
            right = [Count(int((classes == labels).sum()), len(labels)) for classes in on_defence.T]
        counts: dict[int, dict[str, Count]] = {}
        if config.selection == "test_data":  # which no defender has
            counts = self._count(order, stops, range(len(stops)))
            right_of = [counts[number]["acc"] for number in range(len(stops))]
        else:
            right_of = right
        if fixed is None:
            chosen = config.pick([count.correct for count in right_of])
        if not counts:
            counts = self._count(order, stops, range(len(stops)) if config.full_table else sorted({0, chosen}))
        oracle = (
            choose_by_oracle(counts, config.acc_ratio) if config.full_table and self.test.attack is not None else None
        )
        table = [
            {
                **stop._asdict(),
                "chosen": number == chosen,
                "oracle": number == oracle,
                **({"acc_defence": right[number].plain()} if right else {}),
                **{name: count.plain() for name, count in counts.get(number, {}).items()},
            }
            for number, stop in enumerate(stops)
        ]
        if context.ranks.is_main:
            write_mask_values(context.folder / self.scores_file, neurons)
            write_atomic(context.folder / "sweep.json", json.dumps(table, indent=1) + "\n")
            log.info("pruned %d of %d neurons, threshold %s", stops[chosen].pruned, len(order), stops[chosen].threshold)
        prune(self.model.net, order[: stops[chosen].pruned], self.with_beta)
        if self._shift is not None:
            self._shift(self.model)
        return Choice(stops[chosen], counts[0], counts[chosen], None if oracle is None else counts[oracle])

    def _predict(self, order: Sequence[Neuron], stops: Sequence[Candidate], loader: Loader) -> tuple[Tensor, Tensor]:
        pruned = [stop.pruned for stop in stops]
        return predict_pruned(self.model, order, pruned, loader, self.context.ranks, self.with_beta, self._shift)

    @cached_property
    def _shift(self) -> StatisticsShift | None:
        """Adapts running statistics by all the defender's images, the same on every rank; None: they stay."""
        if self.shift_batch is None or self.data is None:
            return None
        ranks, loader = self.context.ranks, self.context.whole_loader(*self.data, self.shift_batch)
        return StatisticsShift(self.model, lambda: (b.images.to(ranks.device, ranks.dtype) for b in loader.epoch(0)))

    def _count(
        self, order: Sequence[Neuron], stops: Sequence[Candidate], tested: Sequence[int]
    ) -> dict[int, dict[str, Count]]:
        """Counts on the test data by number of the stop."""
        wanted = [stops[number] for number in tested]
        test = self.test
        with self.context.clock.measuring():
            on_clean, labels = self._predict(order, wanted, test.clean)
            on_triggered = None if test.triggered is None else self._predict(order, wanted, test.triggered)[0]
        counts = {}
        for column, number in enumerate(tested):
            clean = on_clean[:, column]
            stamped = None if on_triggered is None else on_triggered[:, column]
            counts[number] = test.counts(clean, stamped)
            if self.config.exclude_target_from_acc and test.target is not None:
                kept = labels != test.target
                counts[number]["acc"] = agreeing(clean[kept], labels[kept])
        return counts


def choose_by_oracle(counts: Mapping[int, dict[str, Count]], acc_ratio: float) -> int:
    """The stop of lowest test ASR, then highest ACC, whose ACC differs by less than acc_ratio of the first one's.

    BackdoorBench's choice of its best model. No defender has a triggered test set, so this is a reference only.
    """
    base = counts[0]["acc"].percent
    near = [n for n, count in counts.items() if abs(count["acc"].percent - base) < acc_ratio * base]
    return min(near or [0], key=lambda number: (counts[number]["asr"].percent, -counts[number]["acc"].percent))
