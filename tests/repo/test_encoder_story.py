"""launch/encoder_story asks for runs whose configurations load, and for nothing twice."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dist_defend.config import load_experiment

ROOT = Path(__file__).parents[2]
RECORDER = """#!{python}
import json, sys
print(json.dumps(sys.argv[1:]))
"""


def copied(folder: Path, has_data: bool) -> subprocess.CompletedProcess[str]:
    """The script beside this checkout's configs, with a dist-defend that only says what it was asked."""
    (folder / "launch").mkdir()
    shutil.copy(ROOT / "launch/encoder_story", folder / "launch")
    (folder / "configs").symlink_to(ROOT / "configs")
    for split in ("cifar10/train", "cifar10/test", "gtsrb/train", "gtsrb/test") if has_data else ():
        (folder / "data" / split).mkdir(parents=True)
        (folder / "data" / split / "manifest.json").write_text("{}")
    (folder / "bin").mkdir()
    recorder = folder / "bin" / "dist-defend"
    recorder.write_text(RECORDER.format(python=sys.executable))
    recorder.chmod(0o755)
    (folder / "runs/story/clean").mkdir(parents=True)
    (folder / "runs/story/clean/result.json").write_text("{}")  # a part that is done
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(folder / "launch/encoder_story"), "runs/story"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_every_part_has_a_configuration_that_loads(tmp_path: Path) -> None:
    run = copied(tmp_path, has_data=True)
    assert run.returncode == 0, run.stderr
    *parts, report = [json.loads(line) for line in run.stdout.splitlines()]
    assert report[0] == "report"
    experiments = [load_experiment(ROOT / part[1], part[2:]) for part in parts]
    outputs = [str(experiment.output) for experiment in experiments]
    assert len(set(outputs)) == len(outputs) and "runs/story/clean" not in outputs
    assert {experiment.method for experiment in experiments} == {
        "badencoder", "mimic", "ft_simclr", "nad_simclr", "probe", "decree", "reactivate",
    }  # fmt: skip


def test_missing_data_is_named(tmp_path: Path) -> None:
    run = copied(tmp_path, has_data=False)
    assert run.returncode == 2 and "data/cifar10/train is missing: dist-defend data prepare" in run.stderr
