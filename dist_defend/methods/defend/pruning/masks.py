"""A table of neurons and their scores: its file, the order of pruning, the stops, and pruning itself."""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dist_defend.errors import UserError
from dist_defend.files import read_regular, write_atomic
from dist_defend.screen import printable

_MOST_BYTES = 4 << 20  # of a mask file: about 60,000 neurons, two thirds more than the largest network has
_HEADER = "No \t Layer Name \t Neuron Idx \t Mask Score "


class Neuron(NamedTuple):
    """A channel of a batch norm, or an input of a linear layer, and its score: the lower, the sooner it is pruned.

    Masks are scores in [0, 1].
    """

    layer: str
    channel: int
    score: float


class Candidate(NamedTuple):
    """A stop of the sweep: prune the ``pruned`` neurons of lowest score. threshold: None when going by number."""

    threshold: float | None
    pruned: int


def neuron_table(masks: Mapping[str, Tensor]) -> list[Neuron]:
    """Masks (C,) by layer -> neurons in that order, rounded as in mask_values.txt.

    Rounding to four decimals comes before thresholding: 0.00004 is 0.
    """
    return [
        Neuron(layer, channel, float(f"{value:.4f}"))
        for layer, mask in masks.items()
        for channel, value in enumerate(mask.tolist())
    ]


def write_mask_values(path: Path, neurons: Sequence[Neuron]) -> None:
    """Write bboylyg/RNP's mask_values.txt, atomically; other scores fit in too."""
    lines = [f"{n} \t {layer} \t {channel} \t {score:.4f} " for n, (layer, channel, score) in enumerate(neurons)]
    write_atomic(path, "\n".join([_HEADER, *lines]) + "\n")


def read_mask_values(path: str | Path) -> list[Neuron]:
    """Read a mask_values.txt of any origin; its first line is skipped. UserError (file, line) if it is not one."""
    try:
        lines = read_regular(path, _MOST_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{path}: cannot read the masks: {reason}; name a mask_values.txt") from error
    neurons = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            _, layer, channel, mask = line.split()
            neurons.append(Neuron(layer, int(channel), float(mask)))
        except ValueError:
            raise UserError(f"{path}: line {number} is not 'number layer channel mask'; write the file again") from None
        if not 0 <= neurons[-1].score <= 1:
            raise UserError(f"{path}: line {number} has the mask {printable(mask, 40)}; masks are in [0, 1]")
    return neurons


def check_neurons(neurons: Sequence[Neuron], net: nn.Module, names: Sequence[str], path: str | Path) -> None:
    """UserError unless the file names every masked channel of the network exactly once."""
    wanted = _channels(net, names)
    found = [(neuron.layer, neuron.channel) for neuron in neurons]
    if sorted(found) != sorted(wanted):
        odd = sorted(set(found) ^ set(wanted)) or sorted(found)
        raise UserError(
            f"{path}: {len(found)} masks do not fit the model's {len(wanted)} batch-norm channels (first at odds: "
            f"{printable(odd[0][0], 80)} {printable(odd[0][1], 20)}); use the masks of this model"
        )


def check_number(net: nn.Module, names: Sequence[str], maximum: float, extra: float, key: str) -> None:
    """UserError, which names the key, if pruning by number would go beyond the last channel."""
    wanted, channels = math.ceil(maximum) + math.ceil(extra), len(_channels(net, names))
    if wanted > channels:
        raise UserError(f"key '{key}' asks for {wanted} neurons; the model has {channels}: lower it")


def _channels(net: nn.Module, names: Sequence[str]) -> list[tuple[str, int]]:
    return [(name, channel) for name in names for channel in range(len(net.get_parameter(f"{name}.weight")))]


def pruning_order(neurons: Sequence[Neuron]) -> list[Neuron]:
    """Ascending scores; ties keep the order of the table."""
    return sorted(neurons, key=lambda neuron: neuron.score)


def neuron_count(order: Sequence[Neuron], threshold: float) -> int:
    """How many scores are at most the threshold."""
    return bisect_right(order, threshold, key=lambda neuron: neuron.score)


def by_threshold(order: Sequence[Neuron], maximum: float, step: float) -> list[Candidate]:
    """Prune every mask <= t for t = 0, step, ..., maximum; floats as numpy.arange(0, maximum + step, step) has them."""
    thresholds = np.arange(0, maximum + step, step).tolist()
    return [Candidate(threshold, neuron_count(order, threshold)) for threshold in thresholds]


def by_number(maximum: float, step: float, off_by_one: bool) -> list[Candidate]:
    """Prune 0, step, ..., maximum neurons (both rounded up), or, off by one as published, ``step`` more each time."""
    stop, stride = math.ceil(maximum), math.ceil(step)
    counts = [start + stride * off_by_one for start in range(0, stop + 1, stride)]
    return [Candidate(None, count) for count in counts]


@torch.no_grad()
def prune(net: nn.Module, neurons: Sequence[Neuron], with_beta: bool = False) -> None:
    """Set gamma (with_beta: and beta) of these channels to 0, in place. Without beta a channel still passes beta.

    A channel of a linear layer is one of its inputs: a column of the weight becomes 0.
    """
    channels = defaultdict(list)
    for layer, channel, _ in neurons:
        channels[layer].append(channel)
    for layer, picked in channels.items():
        norm = net.get_submodule(layer)
        if isinstance(norm, nn.Linear):
            norm.weight[:, picked] = 0
            continue
        for values in (norm.weight, norm.bias) if with_beta else (norm.weight,):
            assert isinstance(values, Tensor)
            values[picked] = 0
