"""Prepared data sets and sources with something wrong: read, or refused by one line; no signal, no foreign bytes.

What is mutated lies under a manifest with fresh sizes and sha256s, as its author would write them, so that the checks
of the tables are met and not only that of the hashes.
"""

import functools
import io
import json
import random
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_defend.data.augment import AugmentConfig, View
from dist_defend.data.ffcv_presence import ffcv_installed
from dist_defend.data.loader import BackendName, LoaderConfig, make_loader
from dist_defend.data.reading import Keys
from dist_defend.data.sources import ArraySource, open_source, source_splits
from dist_defend.data.store import PreparedDataset, open_dataset, write_dataset
from dist_defend.errors import UserError
from tests.forging import seal
from tests.fuzz.harness import bad_outcomes
from tests.fuzz.mutate import mutate_bytes, mutate_tree

needs_ffcv = pytest.mark.skipif(not ffcv_installed(), reason="only ffcv writes .beton")
COUNT, SIDE = 6, 8
SURFACES = ["manifest_npy", "arrays", "npz", "tar", "picture", "filelist"]
BETON_SURFACES = ["manifest_beton", "beton", "beton_rows", "jpeg", "beton_source"]
Read = Callable[[], object]


@pytest.mark.parametrize("surfaces", [SURFACES, pytest.param(BETON_SURFACES, marks=needs_ffcv)], ids=["any", "beton"])
def test_data(surfaces: list[str], count: int) -> None:
    assert bad_outcomes(f"tests.fuzz.test_data:{','.join(surfaces)}", count) == []


@functools.cache
def base(storage: str, write_mode: str) -> Path:
    """A prepared data set that is whole; JPEGs are of several sizes."""
    folder = Path(tempfile.mkdtemp()) / "d"
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    source = ArraySource(noise, np.arange(COUNT) % 3, ("cat", "dog", "fox"))
    if write_mode == "jpg":
        source._images = [image[: SIDE - n] for n, image in enumerate(noise)]  # type: ignore[assignment]
    options = {"storage": storage, "write_mode": write_mode, "order_seed": 0}
    write_dataset(source, folder, name="x", split="s", **options)
    read_whole(folder)()  # compiles what compiles once per machine
    return folder


def copied(folder: Path, storage: str, write_mode: str = "raw") -> Path:
    shutil.copytree(base(storage, write_mode), folder / "d")
    return folder / "d"


def read_whole(folder: Path) -> Read:
    """Opens a data set and, if that is allowed, reads all its images through every back end."""

    def read() -> None:
        dataset = open_dataset(folder)
        _ = (dataset.source_rows, dataset.digest, [dataset.image(row) for row in range(len(dataset))])
        views = (View(AugmentConfig(crop="random_resized", size=4)),)
        backends: list[BackendName] = ["torch"]
        if dataset.image_shape is not None:
            backends.append("resident")
        if dataset.beton is not None and ffcv_installed():
            backends.append("ffcv")
        read = {name: batches(dataset, name, views) for name in backends}
        if len(read["torch"]) != len(dataset):
            raise AssertionError("another number of images")
        for name, images in read.items():
            if np.abs(images - read["torch"]).max() > 1e-4:
                raise AssertionError(f"{name} reads other bytes")

    return read


def batches(dataset: PreparedDataset, backend: BackendName, views: tuple[View, ...]) -> np.ndarray:
    config = LoaderConfig(backend=backend, workers=1)
    loader = make_loader(dataset, config=config, batch_size=4, views=views)
    return np.concatenate([batch.views[0].numpy() for batch in loader.epoch(0)])


def with_manifest(rng: random.Random, folder: Path) -> Read:
    place = folder / "manifest.json"
    if rng.random() < 0.3:
        place.write_bytes(mutate_bytes(rng, place.read_bytes()))
    else:
        place.write_text(json.dumps(mutate_tree(rng, json.loads(place.read_text()))))
    return read_whole(folder)


def manifest_npy(rng: random.Random, folder: Path) -> Read:
    """manifest.json beside images.npy."""
    return with_manifest(rng, copied(folder, "npy"))


def manifest_beton(rng: random.Random, folder: Path) -> Read:
    """manifest.json beside data.beton."""
    return with_manifest(rng, copied(folder, "beton"))


def with_file(rng: random.Random, folder: Path, name: str) -> Read:
    path = folder / name
    path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    seal(folder)
    return read_whole(folder)


def arrays(rng: random.Random, folder: Path) -> Read:
    """The bytes of images.npy, labels.npy or order.npy."""
    return with_file(rng, copied(folder, "npy"), rng.choice(("images.npy", "labels.npy", "order.npy")))


def packed(folder: Path, write_mode: str) -> tuple[Path, bytearray]:
    """A copy with data.beton, and its bytes."""
    folder = copied(folder, "beton", write_mode)
    return folder, bytearray((folder / "data.beton").read_bytes())


def beton(rng: random.Random, folder: Path) -> Read:
    """The bytes of data.beton: its header, table and images, without the padding of its page between them."""
    folder, data = packed(folder, "raw")
    start = int.from_bytes(data[16:24], "little")
    first, last = 24 + 2 * 1041 + COUNT * 32, start - (1 << 10)
    part = rng.randrange(3)
    if part == 0:
        data[:first] = mutate_bytes(rng, bytes(data[:first]))
    elif part == 1:
        data[start:] = mutate_bytes(rng, bytes(data[start:]))
    else:
        data[last:] = mutate_bytes(rng, bytes(data[last:]))
    (folder / "data.beton").write_bytes(data)
    seal(folder)
    return read_whole(folder)


