"""The one renderer: messages -> token ids and the mask of supervised tokens, in the same breath.

Training, scoring, the page and the API call `ChatFormat.render`; other people's tools use `ChatFormat.template`, which
yields the same ids. The format is ChatML, as SmolLM2, Qwen and InternLM2 speak it: an optional beginning-of-text token,
then per message `<|im_start|>{role}\\n{content}<|im_end|>\\n`. A message to a model that sees may hold pictures among its
text, each written `<image>\\n`. Imports no torch.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from tokenizers import Encoding, Tokenizer

from finetune.errors import UserError

# {"role": "system" | "user" | "assistant", "content": text}; a user's content may be a list of {"type": "text", "text": ..}
# and {"type": "image", "image": anything that `ChatFormat.see` knows}.
Message = dict[str, Any]

START, END, IMAGE = "<|im_start|>", "<|im_end|>", "<image>"
ROLES = ("system", "user", "assistant")

# A Unicode noncharacter: no text holds it. The template puts it inside control tokens that a message spells out, so that
# the tokenizer does not take them for control tokens; the tokenizer's normalizer then deletes it, which leaves exactly
# the ids of the plain text.
SPLIT = "\ufdd0"


class Rendered(NamedTuple):
    ids: list[int]
    mask: list[int]  # 1 where the token is supervised; as long as ids


class ChatFormat:
    """How one model's conversations are written.

    `tokenizer_json` is the text of a tokenizer.json. `default_system` is what the model's own template puts before a
    conversation without a system message, unless that begins with a picture; a tuned model has none. `vision`, of a model that sees: its processor's settings,
    with "patches", how many tokens a picture takes. Raises UserError where the vocabulary has no ChatML control tokens.
    """

    def __init__(
        self, tokenizer_json: str, default_system: str | None = None, vision: dict[str, Any] | None = None
    ) -> None:
        spec = json.loads(tokenizer_json)
        delete_split = {"type": "Replace", "pattern": {"String": SPLIT}, "content": ""}
        own = spec["normalizer"]
        steps = own["normalizers"] if own and own["type"] == "Sequence" else [own] if own else []
        if delete_split not in steps:
            spec["normalizer"] = {"type": "Sequence", "normalizers": [delete_split, *steps]}
        for token in spec["added_tokens"]:
            token["normalized"] = False  # control tokens are looked for before SPLIT is deleted
        self.tokenizer_json = json.dumps(spec, ensure_ascii=False)
        self.tokenizer = Tokenizer.from_str(self.tokenizer_json)
        self.control = {token["content"]: token["id"] for token in spec["added_tokens"]}
        if missing := [token for token in (START, END) if token not in self.control]:
            raise UserError(
                f"The tokenizer has no {' and '.join(missing)}: only ChatML models (SmolLM2, Qwen, InternLM2) are "
                "supported; choose another base model."
            )
        # SPLIT must fit in, and no token may overlap itself or reach from a message over the line break or the control
        # token beside it.
        if unsafe := [t for t in self.control if len(t) < 2 or t[0] in t[1:] or "<" in t[1:] or "\n" in t]:
            raise UserError(
                f"The tokenizer's added tokens {unsafe} cannot be told from what users type; choose another base model."
            )
        # What users type goes through one that knows no control token at all.
        self._text = Tokenizer(self.tokenizer.model)
        self._text.normalizer, self._text.pre_tokenizer = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        self._bos = self.tokenizer.encode("").ids  # [] or [id of "<s>"]
        self._newline = self._encode("\n").ids
        self.default_system, self.vision = default_system, vision
        # A picture's ids: what stands for it in a text, or, of a model that was given eyes, where its patches are found.
        self.see: Callable[[Any], list[int]] = self._written
        ends = (END, "</s>", "<|endoftext|>", *([IMAGE] if vision else []))  # no answer brings a picture along
        self.stop_ids = [self.control[t] for t in ends if t in self.control]

    def _written(self, _: Any) -> list[int]:
        return [self.control[IMAGE]] * self.vision["patches"]

    def unseeing(self) -> "ChatFormat":
        """The same, with pictures written as <image> whatever model has seen them."""
        form = copy.copy(self)
        form.see = form._written
        return form

    def _encode(self, text: str) -> Encoding:
        return self._text.encode(text, add_special_tokens=False)

    def render(
        self, messages: Sequence[Message], *, reply: bool = False, supervise: Literal["last", "all"] = "last"
    ) -> Rendered:
        """Ids of the conversation and which of them are supervised: the last or all of the assistant's answers, each
        with its end-of-turn token. With `reply` the assistant's next turn is opened, ready to be decoded.

        Role and content are encoded in one piece, as the template's text is; a token that reaches over the line break
        between them (an answer that begins with line breaks) counts as prompt. Raises UserError for other roles.
        """
        return self.render_all([messages], reply=reply, supervise=supervise)[0]

    def render_all(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        reply: bool = False,
        supervise: Literal["last", "all"] = "last",
    ) -> list[Rendered]:
        """`render` of many, as fast as the tokenizer takes a batch."""
        texts = []
        for messages in conversations:
            check_messages(messages, sees=self.vision is not None)
            first = messages[0]
            if self.default_system is not None and first["role"] != "system" and isinstance(first["content"], str):
                messages = [{"role": "system", "content": self.default_system}, *messages]
            texts.append([(message["role"], *_around(message)) for message in messages])
        encoded = iter(
            self._text.encode_batch(
                [text for turns in texts for _, said, _ in turns for text in said], add_special_tokens=False
            )
        )
        start, end = self.control[START], self.control[END]
        opening = [start, *self._encode("assistant\n").ids] if reply else []
        rendered = []
        for turns in texts:
            ids, mask = list(self._bos), [0] * len(self._bos)
            last = max((i for i, (role, *_) in enumerate(turns) if role == "assistant"), default=-1)
            for i, (role, _, pictures) in enumerate(turns):
                turn = next(encoded)
                said = [*turn.ids, *(i for picture in pictures for i in (*self.see(picture), *next(encoded).ids))]
                supervised = int(role == "assistant" and (supervise == "all" or i == last))
                header = _content_begins(turn, len(role) + 1)
                ids += [start, *said, end, *self._newline]
                mask += [0] * (1 + header) + [supervised] * (len(said) - header + 1) + [0] * len(self._newline)
            rendered.append(Rendered(ids + opening, mask + [0] * len(opening)))
        return rendered

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids from which the assistant's next answer is decoded."""
        return self.render(messages, reply=True).ids

    def encode(self, text: str) -> Encoding:
        """The text alone as a tokenizers.Encoding: no control token, whatever it spells."""
        return self._encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[Encoding]:
        return self._text.encode_batch(texts, add_special_tokens=False)

    def document(self, text: str, *, ends: bool = True) -> list[int]:
        """Ids of a plain text, as models are pretrained on it, with its end-of-text token if it `ends`."""
        end = [self.control[token] for token in ("<|endoftext|>", "</s>") if ends and token in self.control]
        return [*self._bos, *self._encode(text).ids, *end[:1]]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> "TextStream":
        return TextStream(self.decode)

    @property
    def template(self) -> str:
        """The Jinja chat template whose text, tokenized by `tokenizer_json`, gives the ids of `render`."""
        pairs = [(token, token[0] + SPLIT + token[1:]) for token in self.control]
        default, system = "", self.default_system
        if system is not None:
            for token, split in pairs:
                system = system.replace(token, split)
            turn = f"'{START}system\\n' ~ {_quoted(system)} ~ '{END}\\n'"
            words = " and messages[0]['content'] is string" if self.vision is not None else ""
            default = f"{{%- if messages[0]['role'] != 'system'{words} %}}{{{{- {turn} }}}}{{%- endif %}}"
        begin = f"{{{{- '{self.tokenizer.decode(self._bos, skip_special_tokens=False)}' }}}}{default}"
        safe = (
            f"{{%- for token, split in {_quoted(pairs)} %}}"
            "{%- set turn.text = turn.text.replace(token, split) %}"
            "{%- endfor %}"
        )
        if self.vision is None:
            turns = (
                "{%- for message in messages %}"
                f"{{%- set turn = namespace(text=message['content']) %}}{safe}"
                f"{{{{- '{START}' ~ message['role'] ~ '\\n' ~ turn.text ~ '{END}\\n' }}}}"
                "{%- endfor %}"
            )
        else:
            turns = (
                f"{{%- for message in messages %}}{{{{- '{START}' ~ message['role'] ~ '\\n' }}}}"
                "{%- set parts = message['content'] %}"
                "{%- if parts is string %}{%- set parts = [{'type': 'text', 'text': parts}] %}{%- endif %}"
                "{%- for part in parts %}"
                f"{{%- if part['type'] == 'image' %}}{{{{- '{IMAGE}\\n' }}}}{{%- else %}}"
                f"{{%- set turn = namespace(text=part['text']) %}}{safe}{{{{- turn.text }}}}{{%- endif %}}"
                f"{{%- endfor %}}{{{{- '{END}\\n' }}}}"
                "{%- endfor %}"
            )
        return f"{begin}{turns}{{%- if add_generation_prompt %}}{{{{- '{START}assistant\\n' }}}}{{%- endif %}}"

    @property
    def hash(self) -> str:
        """sha256 over the template, the control tokens' ids and what a picture goes through: two models with the same hash are prompted alike."""
        parts = [self.template, self.control, *([self.vision] if self.vision is not None else [])]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _quoted(value: object) -> str:
    """As a literal that every reader of Jinja knows: llama.cpp's has no "\\u" escapes, so the characters stand as such."""
    return json.dumps(value, ensure_ascii=False)


