"""One system of the editing benchmark in a process of its own: it loads, then does what lines on stdin ask for.

The first line it prints tells how long each phase of the start took; each line read (`unet`, `decode` or `edit`) is
answered by the seconds that it took, with the output saved in the worker's folder; `cost {…}` by what an edit with
other settings costs; `profile unet` and `profile decode` by the seconds of each kind of operation; `memory` by the
peaks so far; `matmul` by the speed of matrix products.
"""

import json
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.calls import Calls
from benchmarks.kinds import seconds_by_kind
from benchmarks.worker import SEED, Numbers, memory, serve, synchronize
from pbe.editing.settings import EditSettings
from pbe.models.paint_by_example import PaintByExample
from pbe.sampling import NoiseSchedule, leading, make_generators, randn

# a GPU's prediction is so short that a single one would measure how it is started
PREDICTIONS = {"cuda": 10, "cpu": 1}
# phases of a start, and all of it
STARTING = ("import torch s", "load s", "first prediction s", "start to first prediction s")


@dataclass(frozen=True)
class Task:
    """What all systems of a run do: `steps` PLMS steps at `guidance` on `batch` pictures of `resolution` pixels."""

    ckpt: str
    diffusers: str
    device: str
    dtype: str
    batch: int
    resolution: int
    steps: int
    guidance: float


