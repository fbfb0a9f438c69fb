"""A user's pictures and the rows that speak of them: everything that can be wrong with a picture is handled or named."""

import base64
import binascii
import contextlib
import io
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from finetune.chat_format import IMAGE, Message
from finetune.errors import UserError

MOST_PIXELS = 64_000_000  # of a picture: 8000 x 8000, 200 MB while it is read
MOST_BYTES = 32_000_000  # of a picture that is fetched
MOST_SIDE = 4096  # pixels that are kept of a longer side: pictures are padded to a square
ADDRESS = re.compile(r"^\w[\w+.-]+://")
GROUND = (255, 255, 255)  # behind what is transparent


def load(source: Path | bytes) -> Image.Image:
    """The picture in 8-bit RGB, upright; of an animation the first image, on white where it is transparent. Raises UserError
    that says what is wrong, without the name."""
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we are stricter
            opened = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
            image = stack.enter_context(opened)
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise UserError(f"has {width} x {height} pixels, more than {MOST_PIXELS:,}: make it smaller")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise UserError(f"has more than {MOST_PIXELS:,} pixels: make it smaller") from error
    except UnidentifiedImageError as error:
        raise UserError("is no picture that can be read; give PNG, JPEG, WebP, GIF, BMP or TIFF") from error
    except FileNotFoundError as error:
        raise UserError("is not there") from error
    except OSError as error:  # Pillow's own, of a file that ends too early or has wrong bytes in it; or the disk's
        raise UserError(f"cannot be read ({error.strerror or error}): fetch it again") from error
    except (SyntaxError, ValueError, EOFError, IndexError, OverflowError) as error:  # Pillow's, of broken headers
        raise UserError(f"is broken ({error}): fetch it again") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError("has floating-point pixels, and it is not known which is white: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion makes nearly all of them white
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError("has more than 16 bits a pixel: save it with 8 or 16")
        image = Image.fromarray((values // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*GROUND, 255)), image)
    image = image.convert("RGB")
    if max(image.size) > MOST_SIDE:
        image.thumbnail((MOST_SIDE, MOST_SIDE))
    return image


def from_data_url(url: str) -> Image.Image:
    """The picture in `data:image/...;base64,...`. Raises UserError; other addresses are never fetched."""
    found = re.match(r"data:image/[\w.+-]+;base64,", url)
    if not found:
        what = "an address" if ADDRESS.match(url) else "no data URL"
        raise UserError(
            f"A picture is {what}: send the picture itself, as data:image/png;base64,...; nothing is fetched."
        )
    try:
        return load(base64.b64decode(url[found.end() :], validate=True))
    except binascii.Error as error:
        raise UserError(f"A picture's data URL is not base64 ({error}).") from error
    except UserError as error:
        raise UserError(f"A picture {error}.") from error


def fetched(url: str) -> Path:
    """The file at an https address, fetched once, in the user's cache. Raises UserError, without the address."""
    from finetune import embedded, transfer

    if not url.startswith("https://"):
        raise UserError("is not fetched: give an https address")
    file = embedded.cache_dir() / "pictures" / "fetched" / embedded.digest_of(url)
    if not file.exists():

        def work() -> bytes:
            with transfer.ask("GET", url) as answer:
                if answer.status_code != 200:
                    raise UserError(f"is not there: HTTP {answer.status_code} {transfer.plain(answer.reason)}")
                return transfer.read_start(answer, MOST_BYTES + 1)

        data = transfer.patiently(work, "could not be fetched")
        if len(data) > MOST_BYTES:
            raise UserError(f"has more than {MOST_BYTES / 1e6:.0f} MB: make it smaller")
        load(data)  # what is no picture is not kept
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_bytes(data)
        new.replace(file)
    return file


def to_data_url(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def sight(raw: dict[str, Any], messages: list[Message], folder: Path, fetch: bool = False) -> list[Message]:
    """A LLaVA row's messages with its pictures, each loaded once, in the places of `<image>`, as {"type": "image", "image":
    its path or data URL}; a row without pictures stays as it is. Paths are relative to `folder`; addresses
    are refused unless they are to be fetched. Raises UserError."""
    named = raw.get("image") or raw.get("images") or []
    named = named if isinstance(named, list) else [named]
    wrong = [n for n in named if not isinstance(n, str)]
    if wrong:
        raise UserError(f"has an image that is {type(wrong[0]).__name__}, it must be a path")
    count = sum(message["content"].count(IMAGE) for message in messages)
    if count != len(named):
        raise UserError(f"names {len(named)} pictures and has {IMAGE} {count} times in its text")
    left, found = iter(named), []
    for message in messages:
        if IMAGE in message["content"] and message["role"] != "user":
            raise UserError(f"has {IMAGE} in a message of role {message['role']}; only a user's can hold a picture")
        content = _parts(message["content"], left, folder, fetch) if IMAGE in message["content"] else message["content"]
        found.append({**message, "content": content})
    return found


def _parts(text: str, left: Iterator[str], folder: Path, fetch: bool) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split(IMAGE)):
        if i:
            parts.append({"type": "image", "image": _checked(next(left), folder, fetch)})
        # the format itself breaks the line after a picture
        if piece := piece.removeprefix("\n") if i else piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _checked(name: str, folder: Path, fetch: bool) -> str:
    if name.startswith("data:"):
        from_data_url(name)
        return name
    address = bool(ADDRESS.match(name))
    if address and not fetch:
        raise UserError(
            f"its picture {name[:80]} is an address, and nothing is fetched: download it and give its path, or allow it with "
            "--set vision.fetch=true"
        )
    try:
        file = fetched(name) if address else folder / Path(name).expanduser()
        load(file)
    except UserError as error:
        raise UserError(f"its picture {name} {error}") from error
    return str(file.absolute())
