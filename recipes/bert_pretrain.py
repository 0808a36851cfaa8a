"""BERT pre-training: masked LM, next sentence. Devlin et al. 2018, https://arxiv.org/abs/1810.04805, section 3.1, A.2.

    accelerate launch recipes/bert_pretrain.py base --shards 'wiki-{000..511}.tar' --strategy fsdp

and RoBERTa's objective (Liu et al. 2019, https://arxiv.org/abs/1907.11692, section 4): full sentences, no next-sentence
task. Masks are drawn anew each epoch in both (the paper's code fixed ten). `paper` is BERT-LARGE.

Departs from the paper: sentencepiece instead of WordPiece; AdamW corrects the bias of its moments; a row's
next-sentence term is weighted by the row's number of predictions, so that one global count divides both losses; a
second half that was replaced is not used elsewhere in that epoch, and what replaces it is of about its length, or the
length would tell; rows of 512 tokens throughout. Measured, also `gpu`: docs/bert.md; `claim`: recipes/README.md.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import dltrain


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    shards: str = "embedded:docs"  # webdataset pattern, a document (.txt) a sample; or embedded:docs, topics
    held_out: float = 0.05  # of the documents, chosen by a hash of their key
    tokenizer: str = ""  # sentencepiece model; empty: train one on the shards
    tokenizer_kind: Literal["unigram", "bpe"] = "unigram"
    vocab: int = 4096  # tokens, special ones included
    objective: Literal["bert", "roberta"] = "bert"
    left_only: bool = False  # each token sees those before it alone: what `claim` compares with
    batch: int = 16  # rows per optimizer step, over all ranks
    row: int = 64  # tokens
    masked: float = 0.15  # of tokens: 80% become [MASK], 10% random, 10% stay
    lr: float = 1e-3  # peak
    warmup: int = 200  # optimizer steps
    decay: float = 0.01  # of weights; not of biases and norms
    beta2: float = 0.999
    layers: int = 2
    width: int = 128
    heads: int = 2
    dropout: float = 0.0  # a model this small underfits; the paper's sizes have 0.1
    init: str = ""  # folder in Hugging Face's layout to start from


BASE = Config(
    steps=1_000_000, batch=256, micro_batch=32, row=512, vocab=30522, lr=1e-4, warmup=10_000, layers=12, width=768,
    heads=12, dropout=0.1, held_out=0.001, precision="bf16", log_every=100, save_every=2500, eval_every=5000, workers=4,
)  # fmt: skip
LARGE = replace(BASE, micro_batch=16, layers=24, width=1024, heads=16)
PRESETS = {
    "tiny": Config(steps=3600, log_every=100, eval_every=900, save_every=300),
    "debug": Config(
        shards="embedded:topics", steps=10, batch=24, lanes=4, row=32, vocab=512, width=32, dropout=0.1, warmup=2,
        log_every=1, save_every=5, eval_every=5,
    ),
    "claim": Config(
        seed=40, objective="roberta", tokenizer_kind="bpe", vocab=128, held_out=0.01, steps=1000, batch=64, row=16,
        width=64, heads=4, lr=4e-3, warmup=100, log_every=100, eval_every=250,
    ),
    "gpu": replace(
        BASE, shards="books/*.tar", steps=6000, micro_batch=128, row=128, lr=4e-4, warmup=600, held_out=0.02,
        save_every=1000, eval_every=1500, compile=True,
    ),
    "paper": LARGE,
    "base": BASE,
    "large": LARGE,
    "roberta-base": replace(
        BASE, objective="roberta", tokenizer_kind="bpe", steps=500_000, batch=8192, vocab=50265, lr=6e-4, warmup=24_000,
        beta2=0.98, clip=0.0, save_every=1000, eval_every=5000,
    ),
}  # fmt: skip

if __name__ == "__main__":
    dltrain.answer_help(Config, PRESETS)  # before torch is imported, which takes over a second

import numpy as np
from torch import Tensor, nn

from dltrain import ops
from dltrain.claim import Figure, judge, logged
from dltrain.data.corpus import tokenised
from dltrain.data.order import split
from dltrain.data.sentences import FullSentences, MaskedRow, SentencePairs, collate, short_sentences
from dltrain.data.text import TokenStore
from dltrain.flops import Work
from dltrain.models import cloze
from dltrain.models.bert import BertConfig, BertPretraining
from dltrain.models.exchange import to_huggingface, weights_for, write_huggingface
from dltrain.optim import adamw
from dltrain.report import conclude, concluded, farewell, figure
from dltrain.schedules import linear
from dltrain.seeds import key
from dltrain.tokenizers.spm import Tokenizer

# B rows of a micro-batch, L tokens of a row, P predicted positions of a row, V vocabulary
NEXT = """

