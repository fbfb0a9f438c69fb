import json
import random
from pathlib import Path

import pytest
import sentencepiece

from finetune.errors import UserError
from finetune.internlm2 import CONTROL_TOKENS, build_tokenizer

DATA = Path(__file__).parent / "data" / "internlm2"
MODEL_FILE = DATA / "tokenizer.model"
EXPECTED = json.loads((DATA / "tokenizer_expected.json").read_text(encoding="utf-8"))  # by InternLM2's own tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(MODEL_FILE)


@pytest.mark.parametrize("case", EXPECTED["texts"], ids=lambda case: ascii(case["text"][:20]))
def test_texts_get_internlm2s_ids_and_decode_to_themselves(tokenizer, case):
    assert tokenizer.encode(case["text"]).ids == case["ids"]
    # "▁" is the vocabulary's space: the one character that cannot come back.
    assert tokenizer.decode(case["ids"]) == case["text"].replace("▁", " ")


@pytest.mark.parametrize("case", EXPECTED["chats"], ids=lambda case: f"{len(case['messages'])} messages")
def test_chats_get_internlm2s_ids_and_decode_to_themselves(tokenizer, case):
    assert tokenizer.encode(case["prompt"], add_special_tokens=False).ids == case["ids"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["prompt"]


def test_any_text_splits_as_sentencepiece_splits_it(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_FILE))
    # Its releases disagree on "\0"; and the slots past 92397 are names, not text.
    vocabulary = [pieces.id_to_piece(i).replace("▁", " ") for i in range(259, 92397) if i != 354]
    rng = random.Random(0)
    texts = ["".join(rng.choices(vocabulary, k=6)) for _ in range(1000)]
    texts += ["".join(rng.choices("ab \n\t—…-=_Ａ哈\U0001f600", k=30)) for _ in range(1000)]
    texts += [piece * rng.randint(2, 20) for piece in rng.choices(vocabulary, k=1000)]
    ours = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert [text for text, a, b in zip(texts, ours, pieces.encode(texts), strict=True) if a != b] == []


def test_control_tokens_fit_the_embedding(tokenizer):
    assert tokenizer.get_vocab_size() == 92544
    assert {i: tokenizer.id_to_token(i) for i in CONTROL_TOKENS} == CONTROL_TOKENS
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]


def test_control_tokens_can_be_kept_text():
    tokenizer = build_tokenizer(MODEL_FILE)
    tokenizer.encode_special_tokens = True
    names = ["<unk>", "<s>", "</s>", "<0x41>", "[UNUSED_TOKEN_145]", *CONTROL_TOKENS.values()]
    for text in [*names, "".join(names), "\n".join(names)]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert not set(ids) & {*range(259), *range(92397, 92544)}, text
        assert tokenizer.decode(ids) == text


def test_saved_it_loads_in_transformers_with_the_same_ids(tokenizer, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert (auto.bos_token_id, auto.eos_token_id, len(auto)) == (1, 2, 92544)
    for loaded in (auto, PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))):
        for case in EXPECTED["texts"]:
            assert loaded(case["text"])["input_ids"] == case["ids"]
            assert loaded.decode(case["ids"][1:]) == case["text"].replace("▁", " ")
        for case in EXPECTED["chats"]:
            assert loaded(case["prompt"], add_special_tokens=False)["input_ids"] == case["ids"]


def flipped(data: bytes) -> bytes:
    return data[:700_000] + bytes([data[700_000] ^ 1]) + data[700_001:]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: data[:700_000], "damaged or belongs to another model"),
        (lambda data: b"", "damaged or belongs to another model"),
        (flipped, "damaged or belongs to another model"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\nsize 1477754\n", "git lfs pull"),
    ],
    ids=["cut", "empty", "one bit", "lfs pointer"],
)
def test_a_wrong_file_is_refused_in_words(tmp_path, damage, words):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(damage(MODEL_FILE.read_bytes()))
    with pytest.raises(UserError, match=words) as caught:
        build_tokenizer(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_refused_in_words(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*tokenizer\.model \(No such file"):
        build_tokenizer(tmp_path / "tokenizer.model")
