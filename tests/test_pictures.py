"""Pictures as people have them, good and bad; LLaVA's rows; what the program draws itself."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from finetune import checks, drawn, photographs, pictures, records, settings, sight, transfer
from finetune.errors import UserError

RED, BLUE = (200, 30, 20), (20, 40, 210)


def saved(folder: Path, name: str, image: Image.Image, **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


def two_colours(mode: str = "RGB") -> Image.Image:
    """Red above blue, wider than high."""
    image = Image.new("RGB", (60, 40), RED)
    image.paste(BLUE, (0, 20, 60, 40))
    return image.convert(mode)


def near(pixel: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return all(abs(a - b) <= 12 for a, b in zip(pixel, expected, strict=True))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"])
def test_usual_pictures(tmp_path, name):
    found = pictures.load(saved(tmp_path, name, two_colours()))
    assert (found.mode, found.size) == ("RGB", (60, 40))
    assert near(found.getpixel((30, 5)), RED)
    assert near(found.getpixel((30, 35)), BLUE)


@pytest.mark.parametrize("mode, name", [("CMYK", "a.jpg"), ("CMYK", "a.tiff"), ("P", "a.png"), ("YCbCr", "a.jpg")])
def test_other_colour_spaces(tmp_path, mode, name):
    image = two_colours().quantize() if mode == "P" else two_colours(mode)
    found = pictures.load(saved(tmp_path, name, image))
    assert near(found.getpixel((30, 5)), RED)
    assert near(found.getpixel((30, 35)), BLUE)


def test_sixteen_bits_keep_their_greys(tmp_path):
    values = np.full((10, 10), 0x4000, np.uint16)
    values[5:] = 0xC000
    for name in ("a.png", "a.tiff"):
        found = pictures.load(saved(tmp_path, name, Image.fromarray(values)))
        assert found.getpixel((0, 0)) == (0x4000 // 257,) * 3
        assert found.getpixel((0, 9)) == (0xC000 // 257,) * 3


def test_turned_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right: what is left is then above
    image = Image.new("RGB", (60, 40), RED)
    image.paste(BLUE, (30, 0, 60, 40))
    found = pictures.load(saved(tmp_path, "a.jpg", image, exif=exif))
    assert found.size == (40, 60)
    assert near(found.getpixel((20, 10)), RED)
    assert near(found.getpixel((20, 50)), BLUE)


def test_an_animation_s_first_image(tmp_path):
    first, second = Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), BLUE)
    found = pictures.load(saved(tmp_path, "a.gif", first, save_all=True, append_images=[second]))
    assert near(found.getpixel((10, 10)), RED)


def test_what_is_transparent_is_white(tmp_path):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 20, 10))
    for name, made in (("a.png", image), ("b.png", image.quantize())):
        found = pictures.load(saved(tmp_path, name, made))
        assert near(found.getpixel((5, 5)), RED)
        assert found.getpixel((5, 15)) == (255, 255, 255)


def bomb(side: int) -> bytes:
    """A PNG of few bytes and many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def test_bad_ones_say_why(tmp_path):
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(good, "JPEG")
    png = io.BytesIO()
    two_colours().resize((300, 300)).save(png, "PNG")
    floats = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(floats, "TIFF")
    for data, words in (
        (b"this is text\n", "is no picture that can be read"),
        (b"", "is no picture that can be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is no picture that can be read"),
        (good.getvalue()[:-300], "cannot be read .*truncated"),
        (png.getvalue()[: len(png.getvalue()) // 2], "cannot be read|is broken"),
        (bomb(9000), "has 9000 x 9000 pixels, more than 64,000,000"),
        (bomb(60000), "more than 64,000,000"),
        (floats.getvalue(), "has floating-point pixels"),
    ):
        (file := tmp_path / "a.jpg").write_bytes(data)
        with pytest.raises(UserError, match=words):
            pictures.load(file)
    with pytest.raises(UserError, match="is not there"):
        pictures.load(tmp_path / "none.jpg")


def test_data_urls(tmp_path):
    url = pictures.to_data_url(saved(tmp_path, "a.png", two_colours()))
    assert pictures.from_data_url(url).tobytes() == two_colours().tobytes()
    for bad in ("https://example.org/a.png", "file:///etc/passwd", "/etc/passwd", "data:text/html;base64,AAAA"):
        with pytest.raises(UserError, match="nothing is fetched"):
            pictures.from_data_url(bad)


# ------------------------------------------------------------------------------------------------------------ rows


def rows(folder: Path, *values: dict) -> list[dict]:
    (folder / "rows.json").write_text(json.dumps(list(values), ensure_ascii=False, indent=1))
    return [row["messages"] for row in records.read([str(folder / "rows.json")], sight=pictures.sight)]


def said(*turns: str, **more) -> dict:
    who = ("human", "gpt")
    return {"id": "1", "conversations": [{"from": who[i % 2], "value": t} for i, t in enumerate(turns)], **more}


def test_llava_rows(tmp_path):
    (tmp_path / "in").mkdir()
    one, two = (str(saved(tmp_path / "in", f"{n}.png", two_colours())) for n in (1, 2))
    found = rows(
        tmp_path,
        said("<image>\nWhat is it?", "Red.", "And below?", "Blue.", image="in/1.png"),
        said("Between <image> and <image>\nwhat changed?", "Nothing.", image=["in/1.png", "in/2.png"]),
        said("Who are you?", "小星"),
    )
    image = {"type": "image"}
    assert found[0][0]["content"] == [{**image, "image": one}, {"type": "text", "text": "What is it?"}]
    assert [m["content"] for m in found[0][1:]] == ["Red.", "And below?", "Blue."]
    assert found[1][0]["content"] == [
        {"type": "text", "text": "Between "},
        {**image, "image": one},
        {"type": "text", "text": " and "},
        {**image, "image": two},
        {"type": "text", "text": "what changed?"},
    ]
    assert found[2][0]["content"] == "Who are you?"


def exported(*contents: object) -> dict:
    """As the page writes a conversation."""
    who = ("user", "assistant")
    return {"title": "t", "messages": [{"role": who[i % 2], "content": c} for i, c in enumerate(contents)]}


def shown(url: object) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def test_what_the_page_exports(tmp_path):
    one, two = (pictures.to_data_url(saved(tmp_path, f"{n}.png", two_colours(n))) for n in ("RGB", "L"))
    asked = [shown(one), shown(two), {"type": "text", "text": "\nWhat changed?"}]
    found = rows(tmp_path, exported(asked, "The colours.", "Sure?", "Yes."), exported([shown(one)], "Red and blue."))
    image = {"type": "image"}
    assert found[0][0]["content"] == [
        {**image, "image": one},
        {**image, "image": two},
        {"type": "text", "text": "\nWhat changed?"},
    ]
    assert [m["content"] for m in found[0][1:]] == ["The colours.", "Sure?", "Yes."]
    assert found[1][0]["content"] == [{**image, "image": one}]
    assert checks.task_of([str(tmp_path / "rows.json")]) == "vision"
    with pytest.raises(UserError, match="has an image, and this task learns from text alone"):
        list(records.read([str(tmp_path / "rows.json")]))


def test_every_bad_exported_row_is_named(tmp_path):
    bad = {
        "is an address, and nothing is fetched": exported([shown("https://example.org/a.png")], "b"),
        "A picture is no picture that can be read": exported([shown("data:image/png;base64,AAAA")], "b"),
        "data URL is not base64": exported([shown("data:image/png;base64,?")], "b"),
        "has an image that is NoneType": exported([shown(None)], "b"),
        "has <image> in a message of role assistant": exported("a", [shown("data:image/png;base64,AAAA")]),
    }
    with pytest.raises(UserError) as caught:
        rows(tmp_path, *bad.values())
    for problem, words in zip(caught.value.problems, bad, strict=False):
        assert words in problem


def test_addresses_are_fetched_where_it_is_allowed(tmp_path, world, monkeypatch):
    """Over https alone, once, and no more than a picture has."""
    png, asked = io.BytesIO(), []
    two_colours().save(png, "PNG")
    there = {
        "good": (200, png.getvalue()),
        "text": (200, b"no picture"),
        "large": (200, png.getvalue() + bytes(99_000)),
    }

    def ask(method: str, url: str) -> requests.Response:
        asked.append(url)
        answer = requests.Response()
        answer.status_code, data = there.get(url.rpartition("/")[2], (404, b""))
        answer.raw, answer.reason = io.BytesIO(data), "Not Found"
        answer.headers["Content-Length"] = str(len(data))
        return answer

    monkeypatch.setattr(transfer, "ask", ask)
    monkeypatch.setattr(pictures, "MOST_BYTES", 90_000)
    fetch = sight.reader(settings.build({"task": "vision", "vision": {"fetch": True}}))

    def read(name: str) -> Path:
        (tmp_path / "rows.json").write_text(json.dumps([said("<image>\na", "b", image=name)]))
        (row,) = records.read([str(tmp_path / "rows.json")], sight=fetch)
        return Path(row["messages"][0]["content"][0]["image"])

    for _ in range(2):
        file = read("https://example.org/good")
        assert file.is_relative_to(world / "cache")
        assert pictures.load(file).tobytes() == two_colours().tobytes()
    assert asked == ["https://example.org/good"]
    for name, words in (
        ("https://example.org/gone", "gone is not there: HTTP 404 Not Found"),
        ("https://example.org/text", "text is no picture that can be read"),
        ("https://example.org/large", "large has more than 0 MB: make it smaller"),
        ("http://example.org/good", "good is not fetched: give an https address"),
        ("file:///etc/passwd", "passwd is not fetched: give an https address"),
    ):
        with pytest.raises(UserError, match=words):
            read(name)
    assert len(list(file.parent.iterdir())) == 1
    assert sight.reader(settings.build({"task": "identity"})) is None


def test_every_bad_row_is_named(tmp_path):
    saved(tmp_path, "good.png", two_colours())
    (tmp_path / "text.jpg").write_text("no picture")
    bad = {
        "its picture gone.png is not there": said("<image>\na", "b", image="gone.png"),
        "its picture text.jpg is no picture": said("<image>\na", "b", image="text.jpg"),
        "is an address, and nothing is fetched": said("<image>\na", "b", image="https://example.org/a.png"),
        "names 1 pictures and has <image> 0 times": said("a", "b", image="good.png"),
        "names 0 pictures and has <image> 1 times": said("<image>\na", "b"),
        "names 1 pictures and has <image> 2 times": said("<image><image>", "b", image="good.png"),
        "has <image> in a message of role assistant": said("a", "<image>", image="good.png"),
        "has an image that is int": said("<image>a", "b", image=[7]),
    }
    with pytest.raises(UserError) as caught:
        rows(tmp_path, said("<image>\na", "b", image="good.png"), *bad.values())
    for problem, words in zip(caught.value.problems, bad, strict=False):
        assert "rows.json:" in problem
        assert words in problem
    assert caught.value.problems[-1].startswith(f"{len(bad)} of {len(bad) + 1} rows are bad")


def test_other_tasks_still_refuse_pictures(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([said("<image>\na", "b", image="good.png")]))
    with pytest.raises(UserError, match="has an image, and this task learns from text alone"):
        list(records.read([str(tmp_path / "rows.json")]))


# ----------------------------------------------------------------------------------------------------------- drawn


def test_drawn_pictures_show_what_is_said():
    for i in range(40):
        scene = drawn.scene(f"test/{i}")
        image = np.asarray(drawn.draw(scene)).astype(int)
        colour = np.array(drawn.COLOURS[scene.colour][1])
        there = (np.abs(image - colour).max(-1) < 30).reshape(drawn.SIZE, drawn.SIZE)
        third = drawn.SIZE / 3
        for at, place in enumerate(drawn.PLACES):
            row, column = divmod(at, 3)
            middle = there[int((row + 0.5) * third), int((column + 0.5) * third)]
            assert middle == (place in scene.places), (scene, place)


def test_training_and_held_out_pictures_are_never_the_same():
    sides = [{drawn.draw(drawn.scene(f"0/{side}/{i}")).tobytes() for i in range(60)} for side in ("train", "heldout")]
    assert not sides[0] & sides[1]
    assert all(len(side) == 60 for side in sides)


@pytest.mark.parametrize(
    "kind, language, answer, accept, right",
    [
        ("colour", "en", "Red", ["red"], True),
        ("colour", "en", "The circles are red.", ["red"], True),
        ("colour", "en", "Red or blue", ["red"], False),
        ("colour", "en", "I see only noise.", ["red"], False),
        ("position", "en", "At the top left", ["at the top left"], True),
        ("position", "en", "At the top left", ["at the top"], False),
        ("position", "en", "At the top", ["at the top"], True),
        ("count", "zh", "两个", ["两个"], True),
        ("count", "en", "Four", ["three"], False),
        ("colour", "en", "Blue colored", ["blue"], True),
        ("colour", "en", "Colored", ["red"], False),
        ("colour", "en", "Hundreds of colors", ["red"], False),
        ("shape", "en", "They are crosses, all across.", ["cross"], True),
        ("shape", "en", "It goes across", ["cross"], False),
        ("shape", "en", "It starts there", ["star"], False),
        ("shape", "en", "Star-shaped", ["star"], True),
        ("shape", "zh", "长方形", ["方形"], False),
        ("shape", "zh", "正方形", ["方形"], True),
        ("count", "en", "None.", ["one"], False),
        ("count", "en", "There is one.", ["one"], True),
        ("count", "en", "3", ["three"], True),
        ("count", "en", "There are 3 stars.", ["three"], True),
        ("count", "en", "13", ["three"], False),
        ("count", "zh", "3个", ["三个"], True),
        ("count", "zh", "图中有2 个圆。", ["两个"], True),
        ("position", "en", "Top left", ["at the top left"], True),
        ("position", "en", "in the top-left corner", ["at the top left"], True),
        ("position", "en", "Top", ["at the top left"], False),
        ("position", "en", "Middle.", ["in the middle"], True),
        ("position", "zh", "右上方", ["右上"], True),
        ("position", "zh", "上方", ["右上"], False),
        ("caption", "en", "Three red circles.", ["circle", "red"], True),
        ("caption", "en", "Three blue circles.", ["circle", "red"], False),
    ],
)
def test_answers_are_judged(kind, language, answer, accept, right):
    assert drawn.right(kind, language, answer, accept) == right


@pytest.mark.parametrize(
    "language, answer, accept, right",
    [
        ("en", "A cat.", "cat", True),
        ("en", "Two cats", "cat", True),
        ("en", "A cat and a motorcycle.", "cat", False),
        ("en", "A motorcycle.", "cat", False),
        ("en", "A catalogue.", "cat", False),
        ("en", "One red circle.", "cat", False),
        ("en", "A coin.", "coin", True),
        ("en", "Galaxies", "galaxies", True),
        ("zh", "一只猫。", "猫", True),
        ("zh", "一只熊猫。", "猫", False),
        ("zh", "一只猫和一些硬币。", "猫", False),
        ("zh", "只有噪点。", "猫", False),
    ],
)
def test_answers_about_photographs_are_judged(language, answer, accept, right):
    assert photographs.right(language, answer, [accept]) == right


def test_every_subject_s_own_caption_is_right_and_no_other_s():
    for language in drawn.LANGUAGES:
        for subject in photographs.SUBJECTS:
            told = [
                s
                for s in photographs.SUBJECTS
                if photographs.right(language, s.caption[language], [subject.noun[language]])
            ]
            assert told == [subject]


def test_a_photograph_is_cut_by_its_seed():
    """The same one the same way, others otherwise; of the held-out ones, the motorcycle's other view."""
    for subject in photographs.SUBJECTS:
        cuts = [photographs.cut(subject, f"0/{i}") for i in range(6)]
        assert [cut.tobytes() for cut in cuts] == [photographs.cut(subject, f"0/{i}").tobytes() for i in range(6)]
        assert len({cut.tobytes() for cut in cuts}) == 6
        assert all(max(cut.size) == drawn.SIZE for cut in cuts)
        same = photographs.cut(subject, "0/0", heldout=True).tobytes() == cuts[0].tobytes()
        assert same == (subject.file == subject.heldout)
    assert [subject.file for subject in photographs.SUBJECTS if subject.file != subject.heldout] == [
        "motorcycle_left.png"
    ]
    assert {subject.file for subject in photographs.SUBJECTS} | {
        subject.heldout for subject in photographs.SUBJECTS
    } == {Path(name).name for name in photographs.WHEEL.files}


def test_what_is_asked_has_the_scene_s_answer():
    scene = drawn.Scene("star", "green", ("left", "top"), "x")
    assert drawn.caption(scene, "en") == "Two green stars, at the top and at the left."  # in reading order
    assert drawn.caption(scene, "zh") == "两个绿色的星形，在上方和左边。"
    asked = {(q["kind"], q["lang"]): q for q in drawn.questions(scene)}
    assert {kind for kind, _ in asked} == {"colour", "shape", "count", "positions"}
    assert asked["positions", "en"]["question"] == "Where are the stars?"
    assert asked["positions", "en"]["answer"] == "At the top and at the left"
    alone = drawn.Scene("cross", "black", ("bottom right",), "x")
    assert drawn.caption(alone, "en") == "One black cross, at the bottom right."
    asked = {(q["kind"], q["lang"]): q for q in drawn.questions(alone)}
    assert asked["position", "zh"]["answer"] == "右下"
    for (kind, language), question in asked.items():
        assert drawn.right(kind, language, question["answer"], [question["accept"]])
