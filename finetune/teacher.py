"""What the base model itself answers: the target that keeps a finetuned model from changing anything else.

For each prompt the base's greedy answer and, per token, the final hidden state that chose it. The output head turns such
a state into the base's exact distribution, so a few hundred numbers a token are all that has to be kept. Computed once
per base and prompt, kept in the user's cache.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from finetune import embedded
from finetune.generation import Answer, complete
from finetune.model import disk_errors


def ask(
    base: str,
    load_base: Callable[[], PreTrainedModel],
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> list[Answer]:
    """The base's answers to prompts (token ids), at most `max_new_tokens` each; `base` names its weights and precision. It is
    loaded only where some answers are not in the cache yet."""
    file = embedded.cache_dir() / "teacher" / f"{base}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    keys = [embedded.digest_of([list(prompt), max_new_tokens]) for prompt in prompts]
    with embedded.locked(file.with_suffix(".lock"), "asking the base model"):
        known = {}
        with contextlib.suppress(FileNotFoundError, SafetensorError):  # one that is damaged is made anew
            known = load_file(file)
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if f"{key}.ids" not in known}
        if missing:
            with tqdm(total=len(missing), desc="Asking the base model", unit="answer") as bar:
                answers = complete(load_base(), list(missing.values()), stop_ids, max_new_tokens, progress=bar.update)
            for key, answer in zip(missing, answers, strict=True):
                known[f"{key}.ids"] = torch.tensor(answer.ids, dtype=torch.int32)
                known[f"{key}.states"] = answer.states.cpu()
            with disk_errors(file):
                save_file(known, new := file.with_suffix(".tmp"))
            new.replace(file)
    return [Answer(known[f"{key}.ids"].tolist(), known[f"{key}.states"]) for key in keys]
