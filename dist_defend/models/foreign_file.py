"""Checkpoint files of others, read into plain data: torch's zip archives and its older format, and safetensors.

Objects beside the weights stay placeholders (models.restricted_pickle).
Of a TorchScript archive, as OpenAI's CLIP comes in, the tensors are read and the program is not.
"""

import io
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from dist_defend.errors import UserError
from dist_defend.files import open_regular, read_into
from dist_defend.models.pickled_data import ALLOWED, STORAGES, as_list
from dist_defend.models.restricted_pickle import Buildable, Global, PickleReader, Placeholder, Refused, TooMuch, shown
from dist_defend.models.scripted import ScriptTable, module_state

State = dict[str, Tensor]
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before 1.6 and its _use_new_zipfile_serialization=False
_LEGACY_PROTOCOL = 1001
_MOST_OBJECTS = 96 << 20  # bytes of what a pickle makes, beside twice the file's
_MOST_LISTED = 4 << 20  # bytes of an archive's list of entries, or of a safetensors header: some 40,000 tensors
_MOST_PARTS = 8  # of what a pickle calls a storage


class Unordered(dict[str, Tensor]):
    """A safetensors file's tensors, whose order is not the model's."""


def read_checkpoint(path: str | Path) -> Any:
    """The file's content: tensors, numbers, strings, plain containers, pickled_data's arrays and images, placeholders.

    No code of the file runs, nothing is written, and memory stays within a small multiple of the file's size. UserError
    for a missing or damaged file, a pickle that is an object or asks for a program, and an archive that would swell or
    lead elsewhere.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(
            f"{path} does not exist, is not a file, or may not be read: point at a .pth, .tar, .pt or .safetensors "
            "checkpoint, or at a folder that holds model.safetensors, pytorch_model.bin or the index of their shards"
        )
    try:
        with open_regular(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if path.suffix == ".safetensors":
                return Unordered(sorted(parse_safetensors(file.read()).items()))
            is_archive = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _plain((_read_archive if is_archive else _read_legacy)(file, path, num_bytes))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file that can") from error
    except Refused as error:
        raise pickles_more(path, str(error)) from error
    except TooMuch as error:
        raise UserError(
            f"{path} would build far more than a file of its size holds, and was not read: ask for a file of the state "
            "dict alone, or for safetensors"
        ) from error
    except Exception as error:  # zip, pickle, torch and safetensors each have their own for damaged files
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}): fetch it again") from error


def parse_safetensors(data: bytes) -> State:
    """The tensors. SafetensorError, ValueError or KeyError for a damaged file, and for more tensors than a network's.

    Each takes some twenty times its part of the header.
    """
    if int.from_bytes(data[:8], "little") > _MOST_LISTED:
        raise ValueError("a header longer than any network's")
    return safetensors.torch.load(data)


def _plain(content: Any) -> Any:
    if isinstance(content, Buildable) and content.refused is not None:
        raise Refused(content.refused)
    return content


def pickles_more(path: str | Path, name: str) -> UserError:
    """What is said of an object where weights should be."""
    return UserError(
        f"{path} pickles more than tensors ('{name}'), which could run code, and was not loaded: "
        "ask for a file of the state dict alone, or for safetensors"
    )


def _read_archive(file: IO[bytes], path: Path, num_bytes: int) -> Any:
    check_listing(file, path)
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        (pickled,) = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        root = pickled.removesuffix("data.pkl")
        is_script = f"{root}constants.pkl" in names
        program = f"{root}code/"  # compressed, and never read
        _check_entries([e for e in archive.infolist() if not (is_script and e.filename.startswith(program))], path)
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{path} was written on a big-endian machine: save it again on a little-endian one")
        loaded: dict[str, bytearray] = {}

        def storage(dtype: torch.dtype, key: str, num_values: int) -> Tensor:
            size = num_values * dtype.itemsize
            if key not in loaded:
                loaded[key] = _entry(archive, f"{root}data/{key}", size)
            if len(loaded[key]) != size:
                raise ValueError("storage of another size than the pickle says")
            return torch.frombuffer(loaded[key], dtype=dtype) if num_values else torch.empty(0, dtype=dtype)

        reader = _reader(storage, num_bytes, ScriptTable() if is_script else ALLOWED)
        content = reader.read(io.BytesIO(archive.read(pickled)))
        return module_state(content) if is_script else content


def _entry(archive: zipfile.ZipFile, name: str, size: int) -> bytearray:
    """An entry's bytes; its checksum is looked at. ValueError before anything is read if its size is another."""
    if archive.getinfo(name).file_size != size:
        raise ValueError("storage of another size than the pickle says")
    data = bytearray(size)
    with archive.open(name) as stored:
        if not read_into(stored, memoryview(data)) or stored.read(1):
            raise ValueError("storage cut short")
    return data


