"""The model behind the page and the API: loaded while the page is already there, then one decoder for all visitors.

Imports neither torch nor transformers before `load`: that takes seconds.
"""

import asyncio
import json
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from finetune.chat_format import Message, text_of
from finetune.embedded import say
from finetune.errors import UserError, without_user

ANSWER_TOKENS = 512  # at most, where nobody asks for more or less, and at most a quarter of the model's context
WAITING = 128  # conversations that wait for the decoder; who comes then is told to come back
CHARACTERS = 32  # in a message, for each token of the context: hardly a token has as many
HEARTBEAT = 0.5  # seconds after which who waits hears something
RETRY = 10  # seconds until a source that did not answer is asked again


class Busy(UserError):
    """It cannot be answered now, and may be later."""


class Request(NamedTuple):
    messages: Sequence[Message]
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    owner: Hashable = None  # whose conversation it is: only the same one's are gone on from in the cache
    bare: bool = False  # by the base, as its users get it, where the engine has it (`base`)


class Piece(NamedTuple):
    """A piece of an answer. The last one has `finish` ("stop" or "length") or `error`."""

    text: str = ""
    finish: str | None = None
    error: Exception | None = None
    ahead: int | None = None  # of one who waits: how many are before
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's: not computed anew


Listener = Callable[[Piece], object]  # called in the decoder's thread


class Ticket(NamedTuple):
    cancel: Callable[[], None]
    ahead: Callable[[], int]  # how many have to end or begin before this one; 0 when it is being answered


