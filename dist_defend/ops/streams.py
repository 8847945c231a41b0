"""Every stream of random numbers that a run's seed is the root of, by name.

A draw's address is (seed, stream, place): numpy hashes its numbers into a generator of its own. So a draw depends on
what it is for and not on what was drawn before, on ranks, or on a resume. numpy ignores zeros at an address's end;
therefore no two streams may share their number, and the places of one stream all have one length.
"""

from enum import IntEnum, unique

import numpy as np


@unique
class Stream(IntEnum):
    """What is drawn, and by which place. Numbers are part of published results: none is ever changed or used again."""

    POISON = 0xBAD  # rows to stamp (0) and the partners of cross samples (1)
    CUTMIX = 0xC07  # boxes and partners: epoch, batch
    CMI_SYNTHESIS = 0xC31  # starts (0, epoch), rows of the memory bank (1, iteration)
    CMI_BATCHES = 0xC32  # classes (0, epoch, 0), passes over the pool (1, epoch, pass)
    ORDER_OF_ROWS = 0x0DE5  # of a prepared data set
    LOOKED_AT = 0x100C  # images on which a suspect is checked before a defence
    PATCHED = 0x1BA0  # images that carry I-BAU's perturbation: round, batch
    ZSKT_INPUTS = 0x25C7  # the generator's inputs: pseudo-batch
    REACTIVATED = 0x4EAC7  # images that a defended network is tuned on again
    RETROSPECTION = 0x5E1F  # delta's start (0, batch, 0), images that carry it (1, batch, student step)
    HELD_OUT = 0x4E1D0  # the defender's images that choose an epoch
    SUBSET = 0x5B5E7  # rows of a random subset
    DIRECTIONS = 0xD12EC  # on which DRUPE projects features: step
    NEURON_NOISE = 0x1A2B0  # ANP's perturbations: step
    SHUFFLES = 0x5AFF1E  # the vaccine's permutations: shuffle, member, layer
    MASK_START = 0xDEC4EE  # where DECREE's searches begin
    PATCH_SEARCH = 0x5EA4C4  # PatchSearch: the order of a cluster's images (0, cluster), places of a patch (1, row)
    CRITICS = 0xC4171C5  # pairs of MIMIC's critics: layer, epoch, batch, phase
    LATE_ORDER = 0x1A7E04D  # the order of an epoch that is no less than the smallest number here: epoch


def draws(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """The generator of one address; seed and place are not negative."""
    return np.random.default_rng([seed, stream, *place])


def order_draws(seed: int, epoch: int) -> np.random.Generator:
    """For the order of an epoch's samples: (seed, epoch) as long as no stream has that number."""
    return np.random.default_rng([seed, epoch]) if epoch < min(Stream) else draws(seed, Stream.LATE_ORDER, epoch)
