"""The figures of a small model, on inputs whose answer is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy_run
from PIL import Image

import pbe
from examples.demo_model import classifier as classifiers
from examples.demo_model import embeddings, measures, statistics, tables
from examples.demo_model.cases import Cases, composite, foreign, kind_of, paste, region_crops
from examples.demo_model.command import main
from examples.demo_model.report import markdown
from pbe.data.recipe_config import RecipeConfig
from pbe.images.windows import Box

N, SIDE = 24, 32


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def coloured(count=N, seed=0):
    """Crops of one colour each, with a little noise: (count, 3, SIDE, SIDE) in [0, 1]."""
    return (noise(count, 3, 1, 1, seed=seed) * 0.9 + 0.1 * noise(count, 3, SIDE, SIDE, seed=seed + 1)).clamp(0, 1)


@pytest.fixture
def cases():
    """Photos of smooth noise, whose regions are boxes of several sizes; in half of them the photo is letterboxed."""
    image = F.interpolate(noise(N, 3, 8, 8) * 2 - 1, (SIDE, SIDE), mode="bilinear")
    mask = torch.ones(N, 1, SIDE, SIDE)
    for i in range(N):
        mask[i, :, 10:20, 8 : 16 + i % 8] = 0
    place = [Box(0, 0, SIDE, SIDE) if i % 2 else Box(0, 6, SIDE, 26) for i in range(N)]
    return Cases(image, mask, coloured(), [1.0] * N, place, ["flowers", "clothing"] * (N // 2), ["thing"] * N)


# --- statistics -------------------------------------------------------------------------------------------


def test_mean_has_the_textbook_standard_error():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    estimate = statistics.mean(values)
    assert estimate.value == pytest.approx(values.mean(), rel=1e-12)
    # 2000 resamples know a standard deviation to 1 / sqrt(2 * 2000), 1.6 %; 6 % is nearly four times that
    assert estimate.standard_error == pytest.approx(values.std() / math.sqrt(400), rel=0.06)
    assert estimate.low == pytest.approx(estimate.value - 1.96 * estimate.standard_error, abs=0.02)
    assert estimate.high == pytest.approx(estimate.value + 1.96 * estimate.standard_error, abs=0.02)
    assert estimate.n == 400


def test_ratio_is_exact_where_each_case_has_the_same():
    denominators = np.arange(1.0, 9.0)
    estimate = statistics.ratio(3 * denominators, denominators)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3, 3, 3))
    assert estimate.standard_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("numerators", "denominators", "message"),
    [
        ([1.0], [1.0], "at least 2 cases"),
        ([1.0, 2.0], [1.0], "shapes"),
        ([1.0, math.nan], [1.0, 1.0], "got nan"),
        ([1.0, 2.0], [1.0, -1.0], "are 0 on average"),
    ],
)
def test_figures_of_nothing_are_refused(numerators, denominators, message):
    with pytest.raises(ValueError, match=message):
        statistics.ratio(numerators, denominators)


# --- retrieval --------------------------------------------------------------------------------------------


def test_retrieval_is_certain_chance_or_never():
    own = torch.arange(20)
    assert (measures.retrieval(torch.eye(20), own) == 1).all()
    # all as similar: the hit is shared among 16
    np.testing.assert_allclose(measures.retrieval(torch.ones(20, 20), own), 1 / 16, rtol=1e-12)
    assert (measures.retrieval(1 - torch.eye(20), own) == 0).all()


def test_retrieval_counts_all_draws():
    """Against drawing the other items a great many times."""
    rng = np.random.default_rng(0)
    similarity = torch.tensor(rng.integers(0, 8, size=(3, 30)) / 8)  # many ties
    own = torch.tensor([4, 17, 29])
    exact = measures.retrieval(similarity, own, size=6)
    for i, row in enumerate(similarity.numpy()):
        others = np.delete(row, own[i])
        drawn = rng.permuted(np.tile(others, (20_000, 1)), axis=1)[:, :5]
        best = (drawn <= row[own[i]]).all(axis=1) / (1 + (drawn == row[own[i]]).sum(axis=1))
        assert exact[i] == pytest.approx(best.mean(), abs=0.015)  # four standard errors of 20,000 draws, .5 / 141


def test_retrieval_of_noise_is_chance():
    similarity = noise(600, 64)
    own = torch.randint(64, (600,), generator=torch.Generator().manual_seed(1))
    estimate = statistics.mean(measures.retrieval(similarity, own))
    assert abs(estimate.value - 1 / 16) < 4 * estimate.standard_error


def test_retrieval_refuses_a_gallery_that_is_too_small():
    with pytest.raises(ValueError, match="at least 16, got 8"):
        measures.retrieval(torch.eye(8), torch.arange(8))


def test_retrieval_figure_of_identical_and_exchanged_pictures():
    crops = coloured()
    own = torch.arange(N).roll(5)
    queries = {"results": tables.Queries(crops[own], own)}
    kinds = ["flowers"] * 18 + ["clothing"] * 6
    figure = tables.retrieval_table({"colour": embeddings.colour_histogram}, queries, crops, kinds)
    same, exchanged = figure.rows
    assert same["all"].value == same["flowers"].value == 1
    assert "clothing" not in same, "6 exemplars are no 16"
    assert same["flowers"].n == 18
    assert exchanged["all"].value < 0.05, "an identical picture is always nearer than the wrong one"


# --- embeddings -------------------------------------------------------------------------------------------


def test_colour_histogram_is_a_distribution_of_colours_alone():
    crops = noise(4, 3, SIDE, SIDE)
    e = embeddings.colour_histogram(crops)
    torch.testing.assert_close(e.square().sum(dim=1), torch.ones(4))
    torch.testing.assert_close(e, embeddings.colour_histogram(crops.flip(-1)))
    red, green = torch.zeros(2, 1, 3, SIDE, SIDE)
    red[:, 0] = green[:, 1] = 1
    assert embeddings.colour_histogram(red) @ embeddings.colour_histogram(green).T == 0


def test_pixels_are_root_mean_squares_apart():
    first, second = torch.full((1, 3, 32, 32), 0.25), torch.full((1, 3, 32, 32), 0.75)
    distance = (embeddings.pixels(first) - embeddings.pixels(second)).norm()
    assert distance.item() == pytest.approx(0.5, rel=1e-5)


@pytest.fixture(scope="module")
def classifier():
    """One that was taught to tell stripes from checks."""
    x = torch.arange(32) // 4 % 2
    stripes, checks = x.expand(32, 32).float(), (x[:, None] ^ x).float()
    colours = noise(40, 3, 1, 1)
    crops = torch.cat([stripes * colours, checks * colours])
    labels = torch.arange(2).repeat_interleave(40)
    return classifiers.train_classifier(crops, labels, 2, epochs=6, batch_size=16), crops, labels


def test_classifier_learns_and_is_frozen(classifier):
    model, crops, labels = classifier
    assert (model(crops).argmax(dim=1) == labels).float().mean() > 0.95
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.features(crops).norm(dim=1), torch.ones(80))
    # what one crop gives must not depend on its batch
    torch.testing.assert_close(model.features(crops[:1]), model.features(crops)[:1], atol=1e-5, rtol=0)


def test_classifier_survives_its_file_and_draws_nothing_global(classifier, tmp_path):
    model, crops, labels = classifier
    before = torch.random.get_rng_state()
    classifiers.save_classifier(model, ["stripes", "checks"], tmp_path / "c.pt")
    loaded, classes = classifiers.load_classifier(tmp_path / "c.pt")
    assert classes == ["stripes", "checks"]
    assert torch.equal(loaded.features(crops), model.features(crops))
    again = classifiers.train_classifier(crops, labels, 2, epochs=1, batch_size=16)
    other = classifiers.train_classifier(crops, labels, 2, epochs=1, batch_size=16)
    assert torch.equal(again.head.weight, other.head.weight)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is not a classifier"):
        classifiers.load_classifier(tmp_path / "other.pt")


# --- seams ------------------------------------------------------------------------------------------------


def test_seam_ratio_of_the_photo_itself_is_one_and_of_a_pasted_box_more(cases):
    bright = torch.ones_like(cases.image)
    pictures = {"photo": cases.image, "pasted": torch.where(cases.mask > 0.5, cases.image, bright)}
    pictures |= {seam: composite(cases, bright, seam) for seam in ("feather", "poisson")}
    photo, pasted, feather, poisson = tables.seam_table(cases, pictures).rows
    for column in ("across the border", "inside the region"):
        assert photo[column].value == pytest.approx(1)
        assert photo[column].standard_error == pytest.approx(0, abs=1e-12)
    assert pasted["across the border"].low > 3
    border = [row["across the border"].value for row in (pasted, feather, poisson)]
    assert border == sorted(border, reverse=True), "each is to be less of a seam than the one before"
    assert pasted["inside the region"].value == 0, "one colour has no gradient"


def test_border_gradients_count_pairs_across_the_border_inside_the_photo():
    picture, mask = torch.zeros(2, 3, 8, 8), torch.ones(2, 1, 8, 8)
    picture[:, :, 2:6, 2:6] = 1  # a step of half of the range [-1, 1], exactly at the border
    mask[:, :, 2:6, 2:6] = 0
    places = [Box(0, 0, 8, 8), Box(0, 2, 8, 6)]  # in the second, the upper and lower sides are the photo's own edges
    picture[1, :, :2] = picture[1, :, 6:] = -1
    np.testing.assert_allclose(measures.border_gradients(picture, mask, places), 0.5, rtol=1e-6)
    np.testing.assert_allclose(measures.inner_gradients(picture, mask, places), 0, atol=1e-7)
    everything = torch.zeros(1, 1, 8, 8)
    assert np.isnan(measures.border_gradients(picture[:1], everything, places[:1])).all()


# --- guidance, seeds, copies ------------------------------------------------------------------------------


def test_guidance_figure_finds_the_slope():
    """Results that move towards their exemplars as the scale rises."""
    references, own = coloured(), torch.arange(N).roll(1)
    start = coloured(seed=7)
    crops = {scale: start + (references[own] - start) * scale / 5 for scale in (5.0, 1.0, 3.0)}
    figure = tables.guidance_table({"colour": embeddings.colour_histogram}, crops, references, own)
    one, three, five, slope = figure.rows
    assert [row["λ"] for row in figure.rows] == ["1", "3", "5", "slope"]
    assert one["similarity"].value < three["similarity"].value < five["similarity"].value == pytest.approx(1)
    assert five["minus that at λ = 1"].value == pytest.approx(1 - one["similarity"].value)
    assert five["top-1"].value == pytest.approx(1)
    assert five["colourfulness"].value == pytest.approx(1)
    assert slope["similarity"].low > 0


def test_slopes():
    x = [1.0, 2.0, 3.0, 5.0]
    y = np.stack([0.25 * np.array(x) + 7, np.zeros(4)])
    np.testing.assert_allclose(measures.slopes(x, y), [0.25, 0], atol=1e-12)
    with pytest.raises(ValueError, match="two different values"):
        measures.slopes([2.0, 2.0], y[:, :2])


def test_seeds_figure_tells_the_two_sources_of_variety_apart(cases):
    same = [cases.image] * 3
    shades = [torch.full_like(cases.image, value) for value in (-1.0, 0.0, 1.0)]
    (row,) = tables.seeds_table({}, by_seed=same, by_exemplar=shades, masks=cases.mask).rows
    assert row["between seeds"].value == 0
    # pairs are 0.5, 0.5 and 1 grey levels apart
    assert row["between exemplars"].value == pytest.approx(2 / 3)
    (row,) = tables.seeds_table({}, by_seed=shades, by_exemplar=shades, masks=cases.mask).rows
    assert row["ratio"].value == pytest.approx(1)


def test_region_distances_see_the_region_alone(cases):
    other = cases.image + cases.mask
    np.testing.assert_allclose(measures.region_distances(cases.image, other, cases.mask), 0, atol=1e-7)


def test_copy_figure_catches_a_copy_even_mirrored():
    training, references = noise(40, 3, SIDE, SIDE, seed=3), noise(N, 3, SIDE, SIDE, seed=4)
    own = torch.arange(N).roll(1)
    augmented = [(references + 0.1 * noise(N, 3, SIDE, SIDE, seed=5)).clamp(0, 1)]
    arguments = {"exemplars": references, "own": own, "augmented": augmented, "training": training}
    real = noise(N, 3, SIDE, SIDE, seed=6)

    (copied,) = tables.copy_table(
        {"pixels": embeddings.pixels}, results=training[:N].flip(-1), real=real, **arguments
    ).rows
    # torch's cdist of equal rows is not 0: it comes from squares that cancel
    assert copied["result to nearest training crop"].value == pytest.approx(0, abs=1e-3)
    assert copied["results that are nearer"].value == 1
    (new,) = tables.copy_table({"pixels": embeddings.pixels}, results=real, real=real, **arguments).rows
    assert new["results that are nearer"].value == 0
    assert new["ratio"].low > 1
    assert new["real region to nearest training crop"] == new["result to nearest training crop"]


@pytest.mark.slow
def test_sampler_figure_of_more_steps_is_nearer_and_of_the_reference_itself_zero(cases, toy):
    model = pbe.load_model(toy[1], device="cpu")
    references = replace(cases[:2], exemplar=embeddings.resized(cases.exemplar[:2], 16))
    figure = tables.sampler_table(
        model, cases[:2], references, guidance=3.0, samplers=["ddim"], steps=[5, 20, 100], reference_steps=100
    )
    assert [row["spacing"] for row in figure.rows] == 3 * ["leading"] + 3 * ["trailing"]
    few, more, same = (row["error of the latent"].value for row in figure.rows[:3])
    assert few > 1.5 * more > 0
    assert same == 0
    assert figure.rows[2]["error in the region"].value == 0


def test_augment_all_follows_the_recipe():
    references = coloured()
    still = RecipeConfig(flip=0, rotation=0, blur=0, warp=0)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(tables.augment_all(references, still, generator), references)
    mirrored = RecipeConfig(flip=1, rotation=0, blur=0, warp=0)
    assert torch.equal(tables.augment_all(references, mirrored, generator), references.flip(-1))


# --- cases ------------------------------------------------------------------------------------------------


def test_foreign_exemplars_are_others_and_each_is_used_once():
    others = foreign([""] * 10, 4, torch.Generator().manual_seed(0))
    assert others.shape == (10, 4)
    for column in others.T:
        assert sorted(column.tolist()) == list(range(10))
    for i, row in enumerate(others.tolist()):
        assert i not in row
        assert len(set(row)) == 4
    with pytest.raises(ValueError, match="at most 9"):
        foreign([""] * 10, 10, torch.Generator())


def test_foreign_exemplars_stay_in_their_groups():
    groups = ["flowers", "clothing", "clothing", "flowers", "flowers", "clothing", "flowers"]
    others = foreign(groups, 2, torch.Generator().manual_seed(0))
    for i, row in enumerate(others.tolist()):
        assert i not in row
        assert {groups[j] for j in row} == {groups[i]}
    for column in others.T:
        assert sorted(column.tolist()) == list(range(7))
    with pytest.raises(ValueError, match="3 cases have at most 2"):
        foreign(groups, 3, torch.Generator())


def test_composites_are_the_photo_outside(cases):
    pasted = paste(cases, cases.exemplar)
    outside = cases.mask.bool().expand_as(pasted)
    assert torch.equal(pasted[outside], cases.image[outside])
    crops = region_crops(pasted, cases.mask, SIDE)
    torch.testing.assert_close(crops.mean(dim=(2, 3)), cases.exemplar.mean(dim=(2, 3)), atol=0.02, rtol=0)


def test_cases_can_be_chosen(cases):
    some = cases[[3, 1]]
    assert len(some) == 2
    assert torch.equal(some.mask, cases.mask[[3, 1]])
    assert some.place == [cases.place[3], cases.place[1]]
    assert len(cases[:5]) == 5


def test_kind_is_the_folder():
    assert kind_of(("data", "flowers", "images", "a.jpg")) == kind_of(("flowers", "a.jpg")) == "flowers"


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The pictures and the model of the toy run, in a folder."""
    folder = tmp_path_factory.mktemp("toy")
    toy_run.write(folder)
    rows = (folder / "boxes.csv").read_text().splitlines()
    labelled = [rows[0] + ",class", *(f"{row},{'ab'[i % 2]}" for i, row in enumerate(rows[1:]))]
    (folder / "boxes.csv").write_text("\n".join(labelled))
    return folder, toy_run.write_model(folder)