def _content_begins(turn: Encoding, header: int) -> int:
    """The first token that lies wholly behind `header` characters."""
    token = turn.char_to_token(header)
    if token is None:  # there is no content, or it begins with a character that the normalizer deletes
        return sum(start < header for start, _ in turn.offsets)
    return token + (turn.token_to_chars(token)[0] < header)


def text_of(message: Message) -> str:
    """What a message says; a picture says nothing."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def pictures_of(messages: Sequence[Message]) -> list[Any]:
    """The pictures of a conversation, in their order."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def _around(message: Message) -> tuple[list[str], list[Any]]:
    """A message's texts, the role in the first, and the pictures between them."""
    said, pictures = [f"{message['role']}\n"], []
    content = message["content"]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            said[-1] += part["text"]
        else:
            pictures.append(part["image"])
            said.append("\n")
    return said, pictures


class TextStream:
    """Token ids, one at a time, to text as soon as whole characters are there; broken ones come as U+FFFD.

    (tokenizers' DecodeStream raises where a model says bytes that are no character.)
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._shown: list[int] = []  # the last ones shown: some decoders drop the space before a text's first word
        self._new: list[int] = []

    def add(self, token: int) -> str:
        self._new.append(token)
        text = self._decode(self._shown + self._new)[len(self._decode(self._shown)) :]
        if not text or text.endswith("\ufffd"):
            return ""
        self._shown, self._new = self._new, []
        return text


def check_messages(messages: Sequence[Message], *, sees: bool = False) -> None:
    """Raises UserError naming every message that is not {"role": system | user | assistant, "content": text}; where the
    model `sees`, a user's content may also be a list of texts and images."""
    if not messages:
        raise UserError("The conversation is empty: give at least one message.")
    problems = []
    for i, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            problems.append(f"Message {i}: role {role!r} is not one of {', '.join(ROLES)}.")
        elif role == "system" and i > 1:
            problems.append(f"Message {i}: a system message can only be the first.")
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            kinds = {part.get("type") for part in content}
            if not kinds <= {"text", "image"}:
                problems.append(f"Message {i}: content has parts of type {kinds - {'text', 'image'}}.")
                continue
            if "image" in kinds and not sees:
                problems.append(f"Message {i}: this model does not see pictures; ask in words.")
            if "image" in kinds and role != "user":
                problems.append(f"Message {i}: only a user's message can hold a picture.")
            content = text_of(message)
        if not isinstance(content, str):
            problems.append(f"Message {i}: content is {type(content).__name__}, it must be text.")
        elif half := re.search("[\ud800-\udfff]", content):
            problems.append(f"Message {i}: content holds {half[0]!r}, which is half a character and no text.")
    if problems:
        raise UserError(*problems)
