"""Counts to tables: percentages, mean and spread over seeds, as text, Markdown and CSV."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dist_defend.aligned import aligned
from dist_defend.counts import ORACLE, Count, rating
from dist_defend.detection import KIND
from dist_defend.report import detectors
from dist_defend.report.runs import Run
from dist_defend.screen import cell, markdown

METRICS = {"acc": "ACC", "asr": "ASR", "asr_all": "ASR-all", "ra": "RA"}
RATINGS = {"der": "DER"}  # shown where a run tells what was before
RETUNED = {  # shown where a run of method reactivate has counted them
    "asr_retuned": "ASR re-tuned",
    "asr_retuned_clean": "ASR q = 0",
    "asr_retuned_control": "ASR control",
    "acc_retuned": "ACC re-tuned",
    "asr_queried": "ASR queried",
    "asr_queried_control": "ASR queried control",
}
SCORES = METRICS | RATINGS | RETUNED
DEFINITIONS = {
    "ACC": "clean test images classified as their label",
    "ASR": "attack success rate: triggered test images whose label is not the target, classified as the target",
    "ASR-all": "all triggered test images classified as the target, the published convention of BadEncoder, MIMIC and "
    "I-BAU; a harmless model scores about the target's share of the test set",
    "RA": "robust accuracy: triggered test images whose label is not the target, still classified as their label",
    "DER": "defence effectiveness rating, (max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2 against the model that "
    "the defence was given; 100 is perfect, 50 changes nothing",
    "ASR re-tuned": "ASR after re-tuning on N images, q of them poisoned; an oracle's number: it needs the trigger. "
    "A backdoor was asleep only where this is well above ASR control, with ACC re-tuned near ACC",
    "ASR q = 0": "the same re-tuning without a poisoned image",
    "ASR control": "a clean network that never saw the trigger, re-tuned on the same q poisoned images",
    "ACC re-tuned": "ACC after re-tuning on q poisoned images",
    "ASR queried": "ASR where each image is changed a little, by a network that was trained to wake the backdoor",
    "ASR queried control": "the same changed images, and a clean network",
    "n": "clean test images / triggered test images whose label is not the target",
}
SPREAD = "Mean ± sample standard deviation over the seeds of the downstream classifier; the encoders stay the same."
_DETECTED = ["detector", "score", "low", "high", "verdict", "truth"]
_CSV_COLUMNS = ["run", "kind", "task", "seed", *METRICS, *RATINGS, "n_clean", "n_triggered"]
_KINDS = ["clean", "backdoored", "purified"]
_NEAR_CHANCE = 1.5
_MOST_NAMED = 5
COMPARED = ("acc", "asr")  # rates of which a line knows what they were before
STRONG = 90.0  # percent: an attack with less ASR did not take, and a defence against it shows little


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
    """One model on one task."""

    run: str
    task: str
    kind: str
    scores: dict[str, Score]  # keys of SCORES
    num_seeds: int
    n_clean: int
    n_triggered: int
    chance: float  # percent: what answering the target class always would score on the clean images
    before: dict[str, float]  # percent, keys of COMPARED: of the model that this one was made of; nan where not told
    seconds: float | None = None  # of work that the run took, all its processes' lives together

    def change(self, name: str) -> float:
        """Percentage points since before, nan where that is not told. name: of COMPARED."""
        return self.scores[name].mean - self.before[name]

    @property
    def is_oracle(self) -> bool:
        """Whether it was chosen by its rates on the test set, which no defender has."""
        return self.kind.endswith(ORACLE)

    @property
    def is_defended(self) -> bool:
        """Whether something was done against a backdoor."""
        return not math.isnan(self.before["acc"])

    @property
    def is_weak(self) -> bool:
        """Whether the attack did not take: less than STRONG percent of triggered images go to the target before."""
        asr = self.before["asr"] if self.is_defended else self.scores["asr"].mean
        return (self.is_defended or self.kind == "backdoored") and asr < STRONG

    @property
    def is_near_chance(self) -> bool:
        """Whether this clean accuracy means that training failed and no other number of the line counts."""
        return self.scores["acc"].mean < _NEAR_CHANCE * self.chance


def summarise(runs: Iterable[Run]) -> list[Line]:
    """A line per task, run and kind: tasks and runs as they come, kinds clean, backdoored, purified, then others.

    What an oracle chose stands behind what the defender did.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    of_run = {run.label: run for run in runs}
    for run in of_run.values():
        for row in run.rows:
            rated = row | {"der": _der(run, row)}
            groups.setdefault((run.label, str(row["task"]), str(row["kind"])), []).append(rated)
    labels, tasks = [run for run, _, _ in groups], [task for _, task, _ in groups]
    kinds = _KINDS + [kind.removesuffix(ORACLE) for _, _, kind in groups]

    def place(key: tuple[str, str, str]) -> tuple[int, int, int, bool]:
        run, task, kind = key
        own = kinds.index(kind.removesuffix(ORACLE))
        return tasks.index(task), labels.index(run), own, kind.endswith(ORACLE)

    made = {key: _line(key, groups[key], of_run[key[0]]) for key in sorted(groups, key=place)}
    for key, line in made.items():
        parent = made.get((line.run, line.task, "backdoored"))
        if line.kind == "purified" and parent is not None:  # of encoders that one run probes
            before = {name: parent.scores[name].mean for name in COMPARED}
            makers = [run for run in of_run.values() if run.path.name == of_run[line.run].encoder_of(line.kind)]
            made[key] = replace(line, before=before, seconds=makers[0].seconds if len(makers) == 1 else None)
    return list(made.values())


