"""What the page does: edits of what was uploaded and drawn there, at its controls' values.

Image and exemplar stay the files that were uploaded, which `pbe.app.uploads` edits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gradio as gr

from pbe.app.canvas import drawn_mask
from pbe.app.serving import waiting_client, with_previews, workplace
from pbe.app.uploads import EditFiles, save_edits
from pbe.batch.provenance import Weights
from pbe.editing.loading import AdaptedModels
from pbe.editing.preview import Preview
from pbe.editing.settings import SETTINGS, EditSettings, settings_for
from pbe.images.windows import mask_bounding_box
from pbe.io.fields import read

Adapters = tuple[tuple[Path, float], ...]  # files and their strengths
NOTHING_NEW = (gr.skip(),) * 4  # of the results while they are painted


class Upload(NamedTuple):
    """An uploaded picture: its file and its upright size."""

    path: str
    size: tuple[int, int]  # (height, width)


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
    lock: threading.Lock = field(default_factory=threading.Lock)  # Gradio goes on while a cancelled edit's step lasts

    def paint(
        self,
        image: Upload | None,
        drawn: dict[str, str] | None,
        exemplar: Upload | None,
        crop: dict[str, str] | None,
        num_images: object,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio hands it over)
        **controls: object,
    ) -> Iterator[tuple[object, ...]]:
        """What `result_view` shows: the results for what is loaded and drawn on the page."""
        with workplace() as folder:
            if image is None:
                raise ValueError("There is no image yet: load one on the left.")
            mask = drawn_mask(drawn, image.size)
            if mask is None:
                raise ValueError("There is no mask yet: brush or box what to replace in the image.")
            if exemplar is None:
                raise ValueError("There is no exemplar yet: load a picture of what to paint.")
            shown = drawn_mask(crop, exemplar.size)
            box = None if shown is None else mask_bounding_box(shown)
            files = EditFiles(Path(image.path), mask, Path(exemplar.path), box)
            save = partial(self.save, files, controls, num_images, folder, progress)
            paths = yield from with_previews(save, lambda images: (*NOTHING_NEW, gr.Gallery(images, visible=True)))
            results = [(path, f"seed {Path(path).stem.rpartition('-')[2]}") for path in paths]
            # Gradio has copied the files when this function goes on, and the folder can go.
            row, preview = gr.Row(visible=True), gr.Gallery(visible=False)
            yield gr.Gallery(results, selected_index=0), 0, gr.DownloadButton(value=paths[0]), row, preview

    def edit(
        self,
        image: str,
        mask: str,
        exemplar: str,
        num_images: object,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
        **controls: object,
    ) -> Iterator[list[str]]:
        """Repaints the white part of the mask, in the image, as the exemplar's object: one PNG file per result."""
        with workplace() as folder:
            given = {"image": image, "mask": mask, "exemplar": exemplar}
            missing = [name for name, file in given.items() if file is None]
            if missing:
                raise ValueError(f"{' and '.join(missing)} missing: give files, with gradio_client.handle_file")
            files = EditFiles(Path(image), Path(mask), Path(exemplar))
            yield self.save(files, controls, num_images, folder, progress)

    def save(
        self,
        files: EditFiles,
        controls: dict[str, object],
        num_images: object,
        folder: Path,
        progress: gr.Progress,
        preview: Preview | None = None,
        closed: threading.Event | None = None,
    ) -> list[str]:
        """`save_edits`, as long as somebody waits for it."""
        check = waiting_client(closed)

        def tell(step: tuple[int, int], desc: str) -> None:
            check()
            progress(step, desc=desc)

        with self.lock:
            settings, adapters = self.changed(controls), self.with_strengths(controls)
            about = zip(self.weights.adapters, adapters, strict=True)
            weights = self.weights._replace(adapters=tuple({**one, "strength": s} for one, (_, s) in about))
            return save_edits(self.models(adapters), weights, files, settings, num_images, folder, tell, preview)

    def changed(self, controls: dict[str, object]) -> EditSettings:
        """The settings with the controls' values: 20.0 from a program is 20, None from an emptied field is an error."""
        given = {name: read(name, value, SETTINGS[name]) for name, value in controls.items() if name in SETTINGS}
        return settings_for(given, self.models(self.with_strengths(controls)).config.distilled, self.settings)

    def with_strengths(self, controls: dict[str, object]) -> Adapters:
        """The adapters at the strengths that controls say."""
        names = {f"strength_{i}": one for i, one in enumerate(self.adapters, start=1)}
        return tuple((path, read(name, controls.get(name, given), float)) for name, (path, given) in names.items())
