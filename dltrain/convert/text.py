"""Text as people have it, as sources of shards: files, lines or paragraphs of .txt, lines of JSON, columns of Parquet.

Shapes: L lines of a block of bytes, N entries of a source.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dltrain.convert.archive import Bad, Files, Span, contents, is_archive, plain
from dltrain.convert.engine import Entry, Source, keys
from dltrain.data.compressed import codec_named
from dltrain.data.tokens import stamp
from dltrain.errors import UserError
from dltrain.progress import track
from dltrain.tokenizers.spm import Tokenizer, load

BLOCK = 1 << 24  # bytes that are searched for lines at a time

Unit = Literal["file", "line", "paragraph"]


def text(source: Path, found: Files, work: Path, *, unit: Unit = "file", tokenizer: str = "") -> Source:
    """.txt files (compressed or not) of a folder or archive, or one file of any name: a .txt member per document.

    `unit`: what a document is. Paragraphs are parted by blank lines. Blank documents are left out; all must be UTF-8.
    `tokenizer`: a sentencepiece model; then there are tokens instead of the text, as `tokens.py` has them.
    """
    files, ignored = _files(source, (".txt",), found, work)
    if unit == "file":
        entries = [
            Entry(key, name, span)
            for (name, span), key in zip(files.items(), keys(map(_plain_name, files)))
            if span.size
        ]
        return _tokenised(Source("text", entries, _text, ignored=ignored), tokenizer)
    lines = _Lines(files, unit == "paragraph")
    return _tokenised(Source("text", lines, _text, ignored=ignored, size_N=lines.size_N), tokenizer)


def jsonl(source: Path, found: Files, work: Path, *, field: str = "text", key: str = "", tokenizer: str = "") -> Source:
    """.jsonl files (compressed or not) of a folder or archive, or one file: a document per line.

    `field` has its text, `key` what becomes the sample's key (empty: file and line number). `tokenizer` as in `text`.
    """
    files, ignored = _files(source, (".jsonl", ".ndjson", ".json"), found, work)
    lines = _Lines(files, False)
    made = Source("text", lines, partial(_json_line, field=field, key=key), ignored=ignored, size_N=lines.size_N)
    return _tokenised(made, tokenizer)


def _tokenised(source: Source, model: str) -> Source:
    if not model:
        return source
    tokenizer = _tokenizer(model)
    mark = {stamp(tokenizer): {"sha256": tokenizer.digest, "vocab_size": tokenizer.vocab_size}}
    return replace(source, make=partial(_tokens, make=source.make, model=model), first=mark)


@lru_cache(maxsize=1)
def _tokenizer(model: str) -> Tokenizer:
    return load(Path(model))


def _tokens(entry: Entry, make: Callable[[Entry], dict[str, Any]], model: str) -> dict[str, Any]:
    sample, tokenizer = make(entry), _tokenizer(model)
    (tokens,) = tokenizer.encode([sample.pop("txt").decode()])
    return sample | {"npy": np.array(tokens, "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")}


def _files(source: Path, suffixes: Sequence[str], found: Files, work: Path) -> tuple[Files, list[str]]:
    """The files of these kinds, uncompressed, and the names of the others."""
    listed = contents(source, found, work)
    if source.is_file() and not is_archive(source.name):
        wanted = listed  # the one file that was named
    else:
        wanted = {name: span for name, span in listed.items() if Path(_plain_name(name)).suffix.lower() in suffixes}
    return {name: plain(name, span, work) for name, span in wanted.items()}, [n for n in listed if n not in wanted]


def _plain_name(name: str) -> str:
    """Without .gz and the like."""
    return name.rpartition(".")[0] if codec_named(name) else name


class _Lines(Sequence[Entry]):
    """Lines, or paragraphs, of some files that are not blank: 20 bytes of memory for each."""

    def __init__(self, files: Files, paragraphs: bool):
        self._spans, self._names = list(files.values()), list(files)
        self._keys = list(keys(map(_plain_name, files)))
        parts = [_search(span, paragraphs) for span in track(self._spans, "looking for lines, by file")]
        start, size, number = zip(*parts) if parts else ((), (), ())
        self._file_N = np.repeat(np.arange(len(parts), dtype=np.int32), [len(each) for each in start])
        empty = np.empty(0, np.int64)
        self._start_N, self.size_N, self._number_N = (np.concatenate([empty, *each]) for each in (start, size, number))

    def __len__(self) -> int:
        return len(self.size_N)

    def __getitem__(self, i: Any) -> Entry:
        file, number = int(self._file_N[i]), int(self._number_N[i])
        span = Span(self._spans[file].path, int(self._start_N[i]), int(self.size_N[i]))
        return Entry(f"{self._keys[file]}/{number:08d}", f"{self._names[file]}, line {number}", span)


def _search(span: Span, paragraphs: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first byte, bytes without the last newline, number of the first line from 1) of lines or paragraphs."""
    blocks = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))]
    blocks += _line_blocks(span)
    start_L, end_L, ink_L = map(np.concatenate, zip(*blocks))
    first_L = last_L = np.flatnonzero(ink_L)
    if paragraphs and len(first_L):
        apart = np.diff(first_L) > 1
        first_L, last_L = first_L[np.append(True, apart)], last_L[np.append(apart, True)]
    return start_L[first_L], end_L[last_L] - start_L[first_L], first_L + 1


