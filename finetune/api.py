"""OpenAI's chat protocol, https://platform.openai.com/docs/api-reference/chat: /v1/chat/completions and /v1/models.

What is asked for and cannot be done is refused by name, never left out in silence.
"""

import asyncio
import json
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from ipaddress import ip_address
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError

from finetune.engine import Busy, Engine, Piece, Request, pieces_async
from finetune.errors import UserError

PER_MINUTE, AT_ONCE = 60, 8  # answers for one address, where no key is asked for
BODY_BYTES, SEEING_BODY_BYTES = 4_000_000, 32_000_000  # the latter where pictures are sent
HARMLESS = {"user", "store", "metadata", "service_tier", "safety_identifier", "parallel_tool_calls"}
NEUTRAL = {  # parameters that are not there, with the value at which they do nothing
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False, "top_logprobs": 0, "tools": [],
    "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
}  # fmt: skip


class ApiError(Exception):
    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        self.response = JSONResponse({"error": self.error}, status)
        if retry_after:
            self.response.headers["Retry-After"] = str(retry_after)


class Text(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    model_config = ConfigDict(extra="forbid")
    url: str  # a data URL; others are not fetched
    detail: Literal["auto", "low", "high"] = "auto"  # there is one size


class Picture(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[Text | Picture, Discriminator("type")]]

    def plain(self) -> dict[str, Any]:
        """As chat_format.Message. Raises UserError for a picture that cannot be read."""
        role = "system" if self.role == "developer" else self.role
        parts = [] if isinstance(self.content, str) else self.content
        if all(part.type == "text" for part in parts):
            text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
            return {"role": role, "content": text}
        from finetune.pictures import from_data_url

        seen = [
            {"type": "text", "text": part.text}
            if part.type == "text"
            else {"type": "image", "image": from_data_url(part.image_url.url)}
            for part in parts
        ]
        return {"role": role, "content": seen}


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=AT_ONCE)
    stop: str | list[str] | None = Field(None, max_length=4)
    prompt_cache_key: str | None = None

    def stops(self) -> tuple[str, ...]:
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in found if text)


def add_routes(app: FastAPI, engine: Engine, *, key: str | None, open_to_all: bool, origins: list[str]) -> None:
    """With a key, for those who send it as a bearer token; `open_to_all`: for everybody, so many a minute; else the routes
    say how they are opened. Pages of `origins` may call them from the browser."""
    routes = APIRouter(prefix="/v1")
    visitors = Visitors()

    def enter(http: HttpRequest) -> str:
        """Who asks. Raises ApiError when that is not allowed."""
        visitor = address(http)
        if key:
            given = http.headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), key.encode()):
                raise ApiError(
                    401, "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.", "invalid_api_key"
                )
        elif not open_to_all:
            raise ApiError(
                403, "The API is off. Whoever runs this server can open it: API_KEY=... or --open-api.", "api_is_off"
            )
        return visitor

    @routes.get("/models")
    async def models(http: HttpRequest) -> JSONResponse:
        enter(http)
        model = {"id": engine.name, "object": "model", "created": int(time.time()), "owned_by": "namesake"}
        return JSONResponse({"object": "list", "data": [model]})

    @routes.post("/chat/completions")
    async def completions(http: HttpRequest) -> Any:
        visitor = enter(http)
        asks = parse(await body(http, SEEING_BODY_BYTES if engine.sees else BODY_BYTES))
        if asks.model != engine.name:
            message = f"The model {asks.model!r} is not here: this server has {engine.name!r}."
            raise ApiError(404, message, "model_not_found", "model")
        count = asks.n or 1
        if not key:
            visitors.ask(visitor, count)
        try:
            messages = await asyncio.to_thread(lambda: [message.plain() for message in asks.messages])
        except UserError as error:
            raise refused(error) from error
        # What is gone on from in the cache shows in usage and in time: never another visitor's who has the same address.
        session = asks.prompt_cache_key
        owner = ("api", visitor, session) if key or session else object()
        requests = [
            Request(
                messages,
                1.0 if asks.temperature is None else asks.temperature,
                asks.top_p or 1.0,
                asks.seed if asks.seed is None else asks.seed + i,
                asks.max_completion_tokens or asks.max_tokens,
                asks.stops(),
                owner=owner,
            )
            for i in range(count)
        ]
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": engine.name}

        async def counted() -> AsyncIterator[tuple[int, Piece]]:
            with visitors.answering(visitor, count):
                async with aclosing(together(engine, requests)) as pieces:
                    async for piece in pieces:
                        yield piece

        pieces = counted()
        if not asks.stream:
            return await whole(http, head, pieces, count)
        try:  # what is wrong with the request is known before the first piece: then there is still a status to say it with
            first = await unless_gone(http, one(pieces))
        except UserError as error:
            raise refused(error) from error
        usage = bool(asks.stream_options and asks.stream_options.include_usage)
        events = stream(head, first, pieces, count, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    @app.exception_handler(ApiError)
    async def told(_: HttpRequest, error: ApiError) -> JSONResponse:
        return error.response

    @routes.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    async def unknown(http: HttpRequest) -> None:
        message = f"{http.method} {http.url.path} is not here; GET /v1/models and POST /v1/chat/completions are."
        raise ApiError(404, message, "unknown_url")

    app.include_router(routes)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["authorization", "content-type"]
        )  # fmt: skip


