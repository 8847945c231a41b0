"""How many inputs each surface reads."""

import pytest


@pytest.fixture
def count(request: pytest.FixtureRequest) -> int:
    """``pytest tests/fuzz --fuzz 5000`` reads more than the suite does."""
    number: int = request.config.getoption("--fuzz")
    return number
