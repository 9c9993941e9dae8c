"""The virtual cluster of these tests, and what happens on a machine that cannot have one.

The tests are skipped, and said to be, where SLURM is not installed.  With COMA_REQUIRE_CLUSTER=1 it
is, and a test that is skipped has failed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.jobs import Jobs
from tests.cluster.virtual import (
    PACKAGES,
    VirtualCluster,
    install,
    missing_programs,
    missing_rights,
)

REQUIRED = os.environ.get("COMA_REQUIRE_CLUSTER") == "1"


skipped: list[str] = []  # why, for the end of the report


def unavailable() -> str:
    """Why there can be no cluster here; empty when there can."""
    if missing := missing_programs():
        if not REQUIRED:
            return (
                f"there is no {missing[0]} here; COMA_REQUIRE_CLUSTER=1 (make test-cluster) "
                f"installs SLURM ({' '.join(PACKAGES)})"
            )
        install()
    return missing_rights()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if skipped:
        terminalreporter.write_line(f"tests/cluster: {skipped[0]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if REQUIRED and report.skipped and Path(__file__).parent in item.path.parents:
        report.outcome = "failed"
        report.longrepr = f"skipped, but COMA_REQUIRE_CLUSTER is 1: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def cluster() -> Iterator[VirtualCluster]:
    """Two nodes, for all tests."""
    if reason := unavailable():
        skipped.append(reason)
        pytest.skip(reason)
    with VirtualCluster(2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def jobs(cluster: VirtualCluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The user at the login node, with a shared folder."""
    return Jobs(cluster, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def calm(cluster: VirtualCluster) -> Iterator[None]:
    """Afterwards whatever the test leaves running is ended, and every node is up."""
    yield
    cluster.clear()
