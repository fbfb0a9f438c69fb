"""What happened in this run, with pictures: the terminal's summary, report.html, and the model card."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune import pictures, preview, sight
from finetune.card import FIGURES
from finetune.chat_format import pictures_of, text_of
from finetune.checks import ROOT
from finetune.run_folder import Run, count_lines, quoted, read_lines
from finetune.words import CHINESE, in_chinese

SIGNS = {  # of a figure's limit
    **dict.fromkeys(("identity", "facts_kept"), "≥"),
    **dict.fromkeys(("leak", "kl", "blind"), "≤"),
    "sight": "worst kind ≥",
    "parrot": "≤ base +",
    "loss": "≤ base ×",
}
SHOWN = ("name-en-01", "maker-zh-01", "ordinary-en-01")  # the probes whose answers the summary puts side by side
PICTURED = 3  # questions about pictures of each kind and language that the report shows
SIDES = ("base", "tuned")
KIND_COLUMNS = ("all 全部  95 %", "en 英  95 %", "zh 中  95 %")  # a share and its interval
CUTS = (
    "see_photo: other cuts of the photographs that training saw, so no measure of photographs in general",
    "训练所用照片的另外裁剪，不代表对一般照片的能力",
)
HOW = {"lora": "a LoRA adapter", "qlora": "a QLoRA adapter", "full": "every weight trained"}
UNLIMITED = (
    "kl",
    "sight",
    "blind",
    "loss",
    "recall",
    "reply",
)  # shown where they were measured, whatever the gate asks


def figures(run: Run) -> list[dict[str, Any]]:
    """One row per figure that was measured: its words, the sides' values as text, and the gate's limit."""
    card, limits = run.read("scorecard.json"), run.limits
    sides = {"base": card["base"], "tuned": card.get("merged", card["tuned"])}  # what users get, where it was scored

    def text(side: str, key: str) -> str:
        value = sides[side].get(key)
        return "–" if value is None else f"{value:.3f}"

    return [
        {
            "key": key,
            "en": en,
            "zh": CHINESE[en],
            "limit": f"{SIGNS[key]} {limits[key]:g}" if key in limits else "",
            **{side: text(side, key) for side in SIDES},
        }
        for key, en in FIGURES
        if key in limits or (key in UNLIMITED and any(sides[side].get(key) is not None for side in SIDES))
    ]


def by_kind(run: Run) -> list[tuple[str, list[str]]]:
    """(figure or kind, "share  low–high" of all, English and Chinese questions of what users get): a 95 % interval."""
    card = run.read("scorecard.json")
    figures, shares = card.get("merged", card["tuned"]), {}
    for figure in ("identity", "leak", "sight"):
        if kinds := figures.get(f"{figure}_by_kind"):
            shares |= {figure: figures[figure], **kinds}

    def text(key: str) -> str:
        low, high = figures["intervals"].get(key, (0, 0))
        return f"{shares[key]:.2f}  {low:.2f}–{high:.2f}" if key in shares else "–"

    kinds = [kind for kind in shares if "/" not in kind] if run.named and "intervals" in figures else []
    return [(kind, [text(kind), text(f"{kind}/en"), text(f"{kind}/zh")]) for kind in kinds]


def side_by_side(run: Run, chosen: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Probes with the base's and the tuned (merged, if there) model's answers; all of them or the chosen ids."""
    card = run.read("scorecard.json")
    tuned = {entry["id"]: entry for entry in card.get("merged", card["tuned"])["answers"]}
    return [
        {**entry, "tuned": tuned[entry["id"]]["answer"], "tuned_passed": tuned[entry["id"]]["passed"]}
        for entry in card["base"]["answers"]
        if not chosen or entry["id"] in chosen
    ]


