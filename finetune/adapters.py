"""What is used of peft. It imports bitsandbytes, which has torch compile four functions that neither a CPU nor a GPU uses here,
and to load the compiler takes as long as all else of it: they stay as they are."""

import os

given = os.environ.get("TORCHDYNAMO_DISABLE")
os.environ["TORCHDYNAMO_DISABLE"] = "1"
try:
    from peft import LoraConfig, PeftModel, get_peft_model  # noqa: F401
    from peft.tuners.lora import LoraLayer  # noqa: F401
    from peft.utils.constants import DUMMY_TARGET_MODULES  # noqa: F401
finally:
    del os.environ["TORCHDYNAMO_DISABLE"]
    if given is not None:
        os.environ["TORCHDYNAMO_DISABLE"] = given
