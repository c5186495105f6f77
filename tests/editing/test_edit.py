"""Editing end to end on a tiny model: what is kept, what is changed, what is refused."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import pbe
from pbe.acceleration import prepare_for_inference
from pbe.baselines.poisson import membrane
from pbe.checkpoints.seeding import seeded_state
from pbe.editing.condition import read_mixture
from pbe.editing.edit import check_finite
from pbe.images.pillow import PictureWarning
from pbe.images.seams import interpolate_harmonically, poisson_blend
from pbe.models.paint_by_example import PaintByExample
from pbe.models.stable_diffusion import StableDiffusion, StableDiffusionConfig


def photo(width, height, channels=3, dtype=np.uint8, seed=0):
    values = np.random.default_rng(seed).random((height, width, channels))
    return (values * np.iinfo(dtype).max).astype(dtype) if np.issubdtype(dtype, np.integer) else values.astype(dtype)


EXEMPLAR = Image.fromarray(photo(40, 30, seed=1))
OTHER = Image.fromarray(photo(30, 40, seed=2) // 2)


def rectangle(width, height, box):
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def edit(model, image, mask, exemplar=EXEMPLAR, steps=4, **options):
    return pbe.edit(model, image, mask, exemplar, steps=steps, **options)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (4000, 3000, (1800, 1400, 1900, 1500)),  # a small thing in a large photo
        (300, 200, (50, 60, 120, 130)),
        (200, 300, (50, 60, 120, 130)),  # portrait
        (300, 200, (0, 80, 60, 140)),  # at the border
        (300, 200, (240, 140, 300, 200)),  # in a corner
        (300, 100, (20, 30, 280, 70)),  # longer than the short side
        (90, 41, (3, 3, 80, 38)),  # sides that nothing divides
        (300, 200, (150, 100, 151, 101)),  # one pixel
    ],
)
def test_keeps_every_pixel_outside_the_mask(model, width, height, box):
    image, mask = photo(width, height), rectangle(width, height, box)
    (result,) = edit(model, image, mask)
    assert result.shape == image.shape
    assert result.dtype == image.dtype
    assert np.array_equal(result[~mask], image[~mask])
    assert (result[mask] != image[mask]).mean() > 0.5


def test_a_box_a_polygon_and_a_picture_are_the_same_mask(model):
    image, box = photo(100, 80), (20, 30, 60, 70)
    picture = Image.fromarray(rectangle(100, 80, box).astype(np.uint8) * 255)
    polygon = [(20, 30), (60, 30), (60, 70), (20, 70)]
    results = [edit(model, image, mask)[0] for mask in (picture, box, polygon)]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@pytest.mark.parametrize(
    "image",
    [
        photo(80, 60, 1)[..., 0],
        photo(80, 60, 4),
        photo(80, 60, 3, np.uint16),
        photo(80, 60, 3, np.float32),
        torch.from_numpy(photo(80, 60, 3, np.float32)).permute(2, 0, 1),
    ],
    ids=["gray", "alpha", "16 bits", "float", "tensor"],
)
def test_gives_back_the_kind_and_depth_it_was_given(model, image):
    (result,) = edit(model, image, (20, 20, 60, 50))
    assert type(result) is type(image)
    assert result.shape == image.shape
    assert result.dtype == image.dtype
    before, after = np.asarray(image), np.asarray(result)
    if isinstance(image, torch.Tensor):
        before, after = before.transpose(1, 2, 0), after.transpose(1, 2, 0)
    outside = ~rectangle(80, 60, (20, 20, 60, 50))
    assert np.array_equal(before[outside], after[outside])


def test_files_keep_their_metadata(model, tmp_path):
    image = Image.fromarray(photo(80, 60))
    exif = Image.Exif()
    exif[0x010E] = "a description"
    image.save(tmp_path / "photo.png", exif=exif, icc_profile=b"profile")
    (result,) = edit(model, tmp_path / "photo.png", (20, 20, 60, 50))
    assert result.info["icc_profile"] == b"profile"
    assert b"a description" in result.info["exif"]


def test_a_result_depends_on_its_seed_alone(model):
    """The same picture alone, in a batch of four, and in batches of two; rounding may move a value by one."""
    image, mask = photo(80, 60), (20, 20, 60, 50)
    for sampler, eta in (("plms", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("dpm_solver", 0.0)):
        options = {"sampler": sampler, "eta": eta}
        four = edit(model, image, mask, seed=10, num_images=4, **options)
        pairs = edit(model, image, mask, seed=10, num_images=4, batch_size=2, **options)
        for i in range(4):
            (alone,) = edit(model, image, mask, seed=10 + i, **options)
            for other in (four[i], pairs[i]):
                assert np.abs(alone.astype(int) - other.astype(int)).max() <= 1, (sampler, i)
        assert not np.array_equal(four[0], four[1])


def test_the_exemplar_and_the_guidance_matter(model):
    image, mask = photo(80, 60), (20, 20, 60, 50)
    results = [
        edit(model, image, mask, e, guidance=g)[0] for e, g in ((EXEMPLAR, 5), (OTHER, 5), (EXEMPLAR, 0), (OTHER, 0))
    ]
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    assert np.array_equal(results[2], results[3])  # λ = 0 leaves the exemplar out


@torch.no_grad()
def test_mixing_exemplars(model):
    first, second = (read_mixture(model, e, None, None).context(model) for e in (EXEMPLAR, OTHER))
    assert torch.allclose(read_mixture(model, [EXEMPLAR, OTHER], None, [1, 0]).context(model), first, atol=1e-6)
    mixed = read_mixture(model, [EXEMPLAR, OTHER], None, [3, 1]).context(model)
    assert torch.allclose(mixed, 0.75 * first + 0.25 * second, atol=1e-6)
    assert torch.allclose(
        read_mixture(model, [EXEMPLAR, OTHER], None, None).context(model), (first + second) / 2, atol=1e-6
    )


@torch.no_grad()
def test_exemplar_masks(model):
    """Pixels outside the exemplar's mask, or under its alpha, do not matter."""
    pixels = photo(40, 30, seed=1)
    box = rectangle(40, 30, (5, 5, 25, 20))
    changed = np.where(box[..., None], pixels, 255 - pixels)
    a, b = (read_mixture(model, x, box, None).context(model) for x in (pixels, changed))
    cut_out = np.concatenate([changed, box[..., None].astype(np.uint8) * 255], axis=2)
    assert torch.equal(a, b)
    assert torch.equal(a, read_mixture(model, cut_out, None, None).context(model))
    assert not torch.equal(a, read_mixture(model, pixels, None, None).context(model))


