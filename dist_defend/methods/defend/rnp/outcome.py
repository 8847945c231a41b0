"""From masks to a pruned model: the table of stops, the choice by clean data, the choice by oracle, the result."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from dist_defend.data.loader import Loader
from dist_defend.data.store import PreparedDataset
from dist_defend.evaluate import Count, agreeing
from dist_defend.files import write_atomic
from dist_defend.methods.defend.rnp.masks import (
    Candidate,
    Neuron,
    by_number,
    by_threshold,
    neuron_count,
    prune,
    pruning_order,
    write_mask_values,
)
from dist_defend.methods.defend.rnp.options import Config
from dist_defend.methods.defend.rnp.sweep import predict_pruned
from dist_defend.models.batch_statistics import StatisticsShift
from dist_defend.trial import Trial

log = logging.getLogger(__name__)

EVALUATION_BATCH = 128  # images per pass of the sweep: small maps stay in a CPU's cache


class Outcome:
    """What RNP makes of the masks of the suspect, which it prunes in place in the end."""

    def __init__(self, config: Config, trial: Trial, dataset: PreparedDataset, rows: np.ndarray) -> None:
        """dataset, rows: the defender's images."""
        self.config, self.trial, self.context, self.model = config, trial, trial.context, trial.model
        self.test = trial.examination
        self.defence = self.context.eval_loader(dataset, rows, EVALUATION_BATCH)
        self.defence_rows = dataset, rows

    def result(self, neurons: Sequence[Neuron]) -> dict[str, Any]:
        """Write mask_values.txt and sweep.json, choose, prune, save the model; the entries of result.json."""
        config, context = self.config, self.context
        order = pruning_order(neurons)
        stops = [Candidate(None, 0), *self._candidates(order)]
        on_defence, labels = self._predict(order, stops, self.defence)
        right = [int((classes == labels).sum()) for classes in on_defence.T]
        chosen = len(stops) - 1
        if config.selection == "defence_data":
            chosen = choose_by_clean_data(right, config.max_accuracy_drop)
        tested = range(len(stops)) if config.full_table else sorted({0, chosen})
        counts = self._count(order, stops, tested)
        oracle = (
            choose_by_oracle(counts, config.acc_ratio) if config.full_table and self.test.attack is not None else None
        )
        table = [
            {
                **stop._asdict(),
                "chosen": number == chosen,
                "oracle": number == oracle,
                "acc_defence": Count(right[number], len(labels)).plain(),
                **{name: count.plain() for name, count in counts.get(number, {}).items()},
            }
            for number, stop in enumerate(stops)
        ]
        if context.ranks.is_main:
            write_mask_values(context.folder / "mask_values.txt", neurons)
            write_atomic(context.folder / "sweep.json", json.dumps(table, indent=1) + "\n")
            log.info("pruned %d of %d neurons, threshold %s", stops[chosen].pruned, len(order), stops[chosen].threshold)
        prune(self.model.net, order[: stops[chosen].pruned], config.prune_beta)
        if self._adapt is not None:
            self._adapt(self.model)
        metrics = {
            "prune_threshold": stops[chosen].threshold,
            "pruned_neurons": stops[chosen].pruned,
            "neurons": len(order),
            "defence_images": self.defence.num_samples,
        }
        entries = self.trial.result(
            "rnp", self.model, counts[chosen], counts[0], chosen_by=config.selection, metrics=metrics
        )
        if oracle is not None:
            entries["rows"].append(self.test.row("rnp (oracle)", counts[oracle]))
        return entries

    def _candidates(self, order: Sequence[Neuron]) -> list[Candidate]:
        config, extra = self.config, self.config.off_by_one
        if config.pruning_by == "threshold":
            candidates = by_threshold(order, config.pruning_max, config.pruning_step)
            fixed = Candidate(config.pruning_number, neuron_count(order, config.pruning_number))
        else:
            candidates = by_number(config.pruning_max, config.pruning_step, extra)
            fixed = Candidate(None, math.ceil(config.pruning_number) * (1 + extra))
        return [*candidates, fixed] if config.selection == "pruning_number" else candidates

    def _predict(self, order: Sequence[Neuron], stops: Sequence[Candidate], loader: Loader) -> tuple[Tensor, Tensor]:
        pruned = [stop.pruned for stop in stops]
        return predict_pruned(
            self.model, order, pruned, loader, self.context.ranks, self.config.prune_beta, self._adapt
        )

    @cached_property
    def _adapt(self) -> StatisticsShift | None:
        """On every rank alike, from all the defender's images."""
        if not self.config.adapt_statistics:
            return None
        ranks, loader = self.context.ranks, self.context.whole_loader(*self.defence_rows, self.config.batch_size)
        return StatisticsShift(self.model, lambda: (b.images.to(ranks.device, ranks.dtype) for b in loader.epoch(0)))

    def _count(
        self, order: Sequence[Neuron], stops: Sequence[Candidate], tested: Sequence[int]
    ) -> dict[int, dict[str, Count]]:
        """Counts on the test data by number of the stop."""
        wanted = [stops[number] for number in tested]
        test = self.test
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


def choose_by_clean_data(right: Sequence[int], max_drop: float) -> int:
    """The last stop before the first that costs more than max_drop of what stop 0 gets right, relatively.

    right: images of the defender that each stop classifies as their label. Nothing of the attack is looked at.
    """
    lost = [number for number, count in enumerate(right) if count < right[0] * (1 - max_drop)]
    return (lost[0] if lost else len(right)) - 1


def choose_by_oracle(counts: Mapping[int, dict[str, Count]], acc_ratio: float) -> int:
    """The stop of lowest test ASR, then highest ACC, whose ACC differs by less than acc_ratio of the first one's.

    What BackdoorBench computes as its best model. No defender has a triggered test set: never more than a reference.
    """
    base = counts[0]["acc"].percent
    near = [n for n, count in counts.items() if abs(count["acc"].percent - base) < acc_ratio * base]
    return min(near or [0], key=lambda number: (counts[number]["asr"].percent, -counts[number]["acc"].percent))
