"""Run directory -> one self-contained HTML page: no script, nothing fetched, light and dark."""

import base64
import math
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Literal

from dltrain import rundir
from dltrain.errors import UserError
from dltrain.meter import duration
from dltrain.report_charts import Row, charts, is_rate, label, number, show, value_of


def report(out: Path) -> Path:
    """Write `out`/report.html and return its path; also of a run in progress, or one that has logged nothing yet.

    Beside what `rundir` lists it shows results.json, which a recipe may write at its end: {"figures": [{"name",
    "value", "baseline", "better": "lower" or "higher"}], "samples": [{"masked": sentence with a [MASK], "filled": word,
    "truth": word}], "notes": [text], "pictures": [PNG or GIF below `out`]}.

    Raises:
        UserError: where `out` is no run directory, or one of its JSON files is torn.
    """
    if not any((out / name).exists() for name in ("config.json", "metrics.jsonl")):
        raise UserError(f"{out}: not a run directory (it has neither config.json nor metrics.jsonl)")
    run, environment, results = (_optional(out / f"{name}.json") for name in ("config", "environment", "results"))
    metrics, speed = (
        [row for row in rundir.read_rows(out / f"{name}.jsonl") if isinstance(row.get("step"), int)]
        for name in ("metrics", "speed")
    )
    events = rundir.read_rows(out / "events.jsonl")
    saves = [event for event in events if event.get("kind") == "save" and isinstance(event.get("step"), int)]
    config = run.get("config", {})
    command = out / "command.txt"
    recipe = str(run.get("recipe") or "run")
    body = [
        f"<header><p class=kicker>{escape(out.resolve().name)}</p><h1>{escape(recipe)}</h1>",
        f"<p class=lead>{_verdict(config, metrics + saves, speed, results)}</p></header>",
        _tiles(metrics, speed),
        _results(results),
        _section("Pictures", "".join(_picture(out / name) for name in results.get("pictures", []))),
        charts(metrics, speed),
        _section(
            "Command", f"<pre>{escape(command.read_text(errors='replace').strip())}</pre>" if command.exists() else ""
        ),
        "<div class=pair>" + _section("Configuration", _table(config, f"hash {run.get('hash', 'unknown')}")),
        _section("Environment", _table(environment.pop("packages", {}) | environment)) + "</div>",
        _section("Checkpoints", _checkpoints(out / "checkpoints")),
        _section("Events", _events(events)),
    ]
    page = _PAGE.format(title=escape(f"{recipe}: {out.resolve().name}"), style=_STYLE, body="\n".join(body))
    rundir.write_atomic(out / "report.html", page.encode(errors="replace"))
    return out / "report.html"


def figure(name: str, value: float, baseline: float, better: Literal["lower", "higher"]) -> dict[str, Any]:
    """An entry of results.json's "figures"."""
    return {"name": name, "value": value, "baseline": baseline, "better": better}


def concluded(run: Any) -> bool:
    """Whether an earlier launch has concluded this run, and was not killed before. Called by all processes."""
    out = Path(run.cfg.out)

    def look() -> bool:
        written = (out / "results.json").exists() and (out / "report.html").exists()
        return written and rundir.read_json(out / "results.json").get("step") == run.restored.get("step")

    return run.restored.get("step") == run.cfg.steps and run.first(look)


def conclude(run: Any, results: Callable[[], dict[str, Any]]) -> None:
    """At the end of a run, on its first process: write `results()` to results.json, and report.html.

    Called by all processes; the checkpoint of the last step has been published before `results` is asked.
    """
    run.settle()

    def write() -> None:
        rundir.write_json(Path(run.cfg.out) / "results.json", {"step": run.cfg.steps} | results())
        report(Path(run.cfg.out))

    run.first(write)


def farewell(run: Any, more: str = "") -> None:
    """Say what a finished run has reached, from its results.json, where everything is, and what to try next."""
    before = run.restored.get("step", 0) >= run.cfg.steps
    run.say(
        run.first(lambda: _farewell(Path(run.cfg.out), before))
        + more.format(out=run.cfg.out, python=os.path.relpath(sys.executable), script=sys.argv[0])
    )


