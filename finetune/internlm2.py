"""InternLM2 to native parts and back, without remote code: its checkpoints, its adapters, its tokenizer.

Under transformers 5 the code that InternLM2 ships leaves its rotary buffers uninitialised and puts its control tokens
outside the embedding's 92544 rows, and LlamaTokenizer splits almost every text otherwise than InternLM2 does. The network
is Llama's, with other names and with q, k and v in one matrix: weights are moved, never computed with.

    python -m finetune.internlm2 FROM TO            a model's folder, from the one layout to the other
    python -m finetune.internlm2 FROM TO BASE       an adapter of BASE, likewise

`--base` and the page convert models by themselves, into the user's cache.
"""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from tqdm import tqdm

from finetune import embedded, model
from finetune.chat_format import END, ChatFormat
from finetune.errors import UserError
from finetune.hub import pull

# Every InternLM2 model ships this one file; a flipped byte in it would pass all other checks and spoil the ids.
TOKENIZER_SHA256 = "f868398fc4e05ee1e8aeba95ddf18ddcc45b8bce55d5093bead5bbf80429b48b"
VOCABULARY = 92544
# The last slots of the vocabulary; tokenizer.model calls them [UNUSED_TOKEN_141] to [UNUSED_TOKEN_146].
CONTROL_TOKENS = {
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}

WQKV, QKV = "attention.wqkv", [f"self_attn.{letter}_proj" for letter in "qkv"]
TO_LLAMA = {  # the other modules
    "tok_embeddings": "embed_tokens",
    "attention_norm": "input_layernorm",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "output": "lm_head",
}
FROM_LLAMA = {new: old for old, new in TO_LLAMA.items()}

