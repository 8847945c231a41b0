"""What a reader looks for first: what was attacked, what was done, what is left, at what cost."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from dist_defend.report import tables
from dist_defend.report.runs import Run
from dist_defend.report.sheet import Cell, Head, Row, Sheet
from dist_defend.report.tables import Line

_MOST_NAMED = 4
_ATTACKS = {"acc": "good", "ra": "good", "asr": "bad", "asr_all": "bad"}
_CHANGE = "percentage points since before the defence: its run's own count of the model that it was given"
_COST = "seconds of the run's own work times devices, without what only measures"


class Story(NamedTuple):
    """A task in four answers, each some lines of text."""

    task: str
    attacked: list[str]
    done: list[str]
    left: list[str]
    cost: list[str]


def by_task(lines: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    """The lines of each task."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.task, []).append(line)
    return list(groups.items())


def stories(runs: Sequence[Run], lines: Sequence[Line]) -> list[Story]:
    """One for each task that something was attacked or defended on."""
    found = []
    for task, own in by_task(lines):
        done = sorted((line for line in own if line.is_defended and not line.is_oracle), key=_by_asr)
        attacked = [line for line in own if line.kind == "backdoored"]
        if done or attacked:
            labels = {line.run for line in own}
            found.append(_story(task, [run for run in runs if run.label in labels], attacked, done))
    return found


def _story(task: str, runs: Sequence[Run], attacked: Sequence[Line], done: Sequence[Line]) -> Story:
    targets = dict.fromkeys(name for run in runs if (name := run.target_name(task)))
    what = [text for text in dict.fromkeys(run.attack_text for run in runs) if text]
    before = [f"ASR {line.scores['asr']} %, ACC {line.scores['acc']} %" for line in attacked]
    if not before:
        before = list(dict.fromkeys(f"ASR {_rate(line.before['asr'])}, ACC {_rate(line.before['acc'])}"
                                    for line in done))  # fmt: skip
    to = [f"to “{next(iter(targets))}”"] if len(targets) == 1 else []
    left = [
        f"{line.kind}: ASR {_rate(line.scores['asr'].mean)}{_signed(line, 'asr')}, "
        f"ACC {_rate(line.scores['acc'].mean)}{_signed(line, 'acc')}"
        for line in done
    ]
    kinds = list(dict.fromkeys(line.kind for line in done))
    cost = [f"{line.kind}: {tables.duration(line.seconds)}" for line in done if line.seconds is not None]
    return Story(
        task,
        [*_few(what), *to, *_few(before)],
        [", ".join(kinds) or "no defence"],
        _few(left) or _few(before),
        _few(cost) or ["–"],
    )


def _few(texts: Sequence[str]) -> list[str]:
    more = len(texts) - _MOST_NAMED
    return [*texts[:_MOST_NAMED], *([f"and {more} more, see the table"] if more > 0 else [])]


def _by_asr(line: Line) -> float:
    mean = line.scores["asr"].mean
    return math.inf if math.isnan(mean) else mean


def _rate(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f} %"


def _signed(line: Line, name: str) -> str:
    change = line.change(name)
    return "" if math.isnan(change) else f" ({tables.signed(change)})"


def rates(lines: Sequence[Line]) -> Sheet:
    """Rates of each model, with what a defence changed and cost; a group per task."""
    has_change = any(line.is_defended for line in lines)
    has_der = any(not math.isnan(line.scores["der"].mean) for line in lines)
    has_runs = len({line.run for line in lines}) > 1
    meaning = tables.DEFINITIONS
    names = [*tables.METRICS, *(["der"] if has_der else [])]
    head = [Head("model", "kind of model, and the run that made it", is_number=False)]
    for name in names:
        told = tables.SCORES[name]
        head.append(Head(f"{told} %", meaning[told]))
        if name in tables.COMPARED and has_change:
            head.append(Head(f"Δ{told}", _CHANGE))
    head += [Head("cost", _COST), Head("n", meaning["n"]), Head("seeds", "seeds of the downstream classifier")]
    groups = []
    for task, own in by_task(lines):
        rows = []
        for line in own:
            cells = [Cell(line.kind, more=line.run if has_runs else "")]
            for name in names:
                score = line.scores[name]
                bar = None if math.isnan(score.mean) or name not in _ATTACKS else (_ATTACKS[name], score.mean)
                cells.append(Cell(str(score), score.mean, bar=bar))
                if name in tables.COMPARED and has_change:
                    cells.append(Cell(tables.signed(line.change(name)), line.change(name)))
            seconds = line.seconds if line.is_defended and not line.is_oracle else None
            cells.append(Cell(tables.duration(seconds), math.nan if seconds is None else seconds))
            cells += [Cell(f"{line.n_clean} / {line.n_triggered}", line.n_clean), Cell(str(line.num_seeds))]
            rows.append(Row(cells, "broken" if line.is_near_chance else "weak" if line.is_weak else ""))
        groups.append((task, rows))
    return Sheet("rates", head, groups, f"{tables.spread(lines)} A defence works where ASR falls and ACC stays.")


def retuned(lines: Sequence[Line]) -> Sheet | None:
    """Rates after re-activation, where some line has them."""
    names = [name for name in tables.columns(lines) if name in tables.RETUNED]
    if not names:
        return None
    own = [line for line in lines if any(not math.isnan(line.scores[name].mean) for name in names)]
    head = [Head("model", is_number=False)]
    for name in names:
        told = tables.RETUNED[name]
        head.append(Head(f"{told} %", tables.DEFINITIONS.get(told, "")))
    groups = [
        (task, [Row([Cell(line.kind, more=line.run), *(Cell(str(s := line.scores[n]), s.mean) for n in names)])
                for line in some])
        for task, some in by_task(own)
    ]  # fmt: skip
    return Sheet("retuned", head, groups, "An oracle's test: it needs the trigger.")


def definitions(lines: Sequence[Line]) -> dict[str, str]:
    """What the page's columns mean."""
    found = tables.definitions(lines)
    if any(line.is_defended for line in lines):
        found |= {"Δ": _CHANGE, "cost": _COST}
    if any(line.is_weak for line in lines):
        found["weak attack"] = f"its ASR before any defence is below {tables.STRONG:.0f} %: it did not take"
    return found
