"""The command `pbe`: one subcommand a tool."""

import argparse
from importlib import import_module

import pbe
from pbe.cli.flags import Parser

# Each module has `main(argv, prog) -> exit code`, and is imported only when its command is chosen.
COMMANDS = {
    "edit": ("pbe.cli.edit", "repaint the masked part of a photo, or of a batch of photos"),
    "app": ("pbe.cli.app", "serve a page on which photos are edited by hand"),
    "serve": ("pbe.cli.serve", "serve edits to programs over HTTP"),
    "checkpoint": ("pbe.cli.checkpoint", "look into checkpoints and change them"),
    "export": ("pbe.cli.export", "write a model's networks for ONNX Runtime or torch.export"),
    "verify": ("pbe.cli.verify", "compare what a checkpoint computes here and in diffusers"),
    "train": ("pbe.cli.train", "train or fine-tune, as a YAML file says"),
    "personalize": ("pbe.cli.personalize", "teach a model one object, from a few pictures of it"),
    "index-boxes": ("pbe.cli.index_boxes", "make the boxes of OpenImages quick to look up"),
    "evaluate": ("pbe.cli.evaluate", "score a checkpoint, or any results, on COCOEE or a test set like it"),
    "cut-out": ("pbe.cli.cut_out", "draw masks around objects, so that training can put them into other photos"),
    "pair-frames": ("pbe.cli.pair_frames", "make training pairs of an object's boxes in two frames of a video"),
    "plot-run": ("pbe.cli.plot_run", "draw the curves of a training run"),
    "show-data": ("pbe.cli.show_data", "see what becomes of training pictures, stage by stage"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the subcommand that `argv` (default: the command line's arguments) names; returns its exit code."""
    width = max(map(len, COMMANDS))
    parser = Parser(
        prog="pbe",
        description="Paint by Example: exemplar-based image editing",
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pbe {pbe.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below; COMMAND --help: more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    args = parser.parse_args(argv)
    module, _ = COMMANDS[args.command]
    return import_module(module).main(args.arguments, prog=f"pbe {args.command}")
