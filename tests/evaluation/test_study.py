"""A user study without a browser: what the page holds and hides, and what the report makes of answers."""

import base64
import io
import json
import math
import re
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.cli.evaluate import main
from pbe.evaluation.bootstrap import Bootstrap
from pbe.evaluation.study.build import StudyConfig, build_study, outlined
from pbe.evaluation.study.report import (
    bootstrap_mean_ranks,
    markdown,
    mean_ranks,
    preference,
    read_answers,
    read_key,
    sign_test,
    study_report,
    wilson,
    write_study_report,
)
from pbe.evaluation.test_set import TestSet

SYSTEMS = ("ours <b>", "copy|paste", "zeta")
SIZE = 48, 32  # of the sources, width and height
COLOURS = dict(zip(SYSTEMS, ((200, 40, 40), (40, 200, 40), (40, 40, 200)), strict=True))


def make_benchmark(folder: Path, count: int = 4) -> tuple[Path, dict[str, Path]]:
    """A test set of `count` items, and results of three systems, each of one colour that no other has."""
    rng = np.random.default_rng(0)
    test_set, ids = folder / "bench", [10 * i + 7 for i in range(count)]
    results = {system: folder / f"results-{i}" for i, system in enumerate(SYSTEMS)}
    for one in (test_set / "GT_3500", test_set / "Ref_3500", test_set / "Mask_bbox_3500", *results.values()):
        one.mkdir(parents=True)
    for id_ in ids:
        source = Image.fromarray(rng.integers(60, 200, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
        mask = Image.new("L", SIZE)
        mask.paste(255, (12, 8, 30, 24))
        source.save(test_set / f"GT_3500/{id_:012d}_GT.png")
        Image.new("RGB", (20, 20), (120, 120, 120)).save(test_set / f"Ref_3500/{id_:012d}_ref.png")
        mask.save(test_set / f"Mask_bbox_3500/{id_:012d}_mask.png")
        for system, one in results.items():
            Image.new("RGB", SIZE, COLOURS[system]).save(one / f"{id_:012d}.png")
    np.save(test_set / "id_list.npy", np.array(ids))
    return test_set, results


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, Path], Path]:
    """A test set's folder, the systems' results, and the study of three of its four items."""
    folder = tmp_path_factory.mktemp("study")
    test_set, results = make_benchmark(folder)
    config = StudyConfig(num_items=3, size=64, title="</script><b>Title", send_to="mail <them>")
    build_study(TestSet(test_set), results, folder / "out", config)
    return test_set, results, folder / "out"


def shown(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="study">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found[1])


def answer_file(path: Path, key_path: Path, who: str, orders: dict[str, tuple[int, ...]], **changes) -> Path:
    """Answers in which each question's order of the systems is the same for all items."""
    key = json.loads(key_path.read_text())
    answers = []
    for item, pictures in key["items"].items():
        by_system = {system: picture for picture, system in pictures.items()}
        one = {"item": item, "shown": sorted(pictures), "quality": None, "likeness": None}
        for question, order in orders.items():
            one[question] = [by_system[key["systems"][s]] for s in order]
        answers.append(one)
    content = {"kind": "pbe study answers", "study": key["study"], "participant": who, "answers": answers}
    path.write_text(json.dumps(content | changes))
    return path


# --- the page ---------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_hides_the_systems(made):
    _, results, out = made
    assert sorted(p.name for p in out.rglob("*")) == ["key.json", "page", "study.html"]
    page = (out / "page/study.html").read_text()
    for name in (*SYSTEMS, *(folder.name for folder in results.values())):
        assert name not in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "http:" not in page.replace("http-equiv", "")
    assert "https:" not in page
    assert page.count("</script>") == 2  # the title's would be the third, and end the data
    data = shown(out / "page/study.html")
    assert (data["title"], data["send_to"]) == ("</script><b>Title", "mail <them>")
    assert len(data["items"]) == 3
    assert len(data["pictures"]) == 3 * 5


