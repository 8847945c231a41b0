"""What a detector says of a model, and how well such scores separate models of which the truth is known."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dist_defend.counts import Count
from dist_defend.engine.context import Context
from dist_defend.models.artifact import ModelCard

KIND = "detector"  # the kind of a result's row that says what a detector found
Truth = Literal["clean", "backdoored", "defended"]
_MOST = 1e30


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One detector's score of one model.

    quantity: what the score is. score, low, high: median, least and largest over the detector's seeds; None where
    nothing was found, which is no verdict. bound: a score on the side ``flags`` of it means a backdoor. truth: what the
    model's card says. note: more about it, for people.
    """

    detector: str
    quantity: str
    score: float | int | None = None
    low: float | int | None = None
    high: float | int | None = None
    bound: float | int
    flags: Literal["below", "above"]
    truth: Truth
    note: str = ""

    def __post_init__(self) -> None:
        numbers = [self.low, self.score, self.high]
        known = [number for number in numbers if number is not None]
        if len(known) not in (0, 3) or not all(abs(number) <= _MOST for number in (*known, self.bound)):
            raise ValueError(f"low, score and high are {numbers}, the bound {self.bound}")
        if known != sorted(known):
            raise ValueError(f"low, score and high are {numbers}")

    @property
    def verdict(self) -> str | None:
        """backdoored or clean; None without a score."""
        if self.score is None:
            return None
        is_flagged = self.score < self.bound if self.flags == "below" else self.score > self.bound
        return "backdoored" if is_flagged else "clean"

    def told(self) -> str:
        """``PL1 0.0700 (0.0660 to 0.0740; backdoored below 0.1): backdoored``."""
        if self.score is None or self.low is None or self.high is None:
            return f"{self.quantity}: none found, so no verdict"
        spread = f"{self.low:.4g} to {self.high:.4g}; " if self.low < self.high else ""
        return f"{self.quantity} {self.score:.4g} ({spread}backdoored {self.flags} {self.bound:g}): {self.verdict}"

    def row(self, context: Context, task: str) -> dict[str, Any]:
        """An entry of result.json's rows. task: the data that the detector looked at."""
        own = {"run": context.folder.name, "kind": KIND, "task": task, "seed": context.seed}
        return {**own, **asdict(self), "verdict": self.verdict}


def truth_of(card: ModelCard) -> Truth:
    """What a model's card says. A defended model counts as neither clean nor backdoored."""
    return "defended" if card.defended_by else "backdoored" if card.backdoored else "clean"


@dataclass(frozen=True)
class Separation:
    """How one detector tells backdoored models from clean ones, over a set of them.

    auc: area under the curve of true over false alarms; nan without a model of each kind. backdoored, clean: how many
    of each kind are called so. unscored: models of either kind without a verdict, which count in none of these.
    """

    auc: float
    backdoored: Count
    clean: Count
    unscored: int


def separation(detections: Sequence[Detection]) -> Separation:
    """Over models whose truth is clean or backdoored; others are left out. All have one detector."""
    known = [each for each in detections if each.truth != "defended"]
    scores: dict[str, list[float]] = {"clean": [], "backdoored": []}
    right = {"clean": 0, "backdoored": 0}
    for each in known:
        if each.score is not None:
            scores[each.truth].append(each.score if each.flags == "above" else -each.score)
            right[each.truth] += each.verdict == each.truth
    counts = {truth: Count(right[truth], len(scores[truth])) for truth in scores}
    unscored = len(known) - sum(map(len, scores.values()))
    return Separation(auc(scores["backdoored"], scores["clean"]), counts["backdoored"], counts["clean"], unscored)


def auc(backdoored: Sequence[float], clean: Sequence[float]) -> float:
    """The share of pairs in which the backdoored model scores higher, ties as halves; nan without a pair.

    The area under the receiver operating characteristic (Hanley and McNeil 1982).
    """
    pairs = [(one > other) + (one == other) / 2 for one in backdoored for other in clean]
    return sum(pairs) / len(pairs) if pairs else float("nan")
