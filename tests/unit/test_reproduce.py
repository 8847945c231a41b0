"""dist-defend reproduce, with stand-ins for the points: what is read, made, compared and told."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dist_defend import cli, reproduce
from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.sweep import preparation
from dist_defend.sweep.grid import Sweep, load_sweep
from dist_defend.sweep.preparation import Preparation, Way

SHIPPED = sorted(Path("configs/reproduce").glob("*.yaml"))
RUN = ["data", "prepare", "npz", "--path", "${file}", "--out", "data/three"]
OTHER = ["data", "prepare", "npz", "--path", "${from}/elsewhere", "--out", "data/three"]
BEFORE: dict[str, Any] = {
    "makes": "data/three",
    "get": "three.npz from its authors",
    "ways": [{"file": "three.npz", "run": RUN}, {"file": "elsewhere/train.npz", "run": OTHER}],
}
UNREAD = {
    "makes": "models/x",
    "get": "x",
    "ways": [{"file": "x.pth", "run": ["import", "${file}", "--out", "models/x"]}],
}
EXPECT = {"at": {"seed": 1}, "metric": "acc", "published": 80, "tolerance": 2, "source": "paper"}


def write(**changes: Any) -> str:
    """three.yaml in the working folder: two seeds of a classifier on data/three; at --scale small one."""
    data = {"path": "data/three/train"}
    options = {"data": data, "test": data, "arch": "small_resnet", "update": {"batch_size": 4, "epochs": 1}}
    Path("classifier.yaml").write_text(
        yaml.safe_dump({"method": "classifier", "output": "runs/x", "classifier": options})
    )
    content = {
        "output": "runs/three",
        "config": "classifier.yaml",
        "seeds": [1, 2],
        "before": [BEFORE, UNREAD],
        "expect": [EXPECT, {**EXPECT, "published": 10, "scale": "small"}],
        "scales": {"small": {"points": {"seeds": [1]}}},
        **changes,
    }
    head = "# Three classes again.\n# hardware: none\n# minutes:  0\n"
    Path("three.yaml").write_text(head + yaml.safe_dump(content, sort_keys=False))
    return "three.yaml"


class Here:
    """A working folder with a folder of data, and what was started in it. acc: of each seed, None where it fails."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[list[str]] = []
        self.points: list[int] = []
        self.acc: dict[int, int | None] = {1: 81, 2: 50}
        (folder / "downloads").mkdir()
        images = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
        np.savez(folder / "downloads" / "three.npz", x=images, y=np.arange(6) % 3)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(subprocess, "run", self.start)
        monkeypatch.setattr(reproduce, "run_points", self.run_points)

    def start(self, command: list[str], **options: Any) -> Any:
        self.commands.append(command[3:])
        return subprocess.CompletedProcess(command, main(command[3:]))

    def run_points(self, sweep: Sweep, again: bool, *, is_local: bool, at_a_time: int | None) -> int:
        assert again
        status = 0
        for point in sweep.points:
            if sweep.is_done(point):
                continue
            seed = point.experiment.seed
            self.points.append(seed)
            acc = self.acc[seed]
            if acc is None:
                status = 1
                continue
            row = {"kind": "clean", "task": "three", "seed": seed}
            row |= {name: {"correct": acc, "n": 100} for name in ("acc", "asr", "asr_all", "ra")}
            sweep.run_folder(point).mkdir(parents=True, exist_ok=True)
            (sweep.run_folder(point) / "result.json").write_text(json.dumps({"rows": [row], "metrics": {}}))
        return status


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    return Here(tmp_path, monkeypatch)


