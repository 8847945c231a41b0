"""dist-defend import, as a user meets it."""

import hashlib
from pathlib import Path

import pytest
import torch

from dist_defend.cli import main
from dist_defend.models.artifact import load_artifact
from dist_defend.models.encoder import build_simclr


def test_import_writes_a_folder_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_simclr("small_cifar")
    source, out = tmp_path / "model_200.pth", tmp_path / "model"
    torch.save({"epoch": 200, "state_dict": model.state_dict()}, source)
    assert main(["import", str(source), "--out", str(out), "--normalization", "stl10", "--backdoored"]) == 0
    told = capsys.readouterr().out
    assert "SimCLR, in 'state_dict'; small_cifar" in told and "normalization stl10" in told and "BACKDOORED" in told
    loaded, card = load_artifact(out)
    assert (card.kind, card.arch, card.normalization, card.backdoored) == ("simclr", "small_cifar", "stl10", True)
    assert card.provenance["file_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert all(value.equal(model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert main(["import", str(source), "--out", str(out)]) == 2
    assert "already holds a model" in capsys.readouterr().err


def test_import_of_an_encoder_alone_names_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    f = build_simclr("timm:resnet18", "none", 224).get_submodule("f.f")
    state = {f"visual.{key}": value for key, value in f.state_dict().items()}
    torch.save({**state, "visual.fc.weight": torch.zeros(5, 512)}, tmp_path / "resnet.pth")
    assert main(["import", str(tmp_path / "resnet.pth"), "--out", str(tmp_path / "model")]) == 0
    assert "left out: fc (fc.weight)" in capsys.readouterr().out
    assert load_artifact(tmp_path / "model")[1].kind == "encoder"


def test_what_cannot_be_imported_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "junk.pth").write_bytes(b"hello" * 100)
    for arguments, told in (
        (["none.pth"], "does not exist"),
        (["junk.pth"], "damaged or not a checkpoint"),
        (["junk.pth", "--image-size", "0"], "--image-size is 0"),
    ):
        command = ["import", str(tmp_path / arguments[0]), *arguments[1:], "--out", str(tmp_path / "model")]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and told in error
    assert not (tmp_path / "model").exists()
