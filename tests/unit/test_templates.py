"""dist-defend init, and where the package finds the files that users edit."""

from pathlib import Path

import pytest
import yaml

from dist_defend import templates
from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.errors import UserError

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_init_copies_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "mine")]) == 0
    for part in templates.PARTS:
        source, copy = ROOT / part, tmp_path / "mine" / part
        if source.is_file():
            assert copy.read_bytes() == source.read_bytes()
        else:
            assert contents(copy) == contents(source) != {}
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(templates.PARTS) and told[0].startswith(f"{tmp_path}/mine/configs: ")
    experiment = load_experiment(tmp_path / "mine" / "configs" / "start" / "poison.yaml")
    assert experiment.method == "classifier"


def test_init_is_for_this_folder_and_leaves_alone_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "configs" / "start" / "poison.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    nowhere = mine.with_name("unlearn.yaml")
    nowhere.symlink_to(tmp_path / "elsewhere.yaml")
    assert main(["init"]) == 0
    assert mine.read_text() == "mine" and not (tmp_path / "elsewhere.yaml").exists()
    assert ", 2 there already and left alone" in capsys.readouterr().out.splitlines()[0]
    assert (tmp_path / "slurm" / "single.sbatch").is_file()


@pytest.mark.parametrize("name", ["file", "file/inside"])
def test_init_into_no_folder_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["init", str(tmp_path / name)]) == 2
    assert "name another DIR" in capsys.readouterr().err


def test_the_package_prefers_its_own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a wheel; a folder beside the package, as in a checkout, comes second."""
    here = tmp_path / "site" / "dist_defend" / "templates"
    (tmp_path / "site" / "configs").mkdir(parents=True)
    monkeypatch.setattr(templates, "_HERE", here)
    assert templates.template("configs") == tmp_path / "site" / "configs"
    (here / "configs").mkdir(parents=True)
    assert templates.template("configs") == here / "configs"
    with pytest.raises(UserError, match="install dist-defend again"):
        templates.template("slurm")


def test_the_first_configurations_fit_together() -> None:
    poison, unlearn = (yaml.safe_load((ROOT / f"configs/start/{n}.yaml").read_text()) for n in ("poison", "unlearn"))
    assert unlearn["ibau"]["model"] == f"{poison['output']}/model"
    assert unlearn["ibau"]["test"] == poison["classifier"]["test"] == {"path": "data/digits/test"}
