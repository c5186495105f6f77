"""From a checkpoint and two manifests to the figures, tables and grids in a folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pbe
from examples.demo_model import figures, report
from examples.demo_model.cases import Cases, composite, foreign, paint, paste, read_cases, reconstruct, region_crops
from examples.demo_model.embeddings import (
    CropClassifier,
    Embedding,
    VAEEmbedding,
    colour_histogram,
    load_classifier,
    pixels,
    resized,
    save_classifier,
    train_classifier,
)
from examples.demo_model.figures import Figure, Queries
from examples.demo_model.measures import nearest
from examples.demo_model.settings import Settings
from pbe.checkpoints.formats.opening import find_checkpoint
from pbe.checkpoints.loading import load_model
from pbe.data.dataset import ExampleDataset
from pbe.data.recipe_config import RecipeConfig
from pbe.data.sources import SourceConfig, open_source
from pbe.models.paint_by_example import PaintByExample
from pbe.training.config import load_config

AUGMENTATIONS = 8  # of each exemplar, for the copy figure
ROWS = 12  # of a grid


@dataclass(frozen=True)
class Painted:
    """The cases, and the model's pictures (N, 3, R, R) of them by guidance scale, by seed and by exemplar.

    own: long (N,), the case that each case's exemplar is taken from; in by_exemplar, those after the first are others.
    """

    cases: Cases
    own: Tensor
    by_scale: dict[float, Tensor]
    by_seed: list[Tensor]
    by_exemplar: list[Tensor]


def measure(
    checkpoint: Path,
    held_out: Path,
    train: Path,
    out: Path,
    settings: Settings,
    *,
    config: str,
    device: str = "auto",
    classifier_file: Path | None = None,
    classifier_epochs: int = 10,
    command: str = "",
    say: Callable[[str], None] = print,
) -> None:
    """Writes figures.json, figures.md, classifier.pt and the grids guidance, seeds and nearest.png into `out`.

    `held_out` and `train` are manifests; `config` is a training config, whose recipe for validation makes the windows
    and masks. `say` is told what happens. ValueError or OSError for what cannot be measured.
    """
    start = time.perf_counter()
    model = load_model(checkpoint, device=device, dtype="float32")
    data = load_config([config]).data
    sizes = {"resolution": model.config.resolution, "exemplar_size": model.config.exemplar.vision.image_size}
    recipe = replace(data.recipe_for_validation(), **sizes)
    cases = read_cases(open_photos(held_out, recipe), settings.cases)
    photos = open_photos(train, replace(recipe, max_area=1.0))
    say(f"{len(cases)} held-out photos; reading {len(photos)} training photos")
    training = read_cases(photos, len(photos))

    out.mkdir(parents=True, exist_ok=True)
    if classifier_file is None:
        say("training the classifier")
        classifier, classes = new_classifier(training, classifier_epochs)
        save_classifier(classifier, classes, out / "classifier.pt")
    else:
        classifier, classes = load_classifier(classifier_file)

    generator = torch.Generator().manual_seed(settings.seed)
    painted = paint_all(model, cases, settings, generator, say)
    augmented = [figures.augment_all(cases.reference, data.recipe, generator) for _ in range(AUGMENTATIONS)]
    embeddings = {
        "colour histogram": colour_histogram,
        "classifier": classifier.features,
        "VAE": VAEEmbedding(model.vae, training.reference[:1024]),
    }
    about = {
        "command": command,
        "checkpoint": str(checkpoint),
        "sha256": hashlib.sha256(find_checkpoint(checkpoint).read_bytes()).hexdigest(),
        "versions": f"pbe {pbe.__version__}, torch {torch.__version__}, {model.device.type}",
        "held-out photos": ", ".join(f"{cases.kind.count(kind)} {kind}" for kind in sorted(set(cases.kind))),
        "classifier": f"{accuracy(classifier, classes, cases):.1%} of the held-out crops right",
        "training crops": len(training),
        **asdict(settings),
    }
    say("figures")
    made = likeness_figures(model, painted, embeddings, augmented, training.reference, settings)
    write_grids(out, painted, settings, classifier, training.reference)
    write_tables(out, about, made)  # already: the samplers take as long as all before
    first = slice(settings.sampler_cases)
    say(f"samplers, on {settings.sampler_cases} edits")
    made.append(
        figures.sampler_figure(
            model,
            cases[first],
            cases.reference[painted.own[first]],
            guidance=settings.guidance,
            steps=settings.sampler_steps,
            reference_steps=settings.reference_steps,
            seed=settings.seed,
        )
    )
    write_tables(out, {**about, "seconds": round(time.perf_counter() - start)}, made)
    say(f"{out / 'figures.md'}, figures.json and grids")


def write_tables(out: Path, about: dict[str, Any], made: list[Figure]) -> None:
    report.write_json(out / "figures.json", about, made)
    report.write_markdown(out / "figures.md", about, made)


def open_photos(manifest: Path, recipe: RecipeConfig) -> ExampleDataset:
    """The examples of a manifest's photos."""
    return ExampleDataset(open_source(SourceConfig(path=str(manifest)), (recipe.min_area, recipe.max_area)), recipe)


def new_classifier(training: Cases, epochs: int) -> tuple[CropClassifier, list[str]]:
    """A classifier of the objects of the training photos, and its classes."""
    classes = sorted(set(training.label))
    labels = torch.tensor([classes.index(label) for label in training.label])
    return train_classifier(training.reference, labels, len(classes), epochs=epochs), classes


