"""The Gaussian mixture behind the quality score (QS), kept as plain arrays.

It is fitted by scikit-learn (the extra `eval`) and evaluated here. A mixture that others pickled, such as the released
`coco2017_gmm_k20`, is read as data: nothing in the file is imported or called (see `pbe.checkpoints.formats.pickles`).
"""

from __future__ import annotations

import math
import pickle
import zipfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbe.checkpoints.formats.pickles import Placeholder, read_pickle
from pbe.io.atomic import replacing

MAX_COMPONENTS = 1_000
MAX_INFLATED = 1 << 26  # bytes that come of a small file
MAX_EXPANDED = 1 << 25  # numbers: precisions that a file gives in short, as their diagonals
ARRAYS = ("weights", "means", "precisions_cholesky")


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """p(x) = Σ_k w_k N(x; μ_k, Σ_k), in float64.

    weights: w (K,). means: μ (K, C). precisions_cholesky: P (K, C, C) with Σ_k⁻¹ = P_k P_kᵀ, upper triangular.
    features: which features it was fitted on, in words; "" where that is not known.
    """

    weights: Tensor
    means: Tensor
    precisions_cholesky: Tensor
    features: str = ""

    def __post_init__(self) -> None:
        K, C = self.means.shape if self.means.ndim == 2 else (0, 0)
        shapes = tuple(tuple(getattr(self, name).shape) for name in ARRAYS)
        if shapes != ((K,), (K, C), (K, C, C)) or not K:
            raise ValueError(f"weights, means and precisions of a mixture are (K,), (K, C), (K, C, C), got {shapes}")
        if K > MAX_COMPONENTS:
            raise ValueError(f"a mixture of {K:,} Gaussians; expected at most {MAX_COMPONENTS:,}")
        if not all(getattr(self, name).isfinite().all() for name in ARRAYS) or (self.weights < 0).any():
            raise ValueError("a mixture's weights, means and precisions must be finite, and its weights 0 or more")

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x), float64 (B,), of features (B, C)."""
        C = self.means.shape[1]
        if x.ndim != 2 or x.shape[1] != C:
            raise ValueError(f"this mixture is over {C} features, got {tuple(x.shape)}")
        x = x.double()
        log_terms = []
        for w, mu, P in zip(self.weights, self.means, self.precisions_cholesky, strict=True):
            # log N = -½ (C log 2π + |(x - μ)ᵀ P|²) + log det P
            distance = ((x - mu) @ P).square().sum(dim=1)
            log_terms.append(w.log() - (C * math.log(2 * math.pi) + distance) / 2 + P.diagonal().log().sum())
        return torch.logsumexp(torch.stack(log_terms, dim=1), dim=1)

    def to(self, device: torch.device) -> GaussianMixture:
        arrays = {name: getattr(self, name).to(device) for name in ARRAYS}
        return replace(self, **arrays)


def check_fit(N: int, C: int, components: int) -> None:
    """Raises what `fit_mixture` does for N pictures of C features, before their features are computed."""
    if find_spec("sklearn") is None:
        raise ImportError("fitting a mixture needs scikit-learn, the extra eval: pip install pbe[eval]")
    if components < 1:
        raise ValueError(f"components must be 1 or more, got {components}")
    if N < components * C:
        raise ValueError(f"{components} components over {C} features need {components * C} pictures or more, got {N}")


def fit_mixture(features: Tensor, components: int = 20, seed: int = 0, described: str = "") -> GaussianMixture:
    """A mixture of `components` full Gaussians fitted to features (N, C) by scikit-learn.

    ImportError without the extra `eval`; ValueError for fewer pictures than components times features, of which
    covariances would be singular.
    """
    N, C = features.shape
    check_fit(N, C, components)
    from sklearn.mixture import GaussianMixture as Fit

    fit = Fit(components, covariance_type="full", random_state=seed).fit(features.double().numpy())
    return GaussianMixture(
        torch.from_numpy(fit.weights_),
        torch.from_numpy(fit.means_),
        torch.from_numpy(fit.precisions_cholesky_),
        described,
    )


# --- files ------------------------------------------------------------------------------------------------


def check_name(path: Path) -> None:
    """ValueError for a file that `save_mixture` would not write."""
    if path.suffix != ".npz":
        raise ValueError(f"{path}: a mixture's file ends in .npz")


def save_mixture(mixture: GaussianMixture, path: str | Path, overwrite: bool = False) -> None:
    """Writes an `.npz` file of plain arrays; FileExistsError for an existing file unless `overwrite` is set."""
    path = Path(path)
    check_name(path)
    arrays = {name: getattr(mixture, name).cpu().numpy() for name in ARRAYS}
    with replacing(path, overwrite) as part, part.open("wb") as file:
        np.savez(file, features=np.array(mixture.features), **arrays)


def load_mixture(path: str | Path) -> GaussianMixture:
    """Reads what `save_mixture` wrote; FileNotFoundError, or ValueError for another file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such mixture")
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(member.file_size for member in archive.infolist())
        if inflated > max(MAX_INFLATED, 8 * path.stat().st_size):
            raise ValueError(f"it inflates to {inflated:,} bytes")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name].astype(np.float64)) for name in ARRAYS}
            return GaussianMixture(**arrays, features=str(file["features"]))
    except Exception as error:  # a damaged file may fail in any way
        raise ValueError(f"{path} is not a mixture of this library ({error}); convert-mixture reads a pickle") from None


