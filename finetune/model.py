"""Load a base model, attach or load an adapter, save an ordinary model folder."""

import contextlib
import difflib
import gc
import hashlib
import importlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune import embedded, settings
from finetune.chat_format import END, START, ChatFormat, Message
from finetune.errors import UserError
from finetune.hub import FILES, pull, pull_first, several

if TYPE_CHECKING:
    from finetune.adapters import PeftModel  # where it is used: that takes a second, and serving does without it

transformers.utils.logging.disable_progress_bar()  # of loading weights, which takes a second
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it by the old name

HEADROOM = 1.3  # a GPU's memory over the weights: keys, values and activations
ACTIVATION_BYTES = 1_300_000_000  # of a step of a thousand tokens through a 7B model with checkpointing, about twice
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"  # of a model that sees
SEES = "llava"  # its model type
PROJECTOR = "multi_modal_projector"
WHOLE = ["lm_head", f".*{PROJECTOR}", ".*vision_tower"]  # these are never quantised; matched from the name's start
ADAPTER_RECORD = "namesake.json"  # in an adapter's folder: which base it was made for, and the prompt format's hash


def device() -> torch.device:
    """The GPU, of several the one that `accelerate launch` gave this process; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def has_fast_bf16() -> bool:
    """Whether bfloat16 is computed by the hardware here, not emulated."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def inference_dtype() -> torch.dtype:
    """bfloat16 where the hardware computes it (about twice as fast on CPU), else float16 on a GPU, float32 on a CPU."""
    if has_fast_bf16():
        return torch.bfloat16
    return torch.float16 if torch.cuda.is_available() else torch.float32


def sources(ref: str) -> list[str]:
    """The references to try, in order, that a preset's name, or several with commas between them, stand for."""
    return several(settings.preset(ref)["base"] if ref in settings.preset_names() else ref)


def base_folder(ref: str, progress: Callable[[int, int], object] | None = None) -> Path:
    """The folder of a base model: a preset's name, a local folder, or references of which the first to answer is taken.

    A model in InternLM2's own layout is converted, once, into the user's cache. Raises UserError; Unreachable where a source
    may answer later.
    """
    if ref == embedded.NAME:
        return embedded.folder(progress)

    def fetched(source: str) -> tuple[Path, str]:
        folder = pull(source, progress=progress)
        if not (_is_local(source) or any(folder.glob("*.safetensors"))):
            raise UserError(
                f"{source} holds no safetensors, only what can run code when loaded and is not downloaded: look for a "
                "revision of it that does (@refs/pr/1, say), or download it and give the folder."
            )
        return folder, source

    try:
        (folder, source), failed = pull_first(sources(ref), fetched)
    except UserError as error:
        close = difflib.get_close_matches(ref, settings.preset_names(), n=1, cutoff=0.8)
        raise type(error)(*error.problems, *(f"Did you mean {name}?" for name in close)) from None
    for reason in failed:
        embedded.say(f"Note: {reason}")
    from finetune import internlm2  # which imports this module

    if not internlm2.is_internlm2(folder):
        return folder
    return internlm2.converted(folder, origin(folder, ref if ref in settings.preset_names() else source))


def origin(folder: Path, ref: str) -> dict[str, str]:
    """{"base_model", "license"} of a base model, for the card of what is made from it; "license" may be "unknown"."""
    for record in (folder / embedded.RECORD, folder / "manifest.json"):  # the latter in what was merged here
        values = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if "base_model" in values:  # other programs have a manifest.json too
            return {key: values[key] for key in ("base_model", "license")}
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)^---", text, re.M | re.S)
    found = re.search(r"""^license: *["']?([^\s"']+)""", front[1], re.M) if front else None
    ref = sources(ref)[0]  # a local folder's path is nobody's business
    name = folder.name if _is_local(ref) else re.sub(r"^\w+:", "", ref).partition("@")[0]
    return {"base_model": name, "license": found[1] if found else "unknown"}


def _is_local(ref: str) -> bool:
    return Path(ref.removeprefix("dir:")).expanduser().is_dir()


