"""One cluster for all tests of Slurm. Where Slurm is missing they fail; `make test` says so and leaves them out."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    missing = missing_programs()
    assert not missing, f"{', '.join(missing)} missing: apt-get install slurmctld slurmd slurm-client munge iproute2"
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, in whose environment the test's own process is; its queue is empty again afterwards."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
        monkeypatch.delenv(name)
    for name, value in shared_cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield shared_cluster
    shared_cluster.clear()
