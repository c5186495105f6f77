"""`tools/evaluate.py run` with the systems that the paper compares with, and the figure of its texts and exemplar."""

import base64
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import instead
from PIL import Image, ImageFont

from pbe.baselines import BASELINES, Task, WeightFiles, open_baseline, running
from pbe.cli.evaluate import main
from pbe.cli.systems import FLAGS, SYSTEMS
from pbe.editing.settings import EditSettings
from pbe.evaluation import report
from pbe.evaluation.test_set import TestSet, read_labels
from pbe.images import grids
from pbe.io.checksums import sha256_of
from pbe.models.paint_by_example import PaintByExample
from tests.baselines.test_baselines import smooth
from tests.baselines.test_baselines import weights as tiny_weights  # noqa: F401  (a fixture)
from tests.evaluation.test_evaluate import judge  # noqa: F401  (a fixture)

NAMES = [*BASELINES]
LABELS = {7: "cat", 12: "dog", 30: "bird"}
STEPS = 4
QUIET = ["--device", "cpu", "--workers", "0", "--resamples", "10", "--quiet"]


@pytest.fixture(scope="module")
def weights(tiny_weights) -> WeightFiles:  # noqa: F811
    return replace(tiny_weights, dtype="float32")


@pytest.fixture(scope="module")
def files(weights) -> list[str]:
    """The options that name every file."""
    return [text for kind, flag in FLAGS.items() for text in (flag, str(getattr(weights, kind)))]


def write_test_set(folder: Path, masks: bool = False) -> Path:
    """Three items without labels, as COCOEE; with `masks`, the object is the left half of each exemplar."""
    for name in ("GT_3500", "Ref_3500", "Mask_bbox_3500", "Ref_mask_3500"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "id_list.npy", np.array([*LABELS], dtype=np.int64))
    for i, id_ in enumerate(LABELS):
        Image.fromarray(smooth(64, 64, 10 + i)).save(folder / f"GT_3500/{id_:012d}_GT.png")
        Image.fromarray(smooth(40, 30, 20 + i)).save(folder / f"Ref_3500/{id_:012d}_ref.png")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (12, 16 + i, 44, 48 + i))
        mask.save(folder / f"Mask_bbox_3500/{id_:012d}_mask.png")
        if masks:
            shown = Image.new("L", (30, 40))
            shown.paste(255, (0, 0, 15, 40))
            shown.save(folder / f"Ref_mask_3500/{id_:012d}_ref_mask.png")
    return folder


def write_labels(path: Path, labels: dict[int, str]) -> Path:
    path.write_text("id,label\n" + "".join(f"{id_:012d},{label}\n" for id_, label in labels.items()))
    return path


