"""Deploy: what a space's repository holds, its rehearsal, the platforms' forms; and OpenXLab's own procedure, from the clone to an
answer in a real Chromium."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from conftest import package_of
from servers import Hub, closed_port, git, log_in, mkdir, redirect
from test_app import CHROMIUM, FLAGS, PATIENCE, until

import app
from finetune import hub, run, space, transfer
from finetune.errors import UserError
from finetune.run_folder import Run
from finetune.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
TRAINING = {
    "train",
    "stages",
    "run",
    "identity",
    "scorecard",
    "merge",
    "records",
    "release",
    "report",
    "tasks",
    "space",
}


def built(folder: Path, *refs: str, platform: str = "hf") -> Path:
    for name, source in space.files("小星", list(refs), platform).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source.data)
    return folder


# ---------------------------------------------------------------------------------------------------------- its contents


def test_it_carries_what_it_imports_and_no_training(tmp_path):
    """The rehearsal's test shows that it runs."""
    folder = built(tmp_path / "space", "hf:user/x")
    carried = {file.stem for file in (folder / "finetune").glob("*.py")} - {"__init__"}
    assert not carried & TRAINING
    lines = "\n".join(file.read_text() for file in folder.rglob("*.py"))
    named = re.findall(r"^ *(?:from finetune\.(\w+) import|from finetune import ([\w, ]+))", lines, re.M)
    words = {word for one, several in named for word in re.findall(r"\w+", one or re.sub(r" as \w+", "", several))}
    assert words == carried
    assert (folder / "finetune" / "presets" / "bases.toml").is_file()  # an internlm2-chat-7b may be asked for by MODEL


def test_no_weights_and_all_small(tmp_path):
    folder = built(tmp_path / "space", "hf:user/x")
    assert {f.suffix for f in folder.rglob("*") if f.is_file()} <= {
        ".py",
        ".toml",
        ".txt",
        ".md",
        ".json",
        ".css",
        ".js",
        "",
    }
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 1_000_000
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_its_requirements_resolve_and_hold_all_that_it_imports(python, tmp_path):
    """Against the package index; nothing is installed."""
    folder = built(tmp_path / "space", "hf:user/x")
    assert set((folder / "requirements.txt").read_text().splitlines()) < set(
        (ROOT / "requirements.txt").read_text().splitlines()
    )
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--python-version", python, "--python-platform"]
    done = subprocess.run(
        [*command, "x86_64-manylinux_2_28", "requirements.txt"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    there = set(re.findall(r"^([\w.-]+)==", done.stdout, re.M))
    wanted = {name.split(".")[0] for file in folder.rglob("*.py") for name in space.imports(file)}
    wanted -= {*sys.stdlib_module_names, "finetune"}
    packages = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub", "PIL": "pillow"}
    assert packages.keys() <= wanted
    assert {packages.get(name, name) for name in wanted} <= there
    assert {"bitsandbytes", "gguf"} <= there  # which transformers imports: 4 bits, the embedded default model
    assert not there & {"pyarrow", "pytest"}


def test_it_knows_where_its_weights_are(tmp_path):
    folder = built(tmp_path / "space", "hf:user/x", "openxlab:user/x")
    assert app.deployed(folder) == "hf:user/x,openxlab:user/x"
    assert app.deployed() is None  # this repository is no space


def front(source) -> dict:
    return yaml.safe_load(source.data.decode().split("---")[1])


def test_front_matter():
    refs = ["modelscope:user/x@v1", "hf:user/y"]
    ours = front(space.files("小星", refs, "hf")["README.md"])
    assert ours["models"] == ["user/y"]
    assert (ours["sdk"], ours["app_file"], ours["title"]) == ("gradio", "app.py", "小星")
    assert f"gradio=={ours['sdk_version']}\n" in space.requirements()
    theirs = front(space.files("小星", refs, "modelscope")["README.md"])
    assert theirs["models"] == ["user/x"]
    assert theirs["deployspec"] == {"entry_file": "app.py"}


# ------------------------------------------------------------------------------------------------------- where it goes


@pytest.mark.parametrize(
    ("to", "platform", "ref"),
    [
        ("hf:user/x", "hf", "hf:spaces/user/x"),
        ("hf:spaces/user/x", "hf", "hf:spaces/user/x"),
        ("modelscope:user/x", "modelscope", "modelscope:studios/user/x"),
        ("openxlab:git+https://example.com/user/x.git", "openxlab", "git+https://example.com/user/x.git"),
        ("openxlab:https://example.com/user/x.git", "openxlab", "git+https://example.com/user/x.git"),
        ("git+ssh://git@example.com/user/x.git", "git", "git+ssh://git@example.com/user/x.git"),
        ("dir:/no/where", "dir", "dir:/no/where"),
    ],
)
def test_targets(to, platform, ref):
    assert space.target(to) == (platform, ref)


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("openxlab:user/x", "openxlab:user/x: OpenXLab clones a space from GitHub or another git repository."),
        ("user/x", "'user/x' is no place for a space: write openxlab:git+URL, hf:user/name"),
        ("hf:x", "'hf:x' is neither a folder nor a repo reference"),
    ],
)
def test_no_target(to, words, tmp_path):
    with pytest.raises(UserError, match=re.escape(words)):
        space.deploy(to, None, "hf:user/x", "", dry_run=True)


