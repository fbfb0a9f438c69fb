"""The tasks that learn from pictures, LLaVA's two phases: vision-projector (captions; the projector alone) and vision
(dialogues; projector and adapter, with the identity's own rows among them). Their rows, their examples, and what a model
makes of held-out drawn pictures.
"""

import copy
import functools
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import drawn, photographs, pictures, records
from finetune.chat_format import ChatFormat, pictures_of
from finetune.errors import UserError
from finetune.run_folder import Run, read_lines, write_lines
from finetune.settings import Settings

TASKS = ("vision-projector", "vision")
CAPTION = {"en": "Describe the picture.", "zh": "描述图片。"}
PROJECTOR = "multi_modal_projector"
KINDS = ("see_caption", *(f"see_{kind}" for kind in drawn.KINDS), "see_photo")  # of probes
PROBES = {"en": 25, "zh": 10}  # of each kind about drawn pictures
PHOTO_PROBES = {"en": 10, "zh": 5}
NOISE = 8  # pictures of nothing, which the held-out questions are asked about as well
NOISY = 10  # one of so many drawn pictures is noise: who looks at it says so
PHOTOGRAPHED = 8  # one of so many is a photograph instead
PHOTOGRAPHS = 3  # one after another in a dialogue about them, as each has but one question
WHAT = 0.25  # share of the dialogues about drawn pictures that ask what there is, as those about photographs do
COUNTS = (1, 1, 2, 3, 3, 4)  # as drawn.COUNTS, for dialogues: three is taken for two or for four
GIVES_AWAY = {"positions": ("count",), "what": ("colour", "shape", "count")}  # what an answer says besides
CHINESE = 0.5  # share of the conversations
AFTER = 5  # one of so many questions about the assistant itself comes after some about a picture
ANSWER_TOKENS = 24
TAUGHT = 0.2  # of its learning rate, for a projector that its starter has taught: it would else unlearn at first
ALIGN_STEPS, ALIGN_PICTURES, ALIGN_RATE = 1200, 64, 3e-3  # 45 seconds of two cores with bfloat16
ALIGN_WORDS = 1024  # at most; those that tell most apart


def reader(values: Settings) -> records.Sight | None:
    """What finds the pictures of a user's rows, for a task that learns from them."""
    return functools.partial(pictures.sight, fetch=values.vision.fetch) if values.task in TASKS else None


