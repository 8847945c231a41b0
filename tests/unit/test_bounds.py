import math
from types import SimpleNamespace

import pytest

from dist_defend.bounds import at_least_one, not_negative, positive

SECTION = SimpleNamespace(one=1, zero=0, half=0.5, below=-0.5, nan=math.nan, none=None)


@pytest.mark.parametrize(
    ("check", "good", "bad", "told"),
    [
        (at_least_one, ["one", "none"], ["zero", "half", "nan"], "be at least 1"),
        (positive, ["one", "half", "none"], ["zero", "below", "nan"], "be positive"),
        (not_negative, ["one", "zero", "none"], ["below", "nan"], "not be negative"),
    ],
)
def test_bounds(check: object, good: list[str], bad: list[str], told: str) -> None:
    assert callable(check)
    check(SECTION, *good)
    for key in bad:
        with pytest.raises(ValueError) as caught:
            check(SECTION, *good, key)
        assert str(caught.value) == f"key '{key}' is {getattr(SECTION, key)}; it must {told}"
