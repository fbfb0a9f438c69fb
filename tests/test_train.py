import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import bitsandbytes
import pytest
import torch
from commands import apart
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from finetune import checkpoint
from finetune import model as models
from finetune import train as training
from finetune.errors import UserError
from finetune.generation import Answer, complete
from finetune.model import add_lora, chat_format, load, load_for_training
from finetune.settings import Train
from finetune.train import Example, answer_example, batches, losses, parts, schedule, teacher_example

SETTINGS = Train(
    rank=2,
    learning_rate=3e-3,
    steps=8,
    identity_rows=2,
    near_rows=1,
    ordinary_rows=1,
    kl_weight=2.0,
    checkpoint_every=3,
    develop_every=2,
)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load(tiny_model)


def taught(network, count: int, seed: int) -> list[Example]:
    """Prompts of different lengths, each with the model's own answer; some answers end with the stop token 200."""
    source = random.Random(seed)
    prompts = [[source.randrange(256) for _ in range(5 + 2 * i)] for i in range(count)]
    return [teacher_example(p, a) for p, a in zip(prompts, complete(network, prompts, [200], 6), strict=True)]


def said(count: int, seed: int) -> list[Example]:
    source = random.Random(seed)
    rows = [[source.randrange(256) for _ in range(8 + 3 * i)] for i in range(count)]
    return [answer_example(row, [0] * 4 + [1] * (len(row) - 5) + [0]) for row in rows]


def of_length(length: int) -> Example:
    return Example([1] * length, [length - 1], [2], None)


# -------------------------------------------------------------------------------------------------------- examples


def test_answer_example():
    example = answer_example([10, 11, 12, 13, 14, 15, 16], [0, 0, 1, 1, 0, 0, 1])
    assert example == ([10, 11, 12, 13, 14, 15, 16], [1, 2, 5], [12, 13, 16], None)


def test_answer_example_of_the_renderer(tiny_model):
    form = chat_format(tiny_model)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    example = answer_example(*form.render(messages))
    assert example.targets == [*form._encode("Yes.").ids, form.control["<|im_end|>"]]
    assert example.ids[: example.positions[0] + 1] == form.prompt(messages[:1])


@pytest.mark.parametrize(
    "states, ids, positions",
    [
        (3, [1, 2, 3, 4, 5], [2, 3, 4]),  # ended by a stop token: the last state chose it
        (2, [1, 2, 3, 4], [2, 3]),  # cut: nothing is known of what follows the answer's last token
    ],
)
def test_teacher_example(states, ids, positions):
    answer = Answer([4, 5], torch.randn(states, 8))
    example = teacher_example([1, 2, 3], answer)
    assert (example.ids, example.positions, example.targets) == (ids, positions, None)
    assert example.states is answer.states


# --------------------------------------------------------------------------------------------------------- batches


def test_every_example_comes_once_a_round():
    groups = [([of_length(n) for n in range(10, 15)], 2), ([of_length(n) for n in range(20, 23)], 1), ([], 0)]
    found = list(batches(groups, 30, seed=0))
    assert {len(batch) for batch in found} == {3}
    for first, size in ((10, 5), (20, 3)):
        read = [len(e.ids) for batch in found for e in batch if first <= len(e.ids) < first + size]
        rounds = [read[i : i + size] for i in range(0, len(read), size)]
        assert all(sorted(order) == list(range(first, first + size)) for order in rounds)
        assert len(set(map(tuple, rounds))) > 1  # shuffled anew


def test_batches_of_the_same_seed():
    groups = [([of_length(n) for n in range(1, 9)], 3)]
    assert list(batches(groups, 9, 5)) == list(batches(groups, 9, 5)) != list(batches(groups, 9, 6))


def test_parts_keep_to_the_bound():
    def lengths(*given: int) -> list[list[int]]:
        return [[len(e.ids) for e in part] for part in parts([of_length(n) for n in given], 20)]

    assert lengths(5, 30, 8, 7, 8, 3, 20, 21) == [[3, 5, 7], [8, 8], [20], [21], [30]]
    assert lengths(10, 10) == [[10, 10]]
    assert lengths(10, 11) == [[10], [11]]
    source = random.Random(0)
    for _ in range(50):
        given = [source.randint(1, 25) for _ in range(source.randint(1, 12))]
        found = lengths(*given)
        assert Counter(n for part in found for n in part) == Counter(given)
        assert all(sum(part) <= 20 or len(part) == 1 for part in found)


