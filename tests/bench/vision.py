"""Speed of LLaVA's two phases and of answers about pictures, beside plain transformers and peft, on InternLM2-1.8B + CLIP
ViT-L/14-336 + projector with random weights: one JSON line.

`python tests/bench/vision.py [--small] [CASE ...]`: all cases want an 80 GB GPU and about 8 minutes; --small runs each of them on a
tiny shape on any machine, to see that it runs. Each case has a process of its own, and "-plain" ones get the same rows.

encode                  every picture once, as the train stage does it: read from a JPEG of 640 x 480, made ready, encoded, kept
projector, -plain       phase one: captions of 8 to 40 tokens, the projector alone is trained
lora, -plain            phase two: answers of 40 to 220 tokens, projector and LoRA of rank 64 on the language model
answers, -plain         32 greedy answers of 128 tokens at once, from the pictures' files on

A step has 16 rows of one picture (576 patches) and 30 tokens before the answer. tokens_per_s counts patches and text, no padding, and of
answers new tokens alone; training's figures are of the last half of the steps (layers are compiled by then). Ours is finetune/train.py's
loop and generation.py's decoder, no setting changed. Plain is LlavaForConditionalGeneration with padded batches in bfloat16, trained
weights too (faster than peft's default), without checkpointing; its pixels lie ready on the GPU, as if loading them took no time, and
go through the encoder in every step. times: images_per_s over plain's; "with encoding" counts it once for so many epochs.
"""

import argparse
import functools
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from finetune import model as models
from finetune import serving, vision
from finetune import train as training
from finetune.generation import ROWS, Decoder
from finetune.settings import Train

SHAPES = {  # hidden size, layers, heads, key and value heads, intermediate size, vocabulary; of the encoder, and its pixels
    "internlm2-1_8b": ((2048, 24, 16, 8, 8192, 92544), (1024, 24, 16, 4096, 336)),
    "small": ((64, 2, 4, 2, 128, 512), (32, 3, 2, 64, 56)),
}
COLOURS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # CLIP's
IMAGE, HEAD, QUESTION = 5, 10, 20  # the token <image>; tokens before and after the picture
ANSWERS = {"projector": (8, 40), "lora": (40, 220)}  # tokens, the least and the most
LORA = r".*\.language_model\..*_proj"
RANK = 64
LONG = 100_000  # steps that the run is said to have: compiling pays


class Size(NamedTuple):
    """How much is measured."""

    pictures: int
    rows: int  # of a step
    steps: int  # of ours; plain ones take half as many
    answers: int
    new: int  # tokens of an answer


WHOLE, SMALL = Size(1024, 16, 40, 32, 128), Size(12, 2, 4, 3, 4)


class Row(NamedTuple):
    picture: int
    head: list[int]
    question: list[int]
    answer: list[int]


def make(shape: str, folder: Path) -> None:
    """A model folder with random weights."""
    (hidden, layers, heads, kv_heads, inner, vocabulary), (width, depth, eyes, wide, side) = SHAPES[shape]
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, rope_theta=1e6, rms_norm_eps=1e-5,
        max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    tower = CLIPVisionConfig(
        hidden_size=width, intermediate_size=wide, num_hidden_layers=depth, num_attention_heads=eyes, image_size=side,
        patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=(side // 14) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with models.device():
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the cases' own processes
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / models.PREPROCESSOR).write_text(json.dumps({**sizes, **COLOURS, "do_pad": True}))
    (folder / models.PROCESSOR).write_text("{}")  # these two are not read
    (folder / "tokenizer.json").write_text("{}")


def draw(folder: Path, count: int) -> None:
    def one(i: int) -> None:
        spots = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(spots).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i:04}.jpg", quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, range(count)))


def rows(phase: str, vocabulary: int, size: Size, seed: int = 0) -> list[list[Row]]:
    """Of each step, the same for both sides."""
    chance = random.Random(seed)

    def words(count: int) -> list[int]:
        return [chance.randrange(IMAGE + 1, vocabulary) for _ in range(count)]

    return [
        [
            Row(chance.randrange(size.pictures), words(HEAD), words(QUESTION), words(chance.randint(*ANSWERS[phase])))
            for _ in range(size.rows)
        ]
        for _ in range(size.steps)
    ]


