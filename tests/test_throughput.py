"""The sides of `dltrain bench train` do the same work, take turns, and are measured from outside. 20 s."""

import json
import threading
import time

import pytest
import torch
from torch import nn

from dltrain.commands import bench
from dltrain.errors import UserError
from dltrain.models.bert import BertConfig, BertPretraining
from dltrain.models.exchange import to_huggingface as bert_to_huggingface
from dltrain.models.gpt import Gpt, GptConfig
from dltrain.models.gpt_exchange import to_huggingface
from dltrain.throughput import compare as throughput_compare
from dltrain.throughput import hugging_face, stall, workloads
from dltrain.throughput.compare import BARE, OURS, TRAINER, compare
from dltrain.throughput.phases import PHASES, Memory, Phases, Watched
from dltrain.throughput.plain_gpt import PlainGpt
from dltrain.throughput.turns import Player
from dltrain.throughput.workloads import BertTask, GptTask, Mean, TextModel, bert, gpt, masked_text, resnet, text

CPU = torch.device("cpu")
SMALL = GptConfig(vocab=64, layers=2, width=16, heads=2, positions=8, dropout=0.0)


def tiny():
    return gpt(SMALL, "a tiny GPT", batch=4, micro=2, turn=2)


def batch_of(rows, n: int = 4):
    return rows.batch(torch.zeros(n, dtype=torch.int64).numpy(), torch.arange(n).numpy())


# --- turns ---------------------------------------------------------------------------------------------------------


def counting(steps: list[str], name: str):
    def drive(player: Player) -> None:
        while True:
            player.boundary()
            steps.append(name)

    return drive


def test_players_take_turns():
    steps: list[str] = []
    a, b = Player(counting(steps, "a")), Player(counting(steps, "b"))
    for n in (2, 1):
        a.play(n)
        b.play(3)
    a.end()
    b.end()
    assert "".join(steps) == "aabbbabbb"


def test_a_turn_is_inside_of_what_it_is_given():
    entered = []

    class Here:
        def __enter__(self) -> None:
            entered.append(threading.get_ident())

        def __exit__(self, *error: object) -> None:
            entered.append("left")

    player = Player(counting([], ""), Here)
    player.play(1, Here())
    player.play(1)
    player.end()
    there = entered[0]
    assert there != threading.get_ident()
    assert entered == [there, there, "left", "left", there, "left"]


def test_an_error_of_a_loop_comes_out():
    def drive(player: Player) -> None:
        player.boundary()
        raise ValueError("of the loop")

    player = Player(drive)
    with pytest.raises(ValueError, match="of the loop"):
        player.play(1)
    player.end()


# --- what is measured ----------------------------------------------------------------------------------------------


class Slow(nn.Linear):
    def forward(self, input):
        time.sleep(0.02)
        return super().forward(input)


def test_phases_add_up_to_the_whole():
    rows = Watched(masked_text(50, 8))

    def drive(player: Player) -> None:
        player.module = model = Slow(4, 1)
        player.optimizer = torch.optim.SGD(model.parameters(), 0.1)
        while True:
            player.boundary()
            batch_of(rows)
            model(torch.ones(2, 4)).sum().backward()
            time.sleep(0.03)
            player.optimizer.step()
            time.sleep(0.01)

    player, phases = Player(drive), Phases(CPU)
    player.play(1)
    began = time.perf_counter()
    with phases.of(player, rows):
        player.play(2)
    whole = time.perf_counter() - began
    player.play(1)  # not looked at
    player.end()
    assert tuple(phases.seconds) == PHASES
    assert 0.9 * whole < sum(phases.seconds.values()) <= whole
    assert phases.seconds["forward"] >= 0.04
    assert phases.seconds["between"] >= 0.06
    assert phases.seconds["rest"] >= 0.02
    assert phases.seconds["data"] > 0
    assert phases.seconds["backward"] > 0
    assert phases.seconds["optimizer"] > 0


def test_memory_is_what_stands_at_once():
    there = torch.zeros(1000)
    with Memory(CPU) as memory:
        a = there + 1  # 4,000 bytes
        a.mul_(2)
        a.view(10, 100)
        b = torch.cat([a, a])  # 8,000 more
        del a
        c = b[:1000] + 1  # 4,000 instead of a's
    assert memory.bytes == 12_000
    assert len(c) == 1000


# --- the sides are the same model ----------------------------------------------------------------------------------


