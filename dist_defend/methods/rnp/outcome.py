"""From masks to a pruned model: the table of stops, the choice by clean data, the choice by oracle, the result."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from dist_defend.attacks.poison import PoisonConfig, triggered
from dist_defend.data.loader import Loader
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context
from dist_defend.evaluate import Count, classifier_counts, der
from dist_defend.files import write_atomic
from dist_defend.methods.rnp.masks import (
    Candidate,
    Neuron,
    by_number,
    by_threshold,
    neuron_count,
    prune,
    pruning_order,
    write_mask_values,
)
from dist_defend.methods.rnp.options import Config
from dist_defend.methods.rnp.sweep import predict_pruned
from dist_defend.models.artifact import ModelCard
from dist_defend.models.batch_statistics import StatisticsShift
from dist_defend.models.classifier import Classifier

log = logging.getLogger(__name__)

_BATCH = 128  # images per pass of the sweep: small maps stay in a CPU's cache
Rows = tuple[PreparedDataset, np.ndarray]


class Outcome:
    """What RNP makes of the masks of ``model``, which it prunes in place in the end."""

    def __init__(
        self,
        config: Config,
        context: Context,
        model: Classifier,
        card: ModelCard,
        poison: PoisonConfig | None,
        defence: Rows,
        test: Rows,
    ) -> None:
        self.config, self.context, self.model, self.card, self.poison = config, context, model, card, poison
        self.task, (dataset, rows) = test[0].manifest.name, test
        self.defence = context.eval_loader(*defence, _BATCH)
        self.defence_rows = defence
        self.clean = context.eval_loader(dataset, rows, _BATCH)
        self.triggered = None if poison is None else context.eval_loader(triggered(dataset, poison), rows, _BATCH)

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
        oracle = choose_by_oracle(counts, config.acc_ratio) if config.full_table and self.poison is not None else None
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
        return {
            "model_sha256": context.save_model(self.model, self._pruned_card()),
            "rows": [
                {"run": context.folder.name, "kind": kind, "task": self.task, "seed": context.seed}
                | {name: count.plain() for name, count in counts[number].items()}
                for kind, number in (("rnp", chosen), ("rnp (oracle)", oracle))
                if number is not None
            ],
            "metrics": self._metrics(stops[chosen], len(order), counts[0], counts[chosen]),
        }

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
        on_clean, labels = self._predict(order, wanted, self.clean)
        on_triggered = None if self.triggered is None else self._predict(order, wanted, self.triggered)[0]
        counts = {}
        for column, number in enumerate(tested):
            clean = on_clean[:, column]
            stamped = None if on_triggered is None else on_triggered[:, column]
            counts[number] = classifier_counts(clean, stamped, labels, self.poison, self.model.num_classes)
            if self.config.exclude_target_from_acc and self.poison and self.poison.labels != "all_to_all":
                kept = labels != self.poison.target_class
                counts[number]["acc"] = Count(int((clean == labels)[kept].sum()), int(kept.sum()))
        return counts

    def _metrics(
        self, stop: Candidate, neurons: int, before: dict[str, Count], after: dict[str, Count]
    ) -> dict[str, Any]:
        rates = {"acc_before": before["acc"].percent}
        if self.poison is not None:
            rates |= {"asr_before": before["asr"].percent, "der": der(before, after)}
        pruned = {"prune_threshold": stop.threshold, "pruned_neurons": stop.pruned, "neurons": neurons}
        return {**rates, **pruned, "defence_images": self.defence.num_samples}

    def _pruned_card(self) -> ModelCard:
        provenance = {"method": "rnp", "data": self.context.digests, "seed": self.context.seed}
        return replace(self.card, backdoored=False, provenance=provenance)


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