# Keys of config.json that both layouts have, and what InternLM2's own code takes for an absent one; None: it must be there.
SAME_KEYS: dict[str, Any] = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}
CODE = "internlm/internlm2-chat-1_8b--"  # where XTuner and LMDeploy find what they run; nothing here does
SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", **CONTROL_TOKENS}
TOKENIZER_CONFIG = {
    "auto_map": {"AutoTokenizer": [f"{CODE}tokenization_internlm2.InternLM2Tokenizer", None]},
    "tokenizer_class": "InternLM2Tokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "added_tokens_decoder": {str(i): {"content": token, "special": True} for i, token in SPECIAL.items()},
    "chat_template": "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
MARK = "source"  # in an unfinished folder: what it is being made from
WEIGHTS = "adapter_model.safetensors"
# What PEFT's adapter_config.json has had since 0.6: older ones refuse a key that they do not know.
ADAPTER_KEYS = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out", "inference_mode")

# weights_only loads tensors and refuses whatever else a pickle would do.
UNPICKLE = (
    "to turn it into safetensors without running what is in it, type\n\n"
    'python -c "import sys, torch, pathlib; from safetensors.torch import save_file; [save_file({k: v.clone().contiguous() '
    "for k, v in torch.load(f, 'cpu', weights_only=True, mmap=True).items()}, f.with_suffix('.safetensors')) "
    "for f in pathlib.Path(sys.argv[1]).glob('*.bin')]\" %s\n\nand then the same command again."
)


# ------------------------------------------------------------------------------------------------------------ models


def is_internlm2(folder: Path) -> bool:
    """Whether the folder's config.json is that of a model in InternLM2's own layout."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # Early files say model_type "internlm", as the first InternLM's do, which is another network.
        return "InternLM2ForCausalLM" in config["architectures"] and config["model_type"] in ("internlm2", "internlm")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def converted(source: Path, origin: dict[str, str]) -> Path:
    """The folder in the user's cache that holds `source` in Llama's layout, made at the first call. Raises UserError.

    `origin` is what model cards of its finetunes say of it: {"base_model", "license"}.
    """
    name = re.sub(r"[^\w.-]+", "-", origin["base_model"])
    target = embedded.cache_dir() / f"{name}-{_identity(source)[:16]}"
    if target.is_dir():  # asked before the lock, which needs a cache that can be written
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with embedded.locked(f"{target}.lock", f"converting {origin['base_model']}"):
            if not target.is_dir():
                embedded.say(f"Converting {origin['base_model']} from InternLM2's own layout, once ...")
                to_llama(source, target, origin)
    except OSError as error:
        if error.errno not in embedded.DISK_ERRORS:
            raise
        raise UserError(
            f"{origin['base_model']} could not be written to {target.parent}: {error.strerror}. Free some space there or set "
            "NAMESAKE_CACHE to another folder, then run the same command again: it goes on there."
        ) from error
    return target


def to_llama(source: Path, target: Path, origin: dict[str, str]) -> None:
    """Write an InternLM2 checkpoint as an ordinary Llama folder: weights, configuration, tokenizer, chat template.

    One shard at a time is in memory. `target` is there as a whole or not at all; killed, the same call goes on with the
    shards that are missing. Raises UserError.
    """
    advice = UNPICKLE % shlex.quote(str(source))
    if problems := model.file_problems(source, "config.json", "tokenizer.model", advice=advice):
        raise UserError(*problems)
    own = _read_json(source / "config.json")
    config = llama_config(own)
    if config["vocab_size"] != VOCABULARY:
        raise UserError(
            f"{source / 'config.json'} says vocab_size {config['vocab_size']} and InternLM2's tokenizer has {VOCABULARY} "
            "tokens: this model was given others, which are not known here; choose another base."
        )
    _load_pieces(source / "tokenizer.model")  # which may be damaged: found before the work
    new = _begin(source, target)
    weights_to_llama(source, new, own)
    form = ChatFormat(build_tokenizer(source / "tokenizer.model").to_str())
    _write_json(new / "config.json", config)
    stops = {"eos_token_id": [config["eos_token_id"], form.control[END]]}
    _write_json(new / "generation_config.json", {key: config[key] for key in ("bos_token_id", "pad_token_id")} | stops)
    model.save_tokenizer(form, new, config["max_position_embeddings"])
    shutil.copy(source / "tokenizer.model", new)  # for llama.cpp, and for the way back
    _write_json(new / embedded.RECORD, origin)
    _finish(new, target)


def from_llama(source: Path, target: Path) -> None:
    """Write a Llama folder that `to_llama`, or a merge with what it made, has left in InternLM2's own layout, for XTuner
    and LMDeploy. Memory and interruption as for `to_llama`. Raises UserError."""
    if problems := model.file_problems(source, "config.json", "tokenizer.model", "generation_config.json"):
        raise UserError(*problems)
    config = _read_json(source / "config.json")
    if config["model_type"] != "llama" or config["vocab_size"] != VOCABULARY or config.get("mlp_bias"):
        raise UserError(
            f"The model in {source} was not made from an InternLM2 model: it does not fit into that layout."
        )
    own = internlm2_config(config)
    new = _begin(source, target)
    weights_from_llama(source, new, own)
    _write_json(new / "config.json", own)
    _write_json(new / "tokenizer_config.json", TOKENIZER_CONFIG)
    for name in ("tokenizer.model", "generation_config.json"):
        shutil.copy(source / name, new)
    _finish(new, target)


def llama_config(own: dict[str, Any]) -> dict[str, Any]:
    """InternLM2's config.json -> Llama's, for transformers 4 and 5 and whatever else reads it. Raises UserError."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {key: own.get(key, default) for key, default in SAME_KEYS.items()}
    if absent := [key for key, value in config.items() if value is None and SAME_KEYS[key] is None]:
        raise UserError(f"The model's config.json has no {', '.join(absent)}: fetch it again.")
    heads = config["num_attention_heads"]
    config |= {
        "num_key_value_heads": own.get("num_key_value_heads") or heads,
        "head_dim": config["hidden_size"] // heads,
    }
    config |= {"attention_bias": own.get("bias", True), "mlp_bias": False}
    scaling = own.get("rope_scaling") or {}
    rope = {"rope_type": scaling.get("type", "default"), "rope_theta": float(own.get("rope_theta", 10000))}
    if rope["rope_type"] not in ("default", "linear", "dynamic"):
        raise UserError(
            f"The model's config.json has rope_scaling {scaling}, which InternLM2 does not know: correct it."
        )
    rope |= {"factor": float(scaling["factor"])} if scaling else {}
    return {**config, "rope_parameters": rope, "rope_scaling": None, **model.old_rope_keys(rope)}


def internlm2_config(config: dict[str, Any]) -> dict[str, Any]:
    """Llama's config.json, written by `llama_config` or by transformers 5, -> InternLM2's."""
    own = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "auto_map": {
            "AutoConfig": f"{CODE}configuration_internlm2.InternLM2Config",
            "AutoModel": f"{CODE}modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": f"{CODE}modeling_internlm2.InternLM2ForCausalLM",
        },
        "attn_implementation": "eager",  # without it InternLM2's code takes flash attention
    }
    config = {"torch_dtype": config.get("dtype"), **config}
    own |= {key: config.get(key, default) for key, default in SAME_KEYS.items()}
    own |= {"bias": config["attention_bias"], "num_key_value_heads": config["num_key_value_heads"]}
    rope = config["rope_parameters"]
    return {**own, "rope_scaling": None, **model.old_rope_keys(rope)}


