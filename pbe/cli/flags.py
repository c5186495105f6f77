"""Flags that several commands have."""

from __future__ import annotations

import argparse

Group = argparse.ArgumentParser | argparse._ArgumentGroup


def add_device(p: Group) -> None:
    p.add_argument("--device", metavar="NAME", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")


def add_dtype(p: Group) -> None:
    p.add_argument(
        "--dtype",
        metavar="NAME",
        default="auto",
        help="auto (default: float16 on cuda, bfloat16 on a CPU that computes in it), float32, bfloat16, float16",
    )


def add_low_memory(p: Group) -> None:
    p.add_argument(
        "--low-memory",
        action="store_true",
        help="for small graphics cards: each network is on the card only while it computes",
    )


def add_compile(p: Group) -> None:
    p.add_argument(
        "--compile",
        choices=("regions", "whole"),
        help="compile the networks, for many edits of one size: regions starts sooner, whole runs faster on cuda",
    )
