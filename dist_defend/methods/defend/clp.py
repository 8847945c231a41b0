"""CLP (Zheng et al., ECCV 2022): channel Lipschitz pruning, which reads the weights alone.

W_k is the (C_in, kh kw) kernel of channel k in the convolution before a batch norm, gamma_k its scale and v_k its
running variance: lip_k = |gamma_k| / sqrt(v_k) sigma_max(W_k). Pruned: lip_k > mean + u std over its layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor, nn

from dist_defend.bounds import not_negative
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.context import Context, Plan
from dist_defend.errors import UserError
from dist_defend.methods.defend.pruning.masks import Candidate, Neuron
from dist_defend.methods.defend.pruning.options import NormPruningConfig
from dist_defend.methods.defend.pruning.plan import score_plan
from dist_defend.models.pairing import pair_norms
from dist_defend.ops.lipschitz import channel_lipschitz


@dataclass(frozen=True, kw_only=True)
class Config(NormPruningConfig):
    """Defaults: u of rkteddy/channel-Lipschitzness-based-pruning, the sweep of SCLBD/BackdoorBench.

    Keys:
        data: the defender's clean labelled images; required only by selection: defence_data
        selection: u: deliver the model pruned at ``u``; defence_data: that of the lowest u of the sweep whose loss of
            accuracy is within max_accuracy_drop
        u: a channel is pruned if its constant exceeds the mean of its layer by more than u standard deviations
        u_min, u_max: ends of the sweep, which goes down from u_max
        u_num: number of values of u in the sweep
        pairing: convolution that belongs to a batch norm: published: the last one before it in module order; dataflow:
            the one whose output the norm reads
    """

    data: DatasetConfig | None = None
    prune_beta: bool = True
    selection: Literal["u", "defence_data"] = "u"
    u: float = 3.0
    u_min: float = 0.0
    u_max: float = 10.0
    u_num: int = 21
    pairing: Literal["published", "dataflow"] = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "u", "u_min", "u_max")
        if self.u_num < 1 or self.u_max < self.u_min:
            raise ValueError(f"key 'u_num' is {self.u_num}, from u_max to u_min; say 1 or more, and u_max >= u_min")
        if self.selection == "defence_data" and self.data is None:
            raise ValueError("key 'selection' is defence_data, but 'data' is missing; name the defender's images")

    def stops(self, order: Sequence[Neuron]) -> tuple[list[Candidate], Candidate | None]:
        scores, us = [neuron.score for neuron in order], np.linspace(self.u_max, self.u_min, self.u_num).tolist()
        *candidates, fixed = [Candidate(u, sum(score < -u for score in scores)) for u in (*us, self.u)]
        return candidates, fixed if self.selection == "u" else None


def channel_scores(net: nn.Module, pairs: Mapping[str, str]) -> list[Neuron]:
    """Score -(lip - mean) / std of each channel; pairs: norm -> convolution. UserError if a lip is not finite."""
    neurons = []
    for name, conv in pairs.items():
        kernels, gamma = (net.get_parameter(f"{layer}.weight").detach() for layer in (conv, name))
        lip = channel_lipschitz(kernels, gamma, net.get_buffer(f"{name}.running_var"))
        if len(dead := (~lip.isfinite()).nonzero()):
            raise UserError(f"{name}, channel {int(dead[0])}: its running variance is 0 or no number; no score for it")
        off = lip.mean() - lip
        scores = off / (off.square().sum() / max(len(off) - 1, 1)).sqrt()  # nan where all are equal: none is pruned
        neurons += [Neuron(name, k, score) for k, score in enumerate(scores.nan_to_num(nan=np.inf).tolist())]
    return neurons


def build(config: Config, context: Context) -> Plan:
    """No stages: the channels are scored here. Pruning and evaluation are part of the result."""

    def score(net: nn.Module, example: Tensor) -> list[Neuron]:
        return channel_scores(net, pair_norms(net, example, config.pairing, context.tell))

    return score_plan(config, context, config.data, score, "channel_scores.txt")
