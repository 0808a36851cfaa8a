"""BERT pre-training: masked LM, next sentence. Devlin et al. 2018, https://arxiv.org/abs/1810.04805, section 3.1, A.2.

    accelerate launch recipes/bert_pretrain.py base --shards 'wiki-{000..511}.tar' --strategy fsdp

and RoBERTa's objective (Liu et al. 2019, https://arxiv.org/abs/1907.11692, section 4): full sentences, no next-sentence
task. Masks are drawn anew each epoch in both (the paper's code fixed ten).

Departs from the paper: sentencepiece instead of WordPiece; AdamW corrects the bias of its moments; a row's
next-sentence term is weighted by the row's number of predictions, so that one global count divides both losses; a
second half that was replaced is not used elsewhere in that epoch, and what replaces it is of about its length, or the
length would tell; rows of 512 tokens throughout in `base` and `large`.

Measured: see docs/bert.md, which the commands named there regenerate.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
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


LARGE_SCALE = {"precision": "bf16", "row": 512, "dropout": 0.1, "held_out": 0.001, "log_every": 100, "workers": 4}
BASE = Config(
    steps=1_000_000, batch=256, micro_batch=32, vocab=30522, lr=1e-4, warmup=10_000, layers=12, width=768, heads=12,
    save_every=2500, eval_every=10_000, **LARGE_SCALE,
)  # fmt: skip
PRESETS = {
    "tiny": Config(steps=3600, log_every=100, eval_every=900, save_every=300),
    "debug": Config(
        shards="embedded:topics", steps=10, batch=24, lanes=4, row=32, vocab=512, width=32, dropout=0.1, warmup=2,
        log_every=1, save_every=5, eval_every=5,
    ),
    "base": BASE,
    "large": replace(BASE, micro_batch=16, layers=24, width=1024, heads=16),
    "roberta-base": replace(
        BASE, objective="roberta", tokenizer_kind="bpe", steps=500_000, batch=8192, vocab=50265, lr=6e-4, warmup=24_000,
        beta2=0.98, clip=0.0, save_every=1000, eval_every=5000,
    ),
}  # fmt: skip

if __name__ == "__main__":
    dltrain.answer_help(Config, PRESETS)  # before torch is imported, which takes over a second

import numpy as np
import torch
from torch import Tensor, nn

from dltrain import ops
from dltrain.data.corpus import tokenised
from dltrain.data.order import split
from dltrain.data.text import TokenStore, document_chunks, stream_chunks
from dltrain.errors import UserError
from dltrain.models.bert import BertConfig, BertPretraining, flops_per_row
from dltrain.models.exchange import from_huggingface, to_huggingface, write_huggingface
from dltrain.optim import adamw
from dltrain.report import conclude, farewell
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
        self.pairs = cfg.objective == "bert"
        cut = document_chunks if self.pairs else stream_chunks
        self.chunks_N2 = cut(store, cfg.row - (3 if self.pairs else 2), documents)
        self.documents_N = np.searchsorted(store.document_ends, self.chunks_N2[:, 0], side="right")
        self.predictions = max(1, round(cfg.row * cfg.masked))
        self.fingerprint = f"{store.fingerprint[:16]}-{len(documents)}-{cfg.objective}-{cfg.row}-{cfg.masked}"
        if self.pairs and len(np.unique(self.documents_N)) < 2:
            raise UserError(
                f"{len(documents)} documents of {cfg.shards} are too few for pairs: give more, or another --held-out"
            )

    def __len__(self) -> int:
        return len(self.chunks_N2)

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Tensor]:
        B, L, P = len(index_M), self.cfg.row, self.predictions
        ids_BL = np.full((B, L), self.tokenizer.pad, np.int64)
        segments_BL, lengths_B, next_B = np.zeros((B, L), np.int64), np.zeros(B, np.int64), np.zeros(B, np.int64)
        positions_BP, targets_BP = np.zeros((B, P), np.int64), np.full((B, P), -100, np.int64)
        for b, (epoch, row) in enumerate(zip(epoch_M.tolist(), index_M.tolist(), strict=True)):
            if row < 0:
                continue
            random = np.random.Generator(np.random.Philox(key=key("row", self.cfg.seed, epoch, row)))
            ids, segments, next_B[b] = self.pair(row, random) if self.pairs else self.full_sentences(row)
            positions = self.mask(ids, random)
            targets_BP[b, : len(positions)] = ids[positions]
            positions_BP[b, : len(positions)] = positions
            self.corrupt(ids, positions, random)
            lengths_B[b] = len(ids)
            ids_BL[b, : len(ids)], segments_BL[b, : len(ids)] = ids, segments
        arrays = {"ids_BL": ids_BL, "segments_BL": segments_BL, "lengths_B": lengths_B, "next_B": next_B}
        arrays |= {"positions_BP": positions_BP, "targets_BP": targets_BP, "count": np.array((targets_BP >= 0).sum())}
        return {k: torch.from_numpy(v) for k, v in arrays.items()}

    def pair(self, row: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """[CLS] A [SEP] B [SEP]: B goes on after A (0), or half of the time comes from another document (1)."""
        first, last = self.chunks_N2[row]
        cut = int(random.integers(first + 1, last)) if last - first > 1 else last
        a = self.store.span(first, cut)[: self.cfg.row - 4]  # leaves B a token
        b, label = self.store.span(cut, last), 0
        if cut == last or random.random() < 0.5:
            b, label = self.second_half(row, len(b) or self.cfg.row - 3 - len(a), random), 1
        b = b[: self.cfg.row - 3 - len(a)]
        ids = np.concatenate([[self.tokenizer.cls], a, [self.tokenizer.sep], b, [self.tokenizer.sep]]).astype(np.int64)
        return ids, np.repeat([0, 1], [len(a) + 2, len(b) + 1]), label

    def second_half(self, row: int, tokens: int, random: np.random.Generator) -> np.ndarray:
        """Of 64 second halves from other documents the nearest in length, or the length alone would give it away."""
        other_K = random.integers(len(self), size=64)
        while (self.documents_N[other_K] == self.documents_N[row]).all():
            other_K = random.integers(len(self), size=64)
        first_K, last_K = self.chunks_N2[other_K[self.documents_N[other_K] != self.documents_N[row]]].T
        cut_K = random.integers(first_K + (last_K - first_K > 1), last_K)
        ends = self.store.sentence_ends
        length_K = ends[last_K - 1] - np.where(cut_K > 0, ends[cut_K - 1], 0)
        best = np.abs(length_K - tokens).argmin()
        return self.store.span(cut_K[best], last_K[best])

    def full_sentences(self, row: int) -> tuple[np.ndarray, np.ndarray, int]:
        """[CLS] sentences [SEP], with a [SEP] where a document ends inside (RoBERTa, section 4.2)."""
        first, last = (int(s) for s in self.chunks_N2[row])
        ends = self.store.document_ends[np.searchsorted(self.store.document_ends, first, side="right") :]
        inside = np.unique(ends[: np.searchsorted(ends, last)])
        bounds = [first, *inside.tolist(), last]
        parts = [[self.tokenizer.cls]]
        for begin, end in pairwise(bounds):
            parts += [self.store.span(begin, end), [self.tokenizer.sep]]
        ids = np.concatenate(parts).astype(np.int64)
        return ids, np.zeros_like(ids), 0

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
        logits_BPV, next_B2 = self.model(
            batch["ids_BL"], batch["segments_BL"], batch["lengths_B"], batch["positions_BP"]
        )
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
        positions=max(512, cfg.row), segments=2 if bert else 1, next_sentence=bert,
    )  # fmt: skip


def data(cfg: Config) -> tuple[BertRows, BertRows]:
    """Rows to train on and held-out ones. Tokenizer (where none is given) and tokens are made once and kept."""
    tokenizer, store = tokenised(
        cfg.shards, cfg.tokenizer, kind=cfg.tokenizer_kind, vocab=cfg.vocab, longest=min(64, cfg.row // 2)
    )
    training, held_out = split(store.key_hashes, cfg.held_out)
    return BertRows(cfg, tokenizer, store, training), BertRows(cfg, tokenizer, store, held_out)


def unigram(cfg: Config, unseen: BertRows) -> tuple[float, float]:
    """Loss (nats) and accuracy at the held-out predictions of always answering with the tokens' frequencies."""
    counts_V = unseen.store.token_counts(cfg.vocab) + 1.0
    index_N = np.arange(len(unseen))
    targets = unseen.batch(np.zeros_like(index_N), index_N)["targets_BP"].numpy()
    targets = targets[targets >= 0]
    return float(-np.log(counts_V / counts_V.sum())[targets].mean()), float((targets == counts_V.argmax()).mean())


