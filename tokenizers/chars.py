"""Characters as tokens, numbered in the order of their code points. No torch."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from dltrain.errors import UserError


class Chars:
    """The characters that occur in a text; `digest` (SHA-256 of them) names the tokenizer. Picklable."""

    def __init__(self, text: str):
        self.characters = "".join(sorted(set(text)))
        self.vocab_size = len(self.characters)
        self.digest = hashlib.sha256(json.dumps(self.characters).encode()).hexdigest()
        self._number = {character: i for i, character in enumerate(self.characters)}

    def encode(self, texts: list[str]) -> list[list[int]]:
        """UserError for a character that is not in the vocabulary."""
        try:
            return [[self._number[character] for character in text] for text in texts]
        except KeyError as error:
            raise UserError(f"the character {error.args[0]!r} does not occur in the text of this tokenizer") from None

    def arrays(self, texts: list[str]) -> list[np.ndarray]:
        """As `encode`, as int32 arrays."""
        return [np.array(ids, np.int32) for ids in self.encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] for i in ids)