def test_where_to_is_asked_for(capsys):
    assert command("--model", "hf:user/x") == 2
    assert capsys.readouterr().err.startswith("error: Say where the space goes, for example: --to hf:user/name (or ")


def a_run(folder: Path, **published: str) -> Run:
    folder.mkdir()
    sent = {ref: {"what": what, "revision": "0" * 40} for ref, what in published.items()}
    (folder / "receipt.json").write_text(json.dumps({"published": sent}))
    return Run(folder, Settings())


def test_a_run_that_was_not_published_is_refused(tmp_path):
    for n, sent in enumerate([{}, {"hf:user/adapter": "adapter"}]):
        with pytest.raises(UserError) as caught:
            space.published(a_run(tmp_path / f"{n}", **sent))
        assert f"run 'python finetune/run.py publish --run {tmp_path}/{n} --to hf:user/name' first" in str(caught.value)
    assert space.published(a_run(tmp_path / "x", **{"hf:user/x": "both", "hf:user/y": "adapter"})) == ["hf:user/x"]


def test_a_space_cannot_reach_a_users_disk_but_a_folder_can(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = ["dir:usb", f"git+file://{tmp_path}/x.git", "git+ssh://git@example.com/user/x.git"]
    with pytest.raises(UserError, match=r"^No space can reach dir:usb, git\+file://.*: publish the model to a hub"):
        space.reachable(local, "openxlab")
    more = [*local, "user/x", "openxlab:user/x"]
    assert space.reachable(more, "openxlab") == ["openxlab:user/x", "user/x"]  # its own hub first
    assert space.reachable(more, "hf") == ["user/x", "openxlab:user/x"]
    assert space.reachable(more, "dir") == [f"dir:{tmp_path}/usb", *more[1:]]


# ------------------------------------------------------------------------------------------- look, rehearse, push, the form


@pytest.fixture
def weights(hf, package, world, monkeypatch):
    """The tiny model on the small hub, whose address a space hears by its environment."""
    monkeypatch.setenv("HF_ENDPOINT", hf.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    hub.publish("hf:user/xiaoxing", package, "x")
    return hf


def command(*arguments: str) -> int:
    return run.main(["deploy", *arguments])


def test_a_dry_run_lists_and_says_what_the_form_wants(weights, server, world, capsys):
    server.make("user/space")
    to = f"openxlab:git+{server.url}/user/space.git"
    assert command("--to", to, "--model", "hf:user/xiaoxing", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"send +0\.\d{3} MB  app\.py", line) for line in lines)
    fields = dict(line.strip().split(": ", 1) for line in lines if line.startswith("  "))
    assert fields["GitHub 仓库地址 repository"] == f"{server.url}/user/space.git"
    assert fields["镜像 image"].startswith("Python 3.10")
    assert fields["硬件 hardware"] == "2 vCPU 8 GB (0.00 B parameters 参数)"
    assert fields["端口 port"] == "7860"
    assert fields["环境变量 variable HF_TOKEN"] == "for private weights 权重不公开时"
    assert fields["环境变量 variable HF_ENDPOINT"] == weights.url
    assert "hf:user/xiaoxing" in fields["环境变量 variable MODEL"]
    assert git("ls-remote", f"file://{server.root}/user/space.git") == ""  # nothing was pushed


@pytest.mark.parametrize(
    ("parameters", "platform", "words"),
    [
        (134_515_008, "openxlab", "2 vCPU 8 GB (0.13 B"),
        (1_889_000_000, "openxlab", "A10 24 GB (on application 需申请) (1.89 B"),
        (7_700_000_000, "hf", "Nvidia A10G small (7.70 B"),
        (19_900_000_000, "openxlab", "A100 40 GB (on application 需申请), in 4 bits 以 4 位运行 (20 B"),
        (0, "dir", "2 vCPU, 8 GB up to 1 B parameters"),
    ],
)
def test_hardware_is_chosen_by_size(parameters, platform, words):
    assert space.hardware(parameters, platform).startswith(words)


def test_weights_that_a_stranger_cannot_see_are_refused_or_asked_a_token_for(weights, world, capsys):
    weights.private = True
    assert command("--to", f"dir:{world}/space", "--model", "hf:user/xiaoxing", "--dry-run") == 2
    said = capsys.readouterr().err
    assert re.search("^error: hf:user/xiaoxing: .*401", said, re.M)
    assert 'deploy with --force "private".' in said
    assert command("--to", f"dir:{world}/space", "--model", "hf:user/xiaoxing", "--force", "private", "--dry-run") == 0
    assert "variable HF_TOKEN: needed: no source is public 必填" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["dir", "hf"])
