"""Tokens, against OpenAI's own tokenizer loaded by file path."""

import hashlib
import importlib.metadata
import importlib.util
import os
import random
import sys
import time

import numpy as np
import paddle
import pytest

import paddle_clip
from paddle_clip import extras
from paddle_clip.tokenizer import SimpleTokenizer, decode, tokenize

ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " \t\n\r\x0b\x0c\x85\xa0\u2003\u3000\u200b",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "éèüößñçåøæœıİſẞΣσς",
    "的一是不了人我在有他这为之大来以个中上们中华人民共和国",
    "あいうえおカキクケコ한국어조선말กขคงאבגדابتث",
    "😀😂🤣❤️👍🏽👩‍👩‍👧‍👦🇨🇳🏳️‍🌈☃",
    "e\u0301n\u0303a\u0308\u0323\u200d\u200c\ufe0f\u0300\u0345",
    "".join(map(chr, range(0x00, 0x20))) + "\x7f\x80\x81\x8d\x9f\ufeff\ufffd\ufffe\u2028\u202e",
    "ÃƒÂ¢â‚¬â„¢Ã©Ã¨â€œâ€\x9dâ€™ï¿½Ð¿Ñ€",
    "ﬁﬂﬀ①②Ⅷ½㎏ＡＢＣ１２３",
    "𝒜𝓑𝟙𐍈𠀀",
]
WORDS = [
    "a", "photo", "of", "the", "dog", "cat", "don't", "I'll", "we've", "they're", "it's", "'S", "’s", "x-ray",
    "U.S.A.",     "&amp;", "&lt;b&gt;", "&eacute;", "&amp;amp;quot;", "&#39;", "&#x1F600;", "&nbsp;", "&notin", "&copy",
    "&#0;", "&#xD800;",     "<|startoftext|>", "<|endoftext|>", "<|STARTOFTEXT|>", "<|endoftext|", "<|start",
    "supercalifragilisticexpialidocious",     "schÃ¶n", "â€œquotedâ€\x9d", "l’humanitÃ©", "naïve", "Straße", "STRASSE",
    "İstanbul", "ﬁre",
    "3.14159", "2026-11-20",     "http://example.com/?a=1&b=2", "#hashtag", "@user", "!!!", "???", "...", "——",
    "ａｂｃ", "ſuper", "'ſ", "'ＬＬ",
    "\x1b[36mcolour\x1b[0m", "\r\n", "\ud83d", "\udc4d",
]  # fmt: skip


@pytest.fixture(scope="module")
def openai():
    path = importlib.metadata.distribution("clip-anytorch").locate_file("clip/simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("openai_simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def strings(count):
    """Random strings: words, letters of some alphabets, mojibake made by decoding with a wrong codec."""
    source = random.Random(0)
    for _ in range(count):
        kind = source.random()
        if kind < 0.5:
            text = " ".join(source.choice(WORDS) for _ in range(source.randint(0, 8)))
        elif kind < 0.8:
            chosen = source.sample(ALPHABETS, source.randint(1, 3))
            text = "".join(source.choice(source.choice(chosen)) for _ in range(source.randint(0, 24)))
        elif kind < 0.9:
            text = "".join(source.choice(source.choice(ALPHABETS)) for _ in range(source.randint(1, 12)))
            text = text.encode("utf-8", "replace").decode(source.choice(["latin-1", "cp1252", "utf-8"]), "replace")
        else:
            text = "".join(chr(source.choice([source.randrange(0x250), source.randrange(0x11000)])) for _ in range(12))
        yield text


def test_200_000_strings_have_openais_tokens(openai):
    ours, compared = SimpleTokenizer(), 0
    for text in strings(200_000):
        try:
            expected = openai.encode(text)
        except UnicodeEncodeError:  # a lone surrogate is no text; refused by both
            with pytest.raises(UnicodeEncodeError):
                ours.encode(text)
            continue
        assert ours.encode(text) == expected, repr(text)
        assert ours.decode(expected) == openai.decode(expected), repr(text)
        compared += 1
    assert compared > 180_000


def test_long_words_have_openais_tokens(openai):
    """Pairs are merged in the same order, whatever their number."""
    ours, source = SimpleTokenizer(), random.Random(1)
    for _ in range(300):
        letters = "".join(source.sample("abcdeinorst!.'éя的😀", source.randint(1, 6)))
        text = "".join(source.choice(letters) for _ in range(source.randint(50, 400)))
        assert ours.encode(text) == openai.encode(text), text
    for text in ("\n\n \n  \na\n\n<b>\n \n&amp;\n", "a \n \n\xa0\n&lt;\n\n", "aaaaaaa", "abababab", "\n" * 50):
        assert ours.encode(text) == openai.encode(text), text


@pytest.mark.parametrize(
    "text",
    [
        "ab" * 50_000,
        "a" * 262_144,
        "的" * 100_000,
        "!?" * 50_000,
        "\n" * 262_144,
        " \xa0" * 131_000,
        "&" + "amp;" * 4000,
        "&" + "amp" * 80_000,
        "&amp;" * 3000,
        "＆" + "amp;" * 3000,
        "\x1b[" * 4000 + "m" * 4000,
        "Ã" * 100_000,
        "e" + "\u0301" * 100_000,
    ],
    ids=lambda value: str(len(value)),
)
def test_long_texts_are_read_in_seconds(text):
    start = time.process_time()
    SimpleTokenizer().encode(text)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n" * 10_000_000, "the text has 10,000,000 characters, and at most 262,144 are read: cut it"),
        ("&" + "amp;" * 20_000, "80,001 characters and up to 20,000 entities in each other"),
        ("\x1b[" * 10_000 + "m" * 10_000, "30,000 characters and up to 10,000 entities"),
        ("&#" + "9" * 100_000 + ";", "has a character's number of thousands of digits: cut it"),
    ],
    ids=lambda value: str(len(value)),
)
def test_what_would_take_too_long_is_refused(text, message):
    if "digits" in message and not hasattr(sys, "set_int_max_str_digits"):
        pytest.skip("this Python reads numbers of any length")
    with pytest.raises(ValueError, match=message):
        tokenize(text, truncate=True)


