"""Checkpoint files of others, read into plain data: torch's zip archives and its older format, and safetensors.

Objects beside the weights stay placeholders (models.restricted_pickle).
Of a TorchScript archive, as OpenAI's CLIP comes in, the tensors are read and the program is not.
"""

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dist_defend.errors import UserError
from dist_defend.models.pickled_data import ALLOWED, STORAGES
from dist_defend.models.restricted_pickle import Buildable, Global, PickleReader, Placeholder, Refused, shown
from dist_defend.models.scripted import ScriptTable, module_state

State = dict[str, Tensor]
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before 1.6 and its _use_new_zipfile_serialization=False
_LEGACY_PROTOCOL = 1001


class Unordered(dict[str, Tensor]):
    """A safetensors file's tensors, whose order is not the model's."""


def read_checkpoint(path: str | Path) -> Any:
    """The file's content: tensors, numbers, strings, plain containers, pickled_data's arrays and images, placeholders.

    No code of the file runs, nothing is written, and memory stays within a small multiple of the file's size. UserError
    for a missing or damaged file, a pickle that is an object or asks for a program, and an archive that would swell or
    lead elsewhere.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist or is not a file: point at a .pth, .tar, .pt or .safetensors checkpoint, or at a "
            "folder that holds model.safetensors, pytorch_model.bin or the index of their shards"
        )
    try:
        if path.suffix == ".safetensors":
            return Unordered(sorted(safetensors.torch.load(path.read_bytes()).items()))
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            content = _read_archive(file, path) if is_archive else _read_legacy(file, path.stat().st_size)
        return _plain(content)
    except UserError:
        raise
    except Refused as error:
        raise pickles_more(path, str(error)) from error
    except Exception as error:  # zip, pickle, torch and safetensors each have their own for damaged files
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}): fetch it again") from error


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


def _read_archive(file: IO[bytes], path: Path) -> Any:
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
            if key not in loaded:
                loaded[key] = bytearray(archive.read(f"{root}data/{key}"))
            if len(loaded[key]) != num_values * dtype.itemsize:
                raise ValueError("storage of another size than the pickle says")
            return torch.frombuffer(loaded[key], dtype=dtype) if num_values else torch.empty(0, dtype=dtype)

        reader = _reader(storage, ScriptTable() if is_script else ALLOWED)
        content = reader.read(io.BytesIO(archive.read(pickled)))
        return module_state(content) if is_script else content


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


def _read_legacy(file: IO[bytes], num_bytes: int) -> Any:
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

    reader = _reader(storage)
    header = [_plain(reader.read(file)) for _ in range(3)]
    if header[:2] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL] or not header[2]["little_endian"]:
        raise ValueError("not written by torch.save on a little-endian machine")
    content = reader.read(file)
    for key in reader.read(file):
        values = storages.pop(key)
        (num_values,) = struct.unpack("<q", file.read(8))
        data = np.frombuffer(file.read(values.nbytes), np.uint8)
        if num_values != len(values) or len(data) != values.nbytes:
            raise ValueError("storage cut short")
        values.view(torch.uint8).numpy()[:] = data
    if storages:
        raise ValueError("storages missing")
    return content


def _reader(
    storage: Callable[[torch.dtype, str, int], Tensor], table: Mapping[str, Callable[..., Any] | None] = ALLOWED
) -> PickleReader:
    def find(reference: Any) -> Tensor | Placeholder:
        if reference[0] == "module":  # a class with its source, in files from before torch 1.6
            return reference[1] if isinstance(reference[1], Placeholder) else Placeholder("a persistent 'module'")
        kind, stored, key, _, num_values, *view = reference
        dtype = STORAGES.get(stored.name) if isinstance(stored, Global) else None
        if kind != "storage" or dtype is None or any(part is not None for part in view):
            raise Refused(f"a persistent '{shown(stored.name if isinstance(stored, Global | Placeholder) else kind)}'")
        if not isinstance(key, str) or type(num_values) is not int or num_values < 0:
            raise ValueError("storage")
        return storage(dtype, key, num_values)

    return PickleReader(table, find)


def unwrap(content: Any, path: str | Path, wrappers: tuple[str, ...]) -> tuple[State, list[str]]:
    """The state dict within these keys and without the prefix 'module.'; and what was taken off. UserError for none."""
    taken: list[str] = []
    for wrapper in wrappers:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            taken.append(f"in '{wrapper}'")
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no state dict of named tensors: save model.state_dict()")
    for key in content:
        if not isinstance(key, str) or not key.isprintable() or len(key) > 300:
            raise UserError(f"{path} has a tensor with no proper name ('{shown(key)}'): save model.state_dict()")
    state = dict(content)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
        taken.append("prefix 'module.'")
    return state, taken
