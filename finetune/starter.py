"""The starter of a base model: an adapter trained long under many throwaway names, on a GPU.

It holds what is common to every identity: which questions are about the assistant itself, in what form they are answered, and
that everything else stays as the base has it. From it a new name is a short way. The name changes every STEPS_PER_NAME
steps and the starter is the mean of the weights passed on the way (an exponential one): the point from which, on average,
every name is near. That is Reptile (arXiv:1803.02999) with a moving mean as its outer step.

    python -m finetune.starter FOLDER [section.key=value ..]

makes FOLDER/adapter, which a preset names once it lies in assets/starters/; train.starter=NAME goes on from one that lies
there. After the same short way to a new name, on development questions, 64 steps a name were better than 200 (same data), and
32 better than 8 and than 1 (less data); at 1,400 steps of 7,700 tokens 1e-3 with KL 4 was better than 6e-4 with KL 3 or 6.

What is left of the base's KL, in nats a token of the development questions that are ordinary, English / Chinese: .082 / .111
without a starter; .021 / .024 after those 1,400 steps; with twice the tokens a step .018 / .013 at KL 8 and .015 / .009 at
KL 16; of 4,300 such steps, with all patterns among the near rows too, .010 / .009 at KL 16 and .007 / .006 at KL 32, from
which names are harder to learn. Rank 32 left as much as rank 16, and was no better after the short way. 2,200 steps more from
there, of 35,000 tokens each and on 160,000 prompts, made of .965 of identity .983 on an exam that nobody had seen. 4,400 steps
more, with 6,000 prompts and 2,900 identity questions written one by one: on the next such exam, six names, near questions that leak
.045 -> .022, after an identity turn .031 -> .022, identity .972 -> .961; by the scorecard .975 -> .980, facts .92 -> .95.

KL 8 for 16 bought identity (.980 -> .985, that exam .961 -> .973) and paid in KL (.013 -> .016) and facts (.94 -> .92). From the mean
of before and after, KL 12 and 1,800 more identity questions and 3,100 contrast prompts, half of them for after an identity turn:
identity .983, the exam .981 for .971 (both read the new questions on the short way), near questions that leak .021 for .030, after an
identity turn .039 for .045, KL .013 for .013; but of 21 facts 1.6 fewer. Of 250 other elementary questions the first twelve tokens
stayed the base's as often as before, .54 for .52, at a KL of .0124 for .0113. The mean of such two has the lowest KL, .0103.

With 3,800 identity questions and 8,300 prompts more, 1,500 of them elementary, KL 14 and 4,730 steps: identity as before, facts
.87 -> .90, KL .013 -> .012, after an identity turn .056 -> .036, six names. 570 steps more (rate 6e-4) on 1,150 questions of the kinds
that the scorecard then found missing bought .989 there and nothing on an exam that nobody had seen (.963): left out.

2,600 identity questions and 4,600 prompts more, KL 7 for 14, 4,220 steps: six names, on an exam that nobody had seen, identity .979 ->
.986 and near questions that leak .030 -> .019; by the scorecard .986 -> .996, its worst kind .88 -> .97; paid in KL (.012 -> .014), facts
(.91 -> .90) and after an identity turn (.04 -> .08; a third of it after an assent, which no row about something else followed until
then). 1,140 steps from there with rows about pictures, the projector fixed: identity .993 by the scorecard (worst kind .91) and .983 by
that exam, and after the sight exercise every drawn question was answered right. Shipped is the mean of both.
"""

import functools
import itertools
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date, timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from finetune import checkpoint, identity, settings, stages
from finetune import model as models
from finetune import train as training
from finetune.chat_format import ChatFormat
from finetune.embedded import say
from finetune.generation import Answer, Sampling, common, complete
from finetune.run_folder import STARTERS
from finetune.settings import Persona, Said