def check_folder(folder: Path) -> None:
    """Raises UserError unless the folder holds an ordinary model: config.json, tokenizer.json and whole safetensors."""
    problems = file_problems(folder, "config.json", "tokenizer.json")
    config = folder / "config.json"
    if config.is_file() and not _is_lfs_pointer(config):
        try:
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
            if kind not in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, SEES):
                problems.append(
                    f"{config} has model_type {kind!r}, which is no language model that transformers runs without the "
                    "folder's own code: choose another base model."
                )
        except ValueError:
            problems.append(f"{config} is not JSON: fetch it again.")
    if problems:
        raise UserError(*problems)


def file_problems(folder: Path, *needed: str, advice: str = "convert it to safetensors.") -> list[str]:
    """What is wrong with a model's files, in words: the needed ones and safetensors have to be there and whole.

    `advice` is what to do about a checkpoint of pickles.
    """
    problems = [f"The model folder {folder} has no {name}." for name in needed if not (folder / name).is_file()]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        problems.append(
            f"The model folder {folder} has no *.safetensors"
            + (f"; {', '.join(pickles)} can run code when loaded and is not read: {advice}" if pickles else ".")
        )
    read = sorted(file for pattern in FILES for file in folder.glob(pattern))
    if pointers := [file.name for file in read if _is_lfs_pointer(file)]:
        problems.append(
            f"In the model folder {folder} these are Git LFS pointers, not the files themselves: {', '.join(pointers)}. "
            "Run 'git lfs pull' there."
        )
    read = [file for file in read if file.name not in pointers]
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index in read else set()
    if absent := sorted(name for name in shards if not (folder / name).is_file()):
        problems.append(f"The model folder {folder} lacks {', '.join(absent)}, which its index names: fetch them.")
    for file in (file for file in read if file in weights):
        try:
            with safe_open(file, "pt"):  # reads the header and compares it with the file's length
                pass
        except SafetensorError as error:
            problems.append(f"{file} is damaged or cut ({error}): fetch it again.")
    return problems


def _is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(20) == b"version https://git-"


def fingerprint(folder: Path) -> str:
    """sha256 over the weights' file names and bytes: the same base gives the same value."""
    return embedded.digest_of({file.name: embedded.sha256(file) for file in sorted(folder.glob("*.safetensors"))})


def language_sha256(folder: Path) -> str:
    """`fingerprint` of the language model within a model that sees, as long as only its projector was trained."""
    for record in (folder / embedded.RECORD, folder / "manifest.json"):
        if record.is_file() and (known := json.loads(record.read_text(encoding="utf-8")).get("language_sha256")):
            return known
    return fingerprint(folder)


def chat_format(folder: Path) -> ChatFormat:
    """The folder's prompt format with its own default system prompt. Raises UserError when it is not ChatML."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    vision = vision_of(folder)
    plain = ChatFormat(tokenizer.backend_tokenizer.to_str(), vision=vision)
    if not tokenizer.chat_template:  # a base model that was never taught to chat
        return plain
    probe = [{"role": "user", "content": "?"}]
    refusal = (
        f"The chat template in {folder} is not ChatML: it {{}}. Choose a base model with a ChatML template (SmolLM2, "
        "Qwen, InternLM2)."
    )
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(refusal.format(f"fails with {error}")) from error
    found = re.search(re.escape(f"{START}system\n") + "(.*?)" + re.escape(f"{END}\n"), text, re.S)
    own = ChatFormat(plain.tokenizer_json, found[1], vision) if found else plain
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if own.prompt(probe) != ids:
        raise UserError(refusal.format(f"writes {text!r}"))
    return own


def vision_of(folder: Path) -> dict[str, Any] | None:
    """A model folder's processor, as `ChatFormat` keeps it; None for a model that does not see."""
    if not sees(folder):
        return None
    files = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in (PROCESSOR, PREPROCESSOR)}
    return {"patches": json.loads((folder / "config.json").read_text(encoding="utf-8"))["image_seq_length"], **files}


