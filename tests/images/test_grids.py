"""Grids of pictures: where the cells lie, and that no text leaves its place."""

import numpy as np
import pytest
from PIL import Image

from pbe.images.grids import grid

WHITE = (255, 255, 255)


def plain(colour: str, width: int = 60, height: int = 40) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def boxes_of(picture: Image.Image, *colours: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    """(x0, y0, x1, y1) around all pixels of each colour."""
    pixels = np.asarray(picture)
    found = []
    for colour in colours:
        y, x = np.nonzero((pixels == colour).all(axis=-1))
        found.append((x.min(), y.min(), x.max() + 1, y.max() + 1))
    return found


RED, LIME, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_cells_have_one_height_and_one_gutter():
    picture = grid([[plain("red"), plain("lime", 200, 200), plain("blue", 30, 90)]], cell_height=120)
    red, lime, blue = boxes_of(picture, RED, LIME, BLUE)
    assert {box[3] - box[1] for box in (red, lime, blue)} == {120}
    assert (red[2] - red[0], lime[2] - lime[0], blue[2] - blue[0]) == (180, 120, 40)
    gutters = {red[0], lime[0] - red[2], blue[0] - lime[2], picture.width - blue[2], red[1], picture.height - red[3]}
    assert len(gutters) == 1
    assert gutters.pop() > 0


def test_panorama_is_fitted_in_width():
    picture = grid([[plain("red", 1000, 100)]], cell_height=100)
    ((x0, y0, x1, y1),) = boxes_of(picture, RED)
    assert (x1 - x0, y1 - y0) == (200, 20)


def test_empty_place_stays_white_and_columns_line_up():
    picture = grid([[plain("red"), plain("lime")], [None, plain("blue")]], cell_height=100)
    red, lime, blue = boxes_of(picture, RED, LIME, BLUE)
    assert (blue[0], blue[2]) == (lime[0], lime[2])
    assert (np.asarray(picture)[blue[1] : blue[3], red[0] : red[2]] == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_become_rgb(mode):
    assert grid([[plain("red").convert(mode)]]).mode == "RGB"


def dark(picture: Image.Image) -> np.ndarray:
    """Bool (H, W): text, whose antialiased pixels are gray."""
    pixels = np.asarray(picture).astype(int)
    return (pixels.max(-1) < 200) & (pixels.max(-1) - pixels.min(-1) < 8)


def test_captions_stand_under_their_pictures_and_never_wider():
    long = "a caption that is far too long for the picture it stands under, by any measure"
    picture = grid([[plain("red"), plain("lime")]], captions=[[long, "short"]], cell_height=120)
    red, lime = boxes_of(picture, RED, LIME)
    rows, columns = np.nonzero(dark(picture))
    assert rows.min() >= red[3]
    assert rows.max() < picture.height
    left, right = columns[columns < red[2]], columns[columns >= lime[0]]
    assert len(left) + len(right) == len(columns)  # none in the gutter
    assert left.min() >= red[0] - 1  # antialiasing may reach one pixel over
    assert len(left) > 0
    assert right.max() < lime[2]
    assert abs((right.min() + right.max()) / 2 - (lime[0] + lime[2]) / 2) < 3  # centred


def test_labels_stand_beside_and_above():
    rows = [[plain("red"), plain("red")], [plain("blue"), plain("blue")]]
    picture = grid(rows, row_labels=["one", "two"], column_labels=["left", "right"], cell_height=120)
    red, blue = boxes_of(picture, RED, BLUE)
    text = dark(picture)
    assert text[: red[1], red[0] :].any()
    assert text[red[1] : red[3], : red[0]].any()
    assert text[blue[1] : blue[3], : blue[0]].any()
    text[: red[1], red[0] :] = False
    text[:, : red[0]] = False
    assert not text.any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rows": []}, "at least one picture"),
        ({"rows": [[None]]}, "at least one picture"),
        ({"rows": [[plain("red")]], "captions": [["a", "b"]]}, "captions"),
        ({"rows": [[plain("red")]], "row_labels": ["a", "b"]}, "2 row labels for 1 rows"),
        ({"rows": [[plain("red")]], "column_labels": ["a", "b"]}, "2 column labels for 1 columns"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid(**arguments)
