"""The six tables that show whether a model paints by example, with the spread of every number."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.demo_model import statistics
from examples.demo_model.cases import Cases, condition_of, decode, region_crops
from examples.demo_model.embeddings import Embedding
from examples.demo_model.measures import (
    border_gradients,
    inner_gradients,
    nearest,
    region_distances,
    retrieval,
    slopes,
)
from examples.demo_model.statistics import Statistic
from pbe.data.augment import augment_exemplar
from pbe.data.recipe_config import RecipeConfig
from pbe.models.paint_by_example import PaintByExample
from pbe.sampling import SPACINGS, NoiseSchedule, ddim, get_sampler, guided_eps, leading, make_generators, randn

Row = dict[str, str | int | float | Statistic]


@dataclass(frozen=True)
class Table:
    """Figures: the rows have the same keys, which are the columns."""

    title: str
    note: str
    rows: list[Row]


class Queries(NamedTuple):
    """Crops (N, 3, S, S) in [0, 1], and for each the number of the exemplar it should resemble, long (N,)."""

    crops: Tensor
    own: Tensor


# --- 1: likeness ------------------------------------------------------------------------------------------


def retrieval_table(
    embeddings: Mapping[str, Embedding],
    queries: Mapping[str, Queries],
    exemplars: Tensor,
    kinds: Sequence[str],
    size: int = 16,
) -> Table:
    """How often a crop is nearest to its own exemplar among `size` exemplars, in each embedding and kind.

    exemplars: (M, 3, S, S), the exemplars; kinds: of what kind each is. The first of `queries` is also measured
    against wrong exemplars: chance. Kinds with fewer than `size` exemplars have no row of their own.
    """
    members = {"all": list(range(len(kinds)))}
    members |= {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in sorted(set(kinds))}
    groups = {name: torch.tensor(numbers) for name, numbers in members.items() if len(numbers) >= size}
    rows: list[Row] = []
    for name, embed in embeddings.items():
        gallery = embed(exemplars)
        asked = [(what, crops, own, 0) for what, (crops, own) in queries.items()]
        asked.append(("results, exemplars exchanged", *next(iter(queries.values())), 1))
        for what, crops, own, shift in asked:
            similarity = embed(crops) @ gallery.T
            top1 = {kind: _top1(similarity, own, members, size, shift) for kind, members in groups.items()}
            rows.append({"features": name, "query": what, **top1})
    note = f"Share of crops nearest to their own exemplar among {size} of the column's kind; chance is {1 / size:.2%}."
    return Table("Retrieval", note, rows)


def _top1(similarity: Tensor, own: Tensor, members: Tensor, size: int, shift: int) -> Statistic:
    """Retrieval within a group of exemplars; `shift` gives each query that of another one."""
    asked = torch.isin(own, members).nonzero()[:, 0]
    position = torch.full((similarity.shape[1],), -1)
    position[members] = torch.arange(len(members))
    return statistics.mean(retrieval(similarity[asked][:, members], position[own[asked]].roll(shift), size))


# --- 2: seams ---------------------------------------------------------------------------------------------


def seam_table(cases: Cases, pictures: Mapping[str, Tensor]) -> Table:
    """Gradients across the regions' borders, and inside the regions, against those of the real photos."""
    real_border = border_gradients(cases.image, cases.mask, cases.place)
    real_inside = inner_gradients(cases.image, cases.mask, cases.place)
    has_border = np.isfinite(real_border)
    rows: list[Row] = []
    for what, picture in pictures.items():
        border = border_gradients(picture, cases.mask, cases.place)
        inside = inner_gradients(picture, cases.mask, cases.place)
        across = statistics.ratio(border[has_border], real_border[has_border])
        rows.append(
            {"picture": what, "across the border": across, "inside the region": statistics.ratio(inside, real_inside)}
        )
    note = (
        "Mean difference of neighbouring pixels, divided by that of the real photo in the same place: 1 is right; more "
        "across the border is a seam, less inside is blur."
    )
    return Table("Seams", note, rows)


