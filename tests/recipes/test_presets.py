"""What every recipe has: the four presets, a claim that says what is compared, and a length that can be read."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from dltrain.config import Settings

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(path.relative_to(RECIPES) for path in RECIPES.glob("**/*.py"))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request) -> Path:
    return request.param


@pytest.fixture
def recipe(file) -> ModuleType:
    return importlib.import_module(".".join(("dltrain", "recipes", *file.with_suffix("").parts)))


def test_the_four_presets(recipe):
    assert {"debug", "claim", "gpu", "paper"} - recipe.PRESETS.keys() == set()
    assert all(isinstance(preset, recipe.Config) and isinstance(preset, Settings) for preset in recipe.PRESETS.values())


def test_a_claim_says_what_is_compared(recipe):
    assert (recipe.claim.__doc__ or "").strip().endswith(".")


def test_the_docstring_names_the_paper_and_what_was_measured(recipe):
    title, *rest = recipe.__doc__.splitlines()
    assert title.endswith(".") and any(f" {year}" in title for year in range(1950, 2050))
    assert "easured" in "\n".join(rest)


def test_it_is_short(file):
    assert len((RECIPES / file).read_text().splitlines()) <= 250
