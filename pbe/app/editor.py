"""What the page does: edits of what was uploaded and drawn there, at its controls' values.

Image and exemplar stay the files that were uploaded, which `pbe.serve.uploads` edits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import gradio as gr
from PIL import Image

from pbe.app.canvas import drawn_mask
from pbe.app.serving import followed, workplace
from pbe.batch.provenance import Weights
from pbe.editing.loading import AdaptedModels
from pbe.editing.settings import SETTINGS, EditSettings, settings_for
from pbe.editing.together import Steps
from pbe.images.windows import mask_bounding_box
from pbe.io.fields import read
from pbe.serve.engine import Engine, Ticket
from pbe.serve.uploads import NUMBER, EditFiles, RegionUpload, job_of, save_edits

Adapters = tuple[tuple[Path, float], ...]  # files and their strengths
NOTHING_NEW = (gr.skip(),) * 5  # of the results while they are painted
NO_IMAGE = "There is no image yet: load one on the left."
A_BOX = 0.99  # share of its box that a box takes, whose corners are lost where the canvas shows a smaller copy


def path_of(file: str | None) -> Path | None:
    return None if file is None else Path(file)


class Upload(NamedTuple):
    """An uploaded picture: its file and its upright size."""

    path: str
    size: tuple[int, int]  # (height, width)


class Drawn(NamedTuple):
    """What is drawn and loaded for a region: the image and its canvas, the exemplar and its canvas."""

    image: Upload | None
    mask: dict[str, str] | None
    exemplar: Upload | None
    crop: dict[str, str] | None
    thumbnail: str = ""  # of the exemplar, once the region is kept

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a mask nor an exemplar."""
        return self.exemplar is None and not (self.mask and self.mask["mask"])

    def files(self, needs_mask: bool = True) -> RegionUpload:
        """The region for an edit; ValueError where something is missing that is needed."""
        if self.image is None:
            raise ValueError(NO_IMAGE)
        mask = drawn_mask(self.mask, self.image.size)
        if mask is None and needs_mask:
            raise ValueError("There is no mask yet: brush or box what to replace in the image.")
        if self.exemplar is None:
            raise ValueError("There is no exemplar yet: load a picture of what to paint.")
        shown = drawn_mask(self.crop, self.exemplar.size)
        if shown is None:
            return RegionUpload(mask, Path(self.exemplar.path))
        box = mask_bounding_box(shown)
        return RegionUpload(mask, Path(self.exemplar.path), box if shown[box.slices].mean() > A_BOX else shown)


class Loaded(NamedTuple):
    """What results were made of: the pictures, what was drawn on them (a canvas's `mask`), the controls' values, the
    regions that were kept."""

    image: Upload
    mask: str
    exemplar: Upload | None
    crop: str
    controls: dict[str, object]
    kept: tuple[Drawn, ...] = ()


def show_previews(images: list[Image.Image]) -> tuple[object, ...]:
    return *NOTHING_NEW, gr.Gallery(images, visible=True)


def show_results(paths: Sequence[str], loaded: Loaded) -> tuple[object, ...]:
    """For a `ResultView`: the results and what they were made of."""
    results = [(path, f"seed {Path(path).stem.rpartition('-')[2]}") for path in paths]
    gallery = gr.Gallery(results, selected_index=0, visible=True)
    return gallery, 0, gr.DownloadButton(value=paths[0]), gr.Row(visible=True), loaded


@dataclass(frozen=True)
class Editor:
    """The edits of the page and of its endpoint for programs, by one model.

    settings: where no control says otherwise. adapters: with which `models` is asked for it, at the strengths that the
    controls `strength_1`, … say; `weights` are those at the given ones.
    """

    models: AdaptedModels
    weights: Weights
    settings: EditSettings
    adapters: Adapters = ()
    engine: Engine = field(default_factory=Engine)

    def paint(
        self,
        image: Upload | None,
        drawn: dict[str, str] | None,
        exemplar: Upload | None,
        crop: dict[str, str] | None,
        num_images: object,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio hands it over)
        kept: Sequence[Drawn] = (),
        negative: str | None = None,
        **controls: object,
    ) -> Iterator[tuple[object, ...]]:
        """What `result_view` shows: the results for what is loaded and drawn on the page, as the last region after
        those that are `kept`, if it is one of its own."""
        with workplace() as folder:
            now = Drawn(image, drawn, exemplar, crop)
            kept = tuple(one for one in kept if one.image == image)  # of another there may be some for a moment
            regions = kept if kept and now.is_empty else (*kept, now)
            first, *others = (one.files(needs_mask=not controls.get("extend")) for one in regions)
            assert image is not None  # else there is an error before
            files = EditFiles(Path(image.path), *first, path_of(negative), others)
            edit = self.ticket(files, controls, num_images, folder)
            paths = yield from followed(self.engine, edit, progress, show_previews)
            masks = [value["mask"] if value else "" for value in (drawn, crop)]
            values = {**controls, "num_images": num_images, "negative": negative}
            loaded = Loaded(image, masks[0], exemplar, masks[1], values, kept)
            # Gradio has copied the files when this function goes on, and the folder can go.
            yield *show_results(paths, loaded), gr.Gallery(visible=False)

    def edit(
        self,
        image: str,
        mask: str | None,
        exemplar: str,
        num_images: object,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
        negative: str | None = None,
        **controls: object,
    ) -> Iterator[list[str]]:
        """Repaints the white part of the mask, in the image, as the exemplar's object: one PNG file per result."""
        with workplace() as folder:
            given = {"image": image, "mask": mask or controls.get("extend"), "exemplar": exemplar}
            missing = [name for name, file in given.items() if not file]
            if missing:
                raise ValueError(f"{' and '.join(missing)} missing: give files, with gradio_client.handle_file")
            files = EditFiles(Path(image), path_of(mask), Path(exemplar), None, path_of(negative))
            edit = self.ticket(files, controls, num_images, folder)
            yield (yield from followed(self.engine, edit, progress))

    def ticket(
        self, files: EditFiles, controls: dict[str, object], num_images: object, folder: Path
    ) -> Ticket[list[str]]:
        """`save_edits` for the engine, in whose thread alone models are asked for."""
        number = read("num_images", num_images, NUMBER)

        def begin(ticket: Ticket[list[str]]) -> Steps[list[str]]:
            settings, adapters = self.changed(controls), self.with_strengths(controls)
            about = zip(self.weights.adapters, adapters, strict=True)
            weights = self.weights._replace(adapters=tuple({**one, "strength": s} for one, (_, s) in about))
            job = job_of(files, settings, folder)
            return (yield from save_edits(self.models(adapters), weights, job, number, ticket.step, ticket.show))

        return Ticket(begin, number)

    def changed(self, controls: dict[str, object]) -> EditSettings:
        """The settings with the controls' values: 20.0 from a program is 20, None from an emptied number is an error,
        an empty text leaves a setting as it is."""
        said = {name: value for name, value in controls.items() if name in SETTINGS and value != ""}
        given = {name: read(name, value, SETTINGS[name]) for name, value in said.items()}
        return settings_for(given, self.models(self.with_strengths(controls)).config.distilled, self.settings)

    def with_strengths(self, controls: dict[str, object]) -> Adapters:
        """The adapters at the strengths that controls say."""
        names = {f"strength_{i}": one for i, one in enumerate(self.adapters, start=1)}
        return tuple((path, read(name, controls.get(name, given), float)) for name, (path, given) in names.items())
