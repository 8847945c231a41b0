"""Whoever reads the output may go away, as ``head`` does: no command makes a noise about it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_defend.cli import BROKEN_PIPE, main
from tests.runs import make_data, make_experiment, options_of


def unread(arguments: list[str], is_buffered: bool, both: bool = False) -> tuple[int, str]:
    """Status and stderr of a command whose output (stderr too, if both) goes to a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "" if is_buffered else "1"}
    command = [sys.executable, "-m", "dist_defend", *arguments]
    stderr = writing if both else subprocess.PIPE
    with subprocess.Popen(command, stdout=writing, stderr=stderr, env=environment, text=True) as process:
        os.close(writing)
        told = process.communicate(timeout=240)[1]
    return process.returncode, told or ""


@pytest.mark.parametrize("is_buffered", [True, False])
def test_no_command_complains_of_a_reader_that_went_away(is_buffered: bool, tmp_path: Path) -> None:
    assert unread(["data", "info", make_data(tmp_path / "shown")], is_buffered) == (BROKEN_PIPE, "")


def test_nor_does_a_printed_configuration(tmp_path: Path) -> None:
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    assert unread(["run", str(config), "--print-config"], True) == (BROKEN_PIPE, "")


def test_nor_does_the_help() -> None:
    """Which argparse prints before it leaves."""
    assert unread(["--help"], True) == (BROKEN_PIPE, "")


def test_a_run_whose_log_nobody_reads_goes_on(tmp_path: Path) -> None:
    """``dist-defend run ... 2>&1 | head``: hours of training are worth more than their lines on a terminal."""
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    assert unread(["run", str(config)], True, both=True) == (0, "")
    assert "finished" in (tmp_path / "run" / "log.txt").read_text()
    assert unread(["run", str(config), "simclr.update.epochs=3"], True, both=True)[0] == 2


def test_the_report_is_quiet_too(tmp_path: Path) -> None:
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    assert main(["run", str(config)]) == 0
    status, told = unread(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report")], True)
    assert status == BROKEN_PIPE and "Broken" not in told and "Traceback" not in told and "Exception" not in told