def _line_blocks(span: Span) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(start, end without the newline, whether there is more than white space) of all lines, some at a time."""
    at, stop, carry = span.start, span.start + span.size, b""
    try:
        with open(span.path, "rb") as file:
            file.seek(at)
            while block := file.read(min(BLOCK, stop - at - len(carry))):
                data = carry + block
                cut = len(data) if at + len(data) == stop else data.rfind(b"\n") + 1
                if cut:
                    byte = np.frombuffer(data, np.uint8, cut)
                    end_L = np.flatnonzero(byte == ord("\n"))
                    if byte[-1] != ord("\n"):
                        end_L = np.append(end_L, cut)
                    start_L = np.append(0, end_L[:-1] + 1)
                    yield at + start_L, at + end_L, np.logical_or.reduceat(byte > ord(" "), start_L)
                at, carry = at + cut, data[cut:]
    except OSError as error:
        raise UserError(f"cannot read {span.path}: {error.strerror}; restore it") from error


def _text(entry: Entry) -> dict[str, Any]:
    data = entry.span.read()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise Bad(f"{entry.name}: it is not UTF-8 at byte {error.start}") from error
    return {"txt": data.removesuffix(b"\r")}


def _json_line(entry: Entry, field: str, key: str) -> dict[str, Any]:
    try:
        row = json.loads(entry.span.read())
    except ValueError as error:  # no JSON, or no UTF-8
        raise Bad(f"{entry.name}: no JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        have = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise Bad(f"{entry.name}: it has no text named {field}, only {have}")
    sample = {"txt": row[field].encode("utf-8", "replace")}  # JSON can hold half of a surrogate pair
    if not key:
        return sample
    if not isinstance(row.get(key), str | int) or row[key] == "":
        raise Bad(f"{entry.name}: it has no {key} to be its key")
    return sample | {"__key__": next(iter(keys([f"{row[key]}."])))}


def parquet(source: Path, found: Files, work: Path, *, columns: dict[str, str]) -> Source:
    """.parquet files of a folder, or one file: a sample per row.

    `columns` names the member that each column becomes, {"text": "txt", "image.bytes": "jpg"}: bytes stay as they are,
    strings become UTF-8, numbers decimal, all else JSON. pyarrow is asked for.
    """
    try:
        from pyarrow import ArrowInvalid, parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow: pip install 'dltrain[parquet]'") from error
    files = {name: span for name, span in found.items() if name.endswith(".parquet") or source.is_file()}
    groups: list[tuple[str, str, Span]] = []  # one of each row group
    rows: list[int] = []
    for (name, span), key in zip(track(files.items(), "listing files"), keys(files)):
        try:
            with parquet.ParquetFile(span.path) as file:
                leaves = [file.schema.column(i).path for i in range(len(file.schema.names))]
                metadata = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
        except (ArrowInvalid, OSError) as error:
            raise UserError(f"{name}: not a Parquet file, or damaged ({error}); fetch it again") from error
        for column in columns:
            if not any(f"{leaf}.".startswith(f"{column}.") for leaf in leaves):
                raise UserError(f"{name} has no column {column}, only {', '.join(leaves)}; choose with --columns")
        for g, group in enumerate(metadata):
            size = group.total_byte_size // max(1, group.num_rows)
            groups.append((f"{key}/{g:05d}", f"{name}, row group {g}", Span(span.path, 0, size, str(g))))
            rows.append(group.num_rows)
    entries = _Rows(groups, rows)
    ignored = [name for name in found if name not in files]
    return Source("rows", entries, partial(_row, columns=columns), ignored=ignored, size_N=entries.size_N)


class _Rows(Sequence[Entry]):
    """Rows of row groups; a row's span is of the file, from its number in the group, with the group as its member."""

    def __init__(self, groups: list[tuple[str, str, Span]], rows: list[int]):
        self._groups, self._end_G = groups, np.cumsum(rows, dtype=np.int64)
        self.size_N = np.repeat([span.size for *_, span in groups], rows).astype(np.int64)

    def __len__(self) -> int:
        return len(self.size_N)

    def __getitem__(self, i: Any) -> Entry:
        g = int(np.searchsorted(self._end_G, i, side="right"))
        row = int(i - (self._end_G[g - 1] if g else 0))
        key, name, span = self._groups[g]
        return Entry(f"{key}/{row:06d}", f"{name}, row {row}", replace(span, start=row))


@lru_cache(maxsize=1)
def _row_group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    from pyarrow import parquet  # type: ignore[import-not-found]

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=list(columns), use_threads=False)


def _row(entry: Entry, columns: dict[str, str]) -> dict[str, Any]:
    try:
        table = _row_group(entry.span.path, int(entry.span.member), tuple(columns))
        (row,) = table.slice(entry.span.start, 1).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are these
        raise UserError(f"{entry.name}: cannot be read ({error}); fetch it again") from error
    sample = {}
    for column, extension in columns.items():
        value = row
        for part in column.split("."):
            value = value[part] if value is not None else None
        if value is None:
            raise Bad(f"{entry.name}: {column} is null")
        sample[extension] = _member(value)
    return sample


def _member(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
