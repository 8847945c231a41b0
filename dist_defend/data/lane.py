"""How batches get to the device ahead of the steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.ops.transfer import is_apart, to_device

Views: TypeAlias = tuple[Tensor, ...]
Deliver: TypeAlias = Callable[[np.ndarray, Callable[[], Views]], "Delivery"]


class Delivery(NamedTuple):
    """A batch that may still be on its way, and the event after which it has come; None where nothing is awaited."""

    batch: Batch
    come: Any


class Lane:
    """From a back end's threads to the step, one batch after the other.

    To a GPU on a stream of its own: threads put copies from pinned memory, and what is computed there, in its queue
    for batches that the step has not asked for yet. A step's stream waits for its batch's event, the host for nothing,
    and the batch's memory is not used again before the step is done with it. On a CPU a batch is handed over as it is.
    labels: (N,) int64 of all rows of the data set.
    """

    def __init__(self, device: torch.device, labels: np.ndarray) -> None:
        self.device, self.labels = device, labels
        self.stream = torch.cuda.Stream(device) if is_apart(device) else None

    def deliver(self, rows: np.ndarray, make: Callable[[], Views]) -> Delivery:
        """The batch of these rows (B,), whose views ``make`` makes. In any thread."""
        with self._own_stream():
            labels = torch.from_numpy(self.labels[rows])
            views, *numbers = make(), labels, torch.from_numpy(rows)
            parts = [to_device(tensor, self.device) for tensor in (*views, *numbers)]
            batch = Batch(tuple(parts[:-2]), *parts[-2:])
            return Delivery(batch, None if self.stream is None else self.stream.record_event())

    def receive(self, delivery: Delivery) -> Batch:
        """The batch, for the calling thread's stream."""
        batch, come = delivery
        if come is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(come)
            for tensor in (*batch.views, batch.labels, batch.index):
                tensor.record_stream(stream)
        return batch

    def _own_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
