"""Three back ends, the same batches; and what happens when something goes wrong half-way."""

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import BadNets
from dist_defend.attacks.poison import triggered
from dist_defend.batch import Batch
from dist_defend.data import backends, ffcv_presence, loader
from dist_defend.data.augment import IDENTITY, REFERENCE, SIMCLR, AugmentConfig, BlurConfig, SolarizeConfig, View
from dist_defend.data.loader import BackendName, DatasetConfig, LoaderConfig, make_loader, select_rows
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import PreparedDataset, write_dataset
from dist_defend.errors import UserError

HAS_FFCV = ffcv_presence.ffcv_installed()
needs_ffcv = pytest.mark.skipif(not HAS_FFCV, reason="ffcv is not installed")
STORAGE = "beton" if HAS_FFCV else "npy"
BACKENDS = ["resident", pytest.param("ffcv", marks=needs_ffcv)]
GREY_LEVEL = 1 / 255
N = 53


def source(count: int = N, size: int = 12, classes: int = 5) -> ArraySource:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(count) % classes, [f"class {c}" for c in range(classes)])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return write_dataset(source(), tmp_path_factory.mktemp("data") / "train", name="x", split="train", storage=STORAGE)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """JPEGs of several sizes."""
    if not HAS_FFCV:
        pytest.skip("ffcv is not installed")
    return write_dataset(Photos(), tmp_path_factory.mktemp("data") / "p", name="p", split="train", write_mode="jpg")


class Photos:
    """Smooth pictures of several sizes."""

    classes = ("only",)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        height, width = 40 + 3 * row, 70 - 2 * row
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x / (3 + c) + row) * np.cos(y / (4 + c)) for c in range(3)]
        return ((np.stack(waves, axis=-1) + 1) * 127).astype(np.uint8), 0


def batches(
    dataset: PreparedDataset, backend: BackendName, epochs: int = 1, start: int = 0, workers: int = 1, **options: Any
) -> list[Batch]:
    config = LoaderConfig(backend, workers)
    made = make_loader(dataset, config=config, batch_size=12, **options)
    assert made.backend == backend
    return [batch for epoch in range(epochs) for batch in made.epoch(epoch, start)]


