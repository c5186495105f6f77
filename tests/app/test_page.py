"""The page without a browser: its endpoint for programs, what it refuses, and what becomes of images and masks."""

import base64
import io
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import at_once
from PIL import Image

import pbe
from pbe.batch.provenance import Weights, identify, read_provenance, save_result
from pbe.editing.loading import AdaptedModels
from pbe.editing.settings import DEMO, QUICK, quick_settings, setting_docs
from pbe.editing.together import run_together
from pbe.images.pillow import PictureWarning
from pbe.images.windows import Box
from pbe.models.paint_by_example import Distilled

gr = pytest.importorskip("gradio", reason="the page needs the extra app")
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from pbe.app import page as app  # noqa: E402
from pbe.app import pictures, regions, serving  # noqa: E402
from pbe.app import results as shown  # noqa: E402
from pbe.app.canvas import drawn_mask, to_value  # noqa: E402
from pbe.app.editor import Loaded, Upload  # noqa: E402
from pbe.cli.app import main  # noqa: E402
from pbe.serve import uploads  # noqa: E402
from pbe.serve.engine import Cancelled, Engine, Ticket  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = Weights("tiny.ckpt", "00000000", "float32")
BOX = (20, 16, 60, 48)
SETTINGS = {"guidance": 3, "steps": 4, "seed": 7, "num_images": 1, "sampler": "ddim"}
EDIT_SETTINGS = replace(QUICK, guidance=3.0, steps=4, seed=7, sampler="ddim")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return pbe.load_model(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def no_telemetry():
    """Gradio's client, unlike the page, reports its use if this does not forbid it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        yield


@pytest.fixture(scope="module")
def client(model):
    page = app.build_page(model, WEIGHTS)
    with serving.warnings_on_page():
        yield Client(serving.serve(page, port=free_port()), verbose=False)
    page.close(verbose=False)


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """An image of 100x80, its mask, an exemplar."""
    paths = {name: tmp_path / f"{name}.png" for name in ("image", "mask", "exemplar")}
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(paths["image"])
    mask = Image.new("L", (100, 80))
    mask.paste(255, BOX)
    mask.save(paths["mask"])
    Image.new("RGB", (20, 30), "red").save(paths["exemplar"])
    return paths


def call(client: Client, files: dict[str, Path], **changes) -> list[Path]:
    handed = {name: handle_file(path) for name, path in files.items()}
    return [Path(path) for path in client.predict(**handed, **{**SETTINGS, **changes}, api_name="/edit")]


def pixels(path: Path | Image.Image) -> np.ndarray:
    return np.asarray(path if isinstance(path, Image.Image) else Image.open(path))


# --- the endpoint -----------------------------------------------------------------------------------------


def test_the_endpoint_gives_what_edit_gives(client, model, files):
    results = call(client, files, num_images=2)
    expected = pbe.edit(
        model,
        *files.values(),
        guidance=3,
        steps=4,
        seed=7,
        num_images=2,
        sampler="ddim",
        spacing="trailing",
        batch_size=uploads.BATCH_SIZE,
    )
    assert [path.name for path in results] == ["image-7.png", "image-8.png"]
    for path, image in zip(results, expected, strict=True):
        assert (pixels(path) == pixels(image)).all()
    outside = pixels(files["mask"]) == 0
    assert (pixels(results[0])[outside] == pixels(files["image"])[outside]).all()
    assert (pixels(results[0]) != pixels(results[1])).any()


def test_results_hold_their_settings(client, files):
    second = call(client, files, num_images=2)[1]
    settings = read_provenance(second)
    assert settings["seed"] == 8
    assert settings["guidance"] == 3
    assert settings["checkpoint"] == "tiny.ckpt"
    assert settings["image"] == "image.png"  # no path of the server
    assert "/" not in str(settings)


def test_a_whole_number_may_come_as_a_float(client, files):
    (result,) = call(client, files, steps=4.0, num_images=1)
    assert read_provenance(result)["steps"] == 4


def test_the_sliders_values_are_the_defaults(client, files):
    handed = {name: handle_file(path) for name, path in files.items()}
    results = client.predict(**handed, steps=4, api_name="/edit")
    assert len(results) == 2
    settings = read_provenance(Path(results[0]))
    assert [settings[name] for name in ("sampler", "spacing", "guidance")] == ["dpm_solver", "trailing", 5]


def test_the_sliders_begin_with_the_models_own_settings(model):
    page = app.build_page(model, WEIGHTS, quick_settings("demo"))
    values = {block.label: block.value for block in page.blocks.values() if isinstance(block, gr.Slider)}
    assert (values["Guidance"], values["Steps"]) == (2, 10)
    page.close(verbose=False)


def test_a_distilled_model_begins_with_its_own_settings(model):
    student = copy(model)
    student.config = replace(model.config, distilled=Distilled("lcm", 2, 1.0))
    page = app.build_page(student, WEIGHTS)
    values = {block.label: block.value for block in page.blocks.values() if isinstance(block, gr.Slider | gr.Dropdown)}
    assert [values[label] for label in ("Guidance", "Steps", "Sampler")] == [1, 2, "lcm"]
    page.close(verbose=False)
    changed = app.Editor(AdaptedModels(lambda _: student), WEIGHTS, QUICK).changed
    assert changed({"steps": 4.0}) == replace(QUICK, sampler="lcm", steps=4, guidance=1.0, spacing="lcm")
    assert changed({"sampler": "dpm_solver", "guidance": 5, "steps": 20}) == QUICK


@pytest.mark.slow
def test_a_turned_16_bit_or_large_image_keeps_what_it_has(client, files):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise makes it upright
    turned = Image.open(files["image"]).transpose(Image.Transpose.ROTATE_90)
    turned.save(files["image"], exif=exif)
    (result,) = call(client, files)
    outside = pixels(files["mask"]) == 0
    upright = turned.transpose(Image.Transpose.ROTATE_270)
    assert (pixels(result)[outside] == pixels(upright)[outside]).all()

    deep = (np.arange(8000, dtype=np.uint16) * 8).reshape(80, 100)
    Image.fromarray(deep).save(files["image"])
    (result,) = call(client, files)
    assert pixels(result).dtype == np.uint16
    assert (pixels(result)[outside] == deep[outside]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: Image.new("L", (100, 80)).save(files["mask"]), "mask mask.png is empty"),
        (lambda files: Image.new("L", (90, 80), 255).save(files["mask"]), "mask.png is 90x80, but .* 100x80"),
        (lambda files: files["image"].write_bytes(b"no picture"), "image image.png is not a picture"),
        (lambda files: Image.new("1", (9000, 8000)).save(files["image"]), "image is 9000x8000: .* 64 megapixels"),
        (lambda files: Image.new("F", (100, 80)).save(files["image"].with_suffix(".tif")), "cannot hold .* 'F'"),
    ],
)
def test_bad_pictures_are_refused_in_words(client, files, change, message):
    change(files)
    if files["image"].with_suffix(".tif").exists():
        files["image"] = files["image"].with_suffix(".tif")
    with pytest.raises(AppError) as caught:
        call(client, files)
    assert re.search(message, caught.value.message)
    assert "/tmp" not in caught.value.message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "minimum value 4"),
        ({"num_images": 9}, "maximum value 8"),
        ({"num_images": 1.5}, "num_images must be .* from 1 to 8, got 1.5"),
        ({"sampler": "heun"}, "heun"),
        ({"guidance": -1}, "minimum value 0"),
        ({"seed": -1}, "-1"),
        ({"seed": None}, "seed must be .* got None"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed.* 18446744073709551616"),
        ({"steps": 4.5}, "steps must be .* got 4.5"),
    ],
)
def test_bad_settings_are_refused_in_words(client, files, settings, message):
    with pytest.raises(AppError, match=message):
        call(client, files, **settings)


def test_a_missing_file_is_named(client, files):
    with pytest.raises(AppError, match="exemplar missing"):
        client.predict(
            image=handle_file(files["image"]), mask=handle_file(files["mask"]), exemplar=None, api_name="/edit"
        )


def test_only_the_edit_is_offered_to_programs(client):
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert list(endpoints["named_endpoints"]) == ["/edit"]
    assert not endpoints["unnamed_endpoints"]


def begin(model, files: uploads.EditFiles, folder: Path, number: int = 1) -> Ticket:
    folder.mkdir()
    return uploads.ticket_of(model, WEIGHTS, uploads.job_of(files, EDIT_SETTINGS, folder), number)


def test_progress_counts_the_steps_of_all_batches(model, files, tmp_path):
    told = []
    edit = begin(model, uploads.EditFiles(*files.values()), tmp_path / "work", uploads.BATCH_SIZE + 1)
    edit.changed = lambda: told.append((edit.done, edit.total))
    assert len(Engine().submit(edit).future.result(60)) == uploads.BATCH_SIZE + 1
    assert sorted(set(told)) == [(0, 0)] + [(done, 8) for done in range(1, 9)]


def test_the_page_shows_what_is_painted_and_then_the_results(model, files):
    """The components' updates, in the order of `result_view` with the previews after them."""
    editor = app.Editor(AdaptedModels(lambda _: model), WEIGHTS, EDIT_SETTINGS)
    image, _ = pictures.open_upload(str(files["image"]), "image")
    exemplar, _ = pictures.open_upload(str(files["exemplar"]), "exemplar")
    drawn = to_value(Image.open(files["image"]), pixels(files["mask"]) > 0)
    controls = {name: SETTINGS[name] for name in ("guidance", "steps", "seed", "sampler")}
    *so_far, last = editor.paint(image, drawn, exemplar, None, 2, lambda *_, **__: None, **controls)
    assert len(so_far) == 1  # after the first of four steps
    for *results, preview in so_far:
        assert results == [gr.skip()] * 5
        assert preview.visible
        assert len(preview.value) == 2
    gallery, chosen, _, row, loaded, preview = last
    assert [one["caption"] for one in gallery.value] == ["seed 7", "seed 8"]
    assert chosen == 0
    assert row.visible
    assert not preview.visible
    assert loaded == Loaded(image, drawn["mask"], exemplar, "", {**controls, "num_images": 2, "negative": None})


@pytest.mark.slow
def test_adapters_have_a_strength_each_on_the_page(tiny_checkpoint, files, tmp_path):
    factors = {"lora_down": torch.ones(1, 64, 3, 3), "lora_up": torch.ones(64, 1, 1, 1)}
    name = "lora_unet_mid_block_resnets_0_conv1"
    torch.save({f"{name}.{part}.weight": x for part, x in factors.items()}, tmp_path / "style.pt")
    loaded = []

    def load(adapters):
        loaded.append([strength for _, strength in adapters])
        return pbe.load_model(tiny_checkpoint, "cpu", adapters=adapters)

    adapters = ((tmp_path / "style.pt", 0.5), (tmp_path / "style.pt", -2.0))
    page = app.build_page(AdaptedModels(load), identify(tiny_checkpoint, torch.float32, adapters), QUICK, adapters)
    sliders = [block for block in page.blocks.values() if getattr(block, "label", None) == "style.pt: strength"]
    assert [(one.value, one.minimum, one.maximum) for one in sliders] == [(0.5, -1, 2), (-2, -2, 2)]
    with serving.warnings_on_page():
        client = Client(serving.serve(page, port=free_port()), verbose=False)
        results = [call(client, files, **given)[0] for given in ({}, {}, {"strength_1": 2, "strength_2": 0})]
        with pytest.raises(AppError, match="strength_2 must be a number, got 'x'"):
            call(client, files, strength_2="x")
        with pytest.raises(AppError, match="greater than maximum value 2"):
            call(client, files, strength_1=3)
        results += call(client, files, strength_1=0, strength_2=0)
    page.close(verbose=False)
    assert loaded == [[0.5, -2], [2, 0], [0, 0]]
    stored = [[one["strength"] for one in read_provenance(path)["adapters"]] for path in results]
    assert stored == [[0.5, -2], [0.5, -2], [2, 0], [0, 0]]
    edit = {"mask": files["mask"], "exemplar": files["exemplar"], **vars(EDIT_SETTINGS)}
    for path, given in zip(results[1:], [adapters, [(tmp_path / "style.pt", 2.0)], []], strict=True):
        model = pbe.load_model(tiny_checkpoint, "cpu", adapters=given)
        assert np.array_equal(pixels(path), pixels(pbe.edit(model, files["image"], **edit)[0]))


def show_one(work: Callable[[Ticket], None]) -> Iterator[str]:
    """What the page shows of an edit that shows "a" and then does `work`."""

    @at_once
    def edit(ticket):
        ticket.show(["a"], None)
        time.sleep(0.2)  # so that it is seen
        work(ticket)

    return serving.followed(Engine(), Ticket(edit.begin), lambda *_, **__: None, "".join)


def test_what_ends_an_edit_ends_its_previews():
    def work(ticket):
        raise ValueError("the mask is empty")

    shown = show_one(work)
    assert next(shown) == "a"
    with pytest.raises(ValueError, match="the mask is empty"):
        next(shown)


def test_previews_that_are_closed_end_their_edit_and_do_not_wait_for_it():
    ended = threading.Event()

    def work(ticket):
        try:
            while True:
                ticket.check()
                time.sleep(0.01)
        except Cancelled:
            ended.set()
            raise

    shown = show_one(work)
    assert next(shown) == "a"
    shown.close()
    assert ended.wait(timeout=30)


def test_a_cropped_exemplar_is_as_good_as_one_cut_before(model, files, tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (60, 50, 4), dtype=np.uint8)
    noise[..., 3] = 255 * (np.arange(50) > 20)  # see-through on the left
    Image.fromarray(noise).save(files["exemplar"])
    crop = Box(10, 5, 40, 50)
    results = {}
    for name, edit in (("whole", {}), ("crop", {"crop": crop})):
        ticket = begin(model, uploads.EditFiles(*files.values(), **edit), tmp_path / name)
        (paths,) = run_together([ticket.begin(ticket)])
        results[name] = pixels(paths[0])
    cut = Image.open(files["exemplar"]).crop(crop)
    (expected,) = pbe.edit(
        model,
        files["image"],
        files["mask"],
        cut,
        guidance=3,
        steps=4,
        seed=7,
        sampler="ddim",
        spacing="trailing",
        batch_size=4,
    )
    assert (results["crop"] == pixels(expected)).all()
    assert (results["crop"] != results["whole"]).any()


def test_one_edit_runs_at_a_time(client, files, monkeypatch):
    running, most = threading.Semaphore(1), []

    def run_job(model, job, inputs, num_images, batch_size, callback, preview):
        most.append(running.acquire(blocking=False))
        time.sleep(0.2)  # long enough for another to begin, if it could
        running.release()
        return [inputs.picture.source]

    monkeypatch.setattr(uploads, "run_job", at_once(run_job))
    handed = {name: handle_file(path) for name, path in files.items()}
    jobs = [client.submit(**handed, **SETTINGS, api_name="/edit") for _ in range(3)]
    assert all(len(job.result(timeout=30)) == 1 for job in jobs)
    assert most == [True, True, True]


def test_large_uploads_are_refused(model, files, monkeypatch):
    monkeypatch.setattr(serving, "MAX_UPLOAD", 10 * 2**10)
    page = app.build_page(model, WEIGHTS)
    limited = Client(serving.serve(page, port=free_port()), verbose=False)
    with pytest.raises(Exception, match=r"413|[Ss]ize"):  # whichever HTTP error the client's version raises
        call(limited, files)
    page.close(verbose=False)


# --- masks and regions ------------------------------------------------------------------------------------


def test_all_controls_reach_the_edit(client, model, files):
    changes = {"strength": 0.5, "grow": 3, "smooth": 2, "placement": "bottom", "window": "0,0,96,80", "seam": "feather"}
    (result,) = call(client, files, **changes, invert=True, negative=handle_file(files["image"]))
    changes |= {"window": (0, 0, 96, 80), "invert": True, "negative": files["image"]}
    (expected,) = pbe.edit(model, *files.values(), **{**vars(EDIT_SETTINGS), **changes})
    assert (pixels(result) == pixels(expected)).all()
    stored = read_provenance(result)
    assert (stored["negative"], stored["strength"], stored["window"]) == (["negative.png"], 0.5, [0, 0, 96, 80])


def test_a_control_says_what_its_setting_is(model):
    page = app.build_page(model, WEIGHTS)
    infos = {getattr(block, "info", None) for block in page.blocks.values()}
    names = ("strength", "fit_mask", "invert", "fill_holes", "smooth", "grow", "placement", "extend", "window", "seam")
    assert {setting_docs()[name] for name in names} <= infos
    page.close(verbose=False)


def test_a_mask_of_another_size_is_resized_on_request(client, files):
    Image.open(files["mask"]).resize((50, 40)).save(files["mask"])
    with pytest.raises(AppError, match="fit_mask resizes it"):
        call(client, files)
    (result,) = call(client, files, fit_mask=True)
    assert (pixels(result) != pixels(files["image"])).any()


@pytest.mark.slow
def test_what_extend_adds_needs_no_mask(client, files):
    handed = {"image": handle_file(files["image"]), "mask": None, "exemplar": handle_file(files["exemplar"])}
    (result,) = client.predict(**handed, **SETTINGS, extend="left,40", api_name="/edit")
    assert (pixels(Path(result))[:, 40:] == pixels(files["image"])).all()
    with pytest.raises(AppError, match=r"extend must be sides, .* got 'up,40'"):
        client.predict(**handed, **SETTINGS, extend="up,40", api_name="/edit")


def test_a_mask_file_is_drawn(files):
    image, shown = pictures.open_upload(str(files["image"]), "image")
    drawn = to_value(shown)
    value = pictures.load_mask(str(files["mask"]), image, drawn, False)
    assert (drawn_mask(value, image.size) == (pixels(files["mask"]) > 0)).all()
    assert value["picture"] == drawn["picture"]
    with pytest.raises(gr.Error, match="There is no image yet"):
        pictures.load_mask(str(files["mask"]), None, drawn, False)
    mask = pixels(files["mask"]) > 0
    Image.open(files["mask"]).resize((50, 40)).save(files["mask"])
    with pytest.raises(gr.Error, match=r"mask.png is 50x40, but .* 100x80 .*fit_mask resizes it"):
        pictures.load_mask(str(files["mask"]), image, drawn, False)
    fitted = drawn_mask(pictures.load_mask(str(files["mask"]), image, drawn, True), image.size)
    assert np.count_nonzero(fitted != mask) < 10  # at the corners


def click(*at: float) -> SimpleNamespace:
    return SimpleNamespace(at=list(at))


@pytest.fixture
def disc(tmp_path) -> tuple[Upload, dict[str, str], np.ndarray]:
    """An image of 160x120 with a disc: its upload, its canvas with the disc drawn, and where that is."""
    yy, xx = np.mgrid[:120, :160]
    inside = (xx - 50) ** 2 + (yy - 60) ** 2 < 30**2
    noise = np.random.default_rng(0).integers(0, 20, (120, 160, 3))
    Image.fromarray((np.where(inside[..., None], (200, 40, 30), (40, 90, 160)) + noise).astype(np.uint8)).save(
        tmp_path / "disc.png"
    )
    upload, shown = pictures.open_upload(str(tmp_path / "disc.png"), "image")
    return upload, to_value(shown, inside), inside


@pytest.mark.parametrize("at", [(0.3, 0.5), (0.1, 0.2, 0.55, 0.8)])
@pytest.mark.parametrize("name", ["image", "exemplar"])
def test_an_object_is_selected_by_a_click_or_a_box(disc, name, at):
    pytest.importorskip("cv2", reason="selecting needs the extra masks")
    upload, drawn, inside = disc
    before = np.zeros((120, 160), bool)
    before[100:, 140:] = True
    drawn |= {"mask": to_value(Image.new("RGB", (160, 120)), before)["mask"]}
    value = pictures.select_object(upload, drawn, click(*at), name)
    found = drawn_mask(value, upload.size)
    scaled = tuple(np.array(at) * np.resize((160, 120), len(at)))
    expected = pbe.select_object(Path(upload.path), **{"point" if len(at) == 2 else "box": scaled})
    assert (found == (expected | before if name == "image" else expected)).all()
    assert np.count_nonzero(expected != inside) < 0.03 * inside.sum()
    assert value["picture"] == drawn["picture"]


def test_without_opencv_a_selection_names_the_extra(disc, monkeypatch):
    upload, drawn, _ = disc
    monkeypatch.delitem(sys.modules, "pbe.images.grabcut", raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(gr.Error, match=r"exemplar_select is not possible: .* OpenCV, the extra masks"):
        pictures.select_object(upload, drawn, click(0.5, 0.5), "exemplar")


def test_what_is_selected_of_an_exemplar_is_its_mask(model, files, disc, tmp_path):
    exemplar, crop, inside = disc
    image, shown = pictures.open_upload(str(files["image"]), "image")
    mask = to_value(shown, pixels(files["mask"]) > 0)
    editor = app.Editor(AdaptedModels(lambda _: model), WEIGHTS, EDIT_SETTINGS)
    *_, last = editor.paint(image, mask, exemplar, crop, 1, lambda *_, **__: None)
    expected = pbe.edit(
        model, files["image"], files["mask"], exemplar.path, exemplar_mask=inside, **vars(EDIT_SETTINGS)
    )
    assert (pixels(Path(last[2].value["path"])) == pixels(expected[0])).all()
    assert read_provenance(Path(last[2].value["path"]))["exemplar_mask"] == ["exemplar_mask.png"]


@pytest.fixture
def two(files, disc):
    """Two masks of the image, what they look like drawn, and an exemplar and what is drawn on it for each."""
    image, shown = pictures.open_upload(str(files["image"]), "image")
    exemplar, _ = pictures.open_upload(str(files["exemplar"]), "exemplar")
    masks = np.zeros((2, 80, 100), bool)
    masks[0][10:40, 5:35] = masks[1][40:75, 60:95] = True
    return image, masks, [to_value(shown, mask) for mask in masks], [(exemplar, None), disc[:2]]


def test_regions_are_kept_opened_again_and_removed(two):
    image, _, drawn, (first, second) = two
    blank = drawn[0] | {"mask": ""}
    kept, chips, canvas, *cleared = regions.add_region((), image, drawn[0], *first)
    assert [chip["name"] for chip in chips] == ["region 1"]
    assert canvas["mask"] == ""
    assert canvas["picture"] != blank["picture"]  # the mask is shown in the region's colour
    assert cleared[0] is None
    kept, chips, *_ = regions.add_region(kept, image, drawn[1], *second)
    assert len({chip["colour"] for chip in chips}) == len({chip["thumbnail"] for chip in chips}) == 2

    left, _, canvas, exemplar, *_ = regions.open_region(kept, image, blank, None, None, SimpleNamespace(index=0))
    assert (exemplar, canvas["mask"]) == (first[0], drawn[0]["mask"])
    assert [one.exemplar for one in left] == [second[0]]
    # the other is opened, and this one kept for it
    swapped, _, canvas, exemplar, *_ = regions.open_region(left, image, canvas, *first, SimpleNamespace(index=0))
    assert (exemplar, canvas["mask"]) == (second[0], drawn[1]["mask"])
    assert [one.exemplar for one in swapped] == [first[0]]
    left, _, canvas = regions.remove_region(kept, image, drawn[0], SimpleNamespace(index=0))
    assert [one.exemplar for one in left] == [second[0]]
    assert canvas["mask"] == drawn[0]["mask"]

    with pytest.raises(gr.Error, match="There is no exemplar yet"):
        regions.open_region(kept, image, drawn[0], None, None, SimpleNamespace(index=1))
    with pytest.raises(gr.Error, match="There is no mask yet"):
        regions.add_region((), image, blank, *first)
    with pytest.raises(gr.Error, match="There is no image yet"):
        regions.add_region((), None, None, *first)
    with pytest.raises(gr.Error, match="may be 9 regions"):
        regions.add_region(kept * 4, image, drawn[0], *first)


@pytest.mark.slow
def test_regions_are_painted_as_the_library_does(model, files, two, disc):
    image, masks, drawn, (first, second) = two
    kept, *_ = regions.add_region((), image, drawn[0], *first)
    all_kept, *_ = regions.add_region(kept, image, drawn[1], *second)
    asked = [
        pbe.Region(masks[0], files["exemplar"], negative=files["image"]),
        pbe.Region(masks[1], second[0].path, exemplar_mask=disc[2], negative=files["image"]),
    ]
    (expected,) = pbe.edit_regions(model, files["image"], asked, **vars(EDIT_SETTINGS))
    editor = app.Editor(AdaptedModels(lambda _: model), WEIGHTS, EDIT_SETTINGS)
    for *now, others in ((drawn[0] | {"mask": ""}, None, None, all_kept), (drawn[1], *second, kept)):
        given = {"kept": others, "negative": str(files["image"])}
        *_, last = editor.paint(image, *now, 1, lambda *_, **__: None, **given)
        assert (pixels(Path(last[2].value["path"])) == pixels(expected)).all()
    stored = read_provenance(Path(last[2].value["path"]))
    assert (stored["mask"], stored["exemplar_2"]) == ("mask.png", ["exemplar_2.png"])


# --- warnings, canvases -----------------------------------------------------------------------------------


def test_warnings_of_the_library_go_to_the_page(monkeypatch):
    shown = []
    monkeypatch.setattr(gr, "Warning", shown.append)
    with serving.warnings_on_page():
        for _ in range(2):
            warnings.warn("5 % of mask is gray", PictureWarning, stacklevel=1)
    assert shown == ["5 % of mask is gray"] * 2


def test_a_mask_comes_back_in_the_images_size():
    yy, xx = np.mgrid[:2000, :3000]
    mask = (xx - 1400) ** 2 + (yy - 900) ** 2 < 500**2
    value = to_value(Image.new("RGB", (3000, 2000)), mask)
    back = drawn_mask(value, (2000, 3000))
    assert back.shape == (2000, 3000)
    # The canvas is half as large: the outline moves by less than a canvas pixel, of a circumference of 3142 pixels.
    assert np.count_nonzero(back != mask) < 3142


@pytest.mark.parametrize("value", [None, "", {"picture": "", "mask": ""}, to_value(Image.new("RGB", (30, 20)))])
def test_no_mask_is_none(value):
    assert drawn_mask(value, (20, 30)) is None


@pytest.mark.parametrize("mask", ["data:image/png;base64,AAAA", "data:text/html,hello", 7])
def test_a_value_the_canvas_does_not_make_is_refused(mask):
    with pytest.raises(ValueError, match="mask that the browser sent"):
        drawn_mask({"picture": "", "mask": mask}, (20, 30))


def test_the_canvas_shows_an_upright_copy_of_bounded_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2000, 100), "gray").save(tmp_path / "image.jpg", exif=exif)
    upload, shown = pictures.open_upload(str(tmp_path / "image.jpg"), "image")
    assert upload.size == (2000, 100)
    assert (pixels(shown) == 128).all()
    picture = to_value(shown)["picture"].removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(picture))) as copy:
        assert copy.size == (77, 1536)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_shown_white(tmp_path, mode):
    cut_out = Image.new("L", (40, 20), 50).convert(mode)
    cut_out.paste(Image.new("L", (20, 20), 50), (0, 0))
    alpha = Image.new("L", (40, 20), 255)
    alpha.paste(0, (0, 0, 20, 20))
    cut_out.putalpha(alpha)
    cut_out.save(tmp_path / "cut_out.png")
    _, shown = pictures.open_upload(str(tmp_path / "cut_out.png"), "exemplar")
    assert shown.mode == "RGB"
    assert (pixels(shown)[:, :20] == 255).all()
    assert (pixels(shown)[:, 20:] == 50).all()


