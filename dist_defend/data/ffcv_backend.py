"""FFCV as a loader back end: its file, memory manager and pipeline thread around one operation of ours.

The operation decodes and augments in one go (fused.py), so nothing of FFCV's is compiled per loader. Around that, what
FFCV 1.0.2 leaves open is closed here: batches are fresh memory (upstream's are overwritten a few batches later), an
error in the pipeline reaches the consumer (upstream's waits for ever), leaving the loop early ends the threads
(upstream's go on), and the process' thread counts stay as they were. Import within ``quiet_ffcv``.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from queue import Full
from typing import Any

import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.pipeline_spec import PipelineSpec

from dist_defend.data.augment import View
from dist_defend.data.beton import stored_images
from dist_defend.data.ffcv_presence import quiet_ffcv
from dist_defend.data.fused import empty_views, fill_views
from dist_defend.data.lane import Deliver, Delivery
from dist_defend.data.store import PreparedDataset

_running = threading.local()  # epoch and pool of the pipeline thread that asks


class FfcvBackend:
    """One FFCV Loader for the life of ours. ``workers`` threads share the rows of each batch."""

    def __init__(self, dataset: PreparedDataset, views: Sequence[View], seed: int, workers: int, raw: bool) -> None:
        self._workers, self._raw = workers, raw
        operation = _DecodeAndAugment(tuple(views), seed, workers, raw)
        with quiet_ffcv():
            Compiler.set_enabled(False)  # our operation is compiled already, and called from Python
            try:
                self._loader = Loader(
                    str(dataset.beton),
                    batch_size=1 << 20,  # not used: the shares say which rows make a batch
                    num_workers=1,
                    order=OrderOption.SEQUENTIAL,
                    seed=0,
                    os_cache=True,  # maps the file, whatever FFCV_DEFAULT_CACHE_PROCESS says
                    pipelines={"image": PipelineSpec("image", decoder=operation), "label": None},
                )
            finally:
                Compiler.set_enabled(True)

    def batches(self, shares: Sequence[np.ndarray], epoch: int, deliver: Deliver) -> Generator[Delivery, None, None]:
        if not shares:
            return
        with ThreadPoolExecutor(self._workers, thread_name_prefix="ffcv") as pool:
            pipeline = _Epoch(self._loader, shares, epoch, pool, partial(self._delivered, deliver))
            try:
                yield from pipeline
            finally:
                pipeline.shutdown()

    def _delivered(self, deliver: Deliver, rows: np.ndarray, outs: Sequence[np.ndarray]) -> Delivery:
        tensors = (torch.from_numpy(out) for out in outs)
        views = tuple(t if self._raw else t.permute(0, 3, 1, 2) for t in tensors)
        return deliver(rows, lambda: views)


class _DecodeAndAugment(SimpleRGBImageDecoder):  # type: ignore[misc]  # FFCV has no types
    """Rows of the file -> one array per view, (B, S, S, 3) float32, or with ``raw`` the images (B, H, W, 3) uint8."""

    def __init__(self, views: tuple[View, ...], seed: int, workers: int, raw: bool) -> None:
        super().__init__()
        self._views, self._seed, self._workers, self._raw = views, seed, workers, raw

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        return replace(previous_state, jit_mode=True), None  # no buffer of FFCV's: see the module

    def generate_code(self) -> Callable[..., list[np.ndarray]]:
        def decode(rows: np.ndarray, _buffer: None, metadata: np.ndarray, storage: Any) -> list[np.ndarray]:
            memory, addresses, sizes = storage  # the table of the file, sorted by address
            fields = metadata[rows]
            size = sizes[np.searchsorted(addresses, fields["data_ptr"])].astype(np.int64)
            images = stored_images(np.asarray(memory), rows, fields, size)
            shape = (len(rows), int(images.heights[0]), int(images.widths[0]))
            outs = [np.empty((*shape, 3), np.uint8)] if self._raw else empty_views(self._views, *shape)
            epoch, share = _running.epoch, -(-len(rows) // self._workers)

            def work(start: int) -> None:
                part = slice(start, start + share)
                pixels = images[part].decode()
                if self._raw:
                    outs[0][part] = pixels.stack()
                else:
                    fill_views([out[part] for out in outs], self._views, pixels, rows[part], self._seed, epoch)

            list(_running.pool.map(work, range(0, len(rows), share)))
            return outs

        return decode


class _Epoch(EpochIterator):  # type: ignore[misc]  # FFCV has no types
    """The pipeline thread of one epoch, over shares of rows instead of even chunks."""

    def __init__(
        self,
        loader: Loader,
        shares: Sequence[np.ndarray],
        epoch: int,
        pool: ThreadPoolExecutor,
        finish: Callable[[np.ndarray, Sequence[np.ndarray]], Delivery],
    ) -> None:
        self._shares, self._epoch, self._pool, self._finish = shares, epoch, pool, finish
        super().__init__(loader, np.concatenate(shares))  # starts the thread

    def run(self) -> None:
        _running.epoch, _running.pool = self._epoch, self._pool
        try:
            for number, rows in enumerate(self._shares):
                (outs,) = self.run_pipeline(number, rows, 0, None)
                if not self._put(self._finish(rows, outs)):
                    return
        except BaseException as error:
            self._put(error)
        else:
            self._put(None)

    def _put(self, item: Any) -> bool:
        """Queue an item; False if the consumer has gone."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
                return True
            except Full:
                pass
        return False

    def __iter__(self) -> Iterator[Delivery]:
        while (item := self.output_queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def shutdown(self) -> None:
        """End the thread and let go of the file."""
        self.close()
        self.join()
