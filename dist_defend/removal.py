"""How soon a defence had removed a backdoor, as its run measured it on test data, which no defender has."""

from pathlib import Path
from typing import Any

from dist_defend.bounds import REMOVED_ASR
from dist_defend.counts import Count
from dist_defend.results import read_inside, read_metrics

MOST_LOSS = 5.0  # points of ACC that the removal may cost
_MOST_BYTES = 64 << 20  # of a metrics.jsonl


def removal_seconds(folder: Path, result: dict[str, Any]) -> float | None:
    """Seconds of work until the first measurement with ASR below REMOVED_ASR at less than MOST_LOSS points of ACC.

    Work: see WorkClock. result: of results.read_result. A run that measures at its end alone has its whole work to
    tell. None: it was not reached, or the run does not say. UserError for a metrics.jsonl that is none.
    """
    before = result["metrics"].get("acc_before")
    if before is None:
        return None
    path = folder / "metrics.jsonl"
    content = read_inside(path, _MOST_BYTES)
    lines = [] if content is None else read_metrics(content, str(path), "delete it and collect again")[0]
    names = ("work_seconds", "acc", "asr")
    told = [tuple(line[name] for name in names) for line in lines if line.keys() >= set(names)]
    if result["rows"] and result.get("work_seconds") is not None:
        acc, asr = (Count(**result["rows"][0][name]).percent for name in ("acc", "asr"))
        told.append((result["work_seconds"], acc, asr))
    return next((seconds for seconds, acc, asr in told if asr < REMOVED_ASR and before - acc < MOST_LOSS), None)