def test_two_regions_together_or_one_by_one(model):
    image = photo(400, 200)
    mask = rectangle(400, 200, (20, 50, 80, 110)) | rectangle(400, 200, (330, 80, 380, 150))
    together, each = (edit(model, image, mask, split_mask=split)[0] for split in (False, True))
    for result in (together, each):
        assert np.array_equal(result[~mask], image[~mask])
        assert (result[50:110, 20:80] != image[50:110, 20:80]).any()
        assert (result[80:150, 330:380] != image[80:150, 330:380]).any()
    assert not np.array_equal(together, each)
    # the first region of "each" is what it would be alone
    (alone,) = edit(model, image, (20, 50, 80, 110))
    assert np.array_equal(each[:, :200], alone[:, :200])


def test_without_composite_the_window_is_the_models(model):
    image, mask = photo(100, 80), (40, 30, 60, 50)
    window, seam = (20, 10, 84, 74), "feather"
    raw, pasted = (edit(model, image, mask, composite=c, window=window, seam=seam)[0] for c in (False, True))
    window = rectangle(100, 80, (20, 10, 84, 74))
    assert np.array_equal(raw[~window], image[~window])
    assert (raw[window] != image[window]).mean() > 0.9
    # deep inside the mask both show the same
    assert np.array_equal(raw[35:45, 45:55], pasted[35:45, 45:55])


def test_full_window_and_resolution(model):
    """The model sees the whole photo at the resolution asked for."""
    image, mask = photo(96, 96), (10, 20, 60, 70)
    sizes = []
    edit(model, image, mask, window="full", callback=lambda step: sizes.append(tuple(step.x_t.shape)))
    edit(model, image, mask, window="full", resolution=96, callback=lambda step: sizes.append(tuple(step.x_t.shape)))
    assert sizes == [(1, 4, 16, 16)] * 4 + [(1, 4, 24, 24)] * 4


def test_feather_stays_inside(model):
    image, mask = photo(80, 60), rectangle(80, 60, (20, 20, 60, 50))
    hard, soft = (edit(model, image, mask, feather=width, seam="feather")[0] for width in (0, 10))
    assert np.array_equal(soft[~mask], image[~mask])
    rim = mask & ~rectangle(80, 60, (22, 22, 58, 48))
    gaps = [np.abs(result.astype(int) - image)[rim].mean() for result in (soft, hard)]
    assert gaps[0] < 0.5 * gaps[1]