def test_weights_that_are_not_the_runs_are_refused(weights, package, world, source):
    """Changed where they lie, or of an earlier model of the run."""
    ref, words = "hf:user/xiaoxing", "model.safetensors there is not what this run made: publish it again"
    if source == "dir":
        hub.publish(ref := f"dir:{world}/stick", package, "x")
        stick, words = world / "stick" / "model.safetensors", "its bytes have changed: publish or copy it again"
    one = a_run(world / "run", **{ref: "model"})
    manifest = json.loads(package["manifest.json"].data)
    record = mkdir(world / "run" / "model") / "manifest.json"
    record.write_text(json.dumps(manifest))
    to = f"dir:{world}/space"
    space.deploy(to, one, None, "", dry_run=True)
    if source == "dir":
        stick.write_bytes(b"!" + stick.read_bytes()[1:])
    else:
        manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
        record.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{ref}: .*{words}" if source == "hf" else words):
        space.deploy(to, one, None, "", dry_run=True)


def test_to_hugging_face_and_again(weights, monkeypatch, capsys):
    """The rehearsal has its own test; here a second deploy sends what changed and removes what is no longer carried."""
    rehearsed = []
    monkeypatch.setattr(space, "rehearse", lambda *seen: rehearsed.append(seen) or "there")
    weights.commit(
        "spaces/user/xiaoxing", {"README.md": weights.add(b"---\nsdk: gradio\n---\n")}
    )  # made on the web page
    assert command("--to", "hf:user/xiaoxing", "--model", "hf:user/xiaoxing") == 0
    assert "页面 page: https://huggingface.co/spaces/user/xiaoxing" in capsys.readouterr().out
    _, there = weights.commits["spaces/user/xiaoxing"][-1]
    assert there == {name: s.sha256 for name, s in space.files("xiaoxing", ["hf:user/xiaoxing"], "hf").items()}
    assert "model.safetensors" in weights.commits["user/xiaoxing"][-1][1]  # the model of that name stays
    names = space.modules()
    monkeypatch.setattr(space, "modules", lambda: [name for name in names if name != "finetune/remote.py"])
    assert command("--to", "hf:user/xiaoxing", "--model", "hf:user/xiaoxing") == 0
    assert set(there) - set(weights.commits["spaces/user/xiaoxing"][-1][1]) == {"finetune/remote.py"}
    assert len(rehearsed) == 2


def test_to_a_modelscope_studio(weights, server, monkeypatch, capsys):
    monkeypatch.setattr(space, "rehearse", lambda *seen: "there")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "git-canary-token")
    server.users = {"oauth2": "git-canary-token"}
    redirect("modelscope", server)
    arguments = ("--to", "modelscope:user/x", "--model", "hf:user/xiaoxing")
    assert command(*arguments) == 2
    assert "Open https://www.modelscope.cn/studios/create, type x as its name" in capsys.readouterr().err
    bare = server.make("studios/user/x")
    assert command(*arguments) == 0
    assert "页面 page: https://www.modelscope.cn/studios/user/x " in capsys.readouterr().out
    assert (
        git("--git-dir", str(bare), "show", "main:finetune/engine.py") == (ROOT / "finetune" / "engine.py").read_text()
    )


def test_another_project_is_not_written_over(weights, server, world, capsys):
    bare = server.make("user/mine")
    git("init", "-q", "-b", "main", cwd=mkdir(world / "mine"))
    (world / "mine" / "requirements.txt").write_text("mine")
    who = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    git("add", "-A", cwd=world / "mine")
    git(*who, "commit", "-qm", "x", cwd=world / "mine")
    git("push", "-q", str(bare), "main", cwd=world / "mine")
    to = f"git+{server.url}/user/mine.git"
    assert command("--to", to, "--model", "hf:user/xiaoxing") == 2
    assert capsys.readouterr().err.endswith(
        f"error: {to} holds another project (requirements.txt): give the space an empty repository of its own.\n"
    )


