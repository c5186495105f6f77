"""Reading pictures, masks and exemplars: PIL images, files, numpy arrays and tensors.

A picture keeps its own depth, channels and kind, so that the result can be given back as the same kind of object.
Masks come out as bool arrays called `repaint`: True where the image is to be repainted (white in a mask picture).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from pbe.images.colour import to_srgb
from pbe.images.pillow import PictureWarning, open_image, upright_image
from pbe.images.windows import LUMINANCE, Box, mask_bounding_box, white_level
from pbe.io.json_text import shown
from pbe.models.clip import CLIP_MEAN, CLIP_STD

PictureLike: TypeAlias = str | Path | Image.Image | np.ndarray | torch.Tensor
MaskLike: TypeAlias = PictureLike | Sequence[float] | Sequence[Sequence[float]]  # a picture, a box or a polygon

_GRAY_SHARE = 0.05  # a mask picture with more gray than this is not just smoothed along its edges


# --- pictures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture as an array, with the object that says what kind to give back.

    pixels: (H, W, C) uint8, uint16 or float in [0, 1]; C = 1 gray, 2 gray + alpha, 3 RGB, 4 RGBA. It may share
        its memory with the source: copy before writing.
    source: the array or tensor as handed in; for files and PIL images the upright image in the mode kept, with
        `exif` (orientation 1), `icc_profile` and `dpi` in its `info`.
    """

    pixels: np.ndarray
    source: Image.Image | np.ndarray | torch.Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.pixels.shape[:2]

    def rgb(self, window: Box | None = None) -> torch.Tensor:
        """The colours of the picture or a window of it for the networks: float32 (1, 3, H, W) in [-1, 1]; gray is
        repeated.

        Alpha is left out: the colours stored under transparent pixels are what the networks see.
        """
        pixels = self.pixels if window is None else self.pixels[window.slices]
        colour = pixels[..., : 3 if pixels.shape[2] >= 3 else 1].astype(np.float32)
        colour *= 2 / white_level(self.pixels.dtype)
        colour -= 1
        return torch.from_numpy(colour).permute(2, 0, 1)[None].expand(1, 3, -1, -1).clamp(-1, 1).contiguous()

    def to_rgb8(self) -> Image.Image:
        """The colours of the picture as a PIL image of 8 bits, without alpha."""
        return Image.fromarray(np.rint((self.rgb()[0].permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8))

    def with_pixels(self, pixels: np.ndarray) -> Image.Image | np.ndarray | torch.Tensor:
        """The pixels as the same kind of object as the source: a PIL image with its EXIF and ICC profile for a
        file or PIL image, an array or tensor of the source's dtype, axes and device.

        ValueError unless `pixels` is (H, W, C) with the dtype and channels of this picture; H and W may differ.
        """
        channels = self.pixels.shape[2]
        if pixels.ndim != 3 or pixels.shape[2] != channels or pixels.dtype != self.pixels.dtype:
            raise ValueError(
                f"pixels must be (H, W, {channels}) {self.pixels.dtype}, got {pixels.shape} {pixels.dtype}"
            )
        if isinstance(self.source, Image.Image):
            image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels))
            image.info = dict(self.source.info)
            return image
        if isinstance(self.source, np.ndarray):
            return (pixels[..., 0] if self.source.ndim == 2 else pixels).astype(self.source.dtype)
        planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        planes = planes.reshape(*self.source.shape[:-2], *planes.shape[-2:])
        return planes.to(self.source.device, self.source.dtype)


def read_picture(source: PictureLike | Picture, name: str = "image") -> Picture:
    """Read a picture in its own depth; `name` is what messages call it. A `Picture` is returned as it is.

    Files and PIL images: EXIF orientation is applied. Gray, gray + alpha, RGB and RGBA are kept, also 16-bit and
    float gray; palettes become RGB(A), since they cannot hold new colours; 1-bit becomes gray; CMYK, YCbCr and HSV
    become RGB. Arrays are (H, W) or (H, W, C), tensors (H, W), (C, H, W) or (1, C, H, W): uint8, uint16, or float
    in [0, 1].

    Warns (PictureWarning) where a file holds more than can be kept: 16 bits per colour channel, several frames, CMYK.
    FileNotFoundError for a missing file; ValueError for what is not a picture, is damaged or has a wrong range.
    """
    return source if isinstance(source, Picture) else _read(source, name, ends_at_8_bits=False)


