"""`tools/evaluate.py` from COCO-format data to the report: build, run, score, and what they say of wrong input."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import instead
from PIL import Image

from pbe.baselines.running import settings_in
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.writing import save_checkpoint
from pbe.cli.evaluate import main
from pbe.data.coco import Coco
from pbe.data.records import DataWarning
from pbe.evaluation.backbones import load_backbone
from pbe.evaluation.bootstrap import Bootstrap, Moments
from pbe.evaluation.build import BuildConfig, build_test_set
from pbe.evaluation.compositing import composite_result
from pbe.evaluation.quality_score import GaussianMixture
from pbe.evaluation.scoring import Judges, identity, real_moments, score_results
from pbe.evaluation.surrogate import Surrogate, SurrogateConfig, save_surrogate
from pbe.evaluation.test_set import TestSet
from pbe.io.checksums import sha256_of
from pbe.models.clip import CLIP, CLIP_MEAN, CLIP_STD, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

SYSTEM = "paint-by-example"
ROOT = Path(__file__).resolve().parents[2]
SMALL_CLIP = CLIPConfig(
    vision=CLIPVisionConfig(width=64, num_layers=1, num_heads=2, patch_size=56, image_size=224, mlp_width=64),
    text=CLIPTextConfig(width=64, num_layers=1, num_heads=2, vocab_size=20, context_length=4, mlp_width=64),
    embed_dim=12,
)


def seeded(module_class, config, scale=0.2):
    module = build_on_meta(module_class, config)
    g = torch.Generator().manual_seed(0)
    state = {name: scale * torch.randn(p.shape, generator=g) for name, p in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module.eval()


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("judge") / "judge.ckpt"
    config = SurrogateConfig(num_classes=2, image_size=32, width=8, num_levels=2, num_features=8)
    save_surrogate(seeded(Surrogate, config), path, ["a", "b"], {})
    return f"surrogate={path}"


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> tuple[Path, Path]:
    """16 photos, one or two objects each: squares of a category's colour, on noise."""
    folder = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    colours = {1: (220, 40, 40), 2: (40, 40, 220), 3: (40, 200, 40)}
    images, annotations = [], []
    for i in range(16):
        width, height = (96, 72) if i % 2 else (70, 90)
        pixels = rng.integers(60, 200, (height, width, 3), dtype=np.uint8)
        images.append({"id": 100 + i, "file_name": f"{100 + i:012d}.png", "width": width, "height": height})
        for k in range(1 + i % 2):
            category = 3 if i == 0 else 1 + (i + k) % 2  # category 3 has one photo alone
            x, y, side = int(rng.integers(0, 10)) + 34 * k, int(rng.integers(0, 20)), 28 + i % 5
            pixels[y : y + side, x : x + side] = np.add(colours[category], rng.integers(-30, 30, (side, side, 3)))
            annotations.append(
                {"id": len(annotations), "image_id": 100 + i, "category_id": category, "bbox": [x, y, side, side]}
            )
        Image.fromarray(pixels).save(folder / f"{100 + i:012d}.png")
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "<b>blue"}, {"id": 3, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json", folder


CONFIG = BuildConfig(num_items=10, size=64, area=(0.05, 0.6), grow=2, min_side=16)


@pytest.fixture(scope="module")
def test_set(coco, judge, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "bench"
    source = Coco(*coco)
    assert build_test_set(source, source, out, load_backbone(judge), CONFIG) == 10
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- build ------------------------------------------------------------------------------------------------


def test_build_is_deterministic_by_its_seed(coco, judge, test_set, tmp_path):
    source, backbone = Coco(*coco), load_backbone(judge)
    build_test_set(source, source, tmp_path / "again", backbone, CONFIG)
    assert contents(tmp_path / "again") == contents(test_set)
    other = BuildConfig(num_items=10, size=64, area=(0.05, 0.6), grow=2, min_side=16, seed=1)
    build_test_set(source, source, tmp_path / "other", backbone, other)
    assert contents(tmp_path / "other") != contents(test_set)


def test_a_manifest_builds_what_coco_s_data_build(coco, judge, test_set, tmp_path):
    content = json.loads(coco[0].read_text())
    labels = {one["id"]: one["name"] for one in content["categories"]}
    names = {one["id"]: one["file_name"] for one in content["images"]}
    rows = ["file,class,x0,y0,x1,y1"]
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        rows.append(f"{names[one['image_id']]},{labels[one['category_id']]},{x},{y},{x + width},{y + height}")
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    flags = ["--images", str(coco[1]), "--backbone", judge, "--device", "cpu", "--quiet", "-n", "10", "--size", "64"]
    flags += ["--area", "0.05", "0.6", "--grow", "2", "--min-side", "16", "--out", str(tmp_path / "bench")]
    assert main(["build", "--manifest", str(tmp_path / "boxes.csv"), *flags]) == 0
    found, expected = contents(tmp_path / "bench"), contents(test_set)
    found, expected = ({**files, "test_set.json": json.loads(files["test_set.json"])} for files in (found, expected))
    assert found["test_set.json"].pop("images") == found["test_set.json"].pop("exemplars") == "boxes.csv"
    del expected["test_set.json"]["images"], expected["test_set.json"]["exemplars"]
    assert found == expected


def test_what_is_built_is_a_test_set(coco, test_set):
    manifest = json.loads((test_set / "test_set.json").read_text())
    test_set = TestSet(test_set)
    assert [item.id for item in test_set.items] == np.load(test_set.folder / "id_list.npy").tolist()
    assert len(test_set.items) == len(manifest["items"]) == 10
    for item, listed in zip(test_set.items, manifest["items"], strict=True):
        assert listed["image"] == f"{item.id:012d}.png"  # ids are those in the files' names
        assert listed["label"] == item.label != "green"  # which has no other photo
        source, repaint = Image.open(item.image), item.repaint()
        assert source.size == (64, 64) == repaint.shape[::-1]
        assert 0.05 * 0.9 < repaint.mean() < 0.6 * 1.1  # the box is rounded to the test set's pixels
        (x0, y0, x1, y1), (wx, wy, ex, ey) = listed["box"], listed["window"]
        assert ex - wx == ey - wy == 70 + 2 * (ex - wx == 72)
        scale = 64 / (ex - wx)
        rows, columns = np.flatnonzero(repaint.any(axis=1)), np.flatnonzero(repaint.any(axis=0))
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        expected = ((x0 - wx) * scale, (y0 - wy) * scale, (x1 - wx) * scale, (y1 - wy) * scale)
        np.testing.assert_allclose(found, expected, atol=0.5)  # whole pixels
        reference = Image.open(item.exemplar)
        rx0, ry0, rx1, ry1 = listed["exemplar_box"]
        assert reference.width <= rx1 - rx0 + 4  # 2 pixels on each side, less at the edge
        photo = Image.open(coco[1] / listed["exemplar"])
        grown = (max(rx0 - 2, 0), max(ry0 - 2, 0), min(rx1 + 2, photo.width), min(ry1 + 2, photo.height))
        assert reference.tobytes() == photo.crop(grown).tobytes()


def test_masks_of_references_stand_beside_them(coco, judge, tmp_path):
    """A triangle in each box, as a polygon, at the exemplar's place and size."""
    content = json.loads(coco[0].read_text())
    for one in content["annotations"]:
        x, y, side, _ = one["bbox"]
        one["segmentation"] = [[x, y, x + side, y, x, y + side]]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    source = Coco(tmp_path / "instances.json", coco[1])
    build_test_set(source, source, tmp_path / "bench", load_backbone(judge), CONFIG)
    manifest = {one["id"]: one for one in json.loads((tmp_path / "bench/test_set.json").read_text())["items"]}
    for item in TestSet(tmp_path / "bench").items:
        mask = Image.open(item.exemplar_mask)
        assert mask.size == Image.open(item.exemplar).size
        x0, y0, x1, _ = manifest[item.id]["exemplar_box"]
        left, top, side = min(x0, 2), min(y0, 2), x1 - x0
        row, column = np.mgrid[: mask.height, : mask.width] + 0.5
        row, column = row - top, column - left
        expected = (row > 0) & (column > 0) & (row + column < side)
        assert (np.asarray(mask) != expected).sum() <= 2 * side  # pixels on the edges


def test_references_are_the_nearest_of_their_category_in_other_photos(coco, judge, test_set):
    backbone, source = load_backbone(judge), Coco(*coco)

    def patch_features(image, box):
        x0, y0, x1, y1 = box
        grown = (max(x0 - 2, 0), max(y0 - 2, 0), min(x1 + 2, image.width), min(y1 + 2, image.height))
        return F.normalize(backbone.features([image.crop(grown).resize((224, 224))]), dim=1)[0]

    objects = []  # every object of the data: photo, label, features
    for record in (source[i] for i in range(len(source))):
        image = Image.open(record.image)
        for box, label in zip(record.boxes, record.labels, strict=True):
            pixels = np.rint(box * ((image.width, image.height) * 2)).astype(int).tolist()
            objects.append((record.image.name, label, patch_features(image, pixels)))
    for listed in json.loads((test_set / "test_set.json").read_text())["items"]:
        own = patch_features(Image.open(coco[1] / listed["image"]), listed["box"])
        best = max(
            (float(own @ features), name)
            for name, label, features in objects
            if label == listed["label"] and name != listed["image"]
        )
        assert listed["exemplar"] == best[1]
        assert listed["similarity"] == pytest.approx(best[0], abs=2e-6)  # rounded to 6 digits, float32


def test_cut_and_missing_photos_do_not_end_the_building(coco, judge, tmp_path):
    folder = Path(shutil.copytree(coco[1], tmp_path / "photos"))
    cut = folder / f"{103:012d}.png"
    cut.write_bytes(cut.read_bytes()[:3000])
    (folder / f"{105:012d}.png").unlink()
    (folder / f"{107:012d}.png").write_text("no picture")
    source = Coco(folder / "instances.json", folder)
    config = dataclasses.replace(CONFIG, num_items=None)
    with pytest.warns(DataWarning) as caught:
        count = build_test_set(source, source, tmp_path / "bench", load_backbone(judge), config)
    messages = {str(w.message) for w in caught}
    for number in (103, 105, 107):
        assert sum(f"{number:012d}.png" in message for message in messages) == 1
    items = json.loads((tmp_path / "bench/test_set.json").read_text())["items"]
    assert count == len(items) >= 10
    assert not {103, 105, 107} & {item["id"] for item in items}


def test_build_refuses(coco, judge, test_set, tmp_path, capsys):
    flags = ["--coco", str(coco[0]), "--images", str(coco[1]), "--backbone", judge, "--device", "cpu", "--quiet"]
    small = ["--size", "64", "--area", "0.05", "0.6", "--min-side", "16"]
    assert main(["build", *flags, *small, "--out", str(test_set)]) == 2
    assert "exists; --force" in capsys.readouterr().err
    assert main(["build", *flags, "--out", str(tmp_path / "a"), "--area", "0.9", "0.99"]) == 2
    assert "gives 0 items: boxes of 0.9 to 0.99 of a square" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert main(["build", *flags, "--out", str(tmp_path / "a"), "--area", "0.5", "0.1"]) == 2
    assert "area must be two shares" in capsys.readouterr().err
    assert main(["build", *flags, "--out", str(tmp_path / "a"), "--exemplar-coco", str(coco[0])]) == 2
    assert "--exemplar-coco needs --exemplar-images, the folder of its pictures" in capsys.readouterr().err
    assert main(["build", *flags, "--out", str(tmp_path / "a"), "--exemplar-images", str(coco[1])]) == 2
    assert "--exemplar-images needs --exemplar-coco or --exemplar-manifest" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file.txt").touch()
    assert main(["build", *flags, *small, "--out", str(tmp_path / "mine"), "--force"]) == 2
    assert (tmp_path / "mine/file.txt").exists()
    assert main(["build", *flags, *small, "--out", str(tmp_path / "b"), "-n", "3"]) == 0
    assert len(TestSet(tmp_path / "b").items) == 3


# --- run and score ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(test_set, judge, tiny_checkpoint, coco, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of one whole run, and its arguments."""
    out = tmp_path_factory.mktemp("run") / "out"
    mixture = out.parent / "mixture.npz"
    pytest.importorskip("sklearn")
    loading = ["--device", "cpu", "--workers", "0", "--quiet"]
    fit = ["fit-mixture", "--real", str(coco[1]), "--backbone", judge, "--components", "2", "--out", str(mixture)]
    assert main([*fit, *loading]) == 0
    arguments = ["run", "--ckpt", str(tiny_checkpoint), "--test-set", str(test_set), "--out", str(out), "--steps", "4"]
    arguments += ["--guidance-interval", "100,600"]
    arguments += ["--dtype", "float32"]
    arguments += ["--backbone", judge, "--real", str(coco[1]), "--mixture", str(mixture), "--resamples", "20"]
    assert main([*arguments, *loading]) == 0
    return out, [*arguments, *loading]


@pytest.mark.slow
def test_run_keeps_the_background_of_composited_results_alone(test_set, scored):
    out, _ = scored
    for item in TestSet(test_set).items:
        source = np.asarray(Image.open(item.image)).astype(int)
        raw, composited = (
            np.asarray(Image.open(out / SYSTEM / name / f"{item.name}.png")) for name in ("raw", "composited")
        )
        outside = ~item.repaint()
        assert (composited[outside] == source[outside]).all()
        assert (raw[outside] != source[outside]).any()
        assert (composited[~outside] != source[~outside]).any()


def test_run_is_what_edit_gives(test_set, scored, tiny_checkpoint):
    from pbe import edit, load_model

    model = load_model(tiny_checkpoint, "cpu", "float32")
    item = TestSet(test_set).items[3]
    settings = {"steps": 4, "guidance_interval": (100, 600), "seed": 42 + 3, "window": "full", "composite": False}
    (expected,) = edit(model, item.image, item.mask, item.exemplar, **settings)
    found = np.asarray(Image.open(scored[0] / SYSTEM / "raw" / f"{item.name}.png")).astype(int)
    # sums may round to the next value where memory is aligned otherwise
    assert np.abs(found - np.asarray(expected)).max() <= 1


def test_composited_results_take_the_source_s_light(test_set, tmp_path):
    """Of a raw result that is the source in another light, nothing is left to see."""
    source = np.random.default_rng(0).integers(40, 200, (64, 64, 3))
    Image.fromarray(source.astype(np.uint8)).save(tmp_path / "source.png")
    item = replace(TestSet(test_set).items[0], image=tmp_path / "source.png")
    Image.fromarray((source + np.int64([-12, 0, 20])).astype(np.uint8)).save(tmp_path / "raw.png")
    composite_result(item, tmp_path / "raw.png", tmp_path / "composited.png")
    assert np.abs(np.asarray(Image.open(tmp_path / "composited.png")) - source).max() <= 1  # rounding


@pytest.mark.slow
def test_run_takes_up_where_it_stopped(scored, capsys):
    out, arguments = scored
    raw = sorted((out / SYSTEM / "raw").iterdir())
    before = {path: path.stat().st_mtime_ns for path in [*raw, *(out / SYSTEM / "composited").iterdir()]}
    kept = raw[0].read_bytes()
    raw[0].unlink()
    report = json.loads((out / "report.json").read_text())
    assert main(arguments) == 0
    assert "10 items: 1 generated, 9 were there, 0 failed" in capsys.readouterr().out
    again, first = (np.asarray(Image.open(file)).astype(int) for file in (raw[0], io.BytesIO(kept)))
    assert np.abs(again - first).max() <= 1  # sums may round to the next value where memory is aligned otherwise
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert raw[0] in changed
    assert {path.name for path in changed} == {raw[0].name}
    assert json.loads((out / "report.json").read_text())["settings"] == report["settings"]


def test_report_says_how_it_was_made(test_set, judge, scored, tiny_checkpoint, coco):
    report = json.loads((scored[0] / "report.json").read_text())
    about = {"sampler": "plms", "eta": 0.0, "spacing": "leading", "steps": 4, "resolution": None}
    about |= {"guidance": 5.0, "guidance_interval": [100, 600], "reuse": 1, "decoder": "vae", "strength": 1.0}
    about |= {"detail": None, "fill_holes": False, "smooth": 0, "grow": 0, "placement": "fill"}
    about["dtype"] = "float32"
    about["weights"] = {"paint_by_example": {"file": "tiny.ckpt", "sha256": sha256_of(tiny_checkpoint)}}
    assert report["settings"] == {"seed": 42, "systems": {SYSTEM: about}}
    assert torch.__version__.startswith(report["versions"]["torch"])
    assert report["test_set"]["items"] == report["test_set"]["of"] == 10
    (backbone,) = report["judges"]["backbones"]
    assert backbone["surrogate"] is True
    assert backbone["sha256"] == sha256_of(Path(judge.partition("=")[2]))
    assert report["judges"]["real"] == {"folder": coco[1].name, "pictures": {"surrogate": 16}}
    raw, composited = report["systems"]
    assert (raw["system"], composited["system"]) == (SYSTEM, f"{SYSTEM}, composited")
    keys = ["fid", "log_density", "foreground_similarity", "foreground_fid"]
    assert [score["key"] for score in raw["scores"]] == [
        *(f"{key}/surrogate" for key in keys),
        "background_mse",
        "background_ssim",
    ]
    for score in raw["scores"]:
        assert score["low"] <= score["value"] <= score["high"] or score["name"].endswith("fid")
        assert score["is_released"] is False
        assert score["is_surrogate"] == ("/" in score["key"])
        assert ("surrogate" in score["title"]) == score["is_surrogate"]
    scores = {score["key"]: score for score in composited["scores"]}
    assert scores["background_mse"]["value"] == 0
    values = [value for value in raw["per_item"]["background_ssim"].values() if value is not None]
    assert next(f for f in raw["scores"] if f["key"] == "background_ssim")["count"] == len(values)


def test_the_page_stands_alone_and_escapes(scored):
    page = (scored[0] / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(?!data:)", page)
    assert "http" not in re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", page)
    assert page.count("data:image/jpeg;base64,") == 10
    assert "<b>blue" not in page  # a label from the data
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert "<b>blue" in json.loads(data)["labels"].values()
    assert "do not compare them with published ones" in page
    assert ">84.97<" in page  # the paper's CLIP score


def test_the_page_works_in_a_browser(scored):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next((p for p in (Path("/usr/bin/chromium"), Path("/usr/bin/google-chrome")) if p.exists()), None)
    if chromium is None:
        pytest.skip("there is no browser")
    report = json.loads((scored[0] / "report.json").read_text())
    errors = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        page = browser.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((scored[0] / "report.html").as_uri())
        titles = page.locator("#score option").all_text_contents()
        page.select_option("#score", label="background MSE ↓")
        captions = page.locator("#worst figcaption").all_text_contents()
        page.select_option("#system", label=f"{SYSTEM}, composited")
        kept = page.locator("#score option:checked").text_content()
        browser.close()
    assert errors == []
    assert "background SSIM ↑" in titles
    values = report["systems"][0]["per_item"]["background_mse"]
    worst = sorted(values, key=values.get, reverse=True)
    assert [caption.split(" · ")[0] for caption in captions] == [name.lstrip("0") for name in worst]
    assert kept == "background MSE ↓"


def test_score_gives_what_run_gave(test_set, judge, scored, coco, tmp_path, capsys):
    out, arguments = scored
    judging = arguments[arguments.index("--backbone") :]
    results = [f"ours & others={out / SYSTEM / 'raw'}", str(out / SYSTEM / "composited")]
    assert (
        main(["score", "--results", *results, "--test-set", str(test_set), "--out", str(tmp_path / "s"), *judging]) == 0
    )
    assert "\n| ours & others |" in capsys.readouterr().out
    found, expected = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "s", out))
    assert [system.pop("system") for system in found["systems"]] == ["ours & others", "composited"]
    for system in expected["systems"]:
        del system["system"]
    assert found["systems"] == expected["systems"]
    made = found["settings"]["systems"]
    assert made.pop("composited") == {}  # those tell of the raw ones alone
    assert made["ours & others"].pop("weights")["paint_by_example"]["file"] == "tiny.ckpt"
    about = {"system": SYSTEM, "sampler": "plms", "eta": 0.0, "spacing": "leading", "steps": 4, "resolution": None}
    about |= {"guidance": 5.0, "guidance_interval": [100, 600], "reuse": 1, "decoder": "vae", "strength": 1.0}
    about |= {"detail": None, "fill_holes": False, "smooth": 0, "grow": 0, "placement": "fill"}
    assert made == {"ours & others": {**about, "dtype": "float32", "seed": 42}}
    assert "<h1>ours &amp; others, composited</h1>" in (tmp_path / "s/report.html").read_text()


def test_the_sources_themselves_may_be_a_row(test_set, judge, tmp_path):
    out = tmp_path / "out"
    arguments = ["--backbone", judge, "--resamples", "5", "--device", "cpu", "--workers", "0", "--quiet"]
    results = f"real photos={test_set / 'GT_3500'}"
    assert main(["score", "--results", results, "--test-set", str(test_set), "--out", str(out), *arguments]) == 0
    (row,) = json.loads((out / "report.json").read_text())["systems"]
    scores = {score["name"]: score["value"] for score in row["scores"]}
    assert row["system"] == "real photos"
    assert scores["background_mse"] == 0
    assert scores["background_ssim"] == pytest.approx(1)


def test_results_made_in_different_ways_are_not_said_to_be_of_one(test_set, scored, tmp_path):
    names = [item.name for item in TestSet(test_set).items]
    for name in names:
        (tmp_path / f"{name}.png").write_bytes((scored[0] / SYSTEM / "raw" / f"{name}.png").read_bytes())
    assert settings_in(TestSet(test_set), tmp_path)["seed"] == 42
    (tmp_path / f"{names[5]}.png").write_bytes((tmp_path / f"{names[6]}.png").read_bytes())  # of another seed
    assert settings_in(TestSet(test_set), tmp_path) == {}


def test_score_refuses(test_set, scored, judge, tmp_path, capsys):
    def message(*arguments):
        usual = ["score", "--test-set", str(test_set), "--out", str(tmp_path / "o"), "--quiet"]
        assert main(instead(usual, *arguments)) == 2
        return capsys.readouterr().err

    raw = scored[0] / SYSTEM / "raw"
    assert "no such folder of results" in message("--results", str(tmp_path / "none"))
    (tmp_path / "part").mkdir()
    names = sorted(path.name for path in raw.iterdir())
    for name in names[1:]:
        (tmp_path / "part" / name).write_bytes((raw / name).read_bytes())
    text = message("--results", str(tmp_path / "part"))
    assert f"part lacks the results of 1 of 10 items; the first is {names[0]}" in text
    Image.new("RGB", (32, 32)).save(tmp_path / "part" / names[0])
    assert "is 32x32, but the image of" in message("--results", str(tmp_path / "part"), "--workers", "0")
    assert "two systems are called 'raw'" in message("--results", str(raw), f"raw={raw}")
    assert "--real is for FID, which needs a --backbone" in message("--results", str(raw), "--real", str(raw))
    mixture = str(scored[0].parent / "mixture.npz")
    assert "the backbones here are: none" in message("--results", str(raw), "--mixture", mixture)
    assert "limit must be 2 or more" in message("--results", str(raw), "--limit", "1")
    assert "names a kind twice" in message("--results", str(raw), "--backbone", judge, judge)
    assert "--resamples must be 1 or more" in message("--results", str(raw), "--resamples", "0")
    assert "--pictures must be 0 or more" in message("--results", str(raw), "--pictures", "-1")

    text = message("--results", str(raw), "--out", mixture)
    assert text == f"error: --out {mixture} is a file; give a folder\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--out", "m.npz", "--components", "0"], "components must be 1 or more, got 0"),
        (["--out", "m.npz", "--components", "9"], "9 components over 8 features need 72 pictures or more, got 16"),
        (["--out", "m.pkl", "--components", "2"], "m.pkl: a mixture's file ends in .npz"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_before_photos_are_read(
    arguments, reason, coco, judge, monkeypatch, tmp_path, capsys
):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pbe.evaluation.scoring.photo_features", lambda *_: pytest.fail("photos were read"))
    fit = ["fit-mixture", "--real", str(coco[1]), "--backbone", judge, "--device", "cpu", "--quiet"]
    assert main([*fit, *arguments]) == 2
    assert capsys.readouterr().err == f"error: {reason}\n"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_run_on_two_processes(scored, tmp_path):
    """A program of its own, since Lightning starts it again for the second process."""
    out, arguments = scored
    arguments = [str(tmp_path / "two") if value == str(out) else value for value in arguments]
    arguments = instead(arguments, "--devices", "2", "--limit", "5", "--system", "copy-paste", SYSTEM)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/evaluate.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for name in ("copy-paste", SYSTEM):
        assert f"{name}, 5 items: 5 generated, 0 were there, 0 failed" in done.stdout
    for path in (tmp_path / "two" / SYSTEM / "raw").iterdir():
        two, one = (np.asarray(Image.open(file)).astype(int) for file in (path, out / SYSTEM / "raw" / path.name))
        assert np.abs(two - one).max() <= 1  # sums may round to the next value where memory is aligned otherwise
    assert json.loads((tmp_path / "two/report.json").read_text())["test_set"]["items"] == 5


# --- the released scores, end to end ----------------------------------------------------------------------


def test_clip_score_qs_and_fid_are_the_released_ones_end_to_end(test_set, scored, coco, tmp_path):
    """From files to figures in numpy, but for the network itself; its sizes here are small."""
    linalg = pytest.importorskip("scipy.linalg")
    clip = seeded(CLIP, SMALL_CLIP)
    clip.visual_projection.weight.data *= 1e-3
    save_checkpoint(clip.state_dict(), tmp_path / "clip.ckpt", pbe_entry(SMALL_CLIP))
    another = load_backbone(f"clip={tmp_path / 'clip.ckpt'}")
    backbone = replace(another, name="CLIP ViT-B/32")
    test_set, raw = TestSet(test_set), scored[0] / SYSTEM / "raw"
    real = real_moments(coco[1], backbone, tmp_path)
    files = [raw / f"{item.name}.png" for item in test_set.items]
    mean = backbone.features([Image.open(file) for file in files]).double().mean(dim=0)
    P = 2000.0 * torch.eye(12, dtype=torch.float64)  # densities of these small features lie within QS's range
    mixture = GaussianMixture(torch.ones(1, dtype=torch.float64), mean[None], P[None], identity(backbone))
    judges = Judges({"clip": backbone}, {"clip": real}, mixture, bootstrap=Bootstrap(5))
    found = score_results(test_set, raw, judges, "raw", batch_size=3)
    scores = {score.key: score for score in found.scores}
    assert {key for key, score in scores.items() if score.is_released} == {"fid/clip", "qs/clip", "clip_score/clip"}
    # QS's range is of ViT-B/32's features alone
    judges = Judges({"clip": another}, mixture=replace(mixture, features=identity(another)), bootstrap=Bootstrap(5))
    keys = {score.key for score in score_results(test_set, raw, judges, "raw").scores}
    assert "log_density/clip" in keys
    assert "qs/clip" not in keys

    def encode(values):
        """(H, W, 3) in [0, 1], resized already."""
        x = (values - CLIP_MEAN) / CLIP_STD
        with torch.inference_mode():
            return clip.encode_image(torch.from_numpy(x.transpose(2, 0, 1)[None]).float())[0].double().numpy()

    similarities, whole = [], []
    for item in test_set.items:
        result = Image.open(raw / f"{item.name}.png")
        mask = np.asarray(Image.open(item.mask))
        white = np.nonzero(mask.ravel() == 255)[0]
        (y0, x0), (y1, x1) = np.column_stack(np.unravel_index([white.min(), white.max()], mask.shape))
        crop = torch.from_numpy(np.array(result)[y0:y1, x0:x1] / 255).permute(2, 0, 1)[None]
        crop = F.interpolate(crop, (224, 224), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
        a, b = encode(crop), encode(np.array(Image.open(item.exemplar).resize((224, 224))) / 255)
        similarities.append(100 * a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        whole.append(encode(np.array(result.resize((224, 224), Image.Resampling.BICUBIC)) / 255))
    np.testing.assert_allclose(found.per_item["clip_score/clip"], similarities, rtol=1e-5)  # float32 networks
    assert scores["clip_score/clip"].value == pytest.approx(np.mean(similarities), rel=1e-5)

    distances = ((np.array(whole) - mean.numpy()) ** 2).sum(axis=1)
    expected = (-6 * np.log(2 * np.pi) + 12 * np.log(2000) - 2000**2 * distances / 2) / 300 * 100
    assert (expected > 0).sum() >= 3
    np.testing.assert_allclose(found.per_item["qs/clip"], expected.clip(0, 100), rtol=1e-3)  # float32 features

    photos = []
    for path in sorted(coco[1].glob("*.png")):
        image = Image.open(path)
        scale = 512 / min(image.size)
        image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BILINEAR)
        left, top = ((side - 512) // 2 for side in image.size)
        square = image.crop((left, top, left + 512, top + 512)).resize((224, 224), Image.Resampling.BICUBIC)
        photos.append(encode(np.array(square) / 255))
    a, b = (np.cov(np.array(x), rowvar=False) for x in (photos, whole))
    difference = np.mean(photos, axis=0) - np.mean(whole, axis=0)
    expected = difference @ difference + np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b).real)
    assert scores["fid/clip"].value == pytest.approx(expected, rel=1e-3)  # float32 features, ranks below 12


def test_real_moments_are_kept_until_the_photos_or_the_network_change(coco, judge, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(coco[1].glob("*.png"))[:4]:
        (folder / path.name).write_bytes(path.read_bytes())
    backbone, calls = load_backbone(judge), []

    def moments() -> Moments:
        return real_moments(folder, backbone, tmp_path / "cache", on_batch=calls.append)

    first = moments()
    assert sum(calls) == 4
    again = moments()
    assert sum(calls) == 4
    assert torch.equal(first.covariance, again.covariance)
    assert first.count == again.count == 4
    next(folder.iterdir()).unlink()
    assert moments().count == 3
    assert sum(calls) == 7