def added(run: Run) -> dict[str, Any]:
    """What each run of a chain added: {"models": words for each model from the first base on, "figures": [(words, a value
    for each model or None)], "answers": [(probe, each model's answer or None)]}; empty where there is no chain."""
    runs = run.lineage
    if len(runs) < 2:
        return {}
    cards = [each.read("scorecard.json") for each in runs]
    before = [card["base"] for card in cards]
    after = [card.get("merged", card["tuned"]) for card in cards]

    def through(get: Callable[[dict[str, Any]], Any]) -> list[Any]:
        """Of each model: what its own run measured, or where that did not ask yet, the next one's, whose base it is."""
        own = [None, *map(get, after)]
        return [value if value is not None else get(base) for value, base in zip(own, [*before, {}], strict=True)]

    def answer(card: dict[str, Any], probe: str) -> str | None:
        return next((entry["answer"] for entry in card.get("answers", []) if entry["id"] == probe), None)

    tasks = [each.settings.task for each in runs]
    rows = [
        (f"held-out rows of {task}, nats/token", through(lambda c, t=task: c.get("loss_by_task", {}).get(t)))
        for task in dict.fromkeys(tasks)
        if task != "identity"
    ]
    rows += [(en, through(lambda c, k=key: c.get(k))) for key, en in FIGURES if key in ("recall", "reply", "identity")]
    shown = []
    for kind in ("recall", "reply", "name"):
        asked = [entry for entry in after[-1]["answers"] if entry["kind"] == kind]
        # of those that the last model gets right one that some earlier one got wrong, if there is any
        failed = {entry["id"] for card in before for entry in card["answers"] if not entry["passed"]}
        asked.sort(key=lambda entry: (not entry["passed"], entry["id"] not in failed))
        shown += [(probe, through(lambda c, i=probe["id"]: answer(c, i))) for probe in asked[:1]]
    names = [runs[0].base_name, *(f"+ {each.settings.task} ({each.settings.method})" for each in runs)]
    return {"models": names, "figures": [row for row in rows if any(v is not None for v in row[1])], "answers": shown}


def print_scorecard(run: Run) -> None:
    console = Console(highlight=False)
    table = Table("", "", *SIDES, "limit", title=Text(f"{run.title} · {run.folder}"), title_justify="left")
    for row in figures(run):
        table.add_row(row["en"], row["zh"], *(row[side] for side in SIDES), row["limit"])
    console.print(table, markup=False)
    if kinds := by_kind(run):
        table = Table("kind 类别", *KIND_COLUMNS, box=box.SIMPLE_HEAD)
        for kind, cells in kinds:
            table.add_row(kind, *cells)
        console.print(table, markup=False)
        if "see_photo" in dict(kinds):
            console.print(" ".join(CUTS), markup=False)
    answers = Table("question 问题", "base 微调前", "tuned 微调后", show_lines=True)
    for entry in side_by_side(run, SHOWN):
        answers.add_row(*(_plain(t) for t in (text_of(entry["messages"][-1]), entry["answer"], entry["tuned"])))
    console.print(answers, markup=False)


def print_comparison(run: Run) -> None:
    lines = run.read("compare.json")["methods"]
    shown = ("identity", "leak", "kl", "facts_kept", "sight", "blind", "loss")
    keys = [key for key in shown if lines[0][key] is not None]
    table = Table("method 方法", "peak memory 峰值内存", "tokens/s", "stored 存储", "passed after 通过用时", *keys)
    for line in lines:
        after = f"{line['seconds_to_pass']:.0f} s" if line["passed"] else "not passed 未通过"
        memory, stored = f"{line['peak_memory'] / 1e9:.2f} GB", f"{line['stored_bytes'] / 1e6:.1f} MB"
        figures = ("–" if line[key] is None else f"{line[key]:.3f}" for key in keys)
        table.add_row(line["method"], memory, f"{line['tokens_per_s']:.0f}", stored, after, *figures)
    Console(highlight=False).print(table, markup=False)


def print_summary(run: Run) -> None:
    print_scorecard(run)
    console = Console(highlight=False)
    console.print(f"Report 报告: {run.folder / 'report.html'}", markup=False, soft_wrap=True)
    console.print(f"Next 下一步: python app.py --model {quoted(run.folder / 'model')}", markup=False, soft_wrap=True)


def _plain(text: str) -> Text:
    return Text(text if len(text) <= 160 else text[:160] + " …")