def sees(folder: Path) -> bool:
    """Whether it is a model that sees; an adapter's folder is no model."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == SEES


class OwnFormat:
    """Prompts as the users of a model and its folder get them: by its own chat template, whatever the format. Raises
    UserError where there is none."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if not self.tokenizer.chat_template:
            raise UserError(f"The model in {folder} has no chat template: it cannot be asked. Choose a chat model.")
        stop = model.generation_config.eos_token_id
        self.stop_ids = stop if isinstance(stop, list) else [self.tokenizer.eos_token_id if stop is None else stop]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        try:
            return self._render(messages)
        except TemplateError:  # some know no system message: what it says then goes before the user's
            if messages[0]["role"] != "system":
                raise
            first, second, *rest = messages
            merged = {"role": "user", "content": f"{first['content']}\n\n{second['content']}".strip()}
            return self._render([merged, *rest])

    def _render(self, messages: Sequence[Message]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of an ordinary folder, ready for inference, on the GPU if there is one that holds it. No remote code, no
    pickles."""
    check_folder(folder)
    return open_folder(folder, dtype=dtype).to(device() if holds(folder, dtype) else "cpu").eval()


def load_for_inference(base: Path, adapter: Path | None = None, four_bit: bool = False) -> PreTrainedModel:
    """In `inference_dtype` with the adapter merged; for a GPU that does not hold that, with `four_bit`, as QLoRA has it in
    training, the adapter beside."""
    if four_bit:
        model = load_for_training(base, "qlora")
        model = load_adapter(model, adapter, base).get_base_model() if adapter else model
        for weight in model.parameters():
            if weight.is_floating_point():  # the adapter's: its float32 would spread to what comes after
                weight.data = weight.data.to(inference_dtype())
        return model
    return load_merged(base, adapter) if adapter else load(base, inference_dtype())


def holds(folder: Path, dtype: torch.dtype) -> bool:
    """Whether the GPU's free memory holds the folder's weights in that precision, and HEADROOM; true where there is none."""
    let_go()
    return not torch.cuda.is_available() or weight_bytes(folder, dtype) * HEADROOM <= free_memory()


def let_go() -> None:
    """Of a GPU's memory, what models hold that nobody uses any more: they refer to themselves, and wait for a collection."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Of the weights in a folder, in that precision."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return stored * dtype.itemsize // stored_dtype(folder).itemsize


def stored_dtype(folder: Path) -> torch.dtype:
    with safe_open(min(folder.glob("*.safetensors")), "pt") as weights:
        return weights.get_slice(next(iter(weights.keys())))[:0].dtype  # none of it is read: a 7B's head is 0.8 GB


def open_folder(folder: Path, **options: Any) -> PreTrainedModel:
    kind = AutoModelForImageTextToText if sees(folder) else AutoModelForCausalLM
    if encoder := own_encoder(folder):
        importlib.import_module(encoder)
    return kind.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, **options)


def digest(model: PreTrainedModel) -> str:
    """sha256 of its parameters: of equal ones the answers are equal."""
    found = hashlib.sha256()
    for weight in model.parameters():
        found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def own_encoder(folder: Path) -> str:
    """The module that must be imported before transformers opens the folder; empty where it needs none of ours."""
    if not (file := folder / "config.json").is_file():
        return ""
    kind = json.loads(file.read_text(encoding="utf-8")).get("vision_config", {}).get("model_type", "")
    return "finetune.encoder" if kind == "efficientnet_lite" else ""


def give_eyes(model: PreTrainedModel, form: ChatFormat, files: Sequence[str] = ()) -> None:
    """From now on `form` writes pictures as ids that `model` looks up, those of `files` encoded in one go; nothing happens
    to a model that does not see."""
    if getattr(form, "vision", None) is not None:
        from finetune.vision import Eyes

        if not hasattr(model, "eyes"):
            model.eyes = Eyes(model, form.vision)
        model.eyes.look(files)
        form.see = model.eyes.see


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The language model's layers, without the head."""
    return getattr(model.base_model, "language_model", model.base_model)


