"""GPT on shards and on one text: the same bytes however it is run, text written, weights that come and go."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import worlds

from dltrain import checkpoint
from dltrain.commands import sample
from dltrain.commands.trained import trained
from dltrain.data.corpus import shards_of, tokenizer_of
from dltrain.data.shards import Shards
from dltrain.data.tokens import write_tokens
from dltrain.errors import UserError
from dltrain.models.gpt import Gpt, GptConfig
from dltrain.recipes import gpt_pretrain
from dltrain.recipes.gpt_pretrain import PRESETS, Config, data, main, model_config

DEBUG = PRESETS["debug"]
SHORT = replace(DEBUG, steps=3, lanes=2, eval_every=0, save_every=0)
TEXT = "".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(100))


def train(cfg: Config) -> dict[str, torch.Tensor]:
    """The weights after a run in this process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        main(cfg)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    return checkpoint.read(checkpoint.steps(Path(cfg.out) / "checkpoints")[-1])


def killed_after_seven(cfg: Config) -> None:
    cosine = gpt_pretrain.cosine

    def dying(*args, **kwargs):
        def multiplier(step: int) -> float:
            if step == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return cosine(*args, **kwargs)(step)

        return multiplier

    gpt_pretrain.cosine = dying
    main(cfg)


def run(out: Path, world: int, strategy: str, work=main) -> tuple[str, bytes]:
    worlds.launch(world, work, replace(DEBUG, out=str(out), strategy=strategy), env={"DLTRAIN_DEVICE": "cpu"})
    return toy.outcome(out)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, tuple[str, bytes]]:
    out = tmp_path_factory.mktemp("reference") / "run"
    return out, run(out, 1, "single")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_and_resumed_on_two_processes_gives_the_same_bytes(tmp_path, reference, strategy):
    with pytest.raises(worlds.Died, match="-9"):
        run(tmp_path / "run", 2, strategy, killed_after_seven)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    assert run(tmp_path / "run", 2, strategy) == reference[1]


def test_the_report_continues_held_out_text(reference):
    results = json.loads((reference[0] / "results.json").read_text())
    (figure,) = results["figures"]
    evals = [row["eval/loss"] for row in toy.rows_of(reference[0]) if "eval/loss" in row]
    assert figure["value"] == evals[-1] < evals[0]
    assert 4.0 < figure["baseline"] < np.log(512)
    assert len(results["samples"]) == 4 and all(s["filled"] for s in results["samples"])
    assert (reference[0] / "report.html").stat().st_size > 10_000


def test_sample(reference, capsys):
    def written(*args: object) -> str:
        sample.main([str(reference[0]), "--prompt", "What is", "--tokens", "30", *map(str, args)])
        return capsys.readouterr().out

    assert written("--seed", 1) == written("--seed", 1) != written("--seed", 2)
    assert written().startswith("What is") and len(written()) > 30
    assert written("--top-k", 1) == written("--temperature", 0)
    with pytest.raises(UserError, match="no words"):
        trained(reference[0], "words")
    with pytest.raises(UserError, match=r"config\.json"):
        sample.main([str(reference[0].parent), "--prompt", "What is"])


def test_one_text_by_characters(tmp_path, capsys):
    """Windows at every offset to train on, the end held out; then text from the run."""
    (tmp_path / "it.txt").write_text(TEXT)
    cfg = replace(SHORT, data=str(tmp_path / "it.txt"), vocab=len(set(TEXT)), pack=False, held_out=0.1)
    tokenizer, rows, unseen = data(cfg)
    end = round(len(TEXT) * 0.9)
    assert len(rows) == end - cfg.row and len(unseen) == (len(TEXT) - end - 1) // cfg.row
    first = unseen.batch(np.zeros(1, np.int64), np.zeros(1, np.int64))["ids_BL"][0].tolist()
    assert tokenizer.decode(first) == TEXT[end : end + cfg.row]
    weights = train(replace(cfg, out=str(tmp_path / "run")))
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())
    capsys.readouterr()
    sample.main([str(tmp_path / "run"), "--prompt", "the ", "--tokens", "50"])
    out = capsys.readouterr().out
    assert out.startswith("the ") and len(out) == 55 and set(out) <= set(TEXT)
    for change, message in [
        ({"vocab": 60}, "tokens, --vocab is 60"),
        ({"pack": True}, "no documents to --pack"),
        ({"data": str(tmp_path / "no.txt")}, "DLTRAIN_DATA"),
    ]:
        with pytest.raises(UserError, match=message):
            data(replace(cfg, **change))