@torch.no_grad()
def fill_in(cfg: Config, weights: dict[str, Tensor], unseen: BertRows, wanted: int = 5) -> list[dict[str, str]]:
    """A word of a held-out sentence masked, and the three that the model would put there."""
    task = PretrainBert(model_config(cfg)).eval()
    task.load_state_dict(weights)
    tokenizer, store, found = unseen.tokenizer, unseen.store, []
    for first, last in unseen.chunks_N2[:: max(1, len(unseen) // 50)]:
        sentence = next((s for i in range(first, last) if 8 <= len(s := store.span(i, i + 1)) <= 24), None)
        if sentence is None or len(found) == wanted:
            continue
        pieces = [tokenizer.piece(t) for t in sentence]
        whole = [i for i in range(len(pieces) - 1) if pieces[i][0] == pieces[i + 1][0] == "\u2581"]
        words = [i for i in whole if len(pieces[i]) > 4]
        if not words:
            continue
        at = words[len(words) // 2]
        ids_BL = torch.tensor([[tokenizer.cls, *sentence.tolist(), tokenizer.sep]])
        truth, ids_BL[0, at + 1] = int(ids_BL[0, at + 1]), tokenizer.mask
        logits_BPV, _ = task.model(
            ids_BL, torch.zeros_like(ids_BL), torch.tensor([ids_BL.shape[1]]), torch.tensor([[at + 1]])
        )
        best, right = (
            [tokenizer.piece(t).removeprefix("\u2581") for t in ts] for ts in (logits_BPV[0, 0].topk(3)[1], [truth])
        )
        masked = tokenizer.decode(ids_BL[0, 1:-1].tolist())
        found.append({"masked": masked, "filled": ", ".join(best), "truth": right[0]})
    return found


def figures_beside(unigram: tuple[float, float], means: dict[str, float]) -> list[dict[str, Any]]:
    names = [("masked-LM loss", "mlm_loss", "lower"), ("masked-LM accuracy", "mlm_accuracy", "higher")]
    return [
        {"name": name, "value": means[k], "baseline": base, "better": better}
        for (name, k, better), base in zip(names, unigram, strict=True)
    ]


def export(cfg: Config, weights: dict[str, Tensor], folder: Path) -> None:
    """What `dltrain export` calls: for transformers.BertForPreTraining.from_pretrained(folder)."""
    state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    write_huggingface(folder, *to_huggingface(state, model_config(cfg)))


def start(cfg: Config) -> dict[str, Tensor]:
    """Weights from a folder in Hugging Face's layout."""
    theirs, state = from_huggingface(cfg.init)
    ours = model_config(cfg)
    if differ := [
        f"{k} is {v} there, {getattr(ours, k)} here" for k, v in vars(theirs).items() if v != getattr(ours, k)
    ]:
        raise UserError(f"{cfg.init} is of another model: {'; '.join(differ)}")
    return {f"model.{name}": tensor for name, tensor in state.items()}


def main(cfg: Config) -> None:
    def build() -> nn.Module:
        return PretrainBert(model_config(cfg))

    optimizer_of = adamw(cfg.lr, betas=(0.9, cfg.beta2), eps=1e-6, decay=cfg.decay)
    schedule = linear(cfg.warmup, cfg.steps)
    if cfg.debug:
        rows, _ = data(cfg)
        chance = math.log(cfg.vocab) + (math.log(2) if cfg.objective == "bert" else 0.0)
        return dltrain.checklist(cfg, build, optimizer_of, schedule, rows, chance=chance, decode=rows.decode)
    with dltrain.Run(cfg) as run:
        rows, unseen = run.everywhere(lambda: data(cfg))
        run.measure(flops_per_row(model_config(cfg), cfg.row, rows.predictions), cfg.row)
        task, optimizer = run.prepare(build, optimizer_of, (lambda: start(cfg)) if cfg.init else None)
        means = dltrain.fit(run, task, optimizer, schedule, run.batches(rows), evals={"eval": unseen})
        if means:  # none if the run was done before

            def results() -> dict[str, Any]:
                notes = [f"baseline: token frequencies; {len(unseen):,} held-out rows of {cfg.row} tokens"]
                figures = figures_beside(unigram(cfg, unseen), means["eval"])
                return {"figures": figures, "samples": fill_in(cfg, run.weights(), unseen), "notes": notes}

            conclude(run, results)
        farewell(run, NEXT)


if __name__ == "__main__":
    dltrain.cli(main, Config, PRESETS)
