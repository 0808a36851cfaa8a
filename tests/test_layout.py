"""The shape of the checkout: links, names, sizes; and the ways in which Python may be started in it."""

import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("kernels", "tokenizers", "recipes")
SOURCES = sorted({p.resolve() for top in ("dltrain", *LINKS) for p in (ROOT / top).glob("**/*.py")})
VERBS = {"pretrain", "train", "finetune", "distill", "align", "play", "search", "sample", "evaluate", "study"}


@functools.cache
def installed() -> frozenset[str]:
    """Top-level import names of the standard library and of everything installed, dltrain aside."""
    return frozenset(sys.stdlib_module_names) | frozenset(importlib.metadata.packages_distributions()) - {"dltrain"}


@pytest.mark.parametrize("name", LINKS)
def test_links(name):
    link = ROOT / "dltrain" / name
    assert link.is_symlink(), f"dltrain/{name} is no link: check out with core.symlinks=true"
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", [*LINKS, "tests"])
def test_no_init(name):
    """With one, the folder would hide the installed packages kernels and tokenizers from whoever starts in the root."""
    assert list((ROOT / name).glob("**/__init__.py")) == []


@pytest.mark.parametrize("name", LINKS)
def test_no_file_shadows_an_installed_package(name):
    """A script's own folder comes first on sys.path, so tokenizers/sentencepiece.py would hide the library."""
    assert {p.stem for p in (ROOT / name).iterdir()} & installed() == set()


def test_test_files_have_unique_names():
    names = [p.name for p in (ROOT / "tests").glob("**/*.py") if p.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_recipes_end_in_a_verb():
    stems = [p.stem for p in (ROOT / "recipes").glob("**/*.py")]
    assert [s for s in stems if s.split("_")[-1] not in VERBS] == []


def test_modules_are_short():
    assert {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 600} == {}


def test_no_utils():
    assert [p for p in SOURCES if p.stem in {"utils", "util", "helpers", "common", "misc"}] == []


def launch(*args: str, cwd: Path, path: str = "") -> str:
    """Run Python in `cwd` with `path` as PYTHONPATH; return what it printed."""
    env = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def is_installed() -> bool:
    return bool(list(importlib.metadata.distributions(name="dltrain")))


IMPORT = "import dltrain.tokenizers, dltrain.kernels, dltrain.recipes; print(dltrain.__version__)"


def test_import_loads_nothing_heavy():
    """`--help` in under two seconds begins here."""
    loaded = launch("-c", "import sys, dltrain; print(*sys.modules)", cwd=ROOT).split()
    assert {"torch", "numpy", "tyro", "rich"} & set(loaded) == set()


def test_imports_from_the_checkout(tmp_path):
    """Uninstalled: in the root, or with the root on PYTHONPATH."""
    assert launch("-c", IMPORT, cwd=ROOT) == launch("-c", IMPORT, cwd=tmp_path, path=str(ROOT))


@pytest.mark.skipif(not is_installed(), reason="dltrain is not installed: pip install -e .")
def test_imports_installed(tmp_path):
    """From another folder, and of the version that the metadata names."""
    assert launch("-c", IMPORT, cwd=tmp_path).strip() == importlib.metadata.version("dltrain")


@pytest.mark.parametrize("name", ["kernels", "tokenizers"])
def test_root_on_the_path_hides_no_package(name, tmp_path):
    """Both are Hugging Face packages that transformers imports, and accelerate's launcher puts the root on the path."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    command = f"import {name}, dltrain.{name}; print({name}.__file__, *dltrain.{name}.__path__)"
    theirs, ours = launch("-c", command, cwd=ROOT, path=f"{ROOT}{os.pathsep}{tmp_path}").split()
    assert Path(theirs) == tmp_path / name / "__init__.py"
    assert Path(ours) == ROOT / "dltrain" / name


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("**/*.py")), ids=lambda recipe: recipe.stem)
def test_recipes_start_from_anywhere(recipe, tmp_path):
    """As a file and as a module, from another folder."""
    path = "" if is_installed() else str(ROOT)
    module = ".".join(["dltrain", *recipe.relative_to(ROOT).with_suffix("").parts])
    as_file = launch(str(recipe), "--help", cwd=tmp_path, path=path)
    as_module = launch("-m", module, "--help", cwd=tmp_path, path=path)
    assert as_file == as_module != ""
