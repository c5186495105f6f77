"""An edit's settings: the one place of their names, types, defaults, documentation and rules.

The keywords of `pbe.edit`, the flags of `pbe edit`, the columns of a batch file, a result's provenance, the page and
`pbe evaluate run` are derived from `EditSettings`. Only the standard library is imported on top: the command line reads
its arguments before it loads anything heavy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from pbe.io.fields import Range, check, describe, field_docs, field_types, read

if TYPE_CHECKING:
    from pbe.models.paint_by_example import Distilled

MAX_SEED = 2**64 - 1  # torch's generators take 64 bits
COUNT = Annotated[int, Range(1, 10_000)]  # of the results of one call, and of those sampled at once

SamplerName = Literal["ddim", "plms", "ddpm", "dpm_solver", "unipc", "euler", "euler_ancestral", "lcm", "tcd"]
SpacingName = Literal["leading", "trailing", "karras", "lcm"]
# What the samplers of distilled models begin with: the timesteps that those were trained at, their only spacing, and
# the noise that tcd's authors take.
BY_SAMPLER: dict[str, dict[str, Any]] = {"lcm": {"spacing": "lcm"}, "tcd": {"spacing": "lcm", "eta": 0.3}}
ETA_SAMPLERS = ("ddim", "tcd")
MAX_LCM_STEPS = 50
Interval = Annotated[
    tuple[Annotated[int, Range(-1, 1000)], Annotated[int, Range(-1, 1000)]],
    "two whole timesteps LOW,HIGH with -1 <= LOW <= HIGH <= 1000",
]
Window = Annotated[
    Literal["auto", "full"] | tuple[int, int, int, int], "'auto', 'full' or a box X0,Y0,X1,Y1 in whole pixels"
]
Sides = tuple[tuple[Literal["left", "right", "top", "bottom"], Annotated[int, Range(1, 30_000)]], ...]
SIDES = "sides, each once, with 1 to 30000 pixels, such as left,200 or left,200,top,100"
Extend = Annotated[Sides | str, SIDES]


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """What one result of an edit follows from, beside its pictures and the model.

    ValueError for a value that no model and no photo can make right, naming the setting and what would be right.
    """

    steps: Annotated[int, Range(1, 1000)] = 50
    """Sampling steps, 1 to 1000."""
    guidance: Annotated[float, Range(0)] = 5.0
    """The scale λ of classifier-free guidance, eps_u + λ (eps_c - eps_u); 1 is without guidance."""
    guidance_interval: Interval | None = None
    """Guidance only at timesteps above LOW and up to HIGH, of 0 to 999, the noisiest; elsewhere λ is 1, at half the
    work (default: at all)."""
    sampler: SamplerName = "plms"
    """The sampling method, see docs/editing.md; lcm and tcd are for distilled models."""
    eta: Annotated[float, Range(0, 1)] = 0.0
    """Noise of the samplers ddim and tcd, which alone have it: 0 is none, 1 as much as ddpm's and lcm's; tcd begins
    with 0.3."""
    spacing: SpacingName = "leading"
    """Of the timesteps: leading is the original's; trailing starts from the noisiest, which is better for few steps;
    karras takes most steps at little noise; lcm is that of the samplers lcm and tcd, which have no other."""
    seed: Annotated[int, Range(0, MAX_SEED)] = 321
    """Of the first result; the next have the next seeds. A result depends on its own seed alone."""
    window: Window = "auto"
    """The part of the photo that the model sees: around the mask, so that it is neither tiny nor without context; the
    whole photo; or a box."""
    split_mask: bool = False
    """Edit each separate part of the mask in a window of its own; without it the whole mask shares one."""
    composite: bool = True
    """Put only the masked pixels into the photo; without it the model's own picture of the whole window."""
    seam: Literal["poisson", "feather"] = "poisson"
    """Let the result meet the photo's light and colour at the mask's border, by Poisson blending, or only fade in."""
    feather: Annotated[int, Range(0, 10**6)] | None = None
    """Width in photo pixels of the soft seam, which lies inside the mask (default: a 64th of the window, and at least
    two of the model's pixels)."""
    margin: Annotated[float, Range(0, 0.5, below=True)] = 0.1
    """Share of an automatic window's side that is kept free on each side of the mask."""
    resolution: Annotated[int, Range(8, 8192, step=8)] | None = None
    """Side in pixels at which the model works (default: the one that it was trained on)."""
    reuse: Annotated[int, Range(1, 1000)] = 1
    """Run the whole network once in N evaluations, and between them only its outer blocks, on the deep features of that
    one: faster, and approximate; 1 is off."""
    decoder: Literal["vae", "tiny"] = "vae"
    """What makes pictures of latents: the autoencoder or, for drafts, the tiny decoder of a model that has one."""
    strength: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Share of the steps that are taken: below 1 they start from the photo, with as much noise as the first of them is
    for (SDEdit), so that its shapes and poses are kept; 1 starts from noise alone or, for a model that sees the
    exemplar in the hole, from what it sees there under noise."""
    detail: Annotated[float, Range(0)] | None = None
    """How much a detail adapter adds of the exemplar; 0 is the model without it (default: 1, if the model has one)."""
    fit_mask: bool = False
    """Resize masks of another size than their pictures; without it they are refused."""
    invert: bool = False
    """Repaint what the mask keeps, and keep what it repaints."""
    extend: Extend | None = None
    """Let the photo grow by SIDE,N pixels, several sides in a row (left,200,top,100), and repaint what is new, beside
    the mask if there is one."""
    fill_holes: bool = False
    """Repaint what the mask surrounds, too."""
    smooth: Annotated[int, Range(0, 10_000)] = 0
    """Smooth the mask's outline: dots, gaps and corners smaller than about N photo pixels go."""
    grow: Annotated[int, Range(-10_000, 10_000)] = 0
    """Grow the mask by N photo pixels on all sides, or shrink it where N is negative."""
    placement: Literal["fill", "centre", "bottom"] = "fill"
    """Where the object stands in a mask of another shape: it may fill it, or the mask shrinks to the largest box of the
    exemplar's aspect, in the centre or at the bottom."""

    def __post_init__(self) -> None:
        for name, annotation in SETTINGS.items():
            object.__setattr__(self, name, check(name, getattr(self, name), annotation))
        if self.guidance_interval and self.guidance_interval[0] > self.guidance_interval[1]:
            kind = describe(SETTINGS["guidance_interval"])
            raise ValueError(f"guidance_interval must be {kind}, got {self.guidance_interval}")
        if self.eta and self.sampler not in ETA_SAMPLERS:
            raise ValueError(f"eta={self.eta} is for the samplers 'ddim' and 'tcd' alone, not for {self.sampler!r}")
        spacing = BY_SAMPLER.get(self.sampler, {}).get("spacing", self.spacing)
        if self.spacing != spacing:
            raise ValueError(f"the sampler {self.sampler!r} needs spacing={spacing!r}, got {self.spacing!r}")
        if self.spacing == "lcm" and self.steps > MAX_LCM_STEPS:
            raise ValueError(f"spacing='lcm' has {MAX_LCM_STEPS} timesteps, got steps={self.steps}")
        if self.spacing == "karras" and self.sampler == "plms":
            raise ValueError("the sampler 'plms' needs even steps, as spacing='trailing' has, got 'karras'")
        if self.extend is not None:
            sides = read("extend", self.extend, Annotated[Sides, SIDES])
            if len(dict(sides)) < len(sides):
                raise ValueError(f"extend must be {SIDES}, got {self.extend}")
            object.__setattr__(self, "extend", sides)
            if self.placement != "fill":
                raise ValueError(f"placement={self.placement!r} would leave a part of what extend adds unpainted")

    @property
    def steps_taken(self) -> int:
        """How many of the steps are taken, the last ones: strength's share of them, rounded up."""
        return max(1, math.ceil(self.strength * self.steps - 1e-9))

    @classmethod
    def from_texts(
        cls, values: Mapping[str, Any], distilled: Distilled | None = None, defaults: EditSettings | None = None
    ) -> EditSettings:
        """The settings that texts or JSON values by name say; None and blank texts leave a setting to `settings_for`.

        ValueError for a value that cannot be read, and as the class.
        """
        given = {name: read(name, value, SETTINGS[name]) for name, value in values.items() if is_given(value)}
        return settings_for(given, distilled, defaults)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, without those that are None; `from_texts` reads them back."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


