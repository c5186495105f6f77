"""What loading a model costs, in a process of its own: `python -m benchmarks.load_worker {pbe,diffusers} PATH DTYPE`.

Prints seconds and memory as JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.worker import resident

Loader = Callable[[], list[nn.Module]]


def pbe_loader(path: str, dtype: str) -> Loader:
    from pbe import load_model

    return lambda: [load_model(path, device="cpu", dtype=dtype)]


def diffusers_loader(path: str, dtype: str) -> Loader:
    from benchmarks.peers import network_classes

    settings = {"torch_dtype": getattr(torch, dtype)}
    classes = network_classes()
    return lambda: [network.from_pretrained(Path(path) / name, **settings) for name, network in classes.items()]


LOADERS = {"pbe": pbe_loader, "diffusers": diffusers_loader}


def main() -> None:
    system, path, dtype = sys.argv[1:]
    load = LOADERS[system](path, dtype)  # with the imports
    before = resident("VmRSS")
    start = time.perf_counter()
    modules = load()
    loaded, peak = time.perf_counter() - start, resident("VmHWM")
    for module in modules:
        for p in module.parameters():
            p.detach().flatten()[::512].float().sum().item()  # reads a value of each page
    numbers = {
        "seconds": loaded,
        "seconds until every weight was read": time.perf_counter() - start,
        "peak GiB": peak,
        "peak GiB once every weight was read": resident("VmHWM"),
        "GiB before": before,
        "weights GiB": sum(p.numel() * p.element_size() for m in modules for p in m.parameters()) / 2**30,
    }
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