def _farewell(out: Path, before: bool) -> str:
    results = rundir.read_json(out / "results.json")
    done = "Done. It was before this launch: give another --out to train anew." if before else "Done."
    lines = ["", f"{done} On held-out data, beside the baseline:"]
    for f in results["figures"]:
        verdict = "better" if _beats(f) else "NOT better"
        lines.append(f"  {f['name']:<20} {number(f['value']):.3f}   baseline {number(f['baseline']):.3f}   {verdict}")
    if results["samples"]:
        lines.append("Filled in:")
        lines += [f"  {s['masked']}\n      -> {s['filled']}   (it was: {s['truth']})" for s in results["samples"]]
    lines += ["", f"Run directory  {out}", f"Report         {out / 'report.html'}"]
    return "\n".join(lines + [f"Checkpoint     {path}" for path in sorted((out / "checkpoints").glob("step-*"))[-1:]])


def _optional(path: Path) -> dict[str, Any]:
    found = rundir.read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; restore it, or delete it and run again")
    return found


def _verdict(config: Row, rows: list[Row], speed: list[Row], results: Row) -> str:
    """One sentence or two: how far the run is, and whether it beat its baselines."""
    last, total = max((row["step"] for row in rows), default=0), config.get("steps")
    if not last:
        progress = "Nothing logged yet."
    elif isinstance(total, int) and last >= total:
        progress = f"Finished: {last:,} steps."
    else:
        progress = f"Step {last:,}" + (
            f" of {total:,} ({last / total:.0%})." if isinstance(total, int) and total else "."
        )
        eta = number(speed[-1].get("eta_seconds")) if speed else math.nan
        progress += f" {duration(eta)} to go when last logged." if math.isfinite(eta) else ""
    figures = results.get("figures", [])
    if figures:
        better = sum(_beats(figure) for figure in figures)
        mark = "good" if better == len(figures) else "bad"
        progress += f" <span class={mark}>{better} of {len(figures)} held-out figures beat the baseline.</span>"
    return progress


def _tiles(metrics: list[Row], speed: list[Row]) -> str:
    """The newest value of every metric, evaluation rows included, and of the speed."""
    newest: Row = {}
    for row in metrics:
        newest |= row
    newest |= {key: value for key, value in (speed[-1] if speed else {}).items() if is_rate(key) or key == "mfu"}
    newest.pop("step", None)
    cells = (
        f"<div><dt>{escape(label(key))}</dt><dd>{value_of(key, value)}</dd></div>" for key, value in newest.items()
    )
    return f"<dl class=tiles>{''.join(cells)}</dl>" if newest else ""


def _beats(figure: Row) -> bool:
    value, baseline = number(figure.get("value")), number(figure.get("baseline"))
    return value > baseline if figure.get("better") == "higher" else value < baseline


def _results(results: Row) -> str:
    rows = []
    for figure in results.get("figures", []):
        good, verdict = ("good", "✓ better") if _beats(figure) else ("bad", "✗ not better")
        cells = f"<th scope=row>{escape(str(figure.get('name')))}</th><td class=num>{show(figure.get('value'))}</td>"
        cells += f"<td class=num>{show(figure.get('baseline'))}</td><td class={good}>{verdict}</td>"
        rows.append(f"<tr>{cells}<td class=dim>{escape(str(figure.get('better', 'lower')))} is better</td></tr>")
    head = "<tr><th>figure<th class=num>this run<th class=num>baseline<th><th></tr>"
    table = (
        f"<div class=scroll><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>" if rows else ""
    )
    notes = "".join(f"<p class=dim>{escape(str(note))}</p>" for note in results.get("notes", []))
    samples = _samples(results.get("samples", []))
    return _section("Held-out results", table + notes) + _section("Filled in by the model", samples)


def _samples(samples: list[Row]) -> str:
    """Sentences with a hole, what the model puts there, and what had been there."""
    rows = []
    for sample in samples:
        masked, filled, truth = (escape(str(sample.get(key, ""))) for key in ("masked", "filled", "truth"))
        masked = masked.replace("[MASK]", "<mark>[MASK]</mark>")
        right = " class=good" if filled == truth else ""
        rows.append(f"<tr><td class=text>{masked}</td><td{right}>{filled}</td><td>{truth}</td></tr>")
    head = "<tr><th>held-out sentence<th>the model<th>the truth</tr>"
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>" if rows else ""


def _picture(path: Path) -> str:
    """A PNG or GIF inside the page, which is one file, and a link to it; nothing if it is no longer there."""
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f"<img alt='{escape(path.name)}' src='data:image/{path.suffix[1:]};base64,{data}' style='max-width:100%'>"
    return f"<figure><a href='{escape(path.name)}'>{image}</a></figure>"