def _label(source: PictureLike, name: str) -> str:
    """What messages call a picture; with a file's name."""
    return f"{name} {source}" if isinstance(source, str | Path) else name


def _read(source: PictureLike, name: str, ends_at_8_bits: bool = True) -> Picture:
    if isinstance(source, str | Path):
        label = _label(source, name)
        with open_image(Path(source), label) as image:
            return _from_upright(upright_image(image, label, ends_at_8_bits), label)
    if isinstance(source, Image.Image):
        return _from_upright(upright_image(source, name, ends_at_8_bits), name)
    return _from_array(source, name)


def _from_upright(image: Image.Image, label: str) -> Picture:
    pixels = np.asarray(image)
    _check_range(pixels, label)
    return Picture(pixels[..., None] if pixels.ndim == 2 else pixels, image)


def _from_array(source: np.ndarray | torch.Tensor, name: str) -> Picture:
    if isinstance(source, torch.Tensor):
        expected, tensor = "a tensor must be (H, W), (C, H, W) or (1, C, H, W)", source.detach().cpu()
        values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        if values.ndim == 4 and values.shape[0] == 1:
            values = values[0]
        if values.ndim == 3:
            values = values.transpose(1, 2, 0)  # (H, W, C)
    elif isinstance(source, np.ndarray):
        expected, values = "an array must be (H, W) or (H, W, C)", source
    else:
        raise ValueError(f"{name} must be a path, PIL image, numpy array or tensor, got {type(source).__name__}")
    shape = tuple(source.shape)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or not 1 <= values.shape[2] <= 4:
        raise ValueError(f"{name} has shape {shape}; {expected} with C = 1 gray, 2 gray + alpha, 3 RGB or 4 RGBA")
    if 0 in values.shape:
        raise ValueError(f"{name} has no pixels: its shape is {shape}")
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype not in (np.uint8, np.uint16, np.float16, np.float32, np.float64):
        raise ValueError(f"{name} has dtype {source.dtype}; use uint8, uint16, or float in [0, 1] (a mask may be bool)")
    _check_range(values, name)
    return Picture(values, source)


def _check_range(pixels: np.ndarray, label: str) -> None:
    if pixels.dtype.kind != "f":
        return
    low, high = float(pixels.min()), float(pixels.max())
    if not math.isfinite(low + high):
        raise ValueError(f"{label} holds NaN or infinite values")
    if low < -1e-3 or high > 1 + 1e-3:  # a resampling filter may overshoot a little
        raise ValueError(f"{label} has float values from {low:g} to {high:g}; floats must be in [0, 1]")


# --- masks ------------------------------------------------------------------------------------------------


def read_mask(source: MaskLike, size: tuple[int, int], name: str = "mask", fit: bool = False) -> np.ndarray:
    """Read what to repaint in an image of `size` (height, width): bool (H, W), True = repaint.

    source: a picture (white = repaint, cut at 50 %), a bool array or tensor, a box (x0, y0, x1, y1) in pixels with
        exclusive right and bottom edges, or a polygon of three or more (x, y) points; a pixel belongs to a box or
        polygon if its centre does. Of a mask picture with alpha the luminance times alpha is taken; if its colour
        is the same everywhere and its alpha is not, alpha alone (opaque = repaint).
    fit: resize a picture of another size.

    ValueError if the mask has another size than the image, reaches outside it, is empty or covers all of it.
    Warns (PictureWarning) if more than 5 % of a mask picture is gray.
    """
    height, width = size
    if isinstance(source, PictureLike):
        values = _read_mask_values(source, size, name, fit)
        name = _label(source, name)
        gray = np.count_nonzero((values > 0.1) & (values < 0.9)) / values.size
        if gray > _GRAY_SHARE and not fit:  # resizing makes gray
            warnings.warn(
                f"{gray:.0%} of {name} is gray; what is lighter than 50 % is repainted",
                PictureWarning,
                stacklevel=2,
            )
        repaint, reason = values >= 0.5, f"its lightest value is {values.max():.2%} of white"
    else:
        repaint, reason = _draw(source, size, name), "it contains no pixel's centre"
    if not repaint.any():
        raise ValueError(f"{name} is empty ({reason}); white = repaint; a mask of 0 and 1 must be bool or float")
    if repaint.all():
        raise ValueError(f"{name} covers the whole image of {width}x{height}; white = repaint: is it inverted?")
    return repaint


