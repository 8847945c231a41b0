"""Checkpoints of earlier formats, and numbers in a step's state."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_defend.engine.resume import restore
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.files import sha256_file
from tests.unit.test_engine import Numbers, fit, make_step
from tests.unit.test_resume import ADAM, fit_until, newest, rewrite, set_


class Shuffled:
    """A step whose state has a number, as a vaccine's."""

    def state_dict(self) -> dict[str, Any]:
        return {"shuffles": 2}


@pytest.mark.parametrize(
    ("value", "told"), [("four", "holds a str, not a int"), (-4, "is -4; it cannot be negative"), (True, "a bool")]
)
def test_a_number_of_a_steps_state_is_checked(value: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        restore(Shuffled(), {"line": {"shuffles": value}}, "line", tmp_path)  # type: ignore[arg-type]
    assert f"{tmp_path}/state.json" in str(refused.value)
    assert "key 'stages.line.shuffles'" in str(refused.value) and told in str(refused.value)


def test_a_checkpoint_whose_steps_count_goes_on(tmp_path: Path) -> None:
    """Format 2: each step kept how often it was called, beside the trainer's position."""
    for name in ("own", "counting"):
        fit_until(tmp_path / name, 4)
    path = rewrite(newest(tmp_path / "counting"), set_("stages", "line", "step", 4))
    content = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(content | {"format": 2}))
    sums = json.loads((path / "COMPLETE").read_text())
    (path / "COMPLETE").write_text(json.dumps(sums | {"state.json": sha256_file(path / "state.json")}))
    ends = []
    for name in ("own", "counting"):
        step = make_step(ADAM)
        fit(tmp_path / name, Stage("line", Numbers(), step, epochs=2))
        ends.append(step.objective.get_parameter("w").detach().clone())
    assert ends[0].equal(ends[1])
