"""CLIP's tokenizer: a small vocabulary made here; OpenAI's own, beside transformers, where the shared file is there."""

import gzip
import json
import pickle
import random
import re
import string
from itertools import islice, product
from pathlib import Path

import pytest
import torch

from pbe.models import tokenizer as module
from pbe.models.tokenizer import END, MERGES, START, CLIPTokenizer, byte_symbols, clean_text

OPENAI = Path(__file__).parents[3] / "shared" / "data" / "bpe_simple_vocab_16e6.txt.gz"

# Ids follow from the order: 512 + the merge's place.
SMALL = [("a", "t</w>"), ("c", "at</w>"), ("i", "n"), ("t", "h"), ("th", "e</w>"), ("in", "g</w>"), ("c", "a")]

TEXTS = [
    "",
    "   \t\n ",
    "a photo of a cat",
    "A Photo   of\n\na\tCAT ",
    "I'm sure they'll say it's what we've got, don't you'd 're",
    "rock 'n' roll ‘quoted’ “text”",
    "12345 3.14 1,000,000 2nd ½ ² Ⅷ ٣",
    "fish &amp; chips &amp;amp; &lt;b&gt; &eacute; &#128049; &quot;",
    "café naïve coöperate façade cafe\u0301",
    "schÃ¶n â€” mojibake",
    "ΑΘΗΝΑΣ Москва İstanbul ẞ ﬁn ﬀ",
    "日本語のテキスト 中文 한국어 ภาษาไทย हिन्दी العربية",
    "🐱🐶 👩‍👩‍👧‍👦 🏳️‍🌈 e😀f",
    "snake_case kebab-case C++ C# #tag @user a/b\\c http://x.io/?q=1&r=2",
    "!!! ... ?!?! ---- ~~~ $$$ <3 </w> <|notspecial|>",
    "zero\u200bwidth no\u00a0break thin\u2009space line\u2028break next\u0085line",
    "before <|endoftext|> after <|startoftext|>",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\x00\x01 control \x7f\ufeff \ufffd",
    "word " * 100,
]


@pytest.fixture
def small() -> CLIPTokenizer:
    return CLIPTokenizer(SMALL)


@pytest.fixture(scope="module")
def openai() -> CLIPTokenizer:
    if not OPENAI.exists():
        pytest.skip("OpenAI's vocabulary is not beside the checkout")
    return CLIPTokenizer.from_file(OPENAI)


@pytest.fixture(scope="module")
def all_merges() -> list[tuple[str, str]]:
    """As many merges as CLIP has: the small ones, then pairs of single symbols that no text here holds."""
    high = [chr(i) for i in range(ord("®"), ord("ÿ") + 1)] + [chr(256 + n) for n in range(33, 68)]
    pairs = [*product(high, high), *product(high, string.ascii_letters + string.digits + string.punctuation)]
    pairs += product(string.ascii_letters + string.digits + string.punctuation, high)
    ends = ((a, b + "</w>") for a, b in pairs)
    merges = [*SMALL, *islice((*pairs, *ends), MERGES - len(SMALL))]
    assert len({a + b for a, b in merges}) == MERGES
    return merges


def lines_of(merges) -> str:
    return "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n"


@pytest.fixture
def gz(tmp_path, all_merges) -> Path:
    """OpenAI's kind of file: more merges than CLIP uses follow."""
    path = tmp_path / "vocab.txt.gz"
    path.write_bytes(gzip.compress((lines_of(all_merges) + "more of\nthe same\n").encode(), compresslevel=1))
    return path


@pytest.fixture
def folder(tmp_path, all_merges) -> Path:
    """Stable Diffusion's kind of folder."""
    (tmp_path / "merges.txt").write_text(lines_of(all_merges), encoding="utf-8")
    (tmp_path / "vocab.json").write_text(json.dumps(CLIPTokenizer(all_merges).vocab), encoding="utf-8")
    return tmp_path


def test_merges_join_in_order_of_rank(small):
    n = 512
    assert small.encode("cat") == [n + 1]  # "a t" outranks "c a"
    assert small.encode("ca") == [small.vocab["c"], small.vocab["a</w>"]]  # "c a" is no pair once "a" ends the word
    assert small.encode("cab") == [n + 6, small.vocab["b</w>"]]
    assert small.encode("the thing") == [n + 4, n + 3, n + 5]
    assert small.encode("inin") == [n + 2, small.vocab["i"], small.vocab["n</w>"]]


def test_tokens_are_numbered_as_openai_numbers_them(small):
    assert small.tokens[:2] == ["!", '"']  # the visible bytes first
    assert small.tokens[188] == "Ā"  # then those that stand for invisible ones, from byte 0
    assert small.tokens[256] == "!</w>"
    assert small.tokens[512:] == ["at</w>", "cat</w>", "in", "th", "the</w>", "ing</w>", "ca", START, END]


