"""Published scores on COCOEE."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One system's scores by column; what a source does not give is left out."""

    system: str
    source: str
    scores: dict[str, float]


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


LATER_COLUMNS = ("foreground_clip", "foreground_dino", "foreground_fid", "background_lpips", "fid", "qs")


def _later(system: str, *scores: float) -> Published:
    return Published(system, LATER, dict(zip(LATER_COLUMNS, scores, strict=True)))


PUBLISHED = (
    Published("Paint by Example", PAPER, {"fid": 3.18, "qs": 77.80, "clip_score": 84.97}),
    Published("ablation: naive", PAPER, {"fid": 3.61}),
    Published("ablation: + prior", PAPER, {"fid": 3.40, "clip_score": 88.79}),
    Published("ablation: + augmentation", PAPER, {"clip_score": 81.68}),
    Published("ablation: + bottleneck", PAPER, {"fid": 3.26}),
    _later("Paint by Example", 84.84, 52.52, 6.24, 0.116, 3.18, 77.80),
    _later("ObjectStitch", 85.97, 61.12, 6.86, 0.116, 3.35, 76.86),
    _later("AnyDoor", 89.7, 70.16, 10.5, 0.109, 3.60, 76.18),
    _later("ControlCom", 88.31, 63.67, 6.28, 0.114, 3.19, 77.84),
)
