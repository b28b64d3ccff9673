"""OpenAI's byte-pair tokenizer: text <-> ids, and the padded batches `encode_text` takes."""

import gzip
import heapq
import html
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Union

import ftfy
import numpy as np
import regex

from .arrays import as_tensor
from .extras import ZLIB_IS_BROKEN
from .wordpiece import BertTokenizer

_MERGES = os.path.join(os.path.dirname(__file__), "data", "bpe_simple_vocab_16e6.txt.gz")
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_CACHED, _CACHED_LENGTH = 1 << 16, 64  # pieces of text between spaces, and characters; captions repeat most of them
MOST_CHARACTERS = 1 << 18  # of a text: some seconds of work
# ftfy repairs a text as often as that changes it. Each time takes one of these off, or what becomes one of these.
_LAYERS = regex.compile("[;；\u037e›\x1b\x9b]")
_MOST_WORK = 1 << 26  # characters times layers: about a second


class SimpleTokenizer:
    """Lower-cased byte-pair encoding with a vocabulary of 49,408 (OpenAI's `SimpleTokenizer`)."""

    def __init__(self) -> None:
        characters = _byte_characters()
        merges = [tuple(line.split()) for line in _read_merges().split("\n")[1 : 49152 - 256 - 2 + 1]]
        alphabet = list(characters.values())
        vocabulary = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
        vocabulary += [_START, _END]

        self.encoder = {token: id for id, token in enumerate(vocabulary)}
        self.start, self.end = self.encoder[_START], self.encoder[_END]
        self.decoder = dict(enumerate(vocabulary))
        self._byte_characters = characters
        self._character_bytes = {character: byte for byte, character in characters.items()}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._piece_ids = lru_cache(_CACHED)(self._encode_piece)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end.

        Raises:
            ValueError: if the text is longer than `MOST_CHARACTERS`, or its entities would take too long to read.
        """
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"the text has {len(text):,} characters, and at most {MOST_CHARACTERS:,} are read: cut it")
        if not (text.isascii() and text.isprintable()) or "&" in text:  # else ftfy and html change nothing
            text = regex.sub(r"\s+", " ", _repaired(text)).strip()
        ids: list[int] = []
        for piece in text.lower().split(" "):  # no word spans a space
            ids += self._piece_ids(piece) if len(piece) <= _CACHED_LENGTH else self._encode_piece(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; every word ends with a space, as in OpenAI's `decode`."""
        characters = "".join(self.decoder[int(id)] for id in ids)
        content = bytes(self._character_bytes[character] for character in characters)
        return content.decode("utf-8", errors="replace").replace("</w>", " ")

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        return tuple(id for word in _WORDS.findall(piece) for id in self._encode_word(word))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """The ids of a word: the most frequent pair of neighbours is merged until no pair has a merge."""
        if word in (_START, _END):
            return (self.encoder[word],)
        parts = [self._byte_characters[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))  # of each part, its neighbours
        pairs: list[tuple[int, int]] = []  # a heap of (rank, place); looking for the best each time is quadratic

        def note(place: int) -> None:
            if place >= 0 and after[place] < len(parts):
                rank = self._ranks.get((parts[place], parts[after[place]]))
                if rank is not None:
                    heapq.heappush(pairs, (rank, place))

        for place in range(len(parts)):
            note(place)
        while pairs:
            best, merged = pairs[0][0], []
            while pairs and pairs[0][0] == best:
                place = heapq.heappop(pairs)[1]
                follower = after[place]
                if follower == len(parts) or self._ranks.get((parts[place], parts[follower])) != best:
                    continue  # one of the two was merged since
                parts[place] += parts[follower]
                parts[follower] = ""
                after[place] = after[follower]
                if after[place] < len(parts):
                    before[after[place]] = place
                merged.append(place)
            for place in merged:  # now, as all places of a pair are merged before another is looked for
                note(before[place])
                note(place)
        return tuple(self.encoder[part] for part in parts if part)


def _repaired(text: str) -> str:
    """A text after ftfy and html, as OpenAI's code calls them."""
    layers = len(_LAYERS.findall(text))
    if len(text) * layers > _MOST_WORK:
        raise ValueError(
            f"the text has {len(text):,} characters and up to {layers:,} entities in each other, which takes too long "
            "to read: cut it"
        )
    text = regex.sub(r"\n(?: *\n)+", "\n", text)  # ftfy repairs line by line
    try:
        return html.unescape(html.unescape(ftfy.fix_text(text)))
    except UnicodeError:  # a lone surrogate
        raise
    except ValueError:  # Python's int
        raise ValueError(f"the text {text!r:.80} has a character's number of thousands of digits: cut it") from None


