"""Draws the masks of the example photos, white where the photo is to be repainted, and makes exemplars of them.

python examples/make_examples.py
"""

from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

HERE = Path(__file__).resolve().parent

# Corners in pixels (x, y), a few outside the object, so that its edge and halo are repainted too.
CUP_RIM = (167, 11, 415, 214)
CUP_BODY = [
    (168, 112), (168, 148), (174, 182), (184, 208), (198, 230), (197, 244), (192, 262), (191, 294), (200, 308),
    (222, 315), (240, 310), (252, 292), (280, 294), (308, 288), (328, 272), (350, 250), (372, 226), (392, 200),
    (404, 172), (412, 140), (414, 112),
]  # fmt: skip
PAVILION = [
    (193, 23), (221, 23), (223, 56), (244, 78), (270, 92), (302, 103), (326, 112), (328, 130), (302, 141),
    (301, 154), (318, 159), (336, 174), (334, 184), (325, 190), (325, 222), (335, 226), (335, 238), (358, 248),
    (360, 262), (346, 274), (347, 300), (355, 304), (356, 318), (378, 328), (379, 340), (356, 366), (336, 384),
    (330, 426), (298, 426), (276, 402), (246, 398), (208, 392), (190, 370), (150, 362), (140, 344), (92, 344),
    (82, 352), (60, 350), (60, 334), (66, 326), (74, 318), (76, 278), (58, 276), (57, 258), (74, 244), (90, 238),
    (88, 226), (94, 218), (94, 190), (80, 188), (78, 168), (98, 158), (113, 152), (112, 142), (92, 134), (90, 106),
    (118, 95), (150, 88), (182, 68), (189, 52),
]  # fmt: skip

SUIT = [
    (112, 206), (72, 238), (49, 264), (37, 296), (18, 382), (20, 425), (14, 481), (0, 511), (274, 511), (274, 468),
    (280, 439), (293, 406), (304, 387), (327, 364), (345, 352), (364, 352), (357, 307), (342, 266), (326, 246),
    (306, 236), (301, 254), (287, 274), (263, 290), (239, 294), (201, 291), (173, 277), (153, 261), (118, 222),
]  # fmt: skip
UNIFORM = [
    (497, 404), (480, 382), (363, 341), (330, 316), (329, 352), (318, 397), (303, 430), (300, 430), (283, 408),
    (262, 406), (240, 412), (217, 439), (203, 401), (194, 348), (200, 318), (164, 346), (55, 380), (38, 400), (30, 438),
    (8, 599), (511, 599), (511, 446),
]  # fmt: skip

HELMET = [
    (277, 512), (277, 481), (279, 450), (286, 420), (300, 389), (318, 369), (343, 352), (369, 345), (400, 343),
    (425, 348), (451, 362), (471, 384), (486, 409), (495, 435), (498, 460), (509, 468), (511, 512),
]  # fmt: skip
SHUTTLE = [
    (415, 0), (430, 19), (436, 47), (444, 40), (454, 66), (456, 109), (456, 182), (458, 204), (456, 260), (436, 264),
    (433, 237), (425, 256), (411, 266), (384, 266), (381, 241), (368, 242), (353, 225), (355, 206), (372, 182),
    (377, 124), (378, 101), (380, 70), (386, 40), (392, 54), (395, 47), (397, 19),
]  # fmt: skip

DAHLIA = (144, 60, 472, 374)
PETALS = (172, 86, 444, 358)
# Turns of the hue, where 256 is the whole circle, and what is left of the saturation.
COLOURS = {"red": (-14, 1.25), "yellow": (18, 1.3), "pink": (-38, 0.8), "violet": (-70, 0.7), "white": (0, 0.12)}


def coffee_mask() -> Image.Image:
    mask = Image.new("L", (600, 400))
    draw = ImageDraw.Draw(mask)
    draw.ellipse(CUP_RIM, fill=255)
    draw.polygon(CUP_BODY, fill=255)
    return mask


def polygon_mask(size: tuple[int, int], corners: list[tuple[int, int]]) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return mask


def china_mask() -> Image.Image:
    return polygon_mask((640, 427), PAVILION)


def astronaut_mask() -> Image.Image:
    return polygon_mask((512, 512), SUIT)


def hopper_mask() -> Image.Image:
    return polygon_mask((512, 600), UNIFORM)


def ellipse_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


def flower_mask() -> Image.Image:
    return ellipse_mask((640, 427), DAHLIA)


def cut_out(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """The object, transparent around it: a little inside of the mask, which is a little outside of its edge."""
    alpha = mask.filter(ImageFilter.MinFilter(5)).filter(ImageFilter.GaussianBlur(1))
    photo.putalpha(alpha)
    return photo.crop(alpha.getbbox())


def recoloured(flower: Image.Image, turn: int, saturation: float) -> Image.Image:
    """The dahlia in another colour, mirrored and smaller; the leaves behind it keep theirs."""
    hue, strength, value = flower.convert("HSV").split()
    hue = hue.point([(h + turn) % 256 for h in range(256)])
    strength = strength.point([min(255, round(s * saturation)) for s in range(256)])
    other = Image.merge("HSV", (hue, strength, value)).convert("RGB")
    red, _, blue = flower.split()
    petals = ImageChops.subtract(red, blue).point([min(255, 6 * max(0, x - 20)) for x in range(256)])
    petals = petals.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.GaussianBlur(1))
    return ImageOps.mirror(Image.composite(other, flower, petals)).resize((196, 196), Image.Resampling.LANCZOS)


CUT_OUTS = {  # exemplars, from which photo
    "cup": ("coffee.png", coffee_mask()),
    "dahlia": ("flower.jpg", ellipse_mask((640, 427), PETALS)),
    "helmet": ("astronaut.jpg", polygon_mask((512, 512), HELMET)),
    "shuttle": ("astronaut.jpg", polygon_mask((512, 512), SHUTTLE)),
    "suit": ("astronaut.jpg", astronaut_mask()),
    "uniform": ("hopper.jpg", hopper_mask()),
}

if __name__ == "__main__":
    for name, (photo, mask) in CUT_OUTS.items():
        with Image.open(HERE / photo) as image:
            cut_out(image.convert("RGB"), mask).save(HERE / f"{name}.webp", quality=90, method=6)
    for draw in (astronaut_mask, china_mask, coffee_mask, flower_mask, hopper_mask):
        draw().save(HERE / f"{draw.__name__}.png", optimize=True)
    with Image.open(HERE / "flower.png") as flower:
        for name, change in COLOURS.items():
            recoloured(flower.convert("RGB"), *change).save(HERE / f"flower_{name}.jpg", quality=92)