def arguments(toy, out, **changes):
    folder, model = toy
    options = {
        "ckpt": model,
        "held-out": folder / "boxes.csv",
        "train": folder / "boxes.csv",
        "config": folder / "toy.yaml",
        "out": out,
        "classifier-epochs": 1,
        "cases": 6,
        "gallery": 4,
        "seed-cases": 3,
        "seeds": 2,
        "sampler-cases": 2,
        "sampler-steps": 16,
        "reference-steps": 40,
        "steps": 4,
        "device": "cpu",
        **changes,
    }
    return ["measure", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


@pytest.mark.slow
def test_measure_writes_all_figures_and_grids(toy, tmp_path, one_thread):
    assert main(arguments(toy, tmp_path)) == 0
    content = json.loads((tmp_path / "figures.json").read_text())
    titles = ["Retrieval", "Seams", "Guidance", "Seeds", "No copy", "Samplers"]
    assert [figure["title"] for figure in content["figures"]] == titles
    assert content["settings"]["command"].startswith("python -m examples.demo_model measure --ckpt")
    assert content["settings"]["cases"] == 6
    retrieval, seams, *_, samplers = (figure["rows"] for figure in content["figures"])
    assert seams[0]["picture"] == "real photo"
    assert seams[0]["across the border"]["value"] == pytest.approx(1)
    upper = [row["all"]["value"] for row in retrieval if row["query"] == "real regions, own exemplar"]
    assert max(upper) > 0.9, "objects of one colour each are found by it"
    assert [(row["sampler"], row["spacing"]) for row in samplers] == [
        (sampler, spacing) for sampler in ("ddim", "plms", "dpm_solver") for spacing in ("leading", "trailing")
    ]
    text = (tmp_path / "figures.md").read_text()
    assert all(f". {title}" in text for title in titles)
    for name in ("guidance", "seeds", "nearest"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 100

    # the classifier of one run serves the next, which gives the same figures
    again = tmp_path / "again"
    assert main(arguments(toy, again, classifier=tmp_path / "classifier.pt")) == 0
    assert json.loads((again / "figures.json").read_text())["figures"] == content["figures"]
    assert not (again / "classifier.pt").exists()


@pytest.mark.slow
def test_measure_judges_at_other_pixels_than_the_model_s(toy, tmp_path, one_thread, capsys):
    """A model of 32 pixels, judged at 64, in the latents of an autoencoder that is named; the classifier is kept."""
    kept = tmp_path / "kept.pt"
    assert main(arguments(toy, tmp_path / "a", side=32, classifier=kept, vae="demo")) == 0
    assert classifiers.load_classifier(kept)[0].side == 32
    _, seams, *_ = json.loads((tmp_path / "a" / "figures.json").read_text())["figures"]
    assert seams["rows"][0]["across the border"]["value"] == pytest.approx(1)
    with Image.open(tmp_path / "a" / "guidance.png") as picture:
        assert min(picture.size) > 100
    assert main(arguments(toy, tmp_path / "b", side=64, classifier=kept)) == 2
    assert "kept.pt sees crops of 32 pixels, not of --side 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": 99}, "has 12 photos that fit; 99 were asked for"),
        ({"gallery": 7}, "--gallery must be 2 to the number of cases, 6; got 7"),
        ({"seeds": 3}, "--seeds must be at least 2 and below --seed-cases 3; got 3"),
        ({"sampler-cases": 7}, "--sampler-cases must be 2 to the number of cases, 6; got 7"),
        ({"guidance-values": 2}, "--guidance-values needs two different values"),
        ({"classifier-epochs": 0}, "--classifier-epochs must be a whole number of at least 1, got '0'"),
        ({"ckpt": "missing.ckpt"}, "missing.ckpt"),
    ],
)
def test_measure_refuses(toy, tmp_path, capsys, changes, message):
    assert main(arguments(toy, tmp_path, **changes)) == 2
    assert message in capsys.readouterr().err


def test_grid_shows_every_seed(toy, tmp_path, one_thread):
    folder, model = toy
    photo = folder / "images" / "0.png"
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    edit = ["--edit", str(photo), str(tmp_path / "mask.png"), str(folder / "images" / "1.png")]
    options = ["--count", "3", "--steps", "4", "--cell", "64", "--device", "cpu"]
    out = tmp_path / "grid.png"
    assert main(["grid", "--ckpt", str(model), *edit, *edit, *options, "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width > 6 * 64, "three inputs and three results"
        assert picture.height > 2 * 64


def test_table():
    rows = [{"what": "a", "value": statistics.Statistic(0.51234, 0.0123, 0.4, 0.6, 9)}, {"what": "b", "value": ""}]
    assert markdown(rows) == ["| what | value |", "| --- | --- |", "| a | 0.512 ± 0.012 |", "| b |  |"]
