"""The options of the recipe, and changing some of them by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pbe.io.fields import Range, check, describe, field_types
from pbe.io.suggest import did_you_mean
from pbe.models.paint_by_example import PaintByExampleConfig

RENAMED = {"reference_margin": "exemplar_margin"}  # options, new names by old ones

Share = Annotated[float, Range(0, 1)]
Probability = Annotated[float, Range(0, 1)]
Pixels = Annotated[float, Range(0)]
Side = Annotated[int, Range(8)]


@dataclass
class RecipeConfig:
    """How examples are made; the defaults are the paper's.

    ValueError for a value that cannot be, naming the option and what would be right. An int is also a float, and a list
    a tuple.
    """

    resolution: Side = 512
    """Side in pixels of what the UNet sees; in a config that leaves it out, the model's."""
    exemplar_size: Side = 224
    """Side in pixels of what the exemplar's encoder sees; in a config that leaves it out, the model's."""
    antialias: bool = False
    """Resample with antialiasing, as editing does; the original did not."""
    draft: bool = True
    """Decode a JPEG at 1/2, 1/4 or 1/8 where that still has all the pixels wanted."""

    min_area: Share = 0.02
    """Least share of the photo that a box takes; smaller ones are not used."""
    max_area: Share = 0.8
    """Largest share of the photo that a box takes; larger ones are not used."""
    shrink: Share = 0.6
    """Most that the crop window shrinks by: share of the smallest margin between it and the grown box."""
    coverage: Annotated[tuple[float, float], "[least, most] with 0 < least <= most <= 1"] | None = None
    """[least, most] share of the crop window that the grown box takes, drawn for each example, so that context is left
    around it. None: the paper's windows, which follow the photo's short side."""
    fit: Literal["squash", "letterbox", "buckets"] = "squash"
    """What is done with a photo that is taken whole because no square holds the box (or leaves the context that
    `coverage` asks for): "squash" distorts it, "letterbox" keeps its shape between two gray bars. "buckets": windows
    are no squares but have, of seven shapes of about resolution^2 pixels, the one nearest to their photo's, from 6:11
    to 11:6; a batch has one shape."""

    grow: Share = 0.4
    """Most that the box to repaint grows by on each side: share of the free space there."""
    arbitrary_mask: Probability = 0.5
    """Probability of a Bezier shape in place of the grown box."""
    jitter: Pixels = 5.0
    """How far the points of a Bezier shape move, in photo pixels."""
    object_mask: Probability | None = None
    """Probability of the object's own mask, where it has one, in place of box and Bezier shape. None: 1 for masks of a
    manifest, which say what to repaint, 0 for COCO's, which say where objects are."""
    anneal_masks: Annotated[int, Range(0)] = 0
    """Over this many epochs the objects' own masks give way to boxes and Bezier shapes: their probability falls from 1
    to `object_mask` (None: 0), so that form is learned before it must be guessed."""
    object_mask_margin: Pixels = 0.0
    """What an object's own mask grows by, in photo pixels."""

    augment: bool = True
    """False switches off what the paper's ablation calls augmentation: every change of the exemplar, and the Bezier
    shapes."""
    exemplar_margin: Pixels = 10.0
    """What the box grows by on each side, in photo pixels, before the exemplar is cut out."""
    fill_background: Probability = 0.0
    """Probability that what surrounds an object in its exemplar is filled with white, as editing does where a mask says
    what the object is, so that it cannot be copied; in a collage it is left out. Not the paper's."""
    collage: bool = False
    """Show the exemplar, as augmented, in the hole of the masked image (`pbe.models.collage`); in a config that leaves
    it out, as the model does. Not the paper's."""
    flip: Probability = 0.5
    """Probability that the exemplar is flipped from left to right."""
    rotation: Probability = 0.5
    """Probability that the exemplar is rotated."""
    rotation_degrees: Annotated[float, Range(0)] = 20.0
    """Largest angle, to either side."""
    blur: Probability = 0.3
    """Probability that the exemplar is blurred."""
    blur_kernels: Annotated[tuple[int, int], "[smallest, largest], odd numbers of at least 1"] = (3, 7)
    """[smallest, largest] side of the blur's box in exemplar pixels, odd."""
    warp: Probability = 0.3
    """Probability of an affine warp of the exemplar."""
    warp_shift: Pixels = 50.0
    """How far each corner of the warp moves in x and y, in exemplar pixels."""
    recolor: Probability = 0.0
    """Probability that an object gets other colours, in its photo and as the exemplar alike, so that nothing but the
    exemplar tells them; not the paper's. Needs `augment`; records with an exemplar or target of their own are left as
    they are."""
    transplant: Probability = 0.0
    """Probability that an object of another photo, one of `data.donors`, takes the place of the photo's own, cut out
    along its mask, and is the exemplar, so that nothing but the exemplar tells what it is; not the paper's. Limited as
    `recolor` is; what is transplanted keeps its colours."""
    transplant_anywhere: Probability = 0.0
    """Probability that what is transplanted goes to a place of its own, a tenth to four tenths of the photo, and not to
    that of the photo's object. Parts of an object that is hidden in the mask cannot be foretold; what a place is
    surrounded by goes on behind what is put there."""

    def __post_init__(self) -> None:
        for name, annotation in OPTIONS.items():
            setattr(self, name, check(f"recipe.{name}", getattr(self, name), annotation))
        if not self.min_area < self.max_area:
            raise ValueError(f"recipe.min_area {self.min_area} must be below max_area {self.max_area}")
        smallest, largest = self.blur_kernels
        ordered = {"blur_kernels": 1 <= smallest <= largest and smallest % 2 == largest % 2 == 1}
        if self.coverage is not None:
            ordered["coverage"] = 0 < self.coverage[0] <= self.coverage[1] <= 1
        for name in (name for name, holds in ordered.items() if not holds):
            raise ValueError(f"recipe.{name} must be {describe(OPTIONS[name])}, got {getattr(self, name)}")

    def of_epoch(self, epoch: int) -> RecipeConfig:
        """The recipe with the masks of this epoch, the first being 0."""
        if epoch >= self.anneal_masks:
            return self
        last = self.object_mask or 0.0
        return replace(self, object_mask=1 - (1 - last) * epoch / self.anneal_masks)

    @property
    def needs_donors(self) -> bool:
        """Whether objects of other photos are put in."""
        return self.augment and self.transplant > 0

    def check_donors(self, donors: object, key: str = "recipe") -> None:
        """ValueError that names the config's `key` if the recipe needs donors and `donors` is None."""
        if self.needs_donors and donors is None:
            raise ValueError(f"{key}.transplant needs data.donors: a source of objects with masks")


OPTIONS = field_types(RecipeConfig)
OF_MODEL = ("resolution", "exemplar_size", "collage")


def of_model(model: PaintByExampleConfig) -> dict[str, Any]:
    """The options `OF_MODEL`, as a model needs them."""
    return dict(zip(OF_MODEL, (model.resolution, model.exemplar.vision.image_size, model.collage), strict=True))


def override_recipe(recipe: RecipeConfig, changes: Mapping[str, Any], key: str) -> RecipeConfig:
    """A recipe with other values for some of its options.

    ValueError for a name that is not an option and for a value that cannot be, named as in the config's `key`.
    """
    for name in changes:
        if name in RENAMED:
            raise ValueError(f"{key}.{name} is now called {RENAMED[name]!r}")
        if name not in OPTIONS:
            raise ValueError(f"{key}.{name}: a recipe has no {name!r}{did_you_mean(name, OPTIONS)}")
    try:
        return replace(recipe, **changes)
    except ValueError as error:
        raise ValueError(str(error).replace("recipe", key, 1)) from None
