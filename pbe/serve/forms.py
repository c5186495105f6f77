"""Forms of an edit: files and texts by the names that the columns of a batch have, and OpenAI's names for them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, get_args, get_origin

from PIL import Image
from starlette.datastructures import FormData, UploadFile

from pbe.batch.job import FILES, REGION_COLUMNS
from pbe.editing.settings import SETTINGS
from pbe.images.pillow import open_image
from pbe.images.reading import read_picture
from pbe.images.windows import white_level
from pbe.serve.problems import Problem
from pbe.serve.uploads import NUMBER, check_memory

# What OpenAI's endpoint has beside these pictures and an edit's settings: the only value that is right here, or None
# for what has no meaning and is ignored.
FIXED: dict[str, str | None] = dict.fromkeys(("size", "quality", "background"), "auto")
FIXED |= {"response_format": "b64_json", "output_format": "png", "stream": "false"}
FIXED |= dict.fromkeys(("prompt", "model", "user"))


def parts(kind: Any) -> list[Any]:
    """A type, and the types that it is made of."""
    return [kind, *(part for argument in get_args(kind) for part in parts(argument))]


OWN = ("out", "adapters")  # what the server says itself
COLUMNS = FILES | REGION_COLUMNS
UPLOADS = {name: kind for name, kind in COLUMNS.items() if str in parts(kind) and name not in OWN}
SEVERAL = {name for name, kind in UPLOADS.items() if any(get_origin(part) is tuple for part in parts(kind))}
TEXTS = {name: kind for name, kind in COLUMNS.items() if str not in parts(kind)} | SETTINGS | {"num_images": NUMBER}
Uploads = dict[str, list[UploadFile]]


def edit_fields(form: FormData) -> tuple[Uploads, dict[str, str]]:
    """The files and the texts of a form that has an edit's own names."""
    uploads: Uploads = {}
    texts: dict[str, str] = {}
    for name, value in form.multi_items():
        if name not in (*UPLOADS, *TEXTS):
            known = ", ".join(name for name in (*UPLOADS, *TEXTS) if name not in REGION_COLUMNS)
            message = f"unknown field {name!r:.100}; known are {known}, and for more regions mask_2, exemplar_2, …"
            raise Problem(400, message, name, "unknown_field")
        if isinstance(value, UploadFile) != (name in UPLOADS):
            raise Problem(400, f"{name} must be {'a file' if name in UPLOADS else 'text'}", name, "invalid_value")
        given = uploads if isinstance(value, UploadFile) else texts
        if name in given and name not in SEVERAL:
            raise Problem(400, f"{name} is given twice", name, "invalid_value")
        if isinstance(value, UploadFile):
            uploads.setdefault(name, []).append(value)
        else:
            texts[name] = value
    return uploads, texts


def openai_fields(form: FormData) -> tuple[Uploads, dict[str, str]]:
    """The files and texts of OpenAI's form, by an edit's own names: of its images the first is the photo."""
    names = {"image[]": "image", "n": "num_images"}
    items = [(names.get(name, name), value) for name, value in form.multi_items()]
    for name, value in items:
        if (right := FIXED.get(name)) is not None and str(value).lower() != right:
            raise Problem(400, f"{name} must be {right!r} here, got {str(value)!r:.100}", name, "unsupported_value")
    images = [value for name, value in items if name == "image"]
    if len(images) < 2:
        message = f"image[] must be given twice, the photo and the exemplar, got {len(images)}"
        raise Problem(400, message, "image", "invalid_value")
    left = [(name, value) for name, value in items if name != "image" and name not in FIXED]
    return edit_fields(FormData([("image", images[0]), *(("exemplar", one) for one in images[1:]), *left]))


def stored(upload: UploadFile, folder: Path, name: str) -> str:
    """Saves an uploaded picture under `name`; its file name. ValueError for no picture, or one of too many pixels."""
    suffix = Path(upload.filename or "").suffix.lower()
    path = folder / (name + (suffix if re.fullmatch(r"\.\w{1,5}", suffix) else ""))
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file)
    with open_image(path, name):
        check_memory(path, name)
    return path.name


def white_from_transparent(path: Path) -> None:
    """Makes a mask as OpenAI has it, transparent where it is repainted, one that is white there, if it is one."""
    pixels = read_picture(path, "mask").pixels
    alpha = pixels[..., -1]
    if pixels.shape[2] in (2, 4) and alpha.min() < white_level(alpha.dtype):
        Image.fromarray(alpha < white_level(alpha.dtype) / 2).save(path, "PNG")
