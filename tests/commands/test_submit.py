"""What cannot run is refused before it is queued, with every reason; SLURM's own word is in tests/slurm."""

import os
import subprocess
from pathlib import Path

import pytest

from dltrain.commands import submit
from dltrain.errors import UserError

RECIPE = str(Path(__file__).parents[2] / "recipes/bert_pretrain.py")
SINFO = "cpu*|4|64|(null)|infinite|up\ngpu|2|96|gpu:h100:8(S:0-1)|1-00:00:00|up\nold|1|8|gpu:2|infinite|drain\n"


@pytest.fixture
def shims(tmp_path, monkeypatch):
    """sinfo and sbatch of a cluster on paper; returns the folder where sbatch keeps what it was given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "sinfo": f"cat <<'E'\n{SINFO.replace('*', '')}E",
        "sbatch": f'[ "$1" = --test-only ] && {{ cat >{folder}/tested; exit 0; }}; cp "$2" {folder}/sent; echo 17',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        submit.main(list(argv))
    return str(error.value)


def test_a_job_is_checked_kept_and_sent(shims, tmp_path, capsys):
    submit.main(["--nodes", "2", "--gpus", "8", "--partition", "gpu", RECIPE, "debug", "--batch", "32", "--lanes", "16",
                 "--out", str(tmp_path / "my run"), "--time", "60"])  # fmt: skip
    assert f"job 17: 2 x 8 processes; tail -F {tmp_path}/my run/slurm-17.out" in capsys.readouterr().out
    sent = (shims / "sent").read_text()
    assert sent == (shims / "tested").read_text() == (tmp_path / "my run/job.sbatch").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu", "--time=60", "--requeue"):
        assert f"#SBATCH {line}\n" in sent
    assert f"set -- {RECIPE} debug --batch 32 --lanes 16 --out '{tmp_path}/my run' \n".replace(" \n", "\n") in sent
    subprocess.run(["bash", "-n", shims / "sent"], check=True)


def test_a_dry_run_prints_and_leaves_nothing(shims, tmp_path, capsys):
    submit.main(["--dry-run", RECIPE, "debug", "--out", str(tmp_path / "run")])
    assert '. "$DLTRAIN_SLURM/train.sbatch"' in capsys.readouterr().out
    assert not (tmp_path / "run").exists() and not (shims / "sent").exists()


def test_every_reason_is_given_at_once(shims, tmp_path):
    (tmp_path / "file").write_text("")
    said = refused("--nodes", "9", "--gpus", "16", RECIPE, "debug", "--batch", "7", "--shards", "/nope/{000..003}.tar",
                   "--out", str(tmp_path / "file/run"))  # fmt: skip
    for part in (
        "batch (7 rows) must be a multiple of lanes (144)",
        "/nope/000.tar does not exist",
        "--nodes 9: any partition has 4 at most",
        "--gpus 16: a node of any partition has 8 at most",
        "cannot be written",
    ):
        assert part in said
    assert not (shims / "sent").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "which recipe"),
        (("nothing.py",), "nothing.py: no such recipe"),
        ((__file__,), "is no recipe"),
        (("--partition", "fast", RECIPE, "debug"), "no partition fast: there are cpu, gpu, old"),
        (("--partition", "old", RECIPE, "debug"), "partition old takes no jobs (drain)"),
        (("--partition", "cpu", "--gpus", "1", RECIPE, "debug"), "a node of partition cpu has 0 at most"),
        (("--tasks", "4", "--cpus", "40", RECIPE, "debug"), "a node of any partition has 96 CPUs at most"),
        (("--nodes", "0", RECIPE, "debug"), "--nodes 0 must be at least 1"),
        ((RECIPE, "enormous"), "no preset 'enormous'"),
    ],
)
def test_what_cannot_run_is_refused(shims, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*argv)


def test_what_does_not_fit_is_refused(shims, tmp_path):
    gpt, out = str(Path(RECIPE).with_name("gpt_pretrain.py")), str(tmp_path / "run")
    asked = ("--gpu", "h100", "--tasks", "8", "--partition", "cpu", gpt, "gpt3-13b", "--out", out)
    assert "of a h100's 80.0GB" in refused(*asked, "--strategy", "ddp")
    assert "no machine 'h1000'" in refused("--gpu", "h1000", *asked[2:])


def test_slurms_own_refusal_is_told(shims, tmp_path):
    (shims / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    assert "SLURM refuses it: Invalid account" in refused(RECIPE, "debug", "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_another_configurations_run_directory_is_refused(shims, tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"lanes": 4, "batch": 12, "threads": 1}}')
    assert "run of another configuration (batch is 12 there" in refused(RECIPE, "debug", "--out", str(tmp_path))


@pytest.mark.parametrize(
    ("gres", "count"),
    [("(null)", 0), ("gpu:4", 4), ("gpu:h100:8(S:0-1),nvme:1", 8), ("gpu:a:2,gpu:b:2", 4), ("nvgpu:3", 0)],
)
def test_gpus_of_a_node(gres, count):
    assert submit._gpus(gres) == count