def test_a_damaged_image_is_a_message(tmp_path):
    (tmp_path / "image.png").write_bytes(b"no picture")
    with pytest.raises(gr.Error) as caught:
        pictures.open_upload(str(tmp_path / "image.png"), "image")
    assert caught.value.message.startswith("image image.png is not a picture")


def test_an_image_that_was_deleted_is_a_message(tmp_path):
    with pytest.raises(gr.Error, match="load it again"):
        pictures.open_upload(str(tmp_path / "image.png"), "image")


# --- results ----------------------------------------------------------------------------------------------


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(gr, "Warning", messages.append)
    return messages


@pytest.fixture
def loaded(files) -> Loaded:
    image, _ = pictures.open_upload(str(files["image"]), "image")
    exemplar, _ = pictures.open_upload(str(files["exemplar"]), "exemplar")
    drawn = to_value(Image.open(files["image"]), pixels(files["mask"]) > 0)
    return Loaded(image, drawn["mask"], exemplar, "", {"guidance": 3, "num_images": 2})


def result(folder: Path, seed: int = 7, **settings) -> shown.Results:
    """A result as the page's gallery gives it."""
    path = folder / f"image-{seed}.png"
    about = {**QUICK.to_json(), "seed": seed, "window": [0, 0, 9, 9], "checkpoint": "tiny.ckpt", "dtype": "float32"}
    save_result(Image.new("RGB", (120, 80)), path, {**about, **settings})
    return [(str(path), f"seed {seed}")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "seed 7, steps 20, guidance 5, sampler dpm_solver, window [0, 0, 9, 9]"),
        ({"window": "auto", "guidance": 2.5}, "seed 7, steps 20, guidance 2.5, sampler dpm_solver"),
        ({"window": "auto", "strength": 0.4, "fill_holes": True}, "dpm_solver, strength 0.4, fill holes True"),
        ({"window": "auto", "adapters": [{"file": "<b>.pt", "strength": 0.5}]}, "dpm_solver, &lt;b&gt;.pt 0.5"),
    ],
)
def test_a_results_settings_are_said_in_words(tmp_path, loaded, settings, words):
    (entry,), _, said, *_ = shown.add_entry(result(tmp_path, **settings), loaded, ())
    assert said == entry.words
    assert said.endswith(words)


