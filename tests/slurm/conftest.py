"""Clusters for the tests in this folder. They need Slurm's programs and skip without them, except in CI."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the jobs on the nodes import slurm_job by this name too

from slurm_site import Site, need, started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here; nemo_run's own warnings are not ours to judge."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")
            item.add_marker(pytest.mark.filterwarnings("ignore"))


#: Jobs that every cluster runs at once, so that the tests below wait together rather than one after the other.
JOBS: dict[str, dict[str, Any]] = {
    "good": {"steps": 4},
    "bad": {"fail_rank": 1},
    "long": {"steps": 100_000, "step_s": 0.5},
    "flaky": {"fail_rank": 0, "fail_once": True, "settings": {"retries": 1}},
}


@pytest.fixture(scope="session", params=["plain", "accounting"])
def busy_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A cluster with, and one without accounting, with JOBS submitted."""
    accounting = request.param == "accounting"
    need(accounting=accounting)
    with started(tmp_path_factory.mktemp(request.param), accounting=accounting) as site:
        with site.active():
            for name, job in JOBS.items():
                site.submit(name, **job)
        yield site


@pytest.fixture(scope="session")
def own_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A cluster without accounting and without jobs."""
    need()
    with started(tmp_path_factory.mktemp("own"), accounting=False) as site:
        yield site


@pytest.fixture
def site(busy_cluster: Site) -> Iterator[Site]:
    """The cluster with JOBS; several clusters may be running, and this test's shell is on this one's login node."""
    with busy_cluster.active():
        yield busy_cluster


@pytest.fixture
def plain(own_cluster: Site) -> Iterator[Site]:
    """A cluster of its own, for tests that need no accounting."""
    with own_cluster.active():
        yield own_cluster