def test_gpt_of_all_sides_has_one_loss():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours, batch = GptTask(SMALL), batch_of(text(SMALL.vocab, SMALL.positions))
    state = ours.model.state_dict()
    plain, theirs = PlainGpt(SMALL), hugging_face.Gpt2(SMALL)
    names = {"attention_norm": "norm1", "mlp_norm": "norm2", "layers.": "blocks."}
    renamed = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    plain.load_state_dict(renamed)
    theirs.model.load_state_dict(to_huggingface(state, SMALL)[0], strict=False)
    want = Mean(ours)(**batch)["loss"]
    torch.testing.assert_close(TextModel(plain)(**batch)["loss"], want)
    logits_BLV = Gpt.forward(ours.model, batch["ids_BL"])[:, :-1]  # theirs predicts no token beyond the row
    inside = nn.functional.cross_entropy(logits_BLV.flatten(0, 1), batch["ids_BL"][:, 1:].flatten())
    torch.testing.assert_close(theirs(**batch)["loss"], inside)


def test_bert_of_all_sides_has_one_loss():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    cfg = BertConfig(vocab=64, layers=2, width=16, heads=2, mlp=64, positions=8, dropout=0.0)
    ours, theirs, batch = BertTask(cfg), hugging_face.Bert(cfg), batch_of(masked_text(cfg.vocab, 8))
    assert isinstance(ours.model, BertPretraining)
    theirs.model.load_state_dict(bert_to_huggingface(ours.model.state_dict(), cfg)[0], strict=False)
    torch.testing.assert_close(theirs(**batch)["loss"], Mean(ours)(**batch)["loss"])


# --- the whole -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_compare():
    pytest.importorskip("transformers")
    deterministic = torch.are_deterministic_algorithms_enabled()
    record = compare("tiny", tiny(), 2, CPU)
    torch.use_deterministic_algorithms(deterministic)
    sides = record["sides"]
    assert list(sides) == [OURS, BARE, "plain loop, torch's layers", TRAINER, "Trainer, transformers' model"]
    for side in sides.values():
        assert side["per_second"][1] > 0
        assert side["step_mib"] > 0
        assert side["phase_milliseconds"]["backward"] > 0
        assert side["phase_milliseconds"]["optimizer"] > 0
        assert side["state_mib"] == pytest.approx(sides[OURS]["state_mib"], rel=0.01)  # as many weights and moments
    assert sides[OURS]["times"] is None
    assert sides[BARE]["times"][1] > 0


def test_a_run_without_transformers_leaves_its_sides_out(monkeypatch):
    for module in (throughput_compare, workloads):
        monkeypatch.setattr(module, "installed", lambda package: False)
    load = resnet("resnet-8", 16, 10, "tiny images", timm="resnet18", batch=4, micro=4, turn=1)
    assert list(compare("tiny", load, 2, CPU)["sides"]) == [OURS, BARE]


def test_stall(monkeypatch):
    monkeypatch.setattr(stall, "STEPS", 3)
    found = stall.stall("tiny", tiny(), 2, CPU)
    parameters = sum(p.numel() for p in Gpt(SMALL).parameters())
    assert found["checkpoint_bytes"] == pytest.approx(12 * parameters, rel=0.05)  # weights and two moments
    low, middle, high = found["published_after_seconds"]
    assert -1 < low <= middle <= high < 60
    assert found["next_steps_times"][1] > 0


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    for module in (throughput_compare, workloads):
        monkeypatch.setattr(module, "installed", lambda package: False)
    monkeypatch.setitem(workloads.SIZES, "gpt-tiny", tiny)
    bench.main(["train", "--sizes", "gpt-tiny", "--rounds", "2", "--json", str(tmp_path / "train.json")])
    printed = capsys.readouterr().out
    assert (tmp_path / "train.md").read_text() == printed
    found = json.loads((tmp_path / "train.json").read_text())
    rate = found["sizes"][0]["sides"][OURS]["per_second"][1]
    assert f"| {rate:,.0f} (" in printed
    assert "Left out: transformers is not installed." in printed
    assert found["measured"]["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "gpt5"], "no size gpt5: there are gpt-tiny"),
        (["--sizes", "gpt-tiny,gpt2"], "gpt2 is for a GPU"),
        (["--rounds", "1"], "--rounds 1"),
        (["--json", "nowhere/train.json"], "a folder that exists"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, words, monkeypatch):
    monkeypatch.setenv("DLTRAIN_DEVICE", "cpu")
    with pytest.raises(UserError, match=words):
        bench.main(["train", *arguments])


def test_every_size_can_be_built():
    """Without memory: the large ones too."""
    for name, size in workloads.SIZES.items():
        load = size()
        with torch.device("meta"):
            assert sum(p.numel() for p in load.task().parameters()) > 1e5, name
        assert load.batch % load.micro == 0


def test_bert_is_of_its_papers_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in BertTask(BertConfig()).parameters()) == 110_106_428
    assert bert(BertConfig(), 512, "", batch=1, micro=1, turn=1).per_row == 512
