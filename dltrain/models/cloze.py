"""What a masked language model puts in the place of a word: samples that a person can judge.

L tokens of a sentence, P predicted positions, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from dltrain.models.bert import BertPretraining

SPACE = "\u2581"  # a piece of sentencepiece begins with it where a word does


class Pieces(Protocol):
    """What is asked of a tokenizer."""

    cls: int
    sep: int
    mask: int

    def piece(self, id: int) -> str: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@torch.no_grad()
def fill_in(model: BertPretraining, tokenizer: Pieces, sentences: Iterable[Any], wanted: int = 5) -> list[dict]:
    """A word of each sentence (of its token numbers) masked, and the three that `model`, in eval mode, would put there.

    Sentences without a long word that is one token are passed over. [{"masked": text, "filled", "truth"}].
    """
    found: list[dict] = []
    for sentence in sentences:
        if len(found) == wanted:
            break
        pieces = [tokenizer.piece(t) for t in sentence]
        whole = [i for i in range(len(pieces) - 1) if pieces[i][0] == pieces[i + 1][0] == SPACE]
        words = [i for i in whole if len(pieces[i]) > 4]
        if not words:
            continue
        at = words[len(words) // 2]
        ids_BL = torch.tensor([[tokenizer.cls, *sentence.tolist(), tokenizer.sep]])
        truth, ids_BL[0, at + 1] = int(ids_BL[0, at + 1]), tokenizer.mask
        logits_BPV, _ = model(
            ids_BL, torch.zeros_like(ids_BL), torch.tensor([ids_BL.shape[1]]), torch.tensor([[at + 1]])
        )
        best, right = (
            [tokenizer.piece(t).removeprefix(SPACE) for t in ts] for ts in (logits_BPV[0, 0].topk(3)[1], [truth])
        )
        masked = tokenizer.decode(ids_BL[0, 1:-1].tolist())
        found.append({"masked": masked, "filled": ", ".join(best), "truth": right[0]})
    return found