def with_eyes(model: Any, folder: Path) -> vision.Eyes:
    model.eyes = vision.Eyes(model, models.vision_of(folder))
    return model.eyes


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speeds(seconds: float, images: int, tokens: int) -> dict[str, float]:
    return {"images_per_s": round(images / seconds, 2), "tokens_per_s": round(tokens / seconds)}


# ------------------------------------------------------------------------------------------------------------- ours


def encode(folder: Path, files: list[str], size: Size) -> dict[str, float]:
    eyes = with_eyes(models.load(folder, dtype()), folder)
    eyes.encode([vision.opened(file) for file in files[: vision.BATCH]])
    wait()
    began = time.perf_counter()
    eyes.look(files)
    wait()
    seconds = time.perf_counter() - began
    return {"images_per_s": round(len(files) / seconds, 1), "seconds": round(seconds, 2)}


def ours(phase: str, folder: Path, files: list[str], size: Size) -> dict[str, float]:
    model = models.load_for_training(folder, "lora")
    eyes, vocabulary = with_eyes(model, folder), model.config.text_config.vocab_size
    eyes.look(files)
    patches = [eyes.see(file) for file in files]
    batches = [
        [
            training.answer_example(
                ids := [*row.head, *patches[row.picture], *row.question, *row.answer],
                [0] * (len(ids) - len(row.answer)) + [1] * len(row.answer),
            )
            for row in step
        ]
        for step in rows(phase, vocabulary, size)
    ]
    values = Train(rank=RANK, steps=LONG, checkpoint_every=LONG)
    model = models.add_lora(model, 0 if phase == "projector" else values.rank)
    with tempfile.TemporaryDirectory() as run:
        for _ in training.train(model, batches, values, Path(run)):
            pass
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    half, last = lines[len(lines) // 2 - 1], lines[-1]
    images = (last["step"] - half["step"]) * size.rows
    return speeds(last["seconds"] - half["seconds"], images, last["tokens"] - half["tokens"])


def answers(folder: Path, files: list[str], size: Size) -> dict[str, float]:
    model = models.load(folder, dtype())
    eyes = with_eyes(model, folder)
    decoder = Decoder(model, [], serving.pool_tokens(model, ROWS[model.device.type]))
    for seen, asked in questions(files, size, model.config.text_config.vocab_size):
        began = time.perf_counter()
        eyes.look(seen)
        found = [
            decoder.add([*row.head, *eyes.see(file), *row.question], size.new)
            for file, row in zip(seen, asked, strict=True)
        ]
        while decoder.rows or decoder.waiting:
            decoder.step()
        seconds = time.perf_counter() - began
    return speeds(seconds, len(seen), sum(len(row.ids) for row in found))


def questions(files: list[str], size: Size, vocabulary: int) -> list[tuple[list[str], list[Row]]]:
    """Twice as many pictures and questions as are answered at once; the first time warms up."""
    asked = rows("projector", vocabulary, size._replace(rows=size.answers, steps=2))
    for row in itertools.chain(*asked):
        del row.question[: row.picture % (QUESTION // 2)]  # of several lengths
    return [(files[i * size.answers : (i + 1) * size.answers], asked[i]) for i in range(2)]


# ------------------------------------------------------------------------------------------------------------ plain


def load_plain(folder: Path) -> tuple[LlavaForConditionalGeneration, Any]:
    """The model and its image processor."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(models.device())
    return model.requires_grad_(False), vision.LlavaImageProcessorPil(**models.vision_of(folder)[models.PREPROCESSOR])


def plain(phase: str, folder: Path, files: list[str], size: Size) -> dict[str, float]:
    model, processor = load_plain(folder)
    size = size._replace(steps=size.steps // 2)
    steps, patches = rows(phase, model.config.text_config.vocab_size, size), model.config.image_seq_length

    def pixels(number: int) -> torch.Tensor:
        return processor(Image.open(files[number]), return_tensors="pt")["pixel_values"]

    numbers = sorted({row.picture for step in steps for row in step})
    with ThreadPoolExecutor() as pool:
        ready = dict(zip(numbers, pool.map(pixels, numbers), strict=True))
    ready = {number: found.to(model.device, torch.bfloat16) for number, found in ready.items()}
    if phase == "projector":
        model.model.multi_modal_projector.requires_grad_(True)
    else:
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LORA, modules_to_save=["multi_modal_projector"])
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    weights = [weight for weight in model.train().parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-4)
    began, tokens = 0.0, 0
    for i, step in enumerate(steps):
        if i == len(steps) // 2:
            wait()
            began, tokens = time.perf_counter(), 0
        ids = [torch.tensor([*row.head, *[IMAGE] * patches, *row.question, *row.answer]) for row in step]
        labels = [line.clone() for line in ids]
        for row, line in zip(step, labels, strict=True):
            line[: -len(row.answer)] = -100
        loss = model(
            input_ids=pad_sequence(ids, batch_first=True).to(model.device),
            attention_mask=pad_sequence([torch.ones_like(line) for line in ids], batch_first=True).to(model.device),
            labels=pad_sequence(labels, batch_first=True, padding_value=-100).to(model.device),
            pixel_values=torch.cat([ready[row.picture] for row in step]),
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(map(len, ids))
    wait()
    return speeds(time.perf_counter() - began, (len(steps) - len(steps) // 2) * size.rows, tokens)


def plain_answers(folder: Path, files: list[str], size: Size) -> dict[str, float]:
    model, processor = load_plain(folder)
    model.eval()
    for seen, asked in questions(files, size, model.config.text_config.vocab_size):
        began = time.perf_counter()
        pixels = processor([Image.open(file) for file in seen], return_tensors="pt")["pixel_values"]
        ids = [torch.tensor([*row.head, *[IMAGE] * model.config.image_seq_length, *row.question]) for row in asked]
        whole = pad_sequence(ids, batch_first=True, padding_side="left").to(model.device)
        found = model.generate(
            input_ids=whole,
            attention_mask=(whole > 0).long(),
            pixel_values=pixels.to(model.device, model.dtype),
            max_new_tokens=size.new,
            min_new_tokens=size.new,
            do_sample=False,
            pad_token_id=0,
        )
        wait()
        seconds = time.perf_counter() - began
    return speeds(seconds, len(seen), len(seen) * (found.shape[1] - whole.shape[1]))


CASES: dict[str, Callable[[Path, list[str], Size], dict[str, float]]] = {
    "encode": encode,
    "projector": functools.partial(ours, "projector"),
    "projector-plain": functools.partial(plain, "projector"),
    "lora": functools.partial(ours, "lora"),
    "lora-plain": functools.partial(plain, "lora"),
    "answers": answers,
    "answers-plain": plain_answers,
}


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of our images_per_s over plain's, where both were measured."""
    speed = {name: case["images_per_s"] for name, case in found.items() if "images_per_s" in case}
    pairs = {name: (speed[name], speed[f"{name}-plain"]) for name in speed if f"{name}-plain" in speed}
    result: dict[str, Any] = {"times": {name: round(own / other, 2) for name, (own, other) in pairs.items()}}
    if "encode" in speed:
        result["times with encoding"] = {
            name: {
                words: round(epochs / other / (epochs / own + 1 / speed["encode"]), 2)
                for words, epochs in (("1 epoch", 1), ("3 epochs", 3))
            }
            for name, (own, other) in pairs.items()
            if name in ANSWERS
        }
    return result


def main() -> None:
    parse = argparse.ArgumentParser()
    parse.add_argument("cases", nargs="*", metavar="CASE")
    parse.add_argument("--small", action="store_true")
    parse.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of one case, in its own process
    args = parse.parse_args()
    if args.folder:
        files = sorted(str(file) for file in (args.folder / "pictures").iterdir())
        found = CASES[args.cases[0]](args.folder / "model", files, SMALL if args.small else WHOLE)
        if torch.cuda.is_available():
            found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        print(json.dumps({"case": args.cases[0], **found}))
        return
    cases: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        os.environ["NAMESAKE_CACHE"] = f"{work}/cache"  # of the pictures' features
        make("small" if args.small else "internlm2-1_8b", Path(work) / "model")
        (Path(work) / "pictures").mkdir()
        draw(Path(work) / "pictures", (SMALL if args.small else WHOLE).pictures)
        for name in args.cases or CASES:
            began = time.perf_counter()
            command = [sys.executable, __file__, name, "--folder", work, *(["--small"] * args.small)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            cases[name] = (
                json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"case": name, "failed": True}
            )
            cases[name]["whole_s"] = round(time.perf_counter() - began)
            print(json.dumps(cases[name]), file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(
        json.dumps(
            {"bench": "vision", "device": device, "small": args.small, "cases": list(cases.values()), **ratios(cases)}
        )
    )


if __name__ == "__main__":
    main()
