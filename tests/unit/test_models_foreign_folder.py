"""Folders and shards, as Accelerate's save_model and transformers' save_pretrained write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.models.artifact import load_classifier
from dist_defend.models.classifier import build_classifier
from dist_defend.models.foreign_classifier import import_classifier
from dist_defend.models.foreign_folder import read_weights

State = dict[str, Tensor]
WRITERS: dict[str, tuple[str, Callable[[State, Path], Any]]] = {
    "safetensors": ("model{}.safetensors", safetensors.torch.save_file),
    "bin": ("pytorch_model{}.bin", torch.save),
}


def state_of() -> State:
    torch.manual_seed(0)
    return build_classifier("wrn_10_1", 10).net.state_dict()


def write_shards(folder: Path, kind: str, count: int = 3) -> Path:
    """The shards and their index."""
    name, write = WRITERS[kind]
    state = state_of()
    folder.mkdir()
    places = {key: name.format(f"-{n % count + 1:05}-of-{count:05}") for n, key in enumerate(state)}
    for file in set(places.values()):
        write({key: state[key] for key, place in places.items() if place == file}, folder / file)
    index = folder / f"{name.format('')}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("kind", WRITERS)
def test_shards_come_in_by_their_folder_and_by_their_index(tmp_path: Path, kind: str) -> None:
    index = write_shards(tmp_path / "saved", kind)
    for number, source in enumerate((tmp_path / "saved", index)):
        out = tmp_path / f"model{number}"
        assert main(["import", str(source), "--out", str(out)]) == 0
        found = load_classifier(out)[0].net.state_dict()
        assert all(found[key].equal(value) for key, value in state_of().items())
    shard = next(path for path in index.parent.iterdir() if "-00002-of-" in path.name)
    with pytest.raises(UserError, match=r"is shard 2 of 3: point at its folder, .*saved"):
        read_weights(shard)
    with pytest.raises(UserError, match="keeps no order"):
        import_classifier(index, by_position=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_with_one_file_is_that_file(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    write(state_of(), tmp_path / name.format(""))
    model, report = import_classifier(tmp_path)
    assert report.arch == "wrn_10_1" and model.net.get_parameter("fc.bias").equal(state_of()["fc.bias"])


def test_a_shard_of_one_is_a_file(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "saved", "safetensors", count=1)
    assert import_classifier(index.parent / "model-00001-of-00001.safetensors")[1].arch == "wrn_10_1"


def change_index(**changes: Any) -> Callable[[Path], None]:
    def change(index: Path) -> None:
        index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))

    return change


def link_shard(index: Path) -> None:
    shard = index.parent / "model-00001-of-00003.safetensors"
    shard.rename(index.parent.parent / "elsewhere.safetensors")
    shard.symlink_to(index.parent.parent / "elsewhere.safetensors")


HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "upwards": (change_index(weight_map={"a": "../model.safetensors"}), "leads out of its folder"),
    "absolute": (change_index(weight_map={"a": "/etc/model.safetensors"}), "leads out of its folder"),
    "a folder below": (change_index(weight_map={"a": "b/model.safetensors"}), "leads out of its folder"),
    "another kind of file": (change_index(weight_map={"a": "passwd"}), "is no shard"),
    "a link": (link_shard, "leads out of its folder"),
    "no map": (change_index(weight_map=[1]), "is no index of shards"),
    "no names": (change_index(weight_map={"a": 1}), "is no index of shards"),
    "no JSON": (lambda index: index.write_text("{"), "is no index of shards"),
    "deep JSON": (lambda index: index.write_text("[" * 100_000), "is no index of shards"),
    "a shard is missing": (lambda index: (index.parent / "model-00002-of-00003.safetensors").unlink(), "not beside it"),
    "a tensor is missing": (
        change_index(weight_map={"new.weight": "model-00001-of-00003.safetensors"}),
        "lacks the tensor new.weight",
    ),
}


@pytest.mark.parametrize("name", HARM)
def test_an_index_that_leads_astray_is_refused(tmp_path: Path, name: str) -> None:
    index = write_shards(tmp_path / "saved", "safetensors")
    change, told = HARM[name]
    change(index)
    with pytest.raises(UserError, match=told) as error:
        read_weights(tmp_path / "saved")
    assert "\n" not in str(error.value)


def test_a_hubs_cache_keeps_its_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    index = write_shards(tmp_path / "snapshots" / "abc", "safetensors")
    for number, shard in enumerate(sorted(index.parent.glob("*.safetensors"))):
        shard.rename(tmp_path / "blobs" / str(number))
        shard.symlink_to(f"../../blobs/{number}")
    assert import_classifier(index.parent)[1].arch == "wrn_10_1"


def test_what_is_no_folder_of_weights_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"folder that holds model.safetensors, pytorch_model.bin or the index"):
        read_weights(tmp_path)
    torch.save(state_of(), tmp_path / "x.pth")
    assert main(["import", str(tmp_path / "x.pth"), "--out", str(tmp_path / "model")]) == 0
    with pytest.raises(UserError, match="is a model folder already"):
        read_weights(tmp_path / "model")
    index = write_shards(tmp_path / "saved", "bin")
    (index.parent / "other.bin.index.json").write_text("{}")
    with pytest.raises(UserError, match="holds several indices"):
        read_weights(tmp_path / "saved")
