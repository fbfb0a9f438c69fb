"""InternLM2's tokenizer, and its checkpoints and adapters from their own layout to Llama's and back."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from commands import apart
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import internlm2, model
from finetune.errors import UserError
from finetune.internlm2 import CONTROL_TOKENS, build_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).parent / "data" / "internlm2"
MODEL_FILE = DATA / "tokenizer.model"
EXPECTED = json.loads((DATA / "tokenizer_expected.json").read_text(encoding="utf-8"))  # by InternLM2's own tokenizer
TINY = ("base", "bias", "dyn", "linear")  # random checkpoints, with logits by InternLM2's own code
ORIGIN = {"base_model": "internlm/x", "license": "other"}

# --------------------------------------------------------------------------------------------------------- tokenizer


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
    from transformers import PreTrainedTokenizerFast

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


# -------------------------------------------------------------------------------------------------- to Llama and back


def read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def own(name: str) -> dict:
    return read_json(DATA / f"tiny_{name}" / "config.json")


def link(source: Path, target: Path, *but: str) -> Path:
    """A copy of a folder that costs nothing, without the files named."""
    target.mkdir()
    for file in source.iterdir():
        if file.name not in but:
            os.link(file, target / file.name)
    return target


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def convert(name: str, target: Path) -> Path:
    """Weights and configuration of a tiny checkpoint; its 320 tokens have no tokenizer."""
    target.mkdir()
    internlm2.weights_to_llama(DATA / f"tiny_{name}", target, own(name))
    (target / "config.json").write_text(json.dumps(internlm2.llama_config(own(name))))
    return target


@pytest.fixture(scope="module", params=TINY)
def tiny(request, tmp_path_factory) -> tuple[str, Path, dict[str, torch.Tensor]]:
    """(name, converted folder, what InternLM2's own code gives)"""
    expected = load_file(DATA / f"tiny_{request.param}.expected.safetensors")
    return request.param, convert(request.param, tmp_path_factory.mktemp("tiny") / request.param), expected


def assert_gives(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    def network():
        """Afresh: with dynamic rope a long text leaves its mark, in InternLM2's code as well."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    with torch.inference_mode():
        for length in (5, 48):  # 48 is beyond the 32 of the scaled ones
            found = network()(expected[f"ids{length}"]).logits
            torch.testing.assert_close(found, expected[f"logits{length}"], rtol=0, atol=1e-4)
        seen = expected["padam"].bool()
        assert not seen.all()
        found = network()(expected["padids"], attention_mask=expected["padam"]).logits
        torch.testing.assert_close(found[seen], expected["padlogits"][seen], rtol=0, atol=1e-4)
        new = expected["gen_out"].shape[1] - expected["gen_in"].shape[1]
        settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        assert torch.equal(network().generate(expected["gen_in"], **settings), expected["gen_out"])


# ------------------------------------------------------------------------------------------------------------ models


@pytest.fixture(autouse=True)
def built_once(tokenizer, monkeypatch):
    """It is the same each time, and takes a conversion's longest part."""
    monkeypatch.setattr(internlm2, "build_tokenizer", lambda file: tokenizer)


def test_the_converted_network_is_internlm2s(tiny):
    _, folder, expected = tiny
    assert_gives(folder, expected)


def test_merged_saved_and_opened_again_it_still_is(tiny, tiny_model, tmp_path, monkeypatch):
    """As a run does it: adapter, merge, save, plain transformers. A fresh adapter changes nothing."""
    monkeypatch.setattr(model, "has_fast_bf16", lambda: False)  # float32 while it trains as well
    _, folder, expected = tiny
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    merged = model.add_lora(network, 4).merge_and_unload().float()
    model.save(merged, model.chat_format(tiny_model), tmp_path / "merged")
    assert_gives(tmp_path / "merged", expected)


@pytest.mark.parametrize(
    "name, rope",
    [("base", None), ("dyn", {"type": "dynamic", "factor": 2.0}), ("linear", {"type": "linear", "factor": 2.0})],
)
def test_rope_is_written_for_old_and_for_new_readers(name, rope, tmp_path, tiny_model):
    folder = convert(name, tmp_path / "llama")
    network = AutoModelForCausalLM.from_pretrained(folder)
    model.save(network, model.chat_format(tiny_model), tmp_path / "saved")
    for config in (read_json(folder / "config.json"), read_json(tmp_path / "saved" / "config.json")):
        assert (config["rope_theta"], config.get("rope_scaling")) == (1e6, rope)
        new = config["rope_parameters"]
        assert (new["rope_theta"], new["rope_type"]) == (1e6, rope["type"] if rope else "default")


def test_grouped_and_ungrouped_rows_come_where_they_belong():
    """By the rule [kv head][its queries, k, v][head_dim], each row named by what it is."""
    for heads, kv in ((8, 4), (4, 4), (4, 1)):
        rows = [
            f"{part} {i}"
            for k in range(kv)
            for part in [*(f"q{k * heads // kv + g}" for g in range(heads // kv)), f"k{k}", f"v{k}"]
            for i in (0, 1)
        ]
        config = {"num_attention_heads": heads, "num_key_value_heads": kv, "hidden_size": heads * 2}
        parts = internlm2.split_qkv(torch.arange(len(rows)), config)
        for letter, count, part in zip("qkv", (heads, kv, kv), parts, strict=True):
            assert [rows[i] for i in part] == [f"{letter}{head} {i}" for head in range(count) for i in (0, 1)]
        assert torch.equal(internlm2.join_qkv(parts, config), torch.arange(len(rows)))


def test_back_again_bit_for_bit(tiny, tmp_path):
    name, folder, _ = tiny
    config = internlm2.internlm2_config(read_json(folder / "config.json"))
    internlm2.weights_from_llama(folder, tmp_path, config)
    assert (tmp_path / "model.safetensors").read_bytes() == (DATA / f"tiny_{name}" / "model.safetensors").read_bytes()
    known = own(name).keys() - {"pretraining_tp", "transformers_version"}
    assert {key: config[key] for key in known} == {key: own(name)[key] for key in known}


def test_the_folder_is_ordinary_and_says_what_it_is(internlm2_as_llama):
    folder = internlm2_as_llama
    model.check_folder(folder)
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "origin.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert network.config.model_type == "llama"
    assert network.generation_config.eos_token_id == [2, 92542]
    assert len(tokenizer) == network.get_input_embeddings().num_embeddings == 92544
    form = model.chat_format(folder)
    for chat in EXPECTED["chats"]:
        found = tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=True, return_dict=False)
        assert found == form.prompt(chat["messages"]) == chat["ids"]
    assert model.origin(folder, "anything") == {"base_model": "internlm2-tiny", "license": "other"}
    assert not (folder / "README.md").exists()  # InternLM2's own card would speak of another layout


def test_a_whole_folder_goes_back_bit_for_bit(internlm2_folder, internlm2_as_llama, tmp_path):
    internlm2.from_llama(internlm2_as_llama, tmp_path / "own")
    assert equal(weights(tmp_path / "own"), weights(internlm2_folder))
    assert (tmp_path / "own" / "tokenizer.model").read_bytes() == (internlm2_folder / "tokenizer.model").read_bytes()
    config = read_json(tmp_path / "own" / "config.json")
    assert config["auto_map"]["AutoModelForCausalLM"].endswith("--modeling_internlm2.InternLM2ForCausalLM")
    known = read_json(internlm2_folder / "config.json").keys() - {"auto_map"}
    assert {key: config[key] for key in known} == {
        key: read_json(internlm2_folder / "config.json")[key] for key in known
    }
    assert internlm2.is_internlm2(tmp_path / "own")
    from jinja2 import Template

    tokenizer = read_json(tmp_path / "own" / "tokenizer_config.json")
    template = Template(tokenizer["chat_template"], keep_trailing_newline=True)
    for chat in EXPECTED["chats"]:
        assert template.render(bos_token="<s>", messages=chat["messages"], add_generation_prompt=True) == chat["prompt"]
    assert {
        int(i): token["content"] for i, token in tokenizer["added_tokens_decoder"].items() if int(i) > 2
    } == CONTROL_TOKENS


def many_shards(source: Path, target: Path) -> Path:
    """The same model with each tensor in a file of its own."""
    link(source, target, *(file.name for file in source.glob("*.safetensors*")))
    for i, (name, tensor) in enumerate(weights(source).items()):
        save_file({name: tensor}, target / f"part-{i:02}.safetensors")
    return target


CONVERT = """
import resource, sys
from pathlib import Path
import finetune.internlm2
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for function, source, target, *more in eval(sys.argv[1]):
    getattr(finetune.internlm2, function)(Path(source), Path(target), *more)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def child(*calls: tuple) -> list[str]:
    """Calls of functions of internlm2 in a process of their own, which prints by how many KB its memory has grown."""
    return [
        sys.executable,
        "-c",
        CONVERT,
        repr([tuple(str(x) if isinstance(x, Path) else x for x in c) for c in calls]),
    ]


def dies_at_the_third_shard(source: Path, target: Path) -> None:
    save, saved = internlm2.save_file, []

    def save_and_die(tensors: dict, part: Path, **more: dict) -> None:
        save(tensors, part, **more)
        saved.append(part)
        if len(saved) == 3:  # half of it is on the disk
            os.truncate(part, part.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    internlm2.save_file = save_and_die
    internlm2.to_llama(source, target, ORIGIN)


def test_killed_it_goes_on_and_ends_the_same(internlm2_folder, internlm2_as_llama, tmp_path):
    source, target = many_shards(internlm2_folder, tmp_path / "source"), tmp_path / "llama"
    new = tmp_path / "llama.tmp"
    assert apart(dies_at_the_third_shard, source, target) == -signal.SIGKILL
    assert not target.exists()
    done = {file: file.stat().st_mtime_ns for file in new.glob("*.safetensors")}
    assert len(done) == 2 < len(list(source.glob("*.safetensors")))
    internlm2.to_llama(source, target, ORIGIN)
    assert {file: (target / file.name).stat().st_mtime_ns for file in done} == done  # not made again
    assert not new.exists()
    assert equal(weights(target), weights(internlm2_as_llama))
    assert not list(target.glob("*.part"))
    AutoModelForCausalLM.from_pretrained(target)


def test_what_was_begun_from_another_source_is_not_gone_on_with(internlm2_folder, internlm2_as_llama, tmp_path):
    new = tmp_path / "llama.tmp"
    link(internlm2_as_llama, new)
    (new / "source").write_text("another")
    (new / "model-00001-of-00002.safetensors").unlink()
    save_file({}, new / "model-00001-of-00002.safetensors")
    internlm2.to_llama(internlm2_folder, tmp_path / "llama", ORIGIN)
    assert equal(weights(tmp_path / "llama"), weights(internlm2_as_llama))


def test_one_shard_is_in_memory_not_the_model(tmp_path):
    """Twelve layers of 20 MB in as many files, there and back: 240 MB, of which never more than two files' worth."""
    size, layers = 640, 12
    config = {**own("base"), "hidden_size": size, "intermediate_size": 5 * size // 2, "num_hidden_layers": layers}
    config |= {"vocab_size": internlm2.VOCABULARY // 8, "num_attention_heads": 8}
    source = tmp_path / "own"
    source.mkdir()
    shapes = {
        "attention.wqkv": (2 * size, size),
        "attention.wo": (size, size),
        "feed_forward.w2": (size, 5 * size // 2),
    }
    shapes |= dict.fromkeys(("feed_forward.w1", "feed_forward.w3"), (5 * size // 2, size))
    shapes |= dict.fromkeys(("attention_norm", "ffn_norm"), (size,))
    ends = {"model.norm.weight": (size,), "output.weight": (config["vocab_size"], size)}
    ends["model.tok_embeddings.weight"] = ends["output.weight"]
    for i in range(layers):
        layer = {f"model.layers.{i}.{name}.weight": torch.rand(shape) for name, shape in shapes.items()}
        save_file(layer, source / f"{i:02}.safetensors")
    for name, shape in ends.items():
        save_file({name: torch.rand(shape)}, source / f"{name}.safetensors")
    shard = max(file.stat().st_size for file in source.iterdir())
    total = sum(file.stat().st_size for file in source.iterdir())
    assert total > 8 * shard
    (tmp_path / "llama").mkdir()
    (tmp_path / "back").mkdir()
    there = ("weights_to_llama", source, tmp_path / "llama", config)
    back = ("weights_from_llama", tmp_path / "llama", tmp_path / "back", config)
    done = subprocess.run(child(there, back), cwd=ROOT, capture_output=True, text=True, check=True)
    grown = [1024 * int(line) for line in done.stdout.split()]
    assert len(grown) == 2
    assert max(grown) < 2.5 * shard
    assert equal(weights(tmp_path / "back"), weights(source))


def test_q_k_and_v_may_lie_in_different_shards(internlm2_folder, internlm2_as_llama, tmp_path):
    source = many_shards(internlm2_as_llama, tmp_path / "llama")
    internlm2.from_llama(source, tmp_path / "own")
    assert equal(weights(tmp_path / "own"), weights(internlm2_folder))


def test_a_base_in_internlm2s_layout_is_converted_once(internlm2_folder, internlm2_as_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    folder = model.base_folder(f"/no/where,{internlm2_folder}")  # the first source that answers
    assert folder.parent == tmp_path / "cache"
    assert equal(weights(folder), weights(internlm2_as_llama))
    assert model.origin(folder, str(internlm2_folder)) == {"base_model": "internlm2-tiny", "license": "other"}
    made = (folder / "config.json").stat().st_mtime_ns
    assert model.base_folder(str(internlm2_folder)) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    changed = link(internlm2_folder, tmp_path / "internlm2-tiny", "config.json")
    shutil.copy(internlm2_folder / "config.json", changed)
    assert model.base_folder(str(changed)) != folder


def test_a_cache_that_cannot_be_written_is_told(internlm2_folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError) as caught:
        model.base_folder(str(internlm2_folder))
    assert str(caught.value) == (
        f"internlm2-tiny could not be written to {tmp_path}/file/cache: Not a directory. Free some space there or set "
        "NAMESAKE_CACHE to another folder, then run the same command again: it goes on there."
    )


def test_what_the_command_wants_is_told(internlm2_folder, tmp_path):
    for arguments in ([], ["a"], ["a", "b", "c", "d"]):
        with pytest.raises(UserError, match=r"Write it as python -m finetune\.internlm2 FROM TO"):
            internlm2.main(arguments)
    with pytest.raises(UserError, match="is there already; choose another folder"):
        internlm2.main([str(internlm2_folder), str(tmp_path)])


def test_no_source_answers(tmp_path):
    with pytest.raises(UserError) as caught:
        model.base_folder(f"{tmp_path}/a,dir:{tmp_path}/b")
    assert list(caught.value.problems) == [  # each source's
        f"'{tmp_path}/a' is neither a folder nor a repo reference such as hf:user/name; check its spelling.",
        f"'{tmp_path}/b' is not a folder; check its spelling.",
    ]
    with pytest.raises(UserError, match=r"Did you mean internlm2-chat-1_8b\?"):
        model.base_folder("internlm2-chat-1.8b")


def test_a_source_of_pickles_alone_is_passed_over(internlm2_as_llama, tmp_path, monkeypatch):
    """A hub's: what can run code is not downloaded from there."""
    (tmp_path / "pulled").mkdir()
    (tmp_path / "pulled" / "config.json").write_text("{}")
    pull = model.pull
    monkeypatch.setattr(model, "pull", lambda ref, **_: tmp_path / "pulled" if ref.startswith("hf:") else pull(ref))
    assert model.base_folder(f"hf:user/name,{internlm2_as_llama}") == internlm2_as_llama
    with pytest.raises(UserError) as caught:
        model.base_folder("hf:user/name")
    assert str(caught.value) == (
        "hf:user/name holds no safetensors, only what can run code when loaded and is not downloaded: look for a revision of "
        "it that does (@refs/pr/1, say), or download it and give the folder."
    )


def test_a_preset_tries_its_sources_in_order_and_gives_the_model_its_hub_name(internlm2_folder, tmp_path, monkeypatch):
    asked = []

    def pull(ref: str, **_) -> Path:
        asked.append(ref)
        if ref.startswith("hf:"):
            raise UserError("the Hub does not answer")
        return internlm2_folder

    monkeypatch.setattr(model, "pull", pull)
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path))
    folder = model.base_folder("internlm2-chat-1_8b")
    assert asked == ["hf:internlm/internlm2-chat-1_8b", "modelscope:Shanghai_AI_Laboratory/internlm2-chat-1_8b"]
    assert model.origin(folder, "internlm2-chat-1_8b") == {
        "base_model": "internlm/internlm2-chat-1_8b",
        "license": "other",
    }


# --------------------------------------------------------------------------------------------------- models, refused


@pytest.fixture
def folder(internlm2_folder, tmp_path) -> Path:
    """A copy to be changed."""
    return link(internlm2_folder, tmp_path / "changed")


def edit_json(file: Path, **values) -> None:
    """Set keys; None removes one. Not in place: the file is linked."""
    content = {**read_json(file), **values}
    file.unlink()
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(folder: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        internlm2.to_llama(folder, tmp_path / "llama", ORIGIN)
    assert not (tmp_path / "llama").exists()
    return str(caught.value)


def test_pickles_are_refused_and_the_command_told_turns_them_into_safetensors(folder, internlm2_as_llama, tmp_path):
    for i, file in enumerate(sorted(folder.glob("*.safetensors"))):
        torch.save(load_file(file), folder / f"pytorch_model-{i}.bin")
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    told = refused(folder, tmp_path)
    assert told.startswith(
        f"The model folder {folder} has no *.safetensors; pytorch_model-0.bin, pytorch_model-1.bin can run code when loaded "
        "and is not read: to turn it into safetensors without running what is in it, type\n\npython -c "
    )
    command = told.split("\n\n")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    internlm2.to_llama(folder, tmp_path / "llama", ORIGIN)
    assert equal(weights(tmp_path / "llama"), weights(internlm2_as_llama))


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self):
        return Path.touch, (Path(self.file),)


def test_the_command_runs_nothing_that_a_pickle_brings(folder, tmp_path):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"model.norm.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    command = refused(folder, tmp_path).split("\n\n")[1].replace("python", sys.executable, 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode
    assert "Weights only load failed" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "values, words",
    [
        ({"vocab_size": 92550}, "says vocab_size 92550 and InternLM2's tokenizer has 92544 tokens"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_scaling {'type': 'yarn', 'factor': 2.0}, which InternLM2 does not know",
        ),
        ({"hidden_size": None, "num_hidden_layers": None}, "has no hidden_size, num_hidden_layers: fetch it again"),
        ({"num_hidden_layers": 3}, "7 missing and 0 unknown (missing: model.layers.2.attention.wo.weight, "),
        ({"num_hidden_layers": 1}, "0 missing and 7 unknown (unknown: model.layers.1.attention.wo.weight, "),
        ({"bias": None}, "4 missing and 0 unknown (missing: model.layers.0.attention.wo.bias, "),  # absent, it is true
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_words(folder, tmp_path, values, words):
    edit_json(folder / "config.json", **values)
    assert words in refused(folder, tmp_path)


def test_all_that_is_missing_is_told_at_once(folder, tmp_path):
    (folder / "tokenizer.model").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert refused(folder, tmp_path).splitlines() == [
        f"The model folder {folder} has no tokenizer.model.",
        f"The model folder {folder} lacks model-00002-of-00002.safetensors, which its index names: fetch them.",
    ]


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}, True),
        ({"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm"}, True),
        ({"architectures": ["InternLMForCausalLM"], "model_type": "internlm"}, False),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, False),
        ({}, False),
        ([], False),
        (None, False),
    ],
)
def test_internlm2_is_told_by_its_config(tmp_path, config, expected):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert internlm2.is_internlm2(tmp_path) is expected


def test_a_model_of_another_kind_has_no_such_layout(tiny_model, tmp_path):
    link(tiny_model, tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.model").touch()
    with pytest.raises(UserError, match="was not made from an InternLM2 model"):
        internlm2.from_llama(tmp_path / "llama", tmp_path / "own")


# ---------------------------------------------------------------------------------------------------------- adapters

MODULES = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
IDS = torch.tensor([[1, 92543, 1404, 364, 77, 40_000, 92542, 9]])


def xtuner_adapter(folder: Path, base: Path, rank: int = 4, **values) -> Path:
    """As XTuner leaves it: on all linear layers and, because its head is called "output", on that; strong, in float16."""
    matrices = {name.removesuffix(".weight"): weight for name, weight in weights(base).items()}
    lora = {}
    for name, weight in matrices.items():
        if name.endswith((*MODULES, "output")):
            lora[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, weight.shape[1]).half()
            lora[f"base_model.model.{name}.lora_B.weight"] = (torch.randn(weight.shape[0], rank) * 0.05).half()
    folder.mkdir()
    save_file(lora, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "internlm/internlm2-chat-1_8b"}
    config |= {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "r": rank}
    config |= {"layers_pattern": None, "layers_to_transform": None, "lora_alpha": 16, "lora_dropout": 0.1}
    config |= {"modules_to_save": None, "peft_type": "LORA", "rank_pattern": {}, "revision": None}
    config |= {"target_modules": ["w2", "w3", "wo", "output", "wqkv", "w1"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))
    return folder


def added_in_its_own_layout(base: Path, adapter: Path, target: Path) -> Path:
    """W + alpha / r * B A on InternLM2's own matrices, by hand; then the network of `to_llama`, which is proved above."""
    link(base, target, *(file.name for file in base.glob("*.safetensors*")))
    config, lora, merged = read_json(adapter / "adapter_config.json"), weights(adapter), weights(base)
    for name in (name for name in lora if ".lora_A." in name):
        matrix = name.removeprefix("base_model.model.").replace(".lora_A", "")
        b, a = lora[name.replace("lora_A", "lora_B")].float(), lora[name].float()
        merged[matrix] = merged[matrix] + config["lora_alpha"] / config["r"] * b @ a
    save_file(merged, target / "model.safetensors")
    (target / "llama").mkdir()
    own = read_json(base / "config.json")
    internlm2.weights_to_llama(target, target / "llama", own)
    (target / "llama" / "config.json").write_text(json.dumps(internlm2.llama_config(own)))
    return target / "llama"


def logits(network) -> torch.Tensor:
    with torch.inference_mode():
        return network(IDS).logits


def test_an_adapter_of_xtuners_is_read(internlm2_folder, internlm2_as_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "inference_dtype", lambda: torch.float32)
    theirs = xtuner_adapter(tmp_path / "theirs", internlm2_folder)
    internlm2.convert_adapter(theirs, tmp_path / "ours", internlm2_as_llama)
    base = AutoModelForCausalLM.from_pretrained(internlm2_as_llama).eval()
    expected = logits(
        AutoModelForCausalLM.from_pretrained(added_in_its_own_layout(internlm2_folder, theirs, tmp_path / "sum"))
    )
    assert (logits(base) - expected).abs().max() > 1
    with pytest.raises(UserError, match="is for InternLM2's own layout: convert it with"):
        model.load_adapter(base, theirs, internlm2_as_llama)
    tuned = model.load_adapter(base, tmp_path / "ours", internlm2_as_llama)
    torch.testing.assert_close(logits(tuned), expected, rtol=0, atol=1e-4)
    merged = model.load_merged(internlm2_as_llama, tmp_path / "ours")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    config = read_json(tmp_path / "ours" / "adapter_config.json")
    assert config["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "lm_head",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 16, 0.1)
    assert read_json(tmp_path / "ours" / model.ADAPTER_RECORD) == {
        "base": "internlm2-tiny",
        "base_sha256": model.fingerprint(internlm2_as_llama),
    }

    internlm2.convert_adapter(tmp_path / "ours", tmp_path / "back", internlm2_as_llama)
    names = [folder / "adapter_model.safetensors" for folder in (theirs, tmp_path / "back")]
    assert names[0].read_bytes() == names[1].read_bytes()
    config = read_json(tmp_path / "back" / "adapter_config.json")
    assert config["target_modules"] == ["output", "w1", "w2", "w3", "wo", "wqkv"]
    assert config.keys() <= read_json(theirs / "adapter_config.json").keys()  # which their PEFT knows
    assert (config["r"], config["lora_alpha"]) == (4, 16)


@pytest.fixture
def ours(internlm2_as_llama, tmp_path) -> Path:
    """An adapter as a run leaves it, where q, k and v have an A each; strong."""
    from finetune.checkpoint import save_adapter

    torch.manual_seed(1)
    tuned = model.add_lora(AutoModelForCausalLM.from_pretrained(internlm2_as_llama), 4)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    record = {"base": "internlm2-tiny", "base_sha256": model.fingerprint(internlm2_as_llama), "format_hash": "f"}
    save_adapter(tuned, record, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_of_ours_is_written_for_xtuner(ours, internlm2_folder, internlm2_as_llama, tmp_path):
    internlm2.convert_adapter(ours, tmp_path / "theirs", internlm2_as_llama)
    tuned = model.load_adapter(AutoModelForCausalLM.from_pretrained(internlm2_as_llama), ours, internlm2_as_llama)
    added = added_in_its_own_layout(internlm2_folder, tmp_path / "theirs", tmp_path / "sum")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(added)), logits(tuned), rtol=0, atol=1e-4)
    config, lora = read_json(tmp_path / "theirs" / "adapter_config.json"), weights(tmp_path / "theirs")
    assert config["target_modules"] == ["w1", "w2", "w3", "wo", "wqkv"]
    assert (config["r"], config["lora_alpha"]) == (12, 24)
    assert {tensor.shape["lora_B" in name] for name, tensor in lora.items()} == {12}  # LMDeploy reads one rank for all

    internlm2.convert_adapter(tmp_path / "theirs", tmp_path / "back", internlm2_as_llama)
    assert equal(weights(tmp_path / "back"), weights(ours))
    config, old = (read_json(folder / "adapter_config.json") for folder in (tmp_path / "back", ours))
    assert (config["r"], config["lora_alpha"]) == (old["r"], old["lora_alpha"]) == (4, 8)
    assert read_json(tmp_path / "back" / model.ADAPTER_RECORD) == read_json(ours / model.ADAPTER_RECORD)


def test_read_without_our_record_it_gives_the_same(ours, internlm2_as_llama, tmp_path):
    """Somebody may have kept PEFT's two files alone."""
    internlm2.convert_adapter(ours, tmp_path / "theirs", internlm2_as_llama)
    (tmp_path / "theirs" / model.ADAPTER_RECORD).unlink()
    internlm2.convert_adapter(tmp_path / "theirs", tmp_path / "back", internlm2_as_llama)
    found = [
        logits(
            model.load_adapter(AutoModelForCausalLM.from_pretrained(internlm2_as_llama), adapter, internlm2_as_llama)
        )
        for adapter in (ours, tmp_path / "back")
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"use_dora": True}, "is no plain LoRA (use_dora True)"),
        ({"rank_pattern": {"wqkv": 8}, "bias": "all"}, "is no plain LoRA (rank_pattern {'wqkv': 8}, bias all)"),
        ({"peft_type": "IA3"}, "is no plain LoRA (peft_type IA3)"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(internlm2_folder, internlm2_as_llama, tmp_path, values, words):
    theirs = xtuner_adapter(tmp_path / "theirs", internlm2_folder, **values)
    with pytest.raises(UserError) as caught:
        internlm2.convert_adapter(theirs, tmp_path / "ours", internlm2_as_llama)
    assert words in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_an_adapter_that_does_not_fit_the_base_is_refused(internlm2_as_llama, tmp_path):
    other = xtuner_adapter(tmp_path / "theirs", DATA / "tiny_base")
    with pytest.raises(UserError) as caught:
        internlm2.convert_adapter(other, tmp_path / "ours", internlm2_as_llama)
    assert str(caught.value).startswith(
        f"The adapter in {other} does not fit {internlm2_as_llama}: "
        "base_model.model.model.layers.0.attention.wo.lora_A.weight is [4, 64], the matrix [32, 32]; "
    )
    assert str(caught.value).endswith("Name the base it was made for.")


def test_an_adapter_of_pickles_is_refused_and_the_command_told_converts_it(
    internlm2_folder, internlm2_as_llama, tmp_path
):
    theirs = xtuner_adapter(tmp_path / "theirs", internlm2_folder)
    file = theirs / "adapter_model.safetensors"
    torch.save(load_file(file), theirs / "adapter_model.bin")  # what XTuner's PEFT wrote
    expected = file.read_bytes()
    file.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.bin can run code when loaded and is not read") as caught:
        internlm2.convert_adapter(theirs, tmp_path / "ours", internlm2_as_llama)
    command = str(caught.value).split("\n\n")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    internlm2.convert_adapter(theirs, tmp_path / "ours", internlm2_as_llama)
    internlm2.convert_adapter(tmp_path / "ours", tmp_path / "back", internlm2_as_llama)
    assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes() == expected
