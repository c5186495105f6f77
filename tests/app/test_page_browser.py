"""The page in a real browser; and its screenshot: `python tests/app/test_page_browser.py demo docs/images/app.png`.

With `--dark` and `--width 390` it is the dark page, and that of a phone.
"""

import argparse
import io
import re
import shutil
import socket
from base64 import b64decode
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
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


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


# --- keys and fingers -------------------------------------------------------------------------------------


def looks(tab, name: str = "image") -> np.ndarray:
    """What a canvas shows while the mouse is elsewhere: uint8 (H, W, 3)."""
    tab.mouse.move(0, 0)
    url = tab.locator(f"#{name} canvas").evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(b64decode(url.partition(",")[2]))).convert("RGB"))


def width_of(tab, name: str = "image") -> float:
    return tab.locator(f"#{name} canvas").bounding_box()["width"]


def pressed(tab, name: str = "image") -> str:
    return tab.locator(f"#{name} [aria-pressed=true]").inner_text()


def test_keys_undo_redo_and_choose_tools(tab):
    load(tab, "image", EXAMPLES / "coffee.png")
    states = [looks(tab)]
    for y in (0.3, 0.6):
        drag(tab, "image", (0.3, y), (0.6, y))
        states.append(looks(tab))
    assert (states[0] != states[1]).any()
    assert (states[1] != states[2]).any()
    for keys, state in (
        ("Control+z", 1),
        ("Control+z", 0),
        ("Control+z", 0),
        ("Control+y", 1),
        ("Control+Shift+z", 2),
        ("Control+Shift+z", 2),
        ("Control+z", 1),
    ):
        tab.keyboard.press(keys)
        assert (looks(tab) == states[state]).all(), keys
    drag(tab, "image", (0.3, 0.9), (0.6, 0.9))
    drawn = looks(tab)
    tab.keyboard.press("Control+y")  # there is nothing to do again
    assert (looks(tab) == drawn).all()

    size = tab.get_by_label("Size of the brush")
    for key, value in (("]", "45"), ("[", "40"), ("[", "35")):
        tab.keyboard.press(key)
        assert size.input_value() == value
    for key, name in (("e", "Eraser"), ("r", "Box"), ("b", "Brush")):
        tab.keyboard.press(key)
        assert pressed(tab) == name

    tab.get_by_role("button", name="Steps, seed, sampler").click()
    tab.get_by_label("Seed").click()
    tab.locator("#image canvas").hover()  # the mouse is there, but the visitor types
    for key in ("e", "Control+z", "]"):
        tab.keyboard.press(key)
    assert pressed(tab) == "Brush"
    assert size.input_value() == "35"
    assert (looks(tab) == drawn).all()
    assert tab.faults == []


def test_keys_and_wheel_zoom_and_the_space_bar_moves(tab):
    load(tab, "image", EXAMPLES / "coffee.png")
    whole, before = width_of(tab), looks(tab)
    tab.locator("#image canvas").hover()
    tab.keyboard.press("+")
    assert width_of(tab) == pytest.approx(1.25 * whole, rel=0.01)
    tab.keyboard.press("-")
    assert width_of(tab) == pytest.approx(whole, rel=0.01)
    box = tab.locator("#image canvas").bounding_box()
    corner = box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"]
    tab.mouse.move(*corner)
    tab.mouse.wheel(0, -500)
    tab.wait_for_function(
        "before => document.querySelector('#image canvas').getBoundingClientRect().width > before", arg=1.5 * whole
    )
    box = tab.locator("#image canvas").bounding_box()
    assert (corner[0] - box["x"]) / box["width"] == pytest.approx(0.25, abs=0.01)  # what the mouse is on stays there

    tab.keyboard.down(" ")
    tab.mouse.down()
    tab.mouse.move(corner[0] + 40, corner[1] + 20, steps=4)
    tab.mouse.up()
    tab.keyboard.up(" ")
    moved = tab.locator("#image canvas").bounding_box()
    assert (moved["x"] - box["x"], moved["y"] - box["y"]) == pytest.approx((40, 20), abs=1)
    assert (looks(tab) == before).all()

    press(tab, "image", "Box")
    drag(tab, "image", (0.2, 0.2), (0.3, 0.3))  # in what is shown enlarged
    x0, y0, x1, y1 = bounds((looks(tab) != before).any(axis=-1))
    height, width = before.shape[:2]
    assert (x0 / width, y0 / height, x1 / width, y1 / height) == pytest.approx((0.2, 0.2, 0.3, 0.3), abs=0.01)
    tab.locator("#image canvas").hover(position={"x": 0.25 * moved["width"], "y": 0.25 * moved["height"]})
    tab.keyboard.press("0")
    assert width_of(tab) == pytest.approx(whole, rel=0.01)
    tab.set_viewport_size({"width": 1440, "height": 500})
    tab.locator("#image canvas").hover()
    before = tab.evaluate("window.scrollY")
    tab.mouse.wheel(0, 100)  # nothing to zoom out of: the page scrolls
    tab.wait_for_function("before => window.scrollY > before", arg=before)
    assert width_of(tab) == pytest.approx(whole, rel=0.01)