def test_every_occurrence_of_a_pair_joins():
    tokenizer = CLIPTokenizer([("a", "a"), ("aa", "aa")])
    tokens = [tokenizer.tokens[i] for i in tokenizer.encode("aaaaaaaa")]
    assert tokens == ["aaaa", "aa", "a", "a</w>"]


def test_words_are_cut_as_clip_cuts_them(small):
    words = module.WORDS.findall("it's 42 cats, they'll don't <|endoftext|> #1")
    assert words == ["it", "'s", "4", "2", "cats", ",", "they", "'ll", "don", "'t", END, "#", "1"]


def test_unknown_text_falls_back_to_bytes(small):
    ids = small.encode("é🐱")
    assert len(ids) == 2 + 4  # UTF-8 bytes; a letter and a symbol are two words
    assert small.decode(ids) == "é 🐱"


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("  A\n\tB ", "a b"),
        ("x &amp;amp; y", "x & y"),
        ("< &amp;amp; y", "< & y"),  # ftfy leaves entities alone beside a "<": both rounds are needed
        ("&lt;B&gt;", "<b>"),
        ("schÃ¶n", "schön"),
        ("cafe\u0301", "café"),
        ("“Q”", '"q"'),
        ("", ""),
    ],
)
def test_clean_text(text, cleaned):
    assert clean_text(text) == cleaned


def test_byte_symbols_are_distinct_and_visible():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    assert all(s.isprintable() and not s.isspace() for s in symbols)
    assert symbols[ord("a")] == "a"
    assert symbols[0] == "Ā"
    assert symbols[ord(" ")] == "Ġ"


