"""The comment lines that a file of configs/ begins with: command, hardware, minutes, what to expect."""

import re
from pathlib import Path

import pytest

from dist_defend.config import load_experiment
from dist_defend.plan import stage_plans
from tests.runs import make_classifier, make_data, make_model

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
MOST_LINES = 40
RATE = 20.0  # TFLOP/s, of all estimates (docs/launch.md)
ESTIMATE = "needs a GPU: estimate"
UPDATES = re.compile(r"([\d,]+) updates of ([\d.]+) TFLOP, [\d.]+ GiB, by `dist-defend plan`\)")


def header(text: str) -> dict[str, str]:
    """Word -> the rest of its line, of the comment lines at the start of a file."""
    lines = text.splitlines()[:MOST_LINES]
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return {found[1]: found[2] for line in lines[:end] if (found := re.fullmatch(r"# (\w+): +(.+)", line))}


def problems(text: str) -> list[str]:
    """What a file's header lacks."""
    found = header(text)
    missing = [f"no {word}" for word in ("command", "hardware", "minutes", "expected") if word not in found]
    minutes = found.get("minutes", "0")
    if "not measured" in minutes or not (ESTIMATE in minutes or re.search(r"\d", minutes)):
        missing.append(f"minutes: {minutes}")
    return missing


def planned(text: str) -> tuple[float, float, float] | None:
    """Minutes, updates and TFLOP per update of a header with one stage, all by the plan; None for another header."""
    minutes = header(text)["minutes"]
    told = re.search(rf"{ESTIMATE} ([\d.,]+) at 20 TFLOP/s \(", minutes)
    work = UPDATES.fullmatch(minutes, told.end()) if told else None
    if told is None or work is None:
        return None
    estimate, updates, tflop = (float(number.replace(",", "")) for number in (told[1], *work.groups()))
    return estimate, updates, tflop


def test_every_file_says_what_it_takes() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    is_run = re.compile(r"^(method|config|stages|explicit):", re.MULTILINE)
    wanted = {path: text for path, text in texts.items() if is_run.search(text)}
    assert len(wanted) == len(texts) >= 120  # experiments and sweeps, nothing else
    assert {path.name: found for path, text in wanted.items() if (found := problems(text))} == {}


@pytest.mark.parametrize(
    ("line", "is_fine"),
    [
        ("4", True),
        ("needs a GPU: estimate not possible (its stages draw their length)", True),
        ("needs a GPU: estimate 14 at 20 TFLOP/s (1 updates of 2 TFLOP, worked out)", True),
        ("not measured here (39,000 steps of 128 images)", False),
        ("4 on one core, not measured on two", False),
        ("docs/results.md", False),
    ],
)
def test_a_line_without_a_figure_is_seen(line: str, is_fine: bool) -> None:
    head = f"# One.\n# command:  run\n# hardware: one GPU\n# minutes:  {line}\n# expected: none\nmethod: ft\n"
    assert (problems(head) == []) is is_fine


def test_a_missing_or_late_line_is_seen() -> None:
    head = "# command:  run\n# hardware: one GPU\n# expected: none\nmethod: ft\n# minutes:  4\n"
    assert problems(head) == ["no minutes"]
    assert problems("# x\n" * MOST_LINES + head)[:2] == ["no command", "no hardware"]


def test_estimates_are_updates_times_work_by_the_rate() -> None:
    found = {path.stem: planned(path.read_text(encoding="utf-8")) for path in FILES}
    numbers = {stem: number for stem, number in found.items() if number is not None}
    assert len(numbers) > 30
    for stem, (estimate, updates, tflop) in numbers.items():
        assert estimate == pytest.approx(updates * tflop / RATE / 60, rel=0.05, abs=0.05), stem


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("attack/abd_teacher_cifar10", []),
        ("attack/badencoder_cifar10", ["badencoder.reference={dataset: data/cifar10/train, target_class: 1}"]),
        ("defend/kd_cifar10", ["kd.data.fraction=1.0"]),
    ],
)
def test_the_work_of_an_update_is_the_plan_s(
    file: str, changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of networks and batches as in the file; only the data sets have fewer images."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        make_data(Path(f"data/cifar10/{part}"), 300, size=32)
    if file.startswith("attack/badencoder"):
        make_model(Path("runs/pretrain/simclr_cifar10/model"), size=32, arch="resnet18_cifar")
    if file.startswith("defend/kd"):
        make_classifier(Path("runs/attack/abd_teacher_cifar10/model"), size=32, arch="wrn_16_2")
    path = CONFIGS / f"{file}.yaml"
    (plan,), _ = stage_plans(load_experiment(path, changes), 1, "ddp")
    told = planned(path.read_text(encoding="utf-8"))
    assert told is not None
    assert told[2] == pytest.approx(plan.memory.flops / 1e12, rel=0.01)