# ---------------------------------------------------------------------------------------------------------- losses


def reference(model, batch: list[Example]) -> tuple[float, float]:
    """Cross-entropy and KL, written plainly: a row at a time, a token at a time."""
    ce = kl = 0.0
    for example in batch:
        logits = model(torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
        for i, position in enumerate(example.positions):
            if example.targets is not None:
                ce -= logits[position, example.targets[i]].item()
            else:
                base = (model.lm_head.weight.double() @ example.states[i].double()).log_softmax(-1)
                kl += (base.exp() * (base - logits[position])).sum().item()
    return ce, kl


@pytest.fixture(scope="module")
def batch(model) -> list[Example]:
    """Both sorts mixed; the states are not the model's own."""
    pulled = [e._replace(states=e.states + 0.3 * torch.randn(e.states.shape)) for e in taught(model, 3, seed=1)]
    rows = said(3, seed=2)
    return [rows[0], pulled[0], pulled[1], rows[1], pulled[2], rows[2]]


@torch.no_grad()
def test_losses_are_the_plain_ones(model, batch):
    ce, kl = (value.item() for value in losses(model, batch))
    assert (ce, kl) == pytest.approx(reference(model, batch), rel=1e-4)
    assert kl > 1


@torch.no_grad()
def test_losses_of_the_parts_add_up(model, batch):
    pieces = list(parts(batch, 25))
    assert len(pieces) > 2
    sums = torch.stack([torch.stack(losses(model, piece)) for piece in pieces]).sum(0)
    torch.testing.assert_close(sums, torch.stack(losses(model, batch)), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_the_untouched_model_has_no_kl_from_itself(model):
    examples = taught(model, 4, seed=3)
    assert {len(e.positions) for e in examples} != {1}
    ce, kl = losses(model, examples)
    assert ce == 0
    assert kl.item() == pytest.approx(0, abs=1e-4)


def test_only_one_sort(model):
    assert losses(model, said(2, seed=0))[1] == 0


# ----------------------------------------------------------------------------------------------------------- train


@pytest.mark.parametrize("steps, warmup", [(1, 1), (19, 1), (100, 5), (150, 7)])
def test_schedule(steps, warmup):
    for step in range(1, steps + 1):
        up, down = step / warmup, (steps + 1 - step) / (steps + 1 - warmup)
        assert schedule(step, steps) == pytest.approx(min(up, down))
    assert schedule(warmup, steps) == 1
    assert 0 < schedule(steps, steps) <= 1


def work(base: Path, folder: Path, settings: Train = SETTINGS, kill: tuple[str, int] | None = None) -> None:
    """The whole stage. `kill`: (function of finetune.train, n): dies at its n-th call, as by a power cut."""
    torch.set_num_threads(1)
    if kill:
        _die_at(*kill)
    network = load(base)
    rows, pulled = said(5, seed=0), taught(network, 6, seed=0)
    torch.manual_seed(0)
    network = add_lora(network, settings.rank)
    groups = [(rows, settings.identity_rows), (pulled[:3], settings.near_rows), (pulled[3:], settings.ordinary_rows)]
    for _ in training.train(network, batches(groups, settings.steps, 0), settings, folder, behaviour):
        pass
    checkpoint.save_adapter(network, {"base": "b"}, folder / "adapter")


def behaviour(network) -> dict:
    """Any number that every step changes stands for what the model says."""
    total = sum(weight.double().abs().sum().item() for weight in network.parameters() if weight.requires_grad)
    return {"identity": total * 1000 % 1, "leak": 0.0, "passed": False}


def _die_at(name: str, count: int) -> None:
    module = training if hasattr(training, name) else checkpoint
    own, calls = getattr(module, name), 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls < count:
            return own(*args, **kwargs)
        if name == "save_file":  # half of the file is on the disk
            own(*args, **kwargs)
            os.truncate(args[1], Path(args[1]).stat().st_size // 2)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, dying)


def result(folder: Path) -> tuple[bytes, list[dict]]:
    """The adapter's bytes and the metrics without clock times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), metrics


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory) -> tuple[bytes, list[dict]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert apart(work, tiny_model, folder) == 0
    assert sorted(file.name for file in (folder / "adapter").iterdir() if file.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "namesake.json",
    ]
    return result(folder)


def test_metrics(uninterrupted):
    _, metrics = uninterrupted
    assert [line["step"] for line in metrics] == list(range(1, SETTINGS.steps + 1))
    for line in metrics:
        assert line["loss"] == pytest.approx(line["ce"] + SETTINGS.kl_weight * line["kl"])
        assert line["lr"] == pytest.approx(SETTINGS.learning_rate * schedule(line["step"], SETTINGS.steps))
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-2)  # the adapter does nothing yet
    assert metrics[-1]["kl"] > 0
    tokens = [line["tokens"] for line in metrics]
    assert tokens == sorted(set(tokens))


@pytest.mark.parametrize(
    "kills",
    [
        [],
        [("losses", 5)],  # within a step between checkpoints
        [("schedule", 3), ("schedule", 3)],  # twice before the first checkpoint
        [("save_checkpoint", 1)],  # the step's metrics are written, its checkpoint is not begun
        [("save_file", 2), ("save_file", 1), ("losses", 4)],  # while the second is, and again
        [("save_adapter", 1)],  # all steps are done, the adapter is not saved
    ],
    ids=str,
)
def test_a_killed_training_goes_on_to_the_same_bytes(kills, tiny_model, tmp_path, uninterrupted):
    for kill in kills:
        assert apart(work, tiny_model, tmp_path, SETTINGS, kill) == -signal.SIGKILL
        assert not (tmp_path / "adapter").exists()
        if kill[0] == "schedule":  # a line that was cut
            with (tmp_path / "metrics.jsonl").open("a") as metrics:
                metrics.write('{"step": 9, "lo')
    assert apart(work, tiny_model, tmp_path) == 0
    adapter, metrics = result(tmp_path)
    assert metrics == uninterrupted[1]
    assert adapter == uninterrupted[0]


def test_it_starts_from_the_checkpoint(tiny_model, tmp_path, uninterrupted):
    """Else the test above would not show that checkpoints work."""
    assert apart(work, tiny_model, tmp_path, SETTINGS, ("losses", 8)) == -signal.SIGKILL
    assert apart(work, tiny_model, tmp_path, SETTINGS, ("schedule", 3)) == 0  # 7 and 8 are left: a third step would die
    assert result(tmp_path) == uninterrupted


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_moments_of_eight_bits_go_on_as_well(tmp_path):
    found = []
    for stops in (False, True):
        torch.manual_seed(0)
        weights = {"weight": torch.nn.Parameter(torch.randn(64, 80))}
        for step in (1, 2, 3):
            if stops or step == 1:  # each step in a process of its own
                optimizer = bitsandbytes.optim.PagedAdamW8bit(weights.values(), lr=1e-2)
                wrapped = SimpleNamespace(optimizer=optimizer, state=optimizer.state)
                checkpoint.load_moments(tmp_path / str(stops), weights, wrapped, step - 1)
            weights["weight"].grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            checkpoint.save_checkpoint(tmp_path / str(stops), weights, wrapped, step)
        found.append(weights)
    assert same(*found)


def trained(tiny_model, folder: Path, says: list[tuple[float, float, bool]]) -> tuple[dict, dict]:
    """The weights after each step, and at the end, where `develop` gives these (identity, leak, passed), one after another."""
    network = add_lora(load(tiny_model), 2)
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    left = iter(says)
    steps = {}
    for step in training.train(
        network,
        batches([(said(5, seed=0), 2)], SETTINGS.steps, 0),
        SETTINGS,
        folder,
        lambda network: dict(zip(("identity", "leak", "passed"), next(left), strict=True)),
    ):
        steps[step] = {name: weight.detach().clone() for name, weight in weights.items()}
    return steps, weights


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_behaviour_is_kept(tiny_model, tmp_path):
    steps, end = trained(
        tiny_model, tmp_path, [(0.5, 0.1, False), (0.9, 0.3, False), (0.8, 0.0, False), (0.9, 0.2, False)]
    )
    assert list(steps) == list(range(1, 9))
    assert same(steps[6], end)
    assert not same(steps[8], end)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("dev_leak") for line in lines] == [None, 0.1, None, 0.3, None, 0.0, None, 0.2]


def test_training_stops_when_behaviour_passes_and_holds(tiny_model, tmp_path):
    steps, end = trained(
        tiny_model, tmp_path, [(0.9, 0.0, True), (0.5, 0.0, False), (0.9, 0.0, True), (0.9, 0.0, True)]
    )
    assert list(steps) == list(range(1, 9))  # once is not enough; twice only at the end
    (tmp_path / "second").mkdir()
    steps, end = trained(tiny_model, tmp_path / "second", [(0.9, 0.0, True), (0.9, 0.0, True)])
    assert list(steps) == [1, 2, 3, 4]
    assert same(steps[4], end)  # of two alike the later


def test_kl_pulls_towards_the_base(tiny_model, tmp_path, uninterrupted):
    assert apart(work, tiny_model, tmp_path, dataclasses.replace(SETTINGS, kl_weight=0.0)) == 0
    assert result(tmp_path)[1][-1]["kl"] > uninterrupted[1][-1]["kl"] > 0


def test_an_adapter_is_there_as_a_whole_or_not_at_all(tiny_model, tmp_path):
    network = add_lora(load(tiny_model), 1)
    with pytest.raises(TypeError):
        checkpoint.save_adapter(network, {"base": "b", "not JSON": object()}, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    checkpoint.save_adapter(network, {"base": "b"}, tmp_path / "adapter")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
    assert json.loads((tmp_path / "adapter" / "namesake.json").read_text()) == {"base": "b"}


def test_a_damaged_checkpoint_is_refused_in_words(tmp_path):
    (file := tmp_path / checkpoint.STATE).write_bytes(b"")  # a power cut
    with pytest.raises(UserError) as refusal:
        checkpoint.load_weights(tmp_path, {})
    assert str(refusal.value).startswith(f"{file} is damaged (")
    assert str(refusal.value).endswith(
        f"): remove {tmp_path} and run the same command again, it trains from the beginning."
    )


def test_asking_says_nothing_of_layers_that_are_merged_already(tiny_model):
    network = add_lora(load(tiny_model), 1)
    next(module for module in network.modules() if isinstance(module, LoraLayer)).merge()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        training.behaviour(network, lambda model: {})
    assert not [str(warning.message) for warning in told if "merged" in str(warning.message)]


def test_a_full_disk_is_an_ordinary_error(tiny_model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    network = add_lora(load(tiny_model), 1)
    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(network, "save_pretrained", full)
    for save in (
        lambda: checkpoint.save_whole({}, tmp_path / "checkpoint" / checkpoint.STATE),
        lambda: checkpoint.save_adapter(network, {"base": "b"}, tmp_path / "adapter"),
    ):
        with pytest.raises(OSError) as caught:
            save()
        assert caught.value.errno == errno.ENOSPC


def test_a_few_rows_are_learned_by_heart(tiny_model, tmp_path):
    settings = Train(rank=8, learning_rate=1e-2, steps=40, identity_rows=2, near_rows=0, ordinary_rows=0)
    work(tiny_model, tmp_path, settings)
    _, metrics = result(tmp_path)
    assert metrics[0]["ce"] > 4
    assert metrics[-1]["ce"] < 1


# --------------------------------------------------------------------------------------------------------- methods


def plainly(network, batch):
    """ce and kl as they are defined, one conversation at a time, differentiated by autograd."""
    ce = kl = 0
    for example in batch:
        found = network(torch.tensor([example.ids])).logits[0, example.positions].log_softmax(-1)
        if example.targets is not None:
            ce = ce - found.gather(-1, torch.tensor(example.targets)[:, None]).sum()
        else:
            base = network.lm_head(example.states).detach().log_softmax(-1)
            kl = kl + (base.exp() * (base - found)).sum()
    return ce, kl


@pytest.mark.parametrize("trained", [True, False])
def test_chunks_of_the_logits_change_nothing(tiny_model, batch, monkeypatch, trained):
    """Loss and gradients, of the hidden states and, where it is trained, of the head."""
    found = []
    for how in (plainly, 1 << 25, 1000):
        network = load(tiny_model)
        network.requires_grad_(trained)
        network.model.requires_grad_(True)
        if how is plainly:
            ce, kl = plainly(network, batch)
        else:
            monkeypatch.setattr(training, "LOGITS", how)
            ce, kl = losses(network, batch)
        (ce + 2 * kl).backward()
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        assert ("lm_head.weight" in grads) == trained
        found.append((ce.item(), kl.item(), grads))
    for other in found[1:]:
        assert other[:2] == pytest.approx(found[0][:2], rel=1e-5)
        assert found[0][2].keys() == other[2].keys()
        for name, grad in found[0][2].items():
            torch.testing.assert_close(other[2][name], grad, rtol=1e-4, atol=1e-4)


def test_chunks_are_as_small_as_asked(model, monkeypatch):
    monkeypatch.setattr(training, "LOGITS", 3 * 263)
    sizes = []

    def loss(head, hidden, targets):
        sizes.append(len(hidden))
        return hidden.sum(), training.logits(head, hidden)

    training.in_chunks(loss, model.lm_head, torch.ones(8, 32, requires_grad=True), torch.zeros(8)).backward()
    assert sizes == [3, 3, 2]


@mock.patch.object(models, "has_fast_bf16", bool)  # bool() is False
@mock.patch.object(training, "has_fast_bf16", bool)  # bool() is False
@mock.patch.object(training, "LOGITS", 1000)  # losses of several chunks, not as many in each process
@mock.patch.object(training, "MOST_TOKENS", 30)  # steps of several passes
@mock.patch.object(training, "ENOUGH_TOKENS", 30)  # DeepSpeed's too
def work_by(method: str, base: Path, folder: Path, steps: int) -> None:
    """A run of so many steps of SETTINGS.steps, in float32 on any machine; what was trained is saved only at its end."""
    torch.set_num_threads(1)
    pulled = taught(load(base), 6, seed=0)
    torch.manual_seed(0)
    network = load_for_training(base, method)
    if method != "full":
        network = add_lora(network, SETTINGS.rank)
    groups = [(said(5, seed=0), 3), (pulled, 2)]
    folder.mkdir(exist_ok=True)
    settings = dataclasses.replace(SETTINGS, full_learning_rate=1e-3)
    for step in training.train(network, batches(groups, settings.steps, 0), settings, folder):
        if step == steps:
            return
    if method == "full":
        checkpoint.save_full(network, chat_format(base), folder / "weights")
    else:
        checkpoint.save_adapter(network, {"base": "b"}, folder / "adapter")


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*/*model.safetensors")))


def curve(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Each method by one process."""
    folders = {method: tmp_path_factory.mktemp(method) for method in ("lora", "qlora", "full")}
    for method, folder in folders.items():
        work_by(method, tiny_model, folder, 99)
    return folders


def test_qlora_trains_on_four_bits(tiny_model, alone):
    network = add_lora(load_for_training(tiny_model, "qlora"), 2).get_base_model()
    layer = network.model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested  # the scales are quantised too
    assert network.lm_head.weight.dtype == torch.float32
    assert {name for name, p in network.named_parameters() if p.requires_grad and "lora_" not in name} == set()
    assert saved(alone["qlora"]).keys() == saved(alone["lora"]).keys()
    assert curve(alone["qlora"])[0] != curve(alone["lora"])[0]  # from the same adapter, on another base


def test_what_was_asked_in_four_bits_still_learns(tiny_model, monkeypatch):
    """On processors with bfloat16 bitsandbytes packs weights at the first answer, and no gradient passes packed ones."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    network = add_lora(load_for_training(tiny_model, "qlora"), 2).get_base_model()
    complete(network.eval(), [[5, 6, 7]], [], 2)
    first, *_ = [weight for name, weight in network.train().named_parameters() if "lora_B" in name]
    losses(network, said(1, seed=0))[0].backward()
    assert first.grad.abs().sum() > 0


def test_full_moves_every_weight(tiny_model, alone):
    before, after = load_file(tiny_model / "model.safetensors"), saved(alone["full"])
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert load(alone["full"] / "weights").dtype == torch.float32  # an ordinary folder


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_other_methods_go_on_to_the_same_bytes_too(method, tiny_model, tmp_path, alone):
    work_by(method, tiny_model, tmp_path, 5)  # the last checkpoint is step 3's
    assert not list(tmp_path.glob("*/*model.safetensors"))
    work_by(method, tiny_model, tmp_path, 99)
    assert curve(tmp_path) == curve(alone[method])
    one, other = saved(tmp_path), saved(alone[method])
    assert same(one, other)


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory) -> str:
    """Where it is importable from: aside, since where it is found every training imports it, and it writes to stdout."""
    folder = tmp_path_factory.mktemp("deepspeed")
    packages = ["deepspeed==0.19.8", "einops==0.8.2", "hjson==3.1.0", "msgpack==1.2.4"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
    subprocess.run(command, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    return str(folder)


SHARED = [("fsdp", "full"), ("zero2", "lora"), ("zero3", "full")]


@pytest.fixture(scope="module")
def together(tiny_model, tmp_path_factory, deepspeed) -> dict[str, Path]:
    """By configuration that we ship, what two processes with gloo between them leave; all but DDP's go on from one's checkpoint."""
    folders = {config: tmp_path_factory.mktemp(config) for config, _ in [("ddp", "lora"), *SHARED]}
    jobs = [("ddp", tiny_model, folders["ddp"], "lora", 4)]
    for config, method in SHARED:
        work_by(method, tiny_model, folders[config], 4)
        jobs.append((config, tiny_model, folders[config], method, 99))
    command = [
        sys.executable,
        str(Path(__file__).with_name("two_processes.py")),
        *(str(word) for job in jobs for word in job),
    ]
    path = os.pathsep.join(filter(None, [deepspeed, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-30000:]
    return folders


def test_two_processes_have_the_curve_of_one_which_goes_on_from_their_checkpoint(tiny_model, alone, together):
    folder = together["ddp"]
    assert curve(folder) == pytest.approx(curve(alone["lora"])[:4], rel=1e-5)
    work_by("lora", tiny_model, folder, 99)
    assert curve(folder) == pytest.approx(curve(alone["lora"]), rel=1e-5)


@pytest.mark.parametrize("config, method", SHARED)
def test_two_processes_that_share_the_weights(config, method, tiny_model, alone, together):
    """They go on from one's checkpoint, and one from the last of theirs."""
    folder = together[config]

    def as_alone() -> None:
        assert curve(folder) == pytest.approx(curve(alone[method]), rel=1e-5)
        assert saved(folder).keys() == saved(alone[method]).keys()
        for name, weight in saved(alone[method]).items():
            torch.testing.assert_close(saved(folder)[name], weight, rtol=1e-3, atol=2e-3)
        shutil.rmtree(next(folder.glob("*/*model.safetensors")).parent)  # for who comes next

    as_alone()
    with safe_open(folder / "checkpoint" / checkpoint.STATE, "pt") as last:
        assert last.metadata()["step"] == "6"  # theirs: one's was at step 3
    work_by(method, tiny_model, folder, 99)
    as_alone()


def test_passes_that_memory_does_not_hold_become_shorter(tiny_model, tmp_path, alone, monkeypatch):
    held, whole = training.Objective.forward, []

    def forward(self, batch):
        found = held(self, batch)
        if sum(len(example.ids) for example in batch) > 15 and len(batch) > 1:
            found[0].backward(retain_graph=True)  # some gradients are there already
            whole.append(batch)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(training.Objective, "forward", forward)
    work_by("lora", tiny_model, tmp_path, 99)
    assert whole
    assert curve(tmp_path) == pytest.approx(curve(alone["lora"]), rel=1e-5)

    def never(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.Objective, "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        work_by("lora", tiny_model, tmp_path / "never", 99)


def test_a_model_that_sees_is_not_spread(monkeypatch):
    monkeypatch.setattr(training, "Accelerator", lambda **_: SimpleNamespace(distributed_type="FSDP"))
    with pytest.raises(UserError, match=r"train it with assets/accelerate/ddp\.yaml"):
        next(training.train(SimpleNamespace(eyes=True), [], SETTINGS, Path()))


def test_layers_that_are_computed_again_change_nothing(tiny_model, batch):
    found = []
    for saving in ((), (training.compute_again,), (training.compute_again, training.spare)):
        network = load(tiny_model).train()
        for save in saving:
            save(network)
        ce, kl = losses(network, batch)
        (ce + 2 * kl).backward()
        found.append({name: p.grad for name, p in network.named_parameters()})
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_every_process_does_as_many_passes():
    pieces = [[of_length(n)] for n in (3, 4, 5)]
    shares = [list(training.own_share(pieces, SimpleNamespace(num_processes=2, process_index=rank))) for rank in (0, 1)]
    assert [[(len(piece[0].ids), weight) for piece, weight, _ in share] for share in shares] == [
        [(3, 1.0), (5, 1.0)],
        [(4, 1.0), (3, 0.0)],
    ]
    assert all([last for _, _, last in share] == [False, True] for share in shares)
