"""Fixtures for every test."""

from collections.abc import Iterator

import pytest

from tests.ranks import Pool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Pool]:
    """Two gloo ranks; started by the first test that uses them."""
    pool = Pool(2)
    yield pool
    pool.close()