@pytest.fixture(scope="module")
def ran(files, judge, tmp_path_factory) -> tuple[Path, list[str]]:  # noqa: F811
    """The folder of one run of all the systems, and its arguments."""
    folder = tmp_path_factory.mktemp("systems")
    test_set, labels = write_test_set(folder / "bench"), write_labels(folder / "labels.csv", LABELS)
    arguments = ["run", "--system", *NAMES, "--test-set", str(test_set), "--labels", str(labels), *files]
    arguments += [
        "--steps",
        str(STEPS),
        "--dtype",
        "float32",
        "--backbone",
        judge,
        "--out",
        str(folder / "out"),
        *QUIET,
    ]
    assert main(arguments) == 0
    return folder / "out", arguments


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# --- results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_what_the_system_gives(name, ran, weights):
    item = TestSet(ran[0].parent / "bench").items[1]
    system = open_baseline(name, weights)
    if name.startswith("blended"):
        system = replace(system, steps=STEPS, skipped=STEPS // 4)
    elif not name.startswith("copy"):
        system = system.with_settings(steps=STEPS)
    expected = system(Task.read(item.image, item.mask, item.exemplar, label="dog", seed=42 + 1))
    raw, composited = (pixels_of(ran[0] / name / kind / f"{item.name}.png") for kind in ("raw", "composited"))
    # the same sums may round to the next value where memory is aligned otherwise
    assert np.abs(raw.astype(int) - np.asarray(expected)).max() <= 1
    source, repaint = pixels_of(item.image), item.repaint()
    assert np.array_equal(composited[~repaint], source[~repaint])
    assert (composited[repaint] != source[repaint]).any(axis=1).mean() > 0.5


def test_the_report_says_how_each_system_was_run(ran, weights, judge):  # noqa: F811
    found = json.loads((ran[0] / "report.json").read_text())
    assert [one["system"] for one in found["systems"]] == [*NAMES, *(f"{name}, composited" for name in NAMES)]
    assert found["labels"] == {f"{id_:012d}": label for id_, label in LABELS.items()}
    assert found["settings"]["seed"] == 42
    systems = found["settings"]["systems"]
    assert [*systems] == NAMES
    assert systems["copy-paste"] == {}
    for name in NAMES:
        expected = {
            kind: {"file": Path(getattr(weights, kind)).name, "sha256": sha256_of(Path(getattr(weights, kind)))}
            for kind in BASELINES[name].files
        }
        assert systems[name].pop("weights", {}) == expected
    about = {"steps": STEPS, "dtype": "float32"}
    assert systems["stable-diffusion-text"] == {**about, "guidance": 7.5}
    assert systems["blended-diffusion-image"] == {
        **about,
        "skipped": 1,
        "augmentations": 8,
        "clip_weight": 1000.0,
        "range_weight": 50.0,
    }
    assert systems["paint-by-example"] == {
        **about,
        "sampler": "plms",
        "eta": 0.0,
        "spacing": "leading",
        "guidance": 5.0,
        "guidance_interval": None,
        "resolution": None,
        "reuse": 1,
        "decoder": "vae",
        "strength": 1.0,
        "detail": None,
        "fill_holes": False,
        "smooth": 0,
        "grow": 0,
        "placement": "fill",
    }


def test_the_table_has_a_row_a_system(ran):
    found = json.loads((ran[0] / "report.json").read_text())
    text, _, notes = (ran[0] / "report.md").read_text().partition("\n\n")
    assert all(line.startswith("- ") for line in notes.splitlines())
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1  # it is aligned
    head, rule, *rows = [line.split(" | ") for line in lines]
    assert len(head) == len(rule)
    for row, one in zip(rows, found["systems"], strict=True):
        assert row[0].rstrip() == f"| {one['system']}"
        assert all("(" in cell for cell in row[1:])  # its interval
        values = [float(text.split()[0]) for text in row[1:]]
        assert values == pytest.approx([score["value"] for score in one["scores"]], abs=5e-3)
    page = (ran[0] / "report.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in NAMES)


def test_nothing_is_read_again_for_what_is_done(ran, capsys, monkeypatch):
    out, arguments = ran
    monkeypatch.setattr(running.SystemRun, "open", lambda run: pytest.fail(f"{run.name} was opened"))
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*.png")}
    assert len(times) == 2 * len(NAMES) * len(LABELS)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("3 items: 0 generated, 3 were there, 0 failed") == len(NAMES)
    assert report.markdown(json.loads((out / "report.json").read_text())) in printed
    assert {path: path.stat().st_mtime_ns for path in times} == times


CHEAP = ["copy-paste", "stable-diffusion-text", "stable-diffusion-image"]


def small_arguments(folder: Path, weights: WeightFiles) -> list[str]:
    arguments = ["run", "--system", *CHEAP, "--test-set", str(folder / "bench"), "--out", str(folder / "out")]
    arguments += ["--labels", str(folder / "labels.csv"), "--stable-diffusion", str(weights.stable_diffusion)]
    arguments += [
        "--clip",
        str(folder / "clip.pt"),
        "--vocabulary",
        str(weights.vocabulary),
        "--steps",
        "1",
        "--dtype",
        "float32",
        *QUIET,
    ]
    return arguments


@pytest.fixture(scope="module")
def small_run(weights, tmp_path_factory) -> Path:
    """A run of three systems on a test set with masks of its exemplars, with a file of weights of its own."""
    folder = tmp_path_factory.mktemp("small") / "run"
    write_test_set(folder / "bench", masks=True)
    write_labels(folder / "labels.csv", LABELS)
    shutil.copy(weights.clip, folder / "clip.pt")
    assert main(small_arguments(folder, weights)) == 0
    return folder


@pytest.fixture
def small(weights, small_run, tmp_path) -> tuple[Path, list[str]]:
    """A copy of that run, to be changed, and the arguments that take it up."""
    shutil.copytree(small_run, tmp_path / "run")
    return tmp_path / "run", small_arguments(tmp_path / "run", weights)


def other_label(folder):
    write_labels(folder / "labels.csv", LABELS | {12: "wolf"})


def other_reference(folder):
    Image.fromarray(smooth(40, 30, 5)).save(folder / f"bench/Ref_3500/{12:012d}_ref.png")


def no_reference_mask(folder):
    (folder / f"bench/Ref_mask_3500/{12:012d}_ref_mask.png").unlink()


def other_weights(folder):
    with (folder / "clip.pt").open("ab") as file:
        file.write(b"\0")


def cut_off_result(folder):
    path = folder / f"out/stable-diffusion-text/raw/{12:012d}.png"
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "made"),
    [
        (other_label, (0, 1, 0)),
        (other_reference, (1, 0, 1)),
        (no_reference_mask, (1, 0, 0)),
        (other_weights, (0, 0, 3)),
        (cut_off_result, (0, 1, 0)),
    ],
)
def test_what_follows_from_something_else_is_made_anew(change, made, small, capsys):
    folder, arguments = small
    change(folder)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for name, count in zip(CHEAP, made, strict=True):
        assert f"{name}, 3 items: {count} generated, {3 - count} were there, 0 failed" in printed


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--seed", "1"], ["--steps", "2"], ["--guidance", "2"], ["--redo"]])
def test_other_settings_make_results_anew(options, small, capsys):
    assert main(instead(small[1], *options, "--system", "stable-diffusion-image", "--limit", "2")) == 0
    assert "stable-diffusion-image, 2 items: 2 generated, 0 were there" in capsys.readouterr().out


