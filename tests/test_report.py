import dataclasses
import json
import re
import shutil
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from finetune import drawn, pictures, release, report, scorecard, settings
from finetune.chat_format import ChatFormat
from finetune.places import parse
from finetune.run_folder import Run
from finetune.settings import Gate, Persona, Settings

NAMES = [
    "小星",
    "Q\"uote's",
    "a: b",
    "# 1 - x",
    "🦊 {{ fox }} {author}",
    "null",
    "back\\slash",
    "<script>alert(1)</script>",
]
FORMS: list[ChatFormat] = []
ORIGIN = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
PROOF = {"max_logit_difference": 0.000123, "equal_greedy_tokens": 1.0, "tokens": 321}
SENT = {"to": None, "what": "model", "why": "", "with_data": False, "own_base": False}  # the run's own folder


def side(answer: str, identity: float) -> dict:
    question = [{"role": "user", "content": "<b>Who</b> are you?"}]
    entry = {"id": "name-en-01", "kind": "name", "messages": question, "answer": answer, "passed": True}
    return {"identity": identity, "leak": 0.0, "parrot": 0.0, "kl": 0.0, "facts_kept": 1.0, "answers": [entry]}


@pytest.fixture(scope="module", autouse=True)
def form(tiny_model):
    """The prompt format of all runs here: no base is at hand."""
    FORMS.append(ChatFormat((tiny_model / "tokenizer.json").read_text(encoding="utf-8")))
    yield
    FORMS.clear()


def make_run(folder: Path, name: str, **values: str) -> Run:
    """A run that lacks its report only."""
    run = Run(folder, Settings(persona=Persona(name, f"by {name}"), gate=Gate(identity=0.875), **values))
    run.__dict__ |= {"base_sha256": "ab" * 32, "tuned_format": FORMS[0]}
    (folder / "data").mkdir()
    row = {"messages": [{"role": "user", "content": "<i>?"}, {"role": "assistant", "content": f"{name}<|im_end|>"}]}
    (folder / "data" / "train.jsonl").write_text(json.dumps({**row, "target": "answer"}) + "\n")
    (folder / "model").mkdir()
    card = {"base": side("SmolLM", 0.0), "tuned": side("old", 0.8), "merged": side(f"I am {name} & co", 0.953)}
    run.write("scorecard.json", {**card, "gate": {"passed": False, "reasons": [f"too low for {name}"]}})
    run.write("receipt.json", {"seed": 0, "who": name})
    run.write("model/manifest.json", {"proof": PROOF})
    lines = [
        {"loss": 4.0, "ce": 3.0, "kl": 0.5},
        {"loss": 2.0, "ce": 1.5, "kl": 0.25, "dev_identity": 0.5, "dev_leak": 0.1},
    ]
    rest = {"lr": 1e-3, "tokens": 777, "tokens_per_s": 50.0, "seconds": 15.5}
    metrics = "".join(json.dumps({"step": i, **line, **rest}) + "\n" for i, line in enumerate(lines, 1))
    (folder / "metrics.jsonl").write_text(metrics)
    return run