def _table(values: Row, note: str = "") -> str:
    rows = (f"<tr><th scope=row>{escape(key)}</th><td>{show(value)}</td></tr>" for key, value in values.items())
    after = f"<p class=dim>{escape(note)}</p>" if note else ""
    return f"<div class=scroll><table class=facts>{''.join(rows)}</table></div>{after}" if values else ""


def _checkpoints(folder: Path) -> str:
    rows = []
    for path in sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")):
        try:
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            when = _time(datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds"))
        except FileNotFoundError:  # the run has just replaced it by a newer one
            continue
        row = f"<td class=num>{size / 2**20:,.1f} MiB</td><td class=when>{when}</td>"
        rows.append(f"<tr><th scope=row>{escape(path.name)}</th>{row}</tr>")
    return f"<div class=scroll><table class=narrow>{''.join(rows)}</table></div>" if rows else ""


def _events(events: list[Row], most: int = 200) -> str:
    rows = []
    for event in events[-most:]:
        rest = {key: value for key, value in event.items() if key not in ("time", "kind") and value not in ({}, [])}
        kind = f"<td class=when>{_time(event.get('time'))}</td><th scope=row>{show(event.get('kind'))}</th>"
        rows.append(f"<tr>{kind}<td class=wrap>{show(rest)}</td></tr>")
    earlier = f"<p class=dim>{len(events) - most:,} earlier ones are in events.jsonl.</p>" if len(events) > most else ""
    return f"{earlier}<div class='scroll tall'><table>{''.join(rows)}</table></div>" if rows else ""


def _time(iso: Any) -> str:
    return escape(str(iso).replace("T", " ").replace("+00:00", " UTC"))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


_PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark"><title>{title}</title><style>{style}</style></head>
<body>{body}</body></html>
"""

_STYLE = """
:root { --paper:#fcfcfa; --ink:#1c1d20; --dim:#63666d; --rule:#dfdfda; --panel:#f3f3ef; --good:#0a6b3d; --bad:#a32a1c;
  --mark:#fbe9a9; --c0:#2457c5; --c1:#d1600f; --c2:#0b8a72; --c3:#9a3aa8 }
@media (prefers-color-scheme: dark) { :root { --paper:#141518; --ink:#e6e6e3; --dim:#9b9ea6; --rule:#33353b;
  --panel:#1d1f23; --good:#5cc78d; --bad:#f08472; --mark:#5b4a12; --c0:#7ea6ff; --c1:#ffa25c; --c2:#4fd0b5;
  --c3:#d98be6 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 3rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums }
h1 { font-size: 2rem; line-height: 1.15; margin: 0; letter-spacing: -.02em; font-weight: 650;
  overflow-wrap: anywhere }
h2 { font-size: 1.05rem; margin: 0 0 .6rem; font-weight: 650 }
section { margin-top: 2.5rem; min-width: 0 }
.kicker { margin: 0 0 .2rem; color: var(--dim); overflow-wrap: anywhere }
.lead { font-size: 1.1rem; margin: .5rem 0 0 }
.dim, .when { color: var(--dim) } .good { color: var(--good) } .bad { color: var(--bad) }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 0 1.5rem;
  margin: 1.5rem 0 0 }
.tiles div { border-top: 1px solid var(--rule); padding: .55rem 0 .7rem }
.tiles dt { color: var(--dim); font-size: .82rem }
.tiles dd { margin: 0; font-size: 1.2rem; font-weight: 600 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 2rem 2.5rem;
  margin-top: 2.5rem }
figure { margin: 0; min-width: 0 } figure svg { display: block; width: 100%; height: auto }
figure svg text { font-family: inherit !important }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; margin-bottom: .3rem }
figcaption span { color: var(--dim); font-size: .85rem }
figcaption i { display: inline-block; width: .9rem; height: 3px; border-radius: 2px; margin-right: .4rem;
  vertical-align: .2em }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 0 2.5rem }
.scroll { overflow-x: auto } .tall { max-height: 28rem; overflow-y: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem } tr { border-bottom: 1px solid var(--rule) }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; vertical-align: top } th { font-weight: 500 }
thead th { color: var(--dim); font-size: .82rem } .num { text-align: right }
.num + .good, .num + .bad { padding-left: 1rem } .when, .good, .bad { white-space: nowrap }
.facts th { color: var(--dim); width: 40%; font-weight: 400 } .narrow { width: auto }
.narrow td { padding-left: 1.5rem } .facts td, .wrap { overflow-wrap: anywhere }
pre, .text { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
pre { margin: 0; padding: .8rem 1rem; background: var(--panel); border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 0 .15em }
.lead span { white-space: normal }
"""