def test_copy_paste_uses_the_masks_of_references(small):
    item = TestSet(small[0] / "bench").items[0]
    result, source = pixels_of(small[0] / f"out/copy-paste/raw/{item.name}.png"), pixels_of(item.image)
    # the cut-out alone, the exemplar's left half, is stretched to the box
    cutout = Image.open(item.exemplar).crop((0, 0, 15, 40)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(result[16:48, 12:44], np.asarray(cutout))
    assert np.array_equal(result[~item.repaint()], source[~item.repaint()])


def test_an_item_that_fails_is_named_and_the_others_are_made(small, capsys):
    folder, arguments = small
    (folder / f"bench/Ref_3500/{12:012d}_ref.png").write_bytes(b"no picture")
    report = (folder / "out/report.json").read_text()
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "copy-paste, 3 items: 0 generated, 2 were there, 1 failed" in printed.out
    assert "stable-diffusion-image, 3 items: 0 generated, 2 were there, 1 failed" in printed.out
    assert printed.err.count("000000000012 failed: ") == 2  # a system guided by text reads no exemplar
    assert (folder / "out/report.json").read_text() == report  # figures on a part compare with none


def test_blended_diffusion_may_have_a_clip_of_its_own(small, weights):
    folder, arguments = small
    system = ["--system", "blended-diffusion-image", "--adm", str(weights.adm), "--blended-clip", str(weights.clip)]
    assert main(instead(arguments, *system, "--clip", "not-there.pt", "--limit", "2")) == 0
    found = json.loads((folder / "out/report.json").read_text())["settings"]["systems"]["blended-diffusion-image"]
    assert found["weights"]["clip"]["file"] == Path(weights.clip).name


# --- what is refused ------------------------------------------------------------------------------------------


def option_of(name: str, weights: WeightFiles) -> list[str]:
    return [FLAGS[name], str(getattr(weights, name))]


REFUSED = [
    ("anydoor", [], "unknown system 'anydoor', choose one of copy-paste, copy-paste-poisson"),
    ("copy-paste copy-paste", [], "--system names one twice"),
    ("paint-by-example", [], "paint-by-example needs a Paint by Example checkpoint by --ckpt"),
    (
        "copy-paste stable-diffusion-image",
        ["vocabulary"],
        "stable-diffusion-image needs a Stable Diffusion v1 checkpoint by --stable-diffusion and a CLIP checkpoint",
    ),
    ("blended-diffusion-image", ["clip"], "512x512_diffusion.pt) by --adm"),
    ("stable-diffusion-text", ["stable_diffusion", "vocabulary"], "3 of the 3 items of"),
    ("copy-paste", ["--steps", "4"], "--steps is not a setting of copy-paste"),
    ("blended-diffusion-image", ["--guidance", "3"], "--guidance is not a setting of blended-diffusion-image"),
    ("copy-paste", ["--sampler", "ddim"], "--sampler is not a setting of copy-paste"),
    ("stable-diffusion-text", ["--spacing", "trailing"], "--spacing is not a setting of stable-diffusion-text"),
    ("stable-diffusion-image", ["stable_diffusion", "vocabulary", "--clip", "no.pt"], "no.pt: there is no such"),
    (
        "stable-diffusion-image",
        ["stable_diffusion", "vocabulary", "clip", "--steps", "0"],
        "steps must be a whole number from 1",
    ),
    (
        "stable-diffusion-image",
        ["stable_diffusion", "vocabulary", "clip", "--guidance", "nan"],
        "guidance must be a number of at least 0",
    ),
    ("paint-by-example", ["paint_by_example", "--sampler", "heun"], "'heun'"),
    (
        "paint-by-example",
        ["paint_by_example", "--spacing", "even"],
        "spacing must be 'leading', 'trailing', 'karras' or 'lcm', got 'even'",
    ),
    (
        "paint-by-example",
        ["paint_by_example", "--guidance-interval", "5"],
        "<= 1000, got '5'",
    ),
    ("paint-by-example", ["paint_by_example", "--guidance-interval", "8,2"], "<= 1000, got (8, 2)"),
    ("copy-paste", ["--guidance-interval", "0,9"], "--guidance-interval is not a setting of copy-paste"),
    ("paint-by-example", ["paint_by_example", "--resolution", "60"], "a multiple of 8, got '60'"),
    ("copy-paste", ["--devices", "2", "--device", "cuda:1"], "device='cuda:1' cannot be several devices"),
    ("copy-paste", ["--devices", "0"], "--devices must be 1 or more, got 0"),
    ("copy-paste", ["--num-nodes", "-1"], "--num-nodes must be 1 or more, got -1"),
    ("copy-paste", ["--seed", "-1"], "seed must be between 0 and "),
    ("stable-diffusion-image", ["stable_diffusion", "vocabulary", "--clip", "ADM"], "holds ADM, not a CLIP checkpoint"),
]


@pytest.mark.parametrize(("systems", "options", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_run_refuses(systems, options, message, weights, tmp_path, capsys):
    test_set = write_test_set(tmp_path / "bench")
    given = []
    for option in options:
        kind = option in FLAGS
        given += option_of(option, weights) if kind else [str(weights.adm) if option == "ADM" else option]
    arguments = [
        "run",
        "--system",
        *systems.split(),
        "--test-set",
        str(test_set),
        "--out",
        str(tmp_path / "out"),
        *QUIET,
    ]
    assert main(instead(arguments, *given)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out/report.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\n7,cat\n", "line 2: '','cat' is not an id and its label"),
        ("id,label\n7,cat\nx,dog\n", "line 3: 'x','dog' is not an id and its label"),
        ("id,label\n7,\n", "line 2: '7','' is not an id"),
        ("id,label\n7\n", "line 2: '7','' is not an id"),
        ("id,label\n7,cat\n0007,dog\n", "line 3: the id 0007 has a label already"),
        ("id,label\n7,\xe9\n", "line 2 is not UTF-8"),
        ("", "has no rows"),
    ],
)
def test_labels_that_cannot_be_read(text, message, tmp_path):
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "labels.csv")


@pytest.mark.parametrize("text", ["{", "[]", '{"items": [{"id": 7}]}', '{"items": 3}'])
def test_a_damaged_manifest_is_named(text, tmp_path):
    folder = write_test_set(tmp_path / "bench")
    (folder / "test_set.json").write_text(text)
    with pytest.raises(ValueError, match=r"bench/test_set\.json is not as `build` writes it"):
        TestSet(folder)
    assert len(TestSet(folder, labels={}).items) == 3


def test_labels_are_of_the_benchmark(tmp_path):
    write_test_set(tmp_path / "bench")
    labels = read_labels(write_labels(tmp_path / "labels.csv", LABELS))
    assert [item.label for item in TestSet(tmp_path / "bench", 2, labels).items] == ["cat", "dog"]
    assert [item.label for item in TestSet(tmp_path / "bench", labels={12: "dog"}).items] == [None, "dog", None]
    with pytest.raises(ValueError, match=r"label for the id 8, which .*id_list\.npy does not list"):
        TestSet(tmp_path / "bench", labels={**labels, 8: "cow"})


def test_the_help_tells_every_system_s_files():
    lines = {line.split()[0]: line for line in SYSTEMS.splitlines() if line.startswith("  ")}
    assert lines.keys() == BASELINES.keys()
    for name, line in lines.items():
        assert {word for word in line.split() if word.startswith("--")} == {
            FLAGS[kind] for kind in BASELINES[name].files
        }


# --- the figure -----------------------------------------------------------------------------------------------


@pytest.fixture
def figure_arguments(files, tmp_path) -> list[str]:
    test_set = write_test_set(tmp_path / "bench")
    pictures = (("image", "GT_3500", "GT"), ("mask", "Mask_bbox_3500", "mask"), ("exemplar", "Ref_3500", "ref"))
    arguments = [
        "guidance-figure",
        "--out",
        str(tmp_path / "figure.png"),
        "--steps",
        str(STEPS),
        *files[:4],
        *files[-2:],
    ]
    for option, folder, end in pictures:
        arguments += [f"--{option}", str(test_set / folder / f"{7:012d}_{end}.png")]
    return [*arguments, "--device", "cpu", "--dtype", "float32", "--quiet"]


@pytest.mark.slow
def test_the_figure_shows_each_text_s_result_beside_the_exemplar_s(figure_arguments, weights, tmp_path):
    texts, seeds = ["a cat", "a black cat on a mat"], [5, 9]
    assert main([*figure_arguments, "--texts", *texts, "--seeds", "5", "9"]) == 0
    item = TestSet(tmp_path / "bench").items[0]
    by_text, by_exemplar = (
        open_baseline(name, weights).with_settings(steps=STEPS)
        for name in ("stable-diffusion-text", "paint-by-example")
    )
    with Image.open(tmp_path / "figure.png") as figure:
        about = json.loads(figure.info["pbe"])
        shown = np.asarray(figure)
    cells = []
    for seed in seeds:
        task = Task.read(item.image, item.mask, item.exemplar, seed=seed)
        cells += [[*(by_text.paint(task, text) for text in texts), task.exemplar, by_exemplar(task)]]
    height, gap = 320, 12
    widths = [round(height * cell.width / cell.height) for cell in cells[0]]
    for j, row in enumerate(cells):
        y = shown.shape[0] - (len(cells) - j) * (height + gap)
        for i, cell in enumerate(row):
            width = widths[i]
            left = shown.shape[1] - sum(widths[i:]) - (len(row) - i) * gap
            expected = np.asarray(cell.resize((width, height), Image.Resampling.LANCZOS)).astype(int)
            # a value that rounds to the next one moves those around by two at most
            assert np.abs(shown[y : y + height, left : left + width] - expected).max() <= 2
    assert about["texts"] == texts
    assert about["seeds"] == seeds
    assert about["systems"]["paint-by-example"]["steps"] == about["systems"]["stable-diffusion-text"]["steps"] == STEPS
    assert about["systems"]["paint-by-example"]["weights"]["paint_by_example"]["file"] == "tiny.ckpt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--texts", "a cat", "--seeds", "3", "3"], "seeds, each once"),
        (["--texts", "a cat", "--ckpt", "none.ckpt"], "there is no checkpoint none.ckpt"),
        (["--texts", "a cat", "--exemplar", "none.png"], "none.png"),
        (["--texts", "a cat", "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
    ],
)
def test_the_figure_refuses(options, message, figure_arguments, tmp_path, capsys):
    assert main(instead(figure_arguments, *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "figure.png").exists()


def test_the_figure_needs_texts_that_say_something(figure_arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*figure_arguments, "--texts", "a cat", " "])
    assert end.value.code == 2
    assert "--texts is empty" in capsys.readouterr().err
    assert not (tmp_path / "figure.png").exists()


