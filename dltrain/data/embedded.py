"""A corpus that is wherever the project is: the documentation of Python and torch, as webdataset shards."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dltrain.data.cache import built
from dltrain.data.shards import write_shards
from dltrain.errors import UserError
from dltrain.progress import track

VERSION = 1
# Folders of code about code, and of others' code.
SKIPPED = {"test", "tests", "_internal", "site-packages", "dist-packages", "__pycache__"}
SHORTEST, LONG = 200, 2000  # characters of a document: none is shorter, none grows beyond this by another docstring
PER_SHARD = 1000  # documents


def embedded(name: str, cache: Path) -> str:
    """Pattern of shards with documentation that is on this machine, made on first use in `cache`.

    "docs": docstrings of Python's library and of torch, and Python's help topics, about 7 MB of English; "topics": the
    help topics alone, 0.4 MB. A sample is a run of docstrings of one module, or one topic: .txt, one paragraph a line,
    and .json, {"module"}. Safe when many processes ask at once. UserError for another name, or if the disk is full.
    """
    torch_version = importlib.metadata.version("torch")
    roots = {}
    if name == "docs":
        spec = importlib.util.find_spec("torch")
        assert spec and spec.origin
        roots = {"": Path(sysconfig.get_path("stdlib")), "torch.": Path(spec.origin).parent}
    elif name != "topics":
        raise UserError(f"no embedded corpus {name!r}: there are embedded:docs and embedded:topics")
    stamp = f"{name}-{VERSION}-python{platform.python_version()}-torch{torch_version}"
    return str(built(cache / stamp, lambda folder: write_docs(folder, roots)))


def write_docs(folder: Path, roots: dict[str, Path]) -> None:
    """Write the shards for the modules under `roots`, {prefix of module names: folder}, and Python's help topics."""
    write_shards(_samples(roots), folder, "docs", PER_SHARD)


def _samples(roots: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Documents in a fixed order, no docstring twice."""
    import pydoc_data.topics

    seen: set[bytes] = set()
    paths = [(prefix, root, path) for prefix, root in sorted(roots.items()) for path in _sources(root)]
    for prefix, root, path in track(paths, "collecting documentation"):
        module = prefix + ".".join(path.relative_to(root).with_suffix("").parts)
        for i, text in enumerate(_documents(_docstrings(path), seen)):
            yield {"__key__": f"{module.replace('.', '/')}/{i:03d}", "txt": text, "json": {"module": module}}
    for i, (topic, text) in enumerate(sorted(pydoc_data.topics.topics.items())):
        for part in _documents(iter([text]), seen):
            yield {
                "__key__": f"pydoc_data/topics/{i:03d}",
                "txt": part,
                "json": {"module": f"pydoc_data.topics {topic}"},
            }


def _sources(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if SKIPPED.isdisjoint(path.relative_to(root).parts))


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and functions (not of those inside functions), in the order of the source."""
    try:
        stack: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (SyntaxError, ValueError, OSError):  # samples of bad code, broken links
        return
    while stack:
        node = stack.pop()
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (text := ast.get_docstring(node, clean=False)):
            yield text
        if isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try):
            stack += reversed(node.body)


def _documents(docstrings: Iterator[str], seen: set[bytes]) -> Iterator[str]:
    """Join neighbouring docstrings into documents; drop those that occurred before."""
    document = ""
    for docstring in docstrings:
        text = clean(docstring)
        digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if len(text) < 20 or digest in seen:
            continue
        seen.add(digest)
        if len(document) >= SHORTEST and len(document) + len(text) > LONG:
            yield document
            document = ""
        document += text + "\n"
    if len(document) >= SHORTEST:
        yield document


# What begins a new line: a list item, or a field (":param x:", "input (Tensor, optional): ...").
ITEM = re.compile(r"([-*+•]|\d+[.)]|:\w[^`]*:|@\w|\.\.)\s|[*\w.`]+( \([^)]*\))?\s*:\s|[*\w.`]+( \([^)]*\))?\s*:$")
RULE = re.compile(r"\W{3,}$|\|.*\|$")  # underlined headings, rows of tables


def clean(docstring: str) -> str:
    """One paragraph or list item a line; without examples of code (">>>" up to a blank line), rules and tables."""
    lines: list[str] = []
    paragraph = example = False  # whether the last line can go on; whether in an example
    for line in inspect.cleandoc(docstring).encode("utf-8", "ignore").decode().splitlines():
        text = line.strip()
        if not text or RULE.match(text):
            paragraph = example = False
        elif example or text.startswith((">>>", "$ ")):
            example, paragraph = True, False
        elif paragraph and not ITEM.match(text):
            lines[-1] += " " + text
        else:
            lines.append(text)
            paragraph = True
    return "\n".join(lines)