def address(http: Any) -> str:
    """Of the visitor who asks. A proxy, which has an address of a private network, adds the one that it was called from at
    the end of X-Forwarded-For; what a visitor wrote there himself stands before."""
    hosts = [host.strip() for host in (http.headers.get("x-forwarded-for") or "").split(",")]
    hosts.append(http.client.host if http.client else "")
    while len(hosts) > 1 and _private(hosts[-1]) and hosts[-2]:
        hosts.pop()
    return hosts[-1]


def _private(host: str) -> bool:
    try:
        return ip_address(host).is_private
    except ValueError:
        return False


async def one(pieces: AsyncIterator[tuple[int, Piece]]) -> tuple[int, Piece]:
    return await anext(pieces)


async def body(http: HttpRequest, most: int) -> bytes:
    found = b""
    async for chunk in http.stream():
        found += chunk
        if len(found) > most:
            raise ApiError(413, f"The request is larger than {most} bytes.")
    return found


def parse(found: bytes) -> ChatRequest:
    """Raises ApiError that names what is wrong."""
    try:
        values = json.loads(found)
    except (ValueError, RecursionError) as error:  # the latter where lists are in lists, thousands deep
        raise ApiError(400, f"The request is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ApiError(400, "The request is not a JSON object.")
    for name in [n for n in values if n in HARMLESS or (n in NEUTRAL and values[n] in (None, NEUTRAL[n]))]:
        del values[name]
    try:
        return ChatRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = [
            str(part) for part in first["loc"] if not (isinstance(part, str) and part.startswith(("list[", "str")))
        ]
        name = ".".join(where)
        unknown = first["type"] == "extra_forbidden"
        what = "this server does not have this parameter" if unknown else first["msg"]
        raise ApiError(
            400, f"{name}: {what}.", "unsupported_parameter" if unknown else "invalid_value", name
        ) from error


class Visitors:
    """So many answers a minute and at once for each address."""

    def __init__(self) -> None:
        self.asked: dict[str, deque[float]] = {}  # when, of the last minute; who asked last at the end
        self.running: Counter[str] = Counter()
        self.lock = threading.Lock()

    def ask(self, visitor: str, count: int) -> None:
        """Raises ApiError when that is too much."""
        with self.lock:
            now = time.monotonic()
            while self.asked and now - next(iter(self.asked.values()))[-1] > 60:
                del self.asked[next(iter(self.asked))]
            times = self.asked.pop(visitor, deque())
            try:
                limit(times, self.running[visitor], count)
            finally:
                if times:
                    self.asked[visitor] = times

    @contextmanager
    def answering(self, visitor: str, count: int) -> Iterator[None]:
        with self.lock:
            self.running[visitor] += count
        try:
            yield
        finally:
            with self.lock:
                self.running[visitor] -= count
                if not self.running[visitor]:
                    del self.running[visitor]


def limit(asked: deque[float], running: int, count: int) -> None:
    """Raises ApiError when one address asks for too much."""
    now = time.monotonic()
    while asked and now - asked[0] > 60:
        asked.popleft()
    if running + count > AT_ONCE:
        raise ApiError(
            429, f"{running} answers are being written for you; at most {AT_ONCE} at once.", "too_many_at_once", None, 1
        )
    if len(asked) + count > PER_MINUTE:
        wait = int(60 - (now - asked[0])) + 1 if asked else 60
        raise ApiError(429, f"At most {PER_MINUTE} answers a minute; wait {wait} s.", "rate_limit_exceeded", None, wait)
    asked.extend([now] * count)


def refused(error: UserError) -> ApiError:
    if isinstance(error, Busy):
        return ApiError(503, str(error), "busy", None, 10)
    code = "context_length_exceeded" if "too long" in str(error) else None
    return ApiError(400, str(error), code, "messages")


async def together(engine: Engine, requests: list[Request]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of all answers as they come, each with its number; closing it stops them all."""
    heard: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    async def one(number: int, request: Request) -> None:
        try:
            async with aclosing(pieces_async(engine, request)) as pieces:
                async for piece in pieces:
                    heard.put_nowait((number, piece))
        except Exception as error:
            heard.put_nowait((number, Piece(error=error)))

    tasks = [asyncio.create_task(one(number, request)) for number, request in enumerate(requests)]
    try:
        left = len(tasks)
        while left:
            number, piece = await heard.get()
            if piece.error:
                raise piece.error
            left -= piece.finish is not None
            yield number, piece
    finally:
        for task in tasks:
            task.cancel()


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, Any]) -> Any:
    """The work's result; whoever hangs up before stops it."""

    async def hung_up() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(hung_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ApiError(499, "The connection was closed.")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole(
    http: HttpRequest, head: dict[str, Any], pieces: AsyncIterator[tuple[int, Piece]], count: int
) -> JSONResponse:
    """The answers in one piece. Whoever hangs up before stops the decoder."""
    texts, last = [""] * count, [Piece()] * count

    async def read() -> None:
        async with aclosing(pieces):
            async for number, piece in pieces:
                texts[number] += piece.text
                last[number] = piece

    try:
        await unless_gone(http, read())
    except UserError as error:
        raise refused(error) from error
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": texts[i]},
            "finish_reason": last[i].finish,
            "logprobs": None,
        }
        for i in range(count)
    ]
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage_of(last)})


async def stream(
    head: dict[str, Any], first: tuple[int, Piece], pieces: AsyncIterator[tuple[int, Piece]], count: int, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events."""
    head = {**head, "object": "chat.completion.chunk"}
    extra: dict[str, Any] = {"usage": None} if usage else {}

    def event(number: int, delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": number, "delta": delta, "finish_reason": finish, "logprobs": None}
        return line({**head, "choices": [choice], **extra})

    last = [Piece()] * count
    async with aclosing(pieces):
        for number in range(count):
            yield event(number, {"role": "assistant", "content": ""})
        try:
            number, piece = first
            while True:
                last[number] = piece
                if piece.text:
                    yield event(number, {"content": piece.text})
                if piece.finish:
                    yield event(number, {}, piece.finish)
                number, piece = await anext(pieces)
        except StopAsyncIteration:
            pass
        except UserError as error:  # too late for a status
            yield line({"error": refused(error).error})
            return
    if usage:
        yield line({**head, "choices": [], "usage": usage_of(last)})
    yield "data: [DONE]\n\n"


def line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def usage_of(last: list[Piece]) -> dict[str, Any]:
    prompt, said = last[0].prompt_tokens, sum(piece.completion_tokens for piece in last)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": last[0].cached_tokens},
    }
