"""Named streams of random numbers: published draws stay, and no two draws of a run are the same."""

import itertools

import numpy as np
import pytest

from dist_defend.data.order import epoch_order
from dist_defend.ops.streams import Stream, draws, order_draws

PUBLISHED = {  # the numbers that results with digests were drawn by, when each module kept its own
    0xBAD: Stream.POISON,
    0xC07: Stream.CUTMIX,
    0xC31: Stream.CMI_SYNTHESIS,
    0xC32: Stream.CMI_BATCHES,
    0x0DE5: Stream.ORDER_OF_ROWS,
    0x100C: Stream.LOOKED_AT,
    0x1BA0: Stream.PATCHED,
    0x25C7: Stream.ZSKT_INPUTS,
    0x5E1F: Stream.RETROSPECTION,
    0x4E1D0: Stream.HELD_OUT,
    0x5B5E7: Stream.SUBSET,
    0x5AFF1E: Stream.SHUFFLES,
}


@pytest.mark.parametrize(("number", "stream"), PUBLISHED.items())
def test_published_draws_stay(number: int, stream: Stream) -> None:
    for place in ((), (1,), (1, 2)):
        expected = np.random.default_rng([7, number, *place]).integers(2**62, size=3)
        assert (draws(7, stream, *place).integers(2**62, size=3) == expected).all()


@pytest.mark.parametrize("epoch", [0, 1, 299, 2988])
def test_orders_stay(epoch: int) -> None:
    expected = np.random.default_rng([7, epoch]).permutation(20)
    assert (epoch_order(20, 7, epoch, shuffle=True) == expected).all()


def test_an_epoch_has_not_the_order_that_draws_the_poisoned_rows() -> None:
    poisoned = draws(7, Stream.POISON).permutation(20)
    assert (epoch_order(20, 7, 2989, shuffle=True) != poisoned).any()


@pytest.mark.parametrize("length", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", [0, 7, 0xBAD, 2**32 + 7])
def test_no_two_draws_of_a_run_are_the_same(seed: int, length: int) -> None:
    """The first 62 bits of orders, and of every stream at places of one length that begin with or are zeros."""
    epochs = [*range(100), *range(2900, 3200), *(int(stream) for stream in Stream), *(int(s) + 1 for s in Stream)]
    first: dict[tuple[object, ...], int] = {("order", epoch): bits(order_draws(seed, epoch)) for epoch in epochs}
    for stream, place in itertools.product(Stream, itertools.product(range(3), repeat=length)):
        address = (stream.name, *place)
        first[address] = bits(draws(seed, stream, *place))
    assert len(set(first.values())) == len(first)


def bits(generator: np.random.Generator) -> int:
    return int(generator.integers(2**62))


def test_numpy_ignores_zeros_at_the_end() -> None:
    """The reason why streams are told apart by their first number."""
    short, long = (np.random.default_rng(key).integers(2**62) for key in ([7, 0xBAD], [7, 0xBAD, 0]))
    assert short == long
