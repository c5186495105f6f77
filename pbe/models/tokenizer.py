"""CLIP's byte-pair encoding: text to the token ids that the text tower reads.

Sennrich et al. 2016 (arXiv 1508.07909) over UTF-8 bytes, as in GPT-2 (Radford et al. 2019), with CLIP's
lower-cased vocabulary of 49,408 tokens (Radford et al. 2021, arXiv 2103.00020): 256 bytes, the same 256 closing
a word, 48,894 merges, and the two tokens that start and end a text.
"""

import gzip
import html
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import ftfy
import regex
import torch
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MERGES = 49_408 - 2 * 256 - 2
CACHED_WORDS = 1 << 16

Pad = Literal["end", "zero"]

# Special tokens written out, contractions, runs of letters, single digits, runs of anything else.
WORDS = regex.compile(
    rf"{regex.escape(START)}|{regex.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"
)

SOURCES = (
    "CLIP's vocabulary is bpe_simple_vocab_16e6.txt.gz from the clip/ folder of github.com/openai/CLIP, "
    "or merges.txt and vocab.json from the tokenizer/ folder of any Stable Diffusion 1.x on huggingface.co"
)


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte 0..255 in the vocabulary files (GPT-2's table)."""
    hidden = [*range(ord("!")), *range(0x7F, 0xA1), 0xAD]  # control characters, spaces and the soft hyphen
    shifted = {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [shifted.get(byte, chr(byte)) for byte in range(256)]


def clean_text(text: str) -> str:
    """Repairs mojibake, resolves HTML entities (twice, for `&amp;amp;`), joins white space, lowers case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class CLIPTokenizer:
    """Turns text into CLIP's token ids and back.

    merges: pairs of symbols in order of priority.
    vocab: the id of every token; None numbers bytes, bytes closing a word, merges, start, end, as OpenAI does.
    Raises ValueError where `vocab` lacks a token of the merges, or does not number its tokens 0 to n - 1.
    """

    def __init__(self, merges: Sequence[tuple[str, str]], vocab: Mapping[str, int] | None = None):
        self.byte_symbols = byte_symbols()
        # Visible characters sort first: "!" is token 0, as in OpenAI's numbering.
        symbols = sorted(self.byte_symbols, key=ord)
        tokens = [*symbols, *(s + WORD_END for s in symbols), *(a + b for a, b in merges), START, END]
        if vocab is None:
            vocab = {token: i for i, token in enumerate(tokens)}
        if missing := [token for token in tokens if token not in vocab]:
            raise ValueError(f"the vocabulary lacks {len(missing)} tokens of the merges, first {missing[0]!r}")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"the vocabulary's {len(vocab)} tokens are not numbered 0 to {len(vocab) - 1}")

        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.vocab = dict(vocab)
        self.tokens = sorted(vocab, key=vocab.__getitem__)
        self.start, self.end = vocab[START], vocab[END]
        self._byte_of = {symbol: byte for byte, symbol in enumerate(self.byte_symbols)}
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "CLIPTokenizer":
        """Reads OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or `merges.txt` with `vocab.json` (either or their folder).

        Raises FileNotFoundError for a missing file, ValueError for another kind, a damaged or a short one.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no vocabulary at {path}. {SOURCES}")
        if path.is_dir() or path.name in ("merges.txt", "vocab.json"):
            folder = path if path.is_dir() else path.parent
            return _read_pair(folder / "merges.txt", folder / "vocab.json")
        # OpenAI's file has 262,144 merges, of which CLIP uses only the first.
        return cls(_parse_merges(path, _gunzip(path).splitlines()[: MERGES + 1]))

    def encode(self, text: str) -> list[int]:
        """The ids of `text` after `clean_text`, without start and end."""
        return [token for word in WORDS.findall(clean_text(text)) for token in self._encode_word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, its words separated by single spaces; skips the start token and stops at the end token.

        Bytes that are not a UTF-8 character become U+FFFD. Raises ValueError for an id outside the vocabulary.
        """
        pieces = []
        for i in map(int, ids):
            if not 0 <= i < len(self.tokens):
                raise ValueError(f"token id {i} is outside the vocabulary, 0 to {len(self.tokens) - 1}")
            if i == self.end:
                break
            if i != self.start:
                token = self.tokens[i]
                word = token.removesuffix(WORD_END)
                pieces.append(bytes(self._byte_of[s] for s in word) + b" " * (word != token))
        return b"".join(pieces).decode("utf-8", errors="replace").strip()

    def __call__(
        self, texts: str | Sequence[str], context_length: int = 77, truncate: bool = False, pad: Pad = "end"
    ) -> Tensor:
        """Ids of a batch of texts, int64 (B, context_length): start, text, end, padding.

        truncate: cut a text that is too long before the end token (Stable Diffusion's way); else it is an error.
        pad: "end" repeats the end token (Stable Diffusion 1.x), "zero" fills with 0 (OpenAI's CLIP).
        Raises ValueError for a text that does not fit, an unknown `pad` or a `context_length` below 2.
        """
        if pad not in get_args(Pad):
            raise ValueError(f"pad is {pad!r}; choose from {', '.join(get_args(Pad))}")
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}; start and end alone take 2 tokens")
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.full((len(texts), context_length), self.end if pad == "end" else 0)
        room = context_length - 2
        for row, text in zip(ids, texts, strict=True):
            tokens = self.encode(text)
            if len(tokens) > room and not truncate:
                raise ValueError(
                    f"the text {text[:40]!r}… has {len(tokens)} tokens, but {room} fit between start and end: "
                    "shorten it or pass truncate=True"
                )
            tokens = [self.start, *tokens[:room], self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        if word in (START, END):
            return [self.vocab[word]]
        if word not in self._cache:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = [self.vocab[symbol] for symbol in self._merge(word)]
        return self._cache[word]

    def _merge(self, word: str) -> list[str]:
        """Joins the neighbours of lowest rank, everywhere they occur, until none of the pairs is in the table."""
        symbols = [self.byte_symbols[byte] for byte in word.encode()]
        symbols[-1] += WORD_END
        unknown = len(self.ranks)
        while len(symbols) > 1:
            pair = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, unknown))
            if pair not in self.ranks:
                break
            merged: list[str] = []
            i = 0
            while i < len(symbols):
                joins = i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair
                merged.append(symbols[i] + symbols[i + 1] if joins else symbols[i])
                i += 2 if joins else 1
            symbols = merged
        return symbols


def _gunzip(path: Path) -> str:
    data = path.read_bytes()
    if not data.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is not a gzip file: it begins with {data[:16]!r}. {SOURCES}")
    try:
        return gzip.decompress(data).decode()
    except EOFError:
        raise ValueError(f"{path} is cut short ({len(data)} bytes): fetch it again. {SOURCES}") from None
    except (gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again. {SOURCES}") from None


def _parse_merges(path: Path, lines: list[str]) -> list[tuple[str, str]]:
    if not lines or "#version" not in lines[0]:
        first = lines[0][:40] if lines else ""
        raise ValueError(f"{path} is not a list of merges: it begins with {first!r}, not '#version: …'. {SOURCES}")
    merges = []
    for number, line in enumerate(lines[1:], start=2):
        pair = line.split()
        if len(pair) != 2:
            raise ValueError(f"{path}, line {number}: {' '.join(pair)[:40]!r} is not a pair of symbols. {SOURCES}")
        merges.append((pair[0], pair[1]))
    if len(merges) != MERGES:
        raise ValueError(f"{path} has {len(merges)} merges; CLIP's vocabulary has {MERGES}. {SOURCES}")
    return merges


def _read_pair(merges_path: Path, vocab_path: Path) -> CLIPTokenizer:
    for path, other in ((merges_path, vocab_path), (vocab_path, merges_path)):
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}, which belongs beside {other.name}. {SOURCES}")
    try:
        lines = merges_path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges_path} is not UTF-8 text ({error}). {SOURCES}") from None
    merges = _parse_merges(merges_path, lines)
    try:
        vocab = json.loads(vocab_path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{vocab_path} is not a complete JSON file ({error}). {SOURCES}") from None
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{vocab_path} does not map each token to its number. {SOURCES}")
    try:
        return CLIPTokenizer(merges, vocab)
    except ValueError as error:
        raise ValueError(f"{vocab_path} does not fit {merges_path.name}: {error}. {SOURCES}") from None
