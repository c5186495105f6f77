"""Scores against independent computations, and what must not change them."""

import pickle
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pbe.checkpoints.formats.opening import CheckpointError
from pbe.evaluation.bootstrap import Bootstrap, Moments, frechet_distance
from pbe.evaluation.lpips import load_lpips, load_perceptual
from pbe.evaluation.metrics import (
    BackgroundLPIPS,
    BackgroundMSE,
    BackgroundSSIM,
    FeatureSimilarity,
    FrechetDistance,
    QualityScore,
)
from pbe.evaluation.quality_score import (
    GaussianMixture,
    convert_mixture,
    fit_mixture,
    load_mixture,
    save_mixture,
)
from pbe.evaluation.surrogate import Surrogate, SurrogateConfig, save_surrogate
from pbe.training.initialization import seeded

C = 6


def features(n, seed=0, shift=0.0, scale=1.0):
    """Correlated features (n, C) in float64."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(C, C, generator=g, dtype=torch.float64)
    return shift + scale * torch.randn(n, C, generator=g, dtype=torch.float64) @ mixed


def fid(real, generated, batch=1000, resamples=2):
    metric = FrechetDistance(real.shape[1], bootstrap=Bootstrap(resamples))
    for part in real.split(batch):
        metric.update(part, real=True)
    for part in generated.split(batch):
        metric.update(part)
    return metric.compute()


# --- FID --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.5, 30.0])  # far from 0, sums of squares lose digits
def test_fid_is_the_released_formula(shift):
    linalg = pytest.importorskip("scipy.linalg")
    real, generated = features(200, 0, shift), features(150, 1, shift, scale=1.3)
    a, b = (np.cov(x.numpy(), rowvar=False) for x in (real, generated))
    difference = real.numpy().mean(0) - generated.numpy().mean(0)
    expected = difference @ difference + np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b).real)
    assert fid(real, generated).value.item() == pytest.approx(expected, rel=1e-6)


def test_fid_of_a_set_with_itself_is_0_even_where_the_covariance_is_singular():
    x = features(100)
    assert fid(x, x).value.item() == pytest.approx(0, abs=1e-9)
    flat = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))  # fewer pictures than features
    # against a trace of 64; the product's own square root is off by 1e-6 here
    assert fid(flat, flat).value.item() == pytest.approx(0, abs=1e-9)


def test_fid_of_singular_covariances_is_exact():
    """Covariances of one direction each: tr (a bᵀ)^½ is |cos| of the angle between them, by hand."""
    u, v = torch.eye(3, dtype=torch.float64)[0], torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64)
    a, b = (Moments(mean, torch.outer(x, x), 10) for x in (u, v))
    assert frechet_distance(a, b).item() == pytest.approx(1 + 1 - 2 * 0.6, rel=1e-12)


def test_the_quick_distance_is_the_same_to_half_of_the_digits():
    a, b = Moments.of(features(200)), Moments.of(features(150, 1))
    assert frechet_distance(a, b, quick=True).item() == pytest.approx(frechet_distance(a, b).item(), rel=1e-7)


def test_fid_does_not_depend_on_order_and_batches():
    real, generated = features(90), features(70, 1)
    expected = fid(real, generated, resamples=20)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    for batch in (1, 7, 90):
        found = fid(real, generated[order], batch, resamples=20)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_fid_takes_moments_of_the_real_pictures():
    real, generated = features(90), features(70, 1)
    metric = FrechetDistance(C, Moments.of(real), bootstrap=Bootstrap(5))
    metric.update(generated)
    torch.testing.assert_close(metric.compute(), fid(real, generated, resamples=5), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="moments of the real pictures were given"):
        metric.update(real, real=True)
    with pytest.raises(ValueError, match=r"features must be \(B, 6\), got \(2, 5\)"):
        metric.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="two feature vectors or more, got 1"):
        fid(real, generated[:1])


def test_fids_interval_holds_the_figure_and_narrows_with_more_pictures():
    real = features(4000)
    few, many = fid(real, features(100, 1), resamples=60), fid(real, features(1600, 1), resamples=60)
    for estimate in (few, many):
        assert estimate.low < estimate.value < estimate.high
    # 16 times the pictures: a quarter of the width, give or take what 60 draws leave open
    assert 0.1 < (many.high - many.low) / (few.high - few.low) < 0.5


def gathered_fid(rank, port, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metric, similarity = FrechetDistance(C, bootstrap=Bootstrap(10)), FeatureSimilarity(Bootstrap(10))
    # parts of different sizes, and in the second process the later ones
    metric.update(features(90)[slice(0, 30) if rank == 0 else slice(30, 90)], real=True)
    metric.update(features(70, 1)[slice(0, 25) if rank == 0 else slice(25, 70)])
    part = slice(0, 25) if rank == 0 else slice(25, 70)
    similarity.update(features(70, 1)[part], features(70, 2)[part])
    torch.save((metric.compute(), similarity.compute()), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs gloo")
def test_two_processes_compute_what_one_does(tmp_path, unused_port):
    # a forked process need not import everything anew, which takes far longer than the test
    method = "fork" if sys.platform == "linux" else "spawn"
    mp.start_processes(gathered_fid, (unused_port, str(tmp_path)), nprocs=2, start_method=method)
    alone = FeatureSimilarity(Bootstrap(10))
    alone.update(features(70, 1), features(70, 2))
    expected = (fid(features(90), features(70, 1), resamples=10), alone.compute())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)  # sums in another order


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- QS ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sklearn_mixture():
    return pytest.importorskip("sklearn.mixture").GaussianMixture


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickled_mixture_is_converted(sklearn_mixture, tmp_path, kind, protocol):
    fit = sklearn_mixture(3, covariance_type=kind, random_state=0).fit(features(200).numpy())
    (tmp_path / "gmm").write_bytes(pickle.dumps(fit, protocol))
    mixture = convert_mixture(tmp_path / "gmm", "CLIP")
    assert mixture.features == "CLIP"
    x = features(40, 5, scale=2)
    np.testing.assert_allclose(mixture.log_density(x).numpy(), fit.score_samples(x.numpy()), rtol=1e-9)


def test_a_fitted_mixture_is_scikit_learns_and_survives_its_file(sklearn_mixture, tmp_path):
    data = features(300)
    mixture = fit_mixture(data, components=4, seed=7, described="toys")
    expected = sklearn_mixture(4, random_state=7).fit(data.numpy()).score_samples(features(50, 2).numpy())
    np.testing.assert_allclose(mixture.log_density(features(50, 2)).numpy(), expected, rtol=1e-6)
    save_mixture(mixture, tmp_path / "mixture.npz")
    loaded = load_mixture(tmp_path / "mixture.npz")
    assert loaded.features == "toys"
    assert torch.equal(loaded.log_density(data), mixture.log_density(data))
    with pytest.raises(FileExistsError):
        save_mixture(mixture, tmp_path / "mixture.npz")
    with pytest.raises(ValueError, match="51 components over 6 features need 306 pictures or more, got 300"):
        fit_mixture(data, components=51)


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Trap(), "does not hold a mixture"),
        ({"weights_": Trap()}, "does not hold a mixture"),
        ([1, 2], "does not hold a mixture"),
    ],
)
def test_pickles_of_other_things_are_refused_and_not_executed(tmp_path, content, message):
    (tmp_path / "gmm").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        convert_mixture(tmp_path / "gmm")


def test_mixtures_that_cannot_be_read(sklearn_mixture, tmp_path):
    (tmp_path / "gmm").write_bytes(pickle.dumps(sklearn_mixture(2)))
    with pytest.raises(ValueError, match="was not fitted: it has no weights_, means_, precisions_cholesky_"):
        convert_mixture(tmp_path / "gmm")
    fit = sklearn_mixture(2, random_state=0).fit(features(50).numpy())
    fit.means_ = fit.means_[:1]
    (tmp_path / "gmm").write_bytes(pickle.dumps(fit))
    with pytest.raises(ValueError, match=r"\(K,\), \(K, C\), \(K, C, C\), got \(\(2,\), \(1, 6\), \(2, 6, 6\)\)"):
        convert_mixture(tmp_path / "gmm")
    (tmp_path / "gmm").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="not a sound pickle"):
        convert_mixture(tmp_path / "gmm")
    np.savez(tmp_path / "other.npz", weights=np.ones(2))
    with pytest.raises(ValueError, match="is not a mixture of this library"):
        load_mixture(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match="no such mixture"):
        load_mixture(tmp_path / "none.npz")


def test_qs_is_the_released_formula():
    """The density re-derived in numpy from covariances, not from their Cholesky factors."""
    g = np.random.default_rng(0)
    # Two components narrow enough that scores reach from below 0 to above 1.
    weights, sizes = np.array([0.3, 0.7]), np.array([1e-12, 1e-25])
    means = g.normal(size=(2, C)) * sizes[:, None]
    roots = (np.triu(g.normal(size=(2, C, C)), 1) + 3 * np.eye(C)) / sizes[:, None, None]
    k = np.arange(80) % 2
    x = means[k] + np.linspace(0, 5, 80)[:, None] * sizes[k, None] * g.normal(size=(80, C))
    scores = []
    for row in x:
        terms = []
        for w, mu, P in zip(weights, means, roots, strict=True):
            precision = P @ P.T
            _, log_det = np.linalg.slogdet(precision / (2 * np.pi))
            terms.append(np.log(w) - (row - mu) @ precision @ (row - mu) / 2 + log_det / 2)
        scores.append((np.logaddexp(*terms) - 0) / (300 - 0))
    assert min(scores) < 0
    assert max(scores) > 1
    metric = QualityScore(GaussianMixture(*map(torch.from_numpy, (weights, means, roots))), Bootstrap(5))
    for part in torch.from_numpy(x).split(30):
        metric.update(part)
    expected = sum(np.clip(scores, 0, 1)) / len(scores) * 100
    assert metric.compute().value.item() == pytest.approx(expected, rel=1e-6)


# --- means over pictures ----------------------------------------------------------------------------------


def test_similarity_is_the_released_formula():
    a, b = features(60, 1), features(60, 2)
    x, y = a.numpy(), b.numpy()
    unit = [z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (x, y)]
    expected = np.mean([100.0 * u @ v for u, v in zip(*unit, strict=True)])
    metric = FeatureSimilarity(Bootstrap(5))
    metric.update(a, b)
    assert metric.compute().value.item() == pytest.approx(expected, rel=1e-6)
    same = FeatureSimilarity(Bootstrap(5))
    same.update(a, 3 * a)
    assert same.compute().value.item() == pytest.approx(100, rel=1e-12)


def test_means_do_not_depend_on_order_and_batches():
    a, b = features(60, 1), features(60, 2)

    def estimate(batch, order):
        metric = FeatureSimilarity(Bootstrap(50))
        for x, y in zip(a[order].split(batch), b[order].split(batch), strict=True):
            metric.update(x, y)
        return metric.compute()

    expected = estimate(60, torch.arange(60))
    for batch in (1, 7):
        found = estimate(batch, torch.randperm(60, generator=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_means_interval_covers_what_theory_says():
    g = torch.Generator().manual_seed(0)
    angle = torch.randn(2000, generator=g, dtype=torch.float64) * 0.1 + 1
    a = torch.stack([angle.cos(), angle.sin()], dim=1)
    metric = FeatureSimilarity(Bootstrap(1000))
    metric.update(a, torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand_as(a))
    value, low, high = metric.compute()
    standard_error = (100 * angle.cos()).std() / 2000**0.5
    # the normal interval; 1000 draws leave a few percent open
    assert (high - low).item() == pytest.approx(2 * 1.96 * standard_error.item(), rel=0.1)
    assert low < value < high


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    metric = FeatureSimilarity(Bootstrap(5))
    metric.update(features(9), features(9, 1))
    metric.compute()
    fid(features(20), features(20, 1))
    assert torch.equal(torch.get_rng_state(), before)


# --- backgrounds ------------------------------------------------------------------------------------------


def pictures(n=3, size=(40, 48)):
    g = torch.Generator().manual_seed(0)
    source = torch.rand(n, 3, *size, generator=g, dtype=torch.float64)
    result = (source + 0.1 * torch.randn(source.shape, generator=g, dtype=torch.float64)).clamp(0, 1)
    keep = torch.ones(n, 1, *size)
    keep[:, :, 20:, 24:] = 0
    return result, source, keep


def test_background_mse_is_of_the_pixels_outside_the_mask():
    result, source, keep = pictures()
    metric = BackgroundMSE(Bootstrap(5))
    metric.update(result, source, keep)
    outside = keep.bool().expand_as(result)
    expected = np.mean([((r - s)[o] ** 2).mean() for r, s, o in zip(result, source, outside, strict=True)])
    assert metric.compute().value.item() == pytest.approx(expected, rel=1e-6)
    metric.reset()
    metric.update(torch.where(outside, source, result), source, keep)
    assert metric.compute().value.item() == 0


def test_background_ssim_sees_no_masked_pixel():
    result, source, keep = pictures()
    metric = BackgroundSSIM(Bootstrap(5))
    expected = metric.score(result, source, keep)
    changed = torch.where(keep.bool(), result, torch.rand(result.shape, generator=torch.Generator().manual_seed(5)))
    torch.testing.assert_close(metric.score(changed, source, keep), expected, rtol=1e-9, atol=0)
    metric.update(torch.where(keep.bool(), source, result), source, keep)
    assert metric.compute().value.item() == pytest.approx(1, rel=1e-12)


def test_background_ssim_is_scikit_images():
    skimage = pytest.importorskip("skimage.metrics")
    result, source, keep = pictures()
    expected = []
    for r, s, k in zip(result, source, keep, strict=True):
        _, full = skimage.structural_similarity(
            r.permute(1, 2, 0).numpy(), s.permute(1, 2, 0).numpy(), channel_axis=2, data_range=1.0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True,
        )  # fmt: skip
        whole = [(i, j) for i in range(5, 35) for j in range(5, 43) if k[0, i - 5 : i + 6, j - 5 : j + 6].all()]
        expected.append(np.mean([full[i, j].mean() for i, j in whole]))
    found = BackgroundSSIM(Bootstrap(5)).score(result, source, keep)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_a_picture_without_background_has_no_ssim():
    result, source, keep = pictures()
    keep[1, :, 4:-4, 4:-4] = 0
    metric = BackgroundSSIM(Bootstrap(5))
    metric.update(result, source, keep)
    assert metric.scores[0].isnan().tolist() == [False, True, False]
    assert metric.compute().value.item() == pytest.approx(metric.scores[0][[0, 2]].mean().item(), rel=1e-12)
    metric.reset()
    metric.update(result[1:2], source[1:2], keep[1:2])
    with pytest.raises(ValueError, match="BackgroundSSIM has no picture"):
        metric.compute()


@pytest.mark.slow
def test_lpips_is_torchmetrics(tmp_path):
    """On seeded AlexNet weights; the linear ones are the real ones, which torchmetrics ships."""
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import alexnet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = alexnet(weights=None)
    torch.save(network.state_dict(), tmp_path / "alexnet.pth")
    theirs = _LPIPS(net="alex", pnet_rand=True)
    slices = [getattr(theirs.net, f"slice{i}") for i in range(1, 6)]
    weights = {name: layer for part in slices for name, layer in part.named_children()}
    for name, layer in network.features.named_children():
        if name in weights:
            weights[name].load_state_dict(layer.state_dict())
    result, source, _ = (x.float() for x in pictures(size=(64, 72)))
    ours = load_lpips(tmp_path / "alexnet.pth")
    expected = theirs(2 * result - 1, 2 * source - 1).flatten().detach()
    torch.testing.assert_close(ours(2 * result - 1, 2 * source - 1), expected, rtol=1e-5, atol=0)  # float32

    metric = BackgroundLPIPS(ours, Bootstrap(5))
    keep = torch.ones(3, 1, 64, 72)
    keep[:, :, 20:40, 20:40] = 0
    metric.update(torch.where(keep.bool(), source, result), source, keep)
    assert metric.compute().value.item() == 0


def test_lpips_on_a_surrogate_s_levels(tmp_path):
    """Without learned weights: 2 - 2 cos of the features at a pixel."""
    network = seeded(Surrogate, SurrogateConfig(num_classes=2, width=8, num_levels=2), seed=0)
    save_surrogate(network, tmp_path / "judge.ckpt", ["a", "b"], {})
    lpips = load_perceptual(tmp_path / "judge.ckpt")
    a, b = (2 * x.float() - 1 for x in pictures(size=(32, 32))[:2])
    x, y, expected = a, b, torch.zeros(len(a))
    for stage in (network.stem, *network.levels):
        x, y = stage(x), stage(y)
        expected = expected + (2 - 2 * torch.cosine_similarity(x, y, dim=1)).mean(dim=(1, 2))
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-4, atol=0)  # float32
    assert lpips(a, a).abs().max() == 0
    lpips(a.requires_grad_(), b).sum().backward()
    assert a.grad.abs().max() > 0
    assert all(not parameter.requires_grad for parameter in lpips.parameters())


def test_a_file_without_alexnet_is_refused_in_one_line(tmp_path):
    torch.save({"features.0.bias": torch.zeros(64), "other": torch.zeros(1)}, tmp_path / "alexnet.pth")
    message = r"alexnet\.pth does not fit AlexNet: it lacks 15: .*; has no place for 1: other$"
    with pytest.raises(CheckpointError, match=message):
        load_lpips(tmp_path / "alexnet.pth")
    with pytest.raises(CheckpointError, match=r"does not fit AlexNet: .*, or what `pbe evaluate surrogate` writes$"):
        load_perceptual(tmp_path / "alexnet.pth")


def test_metrics_refuse_bad_settings():
    with pytest.raises(ValueError, match="resamples must be 1 or more, got 0"):
        Bootstrap(0)
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 1"):
        Bootstrap(5, level=1.0)
    with pytest.raises(ValueError, match="moments are of 6 features, not of 7"):
        FrechetDistance(7, Moments.of(features(9)))
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, C), torch.eye(C)[None])
    with pytest.raises(ValueError, match=r"this mixture is over 6 features, got \(2, 5\)"):
        mixture.log_density(torch.zeros(2, 5))
