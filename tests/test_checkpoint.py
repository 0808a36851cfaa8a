"""What is published is whole, what is damaged is named and passed over, and the writer's layout does not matter."""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import worlds
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dltrain import checkpoint
from dltrain.errors import UserError


def tensors(step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    return {
        "model/w": torch.randn(7, 5, generator=g),
        "model/b": torch.randn(3, generator=g).bfloat16(),
        "optim/w/step": torch.tensor(float(step)),
    }


def save(folder: Path, step: int, keep: int = 9, **more) -> None:
    checkpoint.save(folder, step, tensors(step), {"data": {"position": 10 * step}}, keep=keep, **more)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """The name of the one that is taken, and (name, reason) of those passed over."""
    skipped: list[tuple[str, str]] = []
    found = checkpoint.newest(folder, lambda path, why: skipped.append((path.name, why)))
    return found[0].name if found else "", skipped


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert torch.equal(got[name], want[name]), name


def test_what_was_saved_is_read(tmp_path):
    save(tmp_path, 3)
    path, state = checkpoint.newest(tmp_path, lambda *a: pytest.fail(str(a)))  # type: ignore[misc]
    assert path.name == "step-00000003"
    assert (state["step"], state["data"]) == (3, {"position": 30})
    assert_same(checkpoint.read(path, ""), tensors(3))
    assert sorted(checkpoint.read(path)) == ["b", "w"]
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors(3).items()}
    checkpoint.load(path, into)
    assert_same(into, tensors(3))


def test_no_checkpoint_is_none(tmp_path):
    assert newest(tmp_path / "absent") == ("", [])
    assert newest(tmp_path) == ("", [])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = [
    ("__0_0.distcp", flip, "__0_0.distcp does not have the bytes that were written"),
    ("__0_0.distcp", cut, "__0_0.distcp has "),
    ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
    (".metadata", flip, ".metadata does not have the bytes that were written"),
    (".metadata", Path.unlink, ".metadata is missing"),
    ("state.json", flip, "state.json does not have the bytes that were written"),
    ("state.json", Path.unlink, "state.json is missing"),
    ("manifest.json", cut, "manifest.json or state.json cannot be read"),
    ("manifest.json", Path.unlink, "manifest.json is missing"),
    ("manifest.json", lambda path: path.write_bytes(b""), "manifest.json or state.json cannot be read"),
]


@pytest.mark.parametrize(("name", "harm", "reason"), DAMAGES, ids=[f"{i}-{d[0]}" for i, d in enumerate(DAMAGES)])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, name, harm, reason):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint.damage(tmp_path / "step-00000002") == ""
    harm(tmp_path / "step-00000002" / name)
    taken, skipped = newest(tmp_path)
    assert taken == "step-00000001"
    assert [what for what, _ in skipped] == ["step-00000002"]
    assert reason in skipped[0][1]
    assert "\n" not in skipped[0][1]