def test_the_key_tells_whose_each_picture_is(made):
    test_set, _, out = made
    key, data = read_key(out / "key.json"), shown(out / "page/study.html")
    assert key.study == data["study"]
    assert key.systems == SYSTEMS
    assert set(key.items) <= {item.name for item in TestSet(test_set).items}
    firsts = set()
    for item in data["items"]:
        assert item["aspect"] == SIZE[0] / SIZE[1]
        assert item["results"] == sorted(key.items[item["item"]])
        firsts.add(tuple(key.items[item["item"]][name] for name in item["results"]))
        for name, system in key.items[item["item"]].items():
            picture = Image.open(io.BytesIO(base64.b64decode(data["pictures"][name].partition(",")[2])))
            assert picture.size == SIZE
            assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}  # no metadata
            # JPEG keeps one plain colour to within its rounding.
            np.testing.assert_allclose(np.asarray(picture).mean(axis=(0, 1)), COLOURS[system], atol=3)
    assert len(firsts) > 1  # sorting the names does not sort the systems
    assert list(data["pictures"]) == sorted(data["pictures"])


def test_the_seed_decides(made, tmp_path):
    test_set, results, out = made
    config = StudyConfig(num_items=3, size=64, title="</script><b>Title", send_to="mail <them>")
    build_study(TestSet(test_set), results, tmp_path / "again", config)
    for name in ("key.json", "page/study.html"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    other = build_study(TestSet(test_set), results, tmp_path / "other", StudyConfig(num_items=3, size=64, seed=1))
    assert other != read_key(out / "key.json").study


def test_pictures_beside_the_page(made, tmp_path):
    test_set, results, _ = made
    calls = []
    config = StudyConfig(num_items=50, size=64)
    build_study(TestSet(test_set), results, tmp_path / "s", config, as_files=True, on_item=lambda: calls.append(1))
    data = shown(tmp_path / "s/page/study.html")
    assert len(calls) == len(data["items"]) == 4  # all there are
    files = sorted(p.relative_to(tmp_path / "s/page").as_posix() for p in (tmp_path / "s/page/pictures").iterdir())
    assert sorted(data["pictures"].values()) == files
    assert all(re.fullmatch(r"pictures/p\d{5}\.jpg", name) for name in files)


def test_the_region_is_outlined_and_pictures_are_reduced(tmp_path):
    image, repaint = Image.new("RGB", (200, 100), (0, 0, 255)), np.zeros((100, 200), bool)
    repaint[20:60, 40:120] = True
    pixels = np.asarray(outlined(image, repaint)).astype(int)
    is_red, is_white = (pixels == (225, 25, 25)).all(-1), (pixels == 255).all(-1)
    expected_red, expected_white = np.zeros_like(repaint), np.zeros_like(repaint)
    expected_white[18:62, 38:122] = expected_red[19:61, 39:121] = True  # a line of 1 for 200 pixels
    np.testing.assert_array_equal(is_red, expected_red & ~repaint)
    np.testing.assert_array_equal(is_white, expected_white & ~expected_red)
    assert image.getpixel((39, 30)) == (0, 0, 255)  # the image itself stays

    test_set, results = make_benchmark(tmp_path, 2)
    for path in (test_set / "GT_3500").iterdir():
        Image.open(path).resize((192, 128)).save(path)
    for path in (test_set / "Mask_bbox_3500").iterdir():
        Image.open(path).resize((192, 128)).save(path)
    for folder in results.values():
        for path in folder.iterdir():
            Image.open(path).resize((192, 128)).save(path)
    build_study(TestSet(test_set), results, tmp_path / "s", StudyConfig(size=64), as_files=True)
    sizes = [Image.open(path).size for path in (tmp_path / "s/page/pictures").iterdir()]
    assert sorted(set(sizes)) == [(20, 20), (64, 43)]


def test_build_refuses(made, tmp_path, monkeypatch):
    test_set, results, out = made
    test_set = TestSet(test_set)
    with pytest.raises(ValueError, match="ranks 2 to 9 systems, got 1: zeta"):
        build_study(test_set, {"zeta": results["zeta"]}, tmp_path / "s")
    with pytest.raises(ValueError, match=r"must be printable text, got 'a\\nb'"):
        build_study(test_set, {"a\nb": results["zeta"], **results}, tmp_path / "s")
    with pytest.raises(FileExistsError, match="exists; --force"):
        build_study(test_set, results, out)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="replaces it, if it is a study"):
        build_study(test_set, results, tmp_path / "mine", overwrite=True)
    with pytest.raises(ValueError, match="num_items must be 1 to 10000, got 0"):
        StudyConfig(num_items=0)
    with pytest.raises(ValueError, match="quality must be 1 to 95, got 100"):
        StudyConfig(quality=100)
    monkeypatch.setattr("pbe.evaluation.study.build.MAX_INLINE", 1000)
    with pytest.raises(ValueError, match="--files"):
        build_study(test_set, results, tmp_path / "s", StudyConfig(size=64))
    (tmp_path / "other").mkdir()
    for item in test_set.items:
        Image.new("RGB", (10, 10)).save(tmp_path / "other" / f"{item.name}.png")
    with pytest.raises(ValueError, match="is 10x10, but the image"):
        build_study(test_set, {**results, "other": tmp_path / "other"}, tmp_path / "s")
    assert not (tmp_path / "s").exists()