def test_the_history_shows_an_edit_again_with_what_it_was_made_of(tmp_path, loaded, warned):
    history: tuple[shown.Entry, ...] = ()
    for seed in range(shown.MAX_HISTORY + 2):
        history, listed, *_ = shown.add_entry(result(tmp_path, seed), loaded, history)
    assert [entry.words.partition(",")[0] for entry in history][:2] == ["seed 13", "seed 12"]
    assert len(history) == len(listed.raw_samples) == shown.MAX_HISTORY
    assert 'alt="result"' in listed.raw_samples[0][0]

    kept, _, said, gallery, *others = shown.show_entry(1, history, ("guidance", "num_images", "steps"))
    assert (kept, said) == (history, history[1].words)
    assert [one["caption"] for one in gallery.value] == ["seed 12"]
    assert others[3] == loaded
    image, _, canvas, exemplar, _, crop = others[7:13]
    assert (image, exemplar) == (loaded.image, loaded.exemplar)
    assert canvas["value"]["mask"] == loaded.mask  # to the bit: the same edit again gives the same
    assert crop["value"]["mask"] == ""
    assert others[13:] == [(), [], 3, 2, gr.skip()]  # the last is a control that the edit did not have
    assert not warned


def test_the_history_has_an_edits_regions(tmp_path, two, files):
    image, _, drawn, (first, second) = two
    kept, *_ = regions.add_region((), image, drawn[0], *first)
    given = {"negative": str(files["mask"])}
    history, *_ = shown.add_entry(result(tmp_path), Loaded(image, drawn[1]["mask"], second[0], "", given, kept), ())
    *_, canvas, _, _, _, left, chips, negative = shown.show_entry(0, history, ("negative",))
    assert (left, [chip["name"] for chip in chips], negative) == (kept, ["region 1"], str(files["mask"]))
    assert canvas["value"]["mask"] == drawn[1]["mask"]
    assert canvas["value"]["picture"] != drawn[1]["picture"]  # the other's mask is shown
    assert regions.forget_others(left, image) == (kept, chips)
    assert regions.forget_others(left, second[0]) == regions.forget_others(left, None) == ((), [])

    history, *_ = shown.add_entry(result(tmp_path, 8), Loaded(image, "", None, "", {}, kept), history)
    *_, exemplar, drop_zone, crop, left, _, negative = shown.show_entry(0, history, ("negative",))
    assert (exemplar, drop_zone["visible"], crop["visible"], left) == (None, True, False, kept)
    files["mask"].unlink()
    assert shown.show_entry(1, history, ("negative",))[-1] == gr.skip()