def _read_merges() -> str:
    if not ZLIB_IS_BROKEN:
        with gzip.open(_MERGES, "rt", encoding="utf-8") as file:
            return file.read()
    script = "import gzip, sys; sys.stdout.buffer.write(gzip.open(sys.argv[1]).read())"
    return subprocess.run([sys.executable, "-c", script, _MERGES], stdout=subprocess.PIPE, check=True).stdout.decode()


def _byte_characters() -> dict[int, str]:
    """{byte: the character that stands for it}: itself where printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    return {**characters, **{byte: chr(256 + index) for index, byte in enumerate(others)}}


@lru_cache(1)
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


@lru_cache(1)
def _bert_tokenizer() -> BertTokenizer:
    return BertTokenizer()


def tokenize(texts: Union[str, Sequence[str]], context_length: int = 77, truncate: bool = False) -> Any:
    """The padded token ids of texts, for OpenAI's models and open_clip's (OpenAI's `clip.tokenize`).

    `model.tokenize` gives those of any model: Chinese-CLIP has a tokenizer of its own.

    Args:
        texts: one string or a list of N strings.
        context_length: number of tokens per row, start and end included; 77 for every published model.
        truncate: whether to cut texts that are too long, before their end token, instead of raising.

    Returns:
        Ids [N, context_length] in int64, padded with 0.

    Raises:
        RuntimeError: if a text is too long and `truncate` is false, as in OpenAI's code.
        TypeError: if `texts` is not a string or a list of strings.
        ValueError: if a text has more than 262,144 characters, or thousands of entities in each other, or the context
            length is less than 2.
    """
    return as_tensor(token_ids(texts, context_length, truncate))


def token_ids(
    texts: Union[str, Sequence[str]], context_length: int = 77, truncate: bool = False, text_tower: str = "clip"
) -> np.ndarray:
    """The ids of `tokenize` as an int64 array [N, context_length], or those for the text tower "bert"."""
    texts = listed_texts(texts)
    if not isinstance(context_length, (int, np.integer)) or context_length < 2:
        raise ValueError(f"context_length is {context_length!r}; it is a number of tokens, at least 2: start and end")
    tokenizer = _bert_tokenizer() if text_tower == "bert" else _tokenizer()
    rows = np.zeros([len(texts), context_length], np.int64)
    for row, text in zip(rows, texts):
        ids = [tokenizer.start, *tokenizer.encode(text), tokenizer.end]
        if len(ids) > context_length:
            if not truncate:
                shown = text if len(text) <= 200 else text[:200] + "…"
                raise RuntimeError(
                    f"the text is {len(ids)} tokens long, start and end included, and the context length is "
                    f"{context_length}: {shown!r}. Shorten it, or cut it with tokenize(…, truncate=True)"
                )
            ids[context_length - 1 :] = [tokenizer.end]
        row[: len(ids)] = ids
    return rows


def listed_texts(texts: Any) -> list[str]:
    """A list of what is one text or several; raises TypeError if it is neither."""
    several = hasattr(texts, "__iter__") and not isinstance(texts, (str, bytes)) and getattr(texts, "ndim", 1) > 0
    listed = list(texts) if several else [texts]
    for text in listed:
        if not isinstance(text, str):
            raise TypeError(f"texts are a string or a list of strings; found {type(text).__name__}: {text!r:.80}")
    return listed


def decode(tokens: Any) -> Union[str, list[str]]:
    """The text of a row of `tokenize`, or the texts of its rows, in lower case without start, end and padding.

    Args:
        tokens: ids [L] or [N, L], a Tensor, array or list.

    Raises:
        ValueError: if they are no ids of OpenAI's vocabulary.
    """
    rows, last = np.asarray(tokens), _tokenizer().end
    if rows.ndim not in (1, 2) or rows.dtype.kind not in "iuf" or not ((rows >= 0) & (rows <= last)).all():
        raise ValueError(f"decode takes ids [L] or [N, L] from 0 to {last}; found {str(tokens)[:80]}")
    return [_decode_row(row.tolist()) for row in rows] if rows.ndim == 2 else _decode_row(rows.tolist())


def _decode_row(ids: list[int]) -> str:
    tokenizer = _tokenizer()
    ids = ids[: ids.index(tokenizer.end)] if tokenizer.end in ids else ids
    return tokenizer.decode(id for id in ids if id != tokenizer.start).strip()
