"""NC, Neural Cleanse (Wang et al., IEEE S&P 2019): find the trigger of each class, flag outliers, unlearn them.

A class whose smallest trigger is much smaller than the others' is flagged. The repair trains on the defender's images,
of which a fifth carries a flagged class's trigger and keeps its label. Where nothing is flagged nothing is trained.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_defend.attacks.trigger import blend
from dist_defend.batch import Batch
from dist_defend.bounds import positive
from dist_defend.detection import Detection, truth_of
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.step import Position
from dist_defend.engine.trainer import Stage
from dist_defend.files import write_atomic
from dist_defend.methods.defend.nc.search import SearchConfig, SearchStep, anomaly_indices
from dist_defend.methods.defend.tuning.options import TuningConfig
from dist_defend.methods.defend.tuning.plan import Tuned, tuning_plan
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.models.artifact import ModelCard


@dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
    """Defaults are SCLBD/BackdoorBench's.

    Keys:
        search: search for the trigger of each class
        anomaly_threshold: anomaly index above which a class is flagged
        stamped_share: share of the defender's images that carry a found trigger in the repair
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    anomaly_threshold: float = 2.0
    stamped_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "anomaly_threshold")
        if not 0 < self.stamped_share <= 1:
            raise ValueError(f"key 'stamped_share' is {self.stamped_share}; it must be above 0 and at most 1")


PRESETS: dict[str, dict[str, Any]] = {
    "official": {},
    "backdoorbench": {"search": {"normalise_first_rows": True}},
}


class RepairStep(TuningStep):
    """Fine-tuning in which some rows carry the flagged classes' triggers, in turn. No flagged class: no training.

    held: these rows, the last stamped_share of the defender's. index: anomaly indices (K,); nan before decide().
    """

    def __init__(self, config: Config, tuned: Tuned, search: SearchStep) -> None:
        super().__init__(tuned.model, config.optimizer, epochs=config.epochs, **tuned.options)
        self.config, self.search = config, search
        held = torch.zeros(len(tuned.data), dtype=torch.bool)
        held[torch.from_numpy(tuned.rows[int(len(tuned.rows) * (1 - config.stamped_share)) :])] = True
        self.held = held.to(search.masks.device)
        self.index = torch.full((len(search.classes),), torch.nan, dtype=torch.float64)

    @property
    def flagged(self) -> list[int]:
        """Flagged classes, the smallest mask first."""
        found = (self.index > self.config.anomaly_threshold).nonzero().flatten().tolist()
        return sorted(found, key=lambda number: -float(self.index[number]))

    def decide(self) -> None:
        """Compute the anomaly indices from the masks, after the search."""
        self.index.copy_(anomaly_indices(self.search.masks.flatten(1).abs().sum(1).double()))

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        if not self.flagged:
            return {"loss": torch.zeros((), device=batch.images.device)}
        chosen = torch.tensor(self.flagged).to(batch.index.device, non_blocking=True)[batch.index % len(self.flagged)]
        mask = self.search.masks[chosen] * self.held[batch.index, None, None, None]
        stamped = blend(batch.images, mask, self.search.patterns[chosen])
        return super().__call__(batch._replace(views=(stamped,)), at)

    def is_over(self) -> bool:
        return not self.flagged

    def detection(self, card: ModelCard) -> Detection:
        """The verdict by the largest index; none where it is not finite, as when most mask norms are equal."""
        index = float(self.index.max())
        score = index if math.isfinite(index) else None
        return Detection(
            detector="nc", quantity="anomaly index", score=score, low=score, high=score,
            bound=self.config.anomaly_threshold, flags="above", truth=truth_of(card),
        )  # fmt: skip

    def metrics(self) -> dict[str, Any]:
        return {"anomaly_index": float(self.index.max()), "flagged_classes": self.flagged}

    def state_dict(self) -> dict[str, Any]:
        found = {"index": self.index, "masks": self.search.masks, "patterns": self.search.patterns}
        return {**super().state_dict(), "found": found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        found = state["found"]
        for own, name in ((self.index, "index"), (self.search.masks, "masks"), (self.search.patterns, "patterns")):
            own.copy_(found[name])


def build(config: Config, context: Context) -> Plan:
    """Two stages, search and repair. The result has a row for the defence and one for the detector."""
    made: list[tuple[Tuned, RepairStep]] = []

    def make(tuned: Tuned) -> tuple[Sequence[Stage], TuningStep]:
        own = {name: tuned.options[name] for name in ("ranks", "graph")}
        classes = range(tuned.model.num_classes)
        search = SearchStep(tuned.model, config.search, classes, num_batches=tuned.loader.num_batches, **own)
        repair = RepairStep(config, tuned, search)
        made.append((tuned, repair))

        def finish() -> None:
            if search.batches[0] > 0:  # stop_when is not asked after the last epoch
                search.end_epoch()
            repair.decide()
            if context.ranks.is_main:
                names = tuned.data.classes
                table = [
                    {
                        "class": names[k],
                        "mask_norm": float(norm),
                        "anomaly_index": index,
                        "flagged": k in repair.flagged,
                    }
                    for k, (norm, index) in enumerate(
                        zip(search.masks.flatten(1).sum(1).tolist(), repair.index.tolist(), strict=True)
                    )
                ]
                write_atomic(context.folder / "anomalies.json", json.dumps(table, indent=1) + "\n")
                found = {"masks": search.masks.cpu().contiguous(), "patterns": search.patterns.cpu().contiguous()}
                save_file(found, context.folder / "triggers.safetensors")

        shown = "loss", "mask_norm"
        stage = Stage(
            "search", tuned.loader, search, config.search.epochs, stop_when=search.end_epoch, finish=finish, shown=shown
        )
        return (stage,), repair

    plan = tuning_plan(config, context, make)
    ((tuned, repair),) = made

    def result() -> dict[str, Any]:
        entries = plan.result()
        detected = repair.detection(tuned.trial.card).row(context, tuned.data.manifest.name)
        return {**entries, "rows": [*entries["rows"], detected]}

    return Plan(plan.stages, result)
