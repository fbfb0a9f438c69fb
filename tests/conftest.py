"""What several test files share: a tiny model that is made here, in a second, the same in each session."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from servers import GitServer, Hub

if "PYTEST_XDIST_WORKER" in os.environ:  # workers enough: more threads only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>", "<|tool_call|>", "[INST]"]
SIZE, PATCH, WIDTH, HEADS = 28, 7, 16, 2  # of the tiny CLIP: 16 patches
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Test files, the longest first.
LONG = ["app", "vision", "space", "pipeline", "train", "methods", "preview", "merge", "readme"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One file takes a worker as long as most of the others together: it is begun first. Then the quick files, then those that
    take long, the longest first, so that all workers end at about one time."""
    order = {"test_default": -1} | {f"test_{name}": place for place, name in enumerate(LONG, 1)}
    items.sort(key=lambda item: order.get(item.path.stem, 0))


def pytest_collection_finish() -> None:
    if commands := sys.modules.get("commands"):
        commands.begin()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary folder: a random Llama of two layers that speaks ChatML, and a tokenizer of bytes and control tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    end = tokenizer.token_to_id("<|im_end|>")
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        tie_word_embeddings=False,  # tied, a random model says the last token again and again
        initializer_range=0.3,  # greedy tokens stand out beyond rounding
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def brief_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a quarter of the context, a quarter of which an answer may take: a random one seldom ends by itself."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("brief") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP vision tower of three layers, as an ordinary folder."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        initializer_factor=20.0,
    )
    folder = tmp_path_factory.mktemp("clip") / "clip-tiny"
    CLIPVisionModel(config).save_pretrained(folder)
    settings = {"size": {"shortest_edge": SIZE}, "crop_size": SIZE, "resample": 3}
    settings |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The real embedded default, in the cache of whoever runs the tests; fetched and made if it is not there."""
    from finetune import embedded

    return embedded.folder()


@pytest.fixture(scope="session")
def internlm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InternLM2 in its own layout, tiny and random, with the real tokenizer; two shards."""
    import torch
    from safetensors.torch import save_file

    heads, kv_heads, size, inner, vocabulary = 4, 2, 32, 64, 92544
    torch.manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape) * 0.3

    shards = [{"model.tok_embeddings.weight": matrix(vocabulary, size)}, {"output.weight": matrix(vocabulary, size)}]
    for i, shard in enumerate(shards):
        layer = {
            "attention.wqkv": matrix((heads + 2 * kv_heads) * size // heads, size),
            "attention.wo": matrix(size, size),
            "attention_norm": torch.rand(size) + 0.5,
            "feed_forward.w1": matrix(inner, size),
            "feed_forward.w2": matrix(size, inner),
            "feed_forward.w3": matrix(inner, size),
            "ffn_norm": torch.rand(size) + 0.5,
        }
        shard |= {f"model.layers.{i}.{name}.weight": weight for name, weight in layer.items()}
    shards[1]["model.norm.weight"] = torch.rand(size) + 0.5
    folder = tmp_path_factory.mktemp("internlm2") / "internlm2-tiny"
    folder.mkdir()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": size,
        "intermediate_size": inner,
        "max_position_embeddings": 1024,
        "model_type": "internlm2",
        "num_attention_heads": heads,
        "num_hidden_layers": len(shards),
        "num_key_value_heads": kv_heads,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "torch_dtype": "float32",
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    shutil.copy(Path(__file__).parent / "data" / "internlm2" / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="session")
def internlm2_as_llama(internlm2_folder: Path) -> Path:
    """The same, converted."""
    from finetune.internlm2 import to_llama

    to_llama(internlm2_folder, internlm2_folder.parent / "llama", {"base_model": "internlm2-tiny", "license": "other"})
    return internlm2_folder.parent / "llama"


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """A home, a cache and git settings of this test's own, no token, no proxy, short waits."""
    for name in list(os.environ):
        if re.match(
            r"(HF_|HUGGING|OPENXLAB|MODELSCOPE|GIT_|XDG_|SSH_|NAMESAKE|HTTPS?_PROXY|ALL_PROXY|https?_proxy)", name
        ):
            monkeypatch.delenv(name)
    (home := tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    from finetune import transfer

    monkeypatch.setattr(transfer, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(transfer, "_secrets", set())
    return tmp_path


@pytest.fixture(scope="session")
def package(tiny_model):
    """What a publish sends: the tiny model with a manifest, as name -> Source."""
    return package_of(tiny_model)


def package_of(model: Path) -> dict:
    from finetune import embedded, transfer

    files = {f.name: transfer.Source(f, f.stat().st_size, embedded.sha256(f)) for f in model.iterdir()}
    files["README.md"] = transfer.source("---\nlicense: mit\n---\n# 小星\n".encode())
    return with_manifest(files)


def with_manifest(files: dict, **more) -> dict:
    from finetune import transfer

    manifest = {
        "name": "小星",
        "format_hash": "0" * 64,
        "files": {n: {"size": s.size, "sha256": s.sha256} for n, s in files.items()},
        **more,
    }
    return {**files, "manifest.json": transfer.source(json.dumps(manifest).encode())}


@pytest.fixture
def server(world):
    """A git server with LFS where "user" may write."""
    (world / "served").mkdir()
    with GitServer(world / "served", {"user": "git-canary-token"}) as server:
        yield server


@pytest.fixture
def hf(world, monkeypatch):
    """A small Hugging Face hub, and its token in the environment."""
    from huggingface_hub import constants

    with Hub(world / "hf") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server
