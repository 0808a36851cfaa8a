"""Every test here needs a SLURM of its own: skipped by name where there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import MISSING, Cluster, up


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = f"no {', '.join(MISSING)} here: tests/slurm/local_slurm.sh install"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with up(2, gpus="2") as cluster:
        yield cluster