def _read_mask_values(source: PictureLike, size: tuple[int, int], name: str, fit: bool) -> np.ndarray:
    """A mask picture as float32 (H, W), 0 keep to 1 repaint; one of another size is resized where it is to `fit`."""
    if isinstance(source, torch.Tensor) and source.dtype == torch.bool:
        source = source.to(torch.uint8) * 255
    elif isinstance(source, np.ndarray) and source.dtype == bool:
        source = source.astype(np.uint8) * 255
    picture = _read(source, name)
    if picture.size != tuple(size) and not fit:
        (mask_height, mask_width), (height, width) = picture.size, size
        turned = " (turned: EXIF orientation is applied to both)" if picture.size == (width, height) else ""
        raise ValueError(
            f"{_label(source, name)} is {mask_width}x{mask_height}, but the picture it belongs to is {width}x{height} "
            f"(width x height){turned}; fit_mask resizes it"
        )
    height, _, channels = picture.pixels.shape
    first = _floats(picture.pixels[:1, :1])[..., : channels - 1]
    values, alpha = np.empty(picture.size, np.float32), np.ones(picture.size if channels in (2, 4) else (), np.float32)
    is_flat = True
    for rows in _strips(height):
        strip = _floats(picture.pixels[rows])
        colour = strip[..., : 3 if channels >= 3 else 1]
        values[rows] = colour @ np.array(LUMINANCE, np.float32) if channels >= 3 else colour[..., 0]
        if channels in (2, 4):
            alpha[rows] = strip[..., -1]
            is_flat = is_flat and bool((colour == first).all())
    of_alpha = channels in (2, 4) and is_flat and alpha.min() < alpha.max()
    found = alpha if of_alpha else np.multiply(values, alpha, out=values)
    if picture.size == tuple(size):
        return found
    return np.asarray(Image.fromarray(found).resize(size[::-1], Image.Resampling.BILINEAR))