def test_results_that_were_deleted_leave_the_history_in_words(tmp_path, loaded, warned):
    first, *_ = shown.add_entry(result(tmp_path, 1), loaded, ())
    history, *_ = shown.add_entry(result(tmp_path, 2), loaded, first)
    (tmp_path / "image-1.png").unlink()
    for index in (1, 2, -1):
        kept, listed, *others = shown.show_entry(index, history, ("guidance",))
        assert kept == history[:1]
        assert len(listed.raw_samples) == 1
        assert others == [gr.skip()] * (shown.NUM_SHOWN + 1)
    assert warned == [shown.GONE] * 3
    kept, *_ = shown.add_entry(result(tmp_path, 3), loaded, history)
    assert [entry.words[:6] for entry in kept] == ["seed 3", "seed 2"]


def test_results_are_shown_again_without_an_image_that_was_deleted(tmp_path, loaded, warned, files):
    history, *_ = shown.add_entry(result(tmp_path), loaded, ())
    files["image"].unlink()
    kept, _, _, gallery, *others = shown.show_entry(0, history, ("guidance",))
    assert kept == history
    assert len(gallery.value) == 1
    assert others[7:] == [gr.skip()] * 8 + [3]
    assert len(warned) == 1
    assert "the image was deleted" in warned[0]
    with pytest.raises(gr.Error, match="the image was deleted"):
        shown.compare(True, result(tmp_path), 0, loaded)


