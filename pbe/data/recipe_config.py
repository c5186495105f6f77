"""The options of the recipe, and changing some of them by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pbe.io.suggest import did_you_mean


@dataclass
class RecipeConfig:
    """How examples are made; the defaults are the paper's.

    resolution, exemplar_size: sides in pixels of what the UNet and the exemplar's encoder see.
    antialias: resample with antialiasing, as editing does; the original did not.
    draft: decode a JPEG at 1/2, 1/4 or 1/8 where that still has all the pixels wanted.

    min_area, max_area: shares of the photo; smaller and larger boxes are not used.
    shrink: of the smallest margin between window and grown box, the most that the window shrinks by.
    coverage: [least, most] share of the window that the grown box takes, drawn anew each time, so that context is left
        around it; None: the paper's windows, which follow the photo's short side.
    fit: what becomes of a photo where no square holds the box (or leaves the context that `coverage` asks for), and
        all of it is taken: "squash" distorts it, "letterbox" keeps its shape between two gray bars.

    grow: of the free space on a side of the box, the most that the box to repaint grows by.
    arbitrary_mask: probability of a Bezier shape in place of the grown box; jitter: of its points, in photo pixels.
    object_mask: probability of the object's own mask in place of both, where there is one; None: 1 for masks of a
        manifest, which say what to repaint, 0 for COCO's, which say where objects are. object_mask_margin: what it is
        grown by, in photo pixels.

    augment: False switches off what the paper's ablation calls augmentation: every change of the exemplar, and the
        Bezier shapes.
    reference_margin: what the box grows by on each side, in photo pixels, before the exemplar is cut out.
    flip, rotation, blur, warp: probabilities of each change of the exemplar; rotation_degrees to either side;
        blur_kernels [smallest, largest] and warp_shift (of each corner, in x and y) in exemplar pixels.
    recolor: probability that an object gets other colours, in its photo and as the exemplar alike, so that nothing but
        the exemplar tells them; not the paper's. Not without `augment`, nor for records with a reference or target of
        their own.
    transplant: probability that an object of another photo, one of `data.donors`, stands in its place, cut out along
        its mask, and is the exemplar, so that nothing but the exemplar tells what it is; not the paper's. Not where
        `recolor` would not, either, and what is transplanted keeps its colours.
    """

    resolution: int = 512
    exemplar_size: int = 224
    antialias: bool = False
    draft: bool = True

    min_area: float = 0.02
    max_area: float = 0.8
    shrink: float = 0.6
    coverage: list[float] | None = None
    fit: Literal["squash", "letterbox"] = "squash"

    grow: float = 0.4
    arbitrary_mask: float = 0.5
    jitter: float = 5.0
    object_mask: float | None = None
    object_mask_margin: float = 0.0

    augment: bool = True
    reference_margin: float = 10.0
    flip: float = 0.5
    rotation: float = 0.5
    rotation_degrees: float = 20.0
    blur: float = 0.3
    blur_kernels: list[int] = field(default_factory=lambda: [3, 7])
    warp: float = 0.3
    warp_shift: float = 50.0
    recolor: float = 0.0
    transplant: float = 0.0

    def __post_init__(self) -> None:
        shares = ["min_area", "max_area", "shrink", "grow", "arbitrary_mask"]
        shares += ["flip", "rotation", "blur", "warp", "recolor", "transplant"]
        for name in shares if self.object_mask is None else [*shares, "object_mask"]:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"recipe.{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("jitter", "object_mask_margin", "reference_margin", "rotation_degrees", "warp_shift"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"recipe.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("resolution", "exemplar_size"):
            if getattr(self, name) < 8:
                raise ValueError(f"recipe.{name} must be at least 8 pixels, got {getattr(self, name)}")
        if not self.min_area < self.max_area:
            raise ValueError(f"recipe.min_area {self.min_area} must be below max_area {self.max_area}")
        if self.coverage is not None and not (
            len(self.coverage) == 2 and 0 < self.coverage[0] <= self.coverage[1] <= 1
        ):
            raise ValueError(f"recipe.coverage must be [least, most] with 0 < least <= most <= 1, got {self.coverage}")
        if self.fit not in ("squash", "letterbox"):
            raise ValueError(f"recipe.fit must be 'squash' or 'letterbox', got {self.fit!r}")
        kernels = self.blur_kernels
        if not (len(kernels) == 2 and 1 <= kernels[0] <= kernels[1] and all(kernel % 2 for kernel in kernels)):
            raise ValueError(f"recipe.blur_kernels must be [smallest, largest], odd numbers, got {kernels}")

    @property
    def needs_donors(self) -> bool:
        """Whether objects of other photos are put in."""
        return self.augment and self.transplant > 0


def changed(recipe: RecipeConfig, changes: Mapping[str, Any], key: str) -> RecipeConfig:
    """A recipe with other values for some of its fields.

    ValueError for a name that is no field, a value of another type or out of bounds, named as in the config's `key`.
    """
    types = get_type_hints(RecipeConfig)
    for name, value in changes.items():
        if name not in types:
            raise ValueError(f"{key}.{name}: a recipe has no {name!r}{did_you_mean(name, types)}")
        if not has_type(value, types[name]):
            raise ValueError(f"{key}.{name} must be {RecipeConfig.__annotations__[name]}, got {value!r}")
    try:
        return replace(recipe, **changes)
    except ValueError as error:
        raise ValueError(str(error).replace("recipe", key, 1)) from None


def has_type(value: Any, expected: Any) -> bool:
    """Whether a value is of a field's type: a class, a list, a Literal or a union of these; an int is also a float."""
    if get_origin(expected) is Literal:
        return value in get_args(expected)
    if get_origin(expected) is list:
        return isinstance(value, list) and all(has_type(item, *get_args(expected)) for item in value)
    if get_args(expected):
        return any(has_type(value, choice) for choice in get_args(expected))
    return type(value) is expected or (expected is float and type(value) is int)
