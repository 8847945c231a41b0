"""Steps driven without a trainer."""

from collections.abc import Iterator
from itertools import count

from dist_defend.engine.step import Position


def positions(num_batches: int = 1, first: int = 0) -> Iterator[Position]:
    """Where the trainer would stand in a stage with so many batches in an epoch, from the first-th batch on."""
    return (Position(0, number // num_batches, number % num_batches, number) for number in count(first))
