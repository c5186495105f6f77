"""Jobs from text, and batch files: what is read, refused, run, run again and left alone."""

import csv
import io
import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from fakes import at_once
from PIL import ExifTags, Image

import pbe
from pbe.batch.job import COLUMNS, Job, NextRegion, read_inputs
from pbe.batch.provenance import (
    NUM_SAMPLES,
    SAMPLE_BYTES,
    Weights,
    identify,
    provenance_of,
    read_provenance,
    save_result,
)
from pbe.batch.run import Outcome, is_done, read_jobs, run_row
from pbe.editing.settings import MAX_SEED, EditSettings
from pbe.images.pillow import PictureWarning

CHECKPOINT = Path("model.ckpt")
WEIGHTS = Weights("model.ckpt", "0123abcd", "bfloat16")
GIVEN = {"image": "photo.png", "mask": "mask.png", "exemplar": "dog.png", "out": "out.png"}


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (48, 40), "olive").save(tmp_path / "photo.png")
    mask = Image.new("L", (48, 40))
    mask.paste(255, (10, 10, 30, 30))
    mask.save(tmp_path / "mask.png")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "dog.png")
    (tmp_path / CHECKPOINT).write_bytes(b"weights")
    return tmp_path


class Model:
    """What run_row asks of a model, given that `edit` is replaced."""

    dtype = torch.float32


@pytest.fixture
def edits(monkeypatch) -> list[dict]:
    """Replaces `edit`: notes its arguments, and returns the photo with the mask in a colour made of the seed."""
    calls = []

    def edit(model, image, mask, exemplar, **settings):
        calls.append({"exemplar": exemplar, "mask": image.repaint, **settings})
        if settings["guidance"] == 13:
            raise ValueError("guidance 13 is unlucky")
        if settings["guidance"] == 14:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if settings["guidance"] == 15:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        if settings["guidance"] == 16:
            raise RuntimeError("convolution is tired\nand a long story of C++")
        if settings["guidance"] == 17:
            raise KeyboardInterrupt
        results = []
        for i in range(settings["num_images"]):
            result = image.picture.source.copy()
            result.paste((settings["seed"] + i) % 256, mask=Image.fromarray(image.repaint))
            results.append(result)
        return results

    monkeypatch.setattr("pbe.editing.edit.edit", at_once(edit))
    return calls