What to try next:
  open {out}/report.html in a browser
  {python} -m dltrain export {out} bert-hf     # for transformers.BertForPreTraining.from_pretrained("bert-hf")
  {python} -m torch.distributed.run --nproc_per_node 2 {script} tiny --out runs/two
  {python} {script} tiny --debug     # a checklist for when something is off"""


class BertRows:
    """Masked rows of a token store, each a function of (seed, epoch, row): masks are dynamic and resume is exact."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer, store: TokenStore, documents: np.ndarray):
        self.cfg, self.tokenizer, self.store = cfg, tokenizer, store
        self.text = (SentencePairs if cfg.objective == "bert" else FullSentences)(store, tokenizer, documents, cfg.row)
        self.predictions = max(1, round(cfg.row * cfg.masked))
        self.fingerprint = f"{store.fingerprint[:16]}-{len(documents)}-{cfg.objective}-{cfg.row}-{cfg.masked}"

    def __len__(self) -> int:
        return len(self.text.chunks_N2)

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Tensor]:
        rows = [self.row(epoch, n) for epoch, n in zip(epoch_M.tolist(), index_M.tolist(), strict=True)]
        return collate(rows, self.cfg.row, self.predictions, self.tokenizer.pad)

    def row(self, epoch: int, n: int) -> MaskedRow | None:
        if n < 0:
            return None
        random = np.random.Generator(np.random.Philox(key=key("row", self.cfg.seed, epoch, n)))
        ids, segments, label = self.text.row(n, random)
        positions = self.mask(ids, random)
        targets = ids[positions]
        self.corrupt(ids, positions, random)
        return MaskedRow(ids, segments, label, positions, targets)

    def decode(self, batch: dict[str, Tensor]) -> str:
        """The first row as the model sees it, with what it must predict."""
        ids, targets = batch["ids_BL"][0, : int(batch["lengths_B"][0])], batch["targets_BP"][0]
        hidden = [self.tokenizer.piece(t) for t in targets.tolist() if t >= 0]
        return f"{self.tokenizer.decode(ids.tolist())}  <- {' '.join(hidden)}"

    def mask(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The positions to predict, in order: `masked` of the row, never a special token."""
        candidates = np.flatnonzero((ids != self.tokenizer.cls) & (ids != self.tokenizer.sep))
        n = min(self.predictions, len(candidates), max(1, round(len(ids) * self.cfg.masked)))
        return np.sort(random.permutation(candidates)[:n])

    def corrupt(self, ids: np.ndarray, positions: np.ndarray, random: np.random.Generator) -> None:
        """80% [MASK], 10% a random token, 10% unchanged (appendix A.1)."""
        draw = random.random(len(positions))
        ids[positions[draw < 0.8]] = self.tokenizer.mask
        ids[positions[draw >= 0.9]] = random.integers(5, self.cfg.vocab, (draw >= 0.9).sum())


class PretrainBert(nn.Module):
    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.model = BertPretraining(cfg)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the predicted positions, of which there are batch["count"]."""
        targets_BP = batch["targets_BP"]
        inputs = (batch[name] for name in ("ids_BL", "segments_BL", "lengths_B", "positions_BP"))
        logits_BPV, next_B2 = self.model(*inputs)
        mlm = ops.cross_entropy(logits_BPV.flatten(0, 1), targets_BP.flatten(), reduction="sum")
        sums = {"loss": mlm, "mlm_loss": mlm, "mlm_accuracy": (logits_BPV.argmax(-1) == targets_BP).sum()}
        if next_B2 is not None:
            weight_B = (targets_BP >= 0).sum(-1)  # over all rows these add up to the count
            nsp = (ops.cross_entropy(next_B2, batch["next_B"], reduction="none") * weight_B).sum()
            right = ((next_B2.argmax(-1) == batch["next_B"]) * weight_B).sum()
            sums |= {"loss": mlm + nsp, "nsp_loss": nsp, "nsp_accuracy": right}
        return sums


def model_config(cfg: Config) -> BertConfig:
    bert = cfg.objective == "bert"
    return BertConfig(
        vocab=cfg.vocab, layers=cfg.layers, width=cfg.width, heads=cfg.heads, mlp=4 * cfg.width, dropout=cfg.dropout,
        positions=max(512, cfg.row), segments=2 if bert else 1, next_sentence=bert, causal=cfg.left_only,
    )  # fmt: skip


def data(cfg: Config) -> tuple[BertRows, BertRows]:
    """Rows to train on and held-out ones. Tokenizer (where none is given) and tokens are made once and kept."""
    kind, longest = cfg.tokenizer_kind, min(64, cfg.row // 2)
    tokenizer, store = tokenised(cfg.shards, cfg.tokenizer, kind=kind, vocab=cfg.vocab, longest=longest)
    training, held_out = split(store.key_hashes, cfg.held_out)
    return BertRows(cfg, tokenizer, store, training), BertRows(cfg, tokenizer, store, held_out)


def unigram(cfg: Config, unseen: BertRows) -> tuple[float, float]:
    """Loss (nats) and accuracy at the held-out predictions of always answering with the tokens' frequencies."""
    counts_V = unseen.store.token_counts(cfg.vocab) + 1.0
    index_N = np.arange(len(unseen))
    targets = unseen.batch(np.zeros_like(index_N), index_N)["targets_BP"].numpy()
    targets = targets[targets >= 0]
    return float(-np.log(counts_V / counts_V.sum())[targets].mean()), float((targets == counts_V.argmax()).mean())