# --- the seam ---------------------------------------------------------------------------------------------


def keep_around(box, height=24, width=32):
    return 1 - torch.from_numpy(rectangle(width, height, box)).float()[None, None]


def test_meeting_the_photo_takes_off_what_the_model_got_wrong_around_the_mask():
    """A false colour, and a false light that falls from one side, go on into the mask and are taken off there too."""
    keep = keep_around((9, 6, 25, 17))
    truth = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    colour = torch.tensor([0.1, -0.2, 0.3])[:, None, None]
    light = torch.linspace(-0.3, 0.5, 32).expand(1, 3, 24, 32)  # 0.4 of it across the mask

    def left(error, photo=truth):
        return (poisson_blend(truth + error, photo, keep) - truth)[..., 6:17, 9:25].abs().amax(dim=(1, 2, 3))

    assert left(colour).max() < 1e-6, "one error all around is exactly that inside"
    assert left(light).max() < 0.1, "few sweeps come near to the linear one, not more"
    of_one_photo = left(colour, truth[:1])
    assert of_one_photo[0] < 1e-6 < of_one_photo[1]


@pytest.mark.parametrize("shape", ["box", "disc", "corner"])
def test_values_go_on_as_a_harmonic_function(shape):
    """Against the exact solution, by conjugate gradients: few sweeps come near it, and an edit's errors are small."""
    y, x = np.mgrid[:60, :72]
    inside = {
        "box": (abs(y - 30) < 14) & (abs(x - 40) < 20),
        "disc": (y - 28) ** 2 + (x - 35) ** 2 < 18**2,
        "corner": (y < 30) & (x < 40),  # the picture's border holds no values: the gradient across it is 0
    }[shape]
    values = torch.randn(1, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    values = torch.nn.functional.interpolate(values, (60, 72), mode="bicubic")
    found = interpolate_harmonically(values, ~torch.from_numpy(inside)[None, None])
    exact = torch.from_numpy(membrane(values[0].permute(1, 2, 0).numpy(), inside)).permute(2, 0, 1)
    error = (found[0] - exact)[:, torch.from_numpy(inside)]
    assert torch.equal(found[0][:, ~inside], values[0][:, ~inside])
    assert error.square().mean().sqrt() < 0.2 * values.std()


def test_meeting_the_photo_keeps_what_was_painted():
    """What differs inside the mask, which is the object, is no error."""
    keep = keep_around((9, 6, 25, 17))
    photo = torch.zeros(1, 3, 24, 32)
    painted = torch.where(keep > 0, 0.2, torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0)))
    before = painted.clone()
    met = poisson_blend(painted, photo, keep)
    torch.testing.assert_close(met[..., 6:17, 9:25], painted[..., 6:17, 9:25] - 0.2, rtol=0, atol=1e-6)
    assert torch.equal(painted, before)
    assert torch.equal(poisson_blend(painted, photo, torch.zeros_like(keep)), painted)  # nothing around it to meet


def test_a_result_meets_the_photo_at_the_mask_s_border(model):
    """In a photo without detail all that is seen at the border is the seam."""
    image, mask = np.full((60, 80, 3), (90, 140, 40), np.uint8), rectangle(80, 60, (20, 15, 60, 45))
    rim = mask & ~rectangle(80, 60, (21, 16, 59, 44))
    gaps = [
        np.abs(edit(model, image, mask, seam=seam, feather=0)[0].astype(int) - image)[rim].mean()
        for seam in ("poisson", "feather")
    ]
    assert gaps[0] < 0.7 * gaps[1], gaps  # the random model's own noise stays