def touch(session, kind: str, *points: tuple[float, float]) -> None:
    fingers = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
    session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": fingers})


def test_one_finger_draws_and_two_zoom_and_move_on_a_phone(address):
    with browser(address, **PHONE) as tab:
        load(tab, "image", EXAMPLES / "coffee.png")
        tab.locator("#image canvas").scroll_into_view_if_needed()
        box, before = tab.locator("#image canvas").bounding_box(), looks(tab)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        session = tab.context.new_cdp_session(tab)
        touch(session, "Start", (x, y))
        touch(session, "Move", (x + 40, y))
        touch(session, "End")
        drawn = looks(tab)
        assert (drawn != before).any()

        touch(session, "Start", (x - 20, y))
        touch(session, "Move", (x - 30, y))  # a stroke has begun, which is not meant
        touch(session, "Start", (x - 30, y), (x + 30, y))
        touch(session, "Move", (x - 60, y + 10), (x + 60, y + 10))
        touch(session, "End")
        pinched = tab.locator("#image canvas").bounding_box()
        assert pinched["width"] == pytest.approx(2 * box["width"], rel=0.05)
        assert pinched["y"] + pinched["height"] / 2 == pytest.approx(y + 10, abs=3)
        assert (looks(tab) == drawn).all()
        tab.locator("#image").get_by_role("button", name="Undo").tap()
        assert (looks(tab) == before).all()


# --- for everyone -----------------------------------------------------------------------------------------


def click_example(tab) -> None:
    tab.locator("#examples button").first.click()
    tab.locator("#results img").first.wait_for()


def test_a_page_of_390_pixels_does_not_scroll_sideways(address):
    with browser(address, **PHONE) as tab:
        click_example(tab)
        tab.locator("#history button").first.wait_for()
        tab.get_by_label("Before and after").check()
        tab.locator("#comparison img").first.wait_for()
        tab.get_by_role("button", name="Steps, seed, sampler").click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        for button in tab.locator(
            "#image button:visible, #exemplar button:visible, #paint, #cancel, #download, #compare"
        ).all():
            box = button.bounding_box()
            assert 0 <= box["x"] < box["x"] + box["width"] <= 390, button.inner_text()
            assert box["height"] >= 24
        assert tab.faults == []


def nameless(tab) -> list[str]:
    """The controls that a screen reader finds, and has no name for."""
    session = tab.context.new_cdp_session(tab)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    found = []
    for node in nodes:
        about = {one["name"]: one["value"].get("value") for one in node.get("properties", ())}
        is_page = node.get("role", {}).get("value") == "RootWebArea"
        if about.get("focusable") and not is_page and not node.get("name", {}).get("value", "").strip():
            html = session.send("DOM.describeNode", {"backendNodeId": node["backendDOMNodeId"]})["node"]
            found.append(f"{html['localName']} {html.get('attributes')}")
    return found


