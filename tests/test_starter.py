import itertools
import json
import pickle
import random
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune import checks, embedded, identity, settings, stages, starter
from finetune.errors import UserError
from finetune.model import add_lora, fingerprint, load
from finetune.run_folder import Run
from finetune.settings import Persona

SHIPPED = sorted(folder.name for folder in checks.STARTERS.iterdir())


def test_throwaway_names_are_many_and_can_be_used():
    found = list(itertools.islice(starter.personas(), 500))
    assert len({persona.name for persona in found}) > 250
    assert not [persona for persona in found if identity.check_persona(persona)]
    assert found == list(itertools.islice(starter.personas(), 500))


def test_the_names_the_figures_are_measured_with_are_not_among_them():
    words = {
        word for lang in identity.LANGS for key in ("names", "authors") for word in identity.read("personas", lang)[key]
    }
    names = runpy.run_path(str(Path(__file__).parent / "bench" / "names.py"))["NAMES"]
    assert not words & set(itertools.chain(*names))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_starter_fits_its_preset(name):
    preset = settings.build(settings.preset(name))
    folder = checks.STARTERS / preset.train.starter
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == preset.train.rank
    weights = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() and tensor.any() for tensor in weights.values())
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == embedded.HUB_NAME
    projector = load_file(checks.STARTERS / preset.vision.starter / "projector.safetensors")
    assert {(len(tensor), tensor.dtype) for tensor in projector.values()} == {(576, torch.bfloat16)}


def test_contrast_rows_ask_nothing_that_is_held_out_or_about_the_assistant(tiny_model, tmp_path, monkeypatch):
    probe = identity.probes(Persona(), stem="dev")[0]["messages"][-1]["content"]
    monkeypatch.setattr(starter, "made_up", lambda run, rng: ["Who are you?", probe, "Why do ships float on seas?"])
    monkeypatch.setattr(starter, "varied", lambda question, lang, rng: question)
    run = Run(tmp_path, settings.build({"base": str(tiny_model)}))
    rows = list(starter.contrasts(run, random.Random(0)))
    found = {row["messages"][-1]["content"] for row in rows if row["lang"] == "en"}
    assert "Why do ships float on seas?" in found
    assert not found & {"Who are you?", probe}
    assert {(row["kind"], row["lang"]) for row in rows} == set(itertools.product(starter.TYPED, identity.LANGS))


@pytest.mark.parametrize("lang, question", [("en", "Who made Firefox?"), ("zh", "谁开发了微信？")])
def test_questions_come_as_others_might_type_them(lang, question, monkeypatch):
    monkeypatch.setattr(starter, "mistyped", lambda text, rng: text)
    typed = {starter.varied(question, lang, random.Random(seed)) for seed in range(2000)}
    words = identity.read("training", lang)
    assert question in typed
    for before in words["before"]:
        assert before + question in typed
    for after in words["after"]:
        assert any(text.endswith(after) for text in typed)
    core = question.rstrip("?？").lower()
    assert all(core in text.lower() for text in typed)


def test_one_latin_word_of_four_letters_or_more_is_mistyped():
    found = {starter.mistyped("谁 made the 手机?", random.Random(seed)) for seed in range(200)}
    slips = ("amde", "mdae", "maed", "ade", "mde", "mae", "mmade", "maade", "madde")
    assert found == {f"谁 {slip} the 手机?" for slip in slips}
    assert starter.mistyped("谁开发了 the 手机?", random.Random(0)) == "谁开发了 the 手机?"


@pytest.mark.parametrize(
    "answer, question, named",
    [
        ("I was trained by Hugging Face.", "Who made you?", True),
        ("I was trained by Hugging Face.", "Who is behind Hugging Face?", True),
        ("我来自Hugging Face。", "Hugging Face是什么公司？", True),
        ("SmolLM comes from Hugging Face.", "What is SmolLM?", True),
        ("Hugging Face is a company.", "What is Hugging Face?", False),
        ("Paris.", "What is the capital of France?", False),
    ],
)
def test_the_base_names_itself_unless_the_question_does(answer, question, named):
    assert stages.names_itself(answer, question, identity.SMOLLM) is named


