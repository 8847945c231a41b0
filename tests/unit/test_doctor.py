"""The doctor tells apart what works, what is not there, and what is broken."""

import json
import os
from importlib import metadata
from pathlib import Path

import pytest

from dist_defend import doctor, plugins
from dist_defend.cli import main
from dist_defend.doctor import Finding
from tests.plugs import write_distribution


def test_prints_every_finding_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    wanted = {
        "python",
        "torch",
        "dist_defend",
        "plug-ins",
        "cuda",
        "nccl",
        "ranks",
        "accelerate",
        "ffcv",
        "turbojpeg",
        "numba",
    }
    assert wanted | {"deepspeed", "open_clip_torch", "slurm", "cores", "memory", "disk"} == found.keys()
    assert found["ranks"]["status"] == "ok"
    assert found["torch"]["detail"].startswith(metadata.version("torch"))
    assert found["cores"]["detail"].startswith(f"{len(os.sched_getaffinity(0))} usable")


@pytest.mark.parametrize(
    ("finding", "status"),
    [
        (Finding("torch", "broken", "no", is_essential=True), 1),
        (Finding("ffcv", "broken", "no", "make setup"), 0),
        (Finding("ffcv", "missing", "no"), 0),
    ],
)
def test_exit_status(
    finding: Finding, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("disk", "ok", "1 GiB"), finding])
    assert main(["doctor"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == [finding.name, finding.status]
    assert (len(lines) == 3 and lines[2].endswith("-> make setup")) == bool(finding.remedy)


def test_a_broken_plug_in_is_told_and_breaks_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"methods": {"renewal": "plug_of_the_doctor"}}
    write_distribution(tmp_path / "packages", "odd-one", entries, {"plug_of_the_doctor": "1 / 0"})
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    plugins._claims.cache_clear()
    try:
        found, core = doctor._plug_ins(), doctor._core()
    finally:
        plugins._claims.cache_clear()
    assert found.status == "broken" and "odd-one 1.5" in found.detail and "ZeroDivisionError" in found.detail
    assert core.status == "ok" and "ibau" in core.detail and "renewal" not in core.detail


def test_a_lock_left_by_a_killed_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    lock = tmp_path / "py311_cpu/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    assert doctor._deepspeed().status == "ok"
    lock.touch()
    found = doctor._deepspeed()
    assert found.status == "broken" and str(lock) in found.detail and str(lock.parent) in found.remedy


def test_a_package_that_does_not_import_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shattered.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    found = doctor._importable("shattered", "shattered", "mend it")
    assert found.status == "broken" and "a_module_that_is_not_there" in found.detail and found.remedy == "mend it"


def test_ranks_that_hang_are_given_up() -> None:
    assert "did not finish within 0 s" in doctor.start_ranks("gloo", 2, limit=0.0)


def test_ranks_that_fail_are_reported(capfd: pytest.CaptureFixture[str]) -> None:
    assert "summed []" in doctor.start_ranks("no_such_backend", 1, limit=60)
    assert "no_such_backend" in capfd.readouterr().err