def test_everything_that_can_be_focused_has_a_name(tab):
    click_example(tab)
    tab.locator("#history button").first.wait_for()
    tab.get_by_role("button", name="Steps, seed, sampler").click()
    tab.get_by_label("Seed").wait_for()
    assert nameless(tab) == []
    tab.get_by_label("Before and after").check()
    tab.locator("#comparison img").first.wait_for()
    assert nameless(tab) == []
    for name in ("image", "exemplar"):
        drawing = tab.get_by_role("application").and_(tab.locator(f"#{name} canvas"))
        assert drawing.get_attribute("aria-label").lower().startswith(name)
        assert "zoom" in tab.locator("#" + drawing.get_attribute("aria-describedby")).inner_text()
    tools = tab.locator("#image [data-tool]:visible")
    assert sorted(tools.evaluate_all("all => all.map((b) => b.getAttribute('aria-pressed'))")) == ["false"] * 3 + [
        "true"
    ]
    status = tab.get_by_role("status").and_(tab.locator("#status p"))
    assert "seed 321" in status.inner_text()
    tab.get_by_label("Before and after").uncheck()
    tab.locator("#results img").first.wait_for()
    shown = tab.locator("#results img").evaluate_all("all => all.map((one) => [one.alt, one.closest('[aria-label]')])")
    assert shown[0][0] == "seed 321"
    assert all(alt or button for alt, button in shown)


def test_focus_is_seen_and_motion_is_left_out_where_it_is_not_wanted(address):
    with browser(address, reduced_motion="reduce", color_scheme="dark") as tab:
        load(tab, "image", EXAMPLES / "coffee.png")
        tab.keyboard.press("Tab")
        for selector in ("#paint", "#image [data-tool=box]", "#image canvas"):
            tab.locator(selector).focus()
            style = tab.locator(selector).evaluate(
                "one => { const s = getComputedStyle(one); return [s.outlineStyle, s.transitionDuration]; }"
            )
            assert style[0] == "solid"
            assert max(float(one.removesuffix("s")) for one in style[1].split(", ")) <= 0.001
        lightness = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, lightness.strip("rgba()").split(",")[:3])) < 64


def test_an_example_is_painted_by_one_click(tab):
    click_example(tab)
    assert tab.locator("#image canvas").is_visible()
    assert tab.locator("#exemplar canvas").is_visible()
    assert "seed 321, steps 20, guidance 5, sampler dpm_solver" in tab.locator("#status").inner_text()
    assert tab.faults == []


# --- results ----------------------------------------------------------------------------------------------


def download(tab, out: Path) -> np.ndarray:
    with tab.expect_download() as saved:
        tab.locator("#download").click()
    saved.value.save_as(out)
    return np.asarray(Image.open(out))


def test_the_history_brings_back_results_and_what_they_were_made_of(tab, tmp_path):
    load(tab, "image", EXAMPLES / "coffee.png")
    load(tab, "exemplar", EXAMPLES / "china.jpg")
    press(tab, "image", "Box")
    drag(tab, "image", (0.4, 0.4), (0.6, 0.6))
    drawn = looks(tab)
    first = paint(tab, tmp_path / "first.png", steps=4)
    tab.locator("#history button").first.wait_for()
    press(tab, "image", "Clear")
    drag(tab, "image", (0.1, 0.1), (0.2, 0.2))
    press(tab, "exemplar", "Load another picture")
    tab.locator("#exemplar-file").wait_for()
    load(tab, "exemplar", EXAMPLES / "flower.jpg")
    second = paint(tab, tmp_path / "second.png", steps=5)
    assert (first != second).any()
    tab.locator("#history button").nth(1).wait_for()
    assert "steps 5" in tab.locator("#history button").nth(0).inner_text()

    old = tab.locator("#history button").nth(1)
    assert "seed 321, steps 4, guidance 5" in old.inner_text()
    old.click()
    tab.locator("#status").filter(has_text="steps 4").wait_for()
    assert tab.get_by_label("number input for Steps").input_value() == "4"
    assert (download(tab, tmp_path / "again.png") == first).all()
    tab.wait_for_timeout(SECONDS)  # the canvas decodes its picture
    assert (looks(tab) == drawn).all()
    tab.locator("#paint").click()
    tab.locator("#history button").nth(2).wait_for()
    assert (download(tab, tmp_path / "repeated.png") == first).all()
    assert tab.faults == []