@pytest.mark.parametrize("pack", [False, True])
def test_shards_of_tokens_train_as_shards_of_text(tmp_path, pack):
    """Every token of every document but its first is a target once; with no packing the firsts are too, but one."""
    shards = shards_of(DEBUG.data)
    tokenizer = tokenizer_of(shards, "", kind="bpe", vocab=DEBUG.vocab)
    texts = [(f"{i}", shards[i]["txt"].decode()) for i in range(40)]
    write_tokens(texts, tokenizer, tmp_path, "it")
    cache = Path(os.environ["DLTRAIN_CACHE"])
    (model,) = cache.glob(f"tokenizer-bpe-512-{shards.fingerprint[:16]}/tokenizer.model")
    cfg = replace(SHORT, data=str(tmp_path / "*.tar"), tokenizer=str(model), pack=pack, held_out=0.2)
    _, *both = data(cfg)
    assert len(Shards(cfg.data)) == 40
    targets: list[int] = []
    for rows in both:
        index = np.arange(len(rows))
        batch = rows.batch(np.zeros_like(index), index)
        targets += batch["targets_BL"][batch["targets_BL"] >= 0].tolist()
    lengths = [len(tokens) for tokens in tokenizer.encode([text for _, text in texts])]
    assert targets.count(tokenizer.sep) == 40
    assert len(targets) == sum(lengths) + (0 if pack else 40 - 2)
    if not pack:
        train(replace(cfg, out=str(tmp_path / "run"), steps=2))


def test_export_to_transformers_and_import_from_it(reference, tmp_path):
    transformers = pytest.importorskip("transformers")
    recipe, cfg, weights = trained(reference[0], "export")
    recipe.export(cfg, weights, tmp_path / "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    ours, ids = recipe.load(cfg, weights), torch.arange(64).view(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(input_ids=ids).logits, rtol=0, atol=1e-5)
    still = replace(SHORT, steps=1, warmup=0, lr=0.0, init=str(tmp_path / "hf"), out=str(tmp_path / "from"), seed=9)
    again = train(still)
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_presets():
    """The sizes of the papers: GPT-2's as transformers counts them, GPT-3's to the digits of its table 2.1."""
    with torch.device("meta"):
        count = {
            name: sum(p.numel() for p in Gpt(model_config(PRESETS[name])).parameters())
            for name in ("claim", "gpu", "gpt2-medium", "paper", "gpt3-small", "gpt3-2.7b")
        }
    assert (count["gpt2-medium"], count["paper"]) == (354_823_168, 1_557_611_200)
    assert round(count["gpt3-small"], -6) == 125e6 and round(count["gpt3-2.7b"], -8) == 2.7e9
    assert 0.80e6 < count["claim"] < 0.82e6 and 10.6e6 < count["gpu"] < 10.8e6
    sizes = {name: flat(model_config(cfg)) for name, cfg in PRESETS.items()}
    assert 174e9 < sizes["gpt3-175b"] < 175.5e9 and 12.8e9 < sizes["gpt3-13b"] < 13.1e9
    for name, cfg in PRESETS.items():
        assert cfg.batch % max(cfg.micro_batch, 1) == 0, name
        if name.startswith("gpt3"):
            assert cfg.steps * cfg.batch * cfg.row == pytest.approx(300e9, rel=1e-3)


def flat(cfg: GptConfig) -> int:
    """Parameters of the matrices."""
    return cfg.layers * 12 * cfg.width**2 + cfg.vocab * cfg.width


def test_the_checklist_passes_on_the_debug_preset(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        main(replace(DEBUG, debug=True, out="unused"))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert sum(line.startswith("ok  ") for line in lines) == 8