def write_csv(folder: Path, *rows: dict) -> Path:
    path = folder / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(folder: Path, *rows: dict | str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


# --- values -----------------------------------------------------------------------------------------------


def test_columns_are_the_fields_of_a_job():
    own = set(Job.__dataclass_fields__) - {"regions", "settings", "folder", "line"}
    numbered = {f"{name}_{n}" for name in NextRegion.__dataclass_fields__ for n in range(2, 10)}
    assert set(COLUMNS) == own | set(EditSettings.__dataclass_fields__) | numbered


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("box", "1,2,30,40", (1, 2, 30, 40)),
        ("box", [1, 2, 30.5, 40], (1, 2, 30.5, 40)),
        ("polygon", "1,2 3,4 5,6", ((1, 2), (3, 4), (5, 6))),
        ("polygon", [[1, 2], [3, 4], [5, 6]], ((1, 2), (3, 4), (5, 6))),
        ("exemplar", "a.png; b.png", ("a.png", "b.png")),
        ("exemplar", ["a;b.png"], ("a;b.png",)),
        ("steps", " 20 ", 20),
        ("steps", 20, 20),
        ("guidance", "7.5", 7.5),
        ("window", "full", "full"),
        ("window", "0,0,64,64", (0, 0, 64, 64)),
        ("composite", "no", False),
        ("composite", True, True),
        ("steps", "20.0", 20),
        ("steps", 2e1, 20),
        ("seed", MAX_SEED, MAX_SEED),
        ("seed", str(MAX_SEED), MAX_SEED),
        ("seed", 2**53 + 1, 2**53 + 1),  # the first whole number that no float holds
        ("seed", f"+{2**53 + 1}", 2**53 + 1),
    ],
)
def test_values_are_read_from_text_and_json(name, value, expected):
    given = {**GIVEN, name: value}
    if name in ("box", "polygon"):
        del given["mask"]
    job = Job.from_row(given)
    assert getattr(job.settings if hasattr(job.settings, name) else job, name) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": "ten"}, "steps must be a whole number from 1 to 1000, got 'ten'"),
        ({"steps": 2.5}, "steps .* got 2.5"),
        ({"steps": True}, "steps .* got True"),
        ({"guidance": "nan"}, "guidance must be a number of at least 0, got 'nan'"),
        ({"seed": 1e400}, "seed .* got inf"),
        ({"guidance": 10**400}, "guidance .* got 10+"),
        ({"seed": "9007199254740993.0"}, "seed .* got '9007199254740993.0'"),
        ({"seed": -1}, f"seed .* from 0 to {MAX_SEED}, got -1"),
        ({"seed": str(MAX_SEED + 1)}, f"got '{MAX_SEED + 1}'"),
        ({"mask": None, "box": "1,2,3"}, "box must be a box x0,y0,x1,y1, got '1,2,3'"),
        ({"mask": None, "polygon": "1,2 3,4,5"}, "polygon must be a polygon .* got '1,2 3,4,5'"),
        ({"mask": None, "polygon": "1,2 3,4"}, "polygon must be a polygon .* got '1,2 3,4'"),
        ({"negative_mask": "a.png"}, "negative_mask has 1 values for 0 negatives"),
        ({"negative": "a.png;b.png", "negative_weights": "1"}, "negative_weights has 1 values for 2 negatives"),
        ({"box": "1,2,3,4"}, "got mask and box"),
        ({"window": "some"}, "window must be 'auto', 'full' or a box .* got 'some'"),
        ({"split_mask": "all"}, "split_mask must be true or false, got 'all'"),
        ({"composite": "maybe"}, "composite must be true or false, got 'maybe'"),
        ({"image": 3}, "image must be text, got 3"),
        ({"exemplar": "a.png;;b.png"}, "exemplar must be a list of file names .* got 'a.png;;b.png'"),
        ({"exemplar": " "}, "exemplar missing"),
        ({"image": "", "out": None}, "image and out missing"),
        ({"exemplar_weights": "1,2"}, "exemplar_weights has 2 values for 1 exemplar"),
        ({"exemplar_mask": "a.png;b.png"}, "exemplar_mask has 2 values for 1 exemplar"),
        ({"out": "./photo.png"}, "also an input"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Job.from_row({**GIVEN, **changes})


# --- files ------------------------------------------------------------------------------------------------


def test_csv_and_jsonl_give_the_same_jobs(folder):
    rows = [
        {**GIVEN, "exemplar": "a.png;b.png", "seed": "7", "guidance": ""},
        {"image": "x.png", "mask": "", "box": "1,2,3,4", "exemplar": "c.png", "out": "2.png"},
    ]
    objects = [
        {**GIVEN, "exemplar": ["a.png", "b.png"], "seed": 7},
        {"image": "x.png", "box": [1, 2, 3, 4], "exemplar": ["c.png"], "out": "2.png"},
    ]
    from_csv, bad_csv = read_jobs(write_csv(folder, *rows), {"guidance": "3"})
    from_jsonl, bad_jsonl = read_jobs(write_jsonl(folder, *objects), {"guidance": "3"})
    for name in ("a.png", "b.png", "c.png", "x.png"):
        (folder / name).touch()
    assert bad_csv == bad_jsonl == []
    for a, b in zip(from_csv, from_jsonl, strict=True):
        assert provenance_of(a, WEIGHTS) == provenance_of(b, WEIGHTS)
        assert a.out == b.out
    assert [job.settings.seed for job in from_csv] == [7, EditSettings.seed]
    assert [job.settings.guidance for job in from_csv] == [3, 3]
    assert [job.line for job in from_csv] == [2, 3]
    assert from_csv[0].path("photo.png") == folder / "photo.png"


def test_bad_rows_do_not_hide_the_good_ones(folder):
    bad = ("{not json", "", "[1]", {**GIVEN, "out": "b.png", "steps": "x"}, {"image": "a"}, {**GIVEN, "colour": "red"})
    path = write_jsonl(folder, GIVEN, *bad)
    jobs, failed = read_jobs(path, {})
    assert [job.line for job in jobs] == [1]
    assert [(outcome.line, outcome.status) for outcome in failed] == [(n, "failed") for n in (2, 4, 5, 6, 7)]
    reasons = (
        "not JSON",
        "not a JSON object",
        "steps",
        "missing",
        "unknown column 'colour'",
    )
    for outcome, words in zip(failed, reasons, strict=True):
        assert words in outcome.reason


def test_csv_row_with_too_many_cells_fails_alone(folder):
    path = folder / "rows.csv"
    path.write_text("image,mask,exemplar,out\na.png,b.png,c.png,1.png\na.png,b.png,c.png,2.png,surplus\n")
    jobs, failed = read_jobs(path, {})
    assert [job.out for job in jobs] == ["1.png"]
    assert failed == [Outcome(3, "failed", "more cells than the header has columns")]


def test_csv_quote_that_is_not_closed_hides_no_rows(folder):
    path = folder / "rows.csv"
    path.write_text('image,mask,exemplar,out\na.png,b.png,c.png,"1.png\na.png,b.png,c.png,2.png\n')
    with pytest.raises(ValueError, match=r"rows.csv, after line 1: unexpected end of data"):
        read_jobs(path, {})
    path.write_text('image,mask,"exemplar,out\na.png,b.png,c.png,1.png\n')
    with pytest.raises(ValueError, match=r"rows.csv, after line 0: unexpected end of data"):
        read_jobs(path, {})


def test_byte_order_mark_of_spreadsheets_is_read_over(folder):
    path = folder / "rows.csv"
    path.write_text("image,mask,exemplar,out\na.png,b.png,c.png,1.png\n", encoding="utf-8-sig")
    assert read_jobs(path, {})[0][0].image == "a.png"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"guidance": -1}, "guidance must be a number of at least 0, got -1"),
        ({"eta": 0.5}, "eta=0.5 is for the samplers 'ddim' and 'tcd' alone, not for 'plms'"),
        ({"margin": 0.5}, "margin must be"),
        ({"feather": -1}, "feather must be"),
        ({"resolution": 100}, "resolution must be"),
        ({"resolution": 0}, "resolution must be"),
    ],
)
def test_settings_out_of_range_fail_before_a_model_is_loaded(folder, changes, message):
    jobs, (outcome,) = read_jobs(write_jsonl(folder, {**GIVEN, **changes}), {})
    assert jobs == []
    assert message in outcome.reason