def _der(run: Run, row: dict[str, Any]) -> float:
    """DER in percent of a row against what its run says was before, nan if it says nothing."""
    acc, asr = (run.before(name) - _percent(row, name) for name in ("acc", "asr"))
    return 100 * rating(asr / 100, acc / 100)


def _percent(row: dict[str, Any], name: str) -> float:
    """nan for a count that was not made."""
    return Count(row[name]["correct"], row[name]["n"]).percent if name in row else math.nan


def _line(key: tuple[str, str, str], rows: Sequence[dict[str, Any]], run: Run) -> Line:
    counts = {name: [Count(row[name]["correct"], row[name]["n"]) for row in rows] for name in METRICS}
    everyone, others = counts["asr_all"][0].n, counts["asr"][0].n
    chance = Count(everyone - others, everyone).percent
    scores = {name: _score([count.percent for count in column]) for name, column in counts.items()}
    scores["der"] = _score([row["der"] for row in rows])
    scores |= {name: _score([_percent(row, name) for row in rows]) for name in RETUNED}
    before = {name: run.before(name) for name in COMPARED}
    return Line(*key, scores, len(rows), counts["acc"][0].n, others, chance, before, run.seconds)


def _score(percents: Sequence[float]) -> Score:
    mean = statistics.fmean(percents)
    has_spread = len(percents) > 1 and not math.isnan(mean)
    return Score(mean, statistics.stdev(percents) if has_spread else math.nan)


def alarms(lines: Sequence[Line]) -> list[str]:
    """Lines that must not be believed."""
    return [
        f"{line.kind} on {line.task}: clean accuracy {line.scores['acc']} % is at chance ({line.chance:.1f} %); "
        "this run is broken and its other rates mean nothing"
        for line in lines
        if line.is_near_chance
    ]


def notices(runs: Sequence[Run], unfinished: Sequence[str], damaged: Sequence[str], lines: Sequence[Line]) -> list[str]:
    """What the report leaves out."""
    told = (
        []
        if lines or any(run.detections for run in runs)
        else ["no probe, classifier or defence among these, so no table of rates; run one and report it too"]
    )
    weak = [f"{line.run} on {line.task}" for line in lines if line.is_weak]
    if weak:
        more = f" and {len(weak) - _MOST_NAMED} more" if len(weak) > _MOST_NAMED else ""
        named = ", ".join(dict.fromkeys(weak[:_MOST_NAMED]))
        told.append(f"weak attack, ASR below {STRONG:.0f} % before any defence: {named}{more}")
    told += [f"{folder} is unfinished and left out" for folder in unfinished]
    told += [f"left out: {error}" for error in damaged]
    torn = [(run.label, run.metrics[1]) for run in runs]
    return told + [f"{label}: {count} unreadable line(s) of metrics.jsonl left out" for label, count in torn if count]


