"""Edits of arrays inside a program that goes on running, such as a web service: the model is prepared once.

python examples/serve_edits.py outputs/served.png
"""

import sys
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image

import pbe
from pbe.editing.settings import settings_for


class Editor:
    """Repaints photos as exemplars; may be called from several threads, which take turns."""

    def __init__(self, checkpoint: str = "demo", **settings):
        model = pbe.load_model(checkpoint, device="auto", dtype="auto")
        # a wrong one is an error now, not at the first request
        self.settings = settings_for(settings, model.config.distilled)
        self.model = pbe.prepare_for_inference(model, consume=True)
        self.lock = Lock()

    def __call__(self, photo: np.ndarray, mask: np.ndarray, exemplar: np.ndarray, seed: int = 0) -> np.ndarray:
        """The photo (H, W, 3) uint8 with the white of the mask (H, W) repainted as the exemplar (h, w, 3) uint8.

        ValueError says what is wrong with an array, and what would be right: an answer for whoever sent it.
        """
        with self.lock:
            (result,) = pbe.edit(self.model, photo, mask, exemplar, **{**vars(self.settings), "seed": seed})
        return result


def main(out: str, steps: int = 20) -> None:
    examples = Path(__file__).resolve().parent
    photo, mask, red = (
        np.asarray(Image.open(examples / name)) for name in ("flower.jpg", "flower_mask.png", "flower_red.jpg")
    )
    edit = Editor("demo", sampler="dpm_solver", spacing="trailing", steps=steps, guidance=3.0)
    results = [edit(photo, mask, red, seed=seed) for seed in range(3)]
    Image.fromarray(np.hstack(results)).save(out)
    try:
        edit(photo, mask[:100], red)
    except ValueError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