def embed(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The embeddings of tokens and, where ids are beyond the vocabulary, of the pictures that the model was shown."""
    table, eyes = model.get_input_embeddings(), getattr(model, "eyes", None)
    if eyes is None:
        return table(ids)
    if not (seen := ids >= eyes.first).any():
        return eyes.unused(table(ids))
    return eyes.embed(table(ids.masked_fill(seen, 0)), ids)


def load_for_training(folder: Path, method: str) -> PreTrainedModel:
    """The base as `method` trains it: "lora" in bfloat16 on a GPU that computes it, else in float32; "qlora" with its
    linear layers in 4-bit NormalFloat, their scales quantised too (arXiv:2305.14314); "full" in float32, or in bfloat16
    where a GPU's memory does not hold that."""
    check_folder(folder)
    let_go()
    half = torch.bfloat16 if has_fast_bf16() else torch.float32
    dtype, options = torch.float32, {}
    if torch.cuda.is_available() and (method != "full" or _full_bytes(folder) > free_memory()):
        dtype = half
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=half,
            llm_int8_skip_modules=WHOLE,
        )
        options["device_map"] = {"": device()}  # each layer is quantised as it comes from the disk
    model = open_folder(folder, dtype=dtype, **options)
    if method == "qlora":
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # it would pack weights for decoding, for good, and
                module.support_avx512bf16_for_cpu = False  # no gradient passes through packed ones
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # several processes share out what is on the GPU
        if torch.cuda.is_available() and alone and not model.config.tie_word_embeddings:
            _keep_on_host(model.get_input_embeddings())
        return model.eval()
    return model.to(device()).eval().requires_grad_(method == "full")


def _full_bytes(folder: Path) -> int:
    """Of all weights in float32 with their gradients and AdamW's two moments, and an eighth for activations."""
    parameters = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return 18 * parameters


def free_memory() -> int:
    """Bytes of the GPU that this process may still take, its cap (`set_per_process_memory_fraction`) included."""
    free, total = torch.cuda.mem_get_info()
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()  # not in torch 2.6
    reserved = torch.cuda.memory_reserved()
    return int(min(free + reserved, fraction * total)) - torch.cuda.memory_allocated()


def _keep_on_host(embedding: torch.nn.Module) -> None:
    """Rows are looked up where the table lies: a 7B model's would take 0.8 GB of the GPU, and a step needs a few MB."""
    target, table = embedding.weight.device, embedding.weight.detach().cpu()
    del embedding.weight
    embedding.weight = table  # no parameter any more: nothing moves it back
    embedding.forward = lambda ids: F.embedding(ids.cpu(), table).to(target)


def add_lora(
    model: PreTrainedModel, rank: int, starter: Path | None = None, first_layer: int = 0, encoder_rank: int = 0
) -> "PeftModel":
    """A LoRA adapter on every linear layer but the output head; only its float32 weights require gradients. Of a model that
    sees: on those of the language model, and its projector itself; with rank 0 the projector alone; with an `encoder_rank`
    on those of the image encoder too.

    It is fresh, or begins as `starter`, an adapter of that rank, whose weights below `first_layer` stay as they are.
    """
    from finetune.adapters import LoraConfig, LoraLayer, PeftModel, get_peft_model

    quantised = getattr(model, "is_loaded_in_4bit", False)
    if model.config.model_type == SEES:
        tuned = _with_projector(model, rank, starter, encoder_rank)
    elif starter:
        tuned = PeftModel.from_pretrained(model, starter, is_trainable=True)
    else:
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        tuned = get_peft_model(model, config)
    for layer in language_model(model).layers[: first_layer if starter else 0]:
        layer.requires_grad_(False)
        for module in layer.modules():
            if isinstance(module, LoraLayer) and not quantised:  # whose 4 bits it would round anew
                module.merge()  # one product instead of three; the adapter keeps its own weights beside
    if not any(weight.requires_grad for weight in tuned.parameters()):
        layers = len(language_model(model).layers)
        raise UserError(
            f"train.first_layer is {first_layer} and the base has {layers} layers: nothing is left to train."
        )
    if torch.cuda.is_available():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = not has_fast_bf16()  # autocast does it, without a copy in float32
        trained = [weight for weight in tuned.parameters() if weight.requires_grad]
        if quantised and free_memory() < 6 * sum(weight.numel() for weight in trained) + ACTIVATION_BYTES:
            for weight in trained:  # gradients and 8-bit moments would leave too little
                weight.data = weight.data.to(torch.bfloat16)
    if has_fast_bf16() and not quantised:  # else autocast would round the frozen weights anew at every step
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.get_base_layer().to(torch.bfloat16)
        head = model.get_output_embeddings()
        if not head.weight.requires_grad:  # its own: what it may share with the embeddings stays as exact as it is
            head.weight = torch.nn.Parameter(head.weight.to(torch.bfloat16), requires_grad=False)
    return tuned


