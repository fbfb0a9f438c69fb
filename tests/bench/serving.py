"""How fast visitors are answered, against transformers' generate behind a queue, side by side in one run: prints one JSON
line. `python tests/bench/serving.py [--small] [--model REF | --shape internlm2-1_8b] [--visitors 1 8 32 100]`

Every visitor asks at once for a greedy answer of NEW tokens to a prompt of PROMPT tokens of their own.
first_token_s: the median wait for the first token; tokens_per_s: of all visitors together.

    python tests/bench/serving.py --shape internlm2-1_8b --visitors 1 32 --prompt 128 --new 256

on one GPU, in about five minutes: a shape, with random weights, is also answered by transformers' continuous batching, as it comes
and set up in the ways that suit this load best, warm; "times its best" is our tokens_per_s over the fastest of these.

Without --shape it ends with a storm of two minutes (`--storm SECONDS`, 0 for none): a hundred visitors of the page's engine ask and ask again, some
leave, and every answer is compared with the one given alone; memory_growth_mb: the second half's most over the first half's.
--small: a minute, for CI.
"""

import argparse
import copy
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from finetune import embedded, model, serving
from finetune.engine import Engine, Request, pieces
from finetune.errors import UserError
from finetune.generation import ROWS, Decoder

clock = time.perf_counter
INTERNLM2 = LlamaConfig(
    vocab_size=92544, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16,
    num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def prompts_of(count: int, length: int, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(1000, 30000) for _ in range(length)] for _ in range(count)]


def figures(began: float, first: list[float], tokens: int) -> dict[str, float]:
    seconds = clock() - began
    return {"first_token_s": round(statistics.median(first), 3), "tokens_per_s": round(tokens / seconds, 1)}


class Watch:
    """transformers' streamer: when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(clock())

    def end(self) -> None:
        pass


def by_generate(plain: torch.nn.Module, prompts: list[list[int]], new: int) -> dict[str, float]:
    """One after the other, each streamed, as the course's demo does."""
    began, first = clock(), []
    for prompt in prompts:
        ids, watch = torch.tensor([prompt], device=plain.device), Watch()
        plain.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=watch, pad_token_id=0)
        first.append(watch.times[1] - began)  # before it comes the prompt
    return figures(began, first, new * len(prompts))