@torch.no_grad()
def test_half_precision_edits(tmp_path):
    model = PaintByExample(TINY)
    model.load_state_dict(seeded_state(TINY, 0))
    image, mask = photo(80, 60), rectangle(80, 60, (20, 20, 60, 50))
    for dtype in (torch.bfloat16, torch.float16):
        (result,) = edit(model.to(dtype).eval(), image, mask)
        assert np.array_equal(result[~mask], image[~mask])
        assert (result[mask] != image[mask]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": np.zeros((60, 80), bool)}, "empty"),
        ({"mask": np.ones((60, 80), bool)}, "covers the whole"),
        ({"mask": np.ones((60, 81), bool)}, "81x60"),
        ({"mask": (20, 20, 90, 50)}, "80x60"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"exemplar": []}, "empty list"),
        ({"exemplar": [EXEMPLAR], "exemplar_weights": [1, 2]}, "2 values for 1"),
        ({"exemplar_weights": [0.0]}, "not all be 0"),
        ({"exemplar_weights": 1.0}, "exemplar_weights must be .* numbers.*got 1.0"),
        ({"exemplar_weights": ["much"]}, "exemplar_weights must be .* numbers.*'much'"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "1001"),
        ({"sampler": "heun"}, "plms.*'heun'"),
        ({"eta": 0.5}, "ddim"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": "5"}, "guidance must be .* at least 0, got '5'"),
        ({"sampler": "ddim", "eta": "1"}, "eta must be .* from 0 to 1, got '1'"),
        ({"seed": -1}, "seed must be a whole number from 0 .* got -1"),
        ({"seed": 2**64}, f"seed must be .* got {2**64}"),
        ({"seed": 2**64 - 1, "num_images": 2}, "the last result's seed"),
        ({"seed": "7"}, "seed must be .* got '7'"),
        ({"seed": 1.5}, "seed must be .* got 1.5"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 1.0}, "num_images must be a whole number from 1 .* got 1.0"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "2"}, "batch_size must be a whole number from 1 .* got '2'"),
        ({"split_mask": "both"}, "split_mask .* 'both'"),
        ({"window": "half"}, "'half'"),
        ({"window": None}, "None"),
        ({"window": (0, 0, 40.5, 60)}, "whole pixels"),
        ({"window": (0, 0, float("inf"), 60)}, "whole pixels"),
        ({"window": ("a", 0, 40, 60)}, "whole pixels"),
        ({"window": (30, 0, 80, 60)}, "hold the mask"),
        ({"window": (0, 0, 80, 61)}, "lie inside the photo"),
        ({"resolution": 63}, "multiple"),
        ({"resolution": 0}, "multiple"),
        ({"resolution": "64"}, "multiple of 8, got '64'"),
        ({"seam": "gauss"}, "'gauss'"),
        ({"feather": -1}, "feather"),
        ({"feather": 2.5}, "feather must be .* from 0 .* got 2.5"),
        ({"margin": 0.6}, "margin"),
        ({"margin": "wide"}, "margin must be .* got 'wide'"),
    ],
)
def test_wrong_inputs(model, changes, message):
    arguments = {"image": photo(80, 60), "mask": (20, 20, 60, 50), "exemplar": EXEMPLAR} | changes
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        edit(model, **arguments)


def test_numpy_numbers_are_numbers(model):
    image = photo(80, 60)
    plain, numpy = (
        edit(model, image, (20, 20, 60, 50), steps=steps, window=window, guidance=guidance, seed=seed, num_images=n)[-1]
        for steps, window, guidance, seed, n in (
            (4, (10, 0, 70, 60), 3.0, 7, 2),
            (np.int64(4), np.array([10, 0, 70, 60]), np.float32(3), np.int64(7), np.int64(2)),
        )
    )
    assert np.array_equal(plain, numpy)


