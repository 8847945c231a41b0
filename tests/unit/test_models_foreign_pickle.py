"""Files made to do harm: nothing in them runs, nothing is written, and the user reads one line."""

import builtins
import io
import os
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.models.foreign_file import read_checkpoint


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def command(tmp_path: Path) -> str:
    return f"touch {tmp_path / 'exploded'}"


def object_array(value: Any) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = value
    return array


HIDING_PLACES: dict[str, Callable[[str], Any]] = {
    "weights": lambda shell: {"net": {"conv1.weight": Call(os.system, shell)}, "acc": 1.0, "epoch": 1},
    "optimizer": lambda shell: {"state_dict": {"w": torch.ones(1)}, "optimizer": {"state": [Call(os.system, shell)]}},
    "object array": lambda shell: {"poison_indicator": object_array(Call(os.system, shell))},
    "dictionary key": lambda shell: {Call(os.system, shell): 1},
    "getattr": lambda shell: Call(getattr, Call(__import__, "os"), "system"),
    "eval": lambda shell: Call(builtins.eval, f"__import__('os').system({shell!r})"),
    "allowed class": lambda shell: Call(OrderedDict, [[Call(os.system, shell), 1]]),
    "hook": lambda shell: Call(
        torch._utils._rebuild_tensor_v2, torch.ones(1).untyped_storage(), 0, (1,), (1,), False, Call(os.system, shell)
    ),
}