def test_csv_cell_that_is_too_long_is_named(folder):
    polygon = "1,1 " * 40_000  # csv takes 131,072 characters
    path = folder / "rows.csv"
    path.write_text(f'image,polygon,exemplar,out\na.png,"{polygon}",c.png,1.png\n')
    with pytest.raises(ValueError, match=r"rows.csv, after line 1: field larger than field limit .*\.jsonl"):
        read_jobs(path, {})
    jobs, failed = read_jobs(write_jsonl(folder, {**GIVEN, "mask": "", "polygon": polygon}), {})
    assert (len(jobs), failed) == (1, [])


@pytest.mark.parametrize("write", [write_csv, write_jsonl])
@pytest.mark.parametrize(
    "rows, message",
    [
        ([GIVEN, {**GIVEN, "out": "./out.png"}], r"lines \d and \d both write ./out.png"),
        ([GIVEN, {**GIVEN, "image": "out.png", "out": "b.png"}], r"line \d writes out.png, which line \d reads"),
    ],
)
def test_wrong_files_are_refused_before_anything_is_done(folder, write, rows, message):
    with pytest.raises(ValueError, match=message):
        read_jobs(write(folder, *rows), {})


def test_a_link_that_leads_back_to_itself_fails_alone(folder):
    (folder / "loop.png").symlink_to("loop.png")
    jobs, failed = read_jobs(write_jsonl(folder, {**GIVEN, "image": "loop.png"}, {**GIVEN, "out": "2.png"}), {})
    assert (len(jobs), failed) == (2, [])
    with pytest.raises(FileNotFoundError, match=r"image .*loop\.png: there is no such file"):
        read_inputs(jobs[0])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.txt", b"", "ends in .csv or .jsonl"),
        ("rows.csv", b"", "has no rows"),
        ("rows.csv", b"image,image\n", "names a column twice"),
        ("rows.csv", b"image,colour\n", "line 1: unknown column 'colour'"),
        ("rows.jsonl", b"{}\n\xff\xfe\x00", r"rows\.jsonl, line 2 is not UTF-8 \(byte 0xff\)"),
        ("rows.csv", b"image,out\nf\xe9.png,a.png\n", r"rows\.csv, line 2 is not UTF-8 \(byte 0xe9\)"),
        ("rows.csv", b"image\0,out\n", r"rows\.csv, line 1 holds a NUL byte"),
    ],
)
def test_files_that_are_no_batch(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_jobs(tmp_path / name, {})


# --- running ----------------------------------------------------------------------------------------------


def run(folder: Path, **changes) -> Outcome:
    redo = changes.pop("redo", False)
    weights = identify(folder / CHECKPOINT, Model.dtype)
    return run_row(Model, Job.from_row({**GIVEN, **changes}, folder, line=5), weights, redo)


def test_row_is_run_as_it_says(folder, edits):
    changes = {"seed": 7, "guidance": 3, "steps": 9, "composite": False, "exemplar": ["dog.png", "photo.png"]}
    assert run(folder, **changes, exemplar_weights=[1, 3], window=[0, 0, 40, 40]) == Outcome(5, "done")
    (call,) = edits
    assert (call["seed"], call["guidance"], call["steps"], call["composite"]) == (7, 3, 9, False)
    assert (call["exemplar_weights"], call["window"], call["num_images"]) == ((1, 3), (0, 0, 40, 40), 1)
    assert [image.size for image in call["exemplar"]] == [(20, 30), (48, 40)]
    assert call["mask"].sum() == 400


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_finished_row_is_skipped_in_every_format(folder, edits, suffix):
    out = f"new/out{suffix}"
    assert run(folder, out=out).status == "done"
    before = (folder / out).read_bytes()
    assert run(folder, out=out) == Outcome(5, "skipped")
    assert len(edits) == 1
    assert (folder / out).read_bytes() == before


def test_row_is_done_again_when_asked(folder, edits):
    assert [run(folder).status, run(folder, redo=True).status] == ["done", "done"]
    assert len(edits) == 2


@pytest.mark.parametrize("changes", [{"seed": 1}, {"guidance": 2}, {"feather": 3}, {"mask": None, "box": "1,1,9,9"}])
def test_row_with_other_settings_is_done_again(folder, edits, changes):
    run(folder)
    assert run(folder, **changes).status == "done"
    assert run(folder).status == "done"  # and back


@pytest.mark.parametrize("name", ["photo.png", "mask.png", "dog.png", "model.ckpt"])
def test_row_whose_input_has_changed_is_done_again(folder, edits, name):
    run(folder)
    before = (folder / name).stat()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b"!" if name == "model.ckpt" else other_png(folder / name))
    os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times has it
    assert run(folder).status == "done"


