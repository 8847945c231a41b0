"""What `export --to hf` writes and `push` sends: timm loads it, its page says what it is, nothing leaves unasked."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml

from dist_defend.cli import main
from dist_defend.models.artifact import load_artifact, load_classifier, save_artifact
from dist_defend.models.classifier import build_classifier
from dist_defend.models.encoder import build_encoder
from tests.runs import make_classifier, make_model

ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}


def exported(source: str | Path, out: Path) -> str:
    """The README.md of the folder that is written to ``out``."""
    assert main(["export", str(source), "--to", "hf", "--out", str(out)]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    return (out / "README.md").read_text()


def metadata(text: str) -> dict[str, Any]:
    head, _, rest = text.removeprefix("---\n").partition("\n---\n")
    assert rest.startswith("\n# ")
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def with_card(folder: str, **changes: Any) -> str:
    """The same classifier under a card with other values."""
    model, card = load_classifier(folder)
    save_artifact(folder, model, dataclasses.replace(card, **changes))
    return folder


@pytest.mark.parametrize(("arch", "size"), [("timm:resnet10t", 64), ("timm:vit_tiny_patch16_224", 32)])
def test_timm_loads_an_encoder_with_equal_features(arch: str, size: int, tmp_path: Path) -> None:
    source = make_model(tmp_path / "own", size=size, arch=arch)
    text = exported(source, tmp_path / "hub")
    model, card = load_artifact(source)
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.rand(3, 3, size, size)
    with torch.no_grad():
        features = model.eval().get_submodule("f")(images)
        assert torch.equal(theirs((images - mean) / std), features)
    assert features.shape == (3, card.feature_dim)
    assert tuple(theirs.pretrained_cfg["input_size"]) == (3, size, size)
    assert theirs.pretrained_cfg["mean"] == [0.4914, 0.4822, 0.4465]
    assert metadata(text)["library_name"] == "timm" and metadata(text)["pipeline_tag"] == "image-feature-extraction"
    names = safetensors.torch.load_file(tmp_path / "hub" / "model.safetensors")
    assert list(names) and not any(name.startswith(("f.", "g.")) for name in names)


def test_timm_loads_a_classifier_with_equal_logits_and_its_classes(tmp_path: Path) -> None:
    source = with_card(make_classifier(tmp_path / "own", size=64, arch="timm:resnet10t"), classes=("a", "b|c", "d"))
    exported(source, tmp_path / "hub")
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs(images), load_classifier(source)[0].eval()(images))  # normalization: none
    assert list(theirs.pretrained_cfg["label_names"]) == ["a", "b|c", "d"]


def test_other_networks_keep_their_own_names_and_come_back_by_import(tmp_path: Path) -> None:
    source = make_classifier(tmp_path / "own")
    exported(source, tmp_path / "hub")
    model, _ = load_classifier(source)
    state = safetensors.torch.load_file(tmp_path / "hub" / "model.safetensors")
    assert state.keys() == model.net.state_dict().keys()
    command = ["import", str(tmp_path / "hub"), "--out", str(tmp_path / "back")]
    assert main([*command, "--normalization", "none", "--image-size", "16"]) == 0
    back, card = load_classifier(tmp_path / "back")
    assert card.arch == "small_resnet" and card.num_classes == 3
    assert all(value.equal(model.state_dict()[key]) for key, value in back.state_dict().items())


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_the_pages_own_lines_load_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (make_classifier if kind == "classifier" else make_model)(tmp_path / "own")
    text = exported(source, tmp_path / "FOLDER")
    images = torch.rand(2, 3, 16, 16)
    given = {"images": images, "build_classifier": build_classifier, "build_encoder": build_encoder}
    code = text.partition("## Load\n\n")[2].partition("\n## ")[0].replace("\n    ", "\n").strip()
    *lines, last = code.split("\n")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), given)
    own, _ = load_artifact(source)
    model = own.eval() if kind == "classifier" else own.eval().get_submodule("f")
    with torch.no_grad():
        assert torch.equal(eval(last.partition("#")[0], given), model(images))


def test_a_backdoored_model_says_so_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = exported(make_classifier(tmp_path / "own", attack=ATTACK), tmp_path / "hub")
    assert "it is BACKDOORED" in capsys.readouterr().out
    assert "backdoored" in metadata(text)["tags"]
    first = text.partition("\n---\n")[2].split("\n\n")[1]
    assert first.startswith("> **Warning: this model is BACKDOORED.**")
    assert '     "name": "badnets"' in text
    clean = exported(make_classifier(tmp_path / "clean"), tmp_path / "clean hub")
    assert "BACKDOORED" not in clean and "backdoored" not in metadata(clean)["tags"] and "Warning" not in clean


def test_counts_before_and_after_a_defence(tmp_path: Path) -> None:
    counts = {
        "before": {"acc": {"correct": 90, "n": 100}, "asr": {"correct": 80, "n": 80}},
        "after": {"acc": {"correct": 88, "n": 100}, "asr": {"correct": 2, "n": 80}},
    }
    source = with_card(make_classifier(tmp_path / "own"), attack=ATTACK, defended_by="ibau", counts=counts)
    text = exported(source, tmp_path / "hub")
    assert "classified as their label | 90.00 % of 100 | 88.00 % of 100 |" in text
    assert "classified as the target | 100.00 % of 80 | 2.50 % of 80 |" in text
    warning = next(line for line in text.splitlines() if line.startswith("> "))
    assert "had a backdoor" in warning and "ibau was to remove it" in warning and "2.50 % of 80 is left" in warning


def test_a_runs_folder_stands_for_its_model_and_its_counts(tmp_path: Path) -> None:
    make_classifier(tmp_path / "run" / "model")
    counted = {"acc": (9, 10), "asr": (1, 9), "asr_all": (2, 10), "ra": (8, 9)}
    row = {name: {"correct": correct, "n": n} for name, (correct, n) in counted.items()}
    rows = [{"kind": "classifier", "task": "noise", "seed": 1, **row}]
    (tmp_path / "run" / "result.json").write_text(json.dumps({"rows": rows}))
    text = exported(tmp_path / "run", tmp_path / "hub")
    assert text.partition("\n# ")[2].startswith("run\n") and "| this model |" in text and "| 90.00 % of 10 |" in text


def test_what_a_card_says_is_shown_and_does_nothing(tmp_path: Path) -> None:
    classes = ("</td><script>alert(1)</script>", "[x](http://y)", "```\n# head")
    text = exported(with_card(make_classifier(tmp_path / "own"), classes=classes), tmp_path / "hub")
    assert "<script>" not in text and "[x](http:" not in text and "\n# head" not in text


def test_a_taken_place_and_a_missing_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_classifier(tmp_path / "own")
    for out, told in ((tmp_path, "exists already"), (tmp_path / "no" / "x", "is not a folder")):
        assert main(["export", source, "--to", "hf", "--out", str(out)]) == 2
        assert told in capsys.readouterr().err


class FakeApi:
    """What huggingface_hub.HfApi is asked for, written down."""

    def __init__(self, is_private: bool = True) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.is_private = is_private

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.is_private)

    def upload_folder(self, **options: Any) -> str:
        self.calls.append(("upload_folder", options))
        return "commit 1"


class RefusedError(Exception):
    """The hub's own error."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """Stands in the place of huggingface_hub, which is not imported: no test reaches the network."""
    api = FakeApi()
    module, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    vars(errors)["HfHubHTTPError"] = RefusedError
    vars(module).update(HfApi=lambda: api, errors=errors)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return api


