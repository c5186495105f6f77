"""`make demo`: edit an example photo with a small model of random weights, from checkpoint to picture.

The weights are untrained, so the result shows the mechanics only: where the model paints, what stays as it was.
"""

import sys
from pathlib import Path

from pbe.cli import checkpoint, inference

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, OUT = ROOT / "examples", ROOT / "outputs" / "demo"


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    model = OUT / "random-weights.ckpt"
    failed = checkpoint.main(["seed", "--size", "small", "--out", str(model), "--force"])
    if failed:
        return failed
    return inference.main(
        [
            *("--ckpt", str(model)),
            *("--image", str(EXAMPLES / "coffee.png")),
            *("--mask", str(EXAMPLES / "coffee_mask.png")),
            *("--reference", str(EXAMPLES / "flower.png")),
            *("--steps", "20", "--num-images", "2", "--grid"),
            *("--out", str(OUT)),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
