"""The page: load a photo, draw a region, load an exemplar, look at the results; the same over Gradio's API.

Photo and exemplar stay the files that were uploaded, which `pbe.app.uploads` edits; the canvases show smaller copies,
and only the regions drawn come back from there.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pbe.app.canvas import CROPPING, DRAWING, MAX_SIDE, painter, region_of, to_value
from pbe.app.uploads import MAX_RESULTS, Edit, Settings, save_edits, take
from pbe.batch.provenance import Weights
from pbe.editing.settings import QUICK, EditSettings
from pbe.images.reading import PictureWarning, read_mask, read_picture
from pbe.images.windows import mask_bounding_box
from pbe.models.paint_by_example import PaintByExample
from pbe.sampling import SAMPLERS

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the page needs the extra app: pip install -e .[app]") from error

MAX_UPLOAD = "64mb"
MAX_WAITING = 16  # edits in the queue; one runs at a time
SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"  # of the repository; an installed package has none
EXAMPLE_FILES = (  # photo, mask, exemplar
    ("flower.jpg", "flower_mask.png", "flower_red.jpg"),
    ("coffee.png", "coffee_mask.png", "flower.png"),
    ("coffee.png", "coffee_mask.png", "cat.png"),
    ("china.jpg", "china_mask.png", "shuttle.png"),
)
# The fonts come with Gradio: none is fetched from elsewhere. Its semi-bold files lack letters.
THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="stone",
    font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "sans-serif"],
    font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "monospace"],
)
CSS = """
#photo .html-container, #exemplar .html-container { padding: 0; }
#examples .table-wrap { border: none; padding: 0; }
#examples table { width: auto; padding: 0; }
#examples thead { display: none; }
#examples tbody { display: flex; flex-wrap: wrap; gap: 16px; }
#examples tr { display: flex; padding: 4px; border: 1px solid var(--border-color-primary); border-radius: 8px; }
#examples td { border: none; padding: 4px; }
"""
HEIGHT = 520  # of photo and results


# ----------------------------------------------------------------------------------------------------------------------
# Serving


def serve(page: gr.Blocks, host: str = "127.0.0.1", port: int = 7860) -> str:
    """Serves a page of `build_page` in threads of its own; returns its address.

    ValueError for a number that is no port; OSError if the port is taken, or the host no address of this machine.

    Nothing is sent to or fetched from anywhere else. `page.block_thread()` waits until it is interrupted.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"port must be between 1 and 65535, got {port}")
    try:
        _, address, _ = page.queue(max_size=MAX_WAITING).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=["api"],
            max_file_size=MAX_UPLOAD,
            theme=THEME,
            css=CSS,
        )
    except OSError as error:  # its text names Gradio's own settings
        raise OSError(f"cannot serve at {host}:{port}: the port is taken or the host not this machine's") from error
    return address