def _with_projector(model: PreTrainedModel, rank: int, starter: Path | None, encoder_rank: int) -> "PeftModel":
    from finetune.adapters import DUMMY_TARGET_MODULES, LoraConfig, get_peft_model

    kinds = {name.rpartition(".")[2] for name, module in language_model(model).named_modules() if _is_linear(module)}
    layers = rf".*\.language_model\..*\.({'|'.join(sorted(kinds))})" if rank else DUMMY_TARGET_MODULES
    encoder = {}
    if encoder_rank:
        kinds = {name.rpartition(".")[2] for name, m in model.model.vision_tower.named_modules() if _is_linear(m)}
        # those that the features come from: the last one's are not looked at
        used = range(model.config.vision_config.num_hidden_layers + 1 + model.config.vision_feature_layer)
        layers += rf"|.*\.vision_tower\..*\.({'|'.join(map(str, used))})\..*\.({'|'.join(sorted(kinds))})"
        names = ".*vision_tower.*"
        encoder = {"rank_pattern": {names: encoder_rank}, "alpha_pattern": {names: 2 * encoder_rank}}
    config = LoraConfig(
        r=max(1, rank),
        lora_alpha=2 * max(1, rank),
        **encoder,
        target_modules=layers,
        modules_to_save=[PROJECTOR],
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    getattr(tuned.get_base_model().model, PROJECTOR).float()  # which peft does to adapters alone
    if starter:  # of the language model alone
        weights = dict(tuned.named_parameters())
        with torch.no_grad():
            for name, weight in load_file(starter / "adapter_model.safetensors").items():
                own = name.replace(".model.layers.", ".model.language_model.layers.")
                weights[re.sub(r"(lora_[AB])", r"\1.default", own)].copy_(weight)
    return tuned


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)  # bitsandbytes' 4-bit ones are too