def other_png(path: Path) -> bytes:
    """The picture with one other pixel."""
    with Image.open(path) as image:
        image.putpixel((0, 0), 7)
        file = io.BytesIO()
        image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", ["photo.png", "mask.png", "dog.png", "model.ckpt"])
def test_row_whose_input_was_only_touched_is_skipped(folder, edits, name):
    run(folder)
    later = (folder / "out.png").stat().st_mtime + 10
    os.utime(folder / name, (later, later))
    assert run(folder).status == "skipped"


def test_checkpoints_of_one_name_and_size_are_told_apart(tmp_path):
    size = 3 * NUM_SAMPLES * SAMPLE_BYTES  # a third of it is looked at
    path = tmp_path / "model.ckpt"
    found = []
    for changed in (None, 0, size // 2, size - 1):
        content = bytearray(size)
        if changed is not None:  # a tensor's worth
            start = max(changed - 2 * SAMPLE_BYTES, 0)
            content[start : changed + 2 * SAMPLE_BYTES] = b"x" * len(content[start : changed + 2 * SAMPLE_BYTES])
        path.write_bytes(content)
        found.append(identify(path, torch.float16))
    assert len(set(found)) == 4
    assert {(weights.checkpoint, weights.dtype) for weights in found} == {("model.ckpt", "float16")}


def test_checkpoint_folder_is_known_by_its_weights(tmp_path):
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(part.encode())
    first = identify(tmp_path, torch.float32)
    (tmp_path / "README.md").write_text("no weights")
    assert identify(tmp_path, torch.float32) == first
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"VAE")
    assert identify(tmp_path, torch.float32) != first


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt: there is no such checkpoint"):
        identify(tmp_path / "none.ckpt", torch.float32)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n cut off"])