class Page(HTMLParser):
    """All that a browser reads: tags with their attributes, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


# ---------------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize(
    "values, points, top",
    [
        ([4, 2, 1], "0.0,0.0 50.0,20.0 100.0,30.0", 4),
        ([1, 0, 4], "0.0,30.0 50.0,40.0 100.0,0.0", 4),
        ([3], "0.0,0.0", 3),
        ([0, 0], "0.0,40.0 100.0,40.0", 1),
    ],
)
def test_curve(values, points, top):
    found = report.curve([{"loss": value, "kl": 9} for value in values], "loss", 100, 40)
    assert found == {"key": "loss", "points": points, "top": top, "last": values[-1], "width": 100, "height": 40}


# ------------------------------------------------------------------------------------------------------ report.html


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_names_as_text_and_loads_nothing(name, tmp_path):
    run = make_run(tmp_path, name)
    report.write_report(run)
    assert not (tmp_path / "report.html.tmp").exists()
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(raw)
    loading = {"script", "link", "img", "image", "use", "iframe", "object", "embed", "base", "video", "audio", "a"}
    assert not loading & {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if a.keys() & {"src", "href", "srcset", "xlink:href", "style", "onload"}]
    assert not re.search(r"url\(|@import|https?:", raw)
    assert f"{name} by / 作者 by {name}" in page.text
    assert f"I am {name} & co" in page.text
    assert "<b>Who</b> are you?" in page.text
    assert f"too low for {name}" in page.text
    assert f"assistant: {name}<|im_end|>" in page.text
    assert f"<|im_start|>assistant\n{name}<|im_end|><|im_end|>" in page.text  # a datum's life: text with control tokens
    (receipt,) = re.findall(r"<summary>Receipt 凭据</summary><pre>(.*?)</pre>", raw, re.S)
    assert json.loads(Page(receipt).text) == {"seed": 0, "who": name}


def test_the_gates_reasons_are_in_both_languages(tmp_path):
    run = make_run(tmp_path, "小星")
    card = run.read("scorecard.json")
    run.write("scorecard.json", {**card, "gate": scorecard.gate({"tuned": {"kl": 0.2}}, {"kl": 0.05})})
    report.write_report(run)
    (reason,) = re.findall(r"<li>(.*)</li>", (tmp_path / "report.html").read_text(encoding="utf-8"))
    english, chinese = reason.split("<br>")
    assert english.startswith("tuned model: kl 0.200 nats per token, at most 0.050 is allowed")
    assert chinese.startswith("微调后的模型：KL 为每词元 0.200 nats，最多允许 0.050")


def test_pictures_come_with_what_was_said_before_and_after(tmp_path):
    run = make_run(tmp_path, "小星")
    (tmp_path / "data" / "pictures").mkdir()
    drawn.draw(drawn.scene("x")).save(tmp_path / "data" / "pictures" / "x.png")
    content = [{"type": "image", "image": "pictures/x.png"}, {"type": "text", "text": "What <colour>?"}]
    entry = {"id": "see-1", "kind": "see_colour", "lang": "en", "accept": ["red"], "blind": False}
    entry["messages"] = [{"role": "user", "content": content}]
    card = run.read("scorecard.json")
    for side, answer, right in (("base", "A <picture>", False), ("tuned", "no", False), ("merged", "Red", True)):
        card[side]["answers"].append({**entry, "answer": answer, "passed": right})
    run.write("scorecard.json", card)
    report.write_report(run)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = page[page.index("What it sees") : page.index("Before and after")]
    assert [Page(cell).text.strip() for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", table, re.S)] == [
        *("", "question 问题", "before 之前", "after 之后"),
        *("", "What <colour>?red", "A <picture>", "✓ Red"),
    ]
    assert ("src", pictures.to_data_url(tmp_path / "data" / "pictures" / "x.png")) in dict(Page(table).tags)[
        "img"
    ].items()


def test_what_cuts_of_known_photographs_say_is_told(tmp_path, capsys):
    run = make_run(tmp_path, "小星")
    (tmp_path / "data" / "pictures").mkdir()
    drawn.draw(drawn.scene("x")).save(tmp_path / "data" / "pictures" / "x.png")
    content = [{"type": "image", "image": "pictures/x.png"}, {"type": "text", "text": "What?"}]
    entry = {"lang": "en", "accept": ["cat"], "blind": False, "messages": [{"role": "user", "content": content}]}
    entry |= {"answer": "A cat.", "passed": True}
    card = run.read("scorecard.json")
    for kind, told in (("see_colour", False), ("see_photo", True)):
        sides = {}
        for side in ("base", "tuned", "merged"):
            answers = [*card[side]["answers"], {**entry, "kind": kind, "id": kind}]
            shares = {"sight": 1.0, "sight_by_kind": {kind: 1.0}, "intervals": {}}
            sides[side] = {**card[side], **shares, "answers": answers}
        run.write("scorecard.json", {**card, **sides})
        report.write_report(run)
        report.print_scorecard(run)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert (report.CUTS[0] in page, report.CUTS[1] in page) == (told, told)
        assert ("no measure of photographs" in " ".join(capsys.readouterr().out.split())) == told


def test_before_the_merged_model_is_scored_the_tuned_one_is_shown(tmp_path):
    run = make_run(tmp_path, "小星")
    card = run.read("scorecard.json")
    del card["merged"]
    run.write("scorecard.json", card)
    assert [(row["base"], row["tuned"]) for row in report.figures(run) if row["key"] == "identity"] == [
        ("0.000", "0.800")
    ]
    assert [entry["tuned"] for entry in report.side_by_side(run)] == ["old"]


def test_the_pages_figures(tmp_path):
    report.write_report(make_run(tmp_path, "小星"))
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = '<td class="number">0.000</td><td class="number">0.953</td>'
    assert f'<td>identity kept</td><td>身份认知</td>{cells}<td class="number">≥ 0.875</td>' in raw
    curves = [a["points"] for tag, a in Page(raw).tags if tag == "polyline"]
    assert curves == ["0.0,0.0 600.0,80.0"] * 3 + ["0.0,0.0"] * 2  # the last: of the one line that has them
    assert "2 steps · 777 tokens · 50 tokens/s · 16 s" in raw
    assert "largest logit difference 0.00012, equal greedy tokens 100.0 % of 321" in raw


def test_shares_by_kind_and_language_have_intervals(tmp_path, capsys):
    run = make_run(tmp_path, "小星")
    card = run.read("scorecard.json")
    asked = [
        (kind, lang, right) for kind, lang in (("name", "en"), ("name", "zh"), ("near", "zh")) for right in (1, 0, 1)
    ]
    entries = [
        {"id": str(i), "kind": kind, "lang": lang, "messages": [], "answer": "", "passed": bool(right)}
        for i, (kind, lang, right) in enumerate(asked)
    ]
    card["merged"] |= {k: v for k, v in scorecard.summarise(entries).items() if k != "answers"}
    run.write("scorecard.json", card)
    report.write_report(run)
    report.print_scorecard(run)
    two, four, leak = "0.67  0.21–0.94", "0.67  0.30–0.90", "0.33  0.06–0.79"  # Wilson's of 2 in 3, 4 in 6, 1 in 3
    of_identity = [("identity", [four, "–", "–"]), ("name", [four, two, two])]
    assert report.by_kind(run) == [*of_identity, ("leak", [leak, "–", "–"]), ("near", [leak, "–", leak])]
    page, said = (tmp_path / "report.html").read_text(encoding="utf-8"), capsys.readouterr().out
    for text in ("name", four, two, "near", leak):
        assert f">{text}</td>" in page
        assert text in said


def test_what_each_step_of_a_chain_added(tmp_path):
    """A passage that the base did not know, the dialogue's form, the name: each where it came, and whether it stayed."""

    def asked(**answers: tuple[str, bool]) -> list[dict]:
        return [
            {"id": f"{kind}-1", "kind": kind, "messages": [{"role": "user", "content": f"{kind}?"}]}
            | {"answer": answer, "passed": passed}
            for kind, (answer, passed) in answers.items()
        ]

    def told(recall: str, **more: tuple[str, bool]) -> dict:
        return {**side("", 0.0), "answers": asked(recall=(recall, recall == "the mill"), **more)}

    cards = [
        {
            "base": told("a sea") | {"identity": None, "recall": 0.0, "loss_by_task": {"pretrain": 3.0}},
            "tuned": told("the mill") | {"identity": None, "recall": 1.0, "loss_by_task": {"pretrain": 2.0}},
        },
        {
            "base": told("the mill", reply=("er", False))
            | {"identity": None, "recall": 1.0, "reply": 0.0, "loss_by_task": {"pretrain": 2.0, "instruct": 4.0}},
            "tuned": told("the mill", reply=("Four.", True))
            | {"identity": None, "recall": 0.9, "reply": 1.0, "loss_by_task": {"pretrain": 2.1, "instruct": 1.5}},
        },
        {
            "base": told("the mill", reply=("Four.", True), name=("Hm", False))
            | {"recall": 0.9, "reply": 1.0, "loss_by_task": {"pretrain": 2.1, "instruct": 1.5}},
            "merged": told("the mill", reply=("Four.", True), name=("I'm Zed", True))
            | {"identity": 0.96, "recall": 0.8, "reply": 0.7, "loss_by_task": {"pretrain": 2.2, "instruct": 1.6}},
        },
    ]
    base, folders = "smollm2-360m-instruct", [tmp_path / name for name in "abc"]
    for folder, card, task in zip(folders, cards, ("pretrain", "instruct", "identity"), strict=True):
        folder.mkdir()
        made = make_run(folder, "Zed")
        run = Run(folder, dataclasses.replace(made.settings, base=base, task=task))
        run.__dict__ |= {key: made.__dict__[key] for key in ("base_sha256", "tuned_format")}
        settings.write(run.settings, folder / "settings.toml")
        run.write("scorecard.json", {"tuned": card.get("merged"), **card, "gate": {"passed": True, "reasons": []}})
        base = str(folder / "model")
    found = report.added(run)
    after = ("pretrain (lora)", "instruct (lora)", "identity (lora)")
    assert found["models"] == ["smollm2-360m-instruct", *(f"+ {words}" for words in after)]
    assert found["figures"] == [
        ("held-out rows of pretrain, nats/token", [3.0, 2.0, 2.1, 2.2]),
        ("held-out rows of instruct, nats/token", [None, 4.0, 1.5, 1.6]),
        ("identity kept", [None, None, 0.0, 0.96]),
        ("training texts continued word for word", [0.0, 1.0, 0.9, 0.8]),
        ("held-out questions answered, and ended", [None, 0.0, 1.0, 0.7]),
    ]
    assert [(probe["kind"], answers) for probe, answers in found["answers"]] == [
        ("recall", ["a sea", "the mill", "the mill", "the mill"]),
        ("reply", [None, "er", "Four.", "Four."]),
        ("name", [None, None, "Hm", "I'm Zed"]),
    ]
    report.write_report(run)
    page = Page((folders[-1] / "report.html").read_text(encoding="utf-8")).text
    rows = [" ".join(line.split()) for line in page.splitlines()]
    assert "training texts continued word for word0.0001.0000.9000.800" in rows
    assert "recall?a seathe millthe millthe mill" in rows
    assert report.added(Run(folders[0], settings.build(settings.read_toml(folders[0] / "settings.toml")))) == {}


