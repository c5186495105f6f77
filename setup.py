"""The package pbe: `pip install .`, or `pip install -e .[dev]` to work on it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """`__version__` of pbe/__init__.py, read as text: importing pbe would need what is not installed yet."""
    source = (HERE / "pbe" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise ValueError('pbe/__init__.py has no line `__version__ = "…"`')
    return found[1]


SAFETENSORS = ["safetensors>=0.4"]
HUB = ["huggingface_hub>=0.30", *SAFETENSORS]
WANDB = ["wandb>=0.19"]
LOG = ["tensorboard>=2.14"]
OPTIM = ["bitsandbytes>=0.49", "schedulefree>=1.4", "prodigyopt>=1.1"]
PLOT = ["matplotlib>=3.7"]
STARLETTE = ["starlette>=0.40"]  # what gradio and fastapi serve with
APP = ["gradio>=6.29", *STARLETTE]
SERVE = ["fastapi>=0.115", *STARLETTE, "uvicorn>=0.30", "python-multipart>=0.0.18", "prometheus-client>=0.20"]
MASKS = ["opencv-python-headless>=4.8"]
EVAL = ["scikit-learn>=1.3", "torch-fidelity>=0.3"]
# diffusers loads weights tensor by tensor, and moves networks off a small card, only with accelerate.
VERIFY = ["diffusers>=0.33", "transformers>=4.48", "accelerate>=0.31", *SAFETENSORS]
BENCH = ["openvino>=2025.0", *VERIFY]
EXPORT = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"]
# ruff and mypy are pinned, here and nowhere else: another version finds other things, or formats another way.
# mypy reads typing_extensions, which no code imports when it runs.
CHECKS = ["ruff==0.17.6", "mypy==2.4.1", "typing_extensions>=4.10"]
# what writes the adapters that others use
ADAPTERS = ["peft>=0.17", "lycoris-lora>=4.1"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "openai>=1.99",
    "schemathesis>=4.0",
    *HUB,
    *ADAPTERS,
    *CHECKS,
    *DOCS,
    *BENCH,
    *APP,
    *SERVE,
    *EVAL,
    *MASKS,
    *EXPORT,
    *OPTIM,
]

setup(
    name="pbe",
    version=version(),
    description="Paint by Example: exemplar-based image editing with diffusion models, in PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the pbe authors",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["pbe", "pbe.*"]),
    package_data={
        "pbe": [
            "weights/*",
            "evaluation/**/*.html",
            "app/*.html",
            "app/*.css",
            "app/*.js",
            "py.typed",
        ]
    },
    install_requires=[
        # A torchvision release names the one torch it was built for; a second pin here could only contradict it.
        "torch>=2.6",
        "torchvision",
        "lightning>=2.4",
        "torchmetrics>=1.4",
        "omegaconf>=2.4",
        "ftfy",
        "regex",
        "tqdm",
        "numpy",
        "pillow>=11.1",  # older ones lose EXIF that they have read, and fail on GPS 0/0
    ],
    extras_require={
        "safetensors": SAFETENSORS,
        "hub": HUB,
        "log": LOG,
        "wandb": WANDB,
        "optim": OPTIM,
        "plot": PLOT,
        "app": APP,
        "serve": SERVE,
        "eval": EVAL,
        "masks": MASKS,
        "export": EXPORT,
        "verify": VERIFY,
        "bench": BENCH,
        "docs": DOCS,
        "test": TEST,
        "dev": [*TEST, *LOG, *PLOT, "playwright>=1.65", "pre-commit>=3.5"],
    },
    entry_points={"console_scripts": ["pbe = pbe.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Multimedia :: Graphics",
    ],
)
