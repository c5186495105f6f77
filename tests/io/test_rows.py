"""Rows of CSV and JSONL files, and what is suggested for unknown names."""

import json

import pytest

from pbe.io.rows import read_rows
from pbe.io.suggest import closest, did_you_mean

COLUMNS = ("image", "mask", "exemplar")


@pytest.fixture
def write(tmp_path):
    def write(name: str, *lines: str):
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def outcomes(rows) -> list:
    return [(line, str(row) if isinstance(row, ValueError) else row) for line, row in rows]


def test_csv_and_jsonl_give_the_same_rows(write):
    rows = [(2, {"image": "a.png", "mask": "b.png"}), (4, {"image": "c.png"})]
    assert list(read_rows(write("a.csv", "image,mask", "a.png,b.png", "", "c.png,"), COLUMNS)) == rows
    lines = ("", json.dumps(rows[0][1]), " ", json.dumps({"image": "c.png", "mask": None, "exemplar": ""}))
    assert list(read_rows(write("a.JSONL", *lines), COLUMNS)) == rows


def test_values_of_json_are_kept_as_they_are(write):
    row = {"image": 0, "mask": [], "exemplar": False}
    assert list(read_rows(write("a.jsonl", json.dumps(row)), COLUMNS)) == [(1, row)]


def test_bad_rows_are_values_and_the_rows_after_them_follow(write):
    path = write("a.jsonl", "{", "[1]", '{"imag": "a"}', '{"size": 3}', '{"reference": "a"}', '{"image": "a"}')
    (*bad, good) = outcomes(read_rows(path, COLUMNS, renamed={"reference": "exemplar"}))
    assert good == (6, {"image": "a"})
    parts = (("not JSON",), ("not a JSON object", "[1]"), ("'imag'", "'image'"), ("'size'", "image, mask, exemplar"),
             ("'reference'", "'exemplar'"))  # fmt: skip
    assert [line for line, _ in bad] == [1, 2, 3, 4, 5]
    for (_, message), words in zip(bad, parts, strict=True):
        assert all(word in message for word in words), message


def test_csv_rows_of_other_lengths(write):
    path = write("a.csv", "image,mask,exemplar", "a,b,c,d", "a,b", "a,b,c")
    whole = (4, {"image": "a", "mask": "b", "exemplar": "c"})
    more = (2, "more cells than the header has columns")
    assert outcomes(read_rows(path, COLUMNS)) == [more, (3, "fewer cells than the header has columns"), whole]
    assert outcomes(read_rows(path, COLUMNS, allow_short=True)) == [more, (3, {"image": "a", "mask": "b"}), whole]


def test_other_columns_are_accepted_where_asked_unless_misspelt(write):
    path = write("a.csv", "image,width_px", "a,3")
    assert outcomes(read_rows(path, COLUMNS, ignore_others=True)) == [(2, {"image": "a", "width_px": "3"})]
    with pytest.raises(ValueError, match=r"a\.csv, line 1: .*'width_px'"):
        list(read_rows(path, COLUMNS))
    for name in ("Image", "imagee"):
        with pytest.raises(ValueError, match=f"line 1: .*'{name}'.*'image'"):
            list(read_rows(write("b.csv", f"{name},mask", "a,b"), COLUMNS, ignore_others=True))
    rows = read_rows(write("c.jsonl", '{"size": 1}', '{"exemplr": 1}'), COLUMNS, ignore_others=True)
    assert outcomes(rows) == [(1, {"size": 1}), (2, "unknown column 'exemplr'; did you mean 'exemplar'?")]


@pytest.mark.parametrize(
    "name, lines, message",
    [
        ("rows.txt", ("image",), r"rows\.txt: .*\.csv or \.jsonl"),
        ("rows.csv", ("image,image",), "rows.csv names a column twice: image, image"),
        ("rows.csv", ("image,reference", "a,b"), "line 1: column 'reference' is now called 'exemplar'"),
        ("rows.csv", ("image,mask", 'a,"b" b'), r"rows\.csv, after line 1: .*\.jsonl"),
        ("rows.csv", ("image", "a", "\0"), r"rows\.csv, line 3 holds a NUL byte"),
    ],
)
def test_files_that_cannot_be_read(write, name, lines, message):
    with pytest.raises(ValueError, match=message):
        list(read_rows(write(name, *lines), COLUMNS, renamed={"reference": "exemplar"}))


def test_suggestions():
    assert closest("isgroupof", ["IsInside", "IsGroupOf"]) == "IsGroupOf"
    assert closest("colour", COLUMNS) is None
    assert closest("img", ["image"], similarity=0.8) is None
    assert did_you_mean("maks", COLUMNS) == "; did you mean 'mask'?"
    assert did_you_mean("colour", iter(COLUMNS)) == "; choose one of image, mask, exemplar"