# --- answers ----------------------------------------------------------------------------------------------


def test_answers_are_ranks_of_the_systems(made, tmp_path):
    key_path = made[2] / "key.json"
    key = read_key(key_path)
    path = answer_file(tmp_path / "a.json", key_path, "one", {"quality": (2, 0, 1)})
    answers = read_answers(path, key)
    assert answers.ranks["quality"].tolist() == [[2, 3, 1]] * 3
    assert answers.ranks["likeness"].isnan().all()
    for row, pictures in zip(answers.places.tolist(), key.items.values(), strict=True):
        assert [pictures[name] for name in sorted(pictures)] == [key.systems[row.index(place)] for place in range(3)]


def test_wrong_answers_are_refused(made, tmp_path):
    key_path = made[2] / "key.json"
    key = read_key(key_path)

    def refused(name, match, **changes):
        path = answer_file(tmp_path / name, key_path, "one", {"quality": (0, 1, 2)}, **changes)
        with pytest.raises(ValueError, match=rf"{name}.*{match}"):
            read_answers(path, key)

    good = json.loads(answer_file(tmp_path / "good.json", key_path, "one", {"quality": (0, 1, 2)}).read_text())
    first, *others = good["answers"]
    refused("other.json", f"answers the study 'abc', the key is of '{key.study}'", study="abc")
    refused("kind.json", "does not hold answers", kind="pbe study key")
    refused("nobody.json", "must name its participant", participant=3)
    refused("item.json", r"the item \['x'\] is not in the study", answers=[{"item": ["x"]}])
    refused("twice.json", f"the item '{first['item']}' is there twice", answers=[first, *others, first])
    refused("short.json", f"'quality' of item {first['item']} must be an order of", answers=[
        {**first, "quality": first["quality"][:2]}
    ])  # fmt: skip
    refused("shown.json", f"'shown' of item {first['item']} must be", answers=[{**first, "shown": None}])
    refused("foreign.json", "'likeness' of item", answers=[{**first, "likeness": others[0]["quality"]}])
    deep: list = []
    for _ in range(900):
        deep = [deep]
    refused("deep.json", f"'shown' of item {first['item']} must be", answers=[{**first, "shown": deep}])
    refused("deeper.json", r"the item \[\[", answers=[{"item": deep}])
    (tmp_path / "deepest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deepest\.json does not hold answers to a study.*nested too deeply"):
        read_answers(tmp_path / "deepest.json", key)
    (tmp_path / "text.json").write_text("no JSON")
    with pytest.raises(ValueError, match=r"text\.json does not hold answers to a study.*Expecting value"):
        read_answers(tmp_path / "text.json", key)
    with pytest.raises(ValueError, match=r"good\.json is not the key of a study"):
        read_key(tmp_path / "good.json")
    again = answer_file(tmp_path / "again.json", key_path, "one", {"quality": (0, 1, 2)})
    with pytest.raises(ValueError, match=r"again\.json is of the same participant as .*good\.json"):
        study_report(key_path, [tmp_path / "good.json", again])
    with pytest.raises(ValueError, match="resamples must be 100 or more, got 99"):
        study_report(key_path, [tmp_path / "good.json"], bootstrap=Bootstrap(99))
    with pytest.raises(ValueError, match=r"level must be between 0 and 1, got 95"):
        study_report(key_path, [tmp_path / "good.json"], bootstrap=Bootstrap(1000, level=95))
    with pytest.raises(ValueError, match="no file holds a ranking by likeness"):
        study_report(key_path, [tmp_path / "good.json"])


# --- figures ----------------------------------------------------------------------------------------------


