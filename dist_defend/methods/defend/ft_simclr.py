"""FT of an encoder: SimCLR's training goes on from the suspect and its projector, on clean unlabelled images.

L = NT-Xent(z, z'), z and z' of two views of an image; all weights, batch norms in train mode
"""

from dataclasses import dataclass
from typing import Any

from dist_defend.engine.context import Context, Plan
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.methods.defend.tuning.encoder import EncoderTuningConfig, encoder_plan
from dist_defend.methods.pretrain.simclr import SimCLRObjective


@dataclass(frozen=True, kw_only=True)
class Config(EncoderTuningConfig):
    """Defaults are JiePeng104/TSC's for SimCLR encoders."""

    update: UpdateConfig = UpdateConfig(
        batch_size=256, epochs=10, optimizer=OptimizerConfig("adam", lr=5e-5, weight_decay=1e-6, schedule="cosine")
    )


PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "pretrain": {"update": {"epochs": 50, "optimizer": {"lr": 1e-3, "schedule": "constant"}}},  # BadEncoder's
}


def build(config: Config, context: Context) -> Plan:
    """One stage; where the suspect has no projector, one before it that trains a fresh projector."""
    return encoder_plan(config, context, lambda model: SimCLRObjective(model, config.temperature))