def test_the_vocabulary_is_openais(openai):
    ours = SimpleTokenizer()
    assert ours.encoder == openai.encoder
    assert len(ours.encoder) == 49408
    path = os.path.join(os.path.dirname(paddle_clip.__file__), "data", "bpe_simple_vocab_16e6.txt.gz")
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def test_tokenize_pads_and_frames():
    tokens = tokenize(["a dog", ""])
    assert tokens.shape == [2, 77]
    assert tokens.dtype == paddle.int64
    assert tokens[0, :5].tolist() == [49406, 320, 1929, 49407, 0]
    assert tokens[1, :3].tolist() == [49406, 49407, 0]
    assert int(tokens[0, 4:].sum()) == 0
    np.testing.assert_array_equal(tokenize("a dog").numpy(), tokens[:1].numpy())
    assert tokenize([]).shape == [0, 77]
    assert tokenize("a", context_length=5).shape == [1, 5]


def test_long_texts_are_refused_or_cut():
    text = "word " * 75
    assert tokenize(text).shape == [1, 77]  # the longest text that fits
    for truncate in (False, True):
        np.testing.assert_array_equal(tokenize(text, truncate=truncate).numpy(), tokenize(text).numpy())
    long = text + "more"
    message = r"the text is 78 tokens long, .*context length is 77: 'word word .*tokenize\(…, truncate=True\)"
    with pytest.raises(RuntimeError, match=message):
        tokenize(["short", long])
    cut = tokenize(["short", long], truncate=True)
    assert cut[1, 75:].tolist() == [int(cut[1, 1]), 49407]
    assert int(cut[1].argmax()) == 76
    with pytest.raises(RuntimeError) as error:
        tokenize("word " * 5000)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("texts", [None, 3, ["a", 3], [b"a"]])
def test_what_is_no_text_is_refused(texts):
    with pytest.raises(TypeError):
        tokenize(texts)


def test_decode_undoes_tokenize():
    texts = ["a photo of a dog", "3 cats!", "数学 and 😀", ""]
    expected = ["a photo of a dog", "3 cats !", "数学 and 😀", ""]
    assert decode(tokenize(texts)) == expected
    assert decode(tokenize(texts[0])[0]) == expected[0]
    assert decode([320, 1929]) == "a dog"


def test_works_whichever_is_imported_first(run):
    """Paddle 2's zlib, loaded before Python's, crashes all decompression, and the merges are compressed."""
    for order in ("import paddle, paddle_clip", "import paddle_clip, paddle"):
        done = run("-W", "ignore", "-c", f"{order}; print(paddle_clip.tokenize('a dog')[0, :4].tolist())")
        assert done.stdout.strip() == "[49406, 320, 1929, 49407]", done.stderr
    done = run("-c", "import paddle, paddle_clip")
    assert ("Import paddle_clip first" in done.stderr) == paddle.__version__.startswith("2.")
    assert extras.ZLIB_IS_BROKEN is False  # conftest.py imports it first