def by_batching(plain: torch.nn.Module, count: int, length: int, new: int) -> dict[str, dict[str, float]]:
    """By continuous batching in several ways; of one that fails, the reason."""
    # No larger than the load, as its attention goes over the whole cache; a block has 256 tokens.
    sized = {"num_blocks": count * (-(-(length + new) // 256) + 1), "max_batch_tokens": 2048}
    sized |= {"use_cuda_graph": True, "q_padding_interval_size": max(8, count), "kv_padding_interval_size": 2048}
    ways = {"as it comes": {}, "CUDA graphs": {"use_cuda_graph": True}, "sized": sized}
    if torch.cuda.is_available():
        ways["sized, asynchronous"] = sized | {"use_async_batching": True}
    greedy, found = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=new), {}
    for name, values in ways.items():
        try:
            for seed in (1, 0):  # the first records the graphs
                config = ContinuousBatchingConfig(**values)
                options = {"record_timestamps": True, "persistent_manager": True}
                answers = plain.generate_batch(prompts_of(count, length, seed), greedy, config, **options).values()
            if [len(answer.generated_tokens) for answer in answers] != [new] * count:
                raise RuntimeError(f"{len(answers)} of {count} answers, {[answer.error for answer in answers]}")
            began = min(answer.created_time for answer in answers)
            seconds = max(answer.timestamps[-1] for answer in answers) - began
            first = statistics.median(answer.timestamps[0] - began for answer in answers)
            found[name] = {"first_token_s": round(first, 3), "tokens_per_s": round(new * count / seconds, 1)}
        except Exception as error:  # theirs; the other ways are still measured
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        plain.destroy_cached_continuous_batching_manager()
    return found


def by_decoder(decoder: Decoder, prompts: list[list[int]], new: int) -> dict[str, float]:
    began, first = clock(), {}
    rows = [decoder.add(prompt, new, owner=i) for i, prompt in enumerate(prompts)]
    while decoder.rows or decoder.waiting:
        for step in decoder.step():
            first.setdefault(step.row, clock() - began)
    result = figures(began, list(first.values()), sum(len(row.ids) for row in rows))
    decoder.blocks.clear()
    return result


def storm(engine: Engine, visitors: int, seconds: float) -> dict[str, float]:
    """Each visitor asks a question of their own again and again, and leaves one answer in five before its end."""
    engine.decoder.forward.pool.zero_()  # its memory is taken by and by, which would look like growth
    asks = [[{"role": "user", "content": f"Tell me something about the number {i}."}] for i in range(visitors)]
    request = lambda i: Request(asks[i], temperature=0, max_tokens=24, owner=i)  # noqa: E731
    alone = ["".join(piece.text for piece in pieces(engine, request(i))) for i in range(visitors)]
    counts, memory, end = Counter(), [], time.monotonic() + seconds

    def visit(i: int) -> None:
        chance = random.Random(i)
        while time.monotonic() < end:
            most, said, heard = chance.randrange(1, 20) if chance.random() < 0.2 else None, "", 0
            try:
                with closing(pieces(engine, request(i))) as found:
                    for piece in found:
                        said, heard = said + piece.text, heard + bool(piece.text)
                        if heard == most:
                            break
            except UserError:
                counts["lost"] += 1
                continue
            right = said == alone[i] if piece.finish else alone[i].startswith(said)
            other = any(said and said == answer for answer in alone if answer != alone[i])
            counts["answered" if piece.finish else "left"] += 1
            counts["crossed" if other and not right else "right" if right else "wrong"] += 1

    threads = [threading.Thread(target=visit, args=[i], daemon=True) for i in range(visitors)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        memory.append(psutil.Process().memory_info().rss)
        time.sleep(0.5)
    for thread in threads:
        thread.join(max(0.1, end + 120 - time.monotonic()))
    stuck = sum(thread.is_alive() for thread in threads) + len(engine.decoder.rows) + len(engine.decoder.waiting)
    half = len(memory) // 2
    growth = (max(memory[half:]) - max(memory[:half])) / 1e6
    named = {key: counts[key] for key in ("answered", "left", "right", "wrong", "crossed", "lost")}
    return {"visitors": visitors, "seconds": seconds, **named, "stuck": stuck, "memory_growth_mb": round(growth, 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--model", default=embedded.NAME)
    parser.add_argument("--shape", choices=["internlm2-1_8b"], help="random weights instead of a model")
    parser.add_argument("--visitors", type=int, nargs="+", default=None)
    parser.add_argument("--prompt", type=int, default=None)
    parser.add_argument("--new", type=int, default=None)
    parser.add_argument("--storm", type=float, default=None)
    parser.add_argument("--processor-time", action="store_true", help="on a busy machine, with OMP_NUM_THREADS=1")
    args = parser.parse_args()
    if args.processor_time:
        global clock
        clock = time.process_time
    length, new = args.prompt or (16 if args.small else 128), args.new or (8 if args.small else 128)
    visitors = args.visitors or ([1, 8] if args.small else [1, 8, 32, 100])
    if args.shape:
        torch.manual_seed(0)
        torch.set_default_device(model.device())
        config = LlamaConfig.from_dict({**INTERNLM2.to_dict(), **SMALL}) if args.small else INTERNLM2
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        torch.set_default_device("cpu")
        on_gpu = torch.cuda.is_available()  # where ours takes the weights out of its model
        loaded = serving.Loaded(copy.deepcopy(plain), on_gpu, torch.cuda.get_device_name() if on_gpu else "CPU")
    else:
        plain = model.load(
            model.base_folder(args.model), torch.bfloat16 if torch.cuda.is_available() else torch.float32
        )
        plain.generation_config.eos_token_id = None
        loaded = serving.load(model.base_folder(args.model))
    room = serving.pool_tokens(loaded.model, ROWS[loaded.model.device.type])
    decoder = Decoder(loaded.model, [], room, fast=loaded.fast)
    result: dict[str, object] = {"runs_on": loaded.words, "prompt": length, "new": new}
    by_decoder(decoder, prompts_of(1, 8), 4)
    by_generate(plain, prompts_of(1, 8), 4)
    for count in visitors:
        prompts = prompts_of(count, length)
        asked = prompts[: 1 if args.small else 4]  # a queue answers as fast however many stand in it
        queue_ = by_generate(plain, asked, new)
        queue_["first_token_s"] = round(
            queue_["first_token_s"] + (count - len(asked)) / 2 * new / queue_["tokens_per_s"], 3
        )
        for _ in range(1 + bool(args.shape)):  # a GPU is warm then, as for continuous batching
            ours = by_decoder(decoder, prompts, new)
        ratio = round(ours["tokens_per_s"] / queue_["tokens_per_s"], 2)
        result[f"{count} visitors"] = {"here": ours, "generate behind a queue": queue_, "times": ratio}
    for count in visitors if args.shape else ():  # last, as it leaves threads and memory behind
        others = by_batching(plain, count, length, new)
        best = max(way.get("tokens_per_s", 0) for way in others.values())
        ratio = round(result[f"{count} visitors"]["here"]["tokens_per_s"] / best, 2) if best else None
        result[f"{count} visitors"] |= {"continuous batching": others, "times its best": ratio}
    seconds = (3 if args.small else 120) if args.storm is None else args.storm
    if seconds and not args.shape:
        del decoder, loaded, plain
        engine = Engine(args.model)
        engine.load()
        result["storm"] = storm(engine, 12 if args.small else 100, seconds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
