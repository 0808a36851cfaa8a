"""From the dossiers of a run's ranks to the one that hangs: who, why, what to do. Pure functions of what was written.

Ranks wait for one another in collectives, so most of those that stand still are victims. In this order:
1. A rank that says nothing: stopped, dead, without the GIL, cut off, or it never came.
2. A rank that moves: all may be well, it is only slow.
3. A rank that stands still outside of a collective: it keeps the others waiting.
4. All are in collectives: the one that is in another one than most.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dltrain.doctor.board import Dossier, Silent
from dltrain.doctor.watch import Line, collective, standard

_RENDEZVOUS = {"init_process_group", "new_group", "_create_c10d_store", "_store_based_barrier"}
_STATES = {"T": "is stopped by a signal", "t": "is stopped by a debugger", "Z": "is dead", "gone": "is dead"}


@dataclass(frozen=True)
class Verdict:
    """`ranks` hang, none of them if it is not to be said; `kind` is one word, `cause` and `advice` are sentences."""

    ranks: tuple[int, ...]
    kind: str
    cause: str
    advice: str


@dataclass(frozen=True)
class Activity:
    """What a rank is at. `shared`: with others, and so it may be waiting for them."""

    kind: str
    words: str
    shared: bool = False


def without(world: int, dossiers: Mapping[int, Dossier]) -> list[Silent]:
    """The ranks that have no dossier. If one of its neighbours takes a rank for busy, it is."""
    told = {s.rank: s for d in dossiers.values() for s in d.neighbours}
    told |= {s.rank: s for d in dossiers.values() for s in d.neighbours if s.busy}
    return [told.get(rank, Silent(rank)) for rank in range(world) if rank not in dossiers]


def diagnose(dossiers: Mapping[int, Dossier], silent: Sequence[Silent]) -> Verdict | None:
    """None: nothing to be said, the run may be well. `dossiers` and `silent` (see `without`) together are all ranks."""
    activities = {rank: activity(dossier) for rank, dossier in dossiers.items()}
    if quiet := [s for s in silent if not s.busy]:
        return _silent(quiet, all(a.kind == "rendezvous" for a in activities.values()))
    if silent or not all(dossier.worried for dossier in dossiers.values()):
        return None
    if outside := {rank: a for rank, a in activities.items() if not a.shared}:
        return _outside(outside, dossiers)
    return _apart(activities, dossiers)


def activity(dossier: Dossier) -> Activity:
    """What the main thread is at, from its stack."""
    stack, blocked = dossier.stack, dossier.blocked
    functions = {line.function for line in stack}
    if functions & _RENDEZVOUS:
        return Activity("rendezvous", "waits at the rendezvous", True)
    waits = collective(stack)
    if waits not in ("", "wait"):
        return Activity("collective", f"is in {waits}", True)
    inner = stack[0] if stack else Line("", 0, "")
    if any(line.file.endswith("dataloader.py") for line in stack):
        return Activity("loader", f"waits for data{_workers(dossier)}")
    if _saves(stack):
        thread = next((s for name, s in dossier.threads.items() if name == "checkpoint"), ())
        at = f"; its thread is at {place(thread)}" if thread else ""
        return Activity("disk", f"writes a checkpoint{f' ({blocked})' if blocked else ''}{at}")
    if blocked:
        return Activity("file", f"is blocked in {blocked}")
    if waits:
        return Activity("collective", "waits for a collective", True)
    if "sleep(" in inner.text:
        return Activity("asleep", "sleeps")
    if "fsync(" in inner.text:
        return Activity("disk", "waits for the disk")
    if standard(inner.file) or "acquire(" in inner.text or inner.text.startswith(("with ", "async with ")):
        return Activity("lock", "waits for a lock or for another thread")
    if dossier.gpu:
        return Activity("device", "waits for the GPU", True)
    return Activity("code", "does not come back from a call")


def _saves(stack: Sequence[Line]) -> bool:
    return any(
        line.file.endswith("dltrain/checkpoint.py")
        or "/torch/distributed/checkpoint/" in line.file
        or (line.function == "settle" and line.file.endswith("dltrain/run.py"))
        for line in stack
    )


def _workers(dossier: Dossier) -> str:
    """The worker that is to blame: one that is dead or stopped, else one that reads."""
    lame = [f"worker {w.pid} {_STATES[w.state]}" for w in dossier.workers if w.state in _STATES]
    lame = lame or [f"worker {w.pid} is blocked in {w.blocked}" for w in dossier.workers if w.blocked]
    if not dossier.workers and dossier.blocked:
        lame = [f"it is blocked in {dossier.blocked}"]
    return f": {', '.join(lame)}" if lame else ""


def _silent(silent: Sequence[Silent], rendezvous: bool) -> Verdict:
    ranks = tuple(s.rank for s in silent)
    one = silent[0]
    if rendezvous and all(s.state in ("", "gone", "Z") for s in silent):
        return Verdict(
            ranks, "missing", "never arrived at the rendezvous", "see whether they were started, and what they print"
        )
    if one.state in ("T", "t"):
        return Verdict(ranks, "stopped", _STATES[one.state], f"kill -CONT {one.pid}, or find who stopped it")
    if one.state in ("gone", "Z"):
        return Verdict(ranks, "dead", "is dead", "see the kernel's log: out of memory, or killed by hand")
    if one.dump:
        return Verdict(
            ranks, "gil", "holds the GIL in a call that does not return", "the library called there must release it"
        )
    if one.host:
        why = "its Python does not run: the GIL is held, or the machine is overloaded"
        return Verdict(ranks, "mute", why, f"py-spy dump --pid {one.pid}, or gdb")
    return Verdict(
        ranks, "silent", "says nothing: its node is down, cut off or stopped, or the GIL is held", "look at its node"
    )


def _outside(outside: Mapping[int, Activity], dossiers: Mapping[int, Dossier]) -> Verdict:
    kinds = Counter(a.kind for a in outside.values())
    kind = next(k for k in ("disk", "loader", "file", "lock", "asleep", "code") if kinds[k])  # what others may wait for
    guilty = {rank: a for rank, a in outside.items() if a.kind == kind}
    first = min(guilty)
    return Verdict(
        tuple(sorted(guilty)),
        kind,
        f"{guilty[first].words} at {place(dossiers[first].stack)}",
        {
            "disk": "the disk or the filesystem does not answer: see the kernel's log, df, and the storage's servers",
            "loader": "the worker's process, and the storage that it reads from",
            "file": "whoever should write or serve it",
            "lock": "the thread that holds it is in the dump",
            "asleep": "that line is the reason",
            "code": "that line is the reason; py-spy dump --native shows what is below it",
        }[kind],
    )


def _apart(activities: Mapping[int, Activity], dossiers: Mapping[int, Dossier]) -> Verdict | None:
    """All wait in collectives. The key of a place is the way to it, since many ways lead to one all-gather."""
    keys = {rank: (activities[rank].words, own(d.stack), d.step, tuple(sorted(d.calls.items())))
            for rank, d in dossiers.items()}  # fmt: skip
    (most, n), *others = Counter(keys.values()).most_common()
    if not others and all(a.kind == "device" for a in activities.values()):
        return None  # it may compute for long
    if not others:
        return Verdict(
            (), "network", "all ranks wait in one and the same collective", "the network between them, or the driver"
        )
    told = "all ranks must make the same collectives in the same order: look for an if on the rank around these lines"
    if n == others[0][1]:  # no majority: the one that has begun fewer is behind, if there is such a one
        begun = {rank: sum(d.calls.values()) for rank, d in dossiers.items()}
        behind = [rank for rank in sorted(begun) if begun[rank] == min(begun.values())]
        ranks = tuple(sorted(keys)) if len(behind) == len(begun) else tuple(behind)
        return Verdict(ranks, "mismatch", "the ranks are in different collectives", told)
    strays = tuple(rank for rank in sorted(keys) if keys[rank] != most)
    stray, usual = dossiers[strays[0]], next(d for rank, d in sorted(dossiers.items()) if keys[rank] == most)
    cause = f"{activities[strays[0]].words} at {place(stray.stack)} (step {stray.step}), most ranks"
    usual_words = activities[usual.rank].words.replace("is in", "are in").replace("waits", "wait")
    return Verdict(strays, "mismatch", f"{cause} {usual_words} at {place(usual.stack)} (step {usual.step})", told)


def own(stack: Sequence[Line]) -> tuple[Line, ...]:
    """The part of a stack that is neither the standard library's nor an installed package's, if there is any."""
    mine = tuple(x for x in stack if not standard(x.file) and "site-packages" not in x.file and x.file[:1] != "<")
    return mine or tuple(stack[:1])


def place(stack: Sequence[Line], deep: int = 1) -> str:
    """The line of one's own code at which a stack is, and its callers."""
    mine = own(stack)[:deep]
    return (
        " < ".join([str(mine[0]), *(f"{x.file.rpartition('/')[2]}:{x.line} {x.function}" for x in mine[1:])])
        if mine
        else "?"
    )


