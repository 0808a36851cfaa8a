"""Random damage to shards of every make: all of it is found, and nothing that is whole is called damaged.

`python tests/data/test_corruption.py 1000` runs more rounds than the tests do.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import chaos_shards
import numpy as np
import pytest
from chaos_shards import BLOCK, EDITS, Edit, generator

from dltrain.data.index import indexed, stored
from dltrain.data.shards import Shards
from dltrain.errors import UserError


def clean(shard: Path) -> dict[str, dict[str, bytes]]:
    return {sample.pop("__key__"): sample for sample in Shards(str(shard))}


def shard_to_damage(draw: np.random.Generator, path: Path) -> chaos_shards.Spans:
    """A new shard with a sample or more; what was under this name is forgotten."""
    path.with_name(path.name + ".idx").unlink(missing_ok=True)
    while not (spans := chaos_shards.clean_shard(draw, path)):
        pass
    return spans


def put(path: Path, content: bytes, when: int | None) -> None:
    """The new content, as a failing disk writes it (nothing else changes) or with a new time."""
    path.write_bytes(content)
    if when is not None:
        os.utime(path, ns=(when, when))


def damaged_once(draw: np.random.Generator, folder: Path) -> None:
    """One shard that has an index, damaged in one way."""
    path = folder / "x.tar"
    spans = shard_to_damage(draw, path)
    good, when = path.read_bytes(), path.stat().st_mtime_ns
    before = clean(path)
    edit: Edit = EDITS[int(draw.integers(len(EDITS)))]
    blob = bytearray(good)
    while blob == good:
        edit(draw, blob)
    if draw.random() < 0.05:
        chaos_shards.clean_shard(draw, path)  # another shard under this name
        blob = bytearray(path.read_bytes())
    put(path, bytes(blob), when if draw.random() < 0.5 else when + 10**9)
    touched = {key: span for key, span in spans.items() if blob[slice(*span)] != good[slice(*span)]}
    check_verify(path, good, blob, touched, spans)
    check_skip(path, draw, before, touched)
    check_substitute(path, before, touched)
    if touched:
        with pytest.raises(UserError) as error:
            list(Shards(str(path)))
        assert path.name in str(error.value) and "\n" not in str(error.value)


def check_verify(path: Path, good: bytes, bad: bytearray, touched: chaos_shards.Spans, spans: chaos_shards.Spans):
    """What `data verify` says."""
    index = stored(path)
    assert index is not None
    faults = list(index.faults(memoryview(bytes(bad)), str(path)))
    assert faults and {fault.key for fault in faults if fault.key} == set(touched)
    for fault in faults:
        assert fault.shard == str(path) and fault.reason
        start, end = spans[fault.key] if fault.key else (0, len(good))
        assert min(start, len(bad)) <= fault.offset <= end, fault
    last = max(end for _, end in spans.values())
    assert any(not fault.key for fault in faults) == (bad[last:] != good[last:] or len(bad) != len(good))


def check_skip(path: Path, draw: np.random.Generator, before: dict, touched: chaos_shards.Spans) -> None:
    """Only what was touched is lost, in file order and in any other."""
    shards = Shards(str(path), on_error="skip")
    keys = list(before)
    mixed = draw.permutation(len(shards))
    for numbers, found in (
        (range(len(keys)), list(shards)),
        (mixed.tolist(), shards.read(mixed)),
        ([3 % len(keys)], [shards[3 % len(keys)]]),
    ):
        assert len(found) == len(numbers)
        for number, sample in zip(numbers, found):
            key = keys[number]
            assert sample.pop("__key__") == key
            if key in touched:
                damage = sample.pop("__damage__")
                assert damage.shard == str(path) and damage.key == key and damage.reason
                assert list(sample) == ["__url__"]
            else:
                assert sample == before[key]


def check_substitute(path: Path, before: dict, touched: chaos_shards.Spans) -> None:
    shards = Shards(str(path), on_error="substitute")
    if len(touched) == len(before):
        with pytest.raises(UserError, match="no intact sample"):
            list(shards)
        return
    found = list(shards)
    assert [sample.pop("__key__") for sample in found] == list(before)
    whole = [sample for key, sample in before.items() if key not in touched]
    for key, sample in zip(before, found):
        assert ("__damage__" in sample) == (key in touched)
        sample.pop("__damage__", None)
        assert sample in whole


def test_all_damage_to_an_indexed_shard_is_found_and_costs_only_what_it_touches(tmp_path):
    for n in range(150):
        damaged_once(generator(1, n), tmp_path)


# --- without an index ------------------------------------------------------------------------------------------------


def headers(path: Path) -> Iterator[tuple[int, int]]:
    """(start, end) of the blocks of every member's header that its own checksum covers: not a long name's text."""
    for _, start, payload, _ in chaos_shards.members(path):
        yield start, start + BLOCK
        yield payload - BLOCK, payload


def damaged_before_it_is_indexed(draw: np.random.Generator, folder: Path) -> None:
    """A flip in a header, a zeroed header, a truncation: found without knowing what was there before.

    What is out of reach: payloads, and the text of long names, which no checksum of a tar covers; the spaces around a
    header's own checksum, which change nothing; that members at the end are gone, if their headers are zeros and so are
    their payloads; and that a sample beside a damaged header has lost a member that no other sample has.
    """
    path, copy = folder / "x.tar", folder / "clean.tar"
    shard_to_damage(draw, path)
    copy.write_bytes(path.read_bytes())
    copy.with_name("clean.tar.idx").unlink(missing_ok=True)
    before = {key: sample | {"__url__": str(path)} for key, sample in clean(copy).items()}
    blob = bytearray(path.read_bytes())
    blocks = list(headers(path))
    start, end = blocks[int(draw.integers(len(blocks)))]
    match int(draw.integers(3)):
        case 0:
            blob[int(draw.integers(start, end))] ^= 1 << int(draw.integers(8))
        case 1:
            blob[start:end] = bytes(BLOCK)
        case _:
            del blob[int(draw.integers(chaos_shards.members(path)[-1][3])) :]
    path.write_bytes(blob)
    if not blob:
        with pytest.raises(UserError, match="empty file"):
            Shards(str(path))
        return
    try:
        shards = Shards(str(path), on_error="skip")
    except UserError as error:  # there was one header, and it is gone
        if "not an uncompressed tar" not in str(error):
            raise
        return
    found = {sample.pop("__key__"): sample for sample in shards}
    lost = [v for key in before for name, v in before[key].items() if name not in found.get(key, {})]
    assert shards.damage or not any(any(value) for value in lost if value != str(path))
    for key, sample in found.items():
        if sample != before[key]:  # a part of one, beside the damage: it is like all the others
            assert sample.items() < before[key].items()
            assert {tuple(other) for other in found.values()} == {tuple(sample)} or not shards.damage
    for damage in shards.damage:
        assert 0 <= damage.offset <= len(blob) and damage.shard == str(path)
    if shards.damage:
        with pytest.raises(UserError, match=r"x\.tar"):
            Shards(str(path))


def test_damage_to_headers_is_found_when_the_index_is_made(tmp_path):
    for n in range(150):
        damaged_before_it_is_indexed(generator(2, n), tmp_path)


def test_an_index_that_is_damaged_is_made_anew(tmp_path):
    path, index = tmp_path / "x.tar", tmp_path / "x.tar.idx"
    for n in range(40):
        draw = generator(3, n)
        shard_to_damage(draw, path)
        before, made = clean(path), index.read_bytes()
        blob = bytearray(made)
        while blob == made:
            (chaos_shards.flip, chaos_shards.cut, chaos_shards.scramble)[n % 3](draw, blob)
        index.write_bytes(blob)
        assert clean(path) == before and index.read_bytes() == made


# --- no false alarm --------------------------------------------------------------------------------------------------


def sound(draw: np.random.Generator, path: Path) -> None:
    spans = chaos_shards.clean_shard(draw, path)
    index = indexed(path)
    assert not index.damage and not list(index.faults(memoryview(path.read_bytes()), "x"))
    assert {index.key_of(j): (index.span_start[j], index.span_end[j]) for j in range(len(index))} == spans


def test_no_false_alarm(tmp_path):
    for n in range(300):
        sound(generator(4, n), tmp_path / "x.tar")


def main(rounds: int) -> None:
    """Every check of this file so many times."""
    from dltrain.progress import track

    with tempfile.TemporaryDirectory(prefix="corruption-") as name:
        folder = Path(name)
        os.environ["DLTRAIN_CACHE"] = str(folder / "cache")
        for n in track(range(rounds), "damaged shards"):
            damaged_once(generator(5, n), folder)
            damaged_before_it_is_indexed(generator(6, n), folder)
        for n in track(range(rounds), "clean shards"):
            sound(generator(7, n), folder / "x.tar")
    print(f"{rounds} damaged shards with an index, {rounds} without, {rounds} clean ones: as they should be")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