def test_decode_skips_start_and_stops_at_end(small):
    assert small.decode(small(["The  CAT, the thing"])[0]) == "the cat , the thing"
    assert small.decode(small(["the cat"], pad="zero")[0]) == "the cat"
    assert small.decode([]) == ""
    assert small.decode(small.encode("é")[:1]) == "\N{REPLACEMENT CHARACTER}"  # half a character


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_decode_rejects_an_unknown_id(small, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary, 0 to {len(small.tokens) - 1}"):
        small.decode([0, bad])


def test_batch_shape_and_padding(small):
    ids = small(["the cat", ""])
    assert ids.shape == (2, 77)
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == [small.start, 516, 513] + [small.end] * 74
    assert ids[1].tolist() == [small.start] + [small.end] * 76
    zero = small("the cat", context_length=6, pad="zero")
    assert zero.tolist() == [[small.start, 516, 513, small.end, 0, 0]]
    assert small([]).shape == (0, 77)


def test_too_long_text(small):
    text = "cat " * 76
    assert small(text[:-4])[0, -1] == small.end  # 75 tokens fit exactly
    with pytest.raises(ValueError, match=r"has 76 tokens, but 75 fit.*truncate=True"):
        small(["cat", text])
    cut = small(text, truncate=True)
    assert cut.tolist() == [[small.start] + [513] * 75 + [small.end]]


def test_bad_arguments(small):
    with pytest.raises(ValueError, match="pad is 'max_length'; choose from end, zero"):
        small("cat", pad="max_length")
    with pytest.raises(ValueError, match="context_length is 1"):
        small("cat", context_length=1)


def test_cache_is_bounded_and_changes_nothing(small, monkeypatch):
    monkeypatch.setattr(module, "CACHED_WORDS", 8)
    words = [a + b for a, b in product("catin", "hegbt")] * 2
    assert [small.encode(word) for word in words] == [CLIPTokenizer(SMALL).encode(word) for word in words]
    assert len(small._cache) <= 8


def test_pickles_for_worker_processes(small):
    assert pickle.loads(pickle.dumps(small)).encode("the cat") == small.encode("the cat")


def test_small_vocabulary_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    rng = random.Random(0)
    symbols = [*"abcd", *(c + "</w>" for c in "abcd")]
    merges: dict[tuple[str, str], None] = {}
    while len(merges) < 60:  # random but well-formed: each side exists before it is merged
        left = rng.choice([s for s in symbols if not s.endswith("</w>")])
        right = rng.choice(symbols)
        if left + right not in symbols:
            merges[left, right] = None
            symbols.append(left + right)
    ours = CLIPTokenizer(list(merges))
    theirs = transformers.CLIPTokenizer(vocab=ours.vocab, merges=list(merges))
    for _ in range(300):
        word = "".join(rng.choices("abcd", k=rng.randint(1, 30)))
        assert ours.encode(word) == theirs(word, add_special_tokens=False).input_ids, word


def test_both_kinds_of_file_give_the_same_tokenizer(gz, folder, all_merges):
    ours = CLIPTokenizer.from_file(gz)
    assert (len(ours.tokens), ours.start, ours.end) == (49408, 49406, 49407)
    for path in (folder, folder / "merges.txt", str(folder / "vocab.json")):
        pair = CLIPTokenizer.from_file(path)
        assert pair.vocab == ours.vocab
        assert pair.ranks == ours.ranks


def test_the_pair_takes_its_ids_from_vocab_json(folder):
    path = folder / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    vocab["the</w>"], vocab["cat</w>"] = vocab["cat</w>"], vocab["the</w>"]
    path.write_text(json.dumps(vocab), encoding="utf-8")
    assert CLIPTokenizer.from_file(folder).encode("the cat") == [513, 516]


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary at .*nowhere\.gz.*github\.com/openai/CLIP"):
        CLIPTokenizer.from_file(tmp_path / "nowhere.gz")
    (folder / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab\.json, which belongs beside merges\.txt"):
        CLIPTokenizer.from_file(folder / "merges.txt")
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges\.txt, which belongs beside vocab\.json"):
        CLIPTokenizer.from_file(folder)


def test_gzip_cut_short_or_damaged(gz):
    whole = gz.read_bytes()
    gz.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{re.escape(str(gz))} is cut short \({len(whole) // 2} bytes\)"):
        CLIPTokenizer.from_file(gz)
    flipped = bytearray(whole)
    flipped[-8] ^= 0xFF  # the checksum
    gz.write_bytes(flipped)
    with pytest.raises(ValueError, match="is damaged"):
        CLIPTokenizer.from_file(gz)


def test_wrong_kinds_of_file(folder):
    wrong = folder / "model.ckpt"
    wrong.write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(ValueError, match=r"model\.ckpt.*gzip.*PK"):
        CLIPTokenizer.from_file(wrong)
    wrong.write_bytes(gzip.compress(b"some other text\n"))
    with pytest.raises(ValueError, match="begins with 'some other text'"):
        CLIPTokenizer.from_file(wrong)
    wrong.write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="begins with ''"):
        CLIPTokenizer.from_file(wrong)
    (folder / "vocab.json").write_text('{"a": 0, "b"', encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json.*JSON"):
        CLIPTokenizer.from_file(folder)
    (folder / "vocab.json").write_text('["a"]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json does not map each token"):
        CLIPTokenizer.from_file(folder)


def test_wrong_number_of_merges(folder, gz, all_merges):
    gz.write_bytes(gzip.compress(lines_of(all_merges[:-1]).encode(), compresslevel=1))
    with pytest.raises(ValueError, match="has 48893 merges; CLIP's vocabulary has 48894"):
        CLIPTokenizer.from_file(gz)
    (folder / "merges.txt").write_text(lines_of([*all_merges, ("x", "y")]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges\.txt has 48895 merges"):
        CLIPTokenizer.from_file(folder)
    (folder / "merges.txt").write_text(lines_of([("i", "n", "g"), *all_merges[1:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges\.txt, line 2: 'i n g'"):
        CLIPTokenizer.from_file(folder)


@pytest.mark.slow
def test_vocab_of_other_merges(folder):
    path = folder / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**vocab, "extra": 7}), encoding="utf-8")
    with pytest.raises(ValueError, match="49409 tokens are not numbered 0 to 49408"):
        CLIPTokenizer.from_file(folder)
    del vocab["cat</w>"]
    path.write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(ValueError, match=r"does not fit merges\.txt: .*lacks 1 tokens of the merges, first 'cat</w>'"):
        CLIPTokenizer.from_file(folder)


def test_known_ids(openai):
    assert (openai.start, openai.end, len(openai.tokens)) == (49406, 49407, 49408)
    assert openai.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert openai("a photo of a cat")[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.fixture(scope="module")
def huggingface(openai, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "merges.txt").write_text(lines_of(openai.ranks), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(openai.vocab), encoding="utf-8")
    assert CLIPTokenizer.from_file(folder).vocab == openai.vocab
    return transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_agrees_with_transformers(openai, huggingface, text):
    # transformers has no ftfy and no HTML entities: it is handed the cleaned text.
    theirs = huggingface(clean_text(text), padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert torch.equal(openai(text, truncate=True), theirs.input_ids)


def test_agrees_with_transformers_on_random_text(openai, huggingface):
    rng = random.Random(0)
    blocks = [(0x20, 0x7E), (0xA1, 0x17F), (0x370, 0x3FF), (0x400, 0x45F), (0x4E00, 0x4FFF), (0x1F300, 0x1F5FF)]
    for _ in range(500):
        parts = ["".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(rng.randint(1, 8))) for _ in range(6)]
        text = clean_text(" ".join(parts))
        assert openai.encode(text) == huggingface(clean_text(text), add_special_tokens=False).input_ids, text


@pytest.mark.parametrize("text", ["a photo of a cat", "it's 42 cats , they'll don't", "日本語 🐱 café", START])
def test_decode_returns_the_text(openai, text):
    assert openai.decode(openai(text)[0]).replace(" ", "") == text.replace(" ", "").replace(START, "")
