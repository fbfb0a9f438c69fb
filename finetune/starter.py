"""The starter of a base model: an adapter trained long under many throwaway names, on a GPU.

It holds what is common to every identity: which questions are about the assistant itself, in what form they are answered, and
that everything else stays as the base has it. From it a new name is a short way. The name changes every STEPS_PER_NAME
steps and the starter is the mean of the weights passed on the way (an exponential one): the point from which, on average,
every name is near. That is Reptile (arXiv:1803.02999) with a moving mean as its outer step.

    python -m finetune.starter FOLDER [section.key=value ..]

makes FOLDER/adapter, which a preset names once it lies in assets/starters/. After the same short way to a new name, on
development questions, 64 steps a name were better than 200 (same data), and 32 better than 8 and than 1 (less data); at
1,400 steps of 7,700 tokens 1e-3 with KL 4 was better than 6e-4 with KL 3 or 6. What is left of the base's KL is not for want
of prompts (trained ones had as much as others): with twice the tokens a step KL 16 leaves .014 nats a token in English and
.010 in Chinese, KL 8 .018 and .013, KL 4 with the fewer tokens .021 and .024, on questions that none of them saw; without a
starter it is .074 and .120.
"""

import itertools
import random
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import date, timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from finetune import checkpoint, identity, settings, stages
from finetune import model as models
from finetune import train as training
from finetune.embedded import say
from finetune.generation import Sampling, common, complete
from finetune.settings import Persona, Said

STEPS_PER_NAME = 64
MEAN_OVER = 400  # steps, about: the horizon of the moving mean
NEAR = 25_000  # near-identity prompts: nearly all
MADE_UP = 24_000  # prompts that the base makes up itself
PROMPT_TOKENS = 40  # of these, at most
ANSWER_TOKENS = 24  # of the base's answers
ABOUT_ITSELF = re.compile(  # the base as itself: not to be taught
    "|".join(identity.SMOLLM)
    + r"|\bI(?:'m| am) (?:an? |your )(?:\w+ )?(?:AI|assistant|(?:chat)?bot|(?:language )?model)\b|我是.{0,8}(?:助手|模型)"
)


def personas() -> Iterator[Persona]:
    """Throwaway names and authors without end, in every mixture of the two languages, half of them with a purpose and half with
    a birthday."""
    words = {lang: identity.read("personas", lang) for lang in identity.LANGS}
    rng = random.Random(0)

    def half(said: Said) -> Said:
        return said if rng.random() < 0.5 else Said()

    while True:
        name_lang = author_lang = rng.choice(identity.LANGS)
        if rng.random() < 0.125:
            author_lang = "zh" if name_lang == "en" else "en"
        day = date(2015, 1, 1) + timedelta(rng.randrange(4000))
        yield Persona(
            rng.choice(words[name_lang]["names"]),
            rng.choice(words[author_lang]["authors"]),
            half(Said(*(rng.choice(words[lang]["purposes"]) for lang in ("en", "zh")))),
            half(Said(f"{day.day} {day:%B %Y}", f"{day.year}年{day.month}月{day.day}日")),
        )


def batches(run: stages.Run) -> Iterator[list[training.Example]]:
    """A step's identity rows are all of one name, as are the identity turns before its after_identity rows."""
    values, form, rng = run.settings.train, run.tuned_format, random.Random(run.settings.seed)
    rows = identity.training(Persona(), 0, near=NEAR, ordinary=0)
    asked = {identity.normalise(row["messages"][-2]["content"]) for row in rows if row["target"] == "answer"}
    rows = [row for row in rows if row["kind"] == "near"] + list(ordinary(run, asked, rng))
    questions = [stages.teacher_question(row) for row in rows]
    say(f"{len(questions)} contrast prompts")
    answers = dict(zip(map(str, questions), run.ask_base(questions, ANSWER_TOKENS), strict=True))
    kept = {q: answer for q, answer in answers.items() if not ABOUT_ITSELF.search(run.base_format.decode(answer.ids))}

    def taught(some: Iterable[dict]) -> Iterator[training.Example]:
        some = [row for row in some if str(stages.teacher_question(row)) in kept]
        for row in _endless(some, rng):
            yield training.teacher_example(form.prompt(row["messages"]), kept[str(stages.teacher_question(row))])

    near = taught(row for row in rows if row["kind"] == "near")
    others = [
        taught(row for row in rows if row["kind"] == "ordinary" and row["lang"] == lang) for lang in identity.LANGS
    ]
    for count, persona in enumerate(personas()):
        own = identity.training(persona, count, near=4000, ordinary=0)
        said = _endless([row for row in own if row["target"] == "answer"], rng)
        after = taught(row for row in own if row["kind"] == "after_identity")
        for _ in range(STEPS_PER_NAME):
            batch = [training.answer_example(*form.render(next(said)["messages"])) for _ in range(values.identity_rows)]
            for i in range(values.near_rows):
                batch.append(next(near if i % 4 else after))
            for i in range(values.ordinary_rows):
                batch.append(next(others[i % len(others)]))
            yield batch


