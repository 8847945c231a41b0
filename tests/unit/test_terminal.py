"""What the commands write: escaped, on any terminal, errors alone on their line. Processes where it counts."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_defend import cli, terminal
from dist_defend.errors import UserError
from dist_defend.screen import cell, markdown
from tests.runs import make_experiment, options_of

CLI = [sys.executable, "-m", "dist_defend"]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, check=False, env=os.environ | environment)


def breaking(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("dist_defend.experiment.run", fail)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("two\nlines \x1b[2J"), r"failed: RuntimeError: two lines \x1b[2J"),
        (MemoryError(), "failed: MemoryError"),
        (RecursionError("deep"), "failed: RecursionError: deep"),
        (PermissionError(13, "Permission denied", "/x"), "failed: PermissionError: [Errno 13] Permission denied: '/x'"),
        (KeyError("k"), "failed: KeyError: 'k'"),
    ],
)
def test_what_nobody_foresaw_is_one_line(
    error: Exception, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_experiment(tmp_path, "simclr", {"data": {"path": "d"}})
    breaking(monkeypatch, error)
    assert cli.main(["run", str(config)]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{told}; run again with --debug for the traceback\n")
    for arguments in (["--debug", "run", str(config)], ["run", str(config), "--debug", "seed=1"]):
        assert cli.main(arguments) == 1
        err = capsys.readouterr().err
        assert err.startswith("Traceback (most recent call last)") and "in fail" in err
        assert err.splitlines()[-1] == told and "\x1b" not in err


def test_of_several_ranks_the_first_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_experiment(tmp_path, "simclr", {"data": {"path": "d"}})
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    breaking(monkeypatch, RuntimeError("only here"))
    assert cli.main(["run", str(config)]) == 1
    assert capsys.readouterr().err.startswith("failed: rank 1: RuntimeError: only here") and len(waited) == 1
    breaking(monkeypatch, UserError("the same on all"))
    assert cli.main(["run", str(config)]) == 2
    assert capsys.readouterr().err == ""


def test_log_lines_wait_and_are_dropped_for_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("dist_defend.somewhere")
    terminal.hold_log(logging.INFO)
    log.info("first")
    log.warning("a\nb\x1b[31m")
    assert capsys.readouterr().err == ""
    terminal.release_log()
    log.info("third")
    assert capsys.readouterr().err == "first\na\\nb\\x1b[31m\nthird\n"
    terminal.hold_log()
    log.warning("before an error")
    terminal.end_log()
    assert capsys.readouterr().err == ""


def test_a_first_result_lets_the_log_go(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("dist_defend.somewhere")
    with terminal.guarded():
        terminal.hold_log()
        log.warning("held")
        assert capsys.readouterr().err == ""
        print("a result of a long command")
        log.warning("written")
        assert capsys.readouterr() == ("a result of a long command\n", "held\nwritten\n")
        terminal.end_log()


def test_a_warning_does_not_come_before_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The card's guess is told while the run is built; then the data do not fit."""
    options = options_of("kd", tmp_path)
    card = tmp_path / "teacher" / "model.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"guessed": ["normalization"]}))
    options["test"]["path"] = str(tmp_path / "none")
    config = make_experiment(tmp_path, "kd", options)
    for dry in ([], ["--dry-run"]):
        assert cli.main(["run", str(config), *dry]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    options["test"]["path"] = str(tmp_path / "test")
    assert cli.main(["run", str(make_experiment(tmp_path, "kd", options)), "--dry-run"]) == 0
    assert "import guessed" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_and_no_control_characters(encoding: str) -> None:
    raw = io.BytesIO()
    stream = terminal.Guarded(io.TextIOWrapper(raw, encoding, errors="strict"))
    print("é \u4e2d\t\x1b[2J\x07\r\x9b", "\udc80", file=stream)
    stream.flush()
    wanted = {
        "ascii": rb"\xe9 \u4e2d" + b"\t" + rb"\x1b[2J\x07\r\x9b \udc80" + b"\n",
        "latin-1": b"\xe9 " + rb"\u4e2d" + b"\t" + rb"\x1b[2J\x07\r\x9b \udc80" + b"\n",
        "utf-8": "é 中\t".encode() + rb"\x1b[2J\x07\r\x9b \udc80" + b"\n",
    }
    assert raw.getvalue() == wanted[encoding]
    print("\r\x1b[A", end="", file=terminal.unguarded(stream))
    stream.flush()
    assert raw.getvalue().endswith(b"\n\r\x1b[A")


def test_what_colorama_writes_at_the_end_of_a_process_does_not_show() -> None:
    raw = io.StringIO()
    terminal.Guarded(raw).write("\x1b[0m")
    assert raw.getvalue() == ""
    terminal.Guarded(raw).write("\x1b[0m of a file")
    assert raw.getvalue() == "\\x1b[0m of a file"


def test_a_process_on_an_ascii_terminal(tmp_path: Path) -> None:
    """The report prints ± and –; names come from a file."""
    counts = {"acc": (9, 10), "asr": (1, 9), "asr_all": (2, 10), "ra": (8, 9)}
    row = {name: {"correct": correct, "n": n} for name, (correct, n) in counts.items()}
    rows = [{"kind": "é\x1b[2J", "task": "t", "seed": seed, **row} for seed in (1, 2)]
    (tmp_path / "result.json").write_text(json.dumps({"name": "x\x07", "rows": rows}))
    done = run("report", tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert rb"90.0 \xb1 0.0" in done.stdout and rb"\xe9\x1b[2J" in done.stdout
    assert all(32 <= byte < 127 or byte == 10 for byte in done.stdout)


def test_processes_say_one_line(tmp_path: Path) -> None:
    """A file that nothing foresaw: a folder stands where the run writes a file of its own."""
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    (tmp_path / "run" / "env.json").mkdir(parents=True)
    done = run("run", config)
    assert done.returncode == 1 and done.stdout == b""
    line = done.stderr.decode().splitlines()[-1]  # after the log, which an error on bad input would drop
    assert line.startswith("failed: IsADirectoryError: ") and b"Traceback" not in done.stderr
    assert line.endswith("; run again with --debug for the traceback")
    done = run("run", str(tmp_path / "none\x1b[2J.yaml"), "--debug")
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [
        f"error: {tmp_path}/none\\x1b[2J.yaml: cannot read the configuration: No such file or directory"
    ]


def test_overrides_stand_before_and_after_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path)))
    for words in (
        [config, "--print-config", "seed=7", "loader.workers=2"],
        [config, "seed=7", "--print-config", "loader.workers=2"],
        ["--print-config", config, "seed=7", "loader.workers=2"],
    ):
        assert cli.main(["run", *words]) == 0
        shown = yaml.safe_load(capsys.readouterr().out)
        assert (shown["seed"], shown["loader"]["workers"]) == (7, 2)
    assert cli.main(["launch", config, "--ranks", "2", "seed=7", "--print"]) == 0
    assert f"run {config} seed=7 world_size=2" in capsys.readouterr().out
    assert cli.main(["plan", config, "--world-size", "1", "simclr.update.batch_size=2"]) == 0
    assert "of 2 images on each" in capsys.readouterr().out
    assert cli.main(["run", config, "--dry-run", "seed"]) == 2
    assert "write it as key.sub=value" in capsys.readouterr().err
    for words in (["run", config, "seed=7", "--dri"], ["report", str(tmp_path), "--nonsense"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_launch_hands_debug_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path)))
    assert cli.main(["launch", config, "--ranks", "1", "--print", "--debug"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("world_size=1 --debug")


def test_long_and_many_lined_errors_are_one_printable_line() -> None:
    line = str(UserError("a\nb\x1b[2J" + "x" * 5000 + ": do this"))
    assert line.startswith(r"a\nb\x1b[2Jxxx") and line.endswith("x: do this") and line.isprintable()
    assert len(line) < 1600


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b|c", r"a_b\|c"),
        ("_a_ *b* `c` [d](e)", r"\_a\_ \*b\* \`c\` \[d\](e)"),
        ("<img src=x> & http://x", r"&lt;img src=x&gt; &amp; http:\//x"),
        ("two\nlines", r"two\\nlines"),
    ],
)
def test_markdown_shows_the_text(text: str, shown: str) -> None:
    assert markdown(text) == shown


@pytest.mark.parametrize("text", ["=1+2", "+x", "-x", "@SUM(A1)", "\tx", "\r=1", "-1+2", "=", "- 1"])
def test_a_formula_gets_a_quote(text: str) -> None:
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("value", ["a=1", "-1.5", "+2", "-1e-3", "x-y", "", 3, -3.5, None])
def test_numbers_and_names_stay(value: object) -> None:
    assert cell(value) == value


def test_a_progress_bar_may_move_the_cursor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's bar on a terminal: carriage returns reach it as they are."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    assert cli.main(["run", str(config)]) == 0
    assert "\rsimclr" in shown.getvalue() and r"\r" not in shown.getvalue()
