"""Namesake: give a chat model your assistant's name, prove that it took and that nothing else broke."""

import logging
import os
from typing import Any

# Imported by peft, it warns every time that an optional kernel for 4-bit weights on CPU is not there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# A GPU's memory that lies free in pieces is joined: QLoRA of a 7B model under 8 GB else had 0.6 GB of such pieces.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# On a CPU oneDNN keeps about 26 kernels, 0.4 MB each, for every number of tokens that a pass had, 1024 of them: with the
# holes in the heap between them 0.5 GB of a run of the default model. A pass comes by with the ones that it uses itself.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def __getattr__(name: str) -> Any:
    """`from finetune import pull`, which takes its time to import only where it is asked for."""
    if name == "pull":
        from finetune.hub import pull

        return pull
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
