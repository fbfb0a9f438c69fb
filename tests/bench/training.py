"""Training's speed and memory on InternLM2's shapes with random weights: one JSON line.

`python tests/bench/training.py [--small] [CASE ...]`: all cases want an 80 GB GPU and about 20 minutes; --small runs each of them on a
tiny shape on any machine, to see that it runs. Each case is trained in a process of its own, by finetune/train.py's loop as the
train stage calls it, no setting changed; "plain" ones are a loop of ten lines around peft, for comparison.

lora-1.8b                    rank 64, rows of 2048 tokens, 16,384 a step: the figure is tokens/s once layers are compiled
lora-1.8b-mixed              the same of conversations of 64 to 2048 tokens
qlora-7b-8gb, -5.6gb         rank 64, rows of 1024 tokens, under that cap of GPU memory
qlora-1.8b-2.2gb             the same of the small shape
plain-qlora-7b, -1.8b        bfloat16 adapters, checkpointing, one row of 1024 a step, AdamW with 8-bit moments
plain-lora-1.8b              bfloat16 adapters, each layer compiled, 8 rows of 2048 a step: what lora-1.8b is to reach
full-1.8b, lora-7b, ...      the three methods on both shapes, rows of 2048: `compare`, without a scorecard as weights are random
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from finetune import model as models
from finetune import train as training
from finetune.settings import Train

SHAPES = {  # hidden size, layers, heads, key and value heads, intermediate size, vocabulary
    "1.8b": (2048, 24, 16, 8, 8192, 92544),
    "7b": (4096, 32, 32, 8, 14336, 92544),
    "small": (64, 2, 4, 2, 128, 512),
}
CASES = {  # method, shape, tokens of a row, cap in GB, steps that are measured
    "lora-1.8b": ("lora", "1.8b", 2048, None, 60),
    "lora-1.8b-mixed": ("lora", "1.8b", 2048, None, 90),
    "qlora-7b-8gb": ("qlora", "7b", 1024, 8.0, 12),
    "qlora-7b-5.6gb": ("qlora", "7b", 1024, 5.6, 8),
    "qlora-1.8b-2.2gb": ("qlora", "1.8b", 1024, 2.2, 12),
    "plain-qlora-7b": ("plain-qlora", "7b", 1024, None, 20),
    "plain-qlora-1.8b": ("plain-qlora", "1.8b", 1024, None, 20),
    "plain-lora-1.8b": ("plain-lora", "1.8b", 2048, None, 60),
    "full-1.8b": ("full", "1.8b", 2048, None, 12),
    "qlora-1.8b": ("qlora", "1.8b", 2048, None, 12),
    "full-7b": ("full", "7b", 2048, None, 8),
    "lora-7b": ("lora", "7b", 2048, None, 8),
    "qlora-7b": ("qlora", "7b", 2048, None, 8),
}
LONG = 100_000  # steps that the run is said to have: compiling pays


def make(shape: str, folder: Path) -> Path:
    """A model folder with random weights."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
        rope_theta=1e6,
    )
    torch.set_default_dtype(torch.bfloat16)
    with models.device():
        LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the case's own process
    (folder / "tokenizer.json").write_text("{}")  # it is not read
    return folder


def rows(vocabulary: int, length: int, tokens: int, mixed: bool = False, seed: int = 0) -> Any:
    """Steps without end, each of `tokens`: full rows, or conversations of a 32nd of a row and more."""
    source = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(vocabulary, (max(length, tokens // length * length),), generator=source).tolist()
        batch = []
        while ids:
            size = torch.randint(length // 32, length + 1, (), generator=source).item() if mixed else length
            row, ids = ids[:size], ids[size:]
            batch.append(training.answer_example(row, [1] * len(row)))
        yield batch


def ours(folder: Path, method: str, length: int, mixed: bool, steps: int, run: Path) -> float:
    """Tokens/s over the last half of the steps."""
    values = Train(rank=64, steps=LONG, checkpoint_every=LONG)
    model = models.load_for_training(folder, method)
    if method != "full":
        model = models.add_lora(model, values.rank)
    run.mkdir()
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokens = min(values.tokens, 8 * length)
    for _ in itertools.islice(training.train(model, rows(vocabulary, length, tokens, mixed), values, run), steps):
        pass
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    half, last = lines[(len(lines) - 1) // 2], lines[-1]
    return (last["tokens"] - half["tokens"]) / (last["seconds"] - half["seconds"])


def plain(folder: Path, method: str, length: int, steps: int) -> float:
    """Tokens/s over the last half of the steps."""
    on_gpu, options, count = torch.cuda.is_available(), {}, 8
    if method == "plain-qlora":
        count = 1
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": models.device()}, **options
    )
    if options:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(r=64, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    core = get_peft_model(model, config, autocast_adapter_dtype=False).get_base_model().train()
    weights = [weight for weight in core.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
    if options:
        optimizer = training.adamw(core, [{"params": weights, "lr": 2e-4}])
    else:
        optimizer = torch.optim.AdamW(weights, lr=2e-4, weight_decay=0.0, fused=on_gpu)
        for layer in core.base_model.layers if on_gpu else ():
            layer.compile(dynamic=False)
    began = 0.0
    for step, batch in enumerate(itertools.islice(rows(core.config.vocab_size, length, count * length), steps)):
        if step == steps // 2:
            _wait(on_gpu)
            began = time.perf_counter()
        ids = torch.tensor([example.ids for example in batch], device=core.device)
        hidden = core.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head, targets = core.get_output_embeddings(), ids[:, 1:].flatten()
        loss = training.in_chunks(training.cross_entropy, head, hidden[:, :-1].flatten(0, 1), targets)
        (loss / len(targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait(on_gpu)
    return (steps - steps // 2) * count * length / (time.perf_counter() - began)


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def measure(name: str, folder: Path, small: bool, work: Path) -> dict[str, Any]:
    method, _, length, cap, steps = CASES[name]
    length, steps = (32, 2) if small else (length, steps)
    if cap and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / torch.cuda.mem_get_info()[1])
    if method.startswith("plain"):
        speed = plain(folder, method, length, steps)
    else:
        speed = ours(folder, method, length, name.endswith("-mixed"), steps, work / name)
    found = {"case": name, "tokens_per_s": round(speed)}
    if torch.cuda.is_available():
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        found["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return found


def main() -> None:
    parse = argparse.ArgumentParser()
    parse.add_argument("cases", nargs="*", metavar="CASE")
    parse.add_argument("--small", action="store_true")
    parse.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of one case, in its own process
    args = parse.parse_args()
    if args.folder:
        with tempfile.TemporaryDirectory() as work:
            print(json.dumps(measure(args.cases[0], args.folder, args.small, Path(work))))
        return
    found = []
    with tempfile.TemporaryDirectory() as work:
        made: dict[str, Path] = {}
        for name in args.cases or CASES:
            shape = "small" if args.small else CASES[name][1]
            if shape not in made:
                made[shape] = make(shape, Path(work) / shape)
            command = [sys.executable, __file__, name, "--folder", str(made[shape]), *(["--small"] * args.small)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            found.append(
                json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"case": name, "failed": True}
            )
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(json.dumps({"bench": "training", "device": device, "small": args.small, "cases": found}))


if __name__ == "__main__":
    main()