# --- 3: guidance ------------------------------------------------------------------------------------------


def guidance_table(
    embeddings: Mapping[str, Embedding],
    by_guidance: Mapping[float, Tensor],
    exemplars: Tensor,
    own: Tensor,
    size: int = 16,
) -> Table:
    """Likeness to the exemplar at each guidance, with the same noise; `by_guidance`: crops (N, 3, S, S)."""
    values = sorted(by_guidance)
    rows: list[Row] = []
    for name, embed in embeddings.items():
        gallery = embed(exemplars)
        products = {value: embed(crops) @ gallery.T for value, crops in by_guidance.items()}
        similar = np.stack(
            [products[value].gather(1, own[:, None])[:, 0].numpy() for value in values], axis=1
        )  # (N, K)
        difference = f"minus that at λ = {values[0]:g}"
        for i, value in enumerate(values):
            rows.append(
                {
                    "features": name,
                    "λ": f"{value:g}",
                    "similarity": statistics.mean(similar[:, i]),
                    difference: statistics.mean(similar[:, i] - similar[:, 0]) if i else "",
                    "top-1": statistics.mean(retrieval(products[value], own, size)),
                    "colourfulness": statistics.ratio(colourfulness(by_guidance[value]), colourfulness(exemplars[own])),
                }
            )
        slope = statistics.mean(slopes(values, similar))
        rows.append({**dict.fromkeys(rows[-1], ""), "features": name, "λ": "slope", "similarity": slope})
    note = (
        "Cosine of a result's region with its exemplar; the same noise at each λ, so that differences are paired. "
        "The slope is the mean change for 1 more of λ. "
        "Colourfulness (mean of the largest less the smallest of red, green and blue) is relative to the exemplars'."
    )
    return Table("Guidance", note, rows)


def colourfulness(crops: Tensor) -> np.ndarray:
    """The mean chroma of crops (N, 3, S, S) in [0, 1]: (N,)."""
    return (crops.amax(dim=1) - crops.amin(dim=1)).mean(dim=(1, 2)).numpy()


# --- 4: variety -------------------------------------------------------------------------------------------


def seeds_table(
    embeddings: Mapping[str, Embedding], by_seed: Sequence[Tensor], by_exemplar: Sequence[Tensor], masks: Tensor
) -> Table:
    """How far results (N, 3, R, R) of different seeds are apart, against those of different exemplars."""
    side = masks.shape[-1]

    def in_pixels(a: Tensor, b: Tensor) -> np.ndarray:
        return region_distances(a, b, masks)

    def in_features(embed: Embedding, a: Tensor, b: Tensor) -> np.ndarray:
        return (embed(region_crops(a, masks, side)) - embed(region_crops(b, masks, side))).norm(dim=1).numpy()

    measures: dict[str, Callable[[Tensor, Tensor], np.ndarray]] = {"pixels": in_pixels}
    measures |= {name: partial(in_features, embed) for name, embed in embeddings.items()}
    rows: list[Row] = []
    for name, distance in measures.items():
        seeds = np.mean([distance(a, b) for a, b in combinations(by_seed, 2)], axis=0)
        exemplars = np.mean([distance(a, b) for a, b in combinations(by_exemplar, 2)], axis=0)
        rows.append(
            {
                "distance": name,
                "between seeds": statistics.mean(seeds),
                "between exemplars": statistics.mean(exemplars),
                "ratio": statistics.ratio(seeds, exemplars),
            }
        )
    note = (
        f"{len(by_seed)} seeds of one exemplar, {len(by_exemplar)} exemplars with one seed: mean distance of two "
        "results in the region (pixels: root mean square in grey levels of [0, 1]; else Euclidean, of unit vectors)."
    )
    return Table("Seeds", note, rows)


# --- 5: no copy -------------------------------------------------------------------------------------------