def test_damaged_result_is_done_again(folder, edits, content):
    (folder / "out.png").write_bytes(content)
    assert run(folder).status == "done"


def test_result_with_the_same_name_by_another_tool_is_done_again(folder, edits):
    Image.new("RGB", (4, 4)).save(folder / "out.png")
    Image.new("RGB", (4, 4)).save(folder / "out.jpg")
    assert run(folder).status == "done"
    assert run(folder, out="out.jpg").status == "done"


def test_another_dtype_or_checkpoint_is_not_finished(folder, edits):
    run(folder)
    job = Job.from_row(GIVEN, folder)
    assert is_done(job, identify(folder / CHECKPOINT, torch.float32))
    assert not is_done(job, identify(folder / CHECKPOINT, torch.float16))
    assert not is_done(job, identify(folder / "photo.png", torch.float32))
    (folder / "dog.png").unlink()
    assert not is_done(job, identify(folder / CHECKPOINT, torch.float32))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"image": "none.png"}, "none.png"),
        ({"mask": "dog.png"}, "20x30"),
        ({"mask": None, "box": "0,0,99,9"}, "outside"),
        ({"out": "out.gif"}, "out.gif: cannot save as '.gif'"),
        ({"out": "out"}, "out: cannot save as a file without a suffix"),
        ({"out": "sub"}, "is a folder"),
        ({"guidance": 13}, "unlucky"),
        ({"guidance": 14}, "the device's memory is full"),
        ({"guidance": 15}, "the device's memory is full"),
    ],
)
def test_row_that_cannot_be_run_becomes_an_outcome(folder, edits, changes, reason):
    (folder / "sub").mkdir()
    files = sorted(folder.rglob("*"))
    outcome = run(folder, **changes)
    assert (outcome.line, outcome.status) == (5, "failed")
    assert reason in outcome.reason
    assert sorted(folder.rglob("*")) == files  # nothing half done


def test_alpha_into_jpeg_fails_before_sampling(folder, edits):
    Image.new("RGBA", (48, 40)).save(folder / "alpha.png")
    outcome = run(folder, image="alpha.png", out="out.jpg")
    assert "JPEG cannot hold an image of mode 'RGBA'" in outcome.reason
    assert edits == []


def test_unforeseen_error_fails_its_row_alone(folder, edits):
    assert run(folder, guidance=16) == Outcome(5, "failed", "RuntimeError: convolution is tired")
    assert run(folder).status == "done"


def test_interruption_ends_the_batch(folder, edits):
    with pytest.raises(KeyboardInterrupt):
        run(folder, guidance=17)