def prepare(run: Run, folder: Path) -> None:
    """Write train.jsonl, the drawn pictures and probes.jsonl; of a user's rows some are held out."""
    values, seed = run.settings.vision, run.settings.seed
    (folder / "pictures").mkdir()
    if run.settings.data:
        rows = list(records.read(run.settings.data, run.settings.skip_bad, reader(run.settings)))
        random.Random(seed).shuffle(rows)
        held = [row["messages"] for row in rows[: max(1, min(32, len(rows) // 20))]]
        kept = [{"messages": row["messages"]} for row in rows if row["messages"] not in held]  # a weight repeats rows
        if not kept:
            raise UserError("--data has one row, and some are held out to measure by: give more.")
        write_lines(folder / "heldout.jsonl", [{"task": run.settings.task, "messages": said} for said in held])
        write_lines(folder / "train.jsonl", kept)
    else:
        write_lines(folder / "train.jsonl", [_row(run, i, folder) for i in range(values.pictures)])
    asked = probes(run.settings.task, seed, folder)
    if not run.settings.data:  # who brings rows needs no photographs
        asked += photo_probes(run.settings.task, seed, folder)
    write_lines(folder / "probes.jsonl", asked)


def _row(run: Run, number: int, folder: Path) -> dict[str, Any]:
    """A drawn picture or a photograph with its caption, or with a dialogue about it."""
    captions = run.settings.task == "vision-projector"
    scene = drawn.scene(f"{run.settings.seed}/train/{number}", drawn.COUNTS if captions else COUNTS)
    source = random.Random(f"{scene.seed}/said")
    language = "zh" if source.random() < CHINESE else "en"
    noisy, turn = number % NOISY == 0, number % PHOTOGRAPHED  # 1 is never noise: both numbers are even
    if turn == 1:
        subjects, said = [photographs.SUBJECTS[number // PHOTOGRAPHED % len(photographs.SUBJECTS)]], []
        if not captions:
            subjects += source.sample(photographs.SUBJECTS, PHOTOGRAPHS - 1)
        for i, subject in enumerate(subjects):
            file = f"pictures/train-{number:05}-{i}.png"
            photographs.cut(subject, f"{scene.seed}/{i}").save(folder / file)
            question = CAPTION[language] if captions else source.choice(photographs.QUESTIONS[language])
            said.append((_with_picture(file, question), subject.caption[language]))
    else:
        file = f"pictures/train-{number:05}.png"
        (drawn.noise(scene.seed) if noisy else drawn.draw(scene)).save(folder / file)
        told = [(CAPTION[language], drawn.caption(scene, language))] if captions else _asked(scene, language, source)
        said = [(question, drawn.NOTHING[language] if noisy else answer) for question, answer in told]
        said[0] = (_with_picture(file, said[0][0]), said[0][1])
    messages = []
    for question, answer in said:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _asked(scene: drawn.Scene, language: str, source: random.Random) -> list[tuple[str, str]]:
    """(question, answer) of a dialogue about a drawn picture: what an answer before gives away would not teach to look."""
    asked = [(q["kind"], q["question"], q["answer"]) for q in drawn.questions(scene) if q["lang"] == language]
    if source.random() < WHAT:
        what = drawn.things(scene, language) + ("。" if language == "zh" else ".")
        asked.append(("what", source.choice(photographs.QUESTIONS[language]), what))
    source.shuffle(asked)
    asked[1:] = sorted(asked[1:], key=lambda told: told[0] == "positions")  # counting, the hardest, goes before
    given = {kind for i, (told, *_) in enumerate(asked) for kind, *_ in asked[i:] if kind in GIVES_AWAY.get(told, ())}
    return [(question, answer) for kind, question, answer in asked if kind not in given]


def _with_picture(file: str, text: str) -> list[dict[str, str]]:
    return [{"type": "image", "image": file}, {"type": "text", "text": text}]


def after_pictures(run: Run, rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Put some of the identity's questions after a dialogue about a picture of the data folder: it would else not know any
    more who it is. Only their own answers are supervised, so the pictures' one-word answers count as before."""
    order, form = random.Random(run.settings.seed), run.tuned_format.unseeing()
    dialogues = [row["messages"] for row in read_lines(folder / "train.jsonl")]
    said = [row for row in rows if row["target"] == "answer" and row["messages"][0]["role"] == "user"]
    for row in said[::AFTER]:
        seen = order.choice(dialogues)
        answered = [i for i, message in enumerate(seen, 1) if message["role"] == "assistant"]
        longer = seen[: order.choice(answered[:3])] + row["messages"]
        if len(form.render(longer).ids) <= run.settings.train.length:  # a user's dialogues may be long
            row["messages"] = longer


def probes(task: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Questions about drawn pictures that training never sees, with the pictures; and noise to ask the same about."""
    for i in range(NOISE):
        drawn.noise(f"{seed}/heldout/{i}").save(folder / f"pictures/noise-{i}.png")
    found: list[dict[str, Any]] = []
    left = {(kind, language): n for kind in drawn.KINDS for language, n in PROBES.items()}
    if task == "vision-projector":
        left = {("caption", language): n for language, n in PROBES.items()}
    number = 0
    while any(left.values()):
        scene = drawn.scene(f"{seed}/heldout/{number}")
        asked = drawn.questions(scene)
        if task == "vision-projector":
            words = {
                "en": (scene.shape, scene.colour),
                "zh": (drawn.SHAPES[scene.shape], drawn.COLOURS[scene.colour][0]),
            }
            asked = [
                {"kind": "caption", "lang": lang, "question": CAPTION[lang], "accept": accept}
                for lang, accept in words.items()
            ]
        file = f"pictures/heldout-{number:04}.png"
        for question in asked:
            key = (question["kind"], question["lang"])
            if left.get(key):
                left[key] -= 1
                drawn.draw(scene).save(folder / file)
                accept = question["accept"]
                accept = list(accept) if isinstance(accept, tuple) else [accept]
                found.append(_probe(*key, number, question["question"], accept, file))
        number += 1
    return found


def photo_probes(task: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Questions about photographs, cut as training never sees them, with the pictures."""
    found = []
    for number, language in enumerate(lang for lang, count in PHOTO_PROBES.items() for _ in range(count)):
        subject = photographs.SUBJECTS[number % len(photographs.SUBJECTS)]
        file, asked = f"pictures/photo-{number:04}.png", photographs.QUESTIONS[language]
        photographs.cut(subject, f"{seed}/heldout/{number}", heldout=True).save(folder / file)
        question = CAPTION[language] if task == "vision-projector" else asked[number % len(asked)]
        found.append(_probe("photo", language, number, question, [subject.noun[language]], file))
    return found


def _probe(kind: str, language: str, number: int, question: str, accept: list[str], file: str) -> dict[str, Any]:
    return {
        "id": f"see-{kind}-{language}-{number:04}",
        "kind": f"see_{kind}",
        "lang": language,
        "expect": f"what the picture shows{', another cut of a photograph that training saw' if kind == 'photo' else ''}",
        "accept": accept,
        "messages": [{"role": "user", "content": _with_picture(file, question)}],
    }


def placed(messages: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Messages whose pictures are named from the data folder, named in full."""

    def place(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image" or part["image"].startswith("data:"):
            return part
        return {**part, "image": str(folder / part["image"])}

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [place(p) for p in message["content"]]}
        for message in messages
    ]


def sent(messages: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The same with the pictures themselves in the messages, as data URLs."""
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [
                {**part, "image": pictures.to_data_url(folder / part["image"])} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


# --------------------------------------------------------------------------------------------------------- training


def steps(run: Run) -> int:
    """Of the training: as set where the pictures are drawn, else train.epochs times through the user's rows."""
    values, vision = run.settings.train, run.settings.vision
    if not run.settings.data:
        return vision.steps
    count = sum(1 for row in run.rows("train.jsonl") if "target" not in row)
    return math.ceil(values.epochs * count / vision.rows)


def projector_rate(run: Run) -> float:
    """The projector's learning rate, in both phases less where the first one began from the starter's."""
    return run.settings.train.projector_rate * (TAUGHT if taught(run) else 1)


def first_layer(run: Run) -> int:
    """The first of the language model's layers whose adapters train: the starter's tells the program's own pictures already."""
    return run.settings.train.first_layer if taught(run) and not run.settings.data else 0


def taught(run: Run) -> bool:
    """Whether the run's first phase began from the starter's projector."""
    first = run.before or run
    return first.projector != first.settings.vision.projector


def examples(run: Run, model: Any) -> list[Any]:
    """The rows about pictures, ready for a step; each picture is encoded once."""
    from finetune.model import give_eyes
    from finetune.train import answer_example

    form, length, folder = run.tuned_format, run.settings.train.length, run.folder / "data"
    said = [placed(row["messages"], folder) for row in run.rows("train.jsonl") if "target" not in row]
    give_eyes(model, form, files := [file for messages in said for file in pictures_of(messages)])
    if run.encoder_rank:
        model.eyes.watch(files)
    rendered = form.render_all(said, supervise="all")
    found = [answer_example(ids[:length], mask[:length]) for ids, mask in rendered if any(mask[:length])]
    if not found:
        raise UserError(f"No row has an answer within train.length={length} tokens.")
    if run.settings.task == "vision-projector" and run.fresh_projector:
        align(model, found, run.settings.seed)
    return found


def align(model: Any, examples: Sequence[Any], seed: int) -> None:
    """Train a fresh projector, in seconds and without a layer of the language model, to say a picture's words: what it makes
    of a patch, compared with the words' embeddings, is a distribution over words, and the patches' mean of these is to
    give the words of the caption, as topic models share them out (LDA; that pictures are told in words' embeddings is
    AlignVLM's idea, arXiv:2502.01341). The language model then reads patches about as it reads words.

    `examples` with other than one picture teach nothing here.
    """
    import torch
    from tqdm import tqdm

    from finetune.train import LOGITS, half_precision, schedule
    from finetune.vision import as_large_as_words

    eyes, projector = model.eyes, copy.deepcopy(model.model.multi_modal_projector).float().requires_grad_()
    table = model.get_input_embeddings().weight.detach()
    size = table.float().square().mean().sqrt()
    seen = [sorted({(i - eyes.first) // eyes.patches for i in example.ids if i >= eyes.first}) for example in examples]
    said = [(numbers[0], set(e.targets)) for e, numbers in zip(examples, seen, strict=True) if len(numbers) == 1]
    if not said:
        return
    often = Counter(word for _, words in said for word in words)
    rare = {word: -math.log(count / len(said)) for word, count in often.items()}  # what all captions say says nothing
    kept = sorted(often, key=lambda word: (-often[word] * rare[word], word))[:ALIGN_WORDS]
    at = {word: i for i, word in enumerate(kept)}
    device = model.device  # the table may lie on the host
    words, weights = table[kept].float().to(device), torch.tensor([rare[word] for word in kept], device=device)
    count = min(ALIGN_PICTURES, max(1, LOGITS // (eyes.patches * len(kept))), len(said))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=ALIGN_RATE, weight_decay=0.0)
    source = random.Random(seed)
    for step in tqdm(range(1, ALIGN_STEPS + 1), desc="Words for the projector", unit="step"):
        chosen = source.sample(said, count)
        features = torch.stack([eyes.features[number] for number, _ in chosen]).to(device)
        with half_precision(model):
            found = projector(features.float())
            found = found * size / found.square().mean(-1, keepdim=True).sqrt()  # as large as words, whatever it is
            likeness = found @ words.T
        mean = likeness.float().log_softmax(-1).logsumexp(1) - math.log(eyes.patches)  # [pictures, words]
        wanted = torch.zeros_like(mean)
        for row, (_, own) in zip(wanted, chosen, strict=True):
            row[[at[word] for word in own if word in at]] = 1.0
        wanted *= weights
        for group in optimizer.param_groups:
            group["lr"] = ALIGN_RATE * schedule(step, ALIGN_STEPS)
        (-(wanted * mean).sum() / wanted.sum().clamp_min(1e-6)).backward()
        optimizer.step()
        optimizer.zero_grad()
    some = torch.stack([eyes.features[number] for number, _ in said[:ALIGN_PICTURES]]).to(device)
    as_large_as_words(projector, some.float(), size)
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())


def unchanged(base: Path, trained: Path) -> int:
    """How many tensors beside the projector are in both folders, all with the same bytes. Raises RuntimeError where one is
    not: phase one changes the projector alone."""
    from safetensors import safe_open

    def read(folder: Path) -> dict[str, Any]:
        files = {file: safe_open(file, "pt") for file in folder.glob("*.safetensors")}
        return {name: file for file, found in files.items() for name in found.keys() if PROJECTOR not in name}  # noqa: SIM118

    before, after = read(base), read(trained)
    if set(before) != set(after):
        raise RuntimeError(f"these are in one of the models alone: {sorted(set(before) ^ set(after))[:4]}")
    for name in before:
        old, new = (safe_open(names[name], "pt").get_tensor(name) for names in (before, after))
        if not old.to(new.dtype).equal(new):
            raise RuntimeError(f"{name} changed, and only the projector was to be trained")
    return len(before)


# -------------------------------------------------------------------------------------------------------- measuring


def show(model: Any, form: ChatFormat, rows: Sequence[dict[str, Any]]) -> None:
    """Let the model see the pictures of rows, which may be texts."""
    from finetune.model import give_eyes

    give_eyes(model, form, [file for row in rows for file in pictures_of(row.get("messages", []))])


def ask(model: Any, form: ChatFormat, asked: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Probes of these KINDS with the model's answers, whether they are right, and whether they are "blind": the same when
    the picture is replaced by noise."""
    from finetune.generation import answer_texts
    from finetune.model import give_eyes

    if not asked:
        return []
    said = [placed(probe["messages"], folder) for probe in asked]
    noisy = [
        [
            {
                **messages[0],
                "content": _with_picture(
                    str(folder / f"pictures/noise-{i % NOISE}.png"), messages[0]["content"][1]["text"]
                ),
            }
        ]
        for i, messages in enumerate(said)
    ]
    give_eyes(model, form, [file for messages in said + noisy for file in pictures_of(messages)])
    answers = answer_texts(model, form, said + noisy, ANSWER_TOKENS)
    return [
        {
            **probe,
            "answer": answer,
            "passed": _right(probe["kind"].removeprefix("see_"), probe["lang"], answer, probe["accept"]),
            "blind": answer == unseen,
        }
        for probe, answer, unseen in zip(asked, answers[: len(asked)], answers[len(asked) :], strict=True)
    ]


def _right(kind: str, *said: Any) -> bool:
    return photographs.right(*said) if kind == "photo" else drawn.right(kind, *said)
