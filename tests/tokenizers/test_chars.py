import pickle

import pytest

from dltrain.errors import UserError
from dltrain.tokenizers.chars import Chars


def test_there_and_back():
    text = "First: ünß\n\tto be\r\n"
    chars = Chars(text)
    assert chars.vocab_size == len(set(text))
    assert chars.encode([text, "to"]) == [[sorted(set(text)).index(c) for c in text], chars.arrays(["to"])[0].tolist()]
    assert chars.decode(chars.arrays([text])[0].tolist()) == text


def test_the_digest_is_of_the_vocabulary_alone():
    assert Chars("abc").digest == Chars("cabba").digest != Chars("abd").digest
    copy = pickle.loads(pickle.dumps(Chars("abc")))
    assert copy.digest == Chars("abc").digest and copy.encode(["cab"]) == [[2, 0, 1]]


def test_a_character_that_is_not_in_the_text():
    with pytest.raises(UserError, match="'z' does not occur"):
        Chars("abc").encode(["az"])
