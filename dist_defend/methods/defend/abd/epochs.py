"""Stages that share the epochs of one run, and checks of when vaccine and retrospection act in them."""

from collections.abc import Iterator

from dist_defend.batch import Batch
from dist_defend.engine.trainer import BatchSource
from dist_defend.errors import UserError
from dist_defend.methods.defend.abd.options import RetrospectionConfig, VaccineConfig

FIRST_KEPT = 11  # number of the first batch whose images the vaccine's selection sees, as published for OOD and CMI


class Later:
    """A batch source whose epoch n is epoch ``first`` + n of another source."""

    def __init__(self, source: BatchSource, first: int) -> None:
        self.source, self.first, self.num_batches = source, first, source.num_batches

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        return self.source.epoch(self.first + epoch, start_batch)


def check_selection(vaccine: VaccineConfig | None, batches: int) -> None:
    """UserError if the vaccine would be chosen after all ``batches`` of its stage, or later."""
    if vaccine is not None and vaccine.selection_batches >= batches:
        raise UserError(
            f"key 'vaccine.selection_batches' is {vaccine.selection_batches}, but there are {batches} batches before "
            "the retrospection or the end; lower it"
        )


def check_defence(vaccine: VaccineConfig | None, retrospection: RetrospectionConfig | None, epochs: int) -> None:
    """ValueError for a vaccine's selection that would get no images, or a retrospection that would never start."""
    if vaccine is not None and 0 < vaccine.selection_batches <= FIRST_KEPT:
        raise ValueError(
            f"key 'vaccine.selection_batches' is {vaccine.selection_batches}; it must be more than {FIRST_KEPT}, "
            "or 0 for none"
        )
    if retrospection is not None and not retrospection.start < epochs:
        raise ValueError(f"key 'retrospection.start' is {retrospection.start}; it must be below the {epochs} epochs")
