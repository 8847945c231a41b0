"""How many inputs each surface reads."""

import pytest

_PER_INPUT = 20  # seconds for one input of every surface of a file, many times what it takes


@pytest.fixture
def count(request: pytest.FixtureRequest) -> int:
    """``pytest tests/fuzz --fuzz 5000`` reads more than the suite does."""
    number: int = request.config.getoption("--fuzz")
    return number


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Time for more."""
    for item in items:
        if "count" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(max(600, _PER_INPUT * config.getoption("--fuzz"))))
