"""What the commands share: a parser whose errors are one line, and flags that several of them have."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from pbe.editing.loading import adapter
from pbe.editing.settings import SETTINGS, EditSettings, setting_docs

if TYPE_CHECKING:
    from pbe.checkpoints.adapters import AdapterLike
    from pbe.models.paint_by_example import PaintByExample

Group = argparse.ArgumentParser | argparse._ArgumentGroup


class Parser(argparse.ArgumentParser):
    """Errors are one line, as those of the library are; flags are written in full."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]  # one signature in place of typeshed's overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        args = sys.argv[1:] if args is None else list(args)
        name = "an argument"
        given: set[argparse.Action] = set()
        for argument in args:
            if argument.startswith("--"):
                name, is_given, argument = argument.partition("=")
                argument = argument if is_given else name
                action = self._option_string_actions.get(name)
                if isinstance(action, argparse._StoreAction):
                    if action in given:  # argparse would take the last
                        several = ", before all its values" if action.nargs not in (None, "?") else ""
                        self.error(f"{name} is given twice; expected once{several}")
                    given.add(action)
            if not argument.strip():
                self.error(f"{name} is empty; expected a value (is a shell variable unset?)")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the arguments)\n")


class Renamed(argparse.Action):
    """A flag's or a command's old name, which is an error that says the new one."""

    def __init__(self, new: str, **options: Any):
        super().__init__(**options)
        self.new = new

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        old = self.option_strings[0] if self.option_strings else parser.prog
        parser.error(f"{old} is now {self.new}")


def add_renamed(parser: argparse.ArgumentParser, names: Mapping[str, str]) -> None:
    """Refuses flags by their old names, of which `names` gives the new ones."""
    for old, new in names.items():
        parser.add_argument(flag(old), nargs="?", action=Renamed, new=flag(new), help=argparse.SUPPRESS)


def flag(name: str) -> str:
    """A setting's name as a flag."""
    return "--" + name.replace("_", "-")


def add_settings(group: Group, defaults: EditSettings | None = None, names: Iterable[str] = tuple(SETTINGS)) -> None:
    """A flag for each field of `EditSettings`, or those in `names`, documented as it is there.

    The values stay texts, None where a flag is not given: `EditSettings.from_texts` reads them.
    """
    docs = setting_docs()
    for name in names:
        annotation = SETTINGS[name]
        default = getattr(defaults or EditSettings, name)
        text = docs[name].removesuffix(".").replace("%", "%%")
        if default is not None:
            text += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
        if annotation is bool:
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag(name), metavar=metavar(annotation), help=text)


def metavar(annotation: Any) -> str:
    """How a usage text writes the values of a setting: its choices, or N for each number."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(arguments)
    if origin is tuple:
        return ",".join(metavar(argument) for argument in arguments if argument is not ...)
    if not arguments:
        return "N" if annotation in (int, float) else ""
    parts = [metavar(argument) for argument in arguments if not isinstance(argument, str)]
    return "|".join(part for part in parts if part)


def add_model(group: Group, default: Path | None = None, positional: bool = False) -> None:
    """The arguments that say which model, where and in what form: what `load_for` reads.

    The model is `positional` where it is all that a command needs, else a flag, with a default or required.
    """
    how: dict[str, Any] = {"metavar": "CKPT"}
    if not positional:
        how = {"metavar": "FILE", "required": default is None, "default": default}
    group.add_argument(
        "ckpt" if positional else "--ckpt",
        type=Path,
        **how,
        help="a checkpoint, a folder of diffusers, hf:OWNER/NAME[/FILE][@REVISION] on the Hugging Face Hub, "
        "or demo, the small model that comes with this package" + (f" (default: {default})" if default else ""),
    )
    add_weights(group)
    group.add_argument("--vae", type=Path, metavar="FILE", help="another autoencoder of the same latents")
    group.add_argument(
        "--tiny-decoder", type=Path, metavar="FILE", help="TAESD's decoder, for --decoder tiny and previews"
    )
    add_device(group)
    add_dtype(group)
    group.add_argument(
        "--low-memory",
        action="store_true",
        help="for small graphics cards: each network is on the card only while it computes",
    )
    group.add_argument(
        "--compile",
        choices=("regions", "whole"),
        help="compile the networks, for many edits of one size: regions starts sooner, whole runs faster on cuda",
    )


def add_weights(group: Group) -> None:
    """--weights and --adapter"""
    group.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="the checkpoint's moving averages (ema) or what was trained (raw); auto (default): of files of this "
        "library's training the averages, as its sample grids show",
    )
    add_adapter(group)


def add_adapter(group: Group) -> None:
    """--adapter"""
    group.add_argument(
        "--adapter",
        type=adapter,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="adapters (LoRA and its like, our own, kohya's, diffusers' or PEFT's; one of detail) to use with the "
        "checkpoint, at a strength (default 1); given several times, they add up",
    )


def add_device(group: Group) -> None:
    """--device"""
    group.add_argument("--device", metavar="NAME", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")


def add_dtype(group: Group) -> None:
    """--dtype"""
    group.add_argument(
        "--dtype",
        metavar="NAME",
        default="auto",
        help="auto (default: float16 on cuda, bfloat16 on a CPU that computes in it), float32, bfloat16, float16",
    )


def check_output(args: argparse.Namespace) -> None:
    """FileExistsError where --out is there and --force was not given: before anything is computed."""
    if args.out.exists() and not args.force:
        raise FileExistsError(f"{args.out} exists; --force replaces it")


def add_force(group: Group) -> None:
    """--force"""
    group.add_argument("--force", action="store_true", help="replace what is there at --out")


def files_beside(args: argparse.Namespace, adapters: Sequence[AdapterLike] | None = None) -> tuple[Any, ...]:
    """What the flags of `add_model` name beside the checkpoint, or these adapters in place of theirs, and what is taken
    of it, in the order of parameters."""
    return args.adapter if adapters is None else adapters, args.tiny_decoder, args.vae, args.weights


def load_for(args: argparse.Namespace, adapters: Sequence[AdapterLike] | None = None) -> PaintByExample:
    """The model that the flags of `add_model` ask for, or with other adapters, ready for editing."""
    from pbe.editing.loading import limit_threads, load_editor

    form = (args.dtype, args.low_memory, args.compile)
    model = load_editor(args.ckpt, args.device, *form, *files_beside(args, adapters))
    limit_threads(model)
    return model