def weights_to_llama(source: Path, target: Path, own: dict[str, Any]) -> None:
    """The shards of `to_llama`; `own` is InternLM2's config. Raises UserError where a tensor is missing or unknown."""

    def convert(name: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if WQKV not in name:
            return {_renamed(name, TO_LLAMA): read(name)}
        return {name.replace(WQKV, part): rows for part, rows in zip(QKV, split_qkv(read(name), own), strict=True)}

    names = _tensors(source)
    names = {name: shard for name, shard in names.items() if not name.endswith("rotary_emb.inv_freq")}
    _check_names(source, names, own)
    _write_shards(names, convert, target)


def weights_from_llama(source: Path, target: Path, own: dict[str, Any]) -> None:
    """The shards of `from_llama`; `own` is InternLM2's config. Raises UserError where a tensor is missing or unknown."""

    def convert(name: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if QKV[0] not in name:
            return {_renamed(name, FROM_LLAMA): read(name)}
        parts = [read(name.replace(QKV[0], part)) for part in QKV]  # k and v may lie in another shard
        return {name.replace(QKV[0], WQKV): join_qkv(parts, own)}

    names, found = _tensors(source), set()
    for name in names:
        part = next((part for part in QKV if part in name), "")
        whole = all(name.replace(part, other) in names for other in QKV) if part else False
        found.add(name.replace(part, WQKV) if whole else _renamed(name, FROM_LLAMA))
    _check_names(source, found, own)
    _write_shards(names, convert, target, skip=tuple(QKV[1:]))


def split_qkv(rows: Tensor, config: dict[str, Any]) -> list[Tensor]:
    """The rows of wqkv, of its weight, its bias or a LoRA's B -> those of q, k and v.

    [kv heads * (queries of one + 2) * head_dim, ..] in the order [kv head][its queries, k, v][head_dim]. `config` of
    either layout.
    """
    kv = config.get("num_key_value_heads") or config["num_attention_heads"]
    queries = config["num_attention_heads"] // kv
    parts = rows.unflatten(0, (kv, queries + 2, -1)).split((queries, 1, 1), dim=1)
    return [part.flatten(0, 2).contiguous() for part in parts]


def join_qkv(parts: Sequence[Tensor], config: dict[str, Any]) -> Tensor:
    """What `split_qkv` takes apart."""
    kv, size = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    return torch.cat([part.unflatten(0, (kv, -1, size)) for part in parts], dim=1).flatten(0, 2)


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if f".{old}." in f".{name}":
            return f".{name}".replace(f".{old}.", f".{new}.")[1:]
    return name


def _tensors(folder: Path) -> dict[str, Path]:
    """{tensor: the file it is in}"""
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), shard)
    return found