def accuracy(classifier: CropClassifier, classes: list[str], cases: Cases) -> float:
    guesses = classifier(cases.reference).argmax(dim=1).tolist()
    return sum(classes[guess] == label for guess, label in zip(guesses, cases.label, strict=True)) / len(cases)


def paint_all(
    model: PaintByExample,
    cases: Cases,
    settings: Settings,
    generator: torch.Generator,
    say: Callable[[str], None],
) -> Painted:
    """All edits that the first five figures need; the generator chooses the exemplars."""
    groups = cases.kind if settings.exemplars == "kind" else [""] * len(cases)
    others = foreign(groups, settings.seeds, generator)
    own, n = others[:, 0], settings.seed_cases

    def results(count: int, exemplars: Tensor, guidance: float, shift: int = 0) -> Tensor:
        """The first `count` cases; each `shift` has seeds of its own."""
        return paint(
            model,
            cases[:count],
            cases.reference[exemplars[:count]],
            [settings.seed + len(cases) * shift + i for i in range(count)],
            guidance=guidance,
            steps=settings.steps,
            sampler=settings.sampler,
            batch_size=settings.batch_size,
        )

    by_scale = {}
    for scale in sorted({*settings.scales, settings.guidance}):
        say(f"{len(cases)} edits with guidance {scale:g}")
        by_scale[scale] = results(len(cases), own, scale)
    say(f"{n} edits with {settings.seeds} seeds and with {settings.seeds} exemplars")
    first, more = by_scale[settings.guidance][:n], range(1, settings.seeds)
    by_seed = [first, *(results(n, own, settings.guidance, shift=k) for k in more)]
    by_exemplar = [first, *(results(n, others[:, k], settings.guidance) for k in more)]
    return Painted(cases, own, by_scale, by_seed, by_exemplar)


def likeness_figures(
    model: PaintByExample,
    painted: Painted,
    embeddings: Mapping[str, Embedding],
    augmented: list[Tensor],
    training: Tensor,
    settings: Settings,
) -> list[Figure]:
    """The first five figures; training: the crops (T, 3, S, S) in [0, 1] that were trained on."""
    cases, own, references = painted.cases, painted.own, painted.cases.reference
    side, itself, raw = references.shape[-1], torch.arange(len(cases)), painted.by_scale[settings.guidance]
    crops = {
        scale: region_crops(composite(cases, pictures), cases.mask, side)
        for scale, pictures in painted.by_scale.items()
    }
    real = region_crops(cases.image, cases.mask, side)
    queries = {
        "results": Queries(crops[settings.guidance], own),
        "real regions, own exemplar": Queries(real, itself),
        "exemplars, augmented": Queries(augmented[0], itself),
    }
    pictures = {
        "real photo": cases.image,
        "real photo through the autoencoder": reconstruct(model, cases, settings.batch_size),
        "exemplar pasted": paste(cases, references[own]),
        "result, raw": raw,
        "result, composited": composite(cases, raw),
        "result, composited with feather alone": composite(cases, raw, seam="feather"),
    }
    scales = {scale: crops[scale] for scale in settings.scales}
    features = {"classifier": embeddings["classifier"]}
    first = cases.mask[: settings.seed_cases]
    return [
        figures.retrieval_figure(embeddings, queries, references, cases.kind, settings.gallery),
        figures.seam_figure(cases, pictures),
        figures.guidance_figure(embeddings, scales, references, own, settings.gallery),
        figures.seeds_figure(features, painted.by_seed, painted.by_exemplar, first),
        figures.copy_figure(
            {"pixels": pixels, **features}, crops[settings.guidance], real, references, own, augmented, training
        ),
    ]


def write_grids(out: Path, painted: Painted, settings: Settings, classifier: CropClassifier, training: Tensor) -> None:
    """The pictures behind the figures, of the first cases, as they came."""
    cases = painted.cases[: min(ROWS, settings.seed_cases)]
    n, side = len(cases), cases.image.shape[-1]
    raw = painted.by_scale[settings.guidance][:n]
    exemplar = resized(painted.cases.reference[painted.own[:n]], side) * 2 - 1
    begin = {"photo": cases.image, "to repaint": cases.image * cases.mask, "exemplar": exemplar}

    scales = {f"guidance {s:g}": composite(cases, painted.by_scale[s][:n]) for s in sorted(painted.by_scale)}
    report.save_grid(out / "guidance.png", {**begin, "raw": raw, **scales})
    seeds = {f"seed {k}": composite(cases, pictures[:n]) for k, pictures in enumerate(painted.by_seed)}
    others = {f"exemplar {k}": composite(cases, pictures[:n]) for k, pictures in enumerate(painted.by_exemplar) if k}
    report.save_grid(out / "seeds.png", {**begin, **seeds, **others})

    regions = region_crops(composite(cases, raw), cases.mask, side)
    both_ways = torch.cat([training, training.flip(-1)])
    distances, rows = nearest(classifier.features(regions), classifier.features(both_ways))
    found = resized(both_ways[rows], side) * 2 - 1
    columns = {"exemplar": exemplar, "result": regions * 2 - 1, "nearest training crop": found}
    report.save_grid(out / "nearest.png", columns, [f"{distance:.2f}" for distance in distances])