def spoil_rows(rng: random.Random, data: bytearray) -> None:
    """One to three numbers in the rows of the images and in the table are others."""
    start = int.from_bytes(data[16:24], "little")
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.6:
            at, width = 24 + 2 * 1041 + rng.randrange(COUNT) * 32 + rng.randrange(24), rng.choice((1, 2, 8))
        else:
            at, width = start + 24 * rng.randrange(COUNT) + 8 * rng.randrange(3), 8
        old = int.from_bytes(data[at : at + width], "little")
        news = (0, 1, old + 1, old - 1, old * 2, 2**15, 2**31, 2**63 - 8, 2**63, 2**64 - 1, rng.randrange(2**64))
        data[at : at + width] = (rng.choice(news) % (1 << 8 * width)).to_bytes(width, "little")


def beton_rows(rng: random.Random, folder: Path) -> Read:
    """Sizes, modes and addresses of raw images."""
    folder, data = packed(folder, "raw")
    spoil_rows(rng, data)
    (folder / "data.beton").write_bytes(data)
    seal(folder)
    return read_whole(folder)


def jpeg(rng: random.Random, folder: Path) -> Read:
    """Sizes and addresses of JPEGs, or their own bytes."""
    folder, data = packed(folder, "jpg")
    if rng.random() < 0.5:
        spoil_rows(rng, data)
    else:
        image = data.index(b"\xff\xd8\xff")
        for _ in range(rng.randint(1, 4)):
            data[image + rng.randrange(900)] = rng.randrange(256)
    (folder / "data.beton").write_bytes(data)
    seal(folder)
    return read_whole(folder)


def read_source(kind: str, path: Path) -> Read:
    """All splits of a source, and all images of each that can be read."""

    def read() -> None:
        for split in source_splits(kind, str(path), Keys()):
            source = open_source(kind, str(path), split)
            for row in range(min(len(source), 20)):
                try:
                    source[row]
                except UserError as error:
                    if not str(error).isprintable():
                        raise

    return read


def beton_source(rng: random.Random, folder: Path) -> Read:
    """Someone else's .beton, with images of both kinds."""
    data = bytearray((base("beton", rng.choice(("raw", "jpg"))) / "data.beton").read_bytes())
    start = int.from_bytes(data[16:24], "little")
    if rng.random() < 0.5:
        spoil_rows(rng, data)
    else:
        data[: 24 + 2 * 1041] = mutate_bytes(rng, bytes(data[: 24 + 2 * 1041]))
        data[start:] = mutate_bytes(rng, bytes(data[start:]))
    (folder / "train.beton").write_bytes(data)
    return read_source("beton", folder / "train.beton")


@functools.cache
def npz_bytes(how: str) -> bytes:
    content = io.BytesIO()
    save = np.savez_compressed if how == "packed" else np.savez
    dtype = np.float32 if how == "floats" else np.uint8
    save(content, x=np.zeros((COUNT, SIDE, SIDE, 3), dtype), y=np.arange(COUNT) % 3)
    return content.getvalue()


def npz(rng: random.Random, folder: Path) -> Read:
    """An npz: its bytes, or the header of an array in a whole archive."""
    data = npz_bytes(rng.choice(("packed", "plain", "floats")))
    path = folder / "train.npz"
    if rng.random() < 0.5:
        path.write_bytes(mutate_bytes(rng, data))
    else:
        spoilt = rng.choice(("x.npy", "y.npy"))
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, mutate_bytes(rng, content[:128]) + content[128:] if name == spoilt else content)
    return read_source("npz", path)


@functools.cache
def picture_bytes(form: str, mode: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (12, 10, 4), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(content, format=form)
    return content.getvalue()


def picture(rng: random.Random, folder: Path) -> Read:
    """The bytes of a picture in a class folder."""
    forms = [(form, "RGB") for form in ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF")]
    forms += [("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA"), ("TIFF", "F"), ("PNG", "I;16"), ("TIFF", "1")]
    form, mode = rng.choice(forms)
    (folder / "train" / "cat").mkdir(parents=True)
    path = folder / "train" / "cat" / f"a.{form.lower()}"
    path.write_bytes(mutate_bytes(rng, picture_bytes(form, mode)))
    return read_source("imagefolder", folder)


@functools.cache
def tar_bytes(kind: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(
        fileobj=content, mode="w", format=tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT
    ) as tar:
        for number in range(3):
            word = b'{"label": 1, "more": [1, 2]}' if kind == "pax" else b"1"
            ending = "json" if kind == "pax" else "cls"
            for name, data in ((f"é{number:04d}.png", picture_bytes("PNG", "RGB")), (f"é{number:04d}.{ending}", word)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def tar(rng: random.Random, folder: Path) -> Read:
    """A shard, or its labels' JSON; half the time the checksums of its headers are right again."""
    data = bytearray(mutate_bytes(rng, tar_bytes(rng.choice(("pax", "gnu")))))
    if rng.random() < 0.5:
        for at in range(0, len(data) - 511, 512):
            if data[at + 257 : at + 262] == b"ustar":
                total = sum(data[at : at + 148]) + 8 * 32 + sum(data[at + 156 : at + 512])
                data[at + 148 : at + 156] = b"%06o\0 " % total
    (folder / "s.tar").write_bytes(data)
    return read_source("webdataset", folder / "s.tar")


def filelist(rng: random.Random, folder: Path) -> Read:
    """A list of pictures."""
    for name in ("a.png", "b c.png"):
        (folder / name).write_bytes(picture_bytes("PNG", "RGB"))
    lines = ("a.png 0", "'b c.png', 1", "# a.png", "a.png\tdog", '"b c.png" cat', "path,label", "", "a.png")
    text = "\n".join(rng.choice(lines) for _ in range(rng.randint(1, 8)))
    (folder / "train.txt").write_bytes(mutate_bytes(rng, text.encode()))
    return read_source("filelist", folder / "train.txt")
