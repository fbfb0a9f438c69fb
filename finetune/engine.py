"""The model behind the page: loaded while the page is already there, then one streamed answer at a time.

Imports neither torch nor transformers before `load`: that takes seconds.
"""

import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from finetune.chat_format import Message
from finetune.embedded import say
from finetune.errors import UserError

ANSWER_TOKENS = 512  # at most, and at most a quarter of the model's context


class Engine:
    """`status` is "loading", then "ready" or "failed"; `message` says what it is doing, why it failed, or which sources
    of the model did before one did not; `progress` how far the fetching is."""

    def __init__(self, model: str, adapter: str | None = None) -> None:
        self.ref, self.adapter = model, adapter
        self.status, self.message, self.progress = "loading", "Starting", ""
        self.began = time.monotonic()
        self.name = assistant_name(Path(model)) or Path(model.partition(",")[0]).name or model

    def load(self) -> None:
        """Fetch and load the model; never raises, `status` and `message` say how it went."""
        try:
            from finetune import hub, model
            from finetune.generation import sampler

            self.message = "Fetching the model"
            base, failed = hub.pull_first(self.ref, lambda ref: model.base_folder(ref, self.show))
            adapter = hub.pull(self.adapter) if self.adapter else None
            self.message = "Loading the model"
            model.check_folder(base)
            self.form = model.chat_format(base)
            self.model = model.load_merged(base, adapter) if adapter else model.load(base, model.inference_dtype())
            self.pick = lambda: sampler(temperature=0.7, top_p=0.9)
            self.name = assistant_name(base) or self.name
            self.message, self.status = " ".join(failed), "ready"
            say(f"{self.name} is ready after {time.monotonic() - self.began:.0f} s.")
        except UserError as error:
            self.message, self.status = str(error), "failed"
            say(f"error: {error}")
        except Exception:  # a bug, or a machine too small: the page says that much, the log the rest
            self.message = f"The model {self.ref} could not be loaded; the server's log says why."
            self.status = "failed"
            traceback.print_exc()

    def show(self, done: int, total: int) -> None:
        """How much of the model is here, for the page; sizes in bytes."""
        seconds = time.monotonic() - self.began
        left = f", {(total - done) * seconds / done:.0f} s" if done else ""
        self.progress = f" {done / 1e6:.0f} / {total / 1e6:.0f} MB ({done / 1e6 / max(seconds, 0.1):.1f} MB/s{left})"

    def health(self) -> dict[str, str]:
        return {"status": self.status, "model": self.ref, "message": self.message}

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer's text, piece by piece; closing the iterator stops the decoder. Raises UserError."""
        from finetune.generation import stream

        context = self.model.config.max_position_embeddings
        reserved = min(ANSWER_TOKENS, context // 4)
        messages = fit(messages, lambda kept: len(self.form.prompt(kept)), context - reserved)
        yield from stream(self.model, self.form, messages, reserved, self.pick())


def assistant_name(folder: Path) -> str | None:
    """The name given to a model that was made here."""
    manifest = folder / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8")).get("name") if manifest.is_file() else None


def fit(messages: Sequence[Message], count: Callable[[list[Message]], int], room: int) -> list[Message]:
    """The newest whole turns of at most `room` tokens by `count(messages)`, each beginning with the user's message; a
    system message stays. Raises UserError when the last turn alone is too long."""
    system = [m for m in messages[:1] if m["role"] == "system"]
    for start in (i for i, m in enumerate(messages) if m["role"] == "user"):
        kept = [*system, *messages[start:]]
        if (tokens := count(kept)) <= room:
            return kept
    raise UserError(f"The message is too long: {tokens} tokens, and {room} fit. Shorten it and send it again.")