def test_a_space_that_does_not_start_is_not_pushed(tiny_model, weights, world, monkeypatch, capsys):
    real = space.files
    broken = {"app.py": transfer.source(b"import nothing_of_that_name\n")}
    monkeypatch.setattr(space, "files", lambda *of: {**real(*of), **broken})
    assert command("--to", f"dir:{world}/space", "--model", "hf:user/xiaoxing") == 2
    said = capsys.readouterr().err
    assert "The rehearsal failed, nothing was pushed: the page ended with exit status 1. Its last words:" in said
    assert "No module named 'nothing_of_that_name'" in said
    assert not (world / "space").exists()


def test_a_rehearsal_with_the_weights_at_hand_answers(tiny_model, tmp_path):
    (home := tmp_path / "home").mkdir()
    seen = space.rehearse(built(tmp_path / "space", "hf:user/x"), home, tiny_model)
    assert re.fullmatch(r"the page is there after \d+ s, and answers after \d+ s: .+", seen)


FAILING = """
import http.server, os
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "failed", "message": "The weights are cut."}')
http.server.HTTPServer(("127.0.0.1", int(os.environ["GRADIO_SERVER_PORT"])), Page).serve_forever()
"""


def test_a_model_that_does_not_load_is_told(tmp_path):
    (tmp_path / "app.py").write_text(FAILING)
    with pytest.raises(UserError, match=r"^The rehearsal failed, nothing was pushed: The weights are cut\.$"):
        space.rehearse(tmp_path, tmp_path, tmp_path)


# ---------------------------------------------------------------------------------------------- OpenXLab's own procedure

NGINX = """
daemon off; pid {folder}/nginx.pid; error_log stderr; worker_processes 1;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
  server {{
    listen 127.0.0.1:{port} ssl; server_name portal.test; default_type text/html;
    location / {{ return 200 '<iframe src="https://xiaoxing.test:{port}/" width=1000 height=700></iframe>'; }}
  }}
  server {{
    listen 127.0.0.1:{port} ssl; server_name xiaoxing.test;
    location / {{
      proxy_pass http://127.0.0.1:7860; proxy_http_version 1.1; proxy_set_header Host $http_host;
    }}
  }}
}}
"""


@pytest.fixture
def proxy(tmp_path):
    """The address of a page whose iframe shows what nginx fetches from port 7860, another host's, both by TLS; it does not say
    so with X-Forwarded-Proto, as some proxies do not."""
    make = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=test",
    ]
    files = ["-keyout", f"{tmp_path}/key.pem", "-out", f"{tmp_path}/cert.pem"]
    subprocess.run(["openssl", *make, *files], check=True, capture_output=True)
    port = closed_port()
    (tmp_path / "nginx.conf").write_text(NGINX.format(folder=tmp_path, port=port))
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    process = subprocess.Popen([nginx, "-c", f"{tmp_path}/nginx.conf", "-p", str(tmp_path)])
    yield f"https://portal.test:{port}/"
    process.terminate()
    process.wait(PATIENCE)