SETTINGS = field_types(EditSettings)
# Those that the model's own picture of a window follows from, beside the seed, where photos and masks fit.
SAMPLING: tuple[str, ...] = ("steps", "guidance", "guidance_interval", "sampler", "eta", "spacing", "resolution")
SAMPLING += ("reuse", "decoder", "strength", "detail", "fill_holes", "smooth", "grow", "placement")


class EditKeywords(TypedDict, total=False):
    """`EditSettings` as keywords, for type checkers and editors; a test compares the two."""

    steps: int
    guidance: float
    guidance_interval: tuple[int, int] | None
    sampler: SamplerName
    eta: float
    spacing: SpacingName
    seed: int
    window: Literal["auto", "full"] | tuple[int, int, int, int]
    split_mask: bool
    composite: bool
    seam: Literal["poisson", "feather"]
    feather: int | None
    margin: float
    resolution: int | None
    reuse: int
    decoder: Literal["vae", "tiny"]
    strength: float
    detail: float | None
    fit_mask: bool
    invert: bool
    extend: Sides | str | None
    fill_holes: bool
    smooth: int
    grow: int
    placement: Literal["fill", "centre", "bottom"]


def settings_for(
    given: Mapping[str, Any], distilled: Distilled | None = None, defaults: EditSettings | None = None
) -> EditSettings:
    """The settings of an edit by a model (`model.config.distilled`): those given; of the others those that it was
    distilled for; then what the sampler begins with; then `defaults`. ValueError as `EditSettings`."""
    values = {**vars(defaults or EditSettings()), **(vars(distilled) if distilled else {}), **given}
    return EditSettings(**{**values, **BY_SAMPLER.get(str(values["sampler"]), {}), **given})


def setting_docs() -> dict[str, str]:
    """What each setting is, on one line."""
    return field_docs(EditSettings)


def is_given(value: Any) -> bool:
    """Whether a value of a row or a flag says anything."""
    return value is not None and not (isinstance(value, str) and not value.strip())


# For results soon: as good as many steps give, where PLMS, with as few, is unstable under strong guidance.
# docs/editing.md, "How many steps"
QUICK = EditSettings(sampler="dpm_solver", spacing="trailing", steps=20)
# More guidance takes its colours further away from the exemplars': docs/demo-model.md
DEMO = replace(QUICK, steps=10, guidance=2.0)


def quick_settings(checkpoint: str | Path) -> EditSettings:
    """QUICK for the model in a checkpoint, or what suits it better where that is known."""
    from pbe.checkpoints.formats.opening import DEMO_MODEL, find_checkpoint

    return DEMO if find_checkpoint(checkpoint) == DEMO_MODEL else QUICK
