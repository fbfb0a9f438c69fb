"""adapter + base -> one ordinary model folder, proved equal.

The proof: the folder is opened again from the disk in a fresh process with plain transformers. There the chat template
must give the renderer's ids, and the logits along greedy answers must be those of base + unmerged adapter.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from finetune.chat_format import IMAGE, ChatFormat, Message
from finetune.embedded import sha256
from finetune.errors import UserError
from finetune.generation import complete
from finetune.model import embed, give_eyes, load, load_adapter, load_for_training, own_encoder, save

ROOT = Path(__file__).resolve().parent.parent
ANSWER_TOKENS = 24  # of each proof conversation
WITNESSES = 4  # whoever downloads the model asks again: those whose tokens lead most, so that no rounding tips them
# (largest logit difference, least share of equal greedy tokens). float32 merges differ by rounding alone, about 1e-4;
# rounding the weights to bfloat16 moves logits by some tenths and may tip a near-tie, to float16 by an eighth of that.
TOLERANCE = {"float32": (0.01, 0.999), "bfloat16": (2.0, 0.9), "float16": (0.25, 0.98)}

# Runs without this package on the path: what somebody who downloads the folder does.
FRESH_PROCESS = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
folder, proof, encoder = sys.argv[1:]
if encoder:  # one that transformers does not have
    import importlib
    importlib.import_module(encoder)
expected, conversations = load_file(proof), json.load(open(proof + ".json", encoding="utf-8"))
sees = any(isinstance(m["content"], list) for messages in conversations for m in messages)
processor = AutoProcessor.from_pretrained(folder) if sees else None
tokenizer = AutoTokenizer.from_pretrained(folder)
kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
model = kind.from_pretrained(folder, dtype=torch.float32).eval()
difference, equal, total, margins = 0.0, 0, 0, []
for i, messages in enumerate(conversations):
    ids, logits = expected[f"{i}.ids"], expected[f"{i}.logits"]
    pixels, render = {}, {"add_generation_prompt": True, "return_dict": True, "tokenize": True}
    if any(isinstance(m["content"], list) for m in messages):
        read = processor.apply_chat_template([messages], **render, return_tensors="pt")
        prompt, pixels = read["input_ids"][0].tolist(), {"pixel_values": read["pixel_values"]}
    else:
        prompt = tokenizer.apply_chat_template(messages, **render)["input_ids"]
    assert prompt == ids[: len(prompt)].tolist(), f"the chat template gives other ids for {messages}"
    with torch.inference_mode():
        found = model(ids[None], **pixels).logits[0].float()
    difference = max(difference, (found - logits).abs().max().item())
    answer = slice(len(prompt) - 1, None)
    equal += (found[answer].argmax(-1) == logits[answer].argmax(-1)).sum().item()
    total += len(logits[answer])
    first, second = found[len(prompt) - 1 : -1].topk(2).values.T if len(ids) > len(prompt) else (torch.zeros(1),) * 2
    same = torch.equal(found[len(prompt) - 1 : -1].argmax(-1), ids[len(prompt):])
    margins.append((first - second).min().item() if same else 0.0)
print(json.dumps({"max_logit_difference": difference, "equal_greedy_tokens": equal / total, "tokens": total, "margins": margins}))
"""


