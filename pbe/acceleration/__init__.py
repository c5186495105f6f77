"""Faster forms of the networks for sampling: exact, derived from a model, never saved and never trained.

    prepared = prepare_for_inference(model)
    pictures = pbe.edit(prepared, "photo.png", "mask.png", "exemplar.png")

`pbe.edit` prepares an ordinary model for each call; for several edits it is faster to prepare it once.
"""

from pbe.acceleration.compiled import Compile, is_compiled
from pbe.acceleration.prepare import PreparedModel, prepare_for_inference

__all__ = ["Compile", "PreparedModel", "is_compiled", "prepare_for_inference"]
