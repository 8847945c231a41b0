"""The seconds that a run works, without those in which it is only measured."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WorkClock:
    """Starts now. Wall seconds on a GPU; on a CPU the seconds of its cores that this process had, without waiting."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._is_cuda = device is not None and device.type == "cuda"
        self._measured = 0.0
        self._started = self._now()

    @property
    def seconds(self) -> float:
        """So far, without what was measured."""
        return max(0.0, self._now() - self._started - self._measured)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """What is done within only tells how good a model is. Not to be nested."""
        begun = self._now()
        try:
            yield
        finally:
            self._measured += self._now() - begun

    def _now(self) -> float:
        if not self._is_cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()