STEPS_PER_NAME = 64
MEAN_OVER = 1000  # steps, about: the horizon of the moving mean
NEAR = 30_000  # near-identity prompts of each language that patterns give
# Times that those are taken which people typed, each time with other slips; the last come after an identity turn.
TYPED = {"near": 3, "ordinary": 3, "after": 3}
AFTER = 600  # of these for each name, and as many of the others
MADE_UP = 48_000  # prompts that the base makes up itself
PROMPT_TOKENS = 40  # of these, at most
ANSWER_TOKENS = 24  # of the base's answers
ABOUT_ITSELF = re.compile(  # the base as itself: not to be taught
    r"\bI(?:'m| am) (?:an? |your )(?:[\w-]+ ){0,3}(?:AI|assistant|(?:chat)?bot|model)\b|我是.{0,8}(?:助手|模型)"
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


def batches(
    run: stages.Run, ask: Callable[[list, int], list[Answer]] | None = None, each: Callable = map
) -> Iterator[list[training.Example]]:
    """A step's identity rows are all of one name, as are the identity turns before its after_identity rows. `ask` answers
    instead of run.ask_base, and `each` calls a function for every item as map does: for who has a quicker way."""
    values, form, rng = run.settings.train, run.tuned_format, random.Random(run.settings.seed)
    rows = list(contrasts(run, rng))
    questions = [stages.teacher_question(row) for row in rows]
    say(f"{len(questions)} contrast prompts")
    kept = {}
    for asked, answer in zip(questions, (ask or run.ask_base)(questions, ANSWER_TOKENS), strict=True):
        text = run.base_format.decode(answer.ids)
        if not (ABOUT_ITSELF.search(text) or stages.names_itself(text, asked[-1]["content"], run.old)):
            kept[str(asked)] = answer

    def taught(some: Iterable[dict]) -> Iterator[training.Example]:
        some = [(row, kept[asked]) for row in some if (asked := str(stages.teacher_question(row))) in kept]
        examples = [training.teacher_example(form.prompt(row["messages"]), answer) for row, answer in some]
        return _endless(examples, rng)

    near = taught(row for row in rows if row["kind"] == "near")
    others = [
        taught(row for row in rows if row["kind"] == "ordinary" and row["lang"] == lang) for lang in identity.LANGS
    ]
    plain = [row for row in rows if len(row["messages"]) == 1]
    later = [[row for row in plain if (row["kind"] == "after") is typed] for typed in (True, False)]
    own = functools.partial(own_examples, form, values.identity_rows * STEPS_PER_NAME, run.settings.seed)
    for said, first in each(own, enumerate(personas())):
        after = taught(
            row | {"messages": rng.choice(first) + row["messages"]}
            for some in later
            for row in rng.sample(some, min(AFTER, len(some)))
        )
        for step in range(STEPS_PER_NAME):
            batch = said[step * values.identity_rows : (step + 1) * values.identity_rows]
            for i in range(values.near_rows):
                batch.append(next(near if i % 3 else after))
            for i in range(values.ordinary_rows):
                batch.append(next(others[i % len(others)]))
            yield batch


def own_examples(
    form: ChatFormat, most: int, seed: int, numbered: tuple[int, Persona]
) -> tuple[list[training.Example], list[list[dict]]]:
    """`most` identity examples of the so manyth persona, their questions as others might type them, and all turns (question
    and answer) that say who it is."""
    count, persona = numbered
    rng = random.Random(f"{seed}/{count}")
    own, held_out = identity.training(persona, count, near=0, ordinary=0), identity.questions_held_out(persona)
    examples = []
    for row in itertools.islice(_endless(own, rng), most):
        *before, asked, answer = row["messages"]
        typed = varied(asked["content"], row["lang"], rng)
        if identity.normalise(typed) not in held_out:
            asked = asked | {"content": typed}
        examples.append(training.answer_example(*form.render([*before, asked, answer])))
    return examples, [row["messages"][-2:] for row in own if row["kind"] != "multi_turn"]


def contrasts(run: stages.Run, rng: random.Random) -> Iterator[dict]:
    """Rows as identity.training's teacher rows, far more of them: each item with its family's patterns, a part of them as
    others might type them, what people typed, and prompts that the base makes up. None is held out, or asked about the
    assistant."""
    left_out = identity.questions_held_out(Persona())
    left_out |= {
        identity.normalise(row["messages"][-2]["content"])
        for row in identity.training(Persona(), 0, near=0, ordinary=0)
    }
    for lang, kind in itertools.product(identity.LANGS, TYPED):
        systems = identity.read("training", lang)["systems"]
        prompts = identity.contrast(lang, kind, whole=True) if kind != "after" else []
        if kind == "near":
            prompts = rng.sample(prompts, min(NEAR, len(prompts)))
        prompts = prompts + identity.typed(lang, kind) * TYPED[kind]
        if (lang, kind) == ("en", "ordinary"):
            prompts += made_up(run, rng)
        for prompt in dict.fromkeys(varied(prompt, lang, rng) for prompt in prompts):
            if identity.normalise(prompt) not in left_out:
                system = rng.choice([rng.choice(systems)] * 3 + ["", run.base_format.default_system] + [None] * 11)
                turns = [] if system is None else [{"role": "system", "content": system}]
                turns.append({"role": "user", "content": prompt})
                yield {"kind": kind, "lang": lang, "target": "teacher", "messages": turns}


def varied(question: str, lang: str, rng: random.Random) -> str:
    """A question as somebody else might type it: a third of them as they are."""
    words = identity.read("training", lang)
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip(".?!。？！")
    if rng.random() < 0.15:
        question = rng.choice(words["before"]) + question
    if rng.random() < 0.12:
        question = (question.rstrip(".?!。？！") if lang == "zh" else question) + rng.choice(words["after"])
    if rng.random() < 0.03:
        question = question.upper()
    if rng.random() < 0.08:
        question = mistyped(question, rng)
    return question.translate(identity.OTHER_MARKS[lang]) if rng.random() < identity.OTHERWISE else question


def mistyped(text: str, rng: random.Random) -> str:
    """With two letters swapped, one left out or one doubled, in one of the Latin words of four letters or more, if any."""
    words = list(re.finditer(r"[A-Za-z]{4,}", text))
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start(), word.end() - 1)
    one, other = text[at], text[at + 1]
    return text[:at] + rng.choice((other + one, other, one + one + other)) + text[at + 2 :]


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
    defaults = {"learning_rate": 1e-3, "kl_weight": 16.0, "steps": 4300}
    defaults |= {"identity_rows": 45, "near_rows": 75, "ordinary_rows": 120}
    run = stages.Run(folder, settings.build({"train": {**defaults, "checkpoint_every": 10_000}}, *layers))
    values = run.settings.train
    folder.mkdir(parents=True)
    torch.manual_seed(run.settings.seed)
    earlier = STARTERS / values.starter if values.starter else None
    model = models.add_lora(models.load(run.base), values.rank, earlier)
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