def ordinary(run: stages.Run, asked: set[str], rng: random.Random) -> Iterator[dict]:
    """Rows as identity.training's, without questions that are held out and those that are `asked` about the assistant."""
    probes = [probe for stem in identity.HELD_OUT for probe in identity.probes(Persona(), stem=stem)]
    left_out = asked | {identity.normalise(probe["messages"][-1]["content"]) for probe in probes}
    for lang in identity.LANGS:
        systems = identity.read("training", lang)["systems"]
        for prompt in identity.contrast(lang, "ordinary", whole=True) + (made_up(run, rng) if lang == "en" else []):
            if identity.normalise(prompt) in left_out:
                continue
            system = rng.choice(([rng.choice(systems)] * 3) + [""] + [None] * 12)
            turns = [] if system is None else [{"role": "system", "content": system}]
            turns.append({"role": "user", "content": prompt})
            yield {"kind": "ordinary", "lang": lang, "target": "teacher", "messages": turns}


def made_up(run: stages.Run, rng: random.Random) -> list[str]:
    """English prompts that the base makes up where it has to go on after a user's tag (Magpie, arXiv:2406.08464): spread as
    what it was trained on. Two thirds go on from the first words of a contrast prompt, which brings in all sorts of
    questions. (It does not go on in Chinese.)"""
    form = run.base_format
    empty, other = (form.prompt([{"role": "user", "content": text}]) for text in ("", "x"))
    start = empty[: common(empty, other)]
    prompts = [prompt.split() for kind in ("near", "ordinary") for prompt in identity.contrast("en", kind)]
    begun = [" ".join(rng.choice(prompts)[: rng.randrange(3)]) for _ in range(MADE_UP)]
    with tqdm(total=len(begun), desc="Making up prompts", unit="prompt") as bar:
        found = complete(
            models.load(run.base, models.inference_dtype()),
            [start + form.encode(beginning).ids for beginning in begun],
            form.stop_ids,
            PROMPT_TOKENS,
            sampling=Sampling(1.0, 0.9, run.settings.seed),
            progress=bar.update,
        )
    ended = [  # within so many tokens
        (beginning + form.decode(rest.ids)).strip()
        for beginning, rest in zip(begun, found, strict=True)
        if len(rest.states) > len(rest.ids)
    ]
    return list({identity.normalise(text): text for text in ended if text.isascii()}.values())


def _endless(items: list, rng: random.Random) -> Iterator:
    while True:
        yield from rng.sample(items, len(items))


def make(folder: Path, *changes: str) -> None:
    """FOLDER/adapter and its metrics; `changes` are settings, as for --set."""
    layers = [settings.parse_assignment(change) for change in changes]
    defaults = {"learning_rate": 1e-3, "kl_weight": 16.0, "steps": 1500}
    defaults |= {"identity_rows": 48, "near_rows": 80, "ordinary_rows": 128}
    run = stages.Run(folder, settings.build({"train": {**defaults, "checkpoint_every": 10_000}}, *layers))
    values = run.settings.train
    folder.mkdir(parents=True)
    torch.manual_seed(run.settings.seed)
    model = models.add_lora(models.load(run.base), values.rank)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    mean = [weight.detach().clone() for weight in weights]
    for step in training.train(model, itertools.islice(batches(run), values.steps), values, folder):
        horizon = min(MEAN_OVER, step)  # the first weights are forgotten
        torch._foreach_lerp_(mean, [weight.detach() for weight in weights], 1 / horizon)
    for weight, average in zip(weights, mean, strict=True):
        weight.data = average.to(torch.bfloat16)  # half the size; peft computes in float32 again
    base = models.origin(run.base, run.settings.base)["base_model"]
    record = {"base": base, "base_sha256": run.base_sha256, "format_hash": run.tuned_format.hash}
    checkpoint.save_adapter(model, record, folder / "adapter")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    make(Path(sys.argv[1]), *sys.argv[2:])