def largest_difference(ours: list[Batch], theirs: list[Batch]) -> float:
    """Over all views, after everything else was found equal."""
    assert len(ours) == len(theirs) > 0
    difference = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels) and len(a.views) == len(b.views)
        for x, y in zip(a.views, b.views, strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()
            difference = max(difference, (x.float() - y.float()).abs().max().item())
    return difference


EXACT = {
    "plain": (View(),),
    "padded crop and flip": (View(AugmentConfig("pad", flip=0.5)),),
    "two resized crops": (
        View(AugmentConfig("random_resized", flip=0.5)),
        View(AugmentConfig("random_resized", size=20)),
    ),
}
BLURRED = View(replace(SIMCLR, blur=BlurConfig(0.5, kernel=0.3), solarize=SolarizeConfig(0.5, threshold=0.5)))
COLOUR = (View(SIMCLR), View(SIMCLR), View(replace(REFERENCE, jitter=1.0), source()[7][0]), BLURRED)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("views", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_geometry_is_the_same_to_the_last_bit(
    dataset: PreparedDataset, backend: BackendName, views: tuple[View, ...], workers: int
) -> None:
    options: dict[str, Any] = {"views": views, "shuffle": True, "seed": 9, "drop_last": True}
    ours = batches(dataset, backend, epochs=3, workers=workers, **options)
    assert largest_difference(ours, batches(dataset, "torch", epochs=3, workers=workers, **options)) == 0
    assert len(ours) == 3 * (N // 12)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_a_loader_in_order_has_one_that_shuffles(dataset: PreparedDataset, backend: BackendName) -> None:
    """Of the same images and seed, and it itself stays as it is."""
    made = make_loader(dataset, config=LoaderConfig(backend, 1), batch_size=12, seed=9)
    shuffled = [batch for epoch in range(2) for batch in made.shuffled().epoch(epoch)]
    assert largest_difference(shuffled, batches(dataset, backend, epochs=2, seed=9, shuffle=True)) == 0
    assert torch.cat([batch.index for batch in made.epoch(1)]).tolist() == list(range(N))


@pytest.mark.parametrize("backend", BACKENDS)
def test_colour_is_the_same_within_a_grey_level(dataset: PreparedDataset, backend: BackendName) -> None:
    options: dict[str, Any] = {"views": COLOUR, "shuffle": True, "seed": 9}
    one, two = (batches(dataset, backend, epochs=3, workers=workers, **options) for workers in (1, 2))
    assert largest_difference(one, two) == 0
    assert largest_difference(one, batches(dataset, "torch", epochs=3, **options)) <= GREY_LEVEL
    assert len({batch.views[0].numpy().tobytes() for batch in one}) == len(one)  # epochs differ
    assert not torch.equal(one[0].views[0], one[0].views[1])  # and views


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_two_ranks_of_a_resumed_epoch_see_what_one_rank_sees(dataset: PreparedDataset, backend: BackendName) -> None:
    options: dict[str, Any] = {"views": COLOUR, "shuffle": True, "seed": 4}
    alone = batches(dataset, backend, **options)[2:]
    ranks = [batches(dataset, backend, start=2, rank=rank, world_size=2, **options) for rank in (0, 1)]
    joined = []
    for shares in zip(*ranks, strict=True):
        views = tuple(torch.cat(parts) for parts in zip(*(share.views for share in shares), strict=True))
        parts = torch.cat([share.labels for share in shares]), torch.cat([share.index for share in shares])
        joined.append(Batch(tuple(v.contiguous(memory_format=torch.channels_last) for v in views), *parts))
    assert largest_difference(joined, alone) == 0


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_meets_every_row_once(dataset: PreparedDataset, backend: BackendName, world_size: int) -> None:
    config = LoaderConfig(backend)
    rows = np.arange(3, N)
    seen: list[int] = []
    for rank in range(world_size):
        made = make_loader(dataset, config=config, batch_size=49, rows=rows, rank=rank, world_size=world_size)
        for batch in made.epoch(0):
            assert len(batch.index) > 0
            assert torch.equal(batch.labels, batch.index % 5)
            images = torch.from_numpy(dataset.images(batch.index.numpy())).permute(0, 3, 1, 2)
            assert torch.equal(batch.images, images.float() / 255)
            seen += batch.index.tolist()
    assert sorted(seen) == rows.tolist()


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_raw_batches_are_the_stored_bytes(dataset: PreparedDataset, backend: BackendName) -> None:
    for batch in batches(dataset, backend, raw=True, shuffle=True):
        assert batch.images.dtype == torch.uint8
        assert np.array_equal(batch.images.numpy(), dataset.images(batch.index.numpy()))


@needs_ffcv
@pytest.mark.parametrize("backend", ["resident", "ffcv"])
def test_kept_batches_are_not_overwritten(dataset: PreparedDataset, backend: BackendName) -> None:
    made = make_loader(dataset, config=LoaderConfig(backend), batch_size=2)
    kept = list(made.epoch(0))  # 27 batches, far more than any ring of buffers
    for batch in kept:
        images = torch.from_numpy(dataset.images(batch.index.numpy())).permute(0, 3, 1, 2)
        assert torch.equal(batch.images, images.float() / 255)


@needs_ffcv
def test_jpegs_of_several_sizes_decode_the_same(photos: PreparedDataset) -> None:
    assert photos.image_shape is None
    views = (View(AugmentConfig("random_resized", size=24, flip=0.5)), View(AugmentConfig(size=16)))
    ours = batches(photos, "ffcv", workers=2, epochs=2, views=views, shuffle=True)
    assert largest_difference(ours, batches(photos, "torch", epochs=2, views=views, shuffle=True)) == 0


def thread_names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_leaving_early_ends_the_threads(dataset: PreparedDataset, backend: BackendName) -> None:
    before, torch_threads = thread_names(), torch.get_num_threads()
    made = make_loader(dataset, config=LoaderConfig(backend), batch_size=2, views=COLOUR)
    for _ in range(5):
        for _batch in made.epoch(0):
            break
    assert thread_names() == before
    assert len(list(made.epoch(0))) == 27  # and the loader still works
    assert torch.get_num_threads() == torch_threads
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(made.epoch(0)))


@needs_ffcv
def test_two_epochs_at_once_do_not_mix(dataset: PreparedDataset) -> None:
    made = make_loader(dataset, config=LoaderConfig("ffcv"), batch_size=12, views=COLOUR, shuffle=True)
    alone = [list(made.epoch(0)), list(made.epoch(1))]
    pairs = list(zip(made.epoch(0), made.epoch(1), strict=True))
    for epoch in (0, 1):
        assert largest_difference([pair[epoch] for pair in pairs], alone[epoch]) == 0


@needs_ffcv
@pytest.mark.timeout(30)  # FFCV's own loader would hang
@pytest.mark.parametrize("backend", ["torch", "ffcv"])
def test_a_damaged_image_is_an_error(tmp_path: Path, backend: BackendName) -> None:
    dataset = write_dataset(Photos(), tmp_path / "p", name="p", split="train", write_mode="jpg")
    assert dataset.beton is not None
    content = bytearray(dataset.beton.read_bytes())
    start = content.rindex(b"\xff\xd8\xff")  # the last JPEG in the file
    content[start : start + 40] = bytes(40)
    dataset.beton.write_bytes(content)
    before = thread_names()
    with pytest.raises(UserError, match="row 11 of the data set is a damaged JPEG"):
        batches(dataset, backend, views=(View(AugmentConfig("random_resized", size=8)),))
    assert thread_names() == before


def test_auto_takes_resident_where_the_images_of_all_ranks_fit(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(count: int = N, world_size: int = 1, backend: BackendName = "auto") -> str:
        how: dict[str, Any] = {"batch_size": 4, "rows": np.arange(count), "world_size": world_size}
        return make_loader(dataset, config=LoaderConfig(backend), **how).backend

    assert taken() == "resident"
    monkeypatch.setattr(loader, "free_memory", lambda: 2 * N * 12 * 12 * 3)  # of which half is not for images
    otherwise = "ffcv" if HAS_FFCV else "torch"
    assert (taken(), taken(N - 1), taken(N // 2, 2), taken(N // 2, 3)) == (otherwise, "resident", "resident", otherwise)
    monkeypatch.setattr(loader, "ffcv_installed", lambda: False)
    assert (taken(), taken(backend="resident")) == ("torch", "resident")


@needs_ffcv
def test_ffcv_gives_what_resident_gives_to_the_last_bit(dataset: PreparedDataset) -> None:
    options: dict[str, Any] = {"views": COLOUR, "shuffle": True, "seed": 9, "workers": 2}
    assert largest_difference(batches(dataset, "ffcv", **options), batches(dataset, "resident", **options)) == 0


@needs_ffcv
def test_resident_jpegs_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_CHUNK", 5)
    folder = tmp_path / "jpg"
    dataset = write_dataset(source(17), folder, name="x", split="train", write_mode="jpg", order_seed=1)
    options: dict[str, Any] = {"raw": True, "shuffle": True, "rows": np.arange(1, 17), "workers": 2}
    assert largest_difference(batches(dataset, "resident", **options), batches(dataset, "torch", **options)) == 0


@needs_ffcv
def test_auto_does_not_import_ffcv_and_ffcv_compiles_no_dict(dataset: PreparedDataset) -> None:
    """In a fresh process. FFCV fills a typed dict of numba's as it is imported, which compiles for seconds."""
    program = (
        "import sys; from dist_defend.data.loader import LoaderConfig, make_loader; "
        "from dist_defend.data.store import open_dataset; from numba.typed import Dict; "
        "data = open_dataset(sys.argv[1]); "
        "next(iter(make_loader(data, config=LoaderConfig(), batch_size=4).epoch(0))); "
        "assert 'ffcv' not in sys.modules; "
        "next(iter(make_loader(data, config=LoaderConfig('ffcv'), batch_size=4).epoch(0))); "
        "from ffcv.fields import rgb_image; assert type(rgb_image.IMAGE_MODES) is dict; "
        "import numba; assert numba.typed.Dict is Dict"
    )
    subprocess.run([sys.executable, "-c", program, str(dataset.path)], check=True)


@needs_ffcv
def test_ffcv_speaks_of_files_not_of_images_with_a_trigger(dataset: PreparedDataset) -> None:
    made = triggered(dataset, AttackConfig(BadNets(pattern="square", size=2)))
    own, plain = (make_loader(d, config=LoaderConfig("ffcv"), batch_size=N, raw=True) for d in (made, dataset))
    assert (own.backend, plain.backend) == ("resident", "ffcv")
    (stamped,), (clean,) = ((batch.images for batch in each.epoch(0)) for each in (own, plain))
    expected = clean.clone()
    expected[:, -2:, -2:] = 255
    assert not stamped.equal(clean) and stamped.equal(expected)


def test_without_ffcv_the_remedy_is_named(dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "ffcv_installed", lambda: False)
    with pytest.raises(UserError, match=r"'loader.backend' is ffcv, which is not installed; pip install"):
        make_loader(dataset, config=LoaderConfig("ffcv"), batch_size=4)


def test_what_cannot_be_loaded_is_refused_before_work_starts(dataset: PreparedDataset) -> None:
    def refused(told: str, **options: Any) -> None:
        with pytest.raises(UserError, match=told):
            make_loader(dataset, config=LoaderConfig("torch"), **{"batch_size": 12, **options})

    refused("53 samples are fewer than batch_size 64", batch_size=64, drop_last=True)
    refused("batch_size 12 is not divisible by 5 ranks", drop_last=True, world_size=5)
    refused("a crop of 40 pixels does not fit", views=(View(AugmentConfig("pad", size=40)),))


@needs_ffcv
def test_images_of_several_sizes_need_a_crop(photos: PreparedDataset) -> None:
    every: list[dict[str, Any]] = [{"views": (View(a),)} for a in (IDENTITY, AugmentConfig("pad", size=8))]
    for options in (*every, {"raw": True}):
        with pytest.raises(UserError, match="images differ in size; set the augmentation"):
            make_loader(photos, config=LoaderConfig(), batch_size=4, **options)
    with pytest.raises(UserError, match="cannot be resident"):
        make_loader(photos, config=LoaderConfig("resident"), batch_size=4, views=(View(AugmentConfig(size=8)),))


def test_a_subset_is_the_first_rows_or_a_seeded_choice(dataset: PreparedDataset) -> None:
    def rows(seed: int = 0, **options: Any) -> list[int]:
        chosen: list[int] = select_rows(dataset, DatasetConfig("data", **options), seed).tolist()
        return chosen

    assert rows() == list(range(N))
    assert rows(fraction=0.5) == list(range(26)) and rows(max_samples=3) == [0, 1, 2]
    chosen = rows(fraction=0.5, subset="random")
    assert chosen == sorted(set(chosen)) and len(chosen) == 26 and chosen == rows(fraction=0.5, subset="random")
    assert chosen != rows(fraction=0.5, subset="random", seed=1) and chosen != list(range(26))
    with pytest.raises(UserError, match=r"fraction 0\.01 of 53 samples is none"):
        rows(fraction=0.01)


def test_options_that_mean_nothing_are_refused() -> None:
    every: list[dict[str, Any]] = [{"fraction": 0.0}, {"fraction": 1.5}, {"max_samples": 0}]
    for wrong in every:
        with pytest.raises(ValueError, match=f"key '{next(iter(wrong))}' is .*it must be"):
            DatasetConfig("data", **wrong)
    with pytest.raises(ValueError, match="key 'workers' is 0; it must be at least 1"):
        LoaderConfig(workers=0)