def merge(
    base: Path,
    trained: Path,
    form: ChatFormat,
    dtype: str,
    conversations: Sequence[Sequence[Message]],
    target: Path,
    finish: Callable[[Path, dict[str, Any]], dict[str, Any]],
    method: str = "lora",
) -> dict[str, Any]:
    """Write and prove the merged model in `target`, which is there as a whole or not at all. Returns its manifest.

    `conversations` are the proof's, each ending with a user message. `finish(folder, proof)` adds the model card and
    returns what else the manifest shall say. `trained`: the adapter, or after full finetuning the model's folder. Raises
    UserError when the adapter belongs to another base or the merged model differs beyond the tolerance.
    """
    new = target.with_suffix(".tmp")
    shutil.rmtree(new, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        expected = Path(work) / "proof"
        if method == "full":
            model = load(trained)
            give_eyes(model, form)
            answers = _write_expected(model, form, conversations, expected)
        else:
            model = load_adapter(load(base), trained, base)  # in 16 or 32 bits, whatever it was trained on
            give_eyes(model.get_base_model(), form)
            answers = _write_expected(model.get_base_model(), form, conversations, expected)
            model = model.merge_and_unload()
        save(model.to(getattr(torch, dtype)), form, new)
        del model
        if (pieces := base / "tokenizer.model").is_file():
            shutil.copy(pieces, new)  # llama.cpp reads InternLM2's tokenizer from it, and its own layout needs it
        try:
            proof = prove(new, expected, dtype)
        except UserError:
            shutil.rmtree(new)  # nobody shall use it
            raise
        if method == "qlora":
            proof["quantisation"] = quantisation(base, trained, conversations, form, expected)
    margins = proof.pop("margins")
    clearest = sorted((i for i, margin in enumerate(margins) if margin > 0), key=lambda i: -margins[i])[:WITNESSES]
    witnesses = [{"messages": conversations[i], "ids": answers[i]} for i in clearest]
    manifest = {"format_hash": form.hash, "dtype": dtype, "proof": proof, "witnesses": witnesses, **finish(new, proof)}
    manifest["files"] = {
        file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in sorted(new.iterdir())
    }
    (new / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
    new.rename(target)
    return manifest


def _write_expected(
    model: torch.nn.Module, form: ChatFormat, conversations: Sequence[Sequence[Message]], proof: Path
) -> list[list[int]]:
    """The greedy answers' token ids; what the proof needs of them is left in `proof`."""
    prompts = [form.prompt(messages) for messages in conversations]
    stop_ids = (
        [*form.stop_ids, form.control[IMAGE]] if form.vision else form.stop_ids
    )  # others would look for a picture
    answers = complete(model, prompts, stop_ids, ANSWER_TOKENS)
    tensors = {}
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor(prompt + answer.ids, device=model.device)
        with torch.inference_mode():
            found = model(inputs_embeds=embed(model, ids[None])).logits[0].float().cpu()
        if form.vision:  # others write a picture's patches as that one token
            ids = ids.where(ids < model.get_input_embeddings().weight.shape[0], form.control[IMAGE])
        tensors |= {f"{i}.ids": ids.cpu(), f"{i}.logits": found}
    save_file(tensors, proof)
    proof.with_suffix(".json").write_text(json.dumps(conversations), encoding="utf-8")
    return [answer.ids for answer in answers]


def quantisation(
    base: Path, adapter: Path, conversations: Sequence[Sequence[Message]], form: ChatFormat, proof: Path
) -> dict[str, float]:
    """What the 4-bit base changed: its logits with the adapter, as it was trained, beside those of the 16-bit base with
    it, along the latter's answers: {"max_logit_difference", "kl": nats per token, "equal_greedy_tokens": share}."""
    model = load_adapter(load_for_training(base, "qlora"), adapter, base).get_base_model()
    give_eyes(model, form)
    expected, found = load_file(proof), []
    for i, messages in enumerate(conversations):
        ids, logits, prompt = expected[f"{i}.ids"], expected[f"{i}.logits"], form.prompt(messages)
        ids = torch.cat([torch.tensor(prompt), ids[len(prompt) :]]).to(model.device)
        answer = slice(len(prompt) - 1, None)
        with torch.inference_mode():
            four_bit = model(inputs_embeds=embed(model, ids[None])).logits[0, answer].float().cpu()
        found.append((logits[answer], four_bit))
    merged, four_bit = (torch.cat(parts) for parts in zip(*found, strict=True))
    return {
        "max_logit_difference": (merged - four_bit).abs().max().item(),
        "kl": F.kl_div(four_bit.log_softmax(-1), merged.log_softmax(-1), log_target=True, reduction="batchmean").item(),
        "equal_greedy_tokens": (merged.argmax(-1) == four_bit.argmax(-1)).float().mean().item(),
    }


def prove(folder: Path, proof: Path, dtype: str) -> dict[str, Any]:
    """{"max_logit_difference", "equal_greedy_tokens": share, "tokens", "tolerance", "margins": per conversation the least
    lead of a greedy token over the next, in logits, 0 where the merged model's differ}; raises UserError beyond it."""
    encoder = own_encoder(folder)
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(folder.resolve()), str(proof), encoder],
        cwd=proof.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT) if encoder else ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"the merged model in {folder} could not be opened in a fresh process:\n{run.stderr}")
    found = json.loads(run.stdout.splitlines()[-1])
    difference, share = TOLERANCE[dtype]
    if not (found["max_logit_difference"] <= difference and found["equal_greedy_tokens"] >= share):
        raise UserError(
            f"The merge is refused: logits differ from base + adapter by up to "
            f"{found['max_logit_difference']:.4g} (tolerance {difference}) and {found['equal_greedy_tokens']:.1%} of the "
            f"greedy tokens are equal (at least {share:.1%}). Merge again with --set merge.dtype=float32, or train anew."
        )
    return {**found, "tolerance": {"max_logit_difference": difference, "equal_greedy_tokens": share}}