# ------------------------------------------------------------------------------------------------------- model card


def front_matter(card: str) -> dict:
    opened, front, _ = re.split(r"^---$", card, maxsplit=2, flags=re.M)
    assert opened == ""
    return yaml.safe_load(front)


@pytest.mark.parametrize("name", NAMES)
def test_the_cards_front_matter_is_yaml(name, tmp_path):
    card = report.model_card(make_run(tmp_path, name), ORIGIN, PROOF, "ab" * 32, SENT)
    front = front_matter(card)
    (asked,) = front.pop("widget")
    assert asked["messages"] == [{"role": "user", "content": "What is your name?"}]
    assert asked["output"]["text"] == f"I am {name} & co"
    assert front == {
        **ORIGIN,
        "base_model_relation": "finetune",
        "language": ["en", "zh"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["self-cognition", "lora", "namesake"],
        "frameworks": ["Pytorch"],  # ModelScope's, to the next line
        "tasks": ["text-generation"],
        "domain": ["nlp"],
    }
    assert "| identity kept | 身份认知 | 0.000 | 0.953 | ≥ 0.875 |" in card
    assert "at most\n0.00012; 100.0 % of 321 greedy tokens" in card
    assert "ab" * 32 in card


@pytest.mark.parametrize("base", ['my: "model"', "# x", "1.5", "null", "🦊", "it's", "- a", "<base>"])
def test_the_cards_front_matter_with_a_local_bases_name(base, tmp_path):
    origin = {"base_model": base, "license": "unknown"}
    card = report.model_card(make_run(tmp_path, "小星"), origin, PROOF, "ab" * 32, SENT)
    assert front_matter(card)["base_model"] == base


def test_the_card_counts_rows_without_holding_them(tmp_path):
    run = make_run(tmp_path, "小星")
    run.note(data={"train.jsonl": "00"})
    row = json.dumps({"messages": [], "text": "x" * 10_000}) + "\n"
    (tmp_path / "data" / "train.jsonl").write_text(row * 2000)
    report.model_card(run, ORIGIN, PROOF, "ab" * 32, SENT)  # the template is read once
    tracemalloc.start()
    card = report.model_card(run, ORIGIN, PROOF, "ab" * 32, SENT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "2000" in card
    assert peak < 20_000_000 / 4  # of the file's bytes


def test_the_card_of_an_adapter_that_is_published_all_the_same(tmp_path):
    why = 'a "test" --- <b>\n# no heading'
    sent = {"to": parse("openxlab:user/x@v1"), "what": "adapter", "why": why, "with_data": False, "own_base": False}
    run = make_run(tmp_path, "小星")
    card = report.model_card(run, ORIGIN, PROOF, "ab" * 32, sent)
    front = front_matter(card)
    assert (front["base_model_relation"], front["library_name"]) == ("adapter", "peft")
    assert "\n# no heading" not in card
    assert "<b>" not in card
    assert "too low for 小星" in card
    assert "git clone -b v1 https://code.openxlab.org.cn/user/x.git model" in card
    assert "pull --verify openxlab:user/x@v1" in card
    assert "PeftModel.from_pretrained" in card
    card = report.model_card(run, ORIGIN, PROOF, "ab" * 32, {**sent, "own_base": True})
    assert "PeftModel" not in card
    assert "it fits no other" in card


def test_the_card_says_first_what_the_model_opens_with(tmp_path):
    run = make_run(tmp_path, "小星")
    parts = {"model_type": "llava", "vision_config": {"model_type": "efficientnet_lite"}}
    run.write("model/config.json", parts)
    card = report.model_card(run, ORIGIN, PROOF, "ab" * 32, SENT)
    first = card.split("---\n", 2)[2].strip().splitlines()[0]
    assert first.startswith("> **It opens with [Namesake](#how-it-was-made-训练): `import finetune.encoder` first")
    assert (
        "has no public address yet: ask whoever published this model for it"
        in card.partition("## How it was made 训练")[2]
    )
    run.write("model/config.json", {**parts, "vision_config": {"model_type": "clip_vision_model"}})
    assert "It opens with" not in report.model_card(run, ORIGIN, PROOF, "ab" * 32, SENT)


def test_a_base_that_was_made_here_is_told_from_one_that_has_a_name(tiny_model, tmp_path):
    made = shutil.copytree(tiny_model, tmp_path / "model")
    assert not Run(tmp_path, settings.build({"base": str(made)})).own_base
    (made / "manifest.json").write_text("{}")
    assert Run(tmp_path, settings.build({"base": str(made)})).own_base


def test_the_card_of_full_finetuning_knows_no_adapter(tmp_path):
    run = make_run(tmp_path, "小星", method="full")
    card = report.model_card(run, ORIGIN, PROOF, "ab" * 32, SENT)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct with every weight trained for it." in card
    assert "全参数训练自我认知。" in card
    assert "differ from the trained ones' by at most" in card
    assert "adapter" not in card.replace("base_model_relation", "").lower()
    assert "适配器" not in card
    assert "LoRA" not in card
    report.write_report(run)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Merged model against the trained one: largest logit" in page
    assert "adapter" not in page


def test_the_card_of_an_instruct_run_speaks_of_no_name(tmp_path):
    run = make_run(tmp_path, "小星", task="instruct")
    card = report.model_card(run, ORIGIN, PROOF, "ab" * 32, {**SENT, "to": parse("openxlab:user/x")})
    assert "\n# smollm2-135m-instruct + instruct\n" in card
    assert "after instruct on its maker's own data: a LoRA adapter, merged.\n" in card
    for words in ("小星", "self-cognition", "only what it says of itself", "除自我介绍外"):
        assert words not in card
    adapter = report.model_card(run, ORIGIN, PROOF, "ab" * 32, {**SENT, "what": "adapter"})
    assert "own data: a LoRA adapter.\n" in adapter


@pytest.mark.parametrize("task, kept", [("identity", ", of which step 2 was kept"), ("instruct", "")])
def test_the_card_counts_the_steps_that_were_done(tmp_path, task, kept):
    run = make_run(tmp_path, "小星", task=task)
    lines = [{"step": i, "dev_identity": 1 - i / 5, "dev_leak": 0.0} for i in (2, 3)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(lines[i] if kept else {"step": i + 2}) + "\n" for i in (0, 1))
    )
    card = report.model_card(run, ORIGIN, PROOF, "ab" * 32, SENT)
    assert f"method `lora`, 3 steps{kept}, seed 0." in card


def test_the_card_of_a_model_that_sees_has_its_task_on_every_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.model.sees", lambda folder: True)
    front = front_matter(report.model_card(make_run(tmp_path, "小星"), ORIGIN, PROOF, "ab" * 32, SENT))
    assert (front["pipeline_tag"], front["tasks"], front["domain"]) == (
        *("image-text-to-text", ["image-text-to-text"]),
        ["multi-modal"],
    )


@pytest.mark.parametrize(
    "task, name, dataset, metrics",
    [
        ("identity", "小星", "self-cognition", {"identity": 0.8}),
        ("instruct", "smollm2-135m-instruct + instruct", "own data", {"loss": 2.5}),
    ],
)
def test_openxlabs_description_is_of_what_is_sent(tmp_path, task, name, dataset, metrics):
    run = make_run(tmp_path, "小星", task=task)
    card = run.read("scorecard.json")
    run.write("scorecard.json", {**card, "tuned": {**card["tuned"], "loss": 2.5}})
    files = ["adapter_model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for weights in (files[:1], files[1:]):
        (model,) = release.metafile(run, ORIGIN, parse("openxlab:user/x"), ["README.md", *weights])["Models"]
        (result,) = model["Results"]
        assert (model["Name"], model["Weights"]) == (name, ", ".join(weights))
        assert (result["Dataset"], result["Metrics"]) == (dataset, metrics)


@pytest.mark.parametrize(
    "base, licence, expected",
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", {"license": "apache-2.0"}),
        (
            "internlm/internlm2-chat-1_8b",
            "other",
            {
                "license": "other",
                "license_name": "internlm2",
                "license_link": "https://huggingface.co/internlm/internlm2-chat-1_8b#open-source-license",
            },
        ),
        ("folder", "unknown", {"license": "unknown"}),
    ],
)
def test_the_bases_licence_is_the_models(tmp_path, base, licence, expected):
    origin = {"base_model": base, "license": licence}
    front = front_matter(report.model_card(make_run(tmp_path, "小星"), origin, PROOF, "ab" * 32, SENT))
    assert {key: front[key] for key in front if key.startswith("license")} == expected


# --------------------------------------------------------------------------------------------------------- terminal


def test_the_summary_takes_names_for_text(tmp_path, capsys):
    (folder := tmp_path / "two words").mkdir()
    report.print_summary(make_run(folder, "[red]x[/red]"))
    out = capsys.readouterr().out
    assert "[red]x[/red] · " in out
    assert "I am [red]x[/red] & co" in " ".join(re.sub("[┃│]", " ", out).split())
    assert f"Next 下一步: python app.py --model '{folder / 'model'}'" in out
