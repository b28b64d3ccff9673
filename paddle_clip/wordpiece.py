"""BERT's WordPiece tokenizer for Chinese-CLIP: text -> ids, as cn_clip's bert_tokenizer.py gives them."""

import os
import unicodedata
from functools import lru_cache

_VOCABULARY = os.path.join(os.path.dirname(__file__), "data", "chinese_vocab.txt")
_UNKNOWN, _START, _END = "[UNK]", "[CLS]", "[SEP]"
_LONGEST_WORD = 200  # characters; a longer one is unknown
_CACHED = 1 << 16  # words; captions repeat most of them
_CJK = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


class BertTokenizer:
    """Lower-cased WordPiece without accents, and each Chinese character by itself (cn_clip's `FullTokenizer`).

    Attributes:
        start: id of [CLS], which begins a text.
        end: id of [SEP], which ends it.
    """

    def __init__(self) -> None:
        with open(_VOCABULARY, encoding="utf-8") as file:
            self._ids = {token.strip(): id for id, token in enumerate(file)}
        self._longest = max(map(len, self._ids))
        self._spaced = _Spaced()
        self._word_ids = lru_cache(_CACHED)(self._encode_word)
        self.start, self.end = self._ids[_START], self._ids[_END]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        return [id for word in text.translate(self._spaced).split() for id in self._word_ids(word)]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """The ids of what stands between spaces: of each punctuation mark, and of what stands between them."""
        letters = unicodedata.normalize("NFD", word.lower())
        letters = "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")
        parted = "".join(f" {letter} " if _is_punctuation(letter) else letter for letter in letters)
        return tuple(id for part in parted.split() for id in self._pieces(part))

    def _pieces(self, word: str) -> list[int]:
        """The ids of the longest pieces that a word begins with, one after the other."""
        if len(word) > _LONGEST_WORD:
            return [self._ids[_UNKNOWN]]
        ids, start, prefix = [], 0, ""
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                piece = self._ids.get(prefix + word[start:end])
                if piece is not None:
                    break
            else:
                return [self._ids[_UNKNOWN]]
            ids.append(piece)
            start, prefix = end, "##"
        return ids


class _Spaced(dict[int, str]):
    """What stands for a character: nothing for control characters, spaces for white space and around Chinese."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        category = unicodedata.category(letter)
        if letter in "\t\n\r" or category == "Zs":
            found = " "
        elif code in (0, 0xFFFD) or category in ("Cc", "Cf"):
            found = ""
        else:
            found = f" {letter} " if any(first <= code <= last for first, last in _CJK) else letter
        self[code] = found
        return found


def _is_punctuation(letter: str) -> bool:
    """Whether a character is punctuation, or a sign of ASCII such as $, ^ and `."""
    is_sign = letter.isascii() and letter.isprintable() and not letter.isalnum() and letter != " "
    return is_sign or unicodedata.category(letter).startswith("P")
