"""``dist-defend import`` of broken and hostile checkpoints: a model folder or one line, and nothing is ever run."""

import argparse
import contextlib
import functools
import io
import json
import os
import pickle
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from dist_defend import importing
from dist_defend.errors import UserError
from dist_defend.models.artifact import load_artifact
from dist_defend.models.classifier import build_classifier
from tests.fuzz.harness import bad_outcomes
from tests.fuzz.mutate import mutate_bytes, mutate_tree
from tests.fuzz.pickles import mutate_pickle, packed, unpacked

Read = Callable[[], object]
ARCH = "wrn_10_1"  # the smallest
SURFACES = (
    *("archive", "archive_pickle", "legacy", "attack_result", "attack_result_pickle"),
    *("safetensors_file", "torchscript", "shards", "calls"),
)


def test_import(count: int) -> None:
    assert bad_outcomes(f"tests.fuzz.test_import:{','.join(SURFACES)}", count) == []


def archive(rng: random.Random, folder: Path) -> Read:
    return imported(rng, folder, "a.pth", mutate_bytes(rng, saved()))


def archive_pickle(rng: random.Random, folder: Path) -> Read:
    return imported(rng, folder, "a.pth", with_pickle(saved(), lambda data: mutate_pickle(rng, data)))


def legacy(rng: random.Random, folder: Path) -> Read:
    data = saved(is_zip=False)
    file = io.BytesIO(data)
    for _ in range(3):
        pickle.load(file)
    start = file.tell()
    end = data.rindex(b"\x80\x02]")  # the list of the storages' keys
    if rng.random() < 0.5:
        return imported(rng, folder, "a.pth", mutate_bytes(rng, data[: end + 4000]) + data[end + 4000 :])
    return imported(rng, folder, "a.pth", data[:start] + mutate_pickle(rng, data[start:end]) + data[end:])


def attack_result(rng: random.Random, folder: Path) -> Read:
    """BackdoorBench's, with images inside or as PNGs beside it."""
    content = mutate_tree(rng, results(is_beside := rng.random() < 0.5))
    if is_beside:
        for row in range(3):
            (folder / "bd_test_dataset" / "0").mkdir(parents=True, exist_ok=True)
            data = png(row)
            data = mutate_bytes(rng, data) if rng.random() < 0.2 else data
            (folder / "bd_test_dataset" / "0" / f"{row}.png").write_bytes(data)
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.5)
    return imported(rng, folder, "attack_result.pt", file.getvalue())


def attack_result_pickle(rng: random.Random, folder: Path) -> Read:
    file = io.BytesIO()
    torch.save(results(False), file)
    data = with_pickle(file.getvalue(), lambda data: mutate_pickle(rng, data))
    return imported(rng, folder, "attack_result.pt", data)


def safetensors_file(rng: random.Random, folder: Path) -> Read:
    data = safetensors.torch.save(state())
    if rng.random() < 0.3:
        return imported(rng, folder, "a.safetensors", mutate_bytes(rng, data))
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(mutate_tree(rng, json.loads(data[8 : 8 + length]))).encode()
    header += b" " * (-len(header) % 8)
    return imported(rng, folder, "a.safetensors", len(header).to_bytes(8, "little") + header + data[8 + length :])


def torchscript(rng: random.Random, folder: Path) -> Read:
    data = scripted()
    if rng.random() < 0.2:
        return imported(rng, folder, "a.pt", mutate_bytes(rng, data))
    return imported(rng, folder, "a.pt", with_pickle(data, lambda data: mutate_pickle(rng, data)))


def shards(rng: random.Random, folder: Path) -> Read:
    """As Accelerate and transformers write them."""
    tensors = state()
    is_safe = rng.random() < 0.5
    kind = "model{}.safetensors" if is_safe else "pytorch_model{}.bin"
    places = {key: kind.format(f"-{number % 2 + 1:05}-of-00002") for number, key in enumerate(tensors)}
    for file in set(places.values()):
        part = {key: tensors[key] for key, place in places.items() if place == file}
        (safetensors.torch.save_file if is_safe else torch.save)(part, folder / file)
    index = folder / f"{kind.format('')}.index.json"
    tree = {"metadata": {"total_size": 1}, "weight_map": places}
    if rng.random() < 0.1:
        places[rng.choice(list(places))] = name = rng.choice(("pipe.bin", "folder.bin", "far.bin"))
        if name == "pipe.bin":
            os.mkfifo(folder / name)
        elif name == "folder.bin":
            (folder / name).mkdir()
        else:
            (folder / name).symlink_to("/etc/passwd")
    data = json.dumps(mutate_tree(rng, tree)).encode()
    index.write_bytes(mutate_bytes(rng, data) if rng.random() < 0.3 else data)
    if rng.random() < 0.2:
        victim = folder / rng.choice(sorted(set(places.values())))
        victim.write_bytes(mutate_bytes(rng, victim.read_bytes()))
    return imported(rng, folder, rng.choice((".", index.name)))


