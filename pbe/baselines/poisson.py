"""Seamless cloning: the source's gradients inside a region, the target's colours around it (Pérez et al. 2003).

The equation is solved exactly, as the baseline is published; `pbe.images.seams` has a quick approximation for editing.
"""

import numpy as np

from pbe.images.windows import mask_bounding_box


def poisson_blend(target: np.ndarray, source: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The target with the source cloned into a region: float64 (H, W, C), not clipped to any range.

    `target` and `source` are (H, W, C), `region` is bool (H, W). Inside, the result has the source's Laplacian, with
    the target as the boundary's value; the picture's own border is not a boundary (the gradient across it is 0). The
    source is read in the region and one pixel around it.

    ValueError for a region that is empty or covers the whole picture: nothing would fix the colours.
    """
    if region.all():
        raise ValueError("the region covers the whole picture: Poisson blending needs a boundary")
    result = np.array(target, dtype=np.float64)
    window = mask_bounding_box(region).grown(1, region.shape).slices
    difference = result[window] - source[window]
    inside = region[window]
    # f = source + u, where u is harmonic inside and the difference of the pictures around it
    result[window][inside] = (source[window] + membrane(difference, inside))[inside]
    return result


def membrane(values: np.ndarray, inside: np.ndarray, tolerance: float = 1e-8) -> np.ndarray:
    """The harmonic function that continues `values` (h, w, C) from outside into the `inside` (h, w): 0 outside.

    Solves sum over p's neighbours q of (u_p - u_q) = 0 for each pixel p inside by conjugate gradients, which the direct
    solution on its bounding box preconditions: for a region that is a box they end after one step.
    """
    box = mask_bounding_box(inside).slices
    inside = inside[..., None]

    def precondition(residual: np.ndarray) -> np.ndarray:
        nearly = np.zeros_like(residual)
        nearly[box] = solve_box(residual[box])
        return inside * nearly

    degree = sum_of_neighbours(np.ones(inside.shape))
    b = inside * sum_of_neighbours(np.where(inside, 0.0, values))
    scale = np.sqrt((b**2).sum(axis=(0, 1)))
    scale[scale == 0] = 1.0  # a channel with the same colours around: u = 0 is exact at once

    u = np.zeros_like(b)
    residual = b
    direction = preconditioned = precondition(residual)
    energy = (residual * preconditioned).sum(axis=(0, 1))
    for _ in range(inside.size):
        if (np.sqrt((residual**2).sum(axis=(0, 1))) <= tolerance * scale).all():
            return u
        image = inside * (degree * direction - sum_of_neighbours(direction))
        curvature = (direction * image).sum(axis=(0, 1))
        step = np.divide(energy, curvature, out=np.zeros_like(energy), where=curvature > 0)
        u = u + step * direction
        residual = residual - step * image
        preconditioned = precondition(residual)
        last, energy = energy, (residual * preconditioned).sum(axis=(0, 1))
        direction = preconditioned + np.divide(energy, last, out=np.zeros_like(energy), where=last > 0) * direction
    raise RuntimeError(f"Poisson blending did not converge to {tolerance} for a region of {inside.sum()} pixels")


def sum_of_neighbours(x: np.ndarray) -> np.ndarray:
    """The sum over the up to four neighbours of each pixel of x (h, w, C)."""
    total = np.zeros_like(x, dtype=np.float64)
    total[1:] += x[:-1]
    total[:-1] += x[1:]
    total[:, 1:] += x[:, :-1]
    total[:, :-1] += x[:, 1:]
    return total


def solve_box(b: np.ndarray) -> np.ndarray:
    """Solves 4 u_p - sum of u_q = b_p on a rectangle, b (h, w, C), with u = 0 around it: sines are eigenvectors."""
    rows, columns = (4 * np.sin(np.pi * np.arange(1, n + 1) / (2 * (n + 1))) ** 2 for n in b.shape[:2])
    spectrum = sine_transform(sine_transform(b, 0), 1) / (rows[:, None] + columns)[..., None]
    return sine_transform(sine_transform(spectrum, 0), 1)


def sine_transform(x: np.ndarray, axis: int) -> np.ndarray:
    """The orthonormal sine transform DST-I along an axis, its own inverse: the FFT of the odd continuation."""
    x = np.moveaxis(x, axis, -1)
    n = x.shape[-1]
    odd = np.zeros((*x.shape[:-1], 2 * (n + 1)))
    odd[..., 1 : n + 1] = x
    odd[..., n + 2 :] = -x[..., ::-1]
    y = -np.fft.rfft(odd).imag[..., 1 : n + 1] / np.sqrt(2 * (n + 1))
    return np.moveaxis(y, -1, axis)