def pictures(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A photo and an exemplar of noise, (H, W, 3) of [0, 1], and what to repaint, bool (H, W), along latent cells."""
    generator = np.random.default_rng(SEED)
    side = task.resolution
    repaint = np.zeros((side, side), bool)
    quarter = side // 32 * 8
    repaint[quarter : side - quarter, quarter : side - quarter] = True
    photo, exemplar = (generator.random((n, n, 3), dtype=np.float32) for n in (side, 224))
    return photo, repaint, exemplar


class System(ABC):
    """What a system computes once it is loaded, on inputs that are the same for all.

    `networks` are the modules that its methods `unet` and `decode` run, `predictions` names the methods of the UNet
    that an edit calls, and `warm` what has run before, so that its next call takes its usual time.
    """

    networks: dict[str, nn.Module]
    predictions: tuple[str, ...]

    def __init__(self, task: Task, context_dim: int, downsampling: int):
        self.task, self.warm = task, {"unet", "edit"}  # the first runs at the start; an edit is made of its parts
        self.device, self.dtype = torch.device(task.device), getattr(torch, task.dtype)
        side, generators = task.resolution // downsampling, make_generators(SEED, task.batch)
        self.x_T = randn((4, side, side), generators)
        # on the task's device, as a sampler holds them
        self.unet_in = self.place(randn((9, side, side), generators))
        self.context = self.place(randn((1, context_dim), make_generators(SEED, 2 * task.batch)))
        self.timesteps = [step.t for step in leading(NoiseSchedule.scaled_linear(), task.steps)]
        self.t = torch.full((task.batch,), self.timesteps[0], device=self.device)

    def place(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)

    @abstractmethod
    def unet(self) -> Tensor:
        """A prediction with both halves of guidance."""

    @abstractmethod
    def decode(self) -> Tensor:
        """A decoding of latents."""

    def edit(self) -> Tensor:
        """The pictures (B, 3, H, W) of the task's edit."""
        return self.edit_with({"steps": self.task.steps, "guidance": self.task.guidance})

    @abstractmethod
    def edit_with(self, settings: Mapping[str, Any]) -> Tensor:
        """The pictures of an edit with these fields of `EditSettings`."""


class Ours(System):
    """This library: as the command line runs it, but for what differs.

    compile: its UNet and decoder, each as a whole. small_card: each network is on the GPU only while it runs: `unet`
    and `decode` send it there for each call. prepare: how the loaded model is prepared instead, False for not at all.
    """

    predictions = ("predict", "predict_from")

    def __init__(
        self,
        task: Task,
        compile: bool = False,
        small_card: bool = False,
        prepare: Mapping[str, Any] | Literal[False] | None = None,
    ):
        from pbe.acceleration import prepare_for_inference
        from pbe.checkpoints.loading import load_model
        from pbe.editing.loading import load_editor

        if prepare is None:
            how: Literal["whole"] | None = "whole" if compile else None
            self.model = load_editor(Path(task.ckpt), task.device, task.dtype, low_memory=small_card, compile=how)
        else:
            loaded = load_model(task.ckpt, task.device, task.dtype)
            assert isinstance(loaded, PaintByExample)
            self.model = loaded if prepare is False else prepare_for_inference(loaded, **prepare)
        self.use(task, small_card)

    def use(self, task: Task, small_card: bool = False) -> None:
        """Gets the model ready for calls."""
        from pbe.acceleration.offloading import on_device
        from pbe.sampling.guidance import Bindable, repeated

        self.networks = {"unet": self.model.unet, "decode": self.model.vae}
        config = self.model.config
        super().__init__(task, config.unet.context_dim, config.vae.downsampling)
        unet = self.model.unet
        self.visit = partial(on_device, device=self.device) if small_card else nullcontext
        with self.visit(unet):
            bindable = isinstance(unet, Bindable)
            self.predict = unet.bind(self.context, self.timesteps) if bindable else repeated(unet, self.context)

    def unet(self) -> Tensor:
        with self.visit(self.model.unet):
            return self.predict(self.unet_in, self.t)

    def decode(self) -> Tensor:
        with self.visit(self.model.vae):
            return self.model.vae.decode(self.unet_in[:, :4])

    def edit_with(self, settings: Mapping[str, Any]) -> Tensor:
        from pbe.editing.edit import edit

        if settings.get("decoder") == "tiny" and self.model.tiny_decoder is None:
            self.model.tiny_decoder = tiny_decoder(self.device, self.dtype)
        photo, repaint, exemplar = pictures(self.task)
        results = edit(
            self.model,
            photo,
            repaint,
            Image.fromarray((exemplar * 255).astype(np.uint8)),
            seed=SEED,
            num_images=self.task.batch,
            batch_size=self.task.batch,
            window="full",
            resolution=self.task.resolution,
            composite=False,
            **settings,
        )
        return torch.from_numpy(np.stack([np.asarray(result) for result in results])).permute(0, 3, 1, 2)


class ONNX(Ours):
    """This library with its networks in ONNX Runtime. Its start includes the export, unless the checkpoint's name and
    `.onnx` is that of a folder which `pbe export` wrote."""

    predictions = ("forward",)

    def __init__(self, task: Task):
        from pbe.checkpoints.loading import load_model
        from pbe.export import export_model, load_exported

        folder = Path(f"{task.ckpt}.onnx")
        with tempfile.TemporaryDirectory() as temporary:
            if not folder.exists():
                folder = Path(temporary, "onnx")
                loaded = load_model(task.ckpt, "cpu", task.dtype)
                assert isinstance(loaded, PaintByExample)
                export_model(loaded, folder)
            self.model = load_exported(folder, task.device)
        self.use(task)


def tiny_decoder(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """One of random weights, which is as fast as any, in the form that a prepared model gives it."""
    from pbe.acceleration.packing import relayout
    from pbe.models.tiny_autoencoder import TinyConfig, TinyDecoder

    decoder = TinyDecoder(TinyConfig()).to(device, dtype)
    relayout(decoder, device, dtype, packed=True)
    return decoder


class Diffusers(System):
    """diffusers' pipeline as it comes, or with what it offers.

    best: the channels-last layout and fused projections. compile: torch's mode of compiling its UNet and decoder.
    small_card: each network is on the GPU only while it runs.
    """

    predictions = ("forward",)

    def __init__(self, task: Task, best: bool = False, compile: str = "", small_card: bool = False):
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        # the masked picture's latent is the posterior's mean here and a sample there: compare what is the same
        DiagonalGaussianDistribution.sample = lambda posterior, generator=None: posterior.mode()
        pipeline = peers.load_pipeline(task.diffusers, getattr(torch, task.dtype))
        pipeline.set_progress_bar_config(disable=True)
        if small_card:
            pipeline.enable_model_cpu_offload(device=task.device)
        else:
            pipeline.to(task.device)
        if best:
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.to(memory_format=torch.channels_last)
            pipeline.unet.fuse_qkv_projections()
            pipeline.vae.fuse_qkv_projections()
        if compile:
            # a CPU gains from neither trials nor CUDA graphs
            mode = compile if torch.device(task.device).type == "cuda" else "default"
            pipeline.unet.compile(mode=mode, fullgraph=True)
            pipeline.vae.decoder.compile(mode=mode, fullgraph=True)
        self.pipeline, self.plms = pipeline, pipeline.scheduler
        self.networks = {"unet": pipeline.unet, "decode": pipeline.vae}
        downsampling = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        super().__init__(task, pipeline.unet.config.cross_attention_dim, downsampling)

    def unet(self) -> Tensor:
        unet_in = torch.cat([self.unet_in] * 2)
        return self.pipeline.unet(unet_in, self.t[0], encoder_hidden_states=self.context).sample

    def decode(self) -> Tensor:
        z = self.unet_in[:, :4] / self.pipeline.vae.config.scaling_factor
        return self.pipeline.vae.decode(z, return_dict=False)[0]

    def edit_with(self, settings: Mapping[str, Any]) -> Tensor:
        photo, repaint, exemplar = pictures(self.task)
        wanted = EditSettings(**settings)
        self.pipeline.scheduler = peers.scheduler(wanted.sampler, wanted.spacing, self.plms)
        images = self.pipeline(
            image=(torch.from_numpy(photo).permute(2, 0, 1)[None] * 2 - 1).to(self.dtype),
            mask_image=torch.from_numpy(repaint)[None, None].to(self.dtype),
            example_image=Image.fromarray((exemplar * 255).astype(np.uint8)),
            latents=self.place(self.x_T),
            num_images_per_prompt=self.task.batch,
            num_inference_steps=wanted.steps,
            guidance_scale=wanted.guidance,
            output_type="pt",
        ).images
        return images.float().cpu()


class OpenVINO(Diffusers):
    """diffusers' pipeline with its UNet and decoder converted for OpenVINO, of fixed sizes, computing in the task's
    precision; the rest stays in torch. Its start includes the conversion."""

    def __init__(self, task: Task):
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        super().__init__(replace(task, dtype="float32"))
        unet, decoder, z = self.pipeline.unet, self.pipeline.vae.decoder, self.unet_in[:, :4]
        unet_in = torch.cat([self.unet_in] * 2)
        predict = peers.converted(unet, (unet_in, self.t[0], self.context), task.dtype)
        unet.forward = lambda x, t, encoder_hidden_states: UNet2DConditionOutput(predict(x, t, encoder_hidden_states))
        decode = peers.converted(decoder, (z,), task.dtype)
        decoder.forward = lambda z, *_: decode(z)


SYSTEMS: dict[str, Callable[[Task], System]] = {
    "pbe": Ours,
    "pbe, model kept": lambda task: Ours(task, prepare={}),
    "pbe, plain upsampling": lambda task: Ours(task, prepare={"consume": True, "sum_phases": False}),
    "pbe, not prepared": lambda task: Ours(task, prepare=False),
    "pbe, compiled": lambda task: Ours(task, compile=True),
    "pbe, small card": lambda task: Ours(task, small_card=True),
    "onnx": ONNX,
    "diffusers": Diffusers,
    "diffusers, best": lambda task: Diffusers(task, best=True),
    "diffusers, compiled": lambda task: Diffusers(task, best=True, compile="max-autotune"),
    "diffusers, compiled without trials": lambda task: Diffusers(task, best=True, compile="reduce-overhead"),
    "diffusers, small card": lambda task: Diffusers(task, small_card=True),
    "openvino": OpenVINO,
}


def warm_up(system: System, what: str) -> None:
    """Calls what was not called yet, so that its first figure is as good as any; what a GPU runs, before each turn."""
    if what not in system.warm or system.device.type == "cuda":
        getattr(system, what)()
    system.warm.add(what)


def cost(system: System, settings: Mapping[str, Any], whole: bool) -> Numbers:
    """What an edit with these settings takes, from itself or, unless `whole`, from one call of each kind."""
    calls = Calls(system.networks["unet"], system.predictions, system.warm, system.device)
    edit = partial(system.edit_with, settings)
    return {"seconds": calls.timed(edit)[0]} if whole else calls.run(edit, system.task.batch)


def timed(system: System, what: str) -> tuple[float, Tensor]:
    """Seconds of one call of `what`, and its output.

    A GPU's memory goes back after each turn, so that many systems find room; a call before the timed ones takes it
    again and brings the clocks up.
    """
    call, device = getattr(system, what), system.device
    calls = PREDICTIONS[device.type] if what == "unet" else 1
    warm_up(system, what)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        output = call()
    synchronize(device)
    seconds = (time.perf_counter() - start) / calls
    output = output.float().cpu()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return seconds, output


def matmul_peak(device: str, dtype: torch.dtype, rounds: int = 5) -> float:
    """TFLOP/s of the fastest round of products of large square matrices: what the arithmetic could reach here."""
    place = torch.device(device)
    n, products = (8192, 10) if place.type == "cuda" else (2048, 1)
    a, b = (torch.randn(n, n, generator=torch.Generator().manual_seed(i)).to(place, dtype) for i in range(2))
    a @ b  # chooses the kernel
    best = 0.0
    for _ in range(rounds):
        synchronize(place)
        start = time.perf_counter()
        for _ in range(products):
            a @ b
        synchronize(place)
        best = max(best, products * 2 * n**3 / (time.perf_counter() - start) / 1e12)
    return best


def answer(system: System, line: str, folder: Path) -> Numbers:
    """Does what a line asks for."""
    if line == "memory":
        return memory(system.device)
    if line == "matmul":
        return {"TFLOP/s": matmul_peak(system.task.device, system.dtype)}
    if line.startswith("cost "):
        return cost(system, **json.loads(line.removeprefix("cost ")))
    if line.startswith("profile "):
        part = line.removeprefix("profile ")
        warm_up(system, part)
        return seconds_by_kind(system.networks[part], getattr(system, part), system.device)
    seconds, output = timed(system, line)
    torch.save(output, folder / f"{line}.pt")
    return {"seconds": seconds}


@torch.no_grad()
def main() -> None:
    """`edit_worker SYSTEM TASK FOLDER STARTED`: a name, the task as JSON, where outputs go, the start's clock."""
    name, task, folder, started = sys.argv[1], Task(**json.loads(sys.argv[2])), Path(sys.argv[3]), float(sys.argv[4])
    clock = [started, time.time()]
    system = SYSTEMS[name](task)
    clock.append(time.time())
    system.unet()
    synchronize(system.device)
    clock.append(time.time())
    phases = [end - begin for begin, end in pairwise(clock)]
    numbers = dict(zip(STARTING, [*phases, clock[-1] - started], strict=True))
    serve(numbers, partial(answer, system, folder=folder))


if __name__ == "__main__":
    main()
