"""An OpenAI-compatible server (LMDeploy, vLLM, SGLang, llama.cpp, transformers serve) that decodes instead of this program.

How it writes a conversation is compared once, at the start, with the format that the model was trained in. Where they
differ, prompts are sent as token ids if the server takes those, and in any case the difference is said.
"""

import json
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from finetune.chat_format import ChatFormat, Message
from finetune.embedded import say
from finetune.engine import ANSWER_TOKENS, WAITING, Busy, Engine, Listener, Piece, Request, Ticket, assistant_name, fit
from finetune.errors import UserError, without_user

TIMEOUT = httpx.Timeout(600, connect=10)
TALKS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Who are you? 你是谁？"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
)


class Remote(Engine):
    """`url`: the server's address, with or without /v1. `ref`: the folder of the model that it serves, for its format and
    its name; without it the server's template is taken as it is. `key` is sent as a bearer token."""

    def __init__(self, url: str, ref: str | None, key: str | None = None) -> None:
        url = url.rstrip("/").removesuffix("/v1")
        self.url = without_user(url)  # for sentences
        super().__init__(ref or self.url)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT)
        self.form: ChatFormat | None = None
        self.sends_ids, self.running = False, 0

    def _load(self) -> None:
        self.message = "Asking the engine"
        found, ref = self._ask("GET", "/v1/models")["data"], self.ref
        named = [model for model in found if ref in (model["id"], model.get("root"))]
        if ref == self.url and len(found) != 1:
            names = ", ".join(model["id"] for model in found) or "none"
            raise UserError(f"The engine at {self.url} serves {names}: say which one with --model.")
        # Of several, the one asked for: transformers serve lists what lies in its cache, and loads what it is asked for.
        served = named[0] if named else found[0] if len(found) == 1 else {"id": ref}
        self.served = served["id"]
        self.context = served.get("max_model_len") or (served.get("meta") or {}).get("n_ctx_train") or 0
        self.name = assistant_name(Path(self.ref)) or self.name if self.ref != self.url else Path(self.served).name
        self.runs_on = f"{self.url}, model {self.served}."
        if Path(self.ref).is_dir():
            from finetune.model import chat_format

            self.form = chat_format(Path(self.ref))
            self.runs_on += " " + self.compare()
        self.message = ""

    def compare(self) -> str:
        """Whether the server's template gives the ids of our format, in words; chooses what is sent."""
        for talk in TALKS:
            own, theirs = self.form.prompt(talk), self._their_ids(talk)
            exact = theirs is not None
            if not exact:
                usage = self._ask("POST", "/v1/chat/completions", self._body(talk, 1))["usage"]
                theirs = [None] * usage["prompt_tokens"]
            if (own if exact else [None] * len(own)) != theirs:
                break
        else:
            if exact:
                return "Its template gives the ids of this model's own format."
            return "Its template gives as many ids as this model's own format; which ones, this server does not tell."
        said = (
            f"Its template differs from this model's own format: {len(theirs)} ids instead of {len(own)} for {talk!r}"
        )
        if exact:
            at = next((i for i, pair in enumerate(zip(own, theirs, strict=False)) if pair[0] != pair[1]), len(own))
            text = self.form.tokenizer.decode(theirs, skip_special_tokens=False)
            said += f", from id {at} on; it writes {text!r}"
        try:
            answer = self._ask("POST", "/v1/completions", {"model": self.served, "prompt": own, "max_tokens": 1})
            self.sends_ids = answer["usage"]["prompt_tokens"] == len(own)
        except UserError:
            self.sends_ids = False
        then = (
            "are sent as ids in its own"
            if self.sends_ids
            else "are written by the server's template, which may cost the name"
        )
        say(f"Note: {said}. Conversations {then}.")
        return f"{said}. Conversations {then}."

    def _their_ids(self, talk: Sequence[Message]) -> list[int] | None:
        """The prompt's ids by the server's template; None where the server does not tell."""
        try:
            asked = {"model": self.served, "messages": talk, "add_generation_prompt": True}
            if found := self._ask("POST", "/tokenize", asked)["tokens"]:  # vLLM; llama.cpp looks for "content"
                return found
        except (UserError, KeyError):
            pass
        try:  # llama.cpp
            text = self._ask("POST", "/apply-template", {"messages": talk})["prompt"]
            return self._ask("POST", "/tokenize", {"content": text, "add_special": True, "parse_special": True})[
                "tokens"
            ]
        except (UserError, KeyError):
            return None

    def trim(self, messages: Sequence[Message], bare: bool = False) -> Sequence[Message]:
        if not (self.form and self.context):
            return messages  # the server says when they are too many
        return fit(messages, lambda kept: len(self.form.prompt(kept)), self.context - self.reserved())

    def reserved(self) -> int:
        return min(ANSWER_TOKENS, self.context // 4) if self.context else ANSWER_TOKENS

    def _body(self, messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
        if self.sends_ids:
            return {"model": self.served, "prompt": self.form.prompt(messages), "max_tokens": max_tokens}
        return {"model": self.served, "messages": list(messages), "max_tokens": max_tokens}

    def submit(self, request: Request, listener: Listener) -> Ticket:
        if self.status != "ready":
            raise Busy(self.message if self.status == "failed" else "The model is still loading; try again soon.")
        if self.running >= WAITING:
            raise Busy(f"{WAITING} conversations are being answered already; try again in a minute.")
        body = self._body(request.messages, request.max_tokens or self.reserved())
        body |= {"stream": True, "temperature": request.temperature, "top_p": request.top_p}
        body |= {"stream_options": {"include_usage": True}}
        body |= {"seed": request.seed} if request.seed is not None else {}
        body |= {"stop": list(request.stop)} if request.stop else {}
        cancelled = threading.Event()
        threading.Thread(target=self._answer, args=(body, listener, cancelled), daemon=True).start()
        return Ticket(cancelled.set, lambda: 0)

    def _answer(self, body: dict[str, Any], listener: Listener, cancelled: threading.Event) -> None:
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        last, usage = "stop", {}
        self.running += 1
        try:
            with self.client.stream("POST", path, json=body) as answer:  # left early, it closes the connection
                if answer.status_code != 200:
                    answer.read()
                    raise self._refusal(answer)
                for line in answer.iter_lines():
                    if cancelled.is_set():
                        return
                    if not line.startswith("data:") or line.removeprefix("data:").strip() == "[DONE]":
                        continue
                    event = json.loads(line.removeprefix("data:"))
                    if "error" in event:
                        raise UserError(f"The engine says: {_words(event)}")
                    usage = event.get("usage") or usage
                    for choice in event.get("choices", []):
                        last = choice.get("finish_reason") or last
                        if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
                            listener(Piece(text))
            details = usage.get("prompt_tokens_details") or {}
            counts = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), details.get("cached_tokens") or 0
            listener(Piece("", last, None, None, *counts))
        except httpx.HTTPError as error:
            listener(Piece(error=self._unreachable(error)))
        except Exception as error:  # whoever waits must hear of it
            if not isinstance(error, UserError):
                traceback.print_exc()
                error = UserError("The engine's answer could not be read; the server's log says why.")
            listener(Piece(error=error))
        finally:
            self.running -= 1

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self.client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if answer.status_code != 200:
            raise self._refusal(answer)
        try:
            return answer.json()
        except ValueError as error:
            raise UserError(f"What answers at {self.url}{path} is no OpenAI-compatible server.") from error

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(f"The engine at {self.url} cannot be reached: {error}. Start it, or correct --engine.")

    def _refusal(self, answer: httpx.Response) -> UserError:
        if answer.status_code in (429, 503):
            return Busy("The engine has too much to do; try again in a minute.")
        try:
            words = _words(answer.json())
        except ValueError:
            words = answer.text[:200]
        return UserError(f"The engine at {self.url} refused with status {answer.status_code}: {words}")


def _words(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message") or error.get("detail") or error) if isinstance(error, dict) else str(error)
