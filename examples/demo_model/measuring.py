"""From a checkpoint and two manifests to the figures, tables and grids in a folder."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import pbe
from examples.demo_model import report, tables
from examples.demo_model.cases import (
    Cases,
    composite,
    foreign,
    paint,
    paste,
    read_cases,
    read_crops,
    reconstruct,
    region_crops,
)
from examples.demo_model.classifier import CropClassifier, load_classifier, save_classifier, train_classifier
from examples.demo_model.embeddings import Embedding, VAEEmbedding, colour_histogram, pixels, resized
from examples.demo_model.measures import nearest
from examples.demo_model.report import load
from examples.demo_model.settings import Settings
from examples.demo_model.tables import Queries, Table
from pbe.checkpoints.formats.opening import find_checkpoint
from pbe.data.dataset import ExampleDataset
from pbe.data.recipe_config import RecipeConfig
from pbe.data.sources import SourceConfig, open_source
from pbe.models.paint_by_example import PaintByExample
from pbe.models.vae import AutoencoderKL
from pbe.training.config import load_config
from pbe.training.initialization import loaded_vae

AUGMENTATIONS = 8  # of each exemplar, for the copy figure
ROWS = 12  # of a grid


@dataclass(frozen=True)
class Painted:
    """The cases, and the model's pictures (N, 3, R, R) of them by guidance, by seed and by exemplar.

    seen: the cases in the model's own size, of which the pictures are resized. own: long (N,), the case that each
    case's exemplar is taken from; in by_exemplar, those after the first are others.
    """

    cases: Cases
    seen: Cases
    own: Tensor
    by_guidance: dict[float, Tensor]
    by_seed: list[Tensor]
    by_exemplar: list[Tensor]


def measure(args: argparse.Namespace, settings: Settings, command: str) -> None:
    """The command `measure`: writes figures.json, figures.md, the classifier and the grids guidance, seeds and
    nearest.png into --out, and says on stderr what it does. ValueError or OSError for what cannot be measured."""
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {what}", file=sys.stderr, flush=True)

    model = load(args)
    data = load_config([args.config]).data
    recipe = replace(data.recipe_for_validation(), resolution=settings.side, exemplar_size=settings.side)
    own_sizes = {"resolution": model.config.resolution, "exemplar_size": model.config.exemplar.vision.image_size}
    # the same photos, boxes and windows, whatever the sizes
    cases, seen = (
        read_cases(open_photos(args.held_out, r), settings.cases) for r in (recipe, replace(recipe, **own_sizes))
    )
    photos = open_photos(args.train, replace(recipe, max_area=1.0))
    say(f"{len(cases)} held-out photos; reading {len(photos)} training photos")
    training, labels = read_crops(photos)

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    if args.classifier is None or not args.classifier.exists():
        say("training the classifier")
        classes = sorted(set(labels))
        numbers, epochs = torch.tensor([classes.index(label) for label in labels]), settings.classifier_epochs
        classifier = train_classifier(training, numbers, len(classes), epochs=epochs, side=settings.side)
        save_classifier(classifier, classes, args.classifier or out / "classifier.pt")
    else:
        classifier, classes = load_classifier(args.classifier)
        if classifier.side != settings.side:
            raise ValueError(f"{args.classifier} sees crops of {classifier.side} pixels, not of --side {settings.side}")
    encoder = loaded_vae(args.vae) if args.vae else model.vae

    generator = torch.Generator().manual_seed(settings.seed)
    painted = paint_all(model, cases, seen, settings, generator, say)
    augmented = [tables.augment_all(cases.exemplar, data.recipe, generator) for _ in range(AUGMENTATIONS)]
    about = {
        "command": command,
        "checkpoint": str(args.ckpt),
        "sha256": hashlib.sha256(find_checkpoint(args.ckpt).read_bytes()).hexdigest(),
        "versions": f"pbe {pbe.__version__}, torch {torch.__version__}, {model.device.type}",
        "held-out photos": ", ".join(f"{cases.kind.count(kind)} {kind}" for kind in sorted(set(cases.kind))),
        "classifier": f"{accuracy(classifier, classes, cases):.1%} of the held-out crops right",
        "training crops": len(training),
        **asdict(settings),
    }
    say("figures")
    made = likeness_tables(model, painted, classifier, encoder, augmented, training, settings)
    write_grids(out, painted, settings, classifier, training)
    report.write_tables(out, about, made)  # already: the samplers take as long as all before
    say(f"samplers, on {settings.sampler_cases} edits")
    first = slice(settings.sampler_cases)
    made.append(
        tables.sampler_table(
            model,
            seen[first],
            seen[painted.own[first].tolist()],
            guidance=settings.guidance,
            steps=settings.sampler_steps,
            reference_steps=settings.reference_steps,
            seed=settings.seed,
        )
    )
    report.write_tables(out, {**about, "seconds": round(time.perf_counter() - start)}, made)
    say(f"{out / 'figures.md'}, figures.json and grids")


def open_photos(manifest: Path, recipe: RecipeConfig) -> ExampleDataset:
    """The examples of a manifest's photos."""
    return ExampleDataset(open_source(SourceConfig(path=str(manifest)), (recipe.min_area, recipe.max_area)), recipe)


def accuracy(classifier: CropClassifier, classes: list[str], cases: Cases) -> float:
    guesses = classifier(cases.exemplar).argmax(dim=1).tolist()
    return sum(classes[guess] == label for guess, label in zip(guesses, cases.label, strict=True)) / len(cases)


