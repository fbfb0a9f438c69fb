"""Repo references -> a folder on this machine: a plain path, dir:PATH, hf:user/name[@revision] or user/name."""

import re
from pathlib import Path

from finetune.errors import UserError

# What an ordinary model needs; never pickles, never code.
FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "README.md"]


def pull(ref: str) -> Path:
    """The folder that a reference names, downloaded into the Hub's cache where it must be. Raises UserError."""
    path = Path(ref.removeprefix("dir:")).expanduser()
    if ref.startswith("dir:") or path.exists():
        if not path.is_dir():
            raise UserError(f"{path} is not a folder.")
        return path.resolve()
    if not (found := re.fullmatch(r"(?:hf:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", ref, re.A)):
        raise UserError(f"{ref!r} is neither a folder nor a repo reference such as hf:user/name; check its spelling.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(found[1], revision=found[2], allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{ref} is not a folder here and could not be fetched from the Hugging Face Hub: {reason} Check the name and "
            "the connection (HF_ENDPOINT names a mirror), or give a local folder."
        ) from error