@pytest.mark.parametrize("size, suffix", [((16400, 2), ".webp"), ((2, 16400), ".webp"), ((65501, 2), ".jpg")])
def test_photo_too_large_for_a_format_fails_before_sampling(folder, edits, size, suffix):
    Image.new("RGB", size).save(folder / "long.png")
    outcome = run(folder, image="long.png", mask=None, box="0,0,2,1", out=f"out{suffix}")
    assert outcome.status == "failed"
    assert f"out{suffix}: " in outcome.reason
    assert f"cannot hold a side of {max(size)} pixels" in outcome.reason
    assert edits == []
    assert not any("trial" in path.name for path in folder.iterdir())


def test_photo_with_much_exif_is_saved_as_jpeg_without_settings(folder, edits):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "x" * 65400
    Image.new("RGB", (48, 40)).save(folder / "full.jpg", exif=exif)
    with pytest.warns(PictureWarning, match=r"out\.jpg is saved without its settings") as warned:
        assert run(folder, image="full.jpg", out="out.jpg").status == "done"
    assert len(warned) == 1  # the trial before sampling is silent
    with Image.open(folder / "out.jpg") as image:
        assert len(image.getexif()[ExifTags.Base.Make]) == 65400
    assert read_provenance(folder / "out.jpg") is None


def test_edit_of_an_edit_has_its_own_settings(folder, edits):
    run(folder, out="first.jpg", seed=1)
    assert run(folder, image="first.jpg", out="second.jpg", seed=2).status == "done"
    assert run(folder, image="first.jpg", out="second.jpg", seed=2).status == "skipped"
    assert [read_provenance(folder / name)["seed"] for name in ("first.jpg", "second.jpg")] == [1, 2]


# --- settings ---------------------------------------------------------------------------------------------


