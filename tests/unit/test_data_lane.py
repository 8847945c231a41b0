"""How batches get to a GPU ahead of the step: the order of streams and events, emulated on a CPU."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.data import backends, lane
from dist_defend.data.augment import IDENTITY, AugmentConfig, View, apply_augment
from dist_defend.data.draws import draw
from dist_defend.data.loader import BackendName, LoaderConfig, make_loader
from dist_defend.data.store import PreparedDataset
from tests.unit.test_data_loader import BACKENDS, COLOUR, N, batches, dataset, largest_difference, needs_ffcv, photos

__all__ = ["dataset", "photos"]  # fixtures
SHUFFLED: dict[str, Any] = {"views": COLOUR, "shuffle": True, "seed": 9}


class Entry(NamedTuple):
    """What was put into a stream; None is the step's."""

    stream: int | None
    what: str
    which: int = 0


class Timeline:
    """Entries of all streams, in order."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.changed = threading.Condition()

    def put(self, *entry: Any) -> int:
        with self.changed:
            self.entries.append(Entry(*entry))
            self.changed.notify_all()
            return len(self.entries) - 1

    def find(self, what: str) -> list[int]:
        return [number for number, entry in enumerate(self.entries) if entry.what == what]

    def until(self, what: str, count: int) -> bool:
        """Wait for so many entries; False if they do not come."""
        with self.changed:
            return self.changed.wait_for(lambda: len(self.find(what)) >= count, timeout=60)


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    """Copies on a CPU stand for those to a GPU; streams do their work at once, and note it."""
    made, current, lanes = Timeline(), threading.local(), iter(range(100))

    class Stream:
        def __init__(self, device: object) -> None:
            self.number = next(lanes)

        def record_event(self) -> int:
            return made.put(self.number, "event")

    class OfStep:
        def wait_event(self, event: int) -> None:
            made.put(None, "wait", event)

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        before, current.number = now(), stream.number
        yield
        current.number = before

    def now() -> int | None:
        return getattr(current, "number", None)

    def noted(what: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            made.put(now(), what)
            return function(*args)

        return call

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: OfStep())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: made.put(None, "keep", tensor.data_ptr()))
    for module in (lane, backends):
        monkeypatch.setattr(module, "is_apart", lambda device: True)
        monkeypatch.setattr(module, "to_device", noted("copy", to_device))
    for name in ("apply_augment", "apply_colours"):
        monkeypatch.setattr(backends, name, noted("compute", getattr(backends, name)))
    return made


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_each_batch_is_awaited_by_its_own_event_and_made_ahead(
    dataset: PreparedDataset, backend: BackendName, timeline: Timeline
) -> None:
    loader = make_loader(dataset, config=LoaderConfig(backend, 1), batch_size=12, **SHUFFLED)
    received: list[Batch] = []
    for number, batch in enumerate(loader.epoch(0), 1):
        assert timeline.until("event", min(number + 1, 5))  # while the step has this batch, the next one is on its way
        received.append(batch)
        ptrs = [tensor.data_ptr() for tensor in (*batch.views, batch.labels, batch.index)]
        assert [timeline.entries[n].which for n in timeline.find("keep")[-len(ptrs) :]] == ptrs
        assert timeline.find("wait")[-1] < timeline.find("keep")[-len(ptrs)]
    events, waits = timeline.find("event"), timeline.find("wait")
    assert len(received) == 5 and [timeline.entries[n].which for n in waits] == events
    work = [n for what in ("copy", "compute") for n in timeline.find(what)]
    assert {timeline.entries[n].stream for n in (*work, *events)} == {0}  # none of it on the step's stream
    for first, last in zip([-1, *events], events, strict=False):
        assert sum(first < n < last for n in work) >= 2 + len(COLOUR)  # a batch's work lies before its event
    assert max(work) < max(events)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_batches_on_a_lane_are_those_of_the_cpu(
    dataset: PreparedDataset, backend: BackendName, request: pytest.FixtureRequest
) -> None:
    """A resident one's are computed by torch's operators there, and so equal those of the torch back end."""
    alike: BackendName = "ffcv" if backend == "ffcv" else "torch"
    wanted = batches(dataset, alike, epochs=2, **SHUFFLED)
    request.getfixturevalue("timeline")
    for workers in (1, 3):
        assert largest_difference(batches(dataset, backend, epochs=2, workers=workers, **SHUFFLED), wanted) == 0
    assert largest_difference(batches(dataset, backend, start=3, **SHUFFLED), wanted[3:5]) == 0


def test_a_lane_that_is_left_early_ends(dataset: PreparedDataset, timeline: Timeline) -> None:
    loader = make_loader(dataset, config=LoaderConfig("torch", 2), batch_size=2, **SHUFFLED)
    for _ in range(3):
        for _batch in loader.epoch(0):
            break
    assert len(timeline.find("wait")) == 3
    assert sum(len(batch.index) for batch in loader.epoch(1)) == N


def test_a_cpu_has_no_stream_and_copies_nothing(dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Tensor, ...]] = []
    plain = lane.Lane.deliver

    def deliver(own: lane.Lane, rows: np.ndarray, make: Callable[[], tuple[Tensor, ...]]) -> lane.Delivery:
        def noted() -> tuple[Tensor, ...]:
            made.append(make())
            return made[-1]

        return plain(own, rows, noted)

    monkeypatch.setattr(lane.Lane, "deliver", deliver)
    loader = make_loader(dataset, config=LoaderConfig("resident", 1), batch_size=12, views=COLOUR)
    assert loader._lane.stream is None
    for number, batch in enumerate(loader.epoch(0)):
        assert all(a is b for a, b in zip(batch.views, made[number], strict=True))


SIZES = {
    "resized crops": (View(AugmentConfig("random_resized", size=24, flip=0.5)), View(AugmentConfig(size=16))),
    "colours": (View(AugmentConfig("random_resized", size=20, flip=0.5, jitter=0.8, grayscale=0.3)),),
    "a constant beside": (View(AugmentConfig(size=16)), View(IDENTITY, np.full((9, 7, 3), 50, np.uint8))),
}


@needs_ffcv
@pytest.mark.parametrize("views", SIZES.values(), ids=SIZES)
def test_images_that_differ_in_size_are_augmented_together_as_each_one_alone(
    photos: PreparedDataset, views: tuple[View, ...]
) -> None:
    """Alone by torch's operators, geometry too."""
    for epoch, batch in enumerate(batches(photos, "torch", epochs=2, workers=2, views=views, shuffle=True, seed=5)):
        for number, (view, made) in enumerate(zip(views, batch.views, strict=True)):
            for row, image in zip(batch.index.tolist(), made, strict=True):
                source = photos.image(row) if view.image is None else view.image
                params = draw(5, epoch, np.array([row]), number, view.augment, *source.shape[:2])
                alone = apply_augment(torch.tensor(source)[None], torch.from_numpy(params), view.augment)[0]
                assert torch.equal(image, alone)
