"""Every test here needs a SLURM of its own: skipped by name where there is none."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clusters import MISSING, Cluster, up
from stories import STORIES

SURVIVAL = "test_slurm_survival"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = f"no {', '.join(MISSING)} here: tests/slurm/local_slurm.sh install"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=reason))
    # What the stories tell is asked for behind the other tests here, beside which they go on.
    here = [i for i, item in enumerate(items) if "slurm" in item.keywords]
    ordered = sorted((items[i] for i in here), key=lambda item: SURVIVAL in item.nodeid)
    for i, item in zip(here, ordered, strict=True):
        items[i] = item


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with up(2, gpus="2") as cluster:
        yield cluster


@pytest.fixture(scope="session", autouse=True)
def stories(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Any]]]:
    """What will be found of each, if a test asks for it."""
    asked = not MISSING and any(SURVIVAL in item.nodeid for item in request.session.items)
    with ThreadPoolExecutor(len(STORIES)) as pool:
        yield {name: pool.submit(go, tmp_path_factory.mktemp(name)) for name, go in STORIES.items() if asked}