def test_a_tiny_decoder_s_file_is_in_the_provenance_of_its_drafts(tmp_path):
    for name in ("photo.png", "mask.png", "dog.png", "tiny.pth", "model.ckpt"):
        (tmp_path / name).write_text(name)
    weights = identify(tmp_path / "model.ckpt", torch.float32, tiny_decoder=tmp_path / "tiny.pth")
    row = {"image": "photo.png", "mask": "mask.png", "exemplar": "dog.png", "out": "a.png"}
    draft, exact = (
        provenance_of(Job.from_row({**row, "decoder": name}, tmp_path), weights) for name in ("tiny", "vae")
    )
    assert draft["tiny_decoder_crc32"] == identify(tmp_path / "tiny.pth", torch.float32).crc32
    assert "tiny_decoder_crc32" not in exact
    assert (
        exact["checkpoint_crc32"] == draft["checkpoint_crc32"] == identify(tmp_path / "model.ckpt", torch.float32).crc32
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_provenance_is_read_back_from_a_picture(tmp_path, suffix):
    for name in ("photo.png", "mask.png", "ä.png", "b.png"):
        (tmp_path / name).write_text(name)
    job = Job.from_row({**GIVEN, "window": "0,0,8,8", "exemplar": ["ä.png", "b.png"]}, tmp_path)
    settings = provenance_of(job, WEIGHTS)
    assert [settings[name] for name in ("checkpoint", "checkpoint_crc32", "dtype")] == list(WEIGHTS[:3])
    assert "adapters" not in settings
    assert list(settings["inputs_crc32"]) == ["photo.png", "mask.png", "ä.png", "b.png"]
    assert settings["inputs_crc32"]["b.png"] == f"{zlib.crc32(b'b.png'):08x}"
    path = tmp_path / f"a{suffix}"
    save_result(Image.new("RGB", (9, 8)), path, settings)
    stored = read_provenance(path)
    assert stored.pop("size") == [9, 8]
    assert stored.pop("pbe") == pbe.__version__
    assert stored == settings


def test_stored_settings_are_a_row(folder):
    """What a picture tells can be put into a JSONL file as it is, less what is not a column."""
    job = Job.from_row({**GIVEN, "mask": None, "polygon": "1,1 9,1 5,9", "guidance": 3}, folder)
    row = {name: v for name, v in provenance_of(job, WEIGHTS).items() if name in COLUMNS}
    assert Job.from_row({**row, "out": "out.png"}, folder) == job


# --- regions ----------------------------------------------------------------------------------------------

SECOND = {"mask_2": "more.png", "exemplar_2": "cat.png;dog.png", "exemplar_weights_2": "1,3", "guidance_2": "3"}


def test_rows_have_more_regions(folder):
    row = {**GIVEN, **SECOND, "box_4": [1, 2, 3, 4], "exemplar_4": "cat.png", "seed_4": 7, "negative_4": "dog.png"}
    job = Job.from_row(row)
    assert [region.guidance for region in job.regions] == [3, None]
    assert job.regions[0].exemplar == ("cat.png", "dog.png")
    assert job.inputs == ["photo.png", "mask.png", "dog.png", "more.png", "cat.png", "dog.png", "cat.png", "dog.png"]
    again = json.loads(json.dumps(job.to_row()))
    assert again.items() >= {"mask_2": "more.png", "exemplar_weights_2": [1, 3], "seed_3": 7}.items()
    assert Job.from_row(again) == job
    (folder / "rows.csv").write_text(f"image,mask_2,exemplar_2,box_10\n{','.join(GIVEN)}\n")
    with pytest.raises(ValueError, match="unknown column 'box_10'"):
        read_jobs(folder / "rows.csv", {})


def test_regions_are_read_and_run(folder, monkeypatch):
    calls = []

    def edit_regions(model, picture, regions, **settings):
        calls.append((picture, regions, settings))
        return [picture.source]

    monkeypatch.setattr("pbe.editing.regions.edit_regions", edit_regions)
    colours = Image.new("RGB", (48, 40))
    colours.paste("red", (0, 0, 9, 9))
    colours.paste("blue", (20, 20, 40, 30))
    colours.save(folder / "colours.png")
    row = {**GIVEN, "mask": "colours.png", "exemplar": "ff0000=dog.png;#0000ff=photo.png;ff0000=photo.png"}
    more = {"polygon_2": "1,1 9,1 9,9", "exemplar_2": "dog.png", "guidance_2": 3, "negative_2": "photo.png"}
    job = Job.from_row({**row, **more, "guidance": 2}, folder)
    inputs = read_inputs(job)
    assert [region.sum() for region in inputs.canvas.regions] == [81, 200, inputs.canvas.regions[2].sum()]
    assert len(inputs.exemplars) == 4
    assert run_row(Model, job, WEIGHTS) == Outcome(0, "done")
    ((_, regions, settings),) = calls
    assert [len(region.exemplar) for region in regions] == [2, 1, 1]
    assert [region.guidance for region in regions] == [None, None, 3]
    assert [region.negative is None for region in regions] == [True, True, False]
    assert settings["guidance"] == 2
    stored = read_provenance(folder / "out.png")
    assert stored["exemplar"] == ["ff0000=dog.png", "#0000ff=photo.png", "ff0000=photo.png"]
    assert set(stored["inputs_crc32"]) == {"photo.png", "colours.png", "dog.png"}
    assert is_done(job, WEIGHTS)
    alone = read_inputs(Job.from_row({**row, "exemplar": "ff0000=dog.png"}, folder))
    assert alone.canvas.repaint.sum() == 81
    assert not alone.regions


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_2": "a.png"}, "exemplar_2 missing"),
        ({"exemplar_3": "a.png"}, "region 3: mask, box, polygon or select missing"),
        ({**SECOND, "box_2": "1,2,3,4"}, "region 2: give one of mask, box, polygon and select, got mask and box"),
        ({**SECOND, "guidance_2": "much"}, "guidance_2 must be a number"),
        ({**SECOND, "mask_2": "out.png"}, "also an input"),
        ({"exemplar": "ff0000=a.png;b.png"}, "COLOUR=FILE need"),
        ({"exemplar": "1=a.png", "mask": None, "box": "1,2,3,4"}, "COLOUR=FILE need a mask picture"),
        ({"exemplar": "1=a.png;2=b.png", "exemplar_weights": "1,2"}, "no weights"),
    ],
)
def test_bad_regions_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Job.from_row({**GIVEN, **changes})