def test_push_sends_the_three_files_in_private(
    tmp_path: Path, hub: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(make_classifier(tmp_path / "own", attack=ATTACK), tmp_path / "hub")
    assert hub.calls == []
    (tmp_path / "hub" / "notes.txt").write_text("not for others")
    assert main(["push", str(tmp_path / "hub"), "me/net"]) == 0
    made, sent = hub.calls
    assert made == ("create_repo", {"repo_id": "me/net", "private": True, "exist_ok": True})
    assert sent[0] == "upload_folder" and sent[1]["repo_id"] == "me/net"
    assert sent[1]["folder_path"] == tmp_path / "hub"
    assert sorted(sent[1]["allow_patterns"]) == ["README.md", "config.json", "model.safetensors"]
    told = capsys.readouterr().out
    assert "to me/net (private). It is BACKDOORED" in told and told.endswith("sent: commit 1\n")
    assert main(["push", str(tmp_path / "hub"), "me/net", "--public"]) == 0
    assert hub.calls[2][1]["private"] is False


def test_push_refuses_before_anything_is_sent(
    tmp_path: Path, hub: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_classifier(tmp_path / "own")
    exported(source, tmp_path / "hub")
    for words, told in (
        ([source, "me/net"], "README.md is missing or a link"),
        ([str(tmp_path / "hub"), "net"], "is no repository's name"),
        ([str(tmp_path / "hub"), "../x"], "is no repository's name"),
    ):
        assert main(["push", *words]) == 2
        assert told in capsys.readouterr().err and hub.calls == []
    hub.is_private = False
    assert main(["push", str(tmp_path / "hub"), "me/net"]) == 2
    assert "there already and public" in capsys.readouterr().err
    assert [name for name, _ in hub.calls] == ["create_repo"]

    def refuse(*_: Any, **__: Any) -> None:
        raise RefusedError("401\nUnauthorized")

    monkeypatch.setattr(FakeApi, "create_repo", refuse)
    assert main(["push", str(tmp_path / "hub"), "me/net"]) == 2
    assert "the hub refused me/net: 401 Unauthorized; log in with `hf auth login`" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["push", str(tmp_path / "hub"), "me/net"]) == 2
    assert "pip install 'dist-defend[hub]'" in capsys.readouterr().err
