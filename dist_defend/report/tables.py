"""Counts to tables: percentages, mean and spread over seeds, as text, Markdown and CSV."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dist_defend.evaluate import Count
from dist_defend.report.runs import Run

METRICS = {"acc": "ACC", "asr": "ASR", "asr_all": "ASR-all", "ra": "RA"}
DEFINITIONS = {
    "ACC": "clean test images classified as their label",
    "ASR": "attack success rate: triggered test images whose label is not the target, classified as the target",
    "ASR-all": "all triggered test images classified as the target, the published convention of BadEncoder and MIMIC; "
    "a harmless encoder scores about the target's share of the test set",
    "RA": "robust accuracy: triggered test images whose label is not the target, still classified as their label",
    "n": "clean test images / triggered test images whose label is not the target",
}
SPREAD = "Mean ± sample standard deviation over the seeds of the downstream classifier; the encoders stay the same."
_CSV_COLUMNS = ["run", "kind", "task", "seed", *METRICS, "n_clean", "n_triggered"]
_KINDS = ["clean", "backdoored", "purified"]
_NEAR_CHANCE = 1.5


@dataclass(frozen=True)
class Score:
    """Percent over seeds: mean and sample standard deviation (nan for one seed, or none)."""

    mean: float
    std: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"
        return f"{self.mean:.1f}" if math.isnan(self.std) else f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class Line:
    """One encoder on one task."""

    run: str
    task: str
    kind: str
    scores: dict[str, Score]  # keys of METRICS
    num_seeds: int
    n_clean: int
    n_triggered: int
    chance: float  # percent: what answering the target class always would score on the clean images

    @property
    def is_near_chance(self) -> bool:
        """Whether this clean accuracy means that training failed and no other number of the line counts."""
        return self.scores["acc"].mean < _NEAR_CHANCE * self.chance


def summarise(runs: Iterable[Run]) -> list[Line]:
    """A line per run, task and kind; clean, backdoored, purified first, then others as they come."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for row in run.rows:
            groups.setdefault((run.label, str(row["task"]), str(row["kind"])), []).append(row)
    places = [(run, task) for run, task, _ in groups]
    kinds = _KINDS + [kind for _, _, kind in groups]
    ordered = sorted(groups, key=lambda key: (places.index(key[:2]), kinds.index(key[2])))
    return [_line(key, groups[key]) for key in ordered]


def _line(key: tuple[str, str, str], rows: Sequence[dict[str, Any]]) -> Line:
    counts = {name: [Count(row[name]["correct"], row[name]["n"]) for row in rows] for name in METRICS}
    everyone, others = counts["asr_all"][0].n, counts["asr"][0].n
    chance = Count(everyone - others, everyone).percent
    scores = {name: _score([count.percent for count in column]) for name, column in counts.items()}
    return Line(*key, scores, len(rows), counts["acc"][0].n, others, chance)


def _score(percents: Sequence[float]) -> Score:
    return Score(statistics.fmean(percents), statistics.stdev(percents) if len(percents) > 1 else math.nan)


def alarms(lines: Sequence[Line]) -> list[str]:
    """Lines that must not be believed."""
    return [
        f"{line.kind} on {line.task}: clean accuracy {line.scores['acc']} % is at chance ({line.chance:.1f} %); "
        "this run is broken and its other rates mean nothing"
        for line in lines
        if line.is_near_chance
    ]


def notices(runs: Sequence[Run], unfinished: Sequence[str], lines: Sequence[Line]) -> list[str]:
    """What the report leaves out."""
    told = (
        [] if lines else ["no probe run among these, so no table of rates; run one (method: probe) and report it too"]
    )
    told += [f"{folder} is unfinished and left out" for folder in unfinished]
    torn = [(run.label, run.metrics[1]) for run in runs]
    return told + [f"{label}: {count} unreadable line(s) of metrics.jsonl left out" for label, count in torn if count]


def to_csv(runs: Iterable[Run]) -> str:
    """One row per kind, task and seed; rates in percent with four decimals, empty where there was nothing to count."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for run in runs:
        for row in run.rows:
            percents = [Count(row[name]["correct"], row[name]["n"]).percent for name in METRICS]
            rates = ["" if math.isnan(percent) else f"{percent:.4f}" for percent in percents]
            sizes = [row["acc"]["n"], row["asr"]["n"]]
            writer.writerow([run.label, row["kind"], row["task"], row["seed"], *rates, *sizes])
    return out.getvalue()


def cells(lines: Sequence[Line]) -> list[list[str]]:
    """Header and rows of the summary as text; a run's name only where there are several."""
    has_runs = len({line.run for line in lines}) > 1
    head = [*(["run"] if has_runs else []), "task", "encoder", *(f"{m} %" for m in METRICS.values()), "n", "seeds"]
    body = [
        [
            *([line.run] if has_runs else []), line.task, line.kind, *(str(line.scores[name]) for name in METRICS),
            f"{line.n_clean} / {line.n_triggered}", str(line.num_seeds),
        ]
        for line in lines
    ]  # fmt: skip
    return [head, *body]


def to_text(lines: Sequence[Line]) -> str:
    """The summary for a terminal; a blank line between tasks."""
    table = cells(lines)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    first_number = len(table[0]) - len(METRICS) - 2
    out, last = [], None
    for number, row in enumerate(table):
        group = (lines[number - 1].run, lines[number - 1].task) if number else None
        if group != last:
            out.append("")
        last = group
        pairs = enumerate(zip(row, widths, strict=True))
        out.append("  ".join(f"{t:<{w}}" if i < first_number else f"{t:>{w}}" for i, (t, w) in pairs).rstrip())
    return "\n".join(out)


def to_markdown(lines: Sequence[Line], notices: Sequence[str], runs: Sequence[Run]) -> str:
    """The page for people who read Markdown: notices, summary, definitions, provenance."""
    out = ["# Backdoor report", ""]
    for notice in notices:
        out += [f"> {notice}", ""]
    if lines:
        out += [*_markdown_table(cells(lines)), "", SPREAD, ""]
        out += [*(f"- **{name}**: {text}." for name, text in DEFINITIONS.items()), ""]
    return "\n".join([*out, "## Runs", "", *_markdown_table(provenance(runs)), ""])


def provenance(runs: Sequence[Run]) -> list[list[str]]:
    """Header and rows: what produced each run's numbers."""
    head = [
        "run",
        "method",
        "seed",
        "ranks",
        "device",
        "wall time",
        "peak memory",
        "code",
        "config sha256",
        "data sha256",
    ]
    return [head, *map(_provenance, runs)]


def _provenance(run: Run) -> list[str]:
    result = run.result
    seconds, memory = result.get("wall_seconds"), result.get("peak_memory_bytes")
    data = [f"{role} {digest[:8]}" for role, digest in result.get("data", {}).items()]
    told = {key: str(result.get(key, "–")) for key in ("method", "seed", "world_size", "device", "code_version")}
    return [
        run.label,
        told["method"],
        told["seed"],
        told["world_size"],
        told["device"],
        "–" if seconds is None else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min",
        "–" if memory is None else f"{memory / 2**30:.1f} GiB",
        told["code_version"],
        str(result.get("config_sha256", "–"))[:12],
        ", ".join(data) or "–",
    ]


def _markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in table]
    return [head, "|" + "---|" * len(table[0]), *body]