def check_listing(file: IO[bytes], path: str | Path) -> None:
    """UserError for a zip archive whose list of entries is longer than any network's; zipfile reads it as a whole.

    Its length stands in the archive's end, twice in that of a large one.
    """
    at = file.seek(0, os.SEEK_END)
    file.seek(max(0, at - (1 << 16) - 100))  # the end, behind which a comment of 64 KiB may stand
    tail = file.read()
    lengths = [0]
    for mark, form, offset in ((b"PK\x05\x06", "<I", 12), (b"PK\x06\x06", "<Q", 40)):
        place = -1
        while (place := tail.find(mark, place + 1)) >= 0:
            if place + offset + 8 <= len(tail):
                lengths += struct.unpack_from(form, tail, place + offset)
    if max(lengths) > _MOST_LISTED:
        raise UserError(f"{path} lists more entries than any such archive has, and was not read: fetch it again")
    file.seek(0)


def _check_entries(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """torch.save stores without compression, so an honest archive declares no more bytes than the file has."""
    for entry in entries:
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in parts[0]:
            raise UserError(
                f"{path} has an entry that leads out of the archive ('{shown(entry.filename)}') and was not read: "
                "ask for the file as torch.save wrote it"
            )
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UserError(
                f"{path} has a compressed entry ('{shown(entry.filename)}', {entry.compress_size} bytes that swell to "
                f"{entry.file_size}) and was not read: torch.save compresses nothing, so save it again with torch.save"
            )
    if len({entry.filename for entry in entries}) != len(entries):
        raise UserError(f"{path} has two entries of one name and was not read: save it again with torch.save")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{path} has entries that overlap and was not read: save it again with torch.save")


def _read_legacy(file: IO[bytes], path: Path, num_bytes: int) -> Any:
    """Three pickles as header, the content's, that of the storages' keys, then each storage's length and bytes."""
    storages: dict[str, Tensor] = {}
    promised = 0

    def storage(dtype: torch.dtype, key: str, num_values: int) -> Tensor:
        nonlocal promised
        if key not in storages:
            promised += num_values * dtype.itemsize
            if promised > num_bytes:
                raise ValueError("storages larger than the file")
            storages[key] = torch.empty(num_values, dtype=dtype)
        if storages[key].dtype != dtype or len(storages[key]) != num_values:
            raise ValueError("storage under two descriptions")
        return storages[key]

    reader = _reader(storage, num_bytes)
    header = [_plain(reader.read(file)) for _ in range(3)]
    if header[:2] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL] or not header[2]["little_endian"]:
        raise ValueError("not written by torch.save on a little-endian machine")
    content = reader.read(file)
    for key in as_list(reader.read(file)):
        values = storages.pop(key if isinstance(key, str) else "")
        (num_values,) = struct.unpack("<q", file.read(8))
        if not read_into(file, values.view(torch.uint8).numpy().data) or num_values != len(values):
            raise ValueError("storage cut short")
    if storages:
        raise ValueError("storages missing")
    return content


def _reader(
    storage: Callable[[torch.dtype, str, int], Tensor],
    num_bytes: int,
    table: Mapping[str, Callable[..., Any] | None] = ALLOWED,
) -> PickleReader:
    def find(reference: Any) -> Tensor | Placeholder:
        if not isinstance(reference, tuple) or len(reference) > _MOST_PARTS:
            raise ValueError("storage")
        if reference[0] == "module":  # a class with its source, in files from before torch 1.6
            return reference[1] if isinstance(reference[1], Placeholder) else Placeholder("a persistent 'module'")
        kind, stored, key, _, num_values, *view = reference
        dtype = STORAGES.get(stored.name) if isinstance(stored, Global) else None
        if kind != "storage" or dtype is None or any(part is not None for part in view):
            raise Refused(f"a persistent '{shown(stored.name if isinstance(stored, Global | Placeholder) else kind)}'")
        if not isinstance(key, str) or type(num_values) is not int or not 0 <= num_values < 2**48:
            raise ValueError("storage")
        return storage(dtype, key, num_values)

    return PickleReader(table, find, 2 * num_bytes + _MOST_OBJECTS)


def unwrap(content: Any, path: str | Path, wrappers: tuple[str, ...]) -> State:
    """The state dict within these keys and without the prefix 'module.'. UserError for none."""
    for wrapper in wrappers:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no state dict of named tensors: save model.state_dict()")
    for key in content:
        if not isinstance(key, str) or not key.isprintable() or len(key) > 300:
            raise UserError(f"{path} has a tensor with no proper name ('{shown(key)}'): save model.state_dict()")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}