def test_a_picture_that_is_not_finite_is_an_error(model, monkeypatch):
    """16 bits can overflow; a black patch would be taken for a result."""
    monkeypatch.setattr(model.vae.decoder, "forward", lambda z: torch.full((len(z), 3, 64, 64), float("nan")))
    with pytest.raises(ValueError, match=r"not finite in torch\.float32: is the guidance too large"):
        edit(model, photo(80, 60), (20, 20, 60, 50))
    with pytest.raises(ValueError, match=r"not finite in torch\.float16: use bfloat16"):
        check_finite(torch.full((1, 3, 8, 8), float("inf"), dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_readmes_parts_fit_together(dtype):
    """The README's second Python block runs as it stands, in half precision too."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    model = PaintByExample(TINY)
    model.load_state_dict(seeded_state(TINY, 0))
    names = {
        "model": model.to(dtype).eval(),
        "image": torch.zeros(2, 3, 64, 64, dtype=dtype),
        "mask": torch.ones(2, 1, 64, 64, dtype=dtype),
        "exemplar": torch.zeros(2, 3, 28, 28, dtype=dtype),
    }
    exec(code, names)
    assert names["picture"].shape == (2, 3, 64, 64)
    assert names["picture"].isfinite().all()


def test_needs_a_paint_by_example():
    with torch.device("meta"):
        other = StableDiffusion(StableDiffusionConfig())
    with pytest.raises(ValueError, match="not a StableDiffusion"):
        edit(other, photo(80, 60), (20, 20, 60, 50))


def test_a_mask_too_small_for_the_window(model):
    """One pixel of 600 is less than any latent cell sees: an error with the whole frame, no trouble with a window."""
    image = photo(600, 600)
    with pytest.raises(ValueError, match="window='auto'"):
        edit(model, image, (300, 300, 301, 301), window=(0, 0, 600, 600), resolution=64)
    edit(model, image, (300, 300, 301, 301))


def test_a_mask_too_thin_for_any_window(model):
    """A line across the photo lets no window zoom in: what is advised must be more than the window it has."""
    with pytest.raises(ValueError, match=r"too small for the model to see .* wider, .* or work at a higher resolution"):
        edit(model, photo(600, 600), (0, 300, 600, 301))


@pytest.mark.parametrize("steps", [2, 600])
def test_warns_of_steps_that_leave_the_noise_out(model, steps):
    class Stop(Exception):
        """Enough seen."""

    def stop(_):
        raise Stop

    with pytest.warns(PictureWarning, match=f"steps={steps}"), pytest.raises(Stop):
        edit(model, photo(80, 60), (20, 20, 60, 50), steps=steps, callback=stop)


def test_a_distilled_model_begins_with_what_it_was_distilled_for(model, student):
    image, box, steps = photo(64, 64), (16, 16, 48, 48), []
    with pytest.warns(PictureWarning, match="sampler='lcm' is for distilled models, which this one is not"):
        (expected,) = edit(model, image, box, sampler="lcm", steps=2, guidance=1.0)
    for one in (student, prepare_for_inference(student)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (result,) = pbe.edit(one, image, box, EXEMPLAR, callback=steps.append)
        assert np.array_equal(result, expected)
    assert [step.t for step in steps] == [999, 499, 999, 499]


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({"steps": 4}, "sampler='lcm', steps=4, guidance=1.0"),
        ({"guidance": 3}, "sampler='lcm', steps=2, guidance=3.0"),
        ({"sampler": "dpm_solver", "spacing": "trailing"}, "sampler='dpm_solver', steps=2, guidance=1.0"),
    ],
)
def test_a_distilled_model_used_otherwise_warns(student, settings, used):
    match = f"distilled for sampler='lcm', steps=2, guidance=1.0; with {used} the result may be poor"
    with pytest.warns(PictureWarning, match=match):
        pbe.edit(student, photo(64, 64), (16, 16, 48, 48), EXEMPLAR, **settings)


def test_trailing_spacing_starts_at_the_noisiest_timestep(model):
    starts = {}
    for spacing in ("leading", "trailing"):
        steps = []
        edit(model, photo(64, 64), (16, 16, 48, 48), sampler="ddim", spacing=spacing, callback=steps.append)
        starts[spacing] = steps[0].t
    assert starts == {"leading": 751, "trailing": 999}
    with pytest.raises(ValueError, match=r"spacing must be .*'middle'"):
        edit(model, photo(64, 64), (16, 16, 48, 48), spacing="middle")


@pytest.mark.parametrize(
    ("interval", "samples"),
    [(None, [2, 2, 2, 2]), ((-1, 999), [2, 2, 2, 2]), ((1, 501), [1, 2, 2, 1]), ((0, 0), [1, 1, 1, 1])],
)
def test_outside_the_guidance_interval_the_network_has_half_the_work(model, interval, samples):
    """DDIM's four steps are at 751, 501, 251 and 1; an interval of all is full guidance, an empty one is scale 1."""
    image, mask = photo(64, 64), (20, 20, 50, 50)
    prepared, seen = prepare_for_inference(model), []
    prepared.unet.out.register_forward_hook(lambda _, __, eps: seen.append(len(eps)))
    (result,) = edit(prepared, image, mask, sampler="ddim", guidance_interval=interval)
    assert seen == samples
    full, conditional = (edit(prepared, image, mask, sampler="ddim", guidance=scale)[0] for scale in (5.0, 1.0))
    assert np.array_equal(result, full) == (samples == [2, 2, 2, 2])
    assert np.array_equal(result, conditional) == (samples == [1, 1, 1, 1])


@pytest.mark.parametrize("interval", [(500, 100), (-2, 100), (0, 1001), (0.5, 100), (1, 2, 3), "auto", 500])
def test_a_wrong_guidance_interval(model, interval):
    with pytest.raises(
        ValueError, match=r"guidance_interval must be two whole timesteps .*, got " + re.escape(repr(interval))
    ):
        edit(model, photo(64, 64), (20, 20, 50, 50), guidance_interval=interval)