class Engine:
    """`status` is "loading", then "ready" or "failed"; `message` says what it is doing, why it failed, or which sources
    of the model did before one did not; `progress` how far the fetching is; `runs_on` what it decodes with."""

    def __init__(self, model: str, adapter: str | None = None) -> None:
        self.ref, self.adapter = model, adapter
        self.status, self.message, self.progress, self.runs_on = "loading", "Starting", "", ""
        self.began = time.monotonic()
        self.name = assistant_name(Path(model)) or Path(without_user(model).partition(",")[0]).name or model
        self.context = 0  # tokens; 0: unknown
        self.base = False  # whether the base can answer too
        self.folder: Path | None = None  # the model's, once it is here
        self.origin: dict[str, str] = {}  # "base_model" and "license"
        self.ended: deque[float] = deque(maxlen=32)  # when the last answers did, since there was nothing to do
        # Calls for the decoder's thread, of who has come, where None ends it, and of who has left.
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.leaving: deque[Callable[[], None]] = deque()

    def load(self) -> None:
        """Fetch and load the model; never raises, `status` and `message` say how it went."""
        try:
            self._load()
            self.status = "ready"
            say(f"{self.name} is ready after {time.monotonic() - self.began:.0f} s. {self.runs_on}")
        except UserError as error:
            self.message, self.status = str(error), "failed"
            say(f"error: {error}")
        except Exception:  # a bug, or a machine too small: the page says that much, the log the rest
            self.message = f"The model {without_user(self.ref)} could not be loaded; the server's log says why."
            self.status = "failed"
            traceback.print_exc()

    def show(self, done: int, total: int) -> None:
        """How much of the model is here, for the page; sizes in bytes."""
        now = time.monotonic()
        if not self.progress:
            self.since, self.had, self.last = now, done, (now, done)
        then, before = self.last
        if done - before > max(4e6, 1e9 * (now - then)):  # no line is so fast: these were here already
            self.had += done - before
        self.last = now, done
        seconds, came = max(now - self.since, 0.1), max(done - self.had, 0)
        left = f", {(total - done) * seconds / came:.0f} s" if came else ""
        self.progress = f" {done / 1e6:.0f} / {total / 1e6:.0f} MB ({came / 1e6 / seconds:.1f} MB/s{left})"

    def _load(self) -> None:
        from finetune import hub, model, serving
        from finetune.generation import ROWS, Decoder
        from finetune.transfer import Unreachable

        while True:
            self.message = "Fetching the model"
            try:
                base, failed = hub.pull_first(hub.several(self.ref), lambda ref: model.base_folder(ref, self.show))
                adapter = hub.pull(self.adapter) if self.adapter else None
                break
            except Unreachable as error:  # a space starts by itself, and nobody is there to start it again
                self.message, self.progress = f"No source answers; trying again\n{error}", ""
                say(f"Note: {error} Trying again in {RETRY} s.")
                time.sleep(RETRY)
        self.message = "Loading the model"
        model.check_folder(base)
        self.form = model.chat_format(base)
        loaded, fast, self.runs_on = serving.load(base, adapter)
        model.give_eyes(loaded, self.form)
        if self.sees:
            loaded.eyes.forget_beyond()
        room = serving.pool_tokens(loaded, ROWS[loaded.device.type])
        self.context = min(loaded.config.get_text_config().max_position_embeddings, room)
        added, self.base_form = self._bare(base, adapter)
        self.decoder = Decoder(loaded, self.form.stop_ids, room, fast=fast, adapter=added)
        self.folder = adapter if adapter and manifest(adapter) else base
        self.name = assistant_name(self.folder) or self.name
        self.base, self.origin = bool(self.decoder.forward.adapter), model.origin(base, self.ref)
        self.message = "\n".join(failed)
        self.listeners: dict[Any, Callable[..., bool]] = {}
        threading.Thread(target=self._decode, daemon=True, name="decoder").start()

    def _bare(self, folder: Path, adapter: Path | None) -> tuple[Any, Any]:
        """What has been merged into the model and the format of its base, so that the base can answer too: with its own
        default system prompt. The adapter is the given one, or lies where a run or a publishing leaves it."""
        from finetune import embedded, model
        from finetune.chat_format import ChatFormat

        if self.sees:  # its projector was trained as well, which is not merged anywhere
            return None, None
        if adapter:
            base_form, tuned_form = self.form, ChatFormat(self.form.tokenizer_json)
            record = json.loads((adapter / model.ADAPTER_RECORD).read_text(encoding="utf-8"))
            if record.get("format_hash") == tuned_form.hash:
                self.form = tuned_form  # trained without the base's default prompt, which says another name
            return model.adapter_matrices(adapter), base_form
        made = manifest(folder)
        beside = [folder / "adapter", *([folder.parent / "adapter"] if folder.name == "model" else [])]
        found = next((path for path in beside if (path / "adapter_model.safetensors").is_file()), None)
        if not found or made.get("adapter_sha256") != embedded.sha256(found / "adapter_model.safetensors"):
            return None, None
        return model.adapter_matrices(found), ChatFormat(self.form.tokenizer_json, made["base_system"])

    @property
    def sees(self) -> bool:
        """Whether messages may hold pictures; known when the model is ready."""
        return getattr(getattr(self, "form", None), "vision", None) is not None

    def health(self) -> dict[str, str]:
        return {
            "status": self.status,
            "model": without_user(self.ref),
            "message": self.message,
            "runs_on": self.runs_on,
        }

    def trim(self, messages: Sequence[Message], bare: bool = False) -> Sequence[Message]:
        """The newest whole turns that fit. Raises UserError when the last one alone does not."""
        self.check_length(len(text_of(messages[-1])))
        form = self.base_form if bare else self.form
        return fit(messages, lambda kept: len(form.prompt(kept)), self.context - self.reserved())

    def check_length(self, characters: int) -> None:
        """Raises UserError for what is too long even to be counted in tokens, which takes a second per million."""
        if characters > (most := CHARACTERS * self.context):
            raise UserError(
                f"The message is too long: {characters} characters, and {most} fit. Shorten it and send it again."
            )

    def reserved(self) -> int:
        """Tokens of an answer whose length nobody asked for."""
        return min(ANSWER_TOKENS, self.context // 4)

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Have it answered; `listener` is told every piece. Raises UserError where it cannot be."""
        if self.status != "ready":
            raise Busy(self.message if self.status == "failed" else "The model is still loading; try again soon.")
        if len(self.decoder.waiting) + self.inbox.qsize() >= WAITING:
            raise Busy(f"{WAITING} conversations are waiting already; try again in a minute.")
        self.check_length(sum(len(text_of(message)) for message in request.messages))
        prompt = (self.base_form if request.bare else self.form).prompt(request.messages)
        most = request.max_tokens or min(self.reserved(), self.context - len(prompt))
        if most <= 0 or len(prompt) + most > self.context:
            asked = f" and {request.max_tokens} are asked for" if request.max_tokens else ""
            raise UserError(
                f"The conversation is too long: {len(prompt)} tokens{asked}, and the context holds {self.context}. Shorten it."
            )
        text, row, cancelled = Text(self.form.stream(), request.stop), None, False

        def begin() -> None:
            from finetune.generation import Sampling

            nonlocal row
            if cancelled:
                return
            sampling = Sampling(request.temperature, request.top_p, request.seed)
            row = self.decoder.add(prompt, most, sampling, request.owner, request.bare)
            self.listeners[row] = hear

        def hear(token: int | None, done: bool, error: Exception | None = None) -> bool:
            """Tell the listener; whether that was the last."""
            if error:
                listener(Piece(error=error))
                return True
            ended = token in self.form.stop_ids
            piece = "" if ended else text.add(token)
            if done and not text.stopped:
                piece += text.rest()
            if last := done or text.stopped:
                self.ended.append(time.monotonic())
            if piece or last:
                finish = ("stop" if ended or text.stopped else "length") if last else None
                listener(Piece(piece, finish, None, None, len(prompt), len(row.ids), row.reused))
            return last

        def stop() -> None:
            if row is not None and self.listeners.pop(row, None):
                self.decoder.cancel(row)

        def cancel() -> None:
            nonlocal cancelled
            cancelled = True
            self.leaving.append(stop)

        def ahead() -> int:
            waiting = list(self.decoder.waiting)
            return waiting.index(row) + 1 if row in waiting else len(waiting) if row is None else 0

        self.inbox.put(begin)
        return Ticket(cancel, ahead)

    def wait(self, ahead: int) -> float:
        """Seconds until so many have been answered, as it went lately; 0 where nothing is known yet."""
        return ahead * (time.monotonic() - self.ended[0]) / (len(self.ended) - 1) if len(self.ended) > 1 else 0.0

    def _decode(self) -> None:
        """The decoder's thread: between two steps it lets in who has come and lets go who has left."""
        idle = True
        while True:
            try:
                while idle or not self.inbox.empty():
                    if (call := self.inbox.get()) is None:
                        return
                    call()
                    if idle:
                        self.ended.clear()
                        self.ended.append(time.monotonic())
                    idle = False
                while self.leaving:
                    self.leaving.popleft()()
                for step in self.decoder.step():
                    if step.row in self.listeners and self.listeners[step.row](step.token, step.done):
                        del self.listeners[step.row]
                        if not step.done:  # one of the texts that end it was said
                            self.decoder.cancel(step.row)
            except Exception as error:  # nobody may wait for ever; the next ones are answered again
                self._fail(error)
            idle = not (self.decoder.rows or self.decoder.waiting)

    def _fail(self, error: Exception) -> None:
        traceback.print_exc()
        memory = "memory" in str(error).lower()  # torch says so in several classes
        sentence = "The machine is out of memory" if memory else "The decoder failed; the server's log says why"
        while self.listeners:
            row, hear = self.listeners.popitem()
            self.decoder.cancel(row)
            hear(None, True, Busy(f"{sentence}. Send the message again, or a shorter one."))


class Text:
    """Tokens to text that ends before one of the texts in `stop`."""

    def __init__(self, stream: Any, stop: Sequence[str]) -> None:
        self.stream, self.stop, self.held, self.stopped = stream, stop, "", False

    def add(self, token: int) -> str:
        self.held += self.stream.add(token)
        found = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        if found:
            self.stopped = True
            return self.held[: min(found)]
        keep = max(  # what may be the beginning of a text that ends it
            (n for text in self.stop for n in range(1, len(text)) if self.held.endswith(text[:n])), default=0
        )
        said, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return said

    def rest(self) -> str:
        return self.held


def pieces(engine: Engine, request: Request) -> Iterator[Piece]:
    """The answer, piece by piece; closing the iterator stops the decoder. While nothing comes, an empty piece says every
    HEARTBEAT how many are ahead. Raises what went wrong."""
    heard: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    ticket = engine.submit(request, heard.put)
    try:
        while True:
            try:
                piece = heard.get(timeout=HEARTBEAT)
            except queue.Empty:
                piece = Piece(ahead=ticket.ahead())
            if piece.error:
                raise piece.error
            yield piece
            if piece.finish:
                return
    finally:
        ticket.cancel()


async def pieces_async(engine: Engine, request: Request) -> AsyncIterator[Piece]:
    """The same for an event loop, without the empty pieces."""
    loop, heard = asyncio.get_running_loop(), asyncio.Queue()

    def tell(piece: Piece) -> None:
        if not loop.is_closed():  # else the server has ended
            loop.call_soon_threadsafe(heard.put_nowait, piece)

    ticket = engine.submit(request, tell)
    try:
        while True:
            piece = await heard.get()
            if piece.error:
                raise piece.error
            yield piece
            if piece.finish:
                return
    finally:
        ticket.cancel()


def manifest(folder: Path) -> dict[str, Any]:
    """Of a model that was made here; empty for another one."""
    made = None
    with suppress(OSError, ValueError):  # a broken one is refused in words by `hub.pull`
        made = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return made if isinstance(made, dict) else {}


def assistant_name(folder: Path) -> str | None:
    """The name given to a model that was made here."""
    name = manifest(folder).get("name")
    return name if isinstance(name, str) else None


def fit(messages: Sequence[Message], count: Callable[[list[Message]], int], room: int) -> list[Message]:
    """The newest whole turns of at most `room` tokens by `count(messages)`, each beginning with the user's message; a
    system message stays. Raises UserError when the last turn alone is too long."""
    system = [m for m in messages[:1] if m["role"] == "system"]
    for start in (i for i, m in enumerate(messages) if m["role"] == "user"):
        kept = [*system, *messages[start:]]
        if (tokens := count(kept)) <= room:
            return kept
    raise UserError(f"The message is too long: {tokens} tokens, and {room} fit. Shorten it and send it again.")
