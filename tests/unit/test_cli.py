"""The command line: what it imports before it knows what is wanted, and where words may stand."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_defend.arguments import add_experiment, parse_words
from dist_defend.cli import main
from dist_defend.commands import GROUPS

HEAVY = {"torch", "numpy", "numba", "accelerate", "timm", "torchvision", "sklearn", "PIL", "yaml", "psutil", "tqdm"}
COMMANDS = [
    "run",
    "launch",
    "plan",
    "sweep",
    "reproduce",
    "data",
    "evaluate",
    "attacks",
    "import",
    "export",
    "push",
    "runs",
    "report",
    "zoo",
]
ROOT = Path(__file__).parents[2]


def modules_after(code: str) -> set[str]:
    """All modules that a fresh Python has after the code, which may exit."""
    end = "import atexit, sys\natexit.register(lambda: print('\\n' + ' '.join(sys.modules)))\n"
    done = subprocess.run([sys.executable, "-c", end + code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.splitlines()[-1].split())


def own(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] == "dist_defend"}


def test_the_package_imports_next_to_nothing() -> None:
    modules = modules_after("import dist_defend")
    assert own(modules) == {"dist_defend", "dist_defend.tv_compat"}
    assert not modules & HEAVY


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_command(option: str) -> None:
    modules = modules_after(f"import sys; sys.argv[1:] = ['{option}']; from dist_defend.cli import main; main()")
    light = {
        "arguments",
        "bounds",
        "cli",
        "commands",
        "engine",
        "engine.signals",
        "errors",
        "lifeline",
        "screen",
        "terminal",
        "tv_compat",
    }
    assert own(modules) == {"dist_defend", *(f"dist_defend.{name}" for name in light)}
    assert not modules & HEAVY


def test_help_lists_every_command() -> None:
    command = [sys.executable, "-m", "dist_defend", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    listed = {line.split()[0] for line in told.partition("COMMAND\n")[2].splitlines() if line[4:5].strip()}
    assert {*COMMANDS, "doctor"} <= listed


def test_alone_it_tells_the_first_five_minutes_and_every_command_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    told = capsys.readouterr().out
    first, *groups = re.split(r"\n\n(?=[A-Z][^\n]*:\n)", told.rpartition("\n\n")[0])
    assert first == "Train, poison, purify and measure image encoders and classifiers, on one CPU or many GPUs."
    minutes, *groups = groups
    lines = [line.strip().partition("#")[0].strip() for line in minutes.splitlines()[1:]]
    assert len(lines) == 3
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert all(part in readme for line in lines for part in line.split(" && "))
    assert all((ROOT / word).is_file() for line in lines for word in line.split() if word.startswith("configs/"))
    named = [line.split()[0] for group in groups for line in group.splitlines()[1:]]
    assert sorted(named) == sorted([*COMMANDS, "init", "doctor", "methods", "models", "bench"])
    assert max(map(len, told.splitlines())) <= 110
    assert told.endswith("dist-defend COMMAND --help tells the options of one.\n")


def test_every_command_has_its_module() -> None:
    for group in GROUPS.values():
        for module, _ in group.values():
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file() or (ROOT / module.replace(".", "/")).is_dir()


def test_torchvision_loads_after_the_package_in_any_order() -> None:
    """On a CPU build of torch only behind the patch, which waits for the import of torchvision."""
    assert "torch" not in modules_after("import dist_defend, importlib.util; importlib.util.find_spec('timm')")
    for before in ("", "import torch; "):
        code = f"{before}import dist_defend; from torchvision.models import resnet18; print(resnet18)"
        assert "torchvision.models.resnet" in modules_after(code)


def test_an_unknown_name_of_the_package() -> None:
    import dist_defend

    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        _ = dist_defend.no_such_thing  # type: ignore[attr-defined]


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    """A program with a command that reads an experiment and one that does not."""
    parser = argparse.ArgumentParser(prog="x")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run")
    add_experiment(run)
    run.add_argument("--dry-run", action="store_true")
    run.add_argument("--ranks", type=int)
    commands.add_parser("info").add_argument("folder")
    return parser


@pytest.mark.parametrize(
    "line",
    [
        "c.yaml a=1 b.c=2 a=3 --dry-run --ranks 2",
        "--dry-run --ranks 2 c.yaml a=1 b.c=2 a=3",
        "c.yaml --dry-run a=1 --ranks 2 b.c=2 a=3",
        "a=1 c.yaml b.c=2 --ranks 2 a=3 --dry-run",
        "a=1 --ranks 2 b.c=2 --dry-run a=3 c.yaml",
        "--ranks=2 a=1 --dry-run c.yaml b.c=2 a=3",
    ],
)
def test_overrides_stand_anywhere_and_keep_their_order(line: str, parser: argparse.ArgumentParser) -> None:
    args = parse_words(parser, ["run", *line.split()])
    assert (args.config, args.overrides) == ("c.yaml", ["a=1", "b.c=2", "a=3"])
    assert (args.dry_run, args.ranks) == (True, 2)


@pytest.mark.parametrize(
    ("words", "config", "overrides"),
    [
        (["runs/lr=0.1/config.yaml", "a=1"], "runs/lr=0.1/config.yaml", ["a=1"]),
        (["a=runs/x", "c.yaml"], "c.yaml", ["a=runs/x"]),
        (["lr=0.1.yaml"], "lr=0.1.yaml", []),
        (["c.yaml", "nonsense"], "c.yaml", ["nonsense"]),  # load_experiment says what is wrong with it
    ],
)
def test_which_word_is_the_file(
    words: list[str], config: str, overrides: list[str], parser: argparse.ArgumentParser
) -> None:
    args = parse_words(parser, ["run", *words])
    assert (args.config, args.overrides) == (config, overrides)


@pytest.mark.parametrize("line", ["run c.yaml --dry a=1 --nonsense", "info folder a=1", "info folder other"])
def test_words_that_nobody_reads_are_refused(
    line: str, parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_words(parser, line.split())
    assert end.value.code == 2
    assert f"unrecognized arguments: {' '.join(line.split()[-1:])}" in capsys.readouterr().err


def test_a_dry_run_line_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "seed=7", "configs/demo/1_pretrain.yaml", "--print-config", "output=runs/other"]) == 0
    told = capsys.readouterr().out
    assert "seed: 7\n" in told and "output: runs/other\n" in told


def test_a_runs_modules_leave_out_what_only_some_runs_need() -> None:
    """All methods: a second of imports each for torchvision with torch's compiler, and for what draws or tabulates."""
    code = "import dist_defend.experiment\nfrom dist_defend.methods import *\n[find_method(m) for m in method_names()]"
    loaded = modules_after(f"import dist_defend.config\n{code}")
    late = {"torchvision", "torch._dynamo", "sympy", "sklearn", "matplotlib", "pandas", "tensorboard", "timm"}
    assert not loaded & {*late, "jinja2", "deepspeed", "transformers", "open_clip", "ffcv"}
    assert {"torch", "accelerate", "dist_defend.methods.defend.ibau"} <= loaded