def paint_all(
    model: PaintByExample,
    cases: Cases,
    seen: Cases,
    settings: Settings,
    generator: torch.Generator,
    say: Callable[[str], None],
) -> Painted:
    """All edits that the first five tables need; the generator chooses the exemplars."""
    groups = cases.kind if settings.exemplars == "kind" else [""] * len(cases)
    others = foreign(groups, settings.seeds, generator)
    own, n = others[:, 0], settings.seed_cases

    def results(count: int, others: Tensor, guidance: float, shift: int = 0) -> Tensor:
        """The first `count` cases; each `shift` has seeds of its own."""
        pictures = paint(
            model,
            seen[:count],
            seen[others[:count].tolist()],
            [settings.seed + len(cases) * shift + i for i in range(count)],
            guidance=guidance,
            steps=settings.steps,
            sampler=settings.sampler,
            batch_size=settings.batch_size,
        )
        return resized(pictures, settings.side)

    by_guidance = {}
    for guidance in sorted({*settings.guidance_values, settings.guidance}):
        say(f"{len(cases)} edits with guidance {guidance:g}")
        by_guidance[guidance] = results(len(cases), own, guidance)
    say(f"{n} edits with {settings.seeds} seeds and with {settings.seeds} exemplars")
    first, more = by_guidance[settings.guidance][:n], range(1, settings.seeds)
    by_seed = [first, *(results(n, own, settings.guidance, shift=k) for k in more)]
    by_exemplar = [first, *(results(n, others[:, k], settings.guidance) for k in more)]
    return Painted(cases, seen, own, by_guidance, by_seed, by_exemplar)


def likeness_tables(
    model: PaintByExample,
    painted: Painted,
    classifier: CropClassifier,
    encoder: AutoencoderKL,
    augmented: list[Tensor],
    training: Tensor,
    settings: Settings,
) -> list[Table]:
    """The first five tables; training: the crops (T, 3, S, S) in [0, 1] that were trained on."""
    cases, own, exemplars = painted.cases, painted.own, painted.cases.exemplar
    side, itself, raw = exemplars.shape[-1], torch.arange(len(cases)), painted.by_guidance[settings.guidance]
    crops = {
        guidance: region_crops(composite(cases, pictures), cases.mask, side)
        for guidance, pictures in painted.by_guidance.items()
    }
    real, results = region_crops(cases.image, cases.mask, side), crops[settings.guidance]
    queries = {
        "results": Queries(results, own),
        "real regions, own exemplar": Queries(real, itself),
        "exemplars, augmented": Queries(augmented[0], itself),
    }
    pictures = {
        "real photo": cases.image,
        "real photo through the autoencoder": resized(reconstruct(model, painted.seen, settings.batch_size), side),
        "exemplar pasted": paste(cases, exemplars[own]),
        "result, raw": raw,
        "result, composited": composite(cases, raw),
        "result, composited with feather alone": composite(cases, raw, seam="feather"),
    }
    features: dict[str, Embedding] = {"classifier": classifier.features}
    latents = VAEEmbedding(encoder, training[:1024])
    embeddings: dict[str, Embedding] = {"colour histogram": colour_histogram, **features, "VAE": latents}
    by_guidance = {guidance: crops[guidance] for guidance in settings.guidance_values}
    first = cases.mask[: settings.seed_cases]
    return [
        tables.retrieval_table(embeddings, queries, exemplars, cases.kind, settings.gallery),
        tables.seam_table(cases, pictures),
        tables.guidance_table(embeddings, by_guidance, exemplars, own, settings.gallery),
        tables.seeds_table(features, painted.by_seed, painted.by_exemplar, first),
        tables.copy_table({"pixels": pixels, **features}, results, real, exemplars, own, augmented, training),
    ]


def write_grids(out: Path, painted: Painted, settings: Settings, classifier: CropClassifier, training: Tensor) -> None:
    """The pictures behind the figures, of the first cases, as they came."""
    cases = painted.cases[: min(ROWS, settings.seed_cases)]
    n, side = len(cases), cases.image.shape[-1]
    raw = painted.by_guidance[settings.guidance][:n]
    exemplar = resized(painted.cases.exemplar[painted.own[:n]], side) * 2 - 1
    begin = {"image": cases.image, "to repaint": cases.image * cases.mask, "exemplar": exemplar}

    guided = {f"guidance {g:g}": composite(cases, pictures[:n]) for g, pictures in sorted(painted.by_guidance.items())}
    report.save_grid(out / "guidance.png", {**begin, "raw": raw, **guided})
    seeds = {f"seed {k}": composite(cases, pictures[:n]) for k, pictures in enumerate(painted.by_seed)}
    others = {f"exemplar {k}": composite(cases, pictures[:n]) for k, pictures in enumerate(painted.by_exemplar) if k}
    report.save_grid(out / "seeds.png", {**begin, **seeds, **others})

    regions = region_crops(composite(cases, raw), cases.mask, side)
    both_ways = torch.cat([classifier.features(training), classifier.features(training.flip(-1))])
    distances, rows = nearest(classifier.features(regions), both_ways)
    found = torch.stack([training[k] if k < len(training) else training[k - len(training)].flip(-1) for k in rows])
    columns = {"exemplar": exemplar, "result": regions * 2 - 1, "nearest training crop": found * 2 - 1}
    report.save_grid(out / "nearest.png", columns, [f"{distance:.2f}" for distance in distances])
