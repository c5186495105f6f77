"""The page in a real browser; and its screenshot: `python tests/app/test_page_browser.py demo docs/images/app.png`."""

import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
gr = pytest.importorskip("gradio", reason="the page needs the extra app")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser needs playwright: pip install playwright")

from pbe.app import serving  # noqa: E402
from pbe.app.page import build_page  # noqa: E402
from pbe.batch.provenance import Weights, identify, read_provenance  # noqa: E402
from pbe.editing.loading import load_editor  # noqa: E402
from pbe.editing.settings import quick_settings  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH: apt-get install chromium"),
]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SECONDS = 1000  # Playwright counts milliseconds


@contextmanager
def served(page: gr.Blocks) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with serving.warnings_on_page():
        yield serving.serve(page, port=port)
    page.close(verbose=False)


@contextmanager
def browser(address: str, **kwargs):
    """A tab that shows the page; it has `requests`, all that it asked for, and `faults`, what went wrong in it."""
    with playwright.sync_playwright() as driver:
        # The sandbox does not start for root, as in containers; only this page is opened.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = chromium.new_page(**{"viewport": {"width": 1440, "height": 940}, **kwargs})
        tab.set_default_timeout(60 * SECONDS)
        tab.requests, tab.faults = [], []
        tab.on("request", lambda request: tab.requests.append(request.url))
        tab.on("pageerror", lambda error: tab.faults.append(str(error)))
        tab.on("console", lambda line: tab.faults.append(line.text) if line.type == "error" else None)
        tab.goto(address)
        tab.locator("#paint").wait_for()
        yield tab
        chromium.close()


@pytest.fixture(scope="module")
def address(tiny_checkpoint):
    model = load_editor(tiny_checkpoint, "cpu")
    with served(build_page(model, Weights("tiny.ckpt", "00000000", "float32"))) as address:
        yield address


@pytest.fixture
def tab(address):
    with browser(address) as tab:
        yield tab


@pytest.fixture
def image(tmp_path) -> Path:
    """An image of 3000x2000: noise, of which every pixel that changes or moves would show."""
    noise = np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(noise).save(path, compress_level=1)
    return path


# --- what a user does -------------------------------------------------------------------------------------


def load(tab, name: str, path: Path) -> None:
    tab.locator(f"#{name}-file input[type=file]").set_input_files(path)
    tab.wait_for_function(f"document.querySelector('#{name} canvas')?.width > 300")  # a canvas begins with 300


