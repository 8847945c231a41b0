"""JPEGs of a source that need no change keep their bytes; the others are encoded."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_defend.cli import main
from dist_defend.data import ffcv_presence
from dist_defend.data.beton import open_beton
from dist_defend.data.pictures import open_picture
from dist_defend.data.store import PreparedDataset, open_dataset

pytestmark = pytest.mark.skipif(not ffcv_presence.ffcv_installed(), reason="only ffcv writes .beton")


def picture(number: int, mode: str = "RGB", size: tuple[int, int] = (33, 27)) -> Image.Image:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = [np.sin(x / (3 + c) + number) * np.cos(y / (4 + c)) for c in range(3)]
    return Image.fromarray(((np.stack(waves, axis=-1) + 1) * 127).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str = "jpeg", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned() -> bytes:
    """By its EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(9, size=(30, 30)), exif=exif)


KEPT = {
    "baseline": encoded(picture(0), quality=60),
    "progressive": encoded(picture(1), quality=80, progressive=True),
    "sampled_444": encoded(picture(2), quality=90, subsampling=0),
    "grey": encoded(picture(3, "L")),
    "commented": encoded(picture(4), comment=b"x" * 100),
}
CHANGED = {
    "cmyk": encoded(picture(5, "CMYK")),
    "upright": turned(),
    "png": encoded(picture(6), "png"),
    "padded": encoded(picture(7)) + bytes(33 * 27 * 3),  # more bytes than its pixels have
    "segments": encoded(picture(8))[:2] + b"\xff\xfe\x00\x04ab" * 40 + encoded(picture(8))[2:],  # readers stop at 32
}


def stored(dataset: PreparedDataset) -> list[bytes]:
    """The bytes of each image in the file, in the source's order."""
    assert dataset.beton is not None
    images = open_beton(dataset.beton).images("image")
    assert not images.is_raw.any()
    found = {}
    for i, source_row in enumerate(dataset.source_rows):
        start = int(images.addresses[i])
        found[int(source_row)] = images.memory[start : start + int(images.sizes[i])].tobytes()
    return [found[row] for row in range(len(dataset))]


def prepared(folder: Path, *more: str, kind: str = "imagefolder") -> PreparedDataset:
    command = ["data", "prepare", kind, "--path", str(folder), "--out", f"{folder}.data", "--write-mode", "jpg", *more]
    assert main(command) == 0
    return open_dataset(next(Path(f"{folder}.data").iterdir()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train/only").mkdir(parents=True)
    for name, content in (KEPT | CHANGED).items():
        (tmp_path / f"train/only/{name}.{'png' if name == 'png' else 'jpg'}").write_bytes(content)
    return tmp_path


def test_bytes_stay_where_the_picture_would(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = prepared(folder)
    names = sorted(KEPT | CHANGED)
    for name, content in zip(names, stored(dataset), strict=True):
        source = (KEPT | CHANGED)[name]
        assert (content == source) == (name in KEPT), name
        assert name not in CHANGED or len(content) < len(source) + 2000
    by_source = np.argsort(dataset.source_rows)
    for name in KEPT:
        pixels, _ = open_picture(KEPT[name])
        assert np.array_equal(dataset.image(int(by_source[names.index(name)])), pixels)
    told = f"JPEGs kept as the source has them: {len(KEPT)} of {len(names)}"
    assert told in dataset.manifest.notes and told in capsys.readouterr().out


def test_resized_ones_are_encoded_and_raw_ones_are_not_jpegs(folder: Path) -> None:
    smaller = prepared(folder, "--max-resolution", "20")
    assert not set(stored(smaller)) & set(KEPT.values())
    assert any(note.endswith(f"0 of {len(smaller)}") for note in smaller.manifest.notes)
    same = prepared(folder, "--max-resolution", "33")  # which changes no picture
    assert set(stored(same)) & set(KEPT.values()) == set(KEPT.values())
    assert not any("JPEG" in note for note in prepared(folder, "--write-mode", "raw").manifest.notes)


def test_those_of_shards_and_of_other_files_of_ffcv_are_kept(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number, content in enumerate(KEPT.values()):
            for name, data in ((f"{number}.jpg", content), (f"{number}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shard = prepared(tmp_path / "train.tar", kind="webdataset")
    assert stored(shard) == list(KEPT.values())
    assert shard.beton is not None
    again = prepared(shard.beton, kind="beton")
    assert sorted(stored(again)) == sorted(KEPT.values())
