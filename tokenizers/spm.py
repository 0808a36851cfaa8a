"""sentencepiece: train, load, encode. The only importer of sentencepiece; no torch.

Unigram: Kudo 2018, https://arxiv.org/abs/1804.10959. BPE: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909.
Beside `name.model` lies its spec, `name.json`: kind, vocab, the special tokens' numbers, the model's SHA-256, the
SHA-256 of the text it was trained on, and the version of sentencepiece. Equal text and settings give equal bytes.
"""

import hashlib
import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

from dltrain.errors import UserError
from dltrain.files import write_atomic
from dltrain.progress import track

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}  # numbers 0 ... 4
SAMPLE = 10_000_000  # bytes of text to train on at most


class Tokenizer:
    """A sentencepiece model with BERT's special tokens; `digest` (SHA-256 of the model) names it. Picklable."""

    def __init__(self, model: bytes, kind: str, named: Path):
        """UserError, calling the model `named`, if it is none or lacks a special token."""
        from sentencepiece import SentencePieceProcessor

        self.kind, self.digest = kind, hashlib.sha256(model).hexdigest()
        self._state = (model, kind, named)
        try:
            self._processor = SentencePieceProcessor(model_proto=model, num_threads=1)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{named}: not a sentencepiece model; train or copy it anew") from error
        self.vocab_size: int = self._processor.vocab_size()
        numbers = {piece: i for i in range(min(self.vocab_size, 1000)) if (piece := self.piece(i)) in SPECIAL.values()}
        if lacking := [piece for piece in SPECIAL.values() if piece not in numbers]:
            raise UserError(
                f"{named}: no special token {' '.join(lacking)}; train it with dltrain.tokenizers.spm.train"
            )
        self.pad, self.unk, self.cls, self.sep, self.mask = (numbers[piece] for piece in SPECIAL.values())
        self._special = frozenset(numbers.values())

    def __reduce__(self):
        return Tokenizer, self._state

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token numbers of each text, without special tokens: "[MASK]" in a text is plain text."""
        return self._processor.encode(texts, out_type=int)

    def arrays(self, texts: list[str]) -> list[Any]:
        """As `encode`, as int32 arrays: no Python number is made of a token, which takes a fifth of the time."""
        return self._processor.encode_as_numpy(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text; special tokens appear as [CLS], [MASK], ..."""
        parts: list[str] = []
        run: list[int] = []
        for i in [*map(int, ids), -1]:  # -1 ends the last run
            if i >= 0 and i not in self._special:
                run.append(i)
                continue
            if run:
                parts.append(self._processor.decode(run))
            if i >= 0:
                parts.append(self.piece(i))
            run = []
        return " ".join(parts)

    def piece(self, id: int) -> str:
        return self._processor.id_to_piece(int(id))


def train(
    texts: Iterable[str], model: Path, *, vocab: int, kind: Literal["unigram", "bpe"], lowercase: bool = False
) -> Tokenizer:
    """Train on at most 10 MB of `texts`, evenly sampled, and write `model` and its spec.

    `vocab` counts the 5 special tokens. UserError where the text yields no vocabulary of that size.
    """
    import sentencepiece

    lines = _sample(track(texts, "reading text for the tokenizer"))
    if not lines:
        raise UserError(f"no text to train {model} on; check the shards")
    writer = io.BytesIO()
    options: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": vocab,
        "num_threads": 1,  # the number of threads changes the model
        "seed_sentencepiece_size": 12 * vocab,  # the default million takes most of the time and gains nothing on 10 MB
        "max_sentence_length": SAMPLE,
        "normalization_rule_name": "nmt_nfkc_cf" if lowercase else "nmt_nfkc",
        "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "control_symbols": [SPECIAL["mask"]],
        "pad_piece": SPECIAL["pad"], "unk_piece": SPECIAL["unk"], "bos_piece": SPECIAL["cls"], "eos_piece":
        SPECIAL["sep"], "minloglevel": 2,
    }  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        trainer = sentencepiece.SentencePieceTrainer
        job = pool.submit(trainer.train, sentence_iterator=iter(lines), model_writer=writer, **options)
        for _ in track(_seconds(job), f"training {kind} tokenizer, seconds"):
            pass
    if error := job.exception():
        raise _explained(error, model, vocab)
    tokenizer = Tokenizer(writer.getvalue(), kind, model)
    spec = {
        "kind": kind,
        "vocab": vocab,
        "lowercase": lowercase,
        "special": {name: getattr(tokenizer, name) for name in SPECIAL},
        "sha256": tokenizer.digest,
        "source": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "sentencepiece": sentencepiece.__version__,
    }
    model.parent.mkdir(parents=True, exist_ok=True)
    _publish(model, writer.getvalue())
    _publish(model.with_suffix(".json"), (json.dumps(spec, indent=2) + "\n").encode())  # last: it vouches for the model
    return tokenizer


def load(path: Path) -> Tokenizer:
    """UserError if the model or its spec is missing, they do not belong together, or a special token is lacking."""
    spec_path = path.with_suffix(".json")
    try:
        model = path.read_bytes()
        spec = json.loads(spec_path.read_bytes())
        kind, sha256 = spec["kind"], spec["sha256"]
    except OSError as error:
        raise UserError(
            f"tokenizer {error.filename}: {error.strerror}; a model needs its .json spec beside it"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{spec_path}: not a tokenizer's spec ({error}); train or copy the tokenizer anew") from error
    if hashlib.sha256(model).hexdigest() != sha256:
        raise UserError(f"{path}: its SHA-256 is not the one in {spec_path.name}; train or copy the tokenizer anew")
    return Tokenizer(model, kind, path)


def _sample(texts: Iterable[str]) -> list[str]:
    """Every k-th line, k the smallest power of two at which they fit: one pass, even coverage, no random numbers."""
    kept: list[str] = []
    size, stride = 0, 1
    for seen, line in enumerate(line for text in texts for line in text.splitlines() if line.strip()):
        if seen % stride == 0:
            kept.append(line)
            size += len(line.encode())
        while size > SAMPLE and len(kept) > 1:
            kept = kept[::2]
            size = sum(len(line.encode()) for line in kept)
            stride *= 2
    return kept


def _seconds(job: Future) -> Iterator[int]:
    """Count the seconds until `job` is done; sentencepiece itself tells nothing until then."""
    start = time.monotonic()
    while not job.done():
        wait([job], timeout=1.0)
        yield int(time.monotonic() - start)


def _explained(error: BaseException, model: Path, vocab: int) -> Exception:
    if largest := re.search(r"value <= (\d+)", str(error)):
        return UserError(f"a vocabulary of {vocab} is too large for this text; the largest possible is {largest[1]}")
    if smallest := re.search(r"\d+ vs (\d+)", str(error)):
        return UserError(f"a vocabulary of {vocab} is too small for this text; the smallest possible is {smallest[1]}")
    return UserError(f"cannot train {model}: {str(error).splitlines()[-1]}")


def _publish(path: Path, content: bytes) -> None:
    try:
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free the disk or choose another folder") from error
