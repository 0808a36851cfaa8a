"""The report: of a finished run, a running one, an empty one; well-formed, escaped, self-contained, small."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dltrain import rundir
from dltrain.errors import UserError
from dltrain.log import Log
from dltrain.report import report
from dltrain.report_charts import _svg, _thin

VOID = {"meta", "img", "br", "hr", "th", "link"}  # the table head leaves its cells open, as HTML allows


class Page(HTMLParser):
    """Refuses tags that do not nest; keeps ids and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.fetched += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href") and not str(v).startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(out: Path) -> Page:
    text = report(out).read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.fetched == []
    assert not re.search(r"url\((?!#)|@import|<script|nan", text)
    assert len(text) < 1_000_000
    return page


def make_run(out: Path, steps: int, total: int) -> Path:
    config = {"steps": total, "lr": 5e-4, "shards": "<b>&'\"", "betas": (0.9, 0.999), "wandb": ""}
    rundir.describe(out, recipe="bert_pretrain", config=config, command=["bert_pretrain.py", "--note", "<i>$a_b$"])
    random = np.random.Generator(np.random.Philox(key=1))
    log = Log(out, total_steps=total, tensorboard=False)
    for step in range(1, steps + 1):
        loss = 2.4 + 6 * math.exp(-step / 80) + random.normal() * 0.1
        log.metrics(
            step, {"loss": loss, "lr": 5e-4 * step / total, "grad_norm": 1.0 + 99 * (step == 7), "tokens": step}
        )
        log.speed(step, {"tokens_per_second": 5e4, "mfu": 0.312, "eta_seconds": 75.0})
        if step % 50 == 0:
            log.metrics(step, {"eval/loss": loss + 0.1, "eval/accuracy": 0.5})
    log.event("skip", step=7, why="<script>alert(1)</script>")
    log.close()
    (out / "checkpoints" / "step-00000100").mkdir()
    (out / "checkpoints" / "step-00000100" / "x.distcp").write_bytes(b"0" * 2**20)
    (out / "checkpoints" / ".step-00000200.tmp").mkdir()
    return out


def test_a_finished_run(tmp_path):
    out = make_run(tmp_path / "bert & co", 1000, 1000)
    figures = [
        {"name": "masked-LM loss", "value": 2.6, "baseline": 6.04, "better": "lower"},
        {"name": "accuracy", "value": 0.05, "baseline": 0.06, "better": "higher"},
        {"name": "perplexity", "value": math.nan, "baseline": 400, "better": "lower"},
    ]
    samples = [{"masked": "the [MASK] of <x>", "filled": "<name>", "truth": "type"}]
    rundir.write_json(out / "results.json", {"figures": figures, "samples": samples, "notes": ["214 documents"]})
    page = read(out)
    assert page.tags.count("svg") == 5  # loss, lr, gradient norm, accuracy, tokens/s
    assert "Finished: 1,000 steps. 1 of 3 held-out figures beat the baseline." in page.text
    for shown in ("masked-LM loss2.66.04✓ better", "0.050.06✗ not better", "NaN400✗ not better", "214 documents"):
        assert shown in page.text
    for shown in ("--note '<i>$a_b$'", "<b>&'\"", "0.9, 0.999", "step-000001001.0 MiB", "<script>alert(1)</script>"):
        assert shown in page.text
    assert "step-00000200" not in page.text  # a save under way
    assert (
        "the <mark>[MASK]</mark> of &lt;x&gt;</td><td>&lt;name&gt;</td><td>type</td>"
        in (out / "report.html").read_text()
    )


def test_a_run_in_progress_with_torn_rows(tmp_path):
    out = make_run(tmp_path / "run", 3, 12)
    for name in ("metrics", "speed", "events"):
        with (out / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')
    page = read(out)
    assert "Step 3 of 12 (25%). 1m15s to go when last logged." in page.text
    assert page.tags.count("svg") == 4


def test_a_run_without_rows(tmp_path):
    rundir.describe(tmp_path, recipe="bert_pretrain", config={"steps": 12}, command=["bert_pretrain.py"])
    page = read(tmp_path)
    assert "Nothing logged yet." in page.text
    assert "svg" not in page.tags


def test_metrics_alone_and_none_finite(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "loss": "NaN"}\n{"step": 1, "loss": "Infinity"}\n{"loss": 1}\n'
    )
    assert "inf (2 not finite)" in read(tmp_path).text


def test_what_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="not a run directory"):
            report(folder)
    (tmp_path / "config.json").write_text('{"recipe"')
    with pytest.raises(UserError, match=r"config\.json: not whole JSON"):
        report(tmp_path)


def test_thinning_loses_no_spike():
    values = [1.0] * 10_001
    values[1234], values[5678] = 50.0, math.nan
    steps, low, mean, high = _thin(([*map(float, range(10_001))], values))
    assert len(steps) == len(low) == len(mean) == len(high) <= 400
    assert max(high) == 50.0
    assert min(low) == 1.0
    assert steps[-1] == 10_000
    assert all(map(math.isfinite, mean))


def test_a_chart_has_only_the_colours_of_the_page():
    svg = _svg("loss", [([1.0, 2.0], [3.0, 1.0]), ([1.0, 2.0], [3.0, 2.0])])
    assert set(re.findall(r"var\(--(\w+)\)", svg)) == {"dim", "rule", "c0", "c1"}
    assert not re.search(r"#[0-9a-f]{6}\b(?!\))", svg.split("</style>")[-1].replace('href="#', ""))