def test_a_slider_compares_before_and_after(tab, tmp_path):
    Image.new("RGB", (360, 240), (0, 200, 0)).save(tmp_path / "green.png")
    load(tab, "image", tmp_path / "green.png")
    load(tab, "exemplar", EXAMPLES / "china.jpg")
    press(tab, "image", "Box")
    drag(tab, "image", (0.02, 0.02), (0.98, 0.98))
    result = paint(tab, tmp_path / "result.png")
    tab.get_by_label("Before and after").check()
    tab.wait_for_function(
        "() => { const all = [...document.querySelectorAll('#comparison img')];"
        " return all.length === 2 && all.every((one) => one.naturalWidth === 360); }"
    )

    def becomes_green(*expected: bool) -> bool:
        """Whether the picture comes to be as before, or not, around a quarter and three quarters of its width."""
        for _ in range(20):
            shot = np.asarray(Image.open(io.BytesIO(tab.locator("#comparison img").first.screenshot())).convert("RGB"))
            height, width = shot.shape[:2]
            kept = np.abs(shot[height // 4 : height * 3 // 4].astype(int) - (0, 200, 0)).max(axis=-1) < 12
            parts = [kept[:, int(x * width) - 20 : int(x * width) + 20].mean() for x in (0.25, 0.75)]
            if [bool(part > 0.9) for part in parts] == [*expected]:
                return True
            tab.wait_for_timeout(0.2 * SECONDS)
        return False

    assert becomes_green(True, False)
    handle = tab.locator("#comparison [data-testid=slider]").bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x - 300, y, steps=5)
    tab.mouse.up()
    assert becomes_green(False, False)
    tab.get_by_label("range slider for Before").focus()  # the same with keys
    tab.keyboard.press("End")
    assert becomes_green(True, True)
    assert (download(tab, tmp_path / "again.png") == result).all()
    tab.get_by_label("Before and after").uncheck()
    tab.locator("#results img").first.wait_for()
    assert not tab.locator("#comparison").is_visible()
    assert tab.faults == []


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True)])
def test_the_screenshot(tiny_checkpoint, tmp_path, width, dark):
    screenshot(tiny_checkpoint, tmp_path / "app.png", width, dark)
    with Image.open(tmp_path / "app.png") as picture:
        assert picture.width == width
        gray = np.asarray(picture.convert("L"))
        assert gray.std() > 20  # not blank: three pictures on white, or black
        assert (np.median(gray) < 80) == dark


# --- the screenshot ---------------------------------------------------------------------------------------


def screenshot(checkpoint: Path, out: Path, width: int = 1440, dark: bool = False) -> None:
    """Has the first example painted by a model, and saves what the page then looks like, if narrow in full length."""
    model = load_editor(checkpoint)
    page = build_page(model, identify(checkpoint, model.dtype), quick_settings(checkpoint))
    look = {"viewport": {"width": width, "height": 940}, "color_scheme": "dark" if dark else "light"}
    with served(page) as address, browser(address, **look) as tab:
        tab.locator("#examples button").first.click()
        tab.locator("#history button").first.wait_for(timeout=600 * SECONDS)
        tab.mouse.move(0, 0)
        tab.wait_for_timeout(SECONDS)  # colours fade in and out
        tab.screenshot(path=out, full_page=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a picture of the page.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1440)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    screenshot(arguments.checkpoint, arguments.out, arguments.width, arguments.dark)
