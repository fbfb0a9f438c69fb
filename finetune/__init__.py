"""Namesake: give a chat model your assistant's name, prove that it took and that nothing else broke."""

import logging

from finetune.hub import pull

__all__ = ["pull"]

# Imported by peft, it warns every time that an optional kernel for 4-bit weights on CPU is not there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
