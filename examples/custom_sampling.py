"""The library's parts in code of your own: Heun's method as a sampler, and an edit's steps one by one.

python examples/custom_sampling.py outputs/heun.png
"""

import sys
from pathlib import Path

import torch

import pbe
from pbe.images.reading import exemplar_tensor, read_exemplar, read_mask, read_picture
from pbe.images.saving import save_picture
from pbe.images.seams import poisson_blend
from pbe.images.windows import choose_window, composite, extract_repaint, feather_weights, model_size, resample
from pbe.sampling import NoiseSchedule, guided_eps, make_generators, randn, sampler, trailing
from pbe.sampling.samplers import ddim_step, evaluate

EXAMPLES = Path(__file__).resolve().parent


@sampler(noise="never")
def heun(eps, x_t, grid, draw, eta):
    """Each step goes along the mean of the noise predicted at its start and at its end (DDIM's own is the first)."""
    for i, (t, alpha_bar_t, alpha_bar_prev) in enumerate(grid):
        eps_t = evaluate(eps, x_t, t)
        if i + 1 < len(grid):
            x_prev, _ = ddim_step(x_t, eps_t, alpha_bar_t, alpha_bar_prev)
            eps_t = (eps_t + evaluate(eps, x_prev, grid[i + 1].t)) / 2
        x_t, z_0 = ddim_step(x_t, eps_t, alpha_bar_t, alpha_bar_prev)
        yield x_t, z_0


@torch.no_grad()
def main(out: str, steps: int = 10, guidance: float = 2.0, seed: int = 0) -> None:
    model = pbe.load_model("demo", device="cpu", dtype="float32")
    photo = read_picture(EXAMPLES / "flower.jpg")
    repaint = read_mask(EXAMPLES / "flower_mask.png", photo.size)  # (H, W), True = repaint

    # what the model sees: a window around the mask, at its own resolution
    window = choose_window(repaint, model.config.resolution)
    size = model_size(window, model.config.resolution)
    image = resample(photo.rgb(window), size)  # (1, 3, H, W) in [-1, 1]
    mask = 1 - extract_repaint(repaint, window, size)  # (1, 1, H, W), 1 = keep
    exemplar = exemplar_tensor(read_exemplar(EXAMPLES / "flower_red.jpg"), model.config.exemplar.vision.image_size)

    condition = model.condition(image, mask, exemplar)
    grid = trailing(NoiseSchedule.scaled_linear().first(model.config.num_timesteps), steps)
    x_T = randn(condition.z_masked.shape[1:], make_generators(seed, 1))
    x_T = grid.start_from(model.start(condition), x_T)
    z_0 = heun(guided_eps(model, condition, guidance, grid), x_T, grid, callback=lambda step: print(f"t = {step.t}"))
    edited = model.vae.decode(z_0)  # (1, 3, H, W), about [-1, 1]

    edited = poisson_blend(edited, image, mask)
    pixels = composite(photo.pixels, edited, window, feather_weights(repaint, width=4))
    save_picture(photo.with_pixels(pixels), Path(out))


if __name__ == "__main__":
    main(sys.argv[1])
