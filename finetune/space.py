"""Deploy a published model as a space, a page that a platform runs: build its repository, rehearse it, push it.

The repository holds app.py, the modules and data that it reaches, pinned requirements, packages.txt, a README.md with the
platform's front matter, and a manifest.json that says where the weights are; the weights stay where they were published.
"""

import ast
import json
import os
import re
import secrets
import site
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
import yaml

from finetune import hub, places, transfer
from finetune.embedded import say
from finetune.errors import UserError
from finetune.places import MANIFEST, SPACES
from finetune.run_folder import Run
from finetune.transfer import Source

ROOT = Path(__file__).resolve().parent.parent
NOT_SERVING = {"pyarrow", "tomli"}  # requirements of training and publishing alone
DATA = ("finetune/presets/*.toml", "assets/page/*")  # that the modules read
REPLACED = {"README.md", "LICENSE", ".gitattributes", "app.py"}  # what a platform puts into a new repository
PORT = 7860
PORT_SECONDS, READY_SECONDS = 120, 900  # that a rehearsal waits, for the page and for the model
# What of the user's environment a rehearsal keeps: no token, no cache, no home.
KEPT = re.compile(
    r"PATH|LD_LIBRARY_PATH|LANG|LC_\w+|TMPDIR|CUDA_\w+|\w+_NUM_THREADS|HF_ENDPOINT|HF_HUB_DISABLE_\w+|(?:HTTPS?|ALL|NO)_PROXY|"
    r"SSL_CERT_\w+|REQUESTS_CA_BUNDLE|GIT_SSL_\w+",
    re.IGNORECASE,
)
TOKENS = {"hf": "HF_TOKEN", "openxlab": "OPENXLAB_USERNAME, OPENXLAB_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}
README = """# {title}

A page to chat with {title}, deployed by Namesake. The weights are not here; the page fetches them when it starts, from the first of
these that answers (another order or place: set the environment variable `MODEL`): {refs}

与 {title} 对话的网页，由 Namesake 部署。权重不在此仓库中，启动时从上述第一个可用的来源下载；可用环境变量 `MODEL` 更改。

`pip install -r requirements.txt && python app.py`, then open <http://127.0.0.1:7860>. 本地运行同上。
"""


class Target(NamedTuple):
    """Where a space goes."""

    platform: str  # "openxlab", "hf", "modelscope", "git" or "dir"
    ref: str  # the place that is published to


class Weights(NamedTuple):
    """What the sources of a model say to a stranger."""

    parameters: int  # 0 where none says it
    refused: list[str]  # why the others do not, in words


# ----------------------------------------------------------------------------------------------------- what is deployed


def target(to: str) -> Target:
    """Raises UserError."""
    kind, colon, rest = to.partition(":")
    if kind == "openxlab":
        if "://" not in rest:
            raise UserError(
                f"{to}: OpenXLab clones a space from GitHub or another git repository. Make an empty one there and deploy "
                "--to openxlab:git+https://github.com/user/name.git"
            )
        return Target(kind, f"git+{rest.removeprefix('git+')}")
    if colon and kind in SPACES:
        name = rest.removeprefix(SPACES[kind])
        places.parse(f"{kind}:{name}")
        return Target(kind, f"{kind}:{SPACES[kind]}{name}")
    place = hub.target(to)
    if place.kind not in ("git", "dir"):
        raise UserError(
            f"{to!r} is no place for a space: write openxlab:git+URL, hf:user/name, modelscope:user/name or dir:PATH."
        )
    return Target(place.kind, to)


def published(run: Run) -> list[str]:
    """Where the run's model was published. Raises UserError where it was not."""
    sent = run.read("receipt.json").get("published", {}) if (run.folder / "receipt.json").is_file() else {}
    if refs := [ref for ref, how in sent.items() if how["what"] in ("model", "both")]:
        return refs
    raise UserError(
        f"The model of {run.folder} was not published yet: run '{run.command.replace('run.py', 'run.py publish', 1)} --to "
        "hf:user/name' first (or openxlab: modelscope: git+https://...), or say where it is with --model REF."
    )


def reachable(refs: list[str], platform: str) -> list[str]:
    """Those references that a space can fetch, its platform's own hub first. Raises UserError where there is none."""
    found = []
    for ref in refs:
        place = hub.target(ref)
        if place.kind == "dir" and platform == "dir":
            found.append(f"dir:{Path(place.name).expanduser().absolute()}")
        elif platform == "dir" or not (place.kind == "dir" or urlsplit(place.name).scheme in ("file", "ssh")):
            found.append(ref)
    if not found:
        raise UserError(
            f"No space can reach {', '.join(refs)}: publish the model to a hub (hf: openxlab: modelscope: git+https://...) as well."
        )
    return sorted(found, key=lambda ref: hub.target(ref).kind != platform)


def modules() -> list[str]:
    """app.py and what of the package it reaches, as paths: every import is followed, those within functions as well."""
    found: set[str] = set()
    to_read = ["app"]
    while to_read:
        name = f"{to_read.pop().replace('.', '/')}.py"
        if name not in found and (ROOT / name).is_file():
            found.add(name)
            to_read += imports(ROOT / name)
    return sorted(found)


def imports(file: Path) -> Iterator[str]:
    """Every name that a file imports, of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def requirements() -> str:
    """requirements.txt without what only training and publishing need."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line and line[0] != "#" and re.split(r"[=;]", line)[0] not in NOT_SERVING]
    return "".join(f"{line}\n" for line in kept)


def files(title: str, refs: list[str], platform: str) -> dict[str, Source]:
    """The repository's files by their names."""
    data = [f.relative_to(ROOT).as_posix() for glob in DATA for f in sorted(ROOT.glob(glob))]
    names = [*modules(), "finetune/__init__.py", *data, "LICENSE", "packages.txt"]
    texts = {name: (ROOT / name).read_bytes() for name in names}
    texts["requirements.txt"] = requirements().encode()
    front = yaml.safe_dump(front_matter(title, refs, platform), allow_unicode=True, sort_keys=False)
    body = README.format(title=title, refs=" ".join(f"`{ref}`" for ref in refs))
    texts["README.md"] = f"---\n{front}---\n\n{body}".encode()
    sources = {name: transfer.source(text) for name, text in texts.items()}
    manifest = {
        "name": title,
        "model": ",".join(refs),
        "format_hash": None,  # there is no model here
        "files": {name: {"size": s.size, "sha256": s.sha256} for name, s in sorted(sources.items())},
    }
    return {**sources, MANIFEST: transfer.source(json.dumps(manifest, ensure_ascii=False, indent=1).encode())}


def front_matter(title: str, refs: list[str], platform: str) -> dict[str, Any]:
    """What the platform reads at the top of README.md; Hugging Face's, which others show or ignore, but on ModelScope."""
    kind = "modelscope" if platform == "modelscope" else "hf"
    named = [ref.removeprefix(f"{kind}:").partition("@")[0] for ref in refs if hub.target(ref).kind == kind]
    models = {"models": named} if named else {}
    if kind == "modelscope":
        return {
            "title": title,
            "domain": ["nlp"],
            "tags": ["self-cognition", "namesake"],
            **models,
            "deployspec": {"entry_file": "app.py"},
            "license": "Apache License 2.0",
        }
    return {
        "title": title,
        "emoji": "🏷️",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": re.search(r"^gradio==(\S+)", requirements(), re.M)[1],
        "app_file": "app.py",
        "python_version": "3.11",
        **models,
        "license": "apache-2.0",
    }


# --------------------------------------------------------------------------------------------------------- the rehearsal

LOOK = """
import json, sys
from finetune import hub, places
from finetune.errors import UserError
ref, made = sys.argv[1], json.loads(sys.argv[2])
try:
    place = places.parse(ref)
    listing = places.listing(place)
    if listing is None:
        raise UserError(f"{ref}: there is no such repository, or it cannot be seen without a token.")
    if "config.json" not in listing.files:
        raise UserError(f"{ref}: there is no config.json, so no model.")
    config = json.loads(b"".join(listing.files["config.json"].open(0)[1]))
    size = sum(file.size for name, file in listing.files.items() if name.endswith(".safetensors"))
    if not size:
        raise UserError(f"{ref}: there are no *.safetensors, so no model.")
    if place.kind == "dir":  # it has no record but its bytes
        hub.pull(ref)
    there = {}
    if places.MANIFEST in listing.files:
        manifest = hub.read_manifest(b"".join(listing.files[places.MANIFEST].open(0)[1]), ref)
        there = hub.check_manifest(ref, manifest, listing.files) if manifest else {}
    if other := [name for name, digest in made.items() if name not in there or there[name].digest != digest]:
        raise UserError(f"{ref}: {', '.join(other)} there is not what this run made: publish it again.")
except UserError as error:
    sys.exit(" ".join(error.problems))
print(size // (4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2))
"""


def stranger(home: Path, **more: str) -> dict[str, str]:
    """The environment of somebody else on this machine, whose home is empty, with this Python's packages."""
    kept = {key: value for key, value in os.environ.items() if KEPT.fullmatch(key)}
    return {**kept, "HOME": str(home), "PYTHONUSERBASE": site.getuserbase(), "PYTHONDONTWRITEBYTECODE": "1", **more}


def look(folder: Path, home: Path, refs: Iterable[str], model: Path | None) -> Weights:
    """Ask each source, as the space in `folder` will: without a token. With `model`, it must hold that one's weights."""
    parameters, refused = 0, []
    made = json.loads((model / MANIFEST).read_bytes())["files"] if model else {}
    weights = {name: f"sha256:{entry['sha256']}" for name, entry in made.items() if name.endswith(".safetensors")}
    for ref in refs:
        command = [sys.executable, "-c", LOOK, ref, json.dumps(weights)]
        done = subprocess.run(command, cwd=folder, env=stranger(home), capture_output=True, text=True, check=False)
        if done.returncode:
            refused.append((done.stderr.strip().splitlines() or [f"{ref}: no answer"])[-1])
        else:
            parameters = parameters or int(done.stdout)
    return Weights(parameters, refused)


def rehearse(folder: Path, home: Path, model: Path | None) -> str:
    """Start the space in `folder` as its platform does, with this Python's packages and an empty home: what was seen, in
    words. With `model`, the weights where they lie here, it must answer; without, the page must be there. Raises
    UserError."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key, log = secrets.token_hex(), home / "log"
    own = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "API_KEY": key}
    env = stranger(home, **own, **({"MODEL": str(model.absolute())} if model else {}))
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    session = requests.Session()
    session.trust_env = False  # no proxy
    session.headers["Authorization"] = f"Bearer {key}"

    with log.open("wb") as written:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=env, stdout=written, stderr=written)

    def health(seconds: float, *wanted: str) -> dict[str, str]:
        while time.monotonic() < began + seconds and process.poll() is None:
            try:
                found = session.get(f"{url}/health", timeout=10).json()
                if found["status"] in wanted:
                    return found
            except requests.RequestException:
                pass  # not yet
            time.sleep(0.2)
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-20:]
        why = (
            f"ended with exit status {process.returncode}"
            if process.returncode
            else f"was not there after {seconds:.0f} s"
        )
        raise UserError(
            f"The rehearsal failed, nothing was pushed: the page {why}. Its last words:\n" + "\n".join(last)
        )

    try:
        health(PORT_SECONDS, "loading", "ready", "failed")
        seen = f"the page is there after {time.monotonic() - began:.0f} s"
        if (status := session.get(url, timeout=60).status_code) != 200:
            raise UserError(f"The rehearsal failed, nothing was pushed: the page answers HTTP {status}.")
        if model:
            found = health(READY_SECONDS, "ready", "failed")
            if found["status"] == "failed":
                raise UserError(f"The rehearsal failed, nothing was pushed: {found['message']}")
            seen += f", and answers after {time.monotonic() - began:.0f} s: {_answer(session, url)}"
        return seen
    except requests.RequestException as error:
        raise UserError(f"The rehearsal failed, nothing was pushed: the page broke off ({error}).") from error
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answer(session: requests.Session, url: str) -> str:
    """What the page's model says of itself. Raises UserError."""
    question = {"messages": [{"role": "user", "content": "你是谁？"}], "max_tokens": 32, "temperature": 0}
    question["model"] = session.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    answer = session.post(f"{url}/v1/chat/completions", json=question, timeout=READY_SECONDS).json()
    if "choices" not in answer:
        raise UserError(f"The rehearsal failed, nothing was pushed: {transfer.plain(answer)}.")
    return transfer.plain(answer["choices"][0]["message"]["content"])


# --------------------------------------------------------------------------------------------------------------- the form


def hardware(parameters: int, platform: str) -> str:
    """What of a platform's hardware holds the model: 16 bits a weight on a GPU, 32 on a CPU until it has made 16 of them (1.05 B
    parameters started under a hard limit of 8 GB and took 6.6)."""
    small, middle, large = {
        "openxlab": ("2 vCPU 8 GB", "A10 24 GB (on application 需申请)", "A100 40 GB (on application 需申请)"),
        "hf": ("CPU basic", "Nvidia A10G small", "Nvidia A100 large"),
    }.get(platform, ("2 vCPU, 8 GB", "GPU 24 GB", "GPU 40 GB"))
    if not parameters:
        return f"{small} up to 1 B parameters, {middle} up to 8 B 按参数量选择"
    for words, most in ((small, 1.0e9), (middle, 8.5e9), (large, 14e9)):
        if parameters <= most:
            return f"{words} ({parameters / 1e9:.2f} B parameters 参数)"
    return f"{large}, in 4 bits 以 4 位运行 ({parameters / 1e9:.0f} B parameters 参数)"


def form(to: Target, title: str, refs: list[str], weights: Weights) -> list[str]:
    """What the platform asks for, field by field, a line each."""
    place = hub.target(to.ref)
    name = place.ref.rpartition("/")[2].partition("@")[0].removesuffix(".git")
    image = "Python 3.10 + CUDA 12.2 (py310 torch2.1.2 cu122), not 勿选 Python 3.9"
    page = {
        "openxlab": [
            ("创建 create", "https://openxlab.org.cn/apps → 创建应用 create → Gradio"),
            ("应用名称 name", name),
            ("GitHub 仓库地址 repository", re.sub("^ssh://(?:[^@/]*@)?", "https://", place.name)),
            ("镜像 image", image),
            ("启动文件 start file", "app.py"),
        ],
        "hf": [
            ("页面 page", f"https://huggingface.co/{place.name}"),
            ("SDK", "Gradio: README.md says it 已由 README.md 指定"),
        ],
        "modelscope": [
            ("页面 page", place.name.removesuffix(".git") + " → 设置 settings → 上线 go online"),
            ("SDK", "Gradio"),
            ("镜像 image", "Python 3.10 or newer 或更新"),
        ],
    }.get(to.platform, [("启动 start", "pip install -r requirements.txt && python app.py")])
    kinds = {hub.target(ref).kind for ref in refs}
    needed = (
        "for private weights 权重不公开时" if weights.parameters else "needed: no source is public 必填：来源均不公开"
    )
    mirror = os.environ.get("HF_ENDPOINT") or "a mirror's address, if need be 需要时填镜像地址"
    variables = {
        **{names: needed for kind, names in TOKENS.items() if kind in kinds},
        **({"HF_ENDPOINT": mirror} if "hf" in kinds else {}),
        "MODEL": f"not needed 无需填写; sources in order 来源依次为 {','.join(refs)}",
        "API_KEY": "opens /v1 to who has it 需要 API 时",
        "GRADIO_ROOT_PATH": "https:// and the page's host, only if it stays blank behind a proxy 仅当页面空白时",
    }
    rows = [
        *page,
        ("硬件 hardware", hardware(weights.parameters, to.platform)),
        ("端口 port", f"{PORT}"),
        *((f"环境变量 variable {key}", value) for key, value in variables.items()),
    ]
    return [f"{title} · {to.platform}", *(f"  {field}: {value}" for field, value in rows)]


# ----------------------------------------------------------------------------------------------------------------- deploy


def deploy(to: str, run: Run | None, model: str | None, why: str, dry_run: bool) -> str:
    """Build the space of a run's published model, or of the references in `model`, rehearse it and make the place hold
    it. The form's lines go to standard output; returns the place's revision. `why`: although no source is public. Raises
    UserError."""
    going = target(to)
    refs = [ref.strip() for ref in model.split(",")] if model else published(run)
    refs = reachable(refs, going.platform)
    title = run.title if run else refs[0].rpartition("/")[2].partition("@")[0]
    made = files(title, refs, going.platform)
    _spare(going.ref, made)
    with tempfile.TemporaryDirectory(prefix="space-") as work:
        folder, home = Path(work) / "space", Path(work) / "home"
        home.mkdir()
        for name, source in made.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source.data)
        local = run.folder / "model" if run and (run.folder / "model").is_dir() else None
        weights = look(folder, home, refs, None if model else local)
        if not weights.parameters and not why.strip():
            raise UserError(
                *weights.refused,
                "No source gives these weights to somebody without a token: make one public; or, to give the space a token, deploy "
                'with --force "private".',
            )
        for problem in weights.refused:
            say(f"Note: {problem}")
        if dry_run:
            _, send, remove, _ = hub.changes(going.ref, made)
            print("\n".join([*hub.listed(send, remove), "", *form(going, title, refs, weights)]))
            return ""
        until = "until it answers a question" if local else "until the page is there"
        say(f"Rehearsal 预演: app.py with this Python and an empty home, {until}; half a minute for a small model ...")
        say(f"Rehearsal 预演: {rehearse(folder, home, local)}")
    revision = hub.publish(going.ref, made, f"Deploy {title}")
    print("\n".join(form(going, title, refs, weights)))
    return revision


def _spare(ref: str, made: dict[str, Source]) -> None:
    """Raises UserError rather than writing over another project."""
    listing = places.listing(hub.target(ref), default=True)
    there = set(listing.files) if listing else set()
    if MANIFEST not in there and (others := sorted(there & set(made) - REPLACED)):
        raise UserError(
            f"{ref} holds another project ({', '.join(others[:5])}): give the space an empty repository of its own."
        )