def test_results_are_compared_with_the_file_that_was_uploaded(tmp_path, loaded, files):
    gallery, slider, position = shown.compare(True, result(tmp_path), 0, loaded)
    assert (gallery.visible, slider.visible, position.visible) == (False, True, True)
    paths = [one["path"] for one in slider.value]
    assert [Path(path).read_bytes() for path in paths] == [
        files["image"].read_bytes(),
        (tmp_path / "image-7.png").read_bytes(),
    ]
    gallery, slider, position = shown.compare(False, result(tmp_path), 0, loaded)
    assert (gallery.visible, slider.visible, position.visible) == (True, False, False)


def test_what_browsers_do_not_show_is_compared_as_a_copy(tmp_path, files, loaded):
    Image.open(files["image"]).save(tmp_path / "image.tif")
    image, _ = pictures.open_upload(str(tmp_path / "image.tif"), "image")
    copy = shown.before(image, result(tmp_path)[0][0])
    assert (pixels(copy) == pixels(files["image"])).all()
    wider = shown.before(loaded.image, result(tmp_path, extend=[["left", 20], ["top", 5]])[0][0])
    assert wider.size == (120, 85)
    assert (pixels(wider)[5:, 20:] == pixels(files["image"])).all()


def test_every_control_explains_itself(model):
    page = app.build_page(model, WEIGHTS, QUICK, ((Path("style.pt"), 1.0),))
    controls = [one for one in page.blocks.values() if isinstance(one, gr.Slider | gr.Number | gr.Dropdown)]
    page.close(verbose=False)
    assert len(controls) > 6
    assert [one.label for one in controls if not one.info] == []