def random_ranks(participants: int, items: int, systems: int) -> torch.Tensor:
    """Rankings in which participants and items differ in what they prefer; some are missing."""
    rng = np.random.default_rng(3)
    score = (
        rng.normal(size=(participants, items, systems))
        + rng.normal(size=(participants, 1, systems))
        + rng.normal(size=(1, items, systems))
    )
    ranks = score.argsort(-1).argsort(-1) + 1.0
    ranks[rng.random((participants, items)) < 0.2] = np.nan
    return torch.from_numpy(ranks)


def test_the_bootstrap_draws_participants_and_items():
    ranks = random_ranks(6, 5, 3)
    draws = bootstrap_mean_ranks(ranks, 20_000, torch.Generator().manual_seed(0))
    # The same, one draw at a time, from another generator: the moments agree to within their own noise.
    rng, table, expected = np.random.default_rng(0), ranks.numpy(), []
    for _ in range(4000):
        drawn = table[rng.integers(6, size=6)][:, rng.integers(5, size=5)]
        expected.append(np.nanmean(drawn, axis=(0, 1)))
    deviation = np.std(expected, axis=0)
    np.testing.assert_allclose(draws.mean(0), np.mean(expected, axis=0), atol=5 * deviation.max() / 4000**0.5)
    np.testing.assert_allclose(draws.std(0), deviation, rtol=0.06)  # a deviation of 4000 draws is known to 1.1 %
    np.testing.assert_allclose(mean_ranks(ranks), np.nanmean(table, axis=(0, 1)), rtol=1e-12)
    assert torch.equal(draws, bootstrap_mean_ranks(ranks, 20_000, torch.Generator().manual_seed(0)))
    # Rankings drawn one by one would look more certain than they are.
    rankings = table[~np.isnan(table[..., 0])]
    alone = [rankings[rng.integers(len(rankings), size=len(rankings))].mean(0) for _ in range(2000)]
    assert (draws.std(0).numpy() > 1.3 * np.std(alone, axis=0)).all()


def test_draws_without_a_ranking_are_left_out():
    ranks = torch.full((4, 4, 2), math.nan, dtype=torch.float64)
    ranks[0, 0] = torch.tensor([2.0, 1.0])
    draws = bootstrap_mean_ranks(ranks, 500, torch.Generator().manual_seed(0))
    assert 0 < len(draws) < 500
    assert draws.tolist() == [[2.0, 1.0]] * len(draws)


@pytest.mark.parametrize(("wins", "of"), [(0, 4), (3, 4), (7, 20), (20, 20), (512, 1500)])
def test_wilson_and_the_sign_test_are_scipys(wins, of):
    stats = pytest.importorskip("scipy.stats")
    found = stats.binomtest(wins, of, 0.5)
    for level in (0.9, 0.95):
        expected = found.proportion_ci(level, method="wilson")
        np.testing.assert_allclose(wilson(wins, of, level), (expected.low, expected.high), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sign_test(wins, of - wins), found.pvalue, rtol=1e-9)


def test_preference_counts_rankings_and_participants():
    nan = math.nan
    a = torch.tensor([[1, 1, 2], [1, 2, nan], [2, 2, 2.0]])
    b = torch.tensor([[2, 2, 1], [2, 1, nan], [1, 1, 1.0]])
    found = preference(a, b, 0.95)
    assert (found["wins"], found["of"], found["share"]) == (3, 8, 0.375)
    assert (found["votes_for"], found["votes_against"]) == (1, 1)  # the second participant prefers neither
    assert found["sign_test_p"] == 1
    back = preference(b, a, 0.95)
    assert (back["wins"], back["low"]) == (5, pytest.approx(1 - found["high"]))