@pytest.fixture
def visitor():
    from playwright.sync_api import sync_playwright

    flags = [*FLAGS, "--host-resolver-rules=MAP *.test 127.0.0.1"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_context(ignore_https_errors=True, locale="en-US").new_page()
        page.set_default_timeout(PATIENCE * 1000)
        yield page
        browser.close()


@pytest.fixture
def machine():
    """A folder like OpenXLab's, whose parents its user may enter, which pytest's own do not let him."""
    made = subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip()
    (home := Path(made) / "home").mkdir()
    for folder in (Path(made), home):
        os.chown(folder, 65534, 65534) if os.getuid() == 0 else None
    yield home
    shutil.rmtree(made)


def user() -> list[str]:
    """What makes a command one of a user that is not root. Where this Python lies in root's own folders, he may read them,
    and still write nowhere but in his own."""
    if os.getuid():
        return []
    plain = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    asked = [*plain, "env", sys.executable, "-c", "import json, pip"]
    able = subprocess.run(asked, capture_output=True, check=False).returncode == 0
    return plain if able else [*plain, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def test_openxlabs_own_procedure(brief_model, server, world, machine, proxy, visitor, monkeypatch, capsys):
    """Deployed to a git repository and cloned from it; pip, apt-get, app.py; first no hub answers, then one does; behind
    nginx, in an iframe; started again without a hub."""
    port = closed_port()
    server.make("user/space")
    log_in(server.url)
    for name, value in {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    weights = world / "weights"
    for name, source in package_of(brief_model).items():
        (weights / name).parent.mkdir(exist_ok=True)
        with source.open() as file:
            (weights / name).write_bytes(file.read())
    refs = f"git+{server.url}/user/gone.git,hf:user/xiaoxing"
    with Hub(world / "hub", port=port) as there:
        there.put("user/xiaoxing", weights)
        assert command("--to", f"openxlab:git+{server.url}/user/space.git", "--model", refs) == 0
    said = capsys.readouterr()
    assert "Rehearsal 预演: the page is there after" in said.err
    assert "GitHub 仓库地址 repository: " in said.out

    clone, venv = machine / "xlab-app-center", machine / "venv"
    limits = ["prlimit", f"--as={8 << 30}", "taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))]
    env = {
        "HOME": str(machine),
        "PATH": f"{venv}/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HUB_DISABLE_XET": "1",
    }

    def does(*words: str, who: list[str] = user(), **more) -> subprocess.CompletedProcess:  # noqa: B008
        done = subprocess.run([*who, *words], env=env, capture_output=True, text=True, check=False, timeout=300, **more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    assert list(machine.iterdir()) == []
    does("git", "clone", "-q", f"{server.url}/user/space.git", str(clone), cwd=machine)
    # pip is the real one and resolves for real; what it wants is already in the tests' own environment, else it took minutes.
    does(sys.executable, "-m", "venv", "--without-pip", str(venv), cwd=machine)
    packages = next(venv.glob("lib/python*/site-packages"))
    does("sh", "-c", f"echo {sysconfig.get_path('purelib')} > {packages}/tests.pth", cwd=machine)
    pip = does("python", "-m", "pip", "install", "--disable-pip-version-check", "-r", "requirements.txt", cwd=clone)
    assert "Requirement already satisfied: gradio==" in pip.stdout
    does("sh", "-c", "xargs -r -a packages.txt apt-get install -y", who=[], cwd=clone)  # the platform's builder is root

    @contextlib.contextmanager
    def started():
        log = (world / "log").open("ab")
        process = subprocess.Popen([*user(), *limits, "python", "app.py"], cwd=clone, env=env, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)

    def health() -> dict:
        import requests

        try:
            return requests.get("http://127.0.0.1:7860/health", timeout=PATIENCE).json()
        except requests.RequestException:
            return {"status": "closed"}

    def ask(words: str) -> None:
        frame = visitor.frame_locator("iframe")
        frame.locator("#box textarea").fill(words)
        frame.locator("#box textarea").press("Enter")
        frame.locator("#chat [data-testid=user]").filter(has_text=words).wait_for()
        until(lambda: frame.locator("#box [data-testid=submit-button]").is_visible(), "the answer's end")
        assert frame.locator("#chat [data-testid=bot]").last.inner_text().strip()

    complaints = []
    autofocus = "Blocked autofocusing"  # which Chromium says of every field in a frame
    visitor.on(
        "console", lambda m: complaints.append(m.text) if m.type == "error" and autofocus not in m.text else None
    )
    with started() as process:
        until(lambda: health()["status"] == "loading", "the port")
        visitor.goto(proxy)
        frame = visitor.frame_locator("iframe")
        frame.get_by_text("No source answers; trying again").wait_for()
        frame.get_by_text("hf:user/xiaoxing").wait_for()  # it may be trying again just now
        limit = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(rf"Max address space +{8 << 30} ", limit)
        assert re.search(r"^Uid:\t(?!0\t)", Path(f"/proc/{process.pid}/status").read_text(), re.M) or os.getuid()
        with Hub(world / "hub", port=port) as back:
            back.commits, back.branches, back.tags = there.commits, there.branches, there.tags
            frame.locator("#box textarea").wait_for()
        assert "there is no such repository" in health()["message"]
        assert frame.get_by_text(f"git+{server.url}/user/gone.git").first.is_visible()  # which failed, and why
        assert frame.get_by_text("CPU, ").first.is_visible()  # what it decodes with
        ask("你是谁？")
    with started():  # and no hub: what was fetched is used
        until(lambda: health()["status"] == "ready", "the second start", lambda: (world / "log").read_text()[-2000:])
        visitor.goto(proxy)
        ask("And again?")
    assert complaints == []
    assert "Using what was fetched earlier" in (world / "log").read_text()
    assert "Traceback" not in (world / "log").read_text()
