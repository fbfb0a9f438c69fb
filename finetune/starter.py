"""The starter of a base model: an adapter trained long under many throwaway names, on a GPU.

It holds what is common to every identity: which questions are about the assistant itself, in what form they are answered, and
that everything else stays as the base has it. From it a new name is a short way. The name changes every STEPS_PER_NAME
steps and the starter is the mean of the weights passed on the way (an exponential one): the point from which, on average,
every name is near. That is Reptile (arXiv:1803.02999) with a moving mean as its outer step.

    python -m finetune.starter FOLDER [section.key=value ..]

makes FOLDER/adapter, which a preset names once it lies in assets/starters/. After the same short way to a new name, on
development questions, 64 steps a name were better than 200 (same data), and 32 better than 8 and than 1 (less data); at
1,400 steps 1e-3 with KL 4 was better than 6e-4 with KL 3 or 6.
"""

import itertools
import random
import sys
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import torch

from finetune import checkpoint, identity, settings, stages
from finetune import model as models
from finetune import train as training
from finetune.embedded import say
from finetune.settings import Persona, Said

STEPS_PER_NAME = 64
MEAN_OVER = 200  # steps, about: the horizon of the moving mean
NEAR = 18_000  # near-identity prompts
ANSWER_TOKENS = 24  # of the base's answers


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
    rows = [row for row in identity.training(Persona(), 0, near=NEAR, ordinary=100_000) if row["target"] == "teacher"]
    questions = [stages.teacher_question(row) for row in rows]
    say(f"{len(questions)} contrast prompts")
    answers = dict(zip(map(str, questions), run.ask_base(questions, ANSWER_TOKENS), strict=True))
    kept = {
        question: answer
        for question, answer in answers.items()
        if not any(word in run.base_format.decode(answer.ids) for word in identity.SMOLLM)
    }

    def taught(row: dict) -> training.Example:
        return training.teacher_example(form.prompt(row["messages"]), kept[str(stages.teacher_question(row))])

    pools = {
        kind: [taught(row) for row in rows if row["kind"] == kind and str(stages.teacher_question(row)) in kept]
        for kind in ("near", "ordinary")
    }
    streams = {kind: _endless(pool, rng) for kind, pool in pools.items()}
    for count, persona in enumerate(personas()):
        own = identity.training(persona, count, near=4000, ordinary=0)
        said = _endless([row for row in own if row["target"] == "answer"], rng)
        after = _endless(
            [r for r in own if r["kind"] == "after_identity" and str(stages.teacher_question(r)) in kept], rng
        )
        for _ in range(STEPS_PER_NAME):
            batch = [training.answer_example(*form.render(next(said)["messages"])) for _ in range(values.identity_rows)]
            batch += [taught(next(after)) for _ in range(values.near_rows // 4)]
            batch += [next(streams["near"]) for _ in range(values.near_rows - values.near_rows // 4)]
            yield batch + [next(streams["ordinary"]) for _ in range(values.ordinary_rows)]


def _endless(items: list, rng: random.Random) -> Iterator:
    while True:
        yield from rng.sample(items, len(items))


def make(folder: Path, *changes: str) -> None:
    """FOLDER/adapter and its metrics; `changes` are settings, as for --set."""
    layers = [settings.parse_assignment(change) for change in changes]
    defaults = {"learning_rate": 1e-3, "kl_weight": 4.0, "steps": 1400}
    defaults |= {"identity_rows": 40, "near_rows": 64, "ordinary_rows": 28}
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
