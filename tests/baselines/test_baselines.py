"""The systems of the comparison: each by name from files to a picture, and the parts they are made of."""

import gzip
import math
from dataclasses import replace
from itertools import islice, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from golden_file import noise, parameter
from PIL import Image

from pbe.baselines import BASELINES, Task, WeightFiles, blended_diffusion, composited, open_baseline
from pbe.baselines.copy_paste import CopyPaste
from pbe.baselines.poisson import membrane, poisson_blend, sum_of_neighbours
from pbe.baselines.stable_diffusion import StableDiffusionImage, guided_by_context
from pbe.baselines.systems import to_picture, to_tensor
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.seeding import draw
from pbe.models.adm import ADM, ADMConfig
from pbe.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from pbe.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from pbe.models.tokenizer import MERGES, byte_symbols
from pbe.models.unet import UNetConfig
from pbe.sampling import NoiseSchedule, make_generators

TEXT = CLIPTextConfig(width=64, num_layers=1, num_heads=2, context_length=16, mlp_width=64)
SD = StableDiffusionConfig(
    unet=UNetConfig(
        in_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,), context_dim=64
    ),
    vae=TINY.vae,
    text=TEXT,
    resolution=64,
)
TINY_CLIP = CLIPConfig(CLIPVisionConfig(64, 2, 2, 8, 32, 64), replace(TEXT, width=32), embed_dim=64)
TINY_ADM = ADMConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    head_channels=32,
    num_classes=5,
    resolution=32,
)
NAMES = [*BASELINES]
LEARNED = [name for name in NAMES if not name.startswith("copy-paste")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tiny_checkpoint):
    """A file of each kind, in the original layouts, with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    for name, model_class, config in (("sd", StableDiffusion, SD), ("clip", CLIP, TINY_CLIP), ("adm", ADM, TINY_ADM)):
        model = build_on_meta(model_class, config)
        state = {key: parameter(key, list(p.shape)) for key, p in model.state_dict().items()}
        torch.save({"state_dict": state, "pbe": pbe_entry(config)}, folder / f"{name}.pt")
    pairs = islice(product(byte_symbols(), repeat=2), MERGES)  # as many merges as CLIP has, of any kind
    lines = ["#version: 0.2", *map(" ".join, pairs)]
    (folder / "vocabulary.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode(), compresslevel=1))
    return WeightFiles(
        paint_by_example=tiny_checkpoint,
        stable_diffusion=folder / "sd.pt",
        adm=folder / "adm.pt",
        clip=folder / "clip.pt",
        vocabulary=folder / "vocabulary.txt.gz",
        device="cpu",
    )


def smooth(height, width, seed):
    """A picture with low frequencies alone, so that resizing keeps it."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).clamp(0, 1)
    return (pixels[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def make_task(size=(64, 64), **changes):
    height, width = size
    mask = np.zeros(size, bool)
    mask[height // 4 : height // 2, width // 4 : 3 * width // 4] = True
    task = Task.read(smooth(*size, 0), mask, smooth(40, 30, 1), label="cat", seed=3)
    return replace(task, **changes)


def quick(name, weights):
    """The system with few steps."""
    system = open_baseline(name, weights)
    if name.startswith("blended"):
        return replace(system, steps=4, skipped=1, augmentations=2)
    if name.startswith("stable"):
        return replace(system, steps=2)
    return system.with_settings(steps=4) if name == "paint-by-example" else system


# --- every system, from files to a picture ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (50, 90)])
def test_every_system_paints_the_photo_s_frame(name, size, weights):
    task = make_task(size)
    picture = quick(name, weights)(task)
    assert picture.mode == "RGB"
    assert picture.size == (size[1], size[0])
    pixels = np.asarray(composited(task, picture))
    assert np.array_equal(pixels[~task.repaint], task.image[~task.repaint])
    assert (pixels[task.repaint] != task.image[task.repaint]).any(axis=1).mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_picture_depends_on_its_edit_and_seed_alone(name, weights):
    system = quick(name, weights)
    before = torch.get_rng_state()
    first, again, other = (np.asarray(system(make_task(seed=seed))) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (name not in LEARNED)


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_is_the_exemplar_or_its_label(name, weights):
    system = quick(name, weights)
    pictures = [
        np.asarray(system(task))
        for task in (
            make_task(),
            make_task(label="dog"),
            make_task(
                exemplar=Image.fromarray(smooth(40, 30, 2)),
                cutout=np.dstack([smooth(40, 30, 2), np.full((40, 30), 255, np.uint8)]),
            ),
        )
    ]
    reads_text = name.endswith("text")
    assert np.array_equal(pictures[0], pictures[1]) == (not reads_text)
    assert np.array_equal(pictures[0], pictures[2]) == reads_text
    if reads_text:
        with pytest.raises(ValueError, match="label of the exemplar's class"):
            system(make_task(label=None))


@pytest.mark.parametrize("name", LEARNED)
def test_a_missing_file_is_named(name):
    with pytest.raises(ValueError, match=r"this system needs .* checkpoint.*: give its path as "):
        open_baseline(name, WeightFiles())


@pytest.mark.parametrize(
    ("name", "field", "message"),
    [
        ("stable-diffusion-text", "stable_diffusion", "holds ADM, not a Stable Diffusion v1"),
        ("stable-diffusion-image", "clip", "holds ADM, not a CLIP checkpoint"),
        ("blended-diffusion-text", "adm", "holds CLIP, not a guided-diffusion checkpoint"),
        ("paint-by-example", "paint_by_example", "holds ADM, not a Paint by Example checkpoint"),
    ],
)
def test_a_file_of_another_kind_is_named(name, field, message, weights):
    other = weights.clip if field == "adm" else weights.adm
    with pytest.raises(ValueError, match=message):
        open_baseline(name, replace(weights, **{field: other}))


def test_unknown_systems_are_refused():
    with pytest.raises(ValueError, match="choose one of copy-paste, copy-paste-poisson, stable-diffusion-text"):
        open_baseline("anydoor", WeightFiles())


# --- the task ---------------------------------------------------------------------------------------------------------


def test_the_cutout_is_the_object_s_own_pixels():
    exemplar, shown = smooth(20, 30, 1), np.zeros((20, 30), bool)
    shown[5:15, 10:20] = True
    shown[5, 10] = False
    task = Task.read(smooth(16, 16, 0), (2, 2, 8, 9), exemplar, exemplar_mask=shown)
    assert np.array_equal(task.cutout[..., :3], exemplar[5:15, 10:20])
    assert np.array_equal(task.cutout[..., 3] == 255, shown[5:15, 10:20])
    assert np.asarray(task.exemplar)[0, 0].tolist() == [255, 255, 255]  # over white, as networks see it
    assert task.repaint.sum() == 6 * 7
    transparent = np.dstack([exemplar, np.where(shown, 255, 0).astype(np.uint8)])
    assert np.array_equal(Task.read(smooth(16, 16, 0), (2, 2, 8, 9), transparent).cutout, task.cutout)


def test_a_picture_of_another_size_is_not_composited():
    with pytest.raises(ValueError, match=r"\(32, 64\), the image is \(64, 64\)"):
        composited(make_task(), Image.new("RGB", (64, 32)))


def test_pictures_keep_their_pixels_through_the_networks_range():
    pixels = noise("pixels", 33, 47, 3).mul(60).add(128).clamp(0, 255).to(torch.uint8).numpy()
    assert np.array_equal(np.asarray(to_picture(to_tensor(pixels), (33, 47))), pixels)
    with pytest.raises(ValueError, match="not finite"):
        to_picture(torch.full((1, 3, 4, 4), math.nan), (4, 4))


# --- copy and paste ---------------------------------------------------------------------------------------------------


def test_copy_paste_fills_the_box_with_the_exemplar():
    task = make_task()
    result = np.asarray(CopyPaste()(task))
    expected = np.asarray(task.exemplar.resize((32, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(result[16:32, 16:48], expected)
    assert np.array_equal(result[~task.repaint], task.image[~task.repaint])


@pytest.mark.parametrize("poisson", [False, True])
def test_copy_paste_shows_the_photo_beside_the_object(poisson):
    task = make_task()
    task.cutout[:, :15, 3] = 0  # the object is in the right half
    result = np.asarray(CopyPaste(poisson)(task))
    assert np.array_equal(result[:, :31], task.image[:, :31])  # a pixel at the edge is mixed
    assert (result[16:32, 33:48] != task.image[16:32, 33:48]).any(axis=-1).mean() > 0.9


def test_poisson_reads_the_exemplar_s_own_colours_beside_the_object():
    """An object that does not stand out of its surroundings has no gradients, so nothing is left of it."""
    photo, exemplar, shown = (np.full((40, 40, 3), value, np.uint8) for value in (100, 200, 0))
    shown[10:30, 5:20] = 255
    task = Task.read(photo, (8, 8, 30, 25), np.dstack([exemplar, shown[..., 0]]))
    task.cutout[:5, :5, 3] = 0  # a corner beside the object in the cut-out itself
    assert np.array_equal(np.asarray(CopyPaste(poisson=True)(task)), photo)
    assert (np.asarray(CopyPaste()(task)) == 200).any()


def test_poisson_removes_the_seam():
    task = make_task()
    pasted, blended = (np.asarray(CopyPaste(poisson)(task)).astype(float) for poisson in (False, True))
    assert np.array_equal(blended[~task.repaint], task.image[~task.repaint])

    def seam(pixels):
        return np.abs(pixels[15, 16:48] - pixels[16, 16:48]).mean()

    # what is left is the exemplar's own slope, 15 here, of the 85 that pasting leaves
    assert seam(blended) < seam(pasted) / 4


REGIONS = {
    "box": np.pad(np.ones((6, 4), bool), 3),
    "ragged": np.random.default_rng(0).random((11, 9)) < 0.6,
    "at the border": np.pad(np.ones((7, 4), bool), ((0, 4), (0, 3))),
    "all but one pixel": np.pad(np.zeros((1, 1), bool), ((4, 5), (2, 6)), constant_values=True),
    "one pixel": np.pad(np.ones((1, 1), bool), 4),
}


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_poisson_is_the_direct_solution(region):
    """Against numpy's dense solver of sum over neighbours of (f_p - f_q) - (g_p - g_q) = 0; both end at 1e-8."""
    rng = np.random.default_rng(1)
    target, source = rng.random((2, *region.shape, 2)) * 255
    pixels = [tuple(p) for p in np.argwhere(region)]
    A, b = np.zeros((len(pixels), len(pixels))), np.zeros((len(pixels), 2))
    for i, (y, x) in enumerate(pixels):
        for q in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= q[0] < region.shape[0] and 0 <= q[1] < region.shape[1]:
                A[i, i] += 1
                b[i] += source[y, x] - source[q]
                if region[q]:
                    A[i, pixels.index(q)] -= 1
                else:
                    b[i] += target[q]
    result = poisson_blend(target, source, region)
    assert np.allclose(result[region], np.linalg.solve(A, b), rtol=0, atol=1e-5)
    assert np.array_equal(result[~region], target[~region])


def test_poisson_needs_a_boundary():
    with pytest.raises(ValueError, match="needs a boundary"):
        poisson_blend(np.zeros((4, 4, 3)), np.zeros((4, 4, 3)), np.ones((4, 4), bool))


def test_a_brighter_copy_of_the_target_blends_into_it():
    target = np.random.default_rng(0).random((20, 20, 3))
    region = REGIONS["ragged"]
    region = np.pad(region, ((4, 5), (5, 6)))
    assert np.allclose(poisson_blend(target, target + 50, region), target, atol=1e-6)


def test_the_membrane_of_a_large_box_takes_few_steps(monkeypatch):
    """Its preconditioner is the exact inverse there: speed, which the results alone would not show."""
    calls = []
    monkeypatch.setattr("pbe.baselines.poisson.sum_of_neighbours", lambda x: calls.append(1) or sum_of_neighbours(x))
    inside = np.pad(np.ones((200, 150), bool), 1)
    values = np.random.default_rng(0).random((202, 152, 3))
    u = membrane(values, inside)
    assert len(calls) <= 5  # two to set up, then one a step
    everywhere = np.where(inside[..., None], u, values)
    assert np.abs((4 * everywhere - sum_of_neighbours(everywhere))[inside]).max() < 1e-6


# --- Stable Diffusion -------------------------------------------------------------------------------------------------


def test_stable_diffusion_keeps_the_background_s_latents(weights, monkeypatch):
    """What is decoded is the photo's own latent wherever no masked pixel falls into the cell."""
    system, task = quick("stable-diffusion-text", weights), make_task()
    decoded = []
    decode = system.model.vae.decode
    monkeypatch.setattr(system.model.vae, "decode", lambda z: decoded.append(z) or decode(z))
    system(task)
    z_0 = system.model.vae.encode(to_tensor(task.image)).mean
    f = SD.vae.downsampling
    painted = torch.from_numpy(task.repaint).unflatten(0, (-1, f)).unflatten(2, (-1, f)).any(3).any(1)  # (h, w)
    assert 0 < painted.sum() < painted.numel()
    assert torch.equal(decoded[0][..., ~painted], z_0[..., ~painted])
    assert not torch.isclose(decoded[0][..., painted], z_0[..., painted]).any()


@torch.no_grad()
def test_guidance_extrapolates_from_the_empty_text(weights):
    model = open_baseline("stable-diffusion-text", weights).model
    x, t, context, null = noise("x", 1, 4, 8, 8), torch.tensor([500]), noise("c", 1, 16, 64), noise("n", 1, 16, 64)
    eps_c, eps_u = (model.unet(x, t, c) for c in (context, null))
    for scale in (0, 1, 7.5):
        expected = eps_u + scale * (eps_c - eps_u)
        assert torch.allclose(guided_by_context(model, context, null, scale)(x, t), expected, atol=1e-4)


@torch.no_grad()
def test_a_repeated_token_is_one_token(weights):
    """Why the picture's embedding may fill the text's length."""
    unet = open_baseline("stable-diffusion-text", weights).model.unet
    x, t, token = noise("x", 1, 4, 8, 8), torch.tensor([500]), noise("c", 1, 1, 64)
    assert torch.allclose(unet(x, t, token.expand(1, 16, 64)), unet(x, t, token), atol=1e-5)


def test_the_picture_s_embedding_must_fit(weights):
    system = open_baseline("stable-diffusion-image", weights)
    other = CLIP(replace(TINY_CLIP, embed_dim=32))
    with pytest.raises(ValueError, match="32 numbers, Stable Diffusion's context 64"):
        StableDiffusionImage(system.model, other, system.tokenizer)


# --- Blended Diffusion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["text", "image"])
def test_blended_diffusion_keeps_the_background_to_the_bit(target, weights):
    task = make_task((32, 32))  # the network's own resolution
    pixels = np.asarray(quick(f"blended-diffusion-{target}", weights)(task))
    assert np.array_equal(pixels[~task.repaint], task.image[~task.repaint])


class WhiteNoise(torch.nn.Module):
    """The exact network for pictures of independent N(0, 1) pixels, with v = 0: eps = sqrt(1 - alpha_bar_t) x_t."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x_t, t, y):
        eps = (1 - NoiseSchedule.linear().alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1) * x_t
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)


@pytest.mark.parametrize("target", ["text", "image"])
def test_guidance_lowers_the_clip_distance(target, weights):
    """Over the steps, and below that of the same seed without guidance."""
    system, task = open_baseline(f"blended-diffusion-{target}", weights), make_task((32, 32))
    system = replace(system, model=WhiteNoise(TINY_ADM), steps=25, skipped=5, augmentations=4)
    embedding = system.embed_target(task)
    repaint = torch.from_numpy(task.repaint)

    @torch.no_grad()
    def distances(clip_weight):
        found = []

        def record(info):
            views = F.adaptive_avg_pool2d(info.z_0 * repaint, TINY_CLIP.vision.image_size)
            found.append(blended_diffusion.clip_distance(system.clip, views, embedding).item())

        replace(system, clip_weight=clip_weight).sample(task, record)
        return found

    guided, free = distances(system.clip_weight), distances(0.0)
    assert guided[-1] < 0.75 * guided[0]
    assert guided[-1] < 0.75 * free[-1]


def test_the_range_loss_keeps_colours_in_range(weights):
    system, task = quick("blended-diffusion-image", weights), make_task()
    x_0 = torch.zeros(1, 3, 64, 64)
    loss = replace(system, clip_weight=0.0).loss(
        system.embed_target(task), torch.ones(1, 1, 64, 64), make_generators(0, 1)
    )
    assert loss(x_0, x_0, 0.5).item() == 0
    assert loss(x_0 - 3, x_0, 0.5).item() == pytest.approx(50 * 2**2)


def test_the_distance_is_half_the_squared_angle(weights):
    clip = open_baseline("blended-diffusion-image", weights).clip
    views = noise("views", 3, 3, 32, 32).clamp(-1, 1)
    target = F.normalize(noise("target", 1, 64), dim=-1)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((views + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    angle = F.cosine_similarity(clip.encode_image(pixels), target).double().acos()
    assert torch.allclose(blended_diffusion.clip_distance(clip, views, target).double(), angle**2 / 2, rtol=1e-5)


def test_the_first_view_is_the_picture_itself():
    x = noise("x", 2, 3, 64, 64)
    views = blended_diffusion.extending_augmentations(x, 32, 4, make_generators(0, 2))
    assert views.shape == (8, 3, 32, 32)
    assert torch.equal(views[:2], F.avg_pool2d(x, 2))
    # views of one sample depend on its own generator alone
    alone = blended_diffusion.extending_augmentations(x[1:], 32, 4, make_generators(1, 1))
    assert torch.allclose(views[1::2], alone, atol=1e-6)
    assert torch.equal(blended_diffusion.extending_augmentations(x, 32, 1, make_generators(0, 2)), views[:2])


def test_grids_are_projective_maps():
    corners = blended_diffusion.CORNERS[None]
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 9, 9], align_corners=False)
    assert torch.allclose(blended_diffusion.sampling_grids(corners, 9), identity, atol=1e-6)
    moved = corners * torch.tensor([1.5, 1.2]) + torch.tensor([0.1, -0.3])
    affine = torch.tensor([[[1.5, 0, 0.1], [0, 1.2, -0.3]]])
    expected = F.affine_grid(affine, [1, 1, 9, 9], align_corners=False)
    assert torch.allclose(blended_diffusion.sampling_grids(moved, 9), expected, atol=1e-6)
    # a true perspective: straight lines stay straight, and the diagonals' crossing is the middle's image
    skew = torch.tensor([[(-1.0, -1.0), (1.7, -1.2), (1.1, 1.4), (-1.3, 1.0)]])
    grid = blended_diffusion.sampling_grids(skew, 9)[0].double()
    a, b, c, d = skew[0].double()
    s = torch.linalg.solve(torch.stack([c - a, b - d], dim=1), b - a)  # a + s_0 (c - a) = b - s_1 (b - d)
    assert torch.allclose(grid[4, 4], a + s[0] * (c - a), atol=1e-5)
    for line in (grid[2], grid[:, 6]):
        ends, points = line[-1] - line[0], line - line[0]
        assert (points[:, 0] * ends[1] - points[:, 1] * ends[0]).abs().max() < 1e-5


def test_random_views_stay_in_their_limits():
    corners = blended_diffusion.random_corners(2000, torch.Generator().manual_seed(0))
    plain = (corners - blended_diffusion.CORNERS).abs().amax(dim=(1, 2)) < 1e-6
    assert plain.float().mean().item() == pytest.approx(0.09, abs=0.03)  # .3 x .3, give or take 4 standard errors
    # at most 1.7 from the middle in each axis, turned by 15 degrees, moved by 0.2
    assert corners.norm(dim=-1).max() <= 1.7 * math.sqrt(2) + 0.2 * math.sqrt(2) + 1e-6
    assert corners.norm(dim=-1).min() >= math.sqrt(2) * (1 - 0.2) - 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skipped": 100}, "leaves no step"),
        ({"augmentations": 0}, "at least 1"),
        ({"tokenizer": None}, "needs a token"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message, weights):
    with pytest.raises(ValueError, match=message):
        replace(open_baseline("blended-diffusion-text", weights), **change)


def test_the_published_settings_are_the_defaults(weights):
    """The released code's: 100 steps less 25, 8 views, weights 1000 and 50; the paper's PLMS 50 at scale 5."""
    blended = open_baseline("blended-diffusion-text", weights)
    assert (blended.steps, blended.skipped, blended.augmentations) == (100, 25, 8)
    assert (blended.clip_weight, blended.range_weight) == (1000, 50)
    ours = open_baseline("paint-by-example", weights)
    assert (ours.settings.sampler, ours.settings.steps, ours.settings.guidance) == ("plms", 50, 5)


# --- the released sizes -----------------------------------------------------------------------------------------------

VIT_B_16 = CLIPConfig(
    CLIPVisionConfig(768, 12, 12, 16, mlp_width=3072),
    CLIPTextConfig(width=512, num_heads=8, mlp_width=2048),
    embed_dim=512,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("stable-diffusion-text", {"stable_diffusion": (StableDiffusion, StableDiffusionConfig())}),
        (
            "stable-diffusion-image",
            {"stable_diffusion": (StableDiffusion, StableDiffusionConfig()), "clip": (CLIP, CLIPConfig())},
        ),
        ("blended-diffusion-text", {"adm": (ADM, ADMConfig()), "clip": (CLIP, VIT_B_16)}),
    ],
)
def test_full_size_systems_take_a_step(name, files, weights, tmp_path):
    """From seeded files of the released sizes, in bfloat16: minutes on a CPU, about 6 GB of memory and 3 of disk."""
    generator = torch.Generator().manual_seed(0)
    for kind, (model_class, config) in files.items():
        shapes = build_on_meta(model_class, config).state_dict().items()
        state = {key: draw(key, tuple(p.shape), generator).bfloat16() for key, p in shapes}
        torch.save(state, tmp_path / f"{kind}.pt")
    given = {kind: tmp_path / f"{kind}.pt" for kind in files}
    system = open_baseline(name, WeightFiles(**given, vocabulary=weights.vocabulary, device="cpu", dtype="bfloat16"))
    steps = {"steps": 2, "skipped": 1} if name.startswith("blended") else {"steps": 1}
    task = make_task((512, 512))
    pixels = np.asarray(replace(system, **steps)(task))
    assert pixels.shape == (512, 512, 3)
    assert (pixels[task.repaint] != task.image[task.repaint]).any(axis=1).mean() > 0.5
    for path in given.values():
        path.unlink()
