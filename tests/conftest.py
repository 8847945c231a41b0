"""Fixtures for every test."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ranks import Pool


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """--fuzz: inputs that tests/fuzz reads of each kind."""
    parser.addoption("--fuzz", type=int, default=50, help="inputs per surface in tests/fuzz (default 50)")
    if not pluginmanager.hasplugin("timeout"):  # --strict-config wants it known on a machine without the plug-in too
        parser.addini("timeout", "seconds; nothing stops a test where pytest-timeout is missing")


def pytest_configure() -> None:
    """Processes that tests start heed Ctrl-C and a hangup, also where a shell or nohup made the tests ignore these."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slurm's tests, which wait much and stay with one worker of pytest-xdist, come first."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/slurm/"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What a worker of pytest-xdist takes as a whole: the tests of Slurm, those that start ranks, or else a file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByPlace(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = file.rpartition("/")[0]
            return folder if folder in ("tests/slurm", "tests/distributed") else file

    return ByPlace(config, log)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Pool]:
    """Two gloo ranks; started by the first test that uses them."""
    pool = Pool(2)
    yield pool
    pool.close()
