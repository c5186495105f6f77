"""Published figures on COCOEE, for reference."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One system's figures by column; what a source does not give is not there."""

    system: str
    source: str
    figures: dict[str, float]


PAPER = "Paint by Example, arXiv 2211.13227"
LATER = "later papers' tables"
COLUMNS = {
    "fid": "FID ↓",
    "qs": "QS ↑",
    "clip_score": "CLIP score ↑",
    "foreground_clip": "foreground CLIP ↑",
    "foreground_dino": "foreground DINO ↑",
    "foreground_fid": "foreground FID ↓",
    "background_lpips": "background LPIPS ↓",
}


def _later(clip: float, dino: float, foreground_fid: float, lpips: float, fid: float, qs: float) -> dict[str, float]:
    return {
        "fid": fid,
        "qs": qs,
        "foreground_clip": clip,
        "foreground_dino": dino,
        "foreground_fid": foreground_fid,
        "background_lpips": lpips,
    }


PUBLISHED = (
    Published("Paint by Example", PAPER, {"fid": 3.18, "qs": 77.80, "clip_score": 84.97}),
    Published("ablation: naive", PAPER, {"fid": 3.61}),
    Published("ablation: + prior", PAPER, {"fid": 3.40, "clip_score": 88.79}),
    Published("ablation: + augmentation", PAPER, {"clip_score": 81.68}),
    Published("ablation: + bottleneck", PAPER, {"fid": 3.26}),
    Published("Paint by Example", LATER, _later(84.84, 52.52, 6.24, 0.116, 3.18, 77.80)),
    Published("ObjectStitch", LATER, _later(85.97, 61.12, 6.86, 0.116, 3.35, 76.86)),
    Published("AnyDoor", LATER, _later(89.7, 70.16, 10.5, 0.109, 3.60, 76.18)),
    Published("ControlCom", LATER, _later(88.31, 63.67, 6.28, 0.114, 3.19, 77.84)),
)
