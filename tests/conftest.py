"""Fixtures for every test."""

from collections.abc import Iterator

import pytest

from tests.ranks import Pool


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a worker of pytest-xdist takes as a whole: the tests of Slurm, those that start ranks, or else a file."""
    for item in items:
        folder = item.path.parent.name
        group = item.path.name
        if folder == "slurm":
            group = folder
        elif folder == "distributed" or "two_ranks" in getattr(item, "fixturenames", ()):
            group = "ranks"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Pool]:
    """Two gloo ranks; started by the first test that uses them."""
    pool = Pool(2)
    yield pool
    pool.close()
