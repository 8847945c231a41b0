"""The launcher: which file, which settings, and what it refuses before anything is started."""

import itertools
import json
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from dist_defend import launch, lifeline
from dist_defend.cli import main
from dist_defend.engine.sharding import STRATEGIES
from dist_defend.templates import template
from tests.runs import make_experiment

FILES = template("launch/accelerate").parent
ACCELERATE = sorted((FILES / "accelerate").glob("*.yaml"))


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(make_experiment(tmp_path, "simclr", {"data": {"path": "somewhere"}}))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["launch", *arguments, "--print"]) == 0
    return shlex.split(capsys.readouterr().out)


def test_a_rank_that_starts_again_forgets_what_one_answered_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun tells those beside a killed one to stop; they save, and a run that then ends well is no stopped one."""
    file = tmp_path / "status"
    monkeypatch.delenv(lifeline.STARTER, raising=False)
    for _ in range(2):
        monkeypatch.setenv(lifeline.ANSWER, str(file))
        assert lifeline.follow() == file and not file.exists()
        assert lifeline.answer(75, file) == 0 and file.read_text() == "75"


def test_accelerate_reads_every_file() -> None:
    assert {file.stem for file in ACCELERATE} == {"cpu2", "single", "multinode", *STRATEGIES}
    for file in ACCELERATE:
        read = load_config_from_file(str(file))
        assert f"--config_file launch/accelerate/{file.name}" in file.read_text()
        assert read.use_cpu is False
        assert read.mixed_precision == "no"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_files_point_at_their_stage(stage: int) -> None:
    content = yaml.safe_load((FILES / "accelerate" / f"zero{stage}.yaml").read_text())
    file = FILES.parent / content["deepspeed_config"]["deepspeed_config_file"]
    assert json.loads(file.read_text())["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(
    ("options", "file"),
    [
        (["--ranks", "1"], "single"),
        (["--ranks", "2"], "cpu2"),
        (["--ranks", "4", "--strategy", "fsdp2"], "fsdp2"),
        (["--ranks", "4", "--strategy", "zero2", "--machines", "2", "--main-ip", "10.0.0.1"], "zero2"),
        (["--ranks", "4", "--machines", "2", "--main-ip", "10.0.0.1", "--machine-rank", "1"], "multinode"),
    ],
)
def test_picks_the_file_and_names_the_world(
    options: list[str], file: str, config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    command = shown(capsys, config, "seed=3", *options)
    assert command[0] == "ACCELERATE_USE_CPU=true"
    assert f"{FILES}/accelerate/{file}.yaml" in command
    assert command[command.index("--num_processes") + 1] == options[1]
    assert command[-6:] == ["-m", "dist_defend", "run", config, "seed=3", f"world_size={options[1]}"]
    assert ("--deepspeed_config_file" in command) == file.startswith("zero")


def test_gpus_give_the_number_of_ranks(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    command = shown(capsys, config)
    assert f"{FILES}/accelerate/ddp.yaml" in command
    assert command[-1] == "world_size=4"
    assert not any("ACCELERATE_USE_CPU" in word for word in command)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["world_size=4", "--ranks", "2"], "key 'world_size' is 4, but --ranks is 2"),
        (["--ranks", "3", "--machines", "2", "--main-ip", "a"], "cannot be shared equally"),
        (["--ranks", "2", "--machines", "2"], "needs --main-ip"),
        (["--ranks", "2", "--machines", "2", "--main-ip", "a", "--machine-rank", "2"], "must be below --machines 2"),
        (["--ranks", "8"], "8 ranks on this machine, but it has 4 GPUs"),
    ],
)
def test_refuses(
    options: list[str],
    told: str,
    config: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert main(["launch", config, *options]) == 2
    assert told in capsys.readouterr().err


class Child:
    """A process as psutil shows it, while the system's clock is being set."""

    clock = itertools.count()

    def __init__(self, pid: int) -> None:
        self.pid, self.heard = pid, list[int]()

    def create_time(self) -> float:
        return next(self.clock)

    def send_signal(self, number: int) -> None:
        self.heard.append(number)


def test_a_child_gets_each_signal_once_whatever_the_clock_says() -> None:
    first, second, later = Child(7), Child(8), Child(7)  # a pid that comes again
    told: dict[int, int] = {}
    for children, received in (
        ([first], [signal.SIGTERM]),
        ([first, second], [signal.SIGTERM, signal.SIGUSR1]),
        ([second], [signal.SIGTERM, signal.SIGUSR1]),
        ([second, later], [signal.SIGTERM, signal.SIGUSR1]),
    ):
        seen: Any = children
        told = launch._forward(seen, [int(number) for number in received], told)
    assert [child.heard for child in (first, second, later)] == [[signal.SIGTERM, signal.SIGUSR1]] * 3