def test_from_a_folder_to_the_table(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", write()]) == 0
    assert here.commands == [["data", "prepare", "npz", "--path", "downloads/three.npz", "--out", "data/three"]]
    told = capsys.readouterr().out
    assert told.startswith("hardware: none\nminutes:  0\n")
    assert "| metric | published |" in told
    assert "| seed=1 | acc | 80 | 2 | 81.0 | 1 of 1 | +1.0 | PASS | paper |" in told and "\n1 PASS\n" in told
    assert "dist-defend sweep report three.yaml" in told
    assert "| PASS |" in Path("runs/three/expectations.md").read_text()
    assert Path("runs/three/results.csv").is_file()


def test_a_figure_that_is_missed_is_exit_1(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    here.acc[1] = 77
    assert main(["reproduce", write()]) == 1
    assert "| 77.0 | 1 of 1 | -3.0 | FAIL | paper |" in capsys.readouterr().out


def test_a_scale_has_figures_of_its_own(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", write(), "--scale", "small"]) == 1
    told = capsys.readouterr().out
    assert "| seed=1 | acc | 10 | 2 | 81.0 |" in told and "| 80 |" not in told
    assert "| metric | expected |" in told and "published" not in told
    assert here.points == [1] and Path("runs/three_small/expectations.md").is_file()


def test_what_is_done_is_not_done_again(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    here.acc[2] = None
    file = write()
    assert main(["reproduce", file]) == 1  # a point failed, though no figure did
    assert "1 PASS" in capsys.readouterr().out
    here.acc[2] = 60
    assert main(["reproduce", file]) == 0
    assert len(here.commands) == 1 and here.points == [1, 2, 2]
    assert main(["reproduce", file]) == 0
    assert len(here.commands) == 1 and here.points == [1, 2, 2]


def test_a_point_that_saved_and_stopped_is_no_verdict(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "run_points", lambda *_, **__: 75)
    assert main(["reproduce", write()]) == 75
    assert "NOT RUN" not in capsys.readouterr().out


def test_what_slurm_has_not_done_yet_is_not_run(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []

    def run_points(*_: Any, **options: Any) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr(reproduce, "run_points", run_points)
    assert main(["reproduce", write(), "--slurm"]) == 0
    assert "| NOT RUN |" in capsys.readouterr().out
    assert seen == [{"again": True, "is_local": False, "at_a_time": None}]


def test_the_first_way_whose_file_is_there(here: Here) -> None:
    Path("mine/elsewhere").mkdir(parents=True)
    Path("downloads/three.npz").rename("mine/elsewhere/train.npz")
    assert main(["reproduce", write(), "--from", "mine"]) == 0
    assert here.commands == [["data", "prepare", "npz", "--path", "mine/elsewhere", "--out", "data/three"]]


def test_missing_files_are_named_before_anything_is_done(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    second = {
        **UNREAD,
        "makes": "data/three/train",
        "ways": [{"file": "y.npz", "run": [*RUN[:-1], "data/three/train"]}],
    }
    assert main(["reproduce", write(before=[BEFORE, second]), "--from", "nowhere"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "data/three is made from nowhere/three.npz or nowhere/elsewhere/train.npz, which is not there" in told
    assert "get three.npz from its authors" in told and "nowhere/y.npz" in told and "with --from" in told
    assert here.commands == [] and here.points == [] and not Path("runs").exists()
    assert "nowhere/x.pth" not in told  # no point reads models/x


def test_a_preparation_that_fails_ends_it(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    Path("downloads/three.npz").write_bytes(b"no npz")
    assert main(["reproduce", write()]) == 2
    told = capsys.readouterr()
    assert "downloads/three.npz" in told.err and "data/three was not made; nothing else was started" in told.out
    assert here.points == []


def test_what_was_cut_off_is_not_made(here: Here) -> None:
    """`data prepare` writes beside the final place, in a hidden folder."""
    Path("data/three/.train.new").mkdir(parents=True)
    Path("data/three/.train.new/manifest.json").write_text("{}")
    assert main(["reproduce", write()]) == 0
    assert len(here.commands) == 1


def test_plan_changes_nothing(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    file = write()
    assert main(["reproduce", file, "--plan"]) == 0
    told = capsys.readouterr().out
    assert "dist-defend data prepare npz --path downloads/three.npz --out data/three" in told
    assert "points seed=1: to run" in told and "2 points (points 2) -> runs/three; figures to compare: 1" in told
    assert main(["reproduce", file, "--plan", "--from", "nowhere"]) == 0
    assert "missing: data/three is made from nowhere/three.npz or" in capsys.readouterr().out
    assert here.commands == [] and not Path("runs").exists()
    assert main(["reproduce", file]) == 0
    assert main(["reproduce", file, "--plan"]) == 0
    assert "data/three: is there" in (told := capsys.readouterr().out) and "points seed=1: done" in told


def test_without_expectations_it_says_so(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", write(expect=[EXPECT]), "--scale", "small"]) == 0
    assert "no figures are expected at scale small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing"], "there is no file configs/reproduce/nothing.yaml; known: "),
        (["nothing.yaml"], "there is no file nothing.yaml; known: "),
        (["three.yaml", "--scale", "large"], "--scale large is not in the file; known: small"),
        (["three.yaml", "-j", "0"], "-j 0: at least 1"),
        (["three.yaml", "-j", "2", "--slurm"], "not with --slurm"),
    ],
)
def test_bad_words(here: Here, words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    assert main(["reproduce", *words]) == 2
    assert told in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"makes": "/data"}, "key 'before[0].makes' is '/data'; it must be a path below"),
        ({"makes": "../data"}, "it must be a path below"),
        ({"ways": []}, "key 'before[0].ways' is empty"),
        ({"ways": [{"file": "../x", "run": RUN}]}, "key 'before[0].ways[0].file' is '../x'; it must be a path below"),
        ({"ways": [{"file": "x", "run": ["run", "x"]}]}, "is 'run x'; it begins with 'data prepare' or 'import'"),
        ({"ways": [{"file": "x", "run": ["data", "info", "x"]}]}, "it begins with 'data prepare' or 'import'"),
        ({"ways": [{"file": "x", "run": RUN[:-2]}]}, "run' has to end with --out data/three"),
        ({"ways": [{"file": "x", "run": [*RUN[:-1], "data/other"]}]}, "has to end with --out data/three"),
        ({"gett": "x"}, "unknown key 'before[0].gett'"),
    ],
)
def test_a_preparation_that_does_not_fit_is_named(here: Here, own: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=r"three\.yaml") as error:
        load_sweep(write(before=[{**BEFORE, **own}]))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_scale_may_take_out_stages_and_labels(here: Here) -> None:
    stages = {
        "a": {"config": "classifier.yaml", "explicit": {"one": {"seed": 1}, "two": {"seed": 2}}},
        "b": {"config": "classifier.yaml", "after": "a", "set": {"seed": "${a.seed}", "precision": "fp64"}},
    }
    scales: dict[str, Any] = {"small": {"a": {"explicit": {"one": None}}, "b": None}, "none": {"a": None, "b": None}}
    file = write(expect=[], stages=stages, scales=scales)
    raw = yaml.safe_load(Path(file).read_text())
    Path(file).write_text(yaml.safe_dump({key: raw[key] for key in raw if key not in ("config", "seeds")}))
    assert [point.labels for point in load_sweep(file, "small").points] == [{"a": "two"}]
    assert len(load_sweep(file).points) == 4
    with pytest.raises(UserError, match=r"key 'scales.none' takes every stage out"):
        load_sweep(file, "none")


def test_files_of_the_package_serve_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder, as after installing a wheel; the user's own come first."""
    monkeypatch.chdir(tmp_path)
    names = [file.stem for file in SHIPPED]
    assert main(["reproduce"]) == 0
    told = capsys.readouterr().out
    assert [line.partition(":")[0] for line in told.splitlines() if not line.startswith(" ")] == names
    assert told.count("  hardware: ") == told.count("  minutes: ") == len(names)
    assert main(["reproduce", "rnp", "--plan"]) == 0
    assert "missing: data/cifar10 is made from downloads/" in capsys.readouterr().out
    own = tmp_path / "configs" / "reproduce" / "rnp.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# Mine.\n" + reproduce.find("rnp").read_text().replace("runs/reproduce/rnp", "runs/mine"))
    assert reproduce.find("rnp").resolve() == own
    assert main(["reproduce"]) == 0
    assert "rnp: Mine.\n" in capsys.readouterr().out


def scales(file: Path) -> list[str | None]:
    return [None, *load_sweep(file).config.scales]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_file_in_the_tree(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads, plans with and without its files, and prepares nothing that no scale reads."""
    sweeps = [load_sweep(file, scale) for scale in scales(file)]
    assert "small" in sweeps[0].config.scales and sweeps[0].config.before and sweeps[0].config.expect
    assert len({sweep.config.output for sweep in sweeps}) == len(sweeps)
    read = set()
    for sweep in sweeps:
        experiments = [point.experiment.resolved() for point in sweep.points]
        wanted = preparation.read_by(sweep.config.before, experiments)
        read |= {own.makes for own in wanted}
        outside = [
            text for one in experiments for text in preparation.texts(one) if text.startswith(("data/", "models/"))
        ]
        made = {own.makes for own in wanted}
        assert [text for text in outside if not any(f"{text}/".startswith(f"{own}/") for own in made)] == []
    assert read == {own.makes for own in sweeps[0].config.before}
    for own in sweeps[0].config.before:
        for way in own.ways:
            parse(way)
    (tmp_path / "files").mkdir()
    file = file.resolve()
    monkeypatch.chdir(tmp_path)  # where nothing is prepared yet, as it may be in the checkout
    for scale in scales(file):
        words = ["reproduce", str(file), "--plan", "--from", str(tmp_path / "files")]
        assert main([*words, *(["--scale", scale] if scale else [])]) == 0
        assert "missing: " in capsys.readouterr().out
    for own in sweeps[0].config.before:
        place = tmp_path / "files" / own.ways[-1].file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    for scale in scales(file):
        words = ["reproduce", str(file), "--plan", "--from", str(tmp_path / "files")]
        assert main([*words, *(["--scale", scale] if scale else [])]) == 0
        assert "missing: " not in (told := capsys.readouterr().out) and f"{tmp_path}/files/" in told


def parse(way: Way) -> None:
    """SystemExit unless the command line is one of ours."""
    cli._parse(way.command(Path("downloads")))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_published_and_small_figures_are_apart(file: Path) -> None:
    """What was published holds at full scale; ours, with a date, at a scale of its own."""
    for scale in scales(file):
        for own in load_sweep(file, scale).config.expect:
            assert own.scale == scale and own.source.startswith("ours, 2") == (scale is not None)


def test_a_folder_that_no_point_reads_is_not_made() -> None:
    way = Way("f", ("import", "f", "--out", "models/a"))
    own = Preparation("models/a", "x", (way,))
    assert preparation.read_by([own], [{"classifier": {"model": "models/a"}}]) == [own]
    assert preparation.read_by([own], [{"probe": {"encoders": {"x": ["models/a/sub"]}}}]) == [own]
    assert preparation.read_by([own], [{"classifier": {"model": "models/ab"}}]) == []