def test_all_damaged_is_none_and_each_is_named(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
        flip(tmp_path / f"step-{step:08d}" / "__0_0.distcp")
    taken, skipped = newest(tmp_path)
    assert taken == ""
    assert [what for what, _ in skipped] == ["step-00000002", "step-00000001"]


def test_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000006", "step-00000008"]
    assert newest(tmp_path) == ("step-00000008", [])


def test_a_damaged_later_one_does_not_push_out_the_last_good_one(tmp_path):
    """Resumed from 2 because 9 was damaged; 4 is saved with keep 1: 4 is kept, and it is what the next launch takes."""
    for step in (2, 9):
        save(tmp_path, step)
    (tmp_path / "step-00000009" / "manifest.json").write_text("{}")
    save(tmp_path, 4, keep=1)
    assert newest(tmp_path)[0] == "step-00000004"


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in (2, 4):
        save(tmp_path, step)
    cut(tmp_path / "step-00000004/__0_0.distcp")
    save(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000006"]
    save(tmp_path, 8, keep=2)
    assert names(tmp_path) == ["step-00000006", "step-00000008"]


def restored(folder: Path) -> tuple[int, list[tuple[str, str]], dict[str, Tensor]]:
    """The step that was loaded (0: none), what was passed over and why, and the tensors."""
    told: list[tuple[str, str]] = []
    made = {name: torch.full_like(tensor, -7) for name, tensor in tensors(0).items()}
    found = checkpoint.restore(folder, lambda: made, lambda path, why: told.append((path.name, why)))
    return (found[0]["step"] if found else 0), told, made


def test_damage_is_found_while_loading_and_the_one_before_is_loaded_over_it(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    flip(tmp_path / "step-00000002/__0_0.distcp")
    step, told, made = restored(tmp_path)
    assert step == 1
    assert told == [("step-00000002", "__0_0.distcp does not have the bytes that were written (CRC-32C differs)")]
    assert_same(made, tensors(1))
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001"]
    save(tmp_path, 2)
    assert restored(tmp_path)[:2] == (2, [])


def test_the_only_one_is_checked_before_it_is_loaded(tmp_path):
    save(tmp_path, 1)
    flip(tmp_path / "step-00000001/__0_0.distcp")
    step, told, made = restored(tmp_path)
    assert (step, len(told)) == (0, 1)
    assert all((tensor == -7).all() for tensor in made.values())


def test_where_none_of_several_is_whole_the_run_stops(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
        flip(tmp_path / f"step-{step:08d}/__0_0.distcp")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        restored(tmp_path)


def test_one_that_is_under_another_name_is_seen(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    shutil.rmtree(tmp_path / "step-00000002")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002")
    assert newest(tmp_path) == ("step-00000001", [("step-00000002", "manifest.json is that of step 1")])


def test_a_launch_that_was_superseded_publishes_nothing(tmp_path):
    """What it has half written has a name of its own, and goes with its successor's next save."""
    save(tmp_path, 1)

    def check() -> None:
        raise SystemExit(69)

    with pytest.raises(SystemExit):
        save(tmp_path, 2, check=check, token=4)
    assert names(tmp_path) == [".step-00000002.4.tmp", "step-00000001"]
    save(tmp_path, 2, token=5)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_half_written_folder_is_ignored_and_goes_with_the_next_save(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.tmp")
    (tmp_path / ".step-00000002.tmp/manifest.json").unlink()
    (tmp_path / ".step-00000002.tmp/left-over").write_text("x")
    assert newest(tmp_path) == ("step-00000001", [])
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert not (tmp_path / "step-00000002/left-over").exists()
    assert newest(tmp_path) == ("step-00000002", [])


def test_an_unusable_one_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 1)
    flip(tmp_path / "step-00000001/__0_0.distcp")
    save(tmp_path, 1)
    assert newest(tmp_path) == ("step-00000001", [])


def test_in_the_background(tmp_path):
    """Copied before it returns: later steps do not show."""
    mine = tensors(1)
    thread = checkpoint.save(tmp_path, 1, mine, {}, keep=1, background=True)
    for tensor in mine.values():
        tensor.zero_()
    assert isinstance(thread, threading.Thread)
    thread.join()
    assert newest(tmp_path) == ("step-00000001", [])
    assert_same(checkpoint.read(tmp_path / "step-00000001", ""), tensors(1))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_does_not_take_it(tmp_path, monkeypatch, background, code):
    save(tmp_path, 1, keep=1)

    def full(_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError) as error:  # noqa: PT012
            thread = checkpoint.save(tmp_path, 2, tensors(2), {}, keep=1, background=background)
            if thread is not None:
                thread.join()
    for part in (
        "step 2 could not be saved",
        str(tmp_path),
        os.strerror(code),
        "the newest checkpoint is step-00000001",
    ):
        assert part in str(error.value)
    assert ("free some space" in str(error.value)) == (code == errno.ENOSPC)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step-00000001"]
    assert newest(tmp_path) == ("step-00000001", [])


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ({"model/w": torch.zeros(7, 6)}, r"model/w \(7, 6\) has shape \(7, 5\) in it"),
        ({"model/other": torch.zeros(2)}, r"model/other \(2,\) is not in it"),
    ],
)
def test_another_model_is_refused(tmp_path, into, message):
    save(tmp_path, 1)
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "step-00000001", into)


# --- another number of processes ------------------------------------------------------------------------------------


def write_sharded(folder: Path) -> None:
    """Two processes: rows of `w` over both (4 and 3), the rest whole on each."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mine: dict[str, Tensor] = tensors(5)
    mine["model/w"] = distribute_tensor(mine["model/w"], mesh, [Shard(0)])
    group: Any = dist.new_group(backend="gloo")
    checkpoint.save(folder, 5, mine, {}, keep=1, group=group)
    dist.barrier()
    dist.destroy_process_group()


def read_sharded(folder: Path) -> list[float]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    into: dict[str, Tensor] = {name: torch.zeros_like(tensor) for name, tensor in tensors(5).items()}
    into["model/w"] = distribute_tensor(into["model/w"], mesh, [Shard(0)])
    path, _ = checkpoint.newest(folder, lambda *a: None)  # type: ignore[misc]
    group: Any = dist.new_group(backend="gloo")
    checkpoint.load(path, into, group)
    assert isinstance(into["model/w"], DTensor)
    mine = into["model/w"].to_local().flatten().tolist()
    dist.barrier()
    dist.destroy_process_group()
    return mine


def test_written_by_two_read_by_one_and_by_three(tmp_path):
    worlds.launch(2, write_sharded, tmp_path)
    path = tmp_path / "step-00000005"
    assert (path / "__1_0.distcp").exists()
    assert checkpoint.damage(path) == ""
    assert_same(checkpoint.read(path, ""), tensors(5))
    parts = worlds.launch(3, read_sharded, tmp_path)
    assert [len(part) for part in parts] == [15, 15, 5]
    assert [x for part in parts for x in part] == tensors(5)["model/w"].flatten().tolist()


def test_a_missing_part_of_another_process_is_named(tmp_path):
    worlds.launch(2, write_sharded, tmp_path)
    (tmp_path / "step-00000005/__1_0.distcp").unlink()
    assert newest(tmp_path) == ("", [("step-00000005", "__1_0.distcp is missing")])
