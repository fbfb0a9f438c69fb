"""Who the assistant on the page is and how it did, from what lies in its model's folder: manifest.json, scorecard.json and
picture.png, each of which may be missing."""

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.engine import manifest

FIGURES = (  # key in the scorecard, its name
    ("identity", "identity kept"),
    ("leak", "name where it does not belong"),
    ("parrot", "answers alike"),
    ("kl", "KL(base ‖ tuned), nats/token"),
    ("facts_kept", "facts kept"),
    ("sight", "pictures: right answers"),
    ("blind", "answers that noise does not change"),
    ("loss", "held-out rows, nats/token"),
    ("recall", "training texts continued word for word"),
    ("reply", "held-out questions answered, and ended"),
)
NO_SCORECARD = (
    "There is no scorecard with this model: it was not made by this program, or before scorecards went along."
)
SHOWN = 100  # probes at once
PICTURE = "picture.png"
Say = Callable[[str], str]  # a sentence in the visitor's language


def scorecard(folder: Path | None) -> dict[str, Any]:
    """The model's; empty where there is none."""
    file = folder / "scorecard.json" if folder else None
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}


def about(name: str, folder: Path | None, origin: dict[str, str], say: Say) -> str:
    """The card as HTML."""
    made, card = manifest(folder) if folder else {}, scorecard(folder)
    facts = {"made by": made.get("author"), "base model": origin.get("base_model"), "licence": origin.get("license")}
    rows = "".join(f"<dt>{say(key)}</dt><dd>{html.escape(say(value))}</dd>" for key, value in facts.items() if value)
    picture = folder / PICTURE if folder else None
    if picture and picture.is_file():
        source = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        face = f'<img class="face" src="{source}" alt="">'
    else:
        face = f'<div class="face" aria-hidden="true">{html.escape(name[:1])}</div>'
    return f"<header>{face}<div><h2>{html.escape(name)}</h2><dl>{rows}</dl></div></header>{_figures(card, say)}"


def _figures(card: dict[str, Any], say: Say) -> str:
    if not card:
        return f"<p>{say(NO_SCORECARD)}</p>"
    rows = "".join(
        f'<tr><th scope="row">{say(words)}</th><td>{_number(card["base"].get(key))}</td><td>{_number(card["tuned"].get(key))}</td></tr>'
        for key, words in FIGURES
        if card["tuned"].get(key) is not None
    )
    table = (
        f'<table><thead><tr><td></td><th scope="col">{say("base")}</th><th scope="col">{say("tuned")}</th></tr></thead>'
    )
    passed = card["gate"]["passed"]
    verdict = say("The scorecard's gate was passed." if passed else "The scorecard's gate was not passed:")
    reasons = "".join(f"<li>{html.escape(say(reason))}</li>" for reason in card["gate"]["reasons"])
    return f"{table}<tbody>{rows}</tbody></table><p>{verdict}</p><ul>{reasons}</ul>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def kinds(folder: Path | None) -> list[str]:
    """Of the scorecard's questions, in their order."""
    return list(dict.fromkeys(entry["kind"] for entry in scorecard(folder).get("tuned", {}).get("answers", [])))


def probes(folder: Path | None, kind: str, language: str, verdict: str, say: Say) -> str:
    """The scorecard's questions with both models' answers as HTML; "all" lets every kind, language or verdict ("right",
    "wrong") through."""
    card = scorecard(folder)
    if not card:
        return ""
    by_base = {entry["id"]: entry for entry in card["base"]["answers"]}
    chosen = [
        entry
        for entry in card["tuned"]["answers"]
        if kind in ("all", entry["kind"])
        and language in ("all", entry["lang"])
        and (verdict == "all" or entry["passed"] == (verdict == "right"))
    ]
    rows = "".join(
        f"<tr><td>{_asked(entry)}</td>{_answer(entry, say)}{_answer(by_base.get(entry['id']), say)}</tr>"
        for entry in chosen[:SHOWN]
    )
    count = say("{} of {} questions; the first {} are shown.").format(
        len(chosen), len(card["tuned"]["answers"]), len(chosen[:SHOWN])
    )
    heads = "".join(f'<th scope="col">{say(words)}</th>' for words in ("Questions", "tuned", "base"))
    return f"<p>{count}</p><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _asked(entry: dict[str, Any]) -> str:
    *before, last = entry["messages"]
    turns = "".join(f"<small>{html.escape(m['role'])}: {html.escape(m['content'])}</small><br>" for m in before)
    return f"<small>{html.escape(entry['kind'])}</small><br>{turns}{html.escape(last['content'])}"


def _answer(entry: dict[str, Any] | None, say: Say) -> str:
    if not entry:
        return "<td>–</td>"
    mark, words = ("✓", "right") if entry["passed"] else ("✗", "wrong")
    return f'<td><span role="img" aria-label="{say(words)}">{mark}</span> {html.escape(entry["answer"])}</td>'
