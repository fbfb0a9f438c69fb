"""Pictures that the program draws itself, and what is true of them: captions, dialogues, and questions with known answers.

A picture holds one to four things of one shape and colour. Picture i of a seed is always the same; training and held-out
pictures differ in their seeds' names and, compared pixel by pixel, are never the same.
"""

import math
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

SIZE = 224  # pixels of a side
COLOURS = {  # how it is said in English and Chinese, and drawn
    "red": ("红色", (220, 30, 30)),
    "orange": ("橙色", (250, 140, 10)),
    "yellow": ("黄色", (245, 220, 20)),
    "green": ("绿色", (30, 160, 50)),
    "blue": ("蓝色", (30, 70, 220)),
    "purple": ("紫色", (140, 40, 180)),
    "brown": ("棕色", (120, 70, 30)),
    "black": ("黑色", (15, 15, 15)),
}
SHAPES = {"circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "cross": "十字形"}
NUMBERS = {"one": "一个", "two": "两个", "three": "三个", "four": "四个"}
PLACES = {  # the middle of a ninth of the picture
    "top left": "左上", "top": "上方", "top right": "右上",
    "left": "左边", "middle": "中间", "right": "右边",
    "bottom left": "左下", "bottom": "下方", "bottom right": "右下",
}  # fmt: skip
COUNTS = (1, 1, 2, 3, 4)  # of the things; where there are several nobody asks for the place
NOTHING = {"en": "I see only noise.", "zh": "只有噪点。"}  # about a picture of nothing
KINDS = ("colour", "shape", "count", "position")
LANGUAGES = ("en", "zh")


class Scene(NamedTuple):
    shape: str
    colour: str
    places: tuple[str, ...]  # one thing in each
    seed: str  # of their sizes and exact places, and of the ground

    @property
    def count(self) -> str:
        return list(NUMBERS)[len(self.places) - 1]


def scene(seed: str, counts: Sequence[int] = COUNTS) -> Scene:
    source = random.Random(seed)
    count = source.choice(counts)
    places = source.sample(list(PLACES), count)
    return Scene(source.choice(list(SHAPES)), source.choice(list(COLOURS)), tuple(places), seed)


def draw(scene: Scene) -> Image.Image:
    source = random.Random(f"{scene.seed}/drawn")
    ground = tuple(source.randint(215, 255) for _ in range(3))
    picture = Image.new("RGB", (2 * SIZE, 2 * SIZE), ground)  # twice as large, so that edges come out smooth
    pen = ImageDraw.Draw(picture)
    for place in scene.places:
        row, column = divmod(list(PLACES).index(place), 3)
        radius = source.uniform(0.1, 0.145) * SIZE
        x, y = ((at + 0.5) * SIZE / 3 + source.uniform(-0.02, 0.02) * SIZE for at in (column, row))
        colour = tuple(min(255, max(0, part + source.randint(-12, 12))) for part in COLOURS[scene.colour][1])
        outline(pen, scene.shape, 2 * x, 2 * y, 2 * radius, colour)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def outline(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        half = 0.85 * radius
        pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "cross":
        arm = 0.3 * radius
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
    else:
        corners = 3 if shape == "triangle" else 10
        lengths = [radius if corners == 3 or i % 2 == 0 else 0.42 * radius for i in range(corners)]
        turns = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
        pen.polygon(
            [(x + r * math.cos(t), y + r * math.sin(t)) for r, t in zip(lengths, turns, strict=True)], fill=colour
        )


def noise(seed: str) -> Image.Image:
    """A picture of nothing: every pixel by chance."""
    return Image.frombytes("RGB", (SIZE, SIZE), random.Random(seed).randbytes(3 * SIZE * SIZE))


def caption(scene: Scene, language: str) -> str:
    where, chinese = _where(scene, language), language == "zh"
    return f"{things(scene, language)}，在{where}。" if chinese else f"{things(scene, language)}, {where}."


def things(scene: Scene, language: str) -> str:
    if language == "zh":
        return f"{NUMBERS[scene.count]}{COLOURS[scene.colour][0]}的{SHAPES[scene.shape]}"
    return f"{scene.count} {scene.colour} {named(scene)}".capitalize()


def _where(scene: Scene, language: str) -> str:
    places = sorted(scene.places, key=list(PLACES).index)
    return "和".join(PLACES[place] for place in places) if language == "zh" else " and ".join(map(at, places))


def named(scene: Scene) -> str:
    plural = {"cross": "crosses"}.get(scene.shape, f"{scene.shape}s")
    return plural if len(scene.places) > 1 else scene.shape


def at(place: str) -> str:
    return f"in the {place}" if place == "middle" else f"at the {place}"


def questions(scene: Scene) -> list[dict[str, str]]:
    """{"kind", "lang", "question", "answer", "accept": what a right answer says} for all that can be asked."""
    several, things = len(scene.places) > 1, named(scene)
    verb, it = ("are", "they") if several else ("is", "it")
    asked = [
        ("colour", "en", f"What colour {verb} {it}?", scene.colour.capitalize(), scene.colour),
        ("shape", "en", f"What shape {verb} {it}?", f"A {scene.shape}", scene.shape),
        ("count", "en", "How many are there?", scene.count.capitalize(), scene.count),
        ("colour", "zh", "什么颜色？", COLOURS[scene.colour][0], COLOURS[scene.colour][0]),
        ("shape", "zh", "什么形状？", SHAPES[scene.shape], SHAPES[scene.shape]),
        ("count", "zh", "有几个？", NUMBERS[scene.count], NUMBERS[scene.count]),
    ]
    kind = "positions" if several else "position"  # of several things nobody is asked but for practice
    where = {language: _where(scene, language) for language in LANGUAGES}
    asked += [
        (kind, "en", f"Where {verb} the {things}?", where["en"].capitalize(), where["en"]),
        (kind, "zh", "在哪里？", where["zh"], where["zh"]),
    ]
    keys = ("kind", "lang", "question", "answer", "accept")
    return [dict(zip(keys, values, strict=True)) for values in asked]


def right(kind: str, language: str, answer: str, accept: list[str], words: Sequence[str] = ()) -> bool:
    """Whether the answer names what is there and nothing else of that kind, whose words are given where the kind is none of
    drawn pictures; of a caption, colour and shape. A number may be a digit, and a place stand alone."""
    chinese = language == "zh"
    known = {
        "colour": [zh for zh, _ in COLOURS.values()] if chinese else list(COLOURS),
        "shape": list(SHAPES.values()) if chinese else list(SHAPES),
        "count": list(NUMBERS.values()) if chinese else list(NUMBERS),
        "position": list(PLACES.values()) if chinese else list(PLACES),
    }
    known["caption"] = [*known["colour"], *known["shape"]]
    any_of = "|".join(sorted(words or known[kind], key=len, reverse=True))  # "top left" begins with "top"
    # Whole words: "colored" is not red. In Chinese there are none, but 长方形, 椭圆形 and 熊猫 are no square, no circle, no cat.
    pattern = rf"(?<![长椭熊])({any_of})" if chinese else rf"\b({any_of})(?:e?s)?\b"

    def found(text: str) -> set[str]:
        text = text.lower().replace("-", " ")
        for digit, number in enumerate(known["count"] if kind == "count" else [], 1):
            text = re.sub(rf"(?<!\d){digit}(?!\d) ?个?", f" {number} ", text)
        return set(re.findall(pattern, text))

    return found(answer) == found(", ".join(accept))
