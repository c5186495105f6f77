"""COCOEE, the test set of Paint by Example (arXiv 2211.13227, section 4.1): 3,500 edits with given exemplars."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pbe.data.records import MaskFile, Record, number_photos


class CocoEE:
    """A folder of `GT_3500/<id>_GT.png`, `Ref_3500/<id>_ref.png`, `Mask_bbox_3500/<id>_mask.png` and `id_list.npy`.

    The ids are zero-filled to 12 digits; masks are white where to repaint. Each record is fixed, with one box and the
    mask it was taken from. FileNotFoundError where any file is missing: results on a part of it cannot be compared.
    """

    def __init__(self, folder: str | Path) -> None:
        self.name, self._folder = str(folder), Path(folder)
        listed = self._folder / "id_list.npy"
        if not listed.is_file():
            raise FileNotFoundError(f"{listed}: there is no such file; a folder of COCOEE has one")
        try:
            ids = np.load(listed, mmap_mode="r", allow_pickle=False)  # mapped: a header may claim any size
        except Exception as error:  # numpy raises almost anything for a damaged header
            raise ValueError(f"{listed} cannot be read as an array: {error}") from None
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
            found = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else "several arrays"
            raise ValueError(f"{listed} must hold a list of integers, got {found}")
        self._ids = ids
        self.photos = number_photos(ids.tolist())
        missing = [path for i in range(len(ids)) for path in self._paths(i) if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} files of {folder} are missing; the first is {missing[0]}")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> Record:
        image, exemplar, mask_file = self._paths(i)
        mask = MaskFile(mask_file).read()
        return Record(image, mask.box(), (mask,), exemplar, repaint_masks=True, fixed=True)

    def _paths(self, i: int) -> tuple[Path, Path, Path]:
        """The files of image, exemplar and mask."""
        name, folder = f"{self._ids[i]:012d}", self._folder
        return (
            folder / f"GT_3500/{name}_GT.png",
            folder / f"Ref_3500/{name}_ref.png",
            folder / f"Mask_bbox_3500/{name}_mask.png",
        )