def copy_table(
    embeddings: Mapping[str, Embedding],
    results: Tensor,
    real: Tensor,
    exemplars: Tensor,
    own: Tensor,
    augmented: Sequence[Tensor],
    training: Tensor,
) -> Table:
    """Whether results are nearer to a training crop than an exemplar is to its own augmentation.

    results, real (N, 3, S, S): regions of results and of the real photos; exemplars (M, 3, S, S): the exemplars,
    `own` (N,) of which belongs to each result; augmented: the exemplars augmented, some times over; training (T, 3,
    S, S): the crops trained on, which count as they are and mirrored.
    """
    rows: list[Row] = []
    for name, embed in embeddings.items():
        gallery = torch.cat([embed(training), embed(training.flip(-1))])
        upright, mirrored = embed(exemplars), embed(exemplars.flip(-1))
        to_training, _ = nearest(embed(results), gallery)
        real_to_training, _ = nearest(embed(real), gallery)
        moves = [torch.minimum((e - upright).norm(dim=1), (e - mirrored).norm(dim=1)) for e in map(embed, augmented)]
        augmentation = torch.stack(moves).mean(dim=0)[own].numpy()
        rows.append(
            {
                "distance": name,
                "result to nearest training crop": statistics.mean(to_training),
                "exemplar to its augmentation": statistics.mean(augmentation),
                "ratio": statistics.ratio(to_training, augmentation),
                "results that are nearer": statistics.mean((to_training < augmentation).astype(float)),
                "real region to nearest training crop": statistics.mean(real_to_training),
            }
        )
    note = (
        "Euclidean distances; of pixels they are root mean square differences of 32x32 crops in grey levels of [0, 1]. "
        "A copy would be nearer to its training crop than an exemplar to its own augmentation (ratio below 1)."
    )
    return Table("No copy", note, rows)


def augment_all(exemplars: Tensor, recipe: RecipeConfig, generator: torch.Generator) -> Tensor:
    """Exemplars (N, 3, S, S) in [0, 1] after the recipe's augmentation."""
    return torch.stack([augment_exemplar(exemplar, recipe, generator) for exemplar in exemplars]).clamp(0, 1)


# --- 6: samplers ------------------------------------------------------------------------------------------


@torch.no_grad()
def sampler_table(
    model: PaintByExample,
    cases: Cases,
    others: Cases,
    *,
    guidance: float,
    samplers: Sequence[str] = ("ddim", "plms", "dpm_solver"),
    steps: Sequence[int],
    reference_steps: int,
    seed: int = 0,
) -> Table:
    """The error of each sampler, spacing and number of steps against DDIM of `reference_steps`, from the same noise."""
    condition = condition_of(model, cases, others)
    eps = guided_eps(model, condition, guidance)
    x_T = randn(condition.z_masked.shape[1:], make_generators(seed, len(cases)), model.device)
    schedule = NoiseSchedule.scaled_linear().first(model.config.num_timesteps)
    grid = leading(schedule, reference_steps)
    z_ref = ddim(eps, grid.start_from(model.start(condition), x_T), grid)
    picture_ref = decode(model, z_ref)
    rows: list[Row] = []
    for name, spacing, count in itertools.product(samplers, ("leading", "trailing"), steps):
        grid = SPACINGS[spacing](schedule, count)
        z_0 = get_sampler(name)(eps, grid.start_from(model.start(condition), x_T), grid)
        picture = decode(model, z_0)
        error, norm = (z.float().flatten(1).norm(dim=1).cpu().numpy() for z in (z_0 - z_ref, z_ref))
        rows.append(
            {
                "sampler": name,
                "spacing": spacing,
                "steps": count,
                "error of the latent": statistics.ratio(error, norm),
                "error in the region": statistics.mean(region_distances(picture, picture_ref, cases.mask)),
            }
        )
    note = (
        f"Against {reference_steps} steps of DDIM with the same noise, λ = {guidance:g}. Latent: |z - z_ref| / "
        "|z_ref|. Region: root mean square of the decoded pictures' difference, in grey levels of [0, 1]."
    )
    return Table("Samplers", note, rows)