def words(verdict: Verdict, dossiers: Mapping[int, Dossier], silent: Sequence[Silent]) -> str:
    """What is printed: who, why, what to do, and where every rank is."""
    told: dict[int, str] = {}
    for rank, d in dossiers.items():
        at = f"{activity(d).words} at {place(d.stack, 4)}"
        told[rank] = f"  rank {rank} ({d.host}, pid {d.pid}, step {d.step}, still for {d.still:.0f} s) {at}"
    for s in silent:
        last = f"was seen, up to a second before, at {s.line}" if s.line else "has left no word"
        last = f"is at {_dumped(s.dump)}" if s.dump else last
        told[s.rank] = f"  rank {s.rank} ({s.host or 'unknown host'}, pid {s.pid or 'unknown'}, silent) {last}"
    several = len(verdict.ranks) > 1
    who = f"rank{'s' * several} {', '.join(map(str, verdict.ranks))} hang{'' if several else 's'}"
    return (
        "\n".join(
            [
                f"\ndltrain: {who if verdict.ranks else 'the run hangs'}: {verdict.cause}",
                f"  what to do: {verdict.advice}",
                *(told[rank] for rank in sorted(told)),
            ]
        )
        + "\n"
    )


def _dumped(dump: str) -> str:
    """The innermost line of the main thread, which faulthandler writes last."""
    lines = dump.split("Thread ")[-1].splitlines()[1:]
    return lines[0].strip() if lines else "an unknown place"
