"""Figures, verdicts, and the command that records them."""

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import commands
import pytest

import dltrain
from dltrain import rundir
from dltrain.claim import Figure, judge, logged
from dltrain.commands import claims
from dltrain.commands.trained import recipe_of
from dltrain.errors import UserError

RECIPE = '''"""A toy claim."""

from dataclasses import dataclass

import dltrain
from dltrain.claim import Figure, judge


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    pass


PRESETS = {"debug": Config(), "claim": Config()}


def main(cfg):
    print("one run")


def claim(cfg):
    judge(cfg, [Figure("height (m)", {cfg.seed: float(cfg.seed), cfg.seed + 1: 12.5}, "more | less", most=MOST)])


if __name__ == "__main__":
    dltrain.cli(main, Config, PRESETS, claim)
'''


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    pass


@pytest.mark.parametrize(
    ("bound", "of", "shown"),
    [
        ({"least": 2.0}, "median", True),
        ({"least": 2.1}, "median", False),
        ({"least": 1.0}, "every seed", True),
        ({"least": 1.1}, "every seed", False),
        ({"most": 4.0}, "every seed", True),
        ({"most": 3.9}, "every seed", False),
        ({"most": 2.0}, "median", True),
    ],
)
def test_a_bound_is_kept_by_every_seed_or_by_the_median(bound, of, shown):
    figure = Figure("x", {0: 4.0, 1: 1.0, 2: 2.0}, "4", **bound, of=of)
    assert figure.shown is shown
    assert figure.measured == "2 (1 to 4)"


@pytest.mark.parametrize("bound", [{"least": 0.0}, {"most": 0.0}])
def test_no_number_shows_nothing(bound):
    assert not Figure("x", {0: math.nan}, "0", **bound).shown
    assert not Figure("x", {0: math.nan, 1: 0.0, 2: 0.0}, "0", **bound).shown
    assert not Figure("x", {1: 0.0, 0: math.nan, 2: 0.0}, "0", **bound, of="median").shown


def test_a_figure_without_a_seed_or_with_two_bounds_is_refused():
    with pytest.raises(UserError, match="x: no seed was run"):
        Figure("x", {}, "", least=0.0)
    with pytest.raises(AssertionError):
        Figure("x", {0: 1.0}, "", least=0.0, most=1.0)


def test_judge_writes_what_was_measured_and_leaves_with_1_where_it_is_not_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rundir, "environment", lambda: ({"threads": 1}, b""))
    cfg = Config(out=str(tmp_path / "new" / "out"))
    good = Figure("gap (nats)", {5: 0.25}, "positive", least=0.1)
    judge(cfg, [good], tuned_on=(0, 1), notes=["a note"], pictures=[tmp_path / "new" / "out" / "a" / "plot.png"])
    said = capsys.readouterr().out
    assert "shown      gap (nats): 0.25   must be >= 0.1   paper positive" in said
    assert "seeds 5; tuned on 0, 1" in said and "a note" in said
    written = json.loads((tmp_path / "new" / "out" / "claim.json").read_text())
    assert written["shown"] is True and written["recipe"] == "test_claim" and written["pictures"] == ["a/plot.png"]
    assert written["figures"][0]["values"] == {"5": 0.25} and written["environment"] == {"threads": 1}
    with pytest.raises(SystemExit) as left:
        judge(cfg, [good, Figure("other", {5: 1.0}, "", most=0.5)])
    assert left.value.code == 1
    assert json.loads((tmp_path / "new" / "out" / "claim.json").read_text())["shown"] is False
    assert "The claim is NOT shown" in capsys.readouterr().out


def test_logged_values_come_in_order_and_their_absence_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": "NaN", "eval/loss": 1.0}\n')
    assert logged(tmp_path, "eval/loss") == [1.0]
    assert logged(tmp_path, "loss")[0] == 2.5 and math.isnan(logged(tmp_path, "loss")[1])
    with pytest.raises(UserError, match="has no 'accuracy'"):
        logged(tmp_path, "accuracy")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Recipes of our own, with a README as the real one has it."""
    made = tmp_path / "recipes"
    made.mkdir()
    (made / "toy_train.py").write_text(RECIPE.replace("MOST", "13.0"))
    (made / "plain_train.py").write_text('PRESETS = {"debug": None}\n')
    (made / "README.md").write_text(f"before\n{claims.BEGIN}\nold\n{claims.END}\nafter\n")
    monkeypatch.setattr(claims, "recipes", lambda: made)
    monkeypatch.setenv("PYTHONPATH", str(commands.ROOT))
    monkeypatch.chdir(tmp_path)
    return made


def test_the_command_records_figures_and_rewrites_the_table_alone(folder, capfd):
    claims.main(["--seed", "12"])
    (name,) = [path.name for path in (folder / "results").iterdir()]
    record = rundir.read_json(folder / "results" / name)
    assert name == "toy_train.json"
    assert record["command"] == "dltrain claims toy_train --seed 12" and record["shown"] is True
    assert record["figures"][0]["values"] == {"12": 12.0, "13": 12.5} and record["seconds"] > 0
    text = (folder / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| toy_train | height (m) | more \\| less | 12.25 (12 to 12.5) | <= 13 | yes | 12, 13 (none) |" in text
    with pytest.raises(SystemExit) as left:
        claims.main(["toy_train", "--seed", "14"])
    assert left.value.code == 1
    assert rundir.read_json(folder / "results" / name)["shown"] is False
    text = (folder / "README.md").read_text()
    assert "**no**" in text and text.count("toy_train") == 1
    assert "not shown: toy_train" in capfd.readouterr().err


def test_a_recipe_that_fails_leaves_the_last_record(folder, capfd):
    (folder / "results").mkdir()
    (folder / "toy_train.py").write_text(RECIPE.replace("judge(cfg, ", "missing("))
    with pytest.raises(SystemExit):
        claims.main([])
    assert "toy_train: exit code 1 and no figures" in capfd.readouterr().err
    assert list((folder / "results").iterdir()) == []


def test_mistakes_of_the_command(folder):
    with pytest.raises(UserError, match=r"no claim of plain_train: there are toy_train"):
        claims.main(["plain_train"])
    (folder / "README.md").write_text("no markers\n")
    with pytest.raises(UserError, match="lacks the line"):
        claims.main([])


def test_other_presets_are_one_run(folder):
    command = [sys.executable, str(folder / "toy_train.py"), "debug"]
    done = subprocess.run(command, env=commands.environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "one run\n"


@pytest.mark.parametrize("recipe", sorted(claims.with_claims(commands.ROOT / "recipes").values()), ids=lambda p: p.stem)
def test_claims_start_at_a_seed_that_nothing_was_tuned_on(recipe):
    tuned = re.findall(r"(?:tuned_on|TUNED_ON)\s*=\s*\(([\d, ]+)\)", recipe.read_text())
    seeds = {int(n) for group in tuned for n in group.split(",") if n.strip()}
    assert recipe_of(str(recipe)).PRESETS["claim"].seed not in seeds