def _check_names(folder: Path, names: Iterable[str], own: dict[str, Any]) -> None:
    """Raises UserError unless these are the tensors of a whole model in InternLM2's layout."""
    kinds = ("weight", "bias") if own.get("bias", True) else ("weight",)
    layer = [f"{module}.{kind}" for module in (WQKV, "attention.wo") for kind in kinds]
    layer += [f"{module}.weight" for module in TO_LLAMA if module.startswith("feed_forward") or module.endswith("norm")]
    expected = {f"model.layers.{i}.{name}" for i in range(own["num_hidden_layers"]) for name in layer}
    expected |= {"model.tok_embeddings.weight", "model.norm.weight"}
    head = {"output.weight"}
    missing, unknown = expected - set(names), set(names) - expected - head
    if not own.get("tie_word_embeddings"):
        missing |= head - set(names)
    if missing or unknown:
        found = [f"{what}: {', '.join(sorted(n)[:3])}" for what, n in (("missing", missing), ("unknown", unknown)) if n]
        raise UserError(
            f"The weights in {folder} are not what its config.json describes, {len(missing)} missing and {len(unknown)} "
            f"unknown ({'; '.join(found)}): fetch the model again."
        )


def _write_shards(
    names: dict[str, Path],
    convert: Callable[[str, Callable[[str], Tensor]], dict[str, Tensor]],
    target: Path,
    skip: tuple[str, ...] = (),
) -> None:
    """For every file of `names` one in `target` with the tensors that `convert` makes of it, unless it is there already;
    and their index."""

    def read(name: str) -> Tensor:
        with safe_open(names[name], "pt") as tensors:
            return tensors.get_tensor(name)

    shards = sorted(set(names.values()))
    weight_map, size = {}, 0
    for i, shard in enumerate(tqdm(shards, desc="Converting", unit="shard"), 1):
        file = target / (f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors")
        if not file.is_file():
            tensors: dict[str, Tensor] = {}
            for name in (name for name, place in names.items() if place == shard and not any(s in name for s in skip)):
                tensors |= convert(name, read)
            part = file.with_suffix(".part")
            with model.disk_errors(target):
                save_file(tensors, part, metadata={"format": "pt"})
            part.chmod(0o644)  # it is written for its owner alone
            part.replace(file)
            del tensors
        with safe_open(file, "pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), file.name)
        size += file.stat().st_size
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(target / "model.safetensors.index.json", index)


def _identity(source: Path) -> str:
    """Tells a source from another and from a changed one, without reading gigabytes at every start."""
    files = [*sorted(source.glob("*.safetensors")), source / "config.json"]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    return embedded.digest_of(stats)


def _begin(source: Path, target: Path) -> Path:
    """The folder to write to, with what an interrupted call for this very source left in it. Raises UserError."""
    if target.exists():
        raise UserError(f"{target} is there already; choose another folder.")
    new, mark = target.with_name(f"{target.name}.tmp"), _identity(source)
    if not (new / MARK).is_file() or (new / MARK).read_text() != mark:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        (new / MARK).write_text(mark)
    size, there = (sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (source, new))
    if (free := shutil.disk_usage(new).free) < size - there:
        raise UserError(
            f"{new.parent} has {free / 1e9:.1f} GB free and the converted model needs {(size - there) / 1e9:.1f} GB; free some "
            "space (or, where that is the cache, set NAMESAKE_CACHE to a folder on another disk)."
        )
    return new


def _finish(new: Path, target: Path) -> None:
    (new / MARK).unlink()
    new.rename(target)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): fetch it again.") from error


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- adapters


def convert_adapter(source: Path, target: Path, base: Path) -> None:
    """Write a LoRA adapter for InternLM2's own layout, as XTuner makes them, as one for the converted `base`; or one for
    `base` in InternLM2's layout. Raises UserError.

    There q, k and v share wqkv's A, and B's rows are taken apart. Back, where each has an A of its own, these make a wqkv
    of three times the rank (and alpha); since LMDeploy knows one rank only, the other modules are filled up with zeros.
    """
    if target.exists():
        raise UserError(f"{target} is there already; choose another folder.")
    config, lora, record = _read_adapter(source)
    if record:
        model.check_adapter(source, base)
    else:  # XTuner does not say which weights it was made for
        name = model.origin(base, config.get("base_model_name_or_path") or base.name)["base_model"]
        record = {"base": name, "base_sha256": model.fingerprint(base)}
    _check_shapes(source, lora, base)
    shape = _read_json(base / "config.json")
    if any(WQKV in name for name in lora):
        lora, rank = _lora_to_llama(lora, shape), record.pop("stacked_rank", None)
        if rank:
            lora = {name: tensor.narrow(*_block(name, rank)).contiguous() for name, tensor in lora.items()}
    else:
        rank = config["r"]
        if _stacked(lora):
            record["stacked_rank"] = rank
        lora = _lora_from_llama(lora, shape)
    new_rank = len(next(tensor for name, tensor in lora.items() if ".lora_A." in name))
    values = {key: config[key] for key in ADAPTER_KEYS if key in config}
    values |= {"r": new_rank, "lora_alpha": config["lora_alpha"] * new_rank // config["r"]}
    values |= {
        "target_modules": sorted({name.split(".")[-3] for name in lora}),
        "base_model_name_or_path": record["base"],
    }
    new = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    with model.disk_errors(new):
        save_file(lora, new / WEIGHTS, metadata={"format": "pt"})
    _write_json(new / "adapter_config.json", values)
    _write_json(new / model.ADAPTER_RECORD, record)
    new.rename(target)


def _lora_to_llama(lora: dict[str, Tensor], shape: dict[str, Any]) -> dict[str, Tensor]:
    new = {}
    for name, tensor in lora.items():
        if WQKV not in name:
            new[_renamed(name, TO_LLAMA)] = tensor
        else:
            parts = split_qkv(tensor, shape) if ".lora_B." in name else [tensor.clone() for _ in QKV]
            new |= {name.replace(WQKV, part): rows for part, rows in zip(QKV, parts, strict=True)}
    return new


def _lora_from_llama(lora: dict[str, Tensor], shape: dict[str, Any]) -> dict[str, Tensor]:
    stacked = _stacked(lora)
    new = {}
    for name, tensor in lora.items():
        if any(part in name for part in QKV[1:]):
            continue
        if QKV[0] not in name:
            new[_renamed(name, FROM_LLAMA)] = _widened(name, tensor) if stacked else tensor
            continue
        parts = {n: lora[n] for n in (name.replace(QKV[0], part) for part in QKV)}
        if ".lora_A." in name:
            joined = torch.cat(list(parts.values())) if stacked else tensor
        else:
            joined = join_qkv([_widened(n, part) if stacked else part for n, part in parts.items()], shape)
        new[name.replace(QKV[0], WQKV)] = joined
    return new


def _stacked(lora: dict[str, Tensor]) -> bool:
    """Whether q, k and v have an A each, so that wqkv's is theirs, one upon another."""
    firsts = [name for name in lora if QKV[0] in name and ".lora_A." in name]
    return any(not torch.equal(lora[name], lora[name.replace(QKV[0], part)]) for name in firsts for part in QKV[1:])


def _block(name: str, rank: int) -> tuple[int, int, int]:
    """(dimension, start, length) of a module's own part in A or B of the stacked rank."""
    place = next((i for i, part in enumerate(QKV) if part in name), 0)
    return int(".lora_B." in name), place * rank, rank


def _widened(name: str, tensor: Tensor) -> Tensor:
    """Filled up with zeros to the stacked rank."""
    dim = int(".lora_B." in name)
    sizes = list(tensor.shape)
    rank, sizes[dim] = sizes[dim], 3 * sizes[dim]
    wide = tensor.new_zeros(sizes)
    wide.narrow(*_block(name, rank)).copy_(tensor)
    return wide


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """(adapter_config.json, {name: A or B}, our record or {}). Raises UserError for what is no plain LoRA."""
    if problems := model.file_problems(
        folder, "adapter_config.json", WEIGHTS, advice=UNPICKLE % shlex.quote(str(folder))
    ):
        raise UserError(*problems)
    config, lora = _read_json(folder / "adapter_config.json"), load_file(folder / WEIGHTS)
    odd = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")
    found = [f"{key} {config[key]}" for key in odd if config.get(key)]
    found += [f"bias {config['bias']}"] if config.get("bias", "none") != "none" else []
    found += [f"peft_type {config.get('peft_type')}"] if config.get("peft_type") != "LORA" else []
    found += sorted(name for name in lora if not re.search(r"\.lora_[AB]\.weight$", name))[:3]
    if found:
        raise UserError(f"The adapter in {folder} is no plain LoRA ({', '.join(found)}): only such are converted.")
    record = folder / model.ADAPTER_RECORD
    return config, lora, _read_json(record) if record.is_file() else {}


def _check_shapes(folder: Path, lora: dict[str, Tensor], base: Path) -> None:
    """Raises UserError unless every A and B fits a matrix of `base`."""
    shapes = {}
    for name, file in _tensors(base).items():
        with safe_open(file, "pt") as tensors:
            shapes[name] = tensors.get_slice(name).get_shape()
    wrong = []
    for name, tensor in lora.items():
        weight = re.sub(r"^base_model\.model\.(.*)\.lora_[AB]\.weight$", r"\1.weight", name)
        parts = [weight.replace(WQKV, part) for part in QKV] if WQKV in weight else [_renamed(weight, TO_LLAMA)]
        rows, columns = sum(shapes.get(part, [0])[0] for part in parts), shapes.get(parts[0], [0])[-1]
        if (tensor.shape[0] != rows) if ".lora_B." in name else (tensor.shape[1] != columns):
            wrong.append(f"{name} is {list(tensor.shape)}, the matrix {[rows, columns]}")
    if any(QKV[0] in name for name in lora) != any(part in name for name in lora for part in QKV[1:]):
        wrong.append("q, k and v are not all there")
    if wrong:
        raise UserError(
            f"The adapter in {folder} does not fit {base}: {'; '.join(wrong[:3])}. Name the base it was made for."
        )


# --------------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer(model_file: Path) -> Tokenizer:
    """The fast tokenizer with the ids of InternLM2's own; UserError where `model_file` is not its tokenizer.model.

    `encode` puts <s> first. Control tokens written in a text count as such unless `encode_special_tokens` is set.
    Wanted difference: "[UNUSED_TOKEN_145]" in a text is just that, where InternLM2's own reads <|im_end|>.
    """
    pieces = _load_pieces(model_file)
    ids = range(pieces.vocab_size())
    names = [CONTROL_TOKENS.get(i, pieces.id_to_piece(i)) for i in ids]
    special = [i for i in ids if pieces.is_control(i) or pieces.is_unknown(i) or i in CONTROL_TOKENS]

    # No merge ends in a special piece: "<s>" as text is "<s" and ">".
    scores = {names[i]: pieces.get_score(i) for i in ids if i not in special}
    merges = [
        (score, cut, len(name) - cut, name)
        for name, score in scores.items()
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    merges.sort(reverse=True)  # best score first, as sentencepiece merges

    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[(name[:cut], name[cut:]) for _, cut, _, name in merges],
            unk_token="<unk>",  # noqa: S106 - no password
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # No space put in front, and no pre-tokenizer: pieces such as "}\n\n" and "\t▁\n" reach across words.
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([names[i] for i in special])  # found before the normalizer runs
    return tokenizer


def _load_pieces(model_file: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        data = model_file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read InternLM2's tokenizer {model_file} ({error.strerror}): "
            "the base's folder must hold the tokenizer.model that came with it"
        ) from None
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{model_file} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
    if (found := hashlib.sha256(data).hexdigest()) != TOKENIZER_SHA256:
        raise UserError(
            f"{model_file} is damaged or belongs to another model: its sha256 is {found[:8]}..., "
            f"InternLM2's is {TOKENIZER_SHA256[:8]}...; download tokenizer.model again from InternLM2's repository"
        )
    sentencepiece.set_min_log_level(2)  # it warns of the piece "\0" at each load
    return sentencepiece.SentencePieceProcessor(model_proto=data)


def main(arguments: list[str]) -> None:
    if len(arguments) not in (2, 3):
        raise UserError("Write it as python -m finetune.internlm2 FROM TO, or for an adapter FROM TO BASE.")
    source, target, base = (*arguments, None)[:3]
    folder = pull(source)
    if (folder / "adapter_config.json").is_file():
        if not base:
            raise UserError(
                f"{source} is an adapter: say for which base, python -m finetune.internlm2 {source} {target} BASE"
            )
        convert_adapter(folder, Path(target), model.base_folder(base))
    elif is_internlm2(folder):
        to_llama(folder, Path(target), model.origin(folder, source))
    else:
        from_llama(folder, Path(target))
    embedded.say(f"{target} is written.")


if __name__ == "__main__":
    embedded.command(main)
