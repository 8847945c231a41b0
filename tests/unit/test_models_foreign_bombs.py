"""Small files that ask for much memory or time: refused by one line, whatever the way."""

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from dist_defend.attacks.badencoder_npz import load_references, load_triggers
from dist_defend.attacks.input_aware import load_generators
from dist_defend.attacks.own_trigger import FromFile
from dist_defend.attacks.pattern_file import open_images
from dist_defend.attacks.reference import ReferenceConfig, references_from
from dist_defend.errors import UserError
from dist_defend.methods.defend.defender import read_index
from dist_defend.methods.defend.pruning.masks import read_mask_values
from dist_defend.models.classifier import build_classifier
from dist_defend.models.foreign_classifier import import_classifier
from dist_defend.models.foreign_file import read_checkpoint
from dist_defend.models.foreign_folder import read_weights
from dist_defend.models.mappings import find_weights
from dist_defend.models.pickled_data import ALLOWED
from dist_defend.models.restricted_pickle import PickleReader, TooMuch, shown

MEBIBYTE = 1 << 20
DOUBLED = b"N" + b"2\x86" * 80  # a tuple of two of the same, 80 times: 2^80 leaves
LETTERS = b"X" + struct.pack("<I", MEBIBYTE) + b"a" * MEBIBYTE