def calls(rng: random.Random, folder: Path) -> Read:
    """Pickles that would start a program, changed or not. MARKER is there if one ever ran."""
    bomb = rng.choice(BOMBS_ALIVE)(f"touch {MARKER}")
    content = rng.choice((lambda: {"net": state(), "x": bomb}, lambda: {**state(), "conv1.weight": bomb}, lambda: bomb))
    if rng.random() < 0.5:
        file = io.BytesIO()
        torch.save(content(), file)
        data = with_pickle(file.getvalue(), lambda data: mutate_pickle(rng, data) if rng.random() < 0.8 else data)
    else:
        data = mutate_pickle(rng, pickle.dumps(bomb, protocol=rng.randrange(6)))
    return imported(rng, folder, "a.pth", data)


MARKER = Path(tempfile.gettempdir()) / f"dist_defend_fuzz_{os.getpid()}"


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


BOMBS_ALIVE: tuple[Callable[[str], Any], ...] = (
    lambda shell: Call(os.system, shell),
    lambda shell: Call(eval, f"__import__('os').system({shell!r})"),
    lambda shell: [Call(exec, f"import os; os.system({shell!r})")],
    lambda shell: Call(getattr, Call(__import__, "os"), "system"),
    lambda shell: {"a": (Call(os.popen, shell), 1)},
)


def imported(rng: random.Random, folder: Path, name: str, data: bytes | None = None) -> Read:
    """Writes the file; what imports it by the command's own function, and loads what was written."""
    if data is not None:
        (folder / name).write_bytes(data)
    options = [] if rng.random() < 0.1 else ["--arch", ARCH]
    options += ["--by-position"] if rng.random() < 0.05 else []
    args = parser().parse_args([str(folder / name), "--out", str(folder / "out"), *options])
    warm()

    def read() -> None:
        try:
            importing.main(args)
            load_artifact(folder / "out")
        except UserError:
            assert not (folder / "out" / "model.json").exists(), "refused, and written nevertheless"
            raise
        finally:
            assert not MARKER.exists(), "something of the file was run"

    return read


@functools.cache
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    importing.add_arguments(made)
    return made


@functools.cache
def warm() -> None:
    """Whatever is looked up once is looked up outside of the measured time."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        (Path(folder) / "a.pth").write_bytes(saved())
        importing.main(parser().parse_args([f"{folder}/a.pth", "--out", f"{folder}/out"]))


@functools.cache
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build_classifier(ARCH, 3).net.state_dict()


@functools.cache
def saved(is_zip: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": state(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}, file,
               _use_new_zipfile_serialization=is_zip)  # fmt: skip
    return file.getvalue()


@functools.cache
def scripted() -> bytes:
    net: nn.Module = build_classifier(ARCH, 3).net.eval()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, torch.zeros(1, 3, 32, 32)), file)
    return file.getvalue()


def pixels(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (32, 32, 3), np.uint8)


@functools.cache
def png(row: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(row)).save(file, "PNG")
    return file.getvalue()


def results(is_beside: bool) -> dict[str, Any]:
    rows: dict[Any, Any] = {}
    for row in range(3):
        path = {"path": f"./record/x/bd_test_dataset/0/{row}.png", "other_info": [0, row % 3]}
        rows[row] = path if is_beside else (Image.fromarray(pixels(row)), 0, row % 3)
    split = {
        "bd_data_container": {"data_dict": rows, "save_folder_path": "x"},
        "original_index_array": [2, 0, 1],
        "poison_indicator": np.ones(3),
    }
    return {
        "model_name": "none",
        "num_classes": 3,
        "model": dict(state()),
        "img_size": [32, 32, 3],
        "clean_data": "cifar10",
        "bd_train": None,
        "bd_test": split,
    }


def with_pickle(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    entries = unpacked(data)
    (name,) = (name for name in entries if name.endswith("/data.pkl"))
    return packed({**entries, name: change(entries[name])})