def _floats(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / white_level(pixels.dtype)


def _strips(height: int) -> Iterator[slice]:
    """The rows of a picture in strips: the floats of all its pixels would take gigabytes."""
    return (slice(top, min(top + 64, height)) for top in range(0, height, 64))


def _draw(source: MaskLike, size: tuple[int, int], name: str) -> np.ndarray:
    """A box or polygon as a bool (H, W) mask."""
    height, width = size
    try:
        numbers = np.array(source, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    is_box = numbers.shape == (4,)
    if not is_box and not (numbers.ndim == 2 and numbers.shape[1] == 2 and len(numbers) >= 3):
        raise ValueError(
            f"{name} must be a picture, a box (x0, y0, x1, y1) or a polygon of 3 or more (x, y) points, "
            f"got {shown(source)}"
        )
    if is_box:
        x0, y0, x1, y1 = numbers
        if not (x0 < x1 and y0 < y1):
            raise ValueError(f"{name}: box {source} has no area; it is (x0, y0, x1, y1) with x0 < x1 and y0 < y1")
        numbers = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    if not ((numbers >= 0) & (numbers <= (width, height))).all():
        raise ValueError(f"{name}: {source} reaches outside the image of {width}x{height} pixels (width x height)")
    if numbers.max() <= 1 and (numbers % 1).any():
        raise ValueError(f"{name}: {source} looks like shares of the size; give pixels, the image is {width}x{height}")
    return fill_polygon(numbers, size)


def fill_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie inside a polygon (N, 2) of (x, y), by the even-odd rule: bool (H, W)."""
    height, width = size
    (xa, ya), (xb, yb) = points.T[..., None], np.roll(points, -1, axis=0).T[..., None]  # (N, 1) each
    centre_y = np.arange(height) + 0.5
    crossed = (centre_y >= np.minimum(ya, yb)) & (centre_y < np.maximum(ya, yb))  # (N, H)
    edge, row = np.nonzero(crossed)
    xa, ya, xb, yb = (value[edge, 0] for value in (xa, ya, xb, yb))
    x = xa + (centre_y[row] - ya) * (xb - xa) / (yb - ya)
    column = np.ceil(x - 0.5).clip(0, width).astype(np.int64)  # the first centre at or right of the edge
    crossings = np.bincount(row * (width + 1) + column, minlength=height * (width + 1)).astype(np.uint8)
    inside = np.bitwise_xor.accumulate(crossings.reshape(height, width + 1)[:, :-1] & 1, axis=1)
    return inside.astype(bool)


# --- exemplars --------------------------------------------------------------------------------------------


def read_exemplar(
    source: PictureLike, mask: MaskLike | None = None, name: str = "exemplar", fit: bool = False
) -> Image.Image:
    """Read an exemplar: an 8-bit RGB image or, cropped to its object where a mask or alpha says where that is, RGBA.

    The alpha is that of a `mask` (white = object; anything that read_mask takes) or, without one, the picture's own;
    `over_white` gives what CLIP sees. Colours of an ICC profile are converted to sRGB. ValueError if the mask has
    another size, and is not to `fit`, or is empty.
    """
    picture = _read(source, name)
    colours = picture
    profile = picture.source.info.get("icc_profile") if isinstance(picture.source, Image.Image) else None
    if profile and (converted := to_srgb(picture.to_rgb8(), profile, _label(source, name))) is not None:
        colours = replace(picture, pixels=np.asarray(converted))
    if isinstance(mask, PictureLike):
        shown = _read_mask_values(mask, picture.size, f"{name}'s mask", fit)
    elif mask is not None:
        shown = _draw(mask, picture.size, f"{name}'s mask").astype(np.float32)
    elif picture.pixels.shape[2] in (2, 4):
        shown = picture.pixels[..., -1].astype(np.float32)
        shown /= white_level(picture.pixels.dtype)
    else:
        shown = np.broadcast_to(np.float32(1), picture.size)
    if shown.max() < 0.5:
        raise ValueError(f"{_label(source, name)} is empty: its {'alpha' if mask is None else 'mask'} shows no object")
    box = mask_bounding_box(shown >= 0.5)
    cut = np.empty((box.height, box.width, 3 if shown[box.slices].min() == 1 else 4), np.uint8)
    for rows in _strips(box.height):
        strip = Box(box.x0, box.y0 + rows.start, box.x1, box.y0 + rows.stop)
        rgb = colours.rgb(strip)[0].permute(1, 2, 0).numpy() / 2 + 0.5  # in [0, 1]
        cut[rows] = np.rint(np.dstack([rgb, shown[strip.slices]])[..., : cut.shape[2]] * 255)
    del picture, colours, shown
    return Image.fromarray(cut)


def over_white(image: Image.Image) -> Image.Image:
    """An RGBA image as RGB, white where it is transparent, as CLIP sees an exemplar; another image as it is."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def exemplar_tensor(image: Image.Image, size: int = 224) -> torch.Tensor:
    """CLIP's input: float32 (1, 3, size, size), resized by Pillow's bicubic filter whatever the aspect (as the
    original does) and normalised by CLIP's mean and standard deviation; white around an object that alpha shows.
    ValueError if neither RGB nor RGBA."""
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(f"an exemplar must be an RGB or RGBA image, got mode {image.mode!r}; see read_exemplar")
    pixels = np.asarray(over_white(image).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    pixels = (pixels - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def shown_tensor(image: Image.Image, size: int = 224) -> torch.Tensor:
    """Where the object is in what `exemplar_tensor` gives: float32 (1, 1, size, size) in [0, 1]."""
    if image.mode != "RGBA":
        return torch.ones(1, 1, size, size)
    alpha = image.getchannel("A").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(alpha, dtype=np.float32) / 255)[None, None]