def export(cfg: Config, weights: dict[str, Tensor], folder: Path) -> None:
    """What `dltrain export` calls: for transformers.BertForPreTraining.from_pretrained(folder)."""
    state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    write_huggingface(folder, *to_huggingface(state, model_config(cfg)))


def work(cfg: Config) -> Work:
    row = collate([None], cfg.row, max(1, round(cfg.row * cfg.masked)), pad=0)
    optimizer_of = adamw(cfg.lr, betas=(0.9, cfg.beta2), eps=1e-6, decay=cfg.decay)
    return Work(lambda: PretrainBert(model_config(cfg)), optimizer_of, row, tokens=cfg.row, causal=cfg.left_only)


def main(cfg: Config) -> None:
    does, schedule = work(cfg), linear(cfg.warmup, cfg.steps)
    if cfg.debug:
        rows, _ = data(cfg)
        chance = math.log(cfg.vocab) + (math.log(2) if cfg.objective == "bert" else 0.0)
        return dltrain.checklist(cfg, does.task, does.optimizer, schedule, rows, chance=chance, decode=rows.decode)
    with dltrain.Run(cfg) as run:
        rows, unseen = run.everywhere(lambda: data(cfg))
        run.measure(does)
        start = (lambda: weights_for(model_config(cfg), cfg.init, prefix="model.")) if cfg.init else None
        task, optimizer = run.prepare(does.task, does.optimizer, start)
        means = dltrain.fit(run, task, optimizer, schedule, run.batches(rows), evals={"eval": unseen})
        if not concluded(run):

            def results() -> dict[str, Any]:
                (loss, accuracy), found = unigram(cfg, unseen), means["eval"]
                lower = figure("masked-LM loss", found["mlm_loss"], loss, "lower")
                higher = figure("masked-LM accuracy", found["mlm_accuracy"], accuracy, "higher")
                note = f"baseline: token frequencies; {len(unseen):,} held-out rows of {cfg.row} tokens"
                trained = PretrainBert(model_config(cfg)).eval()
                trained.load_state_dict(run.weights())
                samples = cloze.fill_in(trained.model, unseen.tokenizer, short_sentences(unseen.text))
                return {"figures": [lower, higher], "samples": samples, "notes": [note]}

            conclude(run, results)
        farewell(run, NEXT)


def claim(cfg: Config) -> None:
    """Sections 1 and 5.1: a model that sees both sides beats one that sees the left alone, at the masked positions."""
    loss, accuracy = {}, {}
    for seed in range(cfg.seed, cfg.seed + 2):
        both, left = (replace(cfg, seed=seed, out=f"{cfg.out}/{side}-{seed}") for side in ("both", "left"))
        main(both)
        main(replace(left, left_only=True))
        loss[seed] = logged(left.out, "eval/mlm_loss")[-1] - logged(both.out, "eval/mlm_loss")[-1]
        accuracy[seed] = logged(both.out, "eval/mlm_accuracy")[-1] - logged(left.out, "eval/mlm_accuracy")[-1]
    gap = Figure("masked-LM loss, left-only minus bidirectional (nats)", loss, "positive", least=0.2)
    gain = Figure("masked-LM accuracy, the gain", accuracy, "positive", least=0.03)
    judge(cfg, [gap, gain], tuned_on=(0, 1, 100))


if __name__ == "__main__":
    dltrain.cli(main, Config, PRESETS, claim)
