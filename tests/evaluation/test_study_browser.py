"""The study's page in a real browser, from the disk: what a participant does, and the report of it."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pbe.evaluation.bootstrap import Bootstrap
from pbe.evaluation.study.build import StudyConfig, build_study
from pbe.evaluation.study.report import read_answers, read_key, study_report
from pbe.evaluation.test_set import TestSet
from tests.evaluation.test_study import SYSTEMS, make_benchmark

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="the browser needs playwright: pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH: apt-get install chromium"),
]
QUALITY, LIKENESS = (2, 0, 1), (1, 2, 0)  # the systems from best to worst, as this file's participants see them


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    test_set, results = make_benchmark(folder, 2)
    config = StudyConfig(title="</script><b>Title", send_to="mail <them>")
    build_study(TestSet(test_set), results, folder / "out", config)
    build_study(TestSet(test_set), results, folder / "files", config, as_files=True)
    return folder


@contextmanager
def browser(**kwargs):
    """A context of a browser that is as new; its pages gather in `faults` what goes wrong, and what they ask for."""
    with playwright.sync_playwright() as driver:
        # The sandbox does not start for root, as in containers; only this page is opened.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **kwargs})
        context.set_default_timeout(30_000)
        yield context
        chromium.close()


def open_page(context, path: Path):
    tab = context.new_page()
    tab.faults, tab.requests = [], []
    tab.on("pageerror", lambda error: tab.faults.append(str(error)))
    tab.on("console", lambda line: tab.faults.append(line.text) if line.type == "error" else None)
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.goto((path / "page/study.html").as_uri())
    return tab


@pytest.fixture
def tab(study):
    with browser() as context:
        yield open_page(context, study / "out")


def letters(tab, study: Path, systems: tuple[int, ...]) -> list[str]:
    """The letters that the systems have in the question shown, found through the key."""
    pictures = read_key(study / "out/key.json").items[tab.evaluate("current().item")]
    shown = [pictures[name] for name in tab.evaluate("current().shown")]
    return ["ABC"[shown.index(SYSTEMS[s])] for s in systems]


def click(tab, letter: str) -> None:
    tab.get_by_role("button", name=f"Result {letter}, ").click()


def order(tab) -> list[str]:
    return tab.locator("#order li").all_text_contents()


def save(tab, path: Path) -> Path:
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save answers as a file").click()
    assert download.value.suggested_filename.startswith("answers-")
    download.value.save_as(path)
    return path


def answer_all(tab, study: Path) -> None:
    """Begins, and answers all four questions by the keyboard alone."""
    tab.get_by_role("button", name="Begin").click()
    for systems in (QUALITY, LIKENESS, QUALITY, LIKENESS):
        for letter in letters(tab, study, systems):
            tab.keyboard.press(letter.lower())
        tab.keyboard.press("ArrowRight")


def test_a_participant_ranks_reloads_and_saves(tab, study, tmp_path):
    assert tab.locator("#title").inner_text() == "</script><b>Title"
    tab.get_by_role("button", name="Begin").click()
    assert tab.locator("#count").inner_text() == "Question 1 of 4"
    first = letters(tab, study, QUALITY)
    for letter in first:
        click(tab, letter)
    assert order(tab) == first
    tab.get_by_role("button", name="Next", exact=True).click()
    assert "example" in tab.locator("#question").inner_text()
    second = letters(tab, study, LIKENESS)
    click(tab, second[0])  # one of three

    before = tab.evaluate("[session.participant, session.seed, session.items.map(one => one.shown)]")
    tab.reload()
    assert tab.evaluate("[session.participant, session.seed, session.items.map(one => one.shown)]") == before
    assert tab.locator("#count").inner_text() == "Question 2 of 4"
    assert tab.locator("#status").inner_text() == "Continued where you left off"
    assert order(tab) == [second[0], "", ""]
    for letter in second[1:]:
        tab.keyboard.press(letter)
    tab.keyboard.press("ArrowRight")
    for systems in (QUALITY, LIKENESS):
        for letter in letters(tab, study, systems):
            tab.keyboard.press(letter)
        tab.keyboard.press("ArrowRight")
    assert tab.get_by_role("heading", name="Thank you").is_visible()
    assert tab.locator("#answered").inner_text() == "All 4 questions are answered."
    assert tab.locator("#sendto").inner_text() == "Save your answers and mail <them>."

    path, key = save(tab, tmp_path / "answers.json"), study / "out/key.json"
    answers = read_answers(path, read_key(key))
    ranks = {name: np.argsort(order) + 1 for name, order in (("quality", QUALITY), ("likeness", LIKENESS))}
    for name, expected in ranks.items():
        assert answers.ranks[name].tolist() == [expected.tolist()] * 2
    assert json.loads(path.read_text())["seed"] == before[1]
    report = study_report(key, [path], Bootstrap(100))
    for name, expected in ranks.items():
        found = report["questions"][name]["mean_rank"]
        assert [found[system]["value"] for system in SYSTEMS] == expected.tolist()
    assert tab.faults == []
    assert [url for url in tab.requests if not url.startswith(("data:", "blob:", (study / "out").as_uri()))] == []


def test_two_participants_of_one_browser(tab, study, tmp_path):
    answer_all(tab, study)
    paths = [save(tab, tmp_path / "a.json")]
    tab.once("dialog", lambda dialog: dialog.dismiss())
    tab.get_by_role("button", name="Start again").click()
    assert tab.locator("#end").is_visible()  # not confirmed
    tab.once("dialog", lambda dialog: dialog.accept())
    tab.get_by_role("button", name="Start again").click()
    answer_all(tab, study)
    paths.append(save(tab, tmp_path / "b.json"))
    first, second = (json.loads(path.read_text()) for path in paths)
    assert first["participant"] != second["participant"]
    assert first["seed"] != second["seed"]
    report = study_report(study / "out/key.json", paths, Bootstrap(100))
    assert report["participants"] == 2
    assert report["questions"]["quality"]["mean_rank"]["zeta"] == {"value": 1, "low": 1, "high": 1}


def test_ranks_are_taken_back(tab):
    tab.get_by_role("button", name="Begin").click()
    for letter in "BCA":
        click(tab, letter)
    assert tab.get_by_role("button", name="Result C, ranked 2nd", pressed=True).is_visible()
    click(tab, "B")  # those behind it move up
    assert order(tab) == ["C", "A", ""]
    tab.keyboard.press("Backspace")
    assert order(tab) == ["C", "", ""]
    assert tab.locator("#status").inner_text() == "A taken out"
    tab.keyboard.press("ArrowRight")  # not before all are ranked
    assert tab.locator("#count").inner_text() == "Question 1 of 4"
    tab.get_by_label("shortcuts").uncheck()
    tab.keyboard.press("A")
    assert order(tab) == ["C", "", ""]
    tab.get_by_role("button", name="Clear").click()
    assert order(tab) == ["", "", ""]
    assert tab.faults == []


def test_the_keyboard_reaches_all(tab):
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # Begin
    reached = []
    for _ in range(11):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))
    expected = ["Enlarge: Photo", "Enlarge: Example"]
    for letter in "ABC":
        expected += [f"Result {letter}, not ranked", f"Enlarge: Result {letter}"]
    assert reached == [*expected, "back", "shortcuts", "next"]  # Clear has nothing to clear yet
    tab.get_by_role("button", name="Result B, ").focus()
    tab.keyboard.press("Space")
    assert order(tab) == ["B", "", ""]


def test_open_questions_are_found_and_saved_as_such(tab, study, tmp_path):
    tab.get_by_role("button", name="Begin").click()
    for letter in letters(tab, study, QUALITY):
        tab.keyboard.press(letter)
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("A")
    for _ in range(3):
        tab.get_by_role("button", name="Skip for now").click()
    assert tab.locator("#answered").inner_text() == "1 of 4 questions are answered, 3 are open."
    answers = json.loads(save(tab, tmp_path / "a.json").read_text())["answers"]
    assert [(one["quality"] is None, one["likeness"]) for one in answers] == [(False, None), (True, None)]
    tab.get_by_role("button", name="To the first open question").click()
    assert tab.locator("#count").inner_text() == "Question 2 of 4"
    assert order(tab) == ["A", "", ""]


def test_copying_gives_what_is_saved(study):
    with browser(permissions=["clipboard-read", "clipboard-write"]) as context:
        tab = open_page(context, study / "out")
        answer_all(tab, study)
        tab.get_by_role("button", name="Copy answers").click()
        tab.locator("#done", has_text="Copied.").wait_for()
        copied = json.loads(tab.evaluate("navigator.clipboard.readText()"))
        assert copied == json.loads(tab.locator("#answers").input_value())
        assert copied["study"] == read_key(study / "out/key.json").study


def test_pictures_show_beside_the_page_and_enlarged(study):
    with browser() as context:
        tab = open_page(context, study / "files")
        tab.get_by_role("button", name="Begin").click()
        tab.wait_for_function("[...document.querySelectorAll('#ask img')].every(one => one.naturalWidth > 0)")
        assert tab.locator("#ask img").count() == 5
        tab.get_by_role("button", name="Enlarge: Result A").click()
        tab.keyboard.press("ArrowRight")
        assert tab.locator("#caption").inner_text() == "Result B"
        assert (
            tab.locator("#large img")
            .evaluate("one => one.src")
            .endswith(tab.evaluate("study.pictures[current().shown[1]]"))
        )
        tab.keyboard.press("Escape")
        assert tab.locator("#large").is_hidden()
        assert order(tab) == ["", "", ""]
        assert tab.faults == []


def test_a_question_fits_the_window(study):
    for width, height in ((1280, 800), (1920, 1000)):
        with browser(viewport={"width": width, "height": height}) as context:
            tab = open_page(context, study / "out")
            tab.get_by_role("button", name="Begin").click()
            for aspect in (0.7, 1, 1.5):  # of photo, example and results alike
                tab.add_style_tag(content=f"aside img {{ aspect-ratio: {aspect}; }}")
                tab.evaluate(f"study.items.forEach(one => one.aspect = {aspect}), go(session.at + 1)")
                assert tab.evaluate("document.documentElement.scrollHeight") <= height
    with browser(viewport={"width": 360, "height": 640}) as context:
        tab = open_page(context, study / "out")
        tab.get_by_role("button", name="Begin").click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_orders_are_uniform_and_of_their_seed(tab):
    seeds = np.random.default_rng(0).integers(2**32, size=6000).tolist()
    orders = tab.evaluate("seeds => seeds.map(seed => shuffled([0, 1, 2], random(seed)).join(''))", seeds)
    counts = np.unique(orders, return_counts=True)[1]
    assert len(counts) == 6
    # The count of an order deviates by 29; 5 of these deviations would be chance once in a million.
    np.testing.assert_allclose(counts, 1000, atol=5 * 29)
    again = tab.evaluate("seeds => seeds.map(seed => shuffled([0, 1, 2], random(seed)).join(''))", seeds[:50])
    assert again == orders[:50]
    found = tab.evaluate(
        "(() => { const n = random(session.seed); return shuffled(study.items, n).map(i => i.item) })()"
    )
    assert found == tab.evaluate("session.items.map(one => one.item)")


def test_without_storage_the_page_says_so(study):
    with browser() as context:
        context.add_init_script(
            "Object.defineProperty(window, 'localStorage', { get() { throw new Error('blocked') } })"
        )
        tab = open_page(context, study / "out")
        assert tab.get_by_role("alert").is_visible()
        answer_all(tab, study)
        assert tab.get_by_role("heading", name="Thank you").is_visible()