@pytest.mark.parametrize("place", HIDING_PLACES)
@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 0", "protocol 5"])
def test_calls_are_refused_wherever_they_hide(
    tmp_path: Path, place: str, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    content = HIDING_PLACES[place](command(tmp_path))
    source = tmp_path / "suspect.pth"
    if form in ("zip", "legacy"):
        torch.save(content, source, _use_new_zipfile_serialization=form == "zip")
    else:
        source.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    assert main(["import", str(source), "--out", str(tmp_path / "model")]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {source} pickles more than tensors ('") and error.count("\n") == 1
    assert "ask for a file of the state dict alone" in error
    assert [file.name for file in tmp_path.iterdir()] == ["suspect.pth"]


def test_the_bomb_is_live(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(HIDING_PLACES["optimizer"](command(tmp_path))))
    assert (tmp_path / "exploded").exists()


RAW = {
    "a name with a dot": (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
    "a name on the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "os.system"),
    "a name below a module": (b"ctorch.serialization\nos.system\n(tR.", "torch.serialization.os.system"),
    "an old instance": (b"(S'true'\nios\nsystem\n.", "os.system"),
    "an old object": (b"(cos\nsystem\nS'true'\no.", "os.system"),
    "an extension": (b"\x82\x01.", "opcode EXT1"),
    "keywords": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "opcode NEWOBJ_EX"),
    "an allowed name that makes nothing": (b"ctorch\nFloatStorage\n(I99\ntR.", "a call of torch.FloatStorage"),
    "a call of a string": (b"S'os.system'\n(S'true'\ntR.", "a call of str"),
    "attributes for a name": (b"ccollections\nOrderedDict\n}S'__setstate__'\nS'x'\nsb.", "attributes for a Global"),
    "attributes for a list": (b"]}b.", "attributes for a list"),
    "items for a tuple": (b"(t(K\x01e.", "items for a tuple"),
    "a tuple as a key": (b"}(tK\x01s.", "a tuple as a key"),
    "a persistent module": (b"(S'module'\nS'a'\nS'b'\nS'c'\nI0\nt\x51.", "a persistent 'module'"),
    "a persistent call": (b"(S'storage'\ncos\nsystem\nS'a'\nS'cpu'\nI1\ntQ.", "os.system"),
    "another encoding": (b"c_codecs\nencode\n(S'x'\nS'bz2'\ntR.", "bytes in bz2"),
    "a name with an escape": (b"\x80\x04\x8c\x05\x1b[2Jo\x8c\x02a\n\x93.", "\\x1b[2Jo.a"),
    "an array of objects": (
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(tcnumpy\ndtype\n(S'O8'\ntRI00\n]tb.",
        "numpy values of type O8",
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_opcodes_beyond_plain_data_are_named(tmp_path: Path, name: str) -> None:
    data, told = RAW[name]
    (tmp_path / "raw.pth").write_bytes(data)
    write_archive(tmp_path / "archive.pth", {"a/data.pkl": data})
    for file in ("raw.pth", "archive.pth"):
        assert told in refused(tmp_path / file)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    told = str(error.value)
    assert told.startswith(str(path)) and "\n" not in told and ": " in told and told.isprintable()
    return told


def write_archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def test_archives_that_swell_are_not_unpacked(tmp_path: Path) -> None:
    write_archive(tmp_path / "bomb.pth", {"a/data.pkl": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    assert "a compressed entry ('a/data.pkl'" in refused(tmp_path / "bomb.pth")
    write_archive(tmp_path / "lie.pth", {"a/data.pkl": b"N.", "a/data/0": b"12345678"})
    honest = (tmp_path / "lie.pth").read_bytes()
    for size, told in ((8, "entries that overlap"), (1 << 31, "a compressed entry")):  # both sizes, and one of them
        entry = honest.rindex(b"PK\x01\x02")
        compressed = 1 << 30 if size == 8 else 8
        sizes = struct.pack("<II", compressed, compressed if size == 8 else size)
        (tmp_path / "lie.pth").write_bytes(honest[: entry + 20] + sizes + honest[entry + 28 :])
        assert told in refused(tmp_path / "lie.pth")


@pytest.mark.parametrize("name", ["../../evil", "a/../../evil", "/etc/evil", "a\\..\\..\\evil", "C:\\evil"])
def test_archives_that_lead_out_of_themselves_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    write_archive(tmp_path / "in" / "a.pth", {"a/data.pkl": b"}.", name: b"x"})
    assert "leads out of the archive" in refused(tmp_path / "in" / "a.pth")
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "a.pth"]


def test_two_entries_of_one_name_are_not_read(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"}.")
        archive.writestr("a/data.pkl", b"]. ")
    assert "two entries of one name" in refused(tmp_path / "a.pth")


def tensor_pickle(num_values: int, offset: int, size: int, stride: int) -> bytes:
    storage = f"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{num_values}\ntQ"
    return f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n(I{size}\nt(I{stride}\ntI00\nNtR.".encode()


def test_tensors_stay_within_their_storage(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    floats = np.arange(4, dtype=np.float32)
    write_archive(path, {"a/data.pkl": tensor_pickle(4, 1, 3, 1), "a/data/0": floats.tobytes()})
    assert read_checkpoint(path).tolist() == [1, 2, 3]
    for numbers in ((400, 0, 4, 1), (4, 2, 3, 1), (4, 0, 4, 2), (4, -1, 2, 1), (4, 0, 10**12, 0), (4, 0, 2, -1)):
        write_archive(path, {"a/data.pkl": tensor_pickle(*numbers), "a/data/0": floats.tobytes()})
        assert "damaged or not a checkpoint" in refused(path), numbers


def test_storages_of_the_older_format_stay_within_the_file(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"w": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
    honest = path.read_bytes()
    assert read_checkpoint(path)["w"].tolist() == [0, 1, 2, 3]
    for before, after, cause in (
        (b"K\x04Ntq", b"J\xff\xff\xff\x7fNtq", "storages larger than the file"),  # 8 GiB
        (struct.pack("<q", 4), struct.pack("<q", 1 << 40), "storage cut short"),
    ):
        assert honest.count(before) == 1
        path.write_bytes(honest.replace(before, after))
        with pytest.raises(UserError, match="damaged or not a checkpoint") as error:
            read_checkpoint(path)
        assert str(error.value.__cause__) == cause


def test_cut_and_flipped_files_are_damaged_whatever_is_left_of_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for is_zip in (True, False):
        path = tmp_path / "a.pth"
        state = OrderedDict(a=torch.randn(3, 5), b=torch.ones(2, dtype=torch.int64))
        torch.save({"net": state, "acc": 84.46, "epoch": 48}, path, _use_new_zipfile_serialization=is_zip)
        whole = path.read_bytes()
        for length in [0, 1, 3, *rng.integers(4, len(whole) - 1, 40).tolist()]:
            path.write_bytes(whole[:length])
            assert "damaged or not a checkpoint" in refused(path)
        for _ in range(200):
            flipped = bytearray(whole)
            flipped[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            try:
                read_checkpoint(path)  # what is read although a bit flipped is data nevertheless
            except UserError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_deep_nesting_neither_recurses_nor_crashes(tmp_path: Path) -> None:
    (tmp_path / "deep.pth").write_bytes(b"N" + b"\x85" * 300_000 + b".")
    assert "damaged or not a checkpoint" in refused(tmp_path / "deep.pth")
    (tmp_path / "deep.pth").write_bytes(b"}N" + b"\x85" * 300_000 + b"K\x01s.")
    assert "a tuple as a key" in refused(tmp_path / "deep.pth")


def test_what_is_no_file_of_its_own_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is not a file" in refused(tmp_path / "pipe.pth")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_plain_data_comes_back_as_it_was(tmp_path: Path, is_zip: bool, protocol: int) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 4, 3), np.uint8)
    arrays = {
        str(t): rng.integers(0, 2, (2, 3)).astype(t) for t in ("bool", "uint8", "int16", ">i4", "int64", "float32")
    }
    arrays |= {"Fortran": np.asfortranarray(rng.random((2, 3))), "empty": np.zeros((0, 3))}
    base = torch.arange(12.0)
    tensors = {str(t): torch.tensor([0, 1, 2]).to(t) for t in (torch.float64, torch.bfloat16, torch.int8, torch.bool)}
    tensors |= {"turned": base.view(3, 4).T, "shared": base[2:5], "scalar": torch.tensor(3.5), "empty": torch.zeros(0)}
    plain: list[Any] = [1, -(2**70), 2.5, True, None, "text é", b"", b"\x00\xff", (1, (2,)), [[]], {"a": {3: 4}}]
    content = {
        "tensors": tensors,
        "arrays": arrays,
        "plain": plain,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "numbers": [np.float32(3.5), np.int64(7), np.bool_(True)],
        "images": [Image.fromarray(pixels), Image.fromarray(pixels[:, :, 0])],
        "counts": Counter({30: 1}),
        "size": torch.Size((2, 3)),
    }
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    read = read_checkpoint(tmp_path / "a.pt")
    assert read["plain"] == plain
    assert all(read["tensors"][k].equal(v) and read["tensors"][k].dtype == v.dtype for k, v in tensors.items())
    assert all(np.array_equal(read["arrays"][k].value, v) for k, v in arrays.items())
    assert read["numbers"] == [3.5, 7, True] and read["counts"] == {30: 1} and read["size"] == (2, 3)
    assert not read["parameter"].requires_grad and read["parameter"].tolist() == [1, 1]
    colour, grey = (image.value for image in read["images"])
    assert np.array_equal(colour, pixels) and np.array_equal(grey, np.repeat(pixels[:, :, :1], 3, axis=2))


def test_a_checksum_guards_each_entry(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(100.0)}, buffer)
    data = buffer.getvalue()
    where = data.index(np.arange(100, dtype=np.float32).tobytes())
    (tmp_path / "a.pth").write_bytes(data[:where] + b"\x01" + data[where + 1 :])
    assert "damaged or not a checkpoint (BadZipFile)" in refused(tmp_path / "a.pth")