def test_the_report(made, tmp_path):
    key_path = made[2] / "key.json"
    files = [
        answer_file(tmp_path / "a.json", key_path, "a", {"quality": (0, 1, 2), "likeness": (1, 0, 2)}),
        answer_file(tmp_path / "b.json", key_path, "b", {"quality": (0, 2, 1), "likeness": (1, 0, 2)}),
        answer_file(tmp_path / "c.json", key_path, "c", {"quality": (1, 0, 2)}),
    ]
    report = study_report(key_path, files, bootstrap=Bootstrap(2000))
    assert (report["participants"], report["items"], report["systems"]) == (3, 3, list(SYSTEMS))
    quality, likeness = report["questions"]["quality"], report["questions"]["likeness"]
    assert (quality["rankings"], likeness["rankings"]) == (9, 6)
    means = [quality["mean_rank"][system]["value"] for system in SYSTEMS]
    assert means == pytest.approx([4 / 3, 2, 8 / 3])
    assert quality["mean_rank"]["zeta"]["low"] < 8 / 3 < quality["mean_rank"]["zeta"]["high"] == 3
    assert likeness["mean_rank"]["copy|paste"] == {"value": 1, "low": 1, "high": 1}  # all agree
    pairs = {(one["system"], one["over"]): one for one in quality["preference"]}
    assert pairs[SYSTEMS[0], SYSTEMS[1]]["share"] == pytest.approx(2 / 3)
    assert (pairs[SYSTEMS[0], "zeta"]["wins"], pairs[SYSTEMS[0], "zeta"]["sign_test_p"]) == (9, 0.25)
    assert sum(quality["mean_rank_by_place"]) == pytest.approx(6)
    assert study_report(key_path, files[::-1], bootstrap=Bootstrap(2000))["questions"]["likeness"] == likeness

    write_study_report(report, tmp_path / "out")
    assert json.loads((tmp_path / "out/study-report.json").read_text()) == report
    text = (tmp_path / "out/study-report.md").read_text()
    assert text == markdown(report)
    assert "3 participants, 3 items, 3 systems." in text
    assert re.search(r"\| ours \\<b> +\| +1\.33 \| +1\.00 to 2\.00 \|", text)
    assert "copy\\|paste over zeta" in text  # a name ends no cell and starts no element
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_every_order_is_as_likely_a_mean_rank_of_the_middle(made, tmp_path):
    key_path = made[2] / "key.json"
    files = [
        answer_file(tmp_path / f"{i}.json", key_path, str(i), {"quality": order, "likeness": order})
        for i, order in enumerate(permutations(range(3)))
    ]
    report = study_report(key_path, files, bootstrap=Bootstrap(100))
    for figures in report["questions"].values():
        assert [one["value"] for one in figures["mean_rank"].values()] == [2, 2, 2]
        assert figures["mean_rank_by_place"] == [2, 2, 2]
        assert [(one["share"], one["sign_test_p"]) for one in figures["preference"]] == [(0.5, 1)] * 3


# --- the commands -----------------------------------------------------------------------------------------


def command(*arguments) -> int:
    return main(list(map(str, arguments)))


def test_the_commands(made, tmp_path, capsys):
    test_set, results, _ = made
    named = [f"{name}={folder}" for name, folder in results.items()]
    flags = ["--test-set", test_set, "--size", 64, "--quiet"]
    assert command("study", *flags, "--results", *named, "--out", tmp_path / "s", "-n", 2) == 0
    printed = capsys.readouterr().out
    key = read_key(tmp_path / "s/key.json")
    assert f"study {key.study}: 2 items, 3 systems" in printed
    assert "study.html: hand out this file" in printed
    assert command("study", *flags, "--results", results[SYSTEMS[0]], results[SYSTEMS[0]], "--out", tmp_path / "t") == 2
    assert "two systems are called 'results-0'" in capsys.readouterr().err
    order = (0, 1, 2)
    file = answer_file(tmp_path / "a.json", tmp_path / "s/key.json", "a", {"quality": order, "likeness": order})
    assert command("study-report", tmp_path / "s/key.json", file, "--out", tmp_path / "r", "--resamples", 100) == 0
    assert capsys.readouterr().out == (tmp_path / "r/study-report.md").read_text()


@pytest.mark.parametrize("damage", [{"study": 3}, {"systems": "a"}, {"items": []}, {"items": {"1": {"A": "other"}}}])
def test_a_damaged_key_is_named(tmp_path, damage):
    key = {"kind": "pbe study key", "study": "1", "systems": ["a"], "items": {"1": {"A": "a"}}}
    (tmp_path / "key.json").write_text(json.dumps(key))
    assert read_key(tmp_path / "key.json").systems == ("a",)
    for content in ({**key, **damage}, {name: key[name] for name in key if name not in damage}):
        (tmp_path / "key.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"key\.json is not the key of a study"):
            read_key(tmp_path / "key.json")
