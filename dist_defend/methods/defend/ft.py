"""FT, fine-tuning: the suspect is trained further on a few clean labelled images (Liu, Dolan-Gavitt and Garg 2018).

L = CE(f(x), y), all weights, batch norms in train mode
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.methods.defend.tuning.options import TuningConfig
from dist_defend.methods.defend.tuning.plan import Tuned, tuning_plan
from dist_defend.methods.defend.tuning.step import TuningStep


@dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
    """Defaults are SCLBD/BackdoorBench's."""


PRESETS: dict[str, dict[str, Any]] = {
    "backdoorbench": {},
    "nad": {  # bboylyg/NAD calls its own loop without attention "Finetuning"
        "batch_size": 64,
        "epochs": 20,
        "optimizer": {
            "name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4,
            "schedule": "multistep", "milestones": [2, 20, 20],
        },
    },
}  # fmt: skip


def build(config: Config, context: Context) -> Plan:
    """One stage."""

    def make(tuned: Tuned) -> tuple[Sequence[Stage], TuningStep]:
        return (), TuningStep(tuned.model, config.optimizer, epochs=config.epochs, **tuned.options)

    return tuning_plan(config, context, make)
