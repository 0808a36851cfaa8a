"""Twelve hangs, all at once, since they mostly sleep: each named within 15 s, and left. A minute."""

import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import worlds
from faults import FAULTS, train

from dltrain.doctor.doctor import HUNG
from dltrain.rundir import read_rows


def watch(name: str, out: Path) -> dict:
    """Run a world that hangs: when it was named, how its ranks ended, what was printed, what is left."""
    fault = FAULTS[name]
    out.mkdir()
    _, processes = worlds.start(fault.world, train, out, name, ranks=range(fault.started or fault.world))
    until, named = time.time() + 60, 0.0
    while time.time() < until and not named:
        time.sleep(0.1)
        text = (out / "stderr").read_text() if (out / "stderr").exists() else ""
        named = time.time() if re.search(r"dltrain: (rank|the run)", text) else 0.0
    began = min(float(p.read_text()) for p in out.glob("hangs-*"))
    for process in processes:
        process.join(12)
    codes = [p.exitcode for p in processes]
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    verdict = out / "hang/verdict.json"
    return {
        "seconds": named - began,
        "codes": codes,
        "text": (out / "stderr").read_text(),
        "verdict": json.loads(verdict.read_text()) if verdict.exists() else {},
        "events": [event for event in read_rows(out / "events.jsonl") if event["kind"] == "hang"],
        "stacks": sorted(p.name for p in out.glob("hang/*.stack")),
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hangs")
    with ThreadPoolExecutor(len(FAULTS)) as pool:
        found = list(pool.map(lambda name: watch(name, folder / name.replace(" ", "_")), FAULTS))
    return dict(zip(FAULTS, found, strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_the_hang_is_named(name, outcomes):
    fault, found = FAULTS[name], outcomes[name]
    assert 0 < found["seconds"] < 15
    assert fault.words in found["text"]
    for rank in range(fault.world):
        assert f"rank {rank} (" in found["text"]
    if not fault.kind:
        assert set(found["codes"]) == {1}
        return
    assert (tuple(found["verdict"]["ranks"]), found["verdict"]["kind"]) == (fault.ranks, fault.kind)
    cannot = fault.ranks if fault.kind in ("stopped", "gil", "missing") else ()  # leave
    assert found["codes"] == [None if rank in cannot else HUNG for rank in range(fault.started or fault.world)]
    dumps = [f"rank-{rank:05d}.stack" for rank in range(fault.world) if rank not in cannot or fault.kind == "gil"]
    assert found["stacks"] == dumps
    assert [event["why"] for event in found["events"]] == [fault.kind]