def convert_mixture(path: str | Path, described: str = "") -> GaussianMixture:
    """The mixture in a pickle of scikit-learn's GaussianMixture, of any covariance type; nothing in it is executed.

    Of Python 3's pickles (protocol 2 and above). FileNotFoundError, or ValueError where the file is not such a pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            found, _ = read_pickle(file)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not a sound pickle: {error}") from None
    state = found.state if isinstance(found, Placeholder) else None
    if not (isinstance(state, dict) and type(found).name.startswith("sklearn.mixture.")):
        raise ValueError(f"{path} does not hold a mixture of scikit-learn")
    names = ("weights_", "means_", "precisions_cholesky_")
    missing = [name for name in (*names, "covariance_type") if name not in state]
    if missing:
        raise ValueError(f"{path} holds a mixture that was not fitted: it has no {', '.join(missing)}")
    try:
        weights, means, P = (torch.from_numpy(_array(state[name])) for name in names)
        return GaussianMixture(weights, means, _full(P, state["covariance_type"], *means.shape), described)
    except (ValueError, TypeError, RuntimeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"{path} holds a mixture that cannot be read: {error}") from None


def _full(P: Tensor, kind: Any, K: int, C: int) -> Tensor:
    """Precisions' Cholesky factors of one of scikit-learn's covariance types, as (K, C, C)."""
    if kind == "full":
        return P
    if K * C * C > MAX_EXPANDED:
        raise ValueError(f"{K:,} covariances of {C:,} features are too large")
    match kind:
        case "tied":
            return P.expand(K, C, C).contiguous()
        case "diag":
            return torch.diag_embed(P)
        case "spherical":
            return P[:, None, None] * torch.eye(C, dtype=P.dtype)
    raise ValueError(f"its covariance type is {kind!r}, not full, tied, diag or spherical")


def _array(value: Any) -> np.ndarray:
    """A numpy array of floats from what `read_pickle` keeps of it: its shape, dtype and bytes; float64."""
    match value:
        case Placeholder(state=(_, tuple() as shape, dtype, fortran, data)):  # multiarray._reconstruct, then a state
            layout = "F" if fortran else "C"
        case Placeholder(args=(data, dtype, tuple() as shape, str() as layout)):  # numeric._frombuffer, of protocol 5
            pass
        case _:
            raise ValueError("a field is not an array")
    if isinstance(data, Placeholder) and data.args and isinstance(data.args[0], str):
        data = data.args[0].encode("latin-1")  # _codecs.encode, of protocol 2
    kind = dtype.args[0] if isinstance(dtype, Placeholder) and dtype.args else None
    byte_order = dtype.state[1] if isinstance(dtype, Placeholder) and isinstance(dtype.state, tuple) else None
    if not isinstance(data, bytes | bytearray) or kind not in ("f4", "f8") or byte_order not in ("<", ">"):
        raise ValueError("a field is not an array of floats")
    values = np.frombuffer(bytes(data), dtype=f"{byte_order}{kind}")
    return values.reshape(shape, order="F" if layout == "F" else "C").astype(np.float64)
