"""Colour profiles: what an exemplar's file says of its colours, brought to the sRGB that the networks know."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageCms

from pbe.images.pillow import UNREADABLE, PictureWarning

SAME = 2  # largest difference, of 255, that is taken for the rounding of a profile of sRGB itself
_LEVELS = np.linspace(0, 255, 9).astype(np.uint8)
_SAMPLES = Image.fromarray(np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS), axis=-1).reshape(9, 81, 3))


def to_srgb(image: Image.Image, icc_profile: bytes, label: str) -> Image.Image | None:
    """An 8-bit RGB image of the profile's colours in sRGB; None where they are that already.

    Warns (PictureWarning) where the profile cannot be applied, which makes None too.
    """
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        mode = "L" if profile.profile.xcolor_space.strip() == "GRAY" else "RGB"
        if mode == "L" and image.convert("L").convert("RGB") != image:
            raise ValueError("it is a profile of gray")
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        samples = _SAMPLES.convert(mode)
        moved = np.asarray(ImageCms.applyTransform(samples, transform), np.int16)
        if np.abs(moved - np.asarray(samples.convert("RGB"), np.int16)).max() <= SAME:
            return None
        return ImageCms.applyTransform(image.convert(mode), transform)
    except (*UNREADABLE, ImageCms.PyCMSError, ImportError) as error:
        warnings.warn(
            f"{label} has a colour profile that cannot be applied, so its colours are taken for sRGB: {error}",
            PictureWarning,
            stacklevel=3,
        )
        return None