def to_csv(runs: Iterable[Run]) -> str:
    """One row per kind, task and seed; rates in percent with four decimals, empty where there was nothing to count.

    What re-tuning gave comes last, if any row has it, and what detectors found, whose rows have no rates but a score.
    A verdict is empty where nothing was found.
    """
    runs, out = list(runs), io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    more = [name for name in RETUNED if any(name in row for run in runs for row in run.rows)]
    detected = _DETECTED if any(run.detections for run in runs) else []
    writer.writerow([*_CSV_COLUMNS, *more, *detected])

    def told(percent: float) -> str:
        return "" if math.isnan(percent) else f"{percent:.4f}"

    for run in runs:
        for row in run.rows:
            rates = [*(told(_percent(row, name)) for name in METRICS), told(_der(run, row))]
            sizes = [row["acc"]["n"], row["asr"]["n"], *(told(_percent(row, name)) for name in more)]
            nothing = [""] * len(detected)
            writer.writerow([*map(cell, (run.label, row["kind"], row["task"])), row["seed"], *rates, *sizes, *nothing])
        for one in run.detections:
            head = [*map(cell, (run.label, KIND, one.task)), one.seed]
            rates = [""] * (len(_CSV_COLUMNS) + len(more) - len(head))
            scores = ["" if score is None else f"{score:.6g}" for score in (one.score, one.low, one.high)]
            writer.writerow([*head, *rates, cell(one.detector), *scores, one.verdict or "", one.truth])
    return out.getvalue()


def columns(lines: Sequence[Line]) -> dict[str, str]:
    """Scores that the summary shows, key -> heading: those beyond METRICS only where some line has one."""
    own = {key for line in lines for key, score in line.scores.items() if not math.isnan(score.mean)}
    return {key: heading for key, heading in SCORES.items() if key in METRICS or key in own}


def definitions(lines: Sequence[Line]) -> dict[str, str]:
    """What the headings of the summary mean."""
    shown = columns(lines).values()
    return {name: text for name, text in DEFINITIONS.items() if name in shown or name == "n"}


def spread(lines: Sequence[Line]) -> str:
    """How to read mean and deviation, where some line has several seeds."""
    return SPREAD if any(line.num_seeds > 1 for line in lines) else ""


def cells(lines: Sequence[Line]) -> list[list[str]]:
    """Header and rows of the summary as text; a run's name only where there are several, changes where some are known.

    The columns up to "model" name a row.
    """
    has_runs = len({line.run for line in lines}) > 1
    has_change = any(line.is_defended for line in lines)
    head = ["task", *(["run"] if has_runs else []), "model"]
    body = [[line.task, *([line.run] if has_runs else []), line.kind] for line in lines]
    for name, told in columns(lines).items():
        head.append(f"{told} %")
        for row, line in zip(body, lines, strict=True):
            row.append(str(line.scores[name]))
        if name in COMPARED and has_change:
            head.append(f"Δ{told}")
            for row, line in zip(body, lines, strict=True):
                row.append(signed(line.change(name)))
    tail = [[f"{line.n_clean} / {line.n_triggered}", str(line.num_seeds)] for line in lines]
    return [[*head, "n", "seeds"], *([*row, *end] for row, end in zip(body, tail, strict=True))]


def to_text(lines: Sequence[Line], width: int | None = None) -> str:
    """The summary for a terminal of so many letters in a line; a blank line between tasks."""
    table = cells(lines)
    return aligned(table, table[0].index("model") + 1, width, by_first=True)


def signed(value: float) -> str:
    """With its sign, a true minus; – for nan."""
    return "–" if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")


def to_markdown(lines: Sequence[Line], notices: Sequence[str], runs: Sequence[Run]) -> str:
    """The page for people who read Markdown: notices, summary, definitions, provenance."""
    out = ["# Backdoor report", ""]
    for notice in notices:
        out += [f"> {markdown(notice)}", ""]
    if lines:
        out += [*_markdown_table(cells(lines)), "", *([spread(lines), ""] if spread(lines) else [])]
        out += [*(f"- **{name}**: {text}." for name, text in definitions(lines).items()), ""]
    if found := detectors.cells(runs):
        out += ["## Detectors", "", *_markdown_table([detectors.HEAD, *found]), "", detectors.MEANING, ""]
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
    method = [told["method"], *([str(result["head"])] if "head" in result else [])]
    return [
        run.label,
        ": ".join(method),
        told["seed"],
        told["world_size"],
        told["device"],
        duration(seconds),
        "–" if memory is None else f"{memory / 2**30:.1f} GiB",
        told["code_version"],
        str(result.get("config_sha256", "–"))[:12],
        ", ".join(data) or "–",
    ]


def duration(seconds: float | None) -> str:
    """In words, – where it is not told."""
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(map(markdown, row)) + " |" for row in table]
    return [head, "|" + "---|" * len(table[0]), *body]
