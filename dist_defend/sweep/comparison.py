"""What a sweep's defences give and cost side by side: over all networks, in pairs, and over a method's settings."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dist_defend.methods import folder_of
from dist_defend.sweep.grid import Point, Sweep

RATES = ("acc", "asr")
CONFIDENCE = 0.95
NETWORK, ATTACK, SETTING = ":network", ":attack", ":setting"  # columns that are no axis


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The mean of differences (n,) and half the width of its 95 % interval, by Student's t; nan for too few of them."""
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return (differences[0] if count else np.nan), np.nan
    error = statistics.stdev(differences) / count**0.5
    return statistics.fmean(differences), float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error


def deviation(values: Sequence[float]) -> float:
    """The median absolute deviation of values (n,), not scaled: the median of |x - median x|."""
    middle = statistics.median(values)
    return statistics.median([abs(value - middle) for value in values])


def making(sweep: Sweep) -> set[str]:
    """The stages that make networks for others: those after no other, and attacks or pre-training after such a one."""
    made: set[str] = set()
    followed = {stage.after for stage in sweep.config.stages.values()}
    for name, stage in sweep.config.stages.items():
        methods = {point.experiment.method for point in sweep.points if point.stage == name}
        makes = name in followed and all(folder_of(method) in ("pretrain", "attack") for method in methods)
        if stage.after is None or (stage.after in made and makes):
            made.add(name)
    return made


def places(sweep: Sweep) -> pd.DataFrame:
    """A line per point of a stage that makes no networks: its key, and NETWORK, its nearest ancestor that is one.

    ATTACK and SETTING are the labels of stages that make networks and of the others, without seeds.
    """
    stages, made = sweep.config.stages, making(sweep)
    several = len(stages) > len(made) + 1

    def told(point: Point, is_attack: bool) -> str:
        own = {
            axis: label
            for axis, label in point.labels.items()
            if (axis.partition(".")[0] in made) is is_attack and not axis.endswith(".seed")
        }
        texts = [f"{v}" if axis in stages else f"{axis.rpartition('.')[2]}={v}" for axis, v in own.items()]
        is_named = point.stage in point.labels  # by the file's own words
        return " ".join([point.stage] * (several and not is_attack and not is_named) + texts)

    def network(point: Point) -> str:
        return point.key if point.parent is None or point.stage in made else network(point.parent)

    lines = [
        {"key": p.key, NETWORK: network(p), ATTACK: told(p, True), SETTING: told(p, False)}
        for p in sweep.points
        if p.stage not in made
    ]
    return pd.DataFrame(lines, columns=["key", NETWORK, ATTACK, SETTING])


def told_once(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the rows of points whose finding a defence's row has: what re-tuning made of it is told there."""
    if "asr_retuned" not in rows:
        return rows
    shown_by = rows.loc[rows["asr_retuned"].notna(), "key"]
    return rows[rows["asr_retuned"].isna() | ~rows["parent"].isin(shown_by)]


class Comparison:
    """What defenders' choices gave, each with its place. reference: the file's first setting, and its kind of model."""

    def __init__(self, sweep: Sweep, rows: pd.DataFrame) -> None:
        self.places = places(sweep)
        counted = told_once(rows[rows["chosen_by"] == "defender"]) if "chosen_by" in rows else rows[:0]
        self.rows = counted.merge(self.places, on="key")
        named = zip(self.rows[SETTING], self.rows["kind"], strict=True) if len(self.rows) else ()
        self.defences: list[tuple[str, str]] = list(dict.fromkeys(named))
        first = self.places[SETTING].iloc[0] if len(self.places) else None
        self.reference = next((defence for defence in self.defences if defence[0] == first), None)
        self.wide = {rate: self._wide(rate) for rate in RATES} if self.defences else {}

    def _wide(self, rate: str) -> pd.DataFrame:
        """A line per attack, network and task, a column per defence; several seeds of a defence's own are averaged."""
        rows = self.rows.assign(**{rate: self.rows[rate].astype(float)})
        groups = rows.groupby([ATTACK, NETWORK, "task", SETTING, "kind"], sort=False)
        return groups[rate].mean().unstack([SETTING, "kind"])

    def differences(self, defence: tuple[str, str], attack: str | None = None) -> dict[str, Any]:
        """Of each rate to the reference's on the same networks, of one attack or all: mean, half the interval, n."""
        found: dict[str, Any] = {}
        for rate, wide in self.wide.items():
            pairs: list[float] = []
            if self.reference is not None and defence != self.reference and defence in wide:
                both = wide if attack is None else wide[wide.index.get_level_values(ATTACK) == attack]
                pairs = (both[defence] - both[self.reference]).dropna().tolist()
            mean, half = interval(pairs)
            found |= {f"{rate}_diff": mean, f"{rate}_diff_half": half, f"{rate}_diff_n": len(pairs)}
        return found

    def stability(self) -> dict[str, dict[str, Any]]:
        """Method -> for those with several settings: how many, and the deviation of ACC and ASR over them.

        For each attack a setting counts by its mean over the networks that all settings of the method have; the
        deviation is that over settings, and its mean over attacks is given.
        """
        found: dict[str, dict[str, Any]] = {}
        for method in dict.fromkeys(kind for _, kind in self.defences):
            own = [defence for defence in self.defences if defence[1] == method]
            if len(own) < 2:
                continue
            found[method] = {"settings": len(own)}
            for rate, wide in self.wide.items():
                means = wide[own].dropna().groupby(ATTACK, sort=False).mean()
                spreads = [deviation(values) for values in means.to_numpy().tolist()]
                found[method][f"{rate}_mad"] = statistics.fmean(spreads) if spreads else np.nan
        return found

    def table(self) -> pd.DataFrame:
        """A line per setting and kind of model: rates over all networks, differences, device-seconds, stability.

        times: the cost by that of the cheapest.
        """
        stability, lines = self.stability(), []
        for defence in self.defences:
            own = self.rows[(self.rows[SETTING] == defence[0]) & (self.rows["kind"] == defence[1])]
            line: dict[str, Any] = {"setting": defence[0], "kind": defence[1], "networks": own[NETWORK].nunique()}
            for rate in RATES:
                values = self.wide[rate][defence].dropna()
                line |= {rate: values.mean(), f"{rate}_std": values.std()}
            costs = own.drop_duplicates("key")["device_seconds"].astype(float)
            line |= self.differences(defence) | {"device_seconds": costs.mean(), "device_seconds_std": costs.std()}
            lines.append(line | stability.get(defence[1], {"settings": 1, "acc_mad": np.nan, "asr_mad": np.nan}))
        table = pd.DataFrame(lines)
        return table.assign(times=table["device_seconds"] / table["device_seconds"].min()) if lines else table