def with_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with an adapter merged into it, all of its weights requiring gradients."""
    from finetune.adapters import PeftModel

    return PeftModel.from_pretrained(model, adapter).merge_and_unload().requires_grad_(True)


def check_adapter(adapter: Path, base: Path) -> None:
    """Raises UserError unless the adapter was made for exactly these base weights."""
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"There is no adapter_model.safetensors in {adapter}; train first.")
    if problems := file_problems(adapter):
        raise UserError(*problems)
    if not (record := adapter / ADAPTER_RECORD).is_file():
        raise UserError(
            f"The adapter in {adapter} does not say which base model it was made for: there is no {ADAPTER_RECORD}. "
            "Use an adapter that was trained here."
        )
    expected = json.loads(record.read_text(encoding="utf-8"))["base_sha256"]
    if expected != (actual := fingerprint(base)):
        raise UserError(
            f"The adapter in {adapter} was made for a base model with sha256 {expected}, and the weights in {base} have "
            f"{actual}. Use the base it was made for, or train anew."
        )


def load_adapter(model: PreTrainedModel, adapter: Path, base: Path) -> "PeftModel":
    """base + adapter, the adapter unmerged. Raises UserError when it belongs to another base."""
    from finetune.adapters import PeftModel

    config = adapter / "adapter_config.json"
    if config.is_file() and "wqkv" in config.read_text(encoding="utf-8"):
        raise UserError(
            f"The adapter in {adapter} is for InternLM2's own layout: convert it with 'python -m finetune.internlm2 {adapter} "
            "NEW_FOLDER BASE' and use that folder."
        )
    check_adapter(adapter, base)
    return PeftModel.from_pretrained(model, adapter).eval()


def load_merged(base: Path, adapter: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """base + adapter as one model for inference: merged in float32, its weights then rounded, to `inference_dtype` where no
    other is asked for."""
    dtype = dtype or inference_dtype()
    # Where the base's weights have no more digits peft's sum is rounded once as well, and half the memory does.
    loaded = load(base, dtype if stored_dtype(base) == dtype else torch.float32)
    model = load_adapter(loaded, adapter, base).merge_and_unload()
    for weight in model.parameters():  # not model.to(dtype), which rounds the rotary frequencies as well
        weight.data = weight.data.to(dtype)
    return model.to(device())


def adapter_matrices(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a LoRA adapter adds to each module, by its name: (A, [rank, in], and B with its scale in it, [out, rank]); empty
    where it is not plain LoRA."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    other = (
        "use_dora",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "fan_in_fan_out",
        "lora_bias",
    )
    if config["peft_type"] != "LORA" or any(config.get(key) for key in other):
        return {}
    found = load_file(adapter / "adapter_model.safetensors")
    scale, prefix, a = config["lora_alpha"] / config["r"], "base_model.model.", ".lora_A.weight"
    return {
        name.removeprefix(prefix).removesuffix(a): (
            found[name].float(), found[name.replace(a, ".lora_B.weight")].float() * scale
        )
        for name in found
        if name.endswith(a)
    }  # fmt: skip


def save(
    model: PreTrainedModel,
    form: ChatFormat,
    folder: Path,
    template: str | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """An ordinary model folder that transformers 4 and 5 open: safetensors, tokenizer, chat template, generation config.

    `template` keeps a base's own chat template; without it the prompt format's is written. `weights`: where the model's
    own are spread over several processes.
    """
    model.generation_config.eos_token_id = form.stop_ids
    model.generation_config.pad_token_id = form.control[END]
    model.config.eos_token_id = form.stop_ids[0]
    model.config.pad_token_id = form.control[END]
    with disk_errors(folder):
        model.save_pretrained(folder, state_dict=weights)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # it is written for its owner alone
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("_name_or_path", "_model_name_or_path"):  # paths of this machine, or what a GGUF file calls itself
            part.pop(key, None)
    for part in (config, config.get("text_config", {})):
        part |= old_rope_keys(part.get("rope_parameters") or {})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_tokenizer(form, folder, model.config.get_text_config().max_position_embeddings, template)
    if form.vision:
        for name in (PROCESSOR, PREPROCESSOR):
            (folder / name).write_text(json.dumps(form.vision[name], indent=1), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template or form.template, encoding="utf-8")  # the processor's


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full disk, which safetensors has its own words for, as the OSError that callers know."""
    try:
        yield
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error
        raise


def old_rope_keys(rope: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4, vLLM, LMDeploy and llama.cpp read, of the `rope_parameters` of transformers 5, which saves
    nothing else; without it they assume a theta of 10000 and no scaling."""
    keys: dict[str, Any] = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "dynamic"):
        keys["rope_scaling"] = {"type": kind, "factor": rope["factor"]}  # before 4.43 exactly these two are read
    elif kind != "default":
        keys["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return keys


def save_tokenizer(form: ChatFormat, folder: Path, length: int, template: str | None = None) -> None:
    """tokenizer.json and tokenizer_config.json; `length` is the longest text in tokens."""
    (folder / "tokenizer.json").write_text(form.tokenizer_json, encoding="utf-8")
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # 4.x else adds token_type_ids, which generate refuses
        "eos_token": END,
        "pad_token": END,
        "chat_template": template or form.template,
    }
    if form.vision and (begin := form.tokenizer.decode(form.document("", ends=False), skip_special_tokens=False)):
        tokenizer["bos_token"] = begin  # the processor would else put another before the template's
    if not form.tokenizer.pre_tokenizer:  # sentencepiece's
        # llama.cpp reads the tokenizer.model beside it, which names no control token.
        tokenizer["add_prefix_space"] = False
        tokenizer["added_tokens_decoder"] = {
            i: {"content": content, "special": True, "normalized": False} for content, i in form.control.items()
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), encoding="utf-8")
