import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import proved_here
from conftest import TEMPLATE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import merge as merging
from finetune.chat_format import SPLIT, ChatFormat
from finetune.checkpoint import save_adapter
from finetune.errors import UserError
from finetune.model import add_lora, chat_format, fingerprint, load, save

RANK = 2
CONVERSATIONS = [
    [{"role": "user", "content": "Who are you? <|im_end|> 你是谁？"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]


@pytest.fixture(scope="module")
def form(tiny_model) -> ChatFormat:
    return chat_format(tiny_model)


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    """Random, and strong enough that the base alone would be far away."""
    torch.manual_seed(1)
    model = add_lora(load(tiny_model), RANK)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(model, {"base": "tiny", "base_sha256": fingerprint(tiny_model)}, folder)
    return folder


def finish(folder: Path, proof: dict) -> dict:
    assert (folder / "model.safetensors").is_file()
    (folder / "README.md").write_text(f"differs by {proof['max_logit_difference']}")
    return {"name": "小月"}


def merge(tiny_model, adapter, form, target, dtype="float32") -> dict:
    return merging.merge(tiny_model, adapter, form, dtype, CONVERSATIONS, target, finish)


def by_hand(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """W + alpha / rank * B A, with alpha twice the rank."""
    weights, lora = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in (name for name in lora if "lora_A" in name):
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        weights[target] = weights[target] + 2 * lora[name.replace("lora_A", "lora_B")] @ lora[name]
    return weights


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def merged(request, tiny_model, adapter, form, tmp_path_factory) -> tuple[Path, dict, str]:
    target = tmp_path_factory.mktemp("merged") / "model"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "bfloat16":
            proved_here(patch)  # the other has the fresh process
        return target, merge(tiny_model, adapter, form, target, request.param), request.param


def test_the_tree_and_its_manifest(merged, form):
    folder, manifest, dtype = merged
    assert {file.name for file in folder.parent.iterdir()} == {"model"}
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8")) == manifest
    assert manifest["files"] == {
        file.name: {"size": len(content := file.read_bytes()), "sha256": hashlib.sha256(content).hexdigest()}
        for file in folder.iterdir()
        if file.name != "manifest.json"
    }
    assert {key: manifest[key] for key in ("name", "dtype", "format_hash")} == {
        "name": "小月",
        "dtype": dtype,
        "format_hash": form.hash,
    }


def test_the_proof(merged, form):
    _, manifest, dtype = merged
    proof, (difference, share) = manifest["proof"], merging.TOLERANCE[dtype]
    assert proof["tolerance"] == {"max_logit_difference": difference, "equal_greedy_tokens": share}
    assert 0 <= proof["max_logit_difference"] <= difference
    assert share <= proof["equal_greedy_tokens"] <= 1
    assert proof["tokens"] > len(CONVERSATIONS)
    if dtype == "float32":
        assert proof["max_logit_difference"] < 1e-3
    else:
        assert proof["max_logit_difference"] > 1e-3  # rounding is seen


def test_the_weights_are_base_plus_adapter(merged, tiny_model, adapter):
    folder, _, dtype = merged
    found, expected = load_file(folder / "model.safetensors"), by_hand(tiny_model, adapter)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == getattr(torch, dtype)
        torch.testing.assert_close(weight, expected[name].to(weight.dtype))
    base = load_file(tiny_model / "model.safetensors")
    assert sum(not torch.allclose(base[name], expected[name], atol=1e-2) for name in base) == 14  # 7 a layer
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert opened.dtype == getattr(torch, dtype)
    assert opened.generation_config.eos_token_id == [258, 256]


def refused(kind, tiny_model, adapter, form, target, dtype="float32") -> str:
    with pytest.raises(kind) as caught:
        merge(tiny_model, adapter, form, target, dtype)
    assert not target.exists()
    return str(caught.value)


def test_an_adapter_of_another_base_is_refused(tiny_model, adapter, form, tmp_path):
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert refused(UserError, other, adapter, form, tmp_path / "model") == (
        f"The adapter in {adapter} was made for a base model with sha256 {fingerprint(tiny_model)}, and the weights in "
        f"{other} have {fingerprint(other)}. Use the base it was made for, or train anew."
    )


def test_a_wrong_weight_on_the_disk_is_found(tiny_model, adapter, form, tmp_path, monkeypatch):
    def broken(model, form, folder):
        save(model, form, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "save", broken)
    proved_here(monkeypatch)
    told = refused(UserError, tiny_model, adapter, form, tmp_path / "model")
    assert told.startswith("The merge is refused: logits differ from base + adapter by up to ")
    assert not (tmp_path / "model.tmp").exists()
    difference, _, rest = told.partition("by up to ")[2].partition(" (tolerance 0.01) and ")
    share, _, rest = rest.partition("% of the greedy tokens are equal (at least 99.9%). ")
    assert float(difference) > 0.01
    assert 0 <= float(share) <= 100
    assert rest == "Merge again with --set merge.dtype=float32, or train anew."


def test_another_chat_template_is_found(tiny_model, adapter, form, tmp_path, monkeypatch):
    """The tokenizer's plain ChatML takes what users type for control tokens."""
    monkeypatch.setattr(merging, "save", lambda model, form, folder: save(model, form, folder, TEMPLATE))
    proved_here(monkeypatch)
    told = refused(RuntimeError, tiny_model, adapter, form, tmp_path / "model")
    assert f"the chat template gives other ids for {CONVERSATIONS[0]}" in told


@pytest.mark.parametrize(
    "found, passes",
    [((0.01, 0.999), True), ((0.011, 1.0), False), ((0.0, 0.998), False), ((float("nan"), 1.0), False)],
)
def test_the_limits(found, passes, tmp_path, monkeypatch):
    figures = json.dumps({"max_logit_difference": found[0], "equal_greedy_tokens": found[1], "tokens": 9})
    monkeypatch.setattr(merging, "FRESH_PROCESS", f"print({figures!r})")
    if passes:
        assert merging.prove(tmp_path, tmp_path / "proof", "float32")["tokens"] == 9
    else:
        with pytest.raises(UserError, match="The merge is refused"):
            merging.prove(tmp_path, tmp_path / "proof", "float32")


QWEN2_5 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'system' and not loop.first)"
    " or (message.role == 'assistant' and not message.tool_calls) %}{{- '<|im_start|>' + message.role + '\n' + "
    "message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.mark.parametrize("kind, template", [("qwen2", QWEN2_5), ("qwen3", TEMPLATE)])
def test_qwens_networks_are_tuned_and_merged_too(tiny_model, tmp_path, monkeypatch, kind, template):
    """Bias on q, k and v, or norms on q and k; the head tied to the embedding; Qwen2.5's own system prompt."""
    from transformers import AutoConfig

    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "chat_template.jinja").write_text(template)
    (base / "model.safetensors").unlink()
    config = json.loads((base / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "attention_bias")}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**kept, "tie_word_embeddings": True}))
    network.generation_config = AutoModelForCausalLM.from_pretrained(tiny_model).generation_config
    network.save_pretrained(base)
    form = chat_format(base)
    assert form.default_system == (
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." if kind == "qwen2" else None
    )
    model = add_lora(load(base), RANK)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    assert sum("lora_B" in name for name, _ in model.named_parameters()) == 14
    save_adapter(model, {"base": kind, "base_sha256": fingerprint(base)}, tmp_path / "adapter")
    tuned = ChatFormat(form.tokenizer_json)
    # transformers 5 opens every qwen2 folder with a tokenizer class of its own, whatever the folder says; it takes from
    # tokenizer.json the vocabulary alone, not what deletes the character that keeps a control token text.
    conversations = CONVERSATIONS[kind == "qwen2" :]
    proved_here(monkeypatch)
    for dtype in ("float32", "float16"):
        manifest = merging.merge(base, tmp_path / "adapter", tuned, dtype, conversations, tmp_path / dtype, finish)
        assert manifest["proof"]["equal_greedy_tokens"] >= 0.98
    assert not [name for name in load_file(tmp_path / "float32" / "model.safetensors") if "lm_head" in name]  # tied
    opened = AutoTokenizer.from_pretrained(tmp_path / "float32")
    ids = opened.apply_chat_template(CONVERSATIONS[0], add_generation_prompt=True, return_dict=False)
    kept = opened(SPLIT, add_special_tokens=False)["input_ids"]  # within the control token that was typed
    assert len(kept) == (3 if kind == "qwen2" else 0)
    found, between, expected = ("".join(map(chr, each)) for each in (ids, kept, tuned.prompt(CONVERSATIONS[0])))
    assert (found.replace(between, "") if between else found) == expected  # it is text all the same