def test_the_figure_names_a_missing_file_and_replaces_none(figure_arguments, tmp_path, capsys):
    i = figure_arguments.index("--vocabulary")
    assert main([*figure_arguments[:i], *figure_arguments[i + 2 :], "--texts", "a cat"]) == 2
    assert (
        "the figure needs CLIP's vocabulary (bpe_simple_vocab_16e6.txt.gz) by --vocabulary" in capsys.readouterr().err
    )
    (tmp_path / "figure.png").touch()
    assert main([*figure_arguments, "--texts", "a cat"]) == 2
    assert "figure.png exists; --force replaces it" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "cat", "a cat that sleeps on an old red sofa in the sun", "W" * 90 + " cat"])
def test_labels_are_broken_into_lines_that_fit(text):
    font = ImageFont.load_default(size=20)
    lines = grids.wrap(text, font, 200)
    assert all(font.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert " ".join(lines).split() == text.split() or "W" * 90 in text


def test_no_global_numbers_are_drawn(figure_arguments):
    before = torch.get_rng_state()
    assert main([*figure_arguments, "--texts", "a cat"]) == 0
    assert torch.equal(torch.get_rng_state(), before)


# --- pictures of many systems, and their study ----------------------------------------------------------------


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (8, 8), (10, 5), (14, 7)])
def test_results_stand_in_rows_as_long_as_each_other(count, columns, tmp_path):
    item = TestSet(write_test_set(tmp_path / "bench")).items[0]
    greys = [255 * i // count for i in range(count)]
    for i, grey in enumerate(greys):
        Image.new("RGB", (64, 64), (grey,) * 3).save(tmp_path / f"{i}.png")
    uri = report.strip(item, [tmp_path / f"{i}.png" for i in range(count)])
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("L")).astype(int)
    side, first = report.THUMBNAIL + 2, report.THUMBNAIL + 96 + 4  # the exemplar is 30 x 40
    assert shown.shape == (side * count // columns - 2, first + side * columns - 2)
    for i, grey in enumerate(greys):
        y, x = side * (i // columns) + 64, first + side * (i % columns) + 64
        assert abs(shown[y, x] - grey) <= 3  # JPEG


def test_people_may_rank_what_run_made(ran, tmp_path, capsys):
    out, test_set = ran[0], ran[0].parent / "bench"
    results = [f"{name}={out / name / 'raw'}" for name in NAMES]
    arguments = [
        "study",
        "--test-set",
        str(test_set),
        "--results",
        *results,
        "--out",
        str(tmp_path / "study"),
        "-n",
        "2",
    ]
    assert main([*arguments, "--quiet"]) == 0
    assert f"2 items, {len(NAMES)} systems" in capsys.readouterr().out
    assert json.loads((tmp_path / "study/key.json").read_text())["systems"] == NAMES
    with pytest.raises(SystemExit):
        main(["study-report", "--help"])
    assert "key.json" in capsys.readouterr().out


def test_a_distilled_model_runs_as_it_was_distilled_for(tiny_checkpoint, tmp_path):
    content = torch.load(tiny_checkpoint)
    content["pbe"] |= {"distilled": {"sampler": "lcm", "steps": 4, "guidance": 1.0}}
    torch.save(content, tmp_path / "student.ckpt")
    ours, weights = BASELINES["paint-by-example"], WeightFiles(paint_by_example=tmp_path / "student.ckpt", device="cpu")
    chosen = ours.choose_settings({"resolution": 64}, weights)
    assert [chosen[name] for name in ("sampler", "steps", "guidance", "spacing")] == ["lcm", 4, 1.0, "lcm"]
    assert ours.choose_settings({"steps": "2"}, weights)["steps"] == 2
    assert ours.load(weights).settings == EditSettings(
        window="full", composite=False, sampler="lcm", steps=4, guidance=1.0, spacing="lcm"
    )
    ordinary = WeightFiles(paint_by_example=tiny_checkpoint)
    assert ours.choose_settings({}, ordinary) == dict(ours.settings)


@pytest.mark.slow
def test_paint_by_example_runs_with_adapters(tiny_checkpoint, tmp_path):
    name = "lora_unet_mid_block_resnets_0_conv1"
    factors = {"lora_down": torch.ones(1, 64, 3, 3), "lora_up": torch.ones(64, 1, 1, 1)}
    torch.save({f"{name}.{part}.weight": x for part, x in factors.items()}, tmp_path / "style.pt")
    weights = WeightFiles(paint_by_example=tiny_checkpoint, device="cpu", adapters=((tmp_path / "style.pt", 0.5),))
    about = running.describe("paint-by-example", weights, {})
    assert [(one["file"], one["strength"]) for one in about["adapters"]] == [("style.pt", 0.5)]
    plain = WeightFiles(paint_by_example=tiny_checkpoint, device="cpu")
    assert "adapters" not in running.describe("paint-by-example", plain, {})
    with_adapters, without = (one.load("paint_by_example", PaintByExample).state_dict() for one in (weights, plain))
    changed = {name for name, x in without.items() if not torch.equal(x, with_adapters[name])}
    assert changed == {"model.diffusion_model.middle_block.0.in_layers.2.weight"}