def told(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    line = str(error.value)
    assert line.startswith(str(path)) and line.isprintable() and len(line) < 1000
    return line


CALLS = b"h\x01h\x00\x85R0" * 20_000  # what the memo holds as 1, of what it holds as 0
COPIES = {  # a few bytes ask for a copy, or for something new, again and again
    "lists of a tuple": b"(" + b"N" * 1_000_000 + b"tq\x000cbuiltins\nset\nq\x010" + CALLS,
    "bytes of a text": LETTERS + b"q\x000c_codecs\nencode\nq\x010" + CALLS,
    "dictionaries of pairs": b"(" + b"(I1\nNl" * 100_000 + b"lq\x000ccollections\nOrderedDict\nq\x010" + CALLS,
    "names of calls": b"ca\nB\n" + b"NR2" * 300_000,
    "empty lists": b"]" * 3_000_000,
    "objects": b"ca\nB\nq\x000" + b"h\x00)R" * 1_000_000,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_through_the_memo_are_charged(name: str) -> None:
    reader = PickleReader(ALLOWED, lambda reference: None, 64 * MEBIBYTE)
    with pytest.raises(TooMuch):
        reader.read(io.BytesIO(COPIES[name] + b"."))


def test_the_file_is_told_when_it_builds_too_much(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"]" * 2_000_000 + b".")
    assert "would build far more than a file of its size holds" in told(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [DOUBLED, b"N" + b"\x85" * 300_000])
@pytest.mark.parametrize(
    "program",
    [
        b"(S'storage'\nctorch\nFloatStorage\nS'0'\n%sI1\ntQ.",
        b"ctorch\ndevice\n(%sI1\ntR.",
        b"cnumpy\ndtype\n(%stR.",
        b"c_codecs\nencode\n(S'x'\n%stR.",
        b"cnumpy\ndtype\n(S'f4'\ntR(I3\n%sNNNtb.",
        b"cPIL.Image\nImage\n)R(N%s(I1\nI1\ntNS''\ntb.",
        b"}%sI1\ns.",
        b"ccollections\nOrderedDict\n((%sI1\nltltR.",
    ],
)
def test_nothing_nested_is_rendered_or_hashed(tmp_path: Path, value: bytes, program: bytes) -> None:
    """2^80 leaves would never end; 300,000 levels would overflow C's stack."""
    (tmp_path / "a.pth").write_bytes(program.replace(b"%s", value))
    try:
        read_checkpoint(tmp_path / "a.pth")
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 1000


def test_nested_facts_of_attack_results_are_not_rendered(tmp_path: Path) -> None:
    deep: Any = [1]
    for _ in range(60):
        deep = [deep, deep]
    state = build_classifier("wrn_10_1", 3).net.state_dict()
    good = {"model_name": "none", "num_classes": 3, "model": state, "clean_data": "cifar10", "img_size": [32, 32, 3]}
    for key, value in (("img_size", deep), ("img_size", [deep] * 3), ("num_classes", 2**100_000)):
        torch.save({**good, key: value}, tmp_path / "a.pt")
        with pytest.raises(UserError) as error:
            import_classifier(tmp_path / "a.pt")
        assert str(error.value).isprintable() and len(str(error.value)) < 1000
    torch.save({**good, "epoch": 2**100_000, "best": 2**70}, tmp_path / "a.pt")
    _, report = import_classifier(tmp_path / "a.pt")
    json.dumps(report.facts)


def test_shown_is_short_whatever_it_is_given() -> None:
    assert shown("a\x1b[2J") == "a\\x1b[2J" and shown(3) == "3" and shown(None) == "None" and shown(b"ab") == "b'ab'"
    assert shown([1]) == "a list" and shown(torch.ones(1)) == "a Tensor"
    assert shown(1 << 100_000) == "a number of 100001 bits"
    assert shown("x" * 10**7) == "x" * 80 + "..."


def test_numbers_as_keys_are_counted(tmp_path: Path) -> None:
    """Their hashes can be chosen, so that each new one passes all others."""
    program = b"}(" + b"".join(b"J" + struct.pack("<i", key) + b"N" for key in range(300_000)) + b"u."
    (tmp_path / "a.pth").write_bytes(program)
    assert "would build far more" in told(tmp_path / "a.pth")


def test_the_memo_is_no_dict(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"Nr\xff\xff\xff\x7f.")
    assert "damaged" in told(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(b"NNNNp4\ng2\n.")  # a gap
    assert "damaged" in told(tmp_path / "a.pth")


def test_archives_and_headers_that_list_too_much_are_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"}.")
        for number in range(60_000):
            archive.writestr(f"a/data/{number:020}", b"")
    assert "lists more entries than any such archive has" in told(tmp_path / "a.pth")
    header = json.dumps(
        {str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(80_000)}
    ).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "damaged" in told(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_generators(tmp_path / "a.safetensors", 16, "none")


def test_tensors_within_each_others_memory_are_no_network(tmp_path: Path) -> None:
    state = build_classifier("resnet18", 10).net.state_dict()
    most = max(value.numel() for value in state.values())
    shared = torch.ones(most)
    views = {
        key: shared[: value.numel()].view(value.shape) if value.is_floating_point() else value
        for key, value in state.items()
    }
    torch.save(views, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 11 * MEBIBYTE
    with pytest.raises(UserError, match="values in the memory of"):
        import_classifier(tmp_path / "a.pth", "resnet18")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8])
def test_numbers_of_another_kind_are_one_line(tmp_path: Path, dtype: torch.dtype) -> None:
    state = build_classifier("wrn_10_1", 3).net.state_dict()
    key = next(key for key, value in state.items() if value.is_floating_point())
    safetensors.torch.save_file({**state, key: torch.zeros(state[key].shape).to(dtype)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"{key} is of type {dtype}, not torch.float32"):
        import_classifier(tmp_path / "a.safetensors", "wrn_10_1")


def test_a_double_that_single_precision_does_not_hold_is_not_finite(tmp_path: Path) -> None:
    state = build_classifier("wrn_10_1", 3).net.state_dict()
    torch.save({**state, "fc.bias": torch.full((3,), 1e300, dtype=torch.float64)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"1 tensors hold NaN or infinite values \(fc.bias\)"):
        import_classifier(tmp_path / "a.pth", "wrn_10_1")


def test_more_mappings_and_tensors_than_any_network_has(tmp_path: Path) -> None:
    one = {"weight": torch.ones(1)}
    with pytest.raises(UserError, match="1200 mappings with up to 1 tensors, more than any network"):
        find_weights({str(n): dict(one) for n in range(1200)}, tmp_path)
    with pytest.raises(UserError, match="up to 30000 tensors, more than any network"):
        find_weights({f"{n}.weight": one["weight"] for n in range(30_000)}, tmp_path)


def test_many_places_for_a_network_are_one_line(tmp_path: Path) -> None:
    """Some 60 copies below each other, none of which fits: names that begin alike are compared again and again."""
    value = torch.ones(1)
    names = list(build_classifier("wrn_10_1", 3).net.state_dict())
    state = {"a." * depth + name: value for depth in range(60) for name in names}
    state |= {"a." * 60 + f"x{n}.weight": value for n in range(16_000)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth "):
        import_classifier(tmp_path / "a.pth", "wrn_10_1")


@pytest.mark.parametrize("patch", [7, 0, 2**20])
def test_sizes_read_off_shapes_are_plausible_or_ignored(tmp_path: Path, patch: int) -> None:
    state = {
        "encoder.pos_embedding": torch.zeros(1, 10, 4),
        "pos_embed": torch.zeros(1, 2**20 + 1, 1),
        "conv_proj.weight": torch.zeros(0, 3, patch, patch),
        "patch_embed.proj.weight": torch.zeros(192, 0, patch, patch),
        "cls_token": torch.zeros(1, 1, 4),
        "attnpool.positional_embedding": torch.tensor(1.0),
    }
    torch.save(state, tmp_path / "a.pth")
    for arch in (None, "torchvision:vit_b_16"):
        with pytest.raises(UserError, match=r"a\.pth "):
            import_classifier(tmp_path / "a.pth", arch)


def npz(path: Path, header: bytes, size: int) -> str:
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("t", "tm", "x", "y"):
            archive.writestr(f"{name}.npy", head + bytes(size))
    return str(path)


@pytest.mark.parametrize(
    ("shape", "size"), [("(1000000000,)", 8), ("(100000000, 3)", 300_000_000), ("(-1, 4)", 8), ("(" * 90 + ")" * 90, 8)]
)
def test_npz_files_that_promise_or_unpack_too_much(tmp_path: Path, shape: str, size: int) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path = npz(tmp_path / "a.npz", header, size)
    for read in (load_triggers, load_references, lambda file: FromFile(str(file)).build(16)):
        with pytest.raises(UserError, match=r"a\.npz[ :]") as error:
            read(path)
        assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", 5000, 5000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(5000 * 15_001), 9)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    with pytest.raises(UserError, match="has 5000x5000 pixels, more than"):
        FromFile(str(tmp_path / "a.png")).build(16)


def test_pipes_are_refused_by_every_reader(tmp_path: Path) -> None:
    readers: dict[str, Any] = {
        "a.pth": read_checkpoint,
        "model.safetensors.index.json": read_weights,
        "t.npz": load_triggers,
        "r.npz": lambda path: references_from(ReferenceConfig(file=str(path)), 16),
        "r.png": lambda path: references_from(ReferenceConfig(file=str(path)), 16),
        "p.png": lambda path: FromFile(str(path)).build(16),
        "p.npy": lambda path: FromFile(str(path)).build(16),
        "p.npz": lambda path: FromFile(str(path)).build(16),
        "images.npy": lambda path: open_images(path, 1, 16),
        "g.safetensors": lambda path: load_generators(path, 16, "none"),
        "mask_values.txt": read_mask_values,
        "index.txt": lambda path: read_index(str(path), 10, "rnp.index"),
    }
    for name, read in readers.items():
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=r"not a regular file|is not a file") as error:
            read(tmp_path / name)
        assert name in str(error.value) and str(error.value).isprintable()


def test_unreadable_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a.weight": torch.ones(1)}, tmp_path / "a.pth")
    np.savez(tmp_path / "t.npz", t=np.zeros(1), tm=np.zeros(1))

    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert "cannot be read (Permission denied)" in told(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"t\.npz"):
        load_triggers(tmp_path / "t.npz")


def test_row_numbers_and_masks_of_any_text(tmp_path: Path) -> None:
    for text in ("9" * 5000, str(2**64), "1 x", "\udc80", "1.5"):
        (tmp_path / "index.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match="is no text file of row numbers") as error:
            read_index(str(tmp_path / "index.txt"), 10, "rnp.index")
        assert str(error.value).isprintable() and len(str(error.value)) < 500
    (tmp_path / "m.txt").write_text(f"head\n0 a 0 {'1' * 400}e\x1b[2J\n0 a 0 {'9' * 300}\n")
    with pytest.raises(UserError, match="line 2") as error:
        read_mask_values(tmp_path / "m.txt")
    assert str(error.value).isprintable() and len(str(error.value)) < 500
