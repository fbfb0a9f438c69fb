"""What happened in this run, with pictures: the terminal's summary, report.html, and the model card."""

import json
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.stages import ROOT, Run, quoted

FIGURES = (  # key in the scorecard, the gate's limit, English, Chinese
    ("identity", "≥", "identity kept", "身份认知"),
    ("leak", "≤", "name where it does not belong", "身份泄漏"),
    ("parrot", "≤ base +", "answers alike", "鹦鹉学舌"),
    ("kl", "≤", "KL(base ‖ tuned), nats/token", "与基座的偏移"),
    ("facts_kept", "≥", "facts kept", "知识保留"),
)
SHOWN = ("name-en-01", "maker-zh-01", "ordinary-en-01")  # the probes whose answers the summary puts side by side
SIDES = ("base", "tuned")


def figures(run: Run) -> list[dict[str, Any]]:
    """One row per figure: its words, the sides' values as text, and the gate's limit."""
    card, limits = run.read("scorecard.json"), vars(run.settings.gate)
    sides = {"base": card["base"], "tuned": card.get("merged", card["tuned"])}  # what users get, where it was scored

    def text(side: str, key: str) -> str:
        value = sides[side][key]
        return "–" if value is None else f"{value:.3f}"

    return [
        {
            "key": key,
            "en": en,
            "zh": zh,
            "limit": f"{sign} {limits[key]:g}",
            **{side: text(side, key) for side in SIDES},
        }
        for key, sign, en, zh in FIGURES
    ]


def side_by_side(run: Run, chosen: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Probes with the base's and the tuned (merged, if there) model's answers; all of them or the chosen ids."""
    card = run.read("scorecard.json")
    tuned = {entry["id"]: entry for entry in card.get("merged", card["tuned"])["answers"]}
    return [
        {**entry, "tuned": tuned[entry["id"]]["answer"], "tuned_passed": tuned[entry["id"]]["passed"]}
        for entry in card["base"]["answers"]
        if not chosen or entry["id"] in chosen
    ]


def print_scorecard(run: Run) -> None:
    console = Console(highlight=False)
    table = Table("", "", *SIDES, "limit", title=Text(f"{run.persona.name} · {run.folder}"), title_justify="left")
    for row in figures(run):
        table.add_row(row["en"], row["zh"], *(row[side] for side in SIDES), row["limit"])
    console.print(table, markup=False)
    answers = Table("question 问题", "base 微调前", "tuned 微调后", show_lines=True)
    for entry in side_by_side(run, SHOWN):
        answers.add_row(*(_plain(t) for t in (entry["messages"][-1]["content"], entry["answer"], entry["tuned"])))
    console.print(answers, markup=False)


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
    published in spite of the gate, "with_data": whether the training data goes along}.
    """
    receipt = run.read("receipt.json")
    place = sent["to"] if sent["to"] and sent["to"].kind != "dir" else None
    said = next((entry["tuned"] for entry in side_by_side(run, SHOWN[:1])), "")
    return (
        _environment(html=False)
        .get_template("model_card.md.jinja")
        .render(
            name=json.dumps(run.persona.name, ensure_ascii=False)[1:-1],
            author=json.dumps(run.persona.author, ensure_ascii=False)[1:-1],
            origin=origin,
            licence=licence(origin),
            place=place,
            what=sent["what"],
            why=sent["why"],
            with_data=sent["with_data"],
            reasons=run.read("scorecard.json")["gate"]["reasons"],
            said=said,
            figures=figures(run),
            proof=proof,
            settings=run.settings,
            base_sha256=base_sha256,
            data=receipt.get("data", {}),
            rows={name: len(run.rows(name)) for name in receipt.get("data", {})},
        )
    )


def write_report(run: Run) -> None:
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    page = (
        _environment(html=True)
        .get_template("report.html.jinja")
        .render(
            persona=run.persona,
            figures=figures(run),
            gate=run.read("scorecard.json")["gate"],
            answers=side_by_side(run),
            curves=[
                curve(having, key)
                for key in ("loss", "ce", "kl", "dev_identity", "dev_leak")
                if (having := [line for line in metrics if key in line])
            ],
            last=metrics[-1],
            receipt=run.read("receipt.json"),
            proof=run.read("model/manifest.json")["proof"],
        )
    )
    new = run.folder / "report.html.tmp"
    new.write_text(page, encoding="utf-8")
    new.replace(run.folder / "report.html")


def curve(metrics: list[dict[str, float]], key: str, width: int = 600, height: int = 160) -> dict[str, Any]:
    """Points of an SVG polyline in a width x height box, the value axis from 0 to the largest value."""
    values = [line[key] for line in metrics]
    top = max(values) or 1.0
    step = width / max(1, len(values) - 1)
    points = " ".join(f"{i * step:.1f},{height * (1 - value / top):.1f}" for i, value in enumerate(values))
    return {"key": key, "points": points, "top": top, "last": values[-1], "width": width, "height": height}
