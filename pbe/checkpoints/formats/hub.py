"""Checkpoints on the Hugging Face Hub, `hf:OWNER/NAME[/FILE][@REVISION][#sha256=HEX]`, by the package huggingface_hub.

Its own are progress, resuming, the cache, tokens and the offline mode.
"""

import re
from functools import cache
from pathlib import Path

from pbe.checkpoints.formats.opening import COMPONENTS
from pbe.io.checksums import sha256_of

FORM = "hf:OWNER/NAME[/FILE][@REVISION][#sha256=64 HEX DIGITS]"
PATTERN = re.compile(r"hf:([^/@#]+/[^/@#]+)(?:/([^@#]+))?(?:@([^#]+))?(?:#sha256=([0-9a-fA-F]{64}))?")

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model", "pytorch_lora_weights")
# The weights of a folder by the ends of their names, shards too, from the best form to the last.
FORMS = [
    (f"{variant}.{suffix}", f"{variant}-*-of-*.{suffix}", f"-*-of-*{variant}.{suffix}")
    for variant in ("", ".fp16")
    for suffix in ("safetensors", "bin")
]


# What its errors mean, by their classes' names; the first that fits counts, so that subclasses come first.
REASONS = {
    "GatedRepoError": "accept its terms on the hub's page of it, then `hf auth login`",
    "RepositoryNotFoundError": "the hub has no such model, or shows it after `hf auth login` alone",
    "RevisionNotFoundError": "the model has no such revision",
    "LocalEntryNotFoundError": "it is not in the cache, and the hub is not reached (is HF_HUB_OFFLINE set?)",
    "EntryNotFoundError": "the model has no such file",
}


@cache
def fetch(text: str) -> Path:
    """Where a file, or without FILE a repository's folder, lies in the cache; what is not there yet is fetched.

    Of a folder come the JSON files and the weights of its networks in one form: safetensors before pickles, full
    precision before half. A process asks the hub once.

    Raises `ValueError` for a text of another form and for a file with another hash, `OSError` for what the hub or the
    cache does not have or give, and `ImportError` without the package.
    """
    found = PATTERN.fullmatch(text)
    if found is None or (found[4] and not found[2]):
        raise ValueError(f"{text!r} is not {FORM}, where only a FILE has a hash")
    repo, file, revision, sha256 = found.groups()
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise ImportError(f"{text} needs the extra hub: pip install huggingface_hub") from error
    try:
        if file is None:
            return fetch_folder(repo, revision)
        path = Path(hf_hub_download(repo, file, revision=revision))
        if path.stem == "adapter_model":  # PEFT keeps its settings beside it
            hf_hub_download(repo, file.replace(path.name, "adapter_config.json"), revision=revision)
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        fitting = (why for name, why in REASONS.items() if isinstance(error, getattr(errors, name)))
        raise OSError(f"{text}: {next(fitting, str(error).partition(chr(10))[0])}") from error
    if sha256 and (actual := sha256_of(path)) != sha256.lower():
        raise ValueError(f"{text}: {path} has the sha256 {actual}")
    return path


def fetch_folder(repo: str, revision: str | None) -> Path:
    """The folder of a repository with one form of each network's weights."""
    from huggingface_hub import snapshot_download

    path = Path(snapshot_download(repo, revision=revision, allow_patterns=["*.json"]))
    lacking = [name for name in (*COMPONENTS, "tiny_decoder", ".") if any((path / name).glob("*config.json"))] or ["."]
    for form in FORMS:
        names = [stem + end for stem in STEMS for end in form]
        patterns = [f"{folder}/{name}".removeprefix("./") for folder in lacking for name in names]
        snapshot_download(repo, revision=revision, allow_patterns=["*.json", *patterns])
        lacking = [folder for folder in lacking if not any(any((path / folder).glob(name)) for name in names)]
        if not lacking:
            break
    return path