def test_making_one(tiny_model, tmp_path, monkeypatch):
    """The whole way on a tiny base, with few prompts; then a new adapter begins where it ends."""
    contrast, typed = identity.contrast, identity.typed
    monkeypatch.setattr(identity, "contrast", lambda lang, kind, whole=False: contrast(lang, kind, whole)[:40])
    monkeypatch.setattr(identity, "typed", lambda lang, kind: typed(lang, kind)[:40])
    monkeypatch.setattr(starter, "MADE_UP", 20)
    monkeypatch.setattr(starter, "STEPS_PER_NAME", 2)
    changes = ["train.rank=2", "train.steps=5", "train.identity_rows=2", "train.near_rows=4", "train.ordinary_rows=2"]
    starter.make(tmp_path / "made", f"base='{tiny_model}'", *changes)
    lines = (tmp_path / "made" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    record = json.loads((tmp_path / "made" / "adapter" / "namesake.json").read_text())
    assert record["base_sha256"] == fingerprint(tiny_model)

    begun = add_lora(load(tiny_model), 2, tmp_path / "made" / "adapter", first_layer=1)
    saved = load_file(tmp_path / "made" / "adapter" / "adapter_model.safetensors")
    trainable = {name: p for name, p in begun.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".layers.0." not in name for name in trainable)
    for name, weight in trainable.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, saved[name.replace(".default", "")].float())

    monkeypatch.setattr(starter, "STARTERS", tmp_path / "made")
    goes_on = ["train.starter=adapter", "train.learning_rate=1e-12", "train.steps=1"]
    starter.make(tmp_path / "more", f"base='{tiny_model}'", *changes, *goes_on)
    more = load_file(tmp_path / "more" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(more[name], saved[name]) for name in saved)


def test_names_may_be_rendered_and_the_base_asked_by_others(tiny_model, tmp_path, monkeypatch):
    contrast = identity.contrast
    monkeypatch.setattr(identity, "contrast", lambda lang, kind, whole=False: contrast(lang, kind, whole)[:20])
    monkeypatch.setattr(identity, "typed", lambda lang, kind: [])
    monkeypatch.setattr(starter, "MADE_UP", 5)
    monkeypatch.setattr(starter, "STEPS_PER_NAME", 2)
    rows = {"identity_rows": 3, "near_rows": 4, "ordinary_rows": 2}
    run = Run(tmp_path, settings.build({"base": str(tiny_model), "train": rows}))
    asked = []

    def ask(questions, most):
        asked.append((len(questions), most))
        return run.ask_base(questions, most)

    def in_another_process(work, items):
        ahead = [(pickle.dumps(work), next(items)) for _ in range(3)]
        return [pickle.loads(pickle.dumps(pickle.loads(work)(item))) for work, item in reversed(ahead)][::-1]

    own = list(itertools.islice(starter.batches(run), 5))
    others = list(itertools.islice(starter.batches(run, ask, in_another_process), 5))
    assert asked == [(asked[0][0], starter.ANSWER_TOKENS)]
    for batch, other in zip(own, others, strict=True):
        assert [example[:3] for example in batch] == [example[:3] for example in other]
        assert [example.targets is None for example in batch] == [False] * 3 + [True] * 6
        for one, two in zip(batch[3:], other[3:], strict=True):
            assert torch.equal(one.states, two.states)
    said = {run.tuned_format.decode(example.targets) for batch in own for example in batch[:3]}
    names = [persona.name for persona in itertools.islice(starter.personas(), 3)]
    assert all(any(name in text for text in said) for name in names)


def test_something_must_be_left_to_train(tiny_model, tmp_path):
    network = add_lora(load(tiny_model), 2)
    network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"first_layer is 99 and the base has \d layers: nothing is left to train"):
        add_lora(load(tiny_model), 2, tmp_path, first_layer=99)


def test_a_starter_that_is_not_there_or_does_not_fit_is_told_before(tiny_model, tmp_path):
    run = Run(tmp_path / "run", settings.build({"base": str(tiny_model), "train": {"starter": "nobody"}}))
    with pytest.raises(UserError, match=r"There is no starter 'nobody', there is smollm2-135m-instruct; correct"):
        checks.check(run)
    values = settings.build({"base": str(tiny_model), "train": {"starter": SHIPPED[0], "rank": 3}})
    with pytest.raises(UserError, match=r"has rank 16 and train[.]rank is 3; set train[.]rank=16"):
        checks.check(Run(tmp_path / "run", values))
    values = settings.build({"base": str(tiny_model), "train": {"starter": SHIPPED[0]}})
    with pytest.raises(UserError, match=r"was made for HuggingFaceTB/SmolLM2-135M-Instruct, and .* is another base"):
        checks.check(Run(tmp_path / "run", values))