def drag(tab, name: str, *points: tuple[float, float]) -> None:
    """Drags over a canvas; the points are shares of its width and height."""
    box = tab.locator(f"#{name} canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    tab.mouse.move(*places[0])
    tab.mouse.down()
    for place in places[1:]:
        tab.mouse.move(*place, steps=8)
    tab.mouse.up()


def press(tab, name: str, label: str) -> None:
    tab.locator(f"#{name}").get_by_role("button", name=label, exact=True).click()


def paint(tab, out: Path, steps: int = 4) -> np.ndarray:
    """Sets the steps, paints, and downloads the result that is shown; its pixels."""
    accordion = tab.get_by_role("button", name="Steps, seed, sampler")
    if not tab.get_by_label("number input for Steps").is_visible():
        accordion.click()
    tab.get_by_label("number input for Steps").fill(str(steps))
    tab.get_by_label("number input for Steps").press("Tab")
    before = tab.locator("#results img").first.get_attribute("src") if tab.locator("#results img").count() else ""
    tab.locator("#paint").click()
    tab.wait_for_function(
        "before => { const img = document.querySelector('#results img'); return img && img.src !== before; }",
        arg=before,
    )
    with tab.expect_download() as download:
        tab.locator("#download").click()
    download.value.save_as(out)
    return np.asarray(Image.open(out))


def unfold(tab, label: str) -> None:
    tab.get_by_role("button", name=re.compile(f"^{label}")).click()


def shown(tab, name: str) -> str:
    """What a canvas shows."""
    return tab.locator(f"#{name} canvas").evaluate("canvas => canvas.toDataURL()")


def wait_for_change(tab, name: str, before: str) -> None:
    program = "([name, old]) => document.querySelector(`#${name} canvas`)?.toDataURL() !== old"
    tab.wait_for_function(program, arg=[name, before])


def message(tab) -> str:
    toast = tab.get_by_test_id("toast-text").last
    toast.wait_for()
    return toast.inner_text()


def bounds(changed: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# --- what is tested ---------------------------------------------------------------------------------------


def test_a_box_is_repainted_and_nothing_else(tab, image, tmp_path):
    load(tab, "image", image)
    load(tab, "exemplar", EXAMPLES / "china.jpg")
    press(tab, "image", "Box")
    drag(tab, "image", (0.25, 0.25), (0.5, 0.75))
    result = paint(tab, tmp_path / "result.png")

    before = np.asarray(Image.open(image))
    assert result.shape == before.shape
    changed = (result != before).any(axis=-1)
    # A pixel of the screen is 6 of the image.
    assert bounds(changed) == pytest.approx((750, 500, 1500, 1500), abs=12)
    x0, y0, x1, y1 = bounds(changed)
    assert changed[y0:y1, x0:x1].mean() > 0.95  # some noise stays as it was by chance
    assert read_provenance(tmp_path / "result.png")["seed"] == 321
    assert tab.faults == []
    local = tab.url.rstrip("/")
    assert [url for url in tab.requests if not url.startswith((local, "data:", "blob:"))] == []


def test_brush_eraser_undo_and_clear(tab, image, tmp_path):
    load(tab, "image", image)
    load(tab, "exemplar", EXAMPLES / "china.jpg")
    drag(tab, "image", (0.2, 0.5), (0.8, 0.5))
    press(tab, "image", "Eraser")
    drag(tab, "image", (0.5, 0.3), (0.5, 0.7))
    press(tab, "image", "Brush")
    drag(tab, "image", (0.1, 0.1), (0.9, 0.1))
    press(tab, "image", "Undo")
    changed = (paint(tab, tmp_path / "result.png") != np.asarray(Image.open(image))).any(axis=-1)
    assert changed[1000, 700:1200].mean() > 0.95
    assert changed[1000, 1800:2300].mean() > 0.95
    assert not changed[:, 1480:1520].any()  # erased
    assert not changed[:600].any()  # taken back

    press(tab, "image", "Clear")
    tab.locator("#paint").click()
    assert "There is no mask yet" in message(tab)


def test_the_exemplar_is_cropped(tab, tmp_path):
    load(tab, "image", EXAMPLES / "coffee.png")
    load(tab, "exemplar", EXAMPLES / "china.jpg")
    drag(tab, "image", (0.4, 0.4), (0.6, 0.6))
    whole = paint(tab, tmp_path / "whole.png")
    drag(tab, "exemplar", (0.1, 0.1), (0.5, 0.9))
    cropped = paint(tab, tmp_path / "cropped.png")
    assert (whole != cropped).any()
    assert read_provenance(tmp_path / "whole.png")["exemplar"] == ["exemplar.jpg"]
    assert read_provenance(tmp_path / "cropped.png")["exemplar"] == ["exemplar-crop.tif"]

    press(tab, "exemplar", "Load another picture")
    tab.locator("#exemplar-file").wait_for()
    tab.locator("#paint").click()
    assert "There is no exemplar yet" in message(tab)


def test_cancel_stops_an_edit(tab, tmp_path):
    load(tab, "image", EXAMPLES / "coffee.png")
    load(tab, "exemplar", EXAMPLES / "china.jpg")
    drag(tab, "image", (0.4, 0.4), (0.6, 0.6))
    tab.get_by_role("button", name="Steps, seed, sampler").click()
    tab.get_by_label("number input for Steps").fill("200")
    tab.get_by_label("number input for Results").fill("8")
    tab.get_by_label("number input for Results").press("Tab")
    tab.locator("#paint").click()
    tab.locator("#results .progress-text").wait_for()
    tab.locator("#preview img").first.wait_for()
    tab.locator("#cancel").click()
    tab.locator("#results .progress-text").wait_for(state="hidden", timeout=5 * SECONDS)
    tab.locator("#preview").wait_for(state="hidden")
    assert not tab.locator("#results img").count()
    tab.get_by_label("number input for Results").fill("1")
    paint(tab, tmp_path / "next.png")


def test_a_result_becomes_the_image(tab, tmp_path):
    load(tab, "image", EXAMPLES / "coffee.png")
    load(tab, "exemplar", EXAMPLES / "china.jpg")
    press(tab, "image", "Box")
    drag(tab, "image", (0.1, 0.1), (0.3, 0.3))
    first = paint(tab, tmp_path / "first.png")
    before = shown(tab, "image")
    tab.locator("#reuse").click()
    wait_for_change(tab, "image", before)
    drag(tab, "image", (0.6, 0.6), (0.9, 0.9))
    second = paint(tab, tmp_path / "second.png")
    changed = (second != first).any(axis=-1)
    assert bounds(changed) == pytest.approx((360, 240, 540, 360), abs=4)
    with Image.open(EXAMPLES / "coffee.png") as before:
        assert (second[40:120, 60:180] != np.asarray(before)[40:120, 60:180]).any(axis=-1).mean() > 0.95


@pytest.fixture
def disc(tmp_path) -> tuple[Path, np.ndarray]:
    """An image of 600x400 with a disc, and where that is."""
    yy, xx = np.mgrid[:400, :600]
    inside = (xx - 200) ** 2 + (yy - 200) ** 2 < 80**2
    noise = np.random.default_rng(0).integers(0, 30, (400, 600, 3))
    Image.fromarray((np.where(inside[..., None], (200, 40, 30), (40, 90, 160)) + noise).astype(np.uint8)).save(
        tmp_path / "disc.png"
    )
    return tmp_path / "disc.png", inside


def test_an_object_is_selected_and_brushed_on(tab, disc, tmp_path):
    pytest.importorskip("cv2", reason="selecting needs the extra masks")
    path, inside = disc
    load(tab, "image", path)
    load(tab, "exemplar", path)
    for name in ("image", "exemplar"):
        press(tab, name, "Select")
        before = shown(tab, name)
        drag(tab, name, *{"image": [(0.33, 0.5)], "exemplar": [(0.15, 0.2), (0.52, 0.8)]}[name])
        wait_for_change(tab, name, before)
    tab.wait_for_timeout(SECONDS)
    selected = (paint(tab, tmp_path / "result.png") != np.asarray(Image.open(path))).any(axis=-1)
    assert (selected & inside).sum() > 0.9 * (selected | inside).sum()
    assert read_provenance(tmp_path / "result.png")["exemplar_mask"] == ["exemplar_mask.png"]

    press(tab, "image", "Brush")
    drag(tab, "image", (0.8, 0.2), (0.8, 0.8))
    brushed = (paint(tab, tmp_path / "brushed.png") != np.asarray(Image.open(path))).any(axis=-1)
    assert brushed[:, 470:490].mean() > 0.5
    assert brushed[selected].mean() > 0.95
    press(tab, "image", "Undo")
    press(tab, "image", "Undo")  # the selection
    tab.locator("#paint").click()
    assert "There is no mask yet" in message(tab)
    assert tab.faults == []


def test_a_mask_file_is_drawn_and_grown(tab, disc, tmp_path):
    path, inside = disc
    Image.fromarray(inside).resize((300, 200)).save(tmp_path / "mask.png")
    load(tab, "image", path)
    load(tab, "exemplar", EXAMPLES / "china.jpg")
    unfold(tab, "Mask")
    before = shown(tab, "image")
    with tab.expect_file_chooser() as chooser:
        tab.locator("#mask-file").click()
    chooser.value.set_files(tmp_path / "mask.png")
    assert "mask.png is 300x200" in message(tab)
    tab.get_by_label("Fit mask").check()
    with tab.expect_file_chooser() as chooser:
        tab.locator("#mask-file").click()
    chooser.value.set_files(tmp_path / "mask.png")
    wait_for_change(tab, "image", before)
    grow = tab.get_by_label("Grow", exact=True)
    grow.fill("20")
    grow.press("Tab")
    changed = (paint(tab, tmp_path / "result.png") != np.asarray(Image.open(path))).any(axis=-1)
    assert bounds(changed) == pytest.approx((100, 100, 301, 301), abs=3)  # the disc's, 20 pixels larger
    assert read_provenance(tmp_path / "result.png")["grow"] == 20


def test_two_regions_are_painted_with_their_exemplars(tab, disc, tmp_path):
    load(tab, "image", disc[0])
    load(tab, "exemplar", EXAMPLES / "china.jpg")
    press(tab, "image", "Box")
    drag(tab, "image", (0.1, 0.1), (0.4, 0.4))
    unfold(tab, "Several regions")
    tab.locator("#add-region").click()
    chip = tab.locator("#chips").get_by_role("button", name="region 1", exact=True)
    chip.wait_for()
    tab.locator("#exemplar-file").wait_for()
    load(tab, "exemplar", EXAMPLES / "coffee.png")
    drag(tab, "image", (0.6, 0.6), (0.9, 0.9))
    before = np.asarray(Image.open(disc[0]))
    changed = (paint(tab, tmp_path / "two.png") != before).any(axis=-1)
    assert changed[50:150, 70:230].mean() > 0.95
    assert changed[250:350, 370:530].mean() > 0.95
    assert bounds(changed) == pytest.approx((60, 40, 540, 360), abs=4)
    stored = read_provenance(tmp_path / "two.png")
    assert (stored["exemplar"], stored["exemplar_2"]) == (["exemplar.jpg"], ["exemplar_2.png"])

    chip.click()  # the first is opened, and the second kept for it
    tab.wait_for_timeout(2 * SECONDS)
    assert tab.locator("#chips .chip").count() == 1
    tab.locator("#chips").get_by_role("button", name="Remove region 1").click()
    chip.wait_for(state="detached")
    changed = (paint(tab, tmp_path / "one.png") != before).any(axis=-1)
    assert bounds(changed) == pytest.approx((60, 40, 240, 160), abs=4)
    assert tab.faults == []


def test_wrong_input_is_answered_in_words(tab, tmp_path):
    tab.locator("#paint").click()
    assert "There is no image yet" in message(tab)
    (tmp_path / "image.png").write_bytes(b"no picture")
    tab.locator("#image-file input[type=file]").set_input_files(tmp_path / "image.png")
    tab.get_by_test_id("toast-text").filter(has_text="image.png is not a picture").wait_for()
    assert tab.locator("#image-file").is_visible()
    load(tab, "image", EXAMPLES / "coffee.png")
    drag(tab, "image", (0.4, 0.4), (0.6, 0.6))
    tab.locator("#paint").click()
    tab.get_by_test_id("toast-text").filter(has_text="There is no exemplar yet").wait_for()


def test_the_screenshot(tiny_checkpoint, tmp_path):
    screenshot(tiny_checkpoint, tmp_path / "app.png")
    with Image.open(tmp_path / "app.png") as picture:
        assert picture.width == 1440
        assert np.asarray(picture.convert("L")).std() > 20  # not blank: three pictures on white


# --- the screenshot ---------------------------------------------------------------------------------------


def screenshot(checkpoint: Path, out: Path) -> None:
    """Has the first example painted by a model, and saves what the page then looks like."""
    model = load_editor(checkpoint)
    page = build_page(model, identify(checkpoint, model.dtype), quick_settings(checkpoint))
    with served(page) as address, browser(address) as tab:
        tab.locator("#examples tbody tr").first.click()
        tab.wait_for_function("document.querySelector('#image canvas')?.width > 300")
        tab.locator("#paint").click()
        tab.locator("#results img").first.wait_for(timeout=600 * SECONDS)
        tab.mouse.move(0, 0)
        tab.wait_for_timeout(SECONDS)  # colours fade in and out
        tab.screenshot(path=out)


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
