"""Repo references -> a folder on this machine: a plain path, dir:PATH, hf:user/name[@revision] or user/name."""

import re
from pathlib import Path

from finetune.errors import UserError

# What an ordinary model needs; never pickles, never code.
FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "README.md"]


def pull(ref: str) -> Path:
    """The folder that a reference names, downloaded into the Hub's cache where it must be. Raises UserError."""
    name = ref.removeprefix("dir:")
    try:
        path = Path(name).expanduser()
        exists = bool(name) and path.exists()
    except (OSError, RuntimeError):  # no file can have that name, or we may not look
        exists = False
    if exists and path.is_dir():
        return path.resolve()
    if exists or ref.startswith("dir:"):
        raise UserError(f"{name!r} is not a folder; check its spelling.")
    if not (found := re.fullmatch(r"(?:hf:)?(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", ref, re.A)):
        raise UserError(f"{ref!r} is neither a folder nor a repo reference such as hf:user/name; check its spelling.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(snapshot_download(found[1], revision=found[2], allow_patterns=FILES, ignore_patterns=["*/*"]))
    except (HTTPError, HFValidationError, OSError) as error:  # HTTPError is also a cut connection's
        lines = [line for line in str(error).splitlines() if line] or [type(error).__name__]
        reason = next((line for line in lines if " for url" in line), lines[0])  # "404 ..." says less
        reason = reason.removeprefix("Got: ").rstrip(". ")
        raise UserError(
            f"{ref} is not a folder here and could not be fetched from the Hugging Face Hub: {reason}. Check the name and "
            "the connection (HF_ENDPOINT names a mirror), or give a local folder."
        ) from error