# --- starting ---------------------------------------------------------------------------------------------


def test_examples_are_shown_only_where_they_are(model, monkeypatch, tmp_path):
    assert any(block.elem_id == "examples" for block in app.build_page(model, WEIGHTS).blocks.values())
    monkeypatch.setattr(app, "EXAMPLES", tmp_path / "none")
    assert not any(block.elem_id == "examples" for block in app.build_page(model, WEIGHTS).blocks.values())


def test_a_taken_port_is_one_line(tiny_checkpoint, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert main(["--ckpt", str(tiny_checkpoint), "--device", "cpu", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: cannot serve at 127.0.0.1:{port}: the port is taken, or the host is not this machine's\n"


def test_a_number_that_is_no_port_is_one_line(tiny_checkpoint, capsys):
    assert main(["--ckpt", str(tiny_checkpoint), "--device", "cpu", "--port", "99999"]) == 2
    assert capsys.readouterr().err == "error: port must be between 1 and 65535, got 99999\n"


def test_flags_reach_the_model_and_the_checkpoint_the_page(tiny_checkpoint, monkeypatch):
    calls = []

    def page(model, weights, sampling, adapters):
        calls.append(sampling)
        raise OSError("far enough")

    def load(*arguments):
        calls.append(arguments)
        return SimpleNamespace(dtype=torch.float32)

    monkeypatch.setattr("pbe.editing.loading.load_editor", load)
    monkeypatch.setattr("pbe.editing.loading.limit_threads", lambda model: None)
    monkeypatch.setattr(app, "build_page", page)
    flags = ["--device", "cpu", "--dtype", "float32", "--low-memory", "--compile", "regions"]
    flags += ["--tiny-decoder", str(tiny_checkpoint)]
    assert main(flags) == main(["--ckpt", str(tiny_checkpoint)]) == 2
    assert calls[:2] == [(Path("demo"), "cpu", "float32", True, "regions", (), tiny_checkpoint, None, "auto"), DEMO]
    assert calls[2:] == [(tiny_checkpoint, "auto", "auto", False, None, (), None, None, "auto"), QUICK]


def test_cuda_graphs_are_not_for_the_page_s_threads(monkeypatch, capsys):
    """torch keeps them for each thread, and stops with an assertion in one that did not record them."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert main(["--compile", "whole"]) == 2
    assert "one thread alone can replay: use --compile regions" in capsys.readouterr().err


def test_a_missing_checkpoint_is_one_line(tmp_path, capsys):
    assert main(["--ckpt", str(tmp_path / "none.ckpt")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_without_gradio_the_extra_is_named():
    program = "import sys; sys.modules['gradio'] = None; from pbe.cli import main; sys.exit(main(['app']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "error: the page needs the extra app: pip install -e .[app]\n"