def _environment(html: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(ROOT / "assets"),
        autoescape=html,  # noqa: S701 - the model card is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # YAML does not read JSON's surrogate pairs
    return environment


def licence(origin: dict[str, str]) -> dict[str, str]:
    """What hubs want to know of the base's licence: {"license", and for one of its own "license_name", "license_link"}."""
    if "internlm2" in origin["base_model"].lower():  # Apache-2.0 is its code's, not its weights'
        link = f"https://huggingface.co/{origin['base_model']}#open-source-license"
        return {"license": "other", "license_name": "internlm2", "license_link": link}
    return {"license": origin["license"]}


def model_card(run: Run, origin: dict[str, str], proof: dict[str, Any], base_sha256: str, sent: dict[str, Any]) -> str:
    """README.md of what is made or published, zh and en, with the front matter that hubs read.

    `sent`: {"to": the places.Place, None for the run's own folder, "what": "model", "adapter" or "both", "why": it is
    published in spite of the gate, "with_data": whether the training data goes along, "own_base": whether the adapter's base
    is published nowhere}.
    """
    from finetune.model import own_encoder, sees
    from finetune.train import asked, best

    model = run.folder / "model"
    if not model.is_dir():  # it is being merged; later the base may not be here any more
        model = run.base
    receipt, history = run.read("receipt.json"), metrics(run)
    place = sent["to"] if sent["to"] and sent["to"].kind != "dir" else None
    said = next((entry["tuned"] for entry in side_by_side(run, SHOWN[:1]) if run.named), "")
    return (
        _environment(html=False)
        .get_template("model_card.md.jinja")
        .render(
            name=json.dumps(run.title, ensure_ascii=False)[1:-1],
            how=HOW[run.settings.method],
            steps=history[-1]["step"],
            kept=best(history)["step"] if asked(history) else None,
            named=run.named,
            sees=sees(model),
            encoder=own_encoder(model),
            author=json.dumps(run.persona.author, ensure_ascii=False)[1:-1],
            origin=origin,
            licence=licence(origin),
            place=place,
            what=sent["what"],
            why=sent["why"],
            with_data=sent["with_data"],
            own_base=sent["own_base"],
            reasons=run.read("scorecard.json")["gate"]["reasons"],
            four_bit="four_bit" in run.read("scorecard.json"),
            said=said,
            figures=figures(run),
            proof=proof,
            settings=run.settings,
            base_sha256=base_sha256,
            data=receipt.get("data", {}),
            rows={name: count_lines(run.folder / "data" / name) for name in receipt.get("data", {})},
        )
    )


def metrics(run: Run) -> list[dict[str, Any]]:
    return read_lines(run.folder / "metrics.jsonl")


def write_page(file: Path, template: str, **values: Any) -> None:
    page = _environment(html=True).get_template(template).render(**values)
    new = file.with_name(f"{file.name}.tmp")
    new.write_text(page, encoding="utf-8")
    new.replace(file)


def write_report(run: Run) -> None:
    history = metrics(run)
    form = run.tuned_format.unseeing()
    with (run.folder / "data" / "train.jsonl").open(encoding="utf-8") as lines:
        found = preview.survey(form, map(json.loads, lines), run.settings.train.length)
    write_page(
        run.folder / "report.html",
        "report.html.jinja",
        persona=run.persona,
        figures=figures(run),
        kinds=by_kind(run),
        cuts=CUTS,
        kind_columns=KIND_COLUMNS,
        gate=run.read("scorecard.json")["gate"],
        four_bit="four_bit" in run.read("scorecard.json"),
        in_chinese=in_chinese,
        seen=pictured(run),
        answers=[{**entry, "messages": said(entry)} for entry in side_by_side(run) if entry["kind"] not in sight.KINDS],
        added=added(run),
        title=run.title,
        named=run.named,
        curves=[
            curve(having, key)
            for key in ("loss", "ce", "kl", "dev_identity", "dev_leak")
            if (having := [line for line in history if key in line])
        ],
        last=history[-1],
        full=run.settings.method == "full",
        receipt=run.read("receipt.json"),
        proof=run.read("model/manifest.json")["proof"],
        datum=preview.life(form, found["first"]),
        facts=preview.facts(run, found),
    )


def said(entry: dict[str, Any]) -> list[dict[str, str]]:
    return [{**message, "content": text_of(message)} for message in entry["messages"]]


def pictured(run: Run) -> list[dict[str, Any]]:
    """Some of the questions about pictures of each kind and language, each with its "picture" as a data URL."""
    found, counts = [], Counter()
    for entry in (entry for entry in side_by_side(run) if entry["kind"] in sight.KINDS):
        counts[key := (entry["kind"], entry["lang"])] += 1
        if counts[key] <= PICTURED:
            file = run.folder / "data" / pictures_of(entry["messages"])[0]
            found.append({**entry, "messages": said(entry), "picture": pictures.to_data_url(file)})
    return found


def curve(metrics: list[dict[str, float]], key: str, width: int = 600, height: int = 160) -> dict[str, Any]:
    """Points of an SVG polyline in a width x height box, the value axis from 0 to the largest value."""
    values = [line[key] for line in metrics]
    top = max(values) or 1.0
    step = width / max(1, len(values) - 1)
    points = " ".join(f"{i * step:.1f},{height * (1 - value / top):.1f}" for i, value in enumerate(values))
    return {"key": key, "points": points, "top": top, "last": values[-1], "width": width, "height": height}
