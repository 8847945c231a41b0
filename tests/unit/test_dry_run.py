"""--dry-run refuses what a run refuses before its first step, and changes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_defend.cli import main
from dist_defend.files import sha256_file
from tests.runs import make_experiment, options_of
from tests.unit.test_cli_errors import refused


def unfinished(folder: Path) -> Path:
    """A run that was stopped before its end, with a checkpoint."""
    config = make_experiment(folder, "simclr", options_of("simclr", folder))
    assert main(["run", str(config)]) == 0
    (folder / "run" / "result.json").unlink()
    return config


def state(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def newest(folder: Path) -> Path:
    return sorted((folder / "run" / "checkpoints").glob("step_*"))[-1]


def no_checkpoint_of_ours(folder: Path) -> None:
    place = newest(folder)
    (place / "tensors.safetensors").write_bytes(b"nothing")
    sums = {name: sha256_file(place / name) for name in ("tensors.safetensors", "state.json")}
    (place / "COMPLETE").write_text(json.dumps(sums))


def test_an_unfinished_run_is_looked_at_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = unfinished(tmp_path)
    before = state(tmp_path / "run")
    capsys.readouterr()
    assert main(["run", str(config), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "stage simclr" in out and "resumed at step" in err
    assert state(tmp_path / "run") == before


def test_a_checkpoint_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = unfinished(tmp_path)
    no_checkpoint_of_ours(tmp_path)
    before = state(tmp_path / "run")
    dry = refused(["run", str(config), "--dry-run"], capsys)
    assert "not a checkpoint of this program" in dry and state(tmp_path / "run") == before
    assert refused(["run", str(config)], capsys) == dry


def test_a_folder_in_use_is_refused_and_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = unfinished(tmp_path)
    code = (
        "import sys; from pathlib import Path; from dist_defend.lock import FolderLock; "
        f"lock = FolderLock(Path({str(tmp_path / 'run')!r})); lock.take(); print('taken', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"taken\n"
        before = state(tmp_path / "run")
        told = refused(["run", str(config), "--dry-run"], capsys)
        assert f"is in use by process {holder.pid} on " in told
        assert state(tmp_path / "run") == before
        holder.communicate()
    assert main(["run", str(config), "--dry-run"]) == 0


@pytest.mark.parametrize("output", ["", ".", "..", "/", "runs/..", "./", "a" * 300])
def test_an_output_that_is_no_folder_of_its_own(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_experiment(tmp_path, "simclr", {"data": {"path": "d"}}, output=output)
    for dry in ([], ["--dry-run"]):
        assert "key 'output' is" in refused(["run", str(config), *dry], capsys)
