r"""Where the model of 128 pixels starts: the weights of a trained one of 64 pixels with the same kind of latents.

python -m examples.demo_model.warm_start runs/demo_64.ckpt runs/demo_vae_128/checkpoints/step-00001800.ckpt \
    --out runs/demo_start_128.ckpt

The UNet is the old one, and sees twice as many latents a side. The exemplar's encoder sees 128 x 128 pixels in patches
of 16 as the old one saw each 2 x 2 of them as one: on such an exemplar its transformer gives the same tokens, to
rounding, of which all reach the UNet in place of one.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import pbe
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.original_layouts import VAE_PREFIX
from pbe.checkpoints.writing import save_checkpoint
from pbe.training.config import PaintByExampleRun, load_config
from pbe.training.initialization import starting_model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", help="the trained model of 64 pixels")
    parser.add_argument("vae", help="checkpoint of the new one's autoencoder")
    parser.add_argument("--out", type=Path, required=True, help="the .ckpt to write")
    parser.add_argument("--config", default="configs/demo/unet_128.yaml", help="whose model.size is that of --out")
    args = parser.parse_args(argv)
    try:
        run = load_config([args.config, f"model.vae={args.vae}"])
        assert isinstance(run, PaintByExampleRun)
        model = starting_model(run.model, run.seed)
        old = pbe.load_model(args.ckpt, "cpu", torch.float32).state_dict()
        tensors = model.state_dict()
        taken = {name: fitted(x, tensors[name]) for name, x in old.items() if not name.startswith(VAE_PREFIX)}
        save_checkpoint(tensors | taken, args.out, pbe_entry(model.config), overwrite=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(taken)} tensors of {args.ckpt}")
    return 0


def fitted(old: Tensor, new: Tensor) -> Tensor:
    """The kernel of patches (C, 3, p, p) for ones of k p pixels, which it averages; any other weight as it is."""
    k = new.shape[-1] // old.shape[-1] if old.ndim == 4 else 1
    return old.repeat_interleave(k, 2).repeat_interleave(k, 3) / k**2 if k > 1 else old


if __name__ == "__main__":
    sys.exit(main())