@contextmanager
def warnings_on_page() -> Iterator[None]:
    """The library's warnings about pictures, each time anew, go to the browser whose edit they are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # other packages' deprecations: nothing a user can act on
        warnings.simplefilter("always", PictureWarning)
        show = warnings.showwarning

        def showwarning(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, PictureWarning):
                gr.Warning(str(message))
            else:
                show(message, category, *where)

        warnings.showwarning = showwarning
        yield


@contextmanager
def files_of_page() -> Iterator[None]:
    """Uploads and results of pages built meanwhile lie in a folder of their own, which goes at the end."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="pbe-page-", dir=before) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # Gradio has no other way to say it
        try:
            yield
        finally:
            del os.environ["GRADIO_TEMP_DIR"]
            os.environ.update({} if before is None else {"GRADIO_TEMP_DIR": before})


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder for one edit; the library's errors leave it as messages for the page, without the folder's name."""
    with tempfile.TemporaryDirectory(prefix="pbe-") as folder:
        try:
            yield Path(folder)
        except (ValueError, OSError, MemoryError) as error:
            raise gr.Error(str(error).replace(f"{folder}/", ""), print_exception=False) from error


# ----------------------------------------------------------------------------------------------------------------------
# Pictures to show


class Upload(NamedTuple):
    """An uploaded picture: its file and its upright size."""

    path: str
    size: tuple[int, int]  # (height, width)


def open_upload(path: str, name: str) -> tuple[Upload, Image.Image]:
    """An uploaded picture, and a copy of it to show: upright 8-bit RGB, no larger than it need be."""
    with workplace() as folder:
        picture = read_picture(folder / take(Path(path), folder, name), name)
    # The floats of all pixels would take gigabytes.
    stride = max(1, max(picture.size) // (2 * MAX_SIDE))
    rgb = replace(picture, pixels=picture.pixels[::stride, ::stride]).rgb()[0].permute(1, 2, 0).numpy()
    return Upload(path, picture.size), Image.fromarray(np.rint((rgb + 1) * 127.5).astype(np.uint8))


def example_files() -> list[list[str]]:
    """Photo, mask and exemplar of the examples that are there."""
    paths = [[EXAMPLES / name for name in names] for names in EXAMPLE_FILES]
    return [[str(path) for path in example] for example in paths if all(path.is_file() for path in example)]


# ----------------------------------------------------------------------------------------------------------------------
# The page


def build_page(model: PaintByExample, weights: Weights, sampling: EditSettings = QUICK) -> gr.Blocks:
    """The page for one model; `weights` says in the results which it was, the sliders begin with `sampling`.

    `serve` shows it.
    """

    # --- what its parts do: values in, values or updates out

    def show(path: str, name: str, region: np.ndarray | None = None) -> tuple:
        """For the parts of one picture: the upload, the drop zone, the canvas."""
        upload, shown = open_upload(path, name)
        return (
            upload,
            gr.update(value=None, visible=False),
            gr.update(value=to_value(shown, region), visible=True),
        )

    def show_photo(path: str) -> tuple:
        return show(path, "photo")

    def show_exemplar(path: str) -> tuple:
        return show(path, "exemplar")

    def close() -> tuple:
        return None, gr.update(visible=True), gr.update(value=None, visible=False)

    def show_example(index: int) -> tuple:
        photo, mask, exemplar = example_files()[index]
        with Image.open(photo) as image:
            region = read_mask(mask, (image.height, image.width))
        return *show(photo, "photo", region), *show(exemplar, "exemplar")

    def paint(
        photo: Upload | None,
        drawn: dict[str, str] | None,
        exemplar: Upload | None,
        crop: dict[str, str] | None,
        guidance: float,
        steps: int,
        seed: int,
        num_images: int,
        sampler: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio hands it over)
    ) -> Iterator[tuple]:
        with workplace() as folder:
            if photo is None:
                raise ValueError("There is no photo yet: load one on the left.")
            region = region_of(drawn, photo.size)
            if region is None:
                raise ValueError("No region is drawn yet: brush or box what is to be replaced in the photo.")
            if exemplar is None:
                raise ValueError("There is no object yet: load a picture of what is to be painted.")
            shown = region_of(crop, exemplar.size)
            box = None if shown is None else mask_bounding_box(shown)
            edit = Edit(Path(photo.path), region, Path(exemplar.path), box)
            settings = Settings(guidance, steps, seed, num_images, sampler, sampling.spacing)
            paths = save_edits(model, weights, edit, settings, folder, progress)
            results = [(path, f"seed {seed + i}") for i, path in enumerate(paths)]
            # Gradio has copied the files when this function goes on, and the folder can go.
            yield gr.Gallery(results, selected_index=0), 0, gr.DownloadButton(value=paths[0]), gr.Row(visible=True)

    def edit(
        photo: str,
        mask: str,
        exemplar: str,
        guidance: float,
        steps: int,
        seed: int,
        num_images: int,
        sampler: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[list[str]]:
        """Repaints the white part of the mask, in the photo, as the exemplar's object: one PNG file a result."""
        with workplace() as folder:
            files = {"photo": photo, "mask": mask, "exemplar": exemplar}
            missing = [name for name, file in files.items() if file is None]
            if missing:
                raise ValueError(f"{' and '.join(missing)} missing: hand over files, with gradio_client.handle_file")
            settings = Settings(guidance, steps, seed, num_images, sampler, sampling.spacing)
            yield save_edits(model, weights, Edit(Path(photo), Path(mask), Path(exemplar)), settings, folder, progress)

    def choose(results: list[tuple[str, str]], event: gr.SelectData) -> tuple[int, str]:
        return event.index, results[event.index][0]

    def reuse(results: list[tuple[str, str]], chosen: int) -> tuple:
        return show_photo(results[chosen][0])

    # --- what it looks like

    with gr.Blocks(
        title="Paint by Example", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True
    ) as page:
        photo, exemplar, chosen = gr.State(), gr.State(), gr.State(0)
        gr.Markdown(
            "# Paint by Example\n"
            "Load a photo and draw the region to replace; load a picture of an object; see the object in its place."
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=400):
                photo_file = gr.File(label="Photo", file_types=SUFFIXES, height=HEIGHT, elem_id="photo-file")
                canvas = painter("Photo", DRAWING, HEIGHT, elem_id="photo")
            with gr.Column(scale=3, min_width=280):
                exemplar_file = gr.File(label="Object", file_types=SUFFIXES, height=300, elem_id="exemplar-file")
                crop = painter("Object · drag to crop", CROPPING, 300, elem_id="exemplar")
                start = gr.Button("Paint", variant="primary", size="lg", elem_id="paint")
                guidance = gr.Slider(0, 15, sampling.guidance, step=0.5, label="Guidance")
                num_images = gr.Slider(1, MAX_RESULTS, 2, step=1, label="Results")
                with gr.Accordion("Steps, seed, sampler", open=False):
                    steps = gr.Slider(4, 200, sampling.steps, step=1, label="Steps")
                    with gr.Row():
                        seed = gr.Number(EditSettings.seed, precision=0, minimum=0, label="Seed", min_width=80)
                        sampler = gr.Dropdown(list(SAMPLERS), value=sampling.sampler, label="Sampler", min_width=80)
            with gr.Column(scale=5, min_width=400):
                gallery = gr.Gallery(
                    label="Results",
                    preview=True,
                    object_fit="contain",
                    interactive=False,
                    buttons=["fullscreen"],
                    height=HEIGHT,
                    elem_id="results",
                )
                with gr.Row(visible=False) as actions:
                    download = gr.DownloadButton("Download PNG", elem_id="download")
                    again = gr.Button("Use result as photo", elem_id="again")
        if samples := example_files():
            examples = gr.Dataset(
                components=[gr.Image(label=name, render=False) for name in ("Photo", "Region", "Object")],
                samples=samples,
                type="index",
                label="Examples",
                elem_id="examples",
            )

        # --- what happens when

        photo_parts, exemplar_parts = [photo, photo_file, canvas], [exemplar, exemplar_file, crop]
        settings = [guidance, steps, seed, num_images, sampler]
        quick = {"api_visibility": "private", "show_progress": "hidden"}
        one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1}
        for file, show_it, parts in (
            (photo_file, show_photo, photo_parts),
            (exemplar_file, show_exemplar, exemplar_parts),
        ):
            # A file that is refused leaves the drop zone, which would not take another beside it.
            file.upload(show_it, file, parts, **quick).failure(lambda: None, None, file, **quick)
        canvas.close(close, None, photo_parts, **quick)
        crop.close(close, None, exemplar_parts, **quick)
        if samples:
            examples.click(show_example, examples, [*photo_parts, *exemplar_parts], **quick)
        start.click(
            paint,
            [photo, canvas, exemplar, crop, *settings],
            [gallery, chosen, download, actions],
            api_visibility="private",
            show_progress_on=gallery,
            **one_at_a_time,
        )
        gallery.select(choose, gallery, [chosen, download], **quick)
        again.click(reuse, [gallery, chosen], photo_parts, **quick)

        # --- the same for programs: the endpoint's arguments are components too, which nobody sees

        with gr.Row(visible=False):
            files = [gr.File(label=name) for name in ("photo", "mask", "exemplar")]
            saved = gr.File(label="results", file_count="multiple")
            gr.Button().click(edit, [*files, *settings], saved, api_name="edit", **one_at_a_time)
    return page
