"""A language model that sees: image encoder + projector + language model, as LLaVA joins them (arXiv:2304.08485).

All native parts of transformers: `LlavaForConditionalGeneration` with any ChatML language model of ours and a CLIP vision
tower as XTuner uses it (features of the last layer but one without the class token, pictures padded to a square with the
mean colour), or the encoder of encoder.py. A picture's tokens have ids beyond the vocabulary, by which its patches are
found in `Pictures`: packing, prefix caching and batching then know nothing of pictures.

    python -m finetune.vision MODEL FOLDER      the projector's weights of a model's folder, in XTuner's layout
"""

import functools
import hashlib
import itertools
import json
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from finetune import drawn, embedded, encoder, pictures
from finetune import model as models
from finetune.chat_format import IMAGE, ChatFormat
from finetune.errors import UserError
from finetune.model import PREPROCESSOR, PROCESSOR

# Of tokens that the vocabulary has and no conversation uses the first that is there becomes <image>, whose embedding is
# never looked up: so the vocabulary keeps its size.
SPARE = ("[UNUSED_TOKEN_0]", "<|image_pad|>", "<file_sep>")
CLIP_SIZES = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
STORE_BYTES = 1_000_000_000  # of pictures that visitors have sent; the oldest are forgotten
LOCK = threading.Lock()  # visitors' pictures come from several threads
BATCH = 16  # pictures that are encoded together
SHARD = 1024  # pictures whose features are one file
PROJECTOR_NAME = re.compile(r"(?:^|\.)(?:model|mm_projector|projector|linear)[._](?:model\.)?(0|1|2)\.(weight|bias)$")
LINEAR = {"0": "linear_1", "1": "linear_1", "2": "linear_2"}


# ------------------------------------------------------------------------------------------------------ the assembly


def assembled(language: Path, settings: Any, origin: dict[str, str]) -> Path:
    """A folder in the user's cache of the language model with the encoder and a projector that `settings` (settings.Vision)
    name; the projector is fresh where none is. Made at the first call. Raises UserError."""
    tower = models.base_folder(settings.encoder) if settings.encoder else encoder.folder()
    parts = [models.fingerprint(language), models.fingerprint(tower), embedded.sha256(tower / "config.json")]
    parts.append(settings.projector)
    if settings.projector:
        parts.append(embedded.sha256(projector_file(Path(settings.projector).expanduser())))
    name = f"eyes-{embedded.digest_of(parts)[:16]}"

    def make(_: Path, new: Path) -> None:
        assemble(language, tower, new, Path(settings.projector).expanduser() if settings.projector else None)
        embedded.write_record(new, **origin, source=f"with the image encoder {tower.name}", language_sha256=parts[0])

    size = sum(file.stat().st_size for folder in (language, tower) for file in folder.glob("*.safetensors"))
    return embedded.prepared(name, "model with eyes", 2 * size, make)


def assemble(language: Path, tower: Path, target: Path, projector: Path | None = None) -> None:
    """Write an ordinary folder of the three parts, with its processor. Raises UserError where they do not fit."""
    form = models.chat_format(language)
    eyes = load_tower(tower)
    lm = AutoModelForCausalLM.from_pretrained(
        language, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    clip = isinstance(eyes, CLIPVisionModel)
    side = eyes.config.image_size // eyes.config.patch_size
    config = LlavaConfig(
        vision_config=eyes.config,
        text_config=lm.config,
        image_seq_length=side**2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy="default" if clip else "full",
        tie_word_embeddings=lm.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = lm.model, lm.lm_head
    model.model.vision_tower = eyes
    torch.manual_seed(0)
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.to(lm.dtype).eval()
    vision = {
        "patches": side**2,
        PROCESSOR: {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": eyes.config.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "num_additional_image_tokens": int(clip),
        },
        PREPROCESSOR: {
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            **preprocessor(tower),
        },
    }
    form = seeing(form, vision)
    model.config.image_token_index = form.control[IMAGE]
    if projector:
        load_projector(model, projector)
    else:
        settle(model, vision)
    models.save(model, form, target)


def load_tower(folder: Path) -> PreTrainedModel:
    """CLIP's vision half, of a whole CLIP too, or the encoder of encoder.py. Raises UserError for others."""
    if problems := models.file_problems(folder, "config.json"):
        raise UserError(*problems)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    if kind in ("clip", "clip_vision_model"):
        return CLIPVisionModel.from_pretrained(folder, **options)
    if kind != encoder.EfficientNetLiteConfig.model_type:
        raise UserError(
            f"The image encoder in {folder} is of type {kind!r}; give a CLIP model, as XTuner's LLaVA has one."
        )
    return AutoModel.from_pretrained(folder, **options)


def preprocessor(tower: Path) -> dict[str, Any]:
    """What a picture goes through before the encoder: CLIP's own sizes and colours, after it was padded to a square."""
    file = tower / PREPROCESSOR
    if not file.is_file():
        raise UserError(
            f"The image encoder's folder {tower} has no {PREPROCESSOR}, which came with it: fetch it again."
        )
    own = json.loads(file.read_text(encoding="utf-8"))
    found = {key: own[key] for key in CLIP_SIZES if key in own}
    for key, form in (("size", {"shortest_edge": None}), ("crop_size", {"height": None, "width": None})):
        if isinstance(found.get(key), int):  # as older ones say it
            found[key] = dict.fromkeys(form, found[key])
    return {**found, "do_pad": True}


def seeing(form: ChatFormat, vision: dict[str, Any]) -> ChatFormat:
    """The prompt format with <image>. Raises UserError where the vocabulary has no token to spare."""
    spec = json.loads(form.tokenizer_json)
    vocabulary, added = spec["model"]["vocab"], {token["content"]: token for token in spec["added_tokens"]}
    old = next((token for token in SPARE if token in vocabulary or token in added), None)
    if IMAGE in added:
        return ChatFormat(form.tokenizer_json, form.default_system, vision)
    if old is None:
        raise UserError(f"The tokenizer has none of {', '.join(SPARE)} to become {IMAGE}; choose another base model.")
    number = added[old]["id"] if old in added else vocabulary[old]
    if old in vocabulary:
        vocabulary[IMAGE] = vocabulary.pop(old)
        spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "".join(m) != old]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    others = [token for token in spec["added_tokens"] if token["content"] != old]
    spec["added_tokens"] = sorted([*others, {"id": number, "content": IMAGE, **flags}], key=lambda token: token["id"])
    return ChatFormat(json.dumps(spec, ensure_ascii=False), form.default_system, vision)


@torch.inference_mode()
def settle(model: LlavaForConditionalGeneration, vision: dict[str, Any]) -> None:
    """Scale a fresh projector so that what it makes of pictures is as large as the embeddings of words: it then needs a
    fraction of the steps."""
    projector, eyes = model.model.multi_modal_projector, Eyes(model, vision)
    projector.linear_1.bias.zero_()
    projector.linear_2.bias.zero_()
    drawings = [drawn.draw(drawn.scene(f"settle/{i}")) for i in range(BATCH)]
    words = model.get_input_embeddings().weight.float().square().mean().sqrt()
    as_large_as_words(projector, eyes.encode(drawings), words)


@torch.no_grad()
def as_large_as_words(projector: torch.nn.Module, features: Tensor, size: Tensor) -> None:
    """Scale what the projector makes of these features to the root mean square `size`."""
    factor = size / projector(features).float().square().mean().sqrt()
    for weight in projector.linear_2.parameters():
        weight.mul_(factor)


# ----------------------------------------------------------------------------------------------------- the projector


def projector_file(path: Path) -> Path:
    """The file with a projector's weights that a file or a folder stands for. Raises UserError."""
    if path.is_file():
        return path
    for pattern in (
        "*projector*.safetensors",
        "model.safetensors",
        "*projector*.bin",
        "pytorch_model.bin",
        "*projector*.pth",
    ):
        if found := sorted(path.glob(pattern)):
            return found[0]
    raise UserError(f"There is no projector in {path}: give XTuner's projector folder or LLaVA's mm_projector.bin.")


def read_projector(path: Path) -> dict[str, Tensor]:
    """{"linear_1.weight", ..}, of XTuner's, LLaVA's or transformers' names. Of pickles tensors alone are loaded, nothing in
    them is run. Raises UserError."""
    file = projector_file(path)
    try:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise UserError(f"The projector {file} cannot be read ({error}): fetch it again.") from error
    except Exception as error:  # pickle's own, of anything that is no tensor
        raise UserError(
            f"The projector {file} holds more than tensors, which could run code when loaded, and is refused: save its "
            f"weights alone, as safetensors. ({type(error).__name__})"
        ) from error
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else {}
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (match := PROJECTOR_NAME.search(name)):
            found[f"{'linear_1' if match[1] == '0' else LINEAR[match[1]]}.{match[2]}"] = tensor
    wanted = {f"{part}.{kind}" for part in ("linear_1", "linear_2") for kind in ("weight", "bias")}
    if set(found) != wanted:
        raise UserError(
            f"The projector {file} has not the weights of two linear layers but {', '.join(sorted(tensors)[:4]) or 'none'}; "
            "XTuner's and LLaVA's of type mlp2x_gelu are read."
        )
    return found


def load_projector(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Raises UserError where the sizes are another model's."""
    tensors, own = read_projector(path), model.model.multi_modal_projector
    if wrong := [name for name, weight in own.named_parameters() if weight.shape != tensors[name].shape]:
        shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in wrong)
        raise UserError(
            f"The projector {path} belongs to other models: {shapes} do not fit; take another or a fresh one, "
            "--set vision.projector='' --set vision.starter=''."
        )
    own.load_state_dict(tensors)


def write_projector(folder: Path, target: Path) -> None:
    """The projector of a model's folder in the layout of XTuner's ProjectorModel, whose names are LLaVA's too, behind
    "model.mm_projector". Raises UserError."""
    if target.exists():
        raise UserError(f"{target} is there already; choose another folder.")
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - safetensors has no other way
                if "multi_modal_projector." in name:
                    old = (
                        name.rpartition("multi_modal_projector.")[2]
                        .replace("linear_1", "model.0")
                        .replace("linear_2", "model.2")
                    )
                    tensors[old] = weights.get_tensor(name)
    if not tensors:
        raise UserError(f"The model in {folder} has no projector: it does not see.")
    outputs, inputs = tensors["model.0.weight"].shape
    config = {"model_type": "projector", "architectures": ["ProjectorModel"], "visual_hidden_size": inputs}
    config |= {"llm_hidden_size": outputs, "depth": 2, "hidden_act": "gelu", "bias": True}
    new = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    with models.disk_errors(new):
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    (new / "config.json").write_text(json.dumps(config, indent=1))
    new.rename(target)


# ---------------------------------------------------------------------------------------------------------- pictures


class Eyes:
    """What a model sees of pictures: `encode` gives patches, before the projector. Those of a picture that was `see`n have
    ids from `first` on, one after another, which `embed` looks up."""

    def __init__(self, model: PreTrainedModel, vision: dict[str, Any]) -> None:
        self.model, self.patches = model, vision["patches"]
        self.first = model.get_input_embeddings().weight.shape[0]
        self.processor = LlavaImageProcessorPil(**vision[PREPROCESSOR])
        self.numbers: dict[str, int] = {}  # by the picture's content
        self.features: dict[int, Tensor] = {}  # [patches, features of one] by number; the oldest first
        self.most: int | None = None  # pictures that are kept
        self.watched: dict[int, str] = {}  # those that are encoded whenever they are used, by number
        torch.backends.cudnn.allow_tf32 = False  # a merge is proved on the CPU, which shall see the same
        as_they_are = {"do_pad": False, "do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        every = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))
        # What the processor makes of each shade, [3, 256]: looked up where the encoder is, which is faster there.
        self.shades = self.processor(every, **as_they_are)["pixel_values"][0, :, 0].to(model.device)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """[pictures, 3, height, width], as the processor makes them."""
        return self._shaded(self._shrunk(images))

    def _shrunk(self, images: Sequence[Image.Image]) -> Tensor:
        """[pictures, 3, height, width] of bytes."""
        plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        return self.processor([self._small(image) for image in images], **plain)["pixel_values"]

    def _shaded(self, shrunk: Tensor) -> Tensor:
        shrunk = shrunk.to(self.shades.device).int()
        return torch.stack([shades[shrunk[:, i]] for i, shades in enumerate(self.shades)], 1)

    def _small(self, image: Image.Image) -> Image.Image:
        """The picture as the processor pads and shrinks it, byte for byte; Pillow alone is quicker and lets other threads run."""
        values, side = self.processor, max(image.size)
        if not (values.do_pad and values.do_resize and (edge := values.size.shortest_edge)):
            return image
        square = Image.new("RGB", (side, side), tuple(int(255 * part) for part in values.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square.resize((edge, edge), values.resample)

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """[pictures, patches, features]"""
        return self._encode(self.pixels(images))

    @torch.inference_mode()
    def _encode(self, pixels: Tensor) -> Tensor:
        return self._encode_learning(pixels)

    def _encode_learning(self, pixels: Tensor) -> Tensor:
        core, config = self.model.model, self.model.config
        pixels = pixels.to(self.model.device, core.vision_tower.dtype)
        seen = core.vision_tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
        return seen[:, 1:] if config.vision_feature_select_strategy == "default" else seen

    def see(self, picture: Image.Image | str | Path) -> list[int]:
        """The ids of its patches; encoded if it was not seen before."""
        key = digest(picture)
        with LOCK:
            if key not in self.numbers:
                self._keep(key, self.encode([opened(picture)])[0])
            start = self.first + self.numbers[key] * self.patches
        return list(range(start, start + self.patches))

    def look(self, files: Sequence[str]) -> None:
        """`see` many files, in batches; what they were encoded to is kept in the user's cache, SHARD of them in a file, which is
        mapped into memory, not read."""
        keys = {digest(file): file for file in files}
        missing = [(key, file) for key, file in keys.items() if key not in self.numbers]
        room = models.free_memory() // 8 if missing and self.model.device.type == "cuda" else 0
        for at in range(0, len(missing), SHARD):
            some = dict(missing[at : at + SHARD])
            features = self._shard(some)
            if features[0].nbytes * len(missing) < room:
                features = features.to(self.model.device)  # every step would else wait for its own
            for key, of_one in zip(some, features, strict=True):
                self._keep(key, of_one)

    def _shard(self, files: dict[str, str]) -> Tensor:
        """[pictures, patches, features] of files by their digests."""
        place = embedded.cache_dir() / "pictures"
        place.mkdir(parents=True, exist_ok=True)
        cached = place / f"{embedded.digest_of([self._encoder, self.processor.to_dict(), list(files)])}.safetensors"
        with embedded.locked(cached.with_suffix(".lock"), "looking at the pictures"):
            if not cached.exists():
                found = []
                with (
                    ThreadPoolExecutor() as pool,
                    tqdm(total=len(files), desc="Looking at the pictures", unit="picture") as bar,
                ):
                    shrunk = ahead(pool, lambda file: self._shrunk([opened(file)]), files.values(), 4 * BATCH)
                    while batch := list(itertools.islice(shrunk, BATCH)):
                        found.append(self._encode(self._shaded(torch.cat(batch))).cpu())
                        bar.update(len(batch))
                with models.disk_errors(cached):
                    save_file({"features": torch.cat(found)}, new := cached.with_suffix(".tmp"))
                new.replace(cached)
        return load_file(cached)["features"]

    @functools.cached_property
    def _encoder(self) -> str:
        """The sha256 of its weights, before anything trains them, and of what bounds its features."""
        found = hashlib.sha256(str(getattr(self.model.config.vision_config, "limits", "")).encode())
        for weight in self.model.model.vision_tower.state_dict().values():
            found.update(weight.cpu().flatten().view(torch.uint8).numpy())
        return found.hexdigest()

    def watch(self, files: Sequence[str]) -> None:
        """Encode these, which were `look`ed at, anew whenever they are used, with gradients: the encoder is trained."""
        self.watched = {self.numbers[digest(file)]: file for file in files}

    def _keep(self, key: str, features: Tensor) -> None:
        number = max(self.features, default=-1) + 1
        self.numbers[key], self.features[number] = number, features
        if self.most and len(self.features) > self.most:
            del self.features[self.numbers.pop(next(iter(self.numbers)))]

    def forget_beyond(self, size: int = STORE_BYTES) -> None:
        """Keep about so many bytes of pictures from now on."""
        one = self.patches * self.model.config.vision_config.hidden_size * 4
        self.most = max(64, size // one)

    def embed(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The embeddings `hidden` with the projected patches where ids are beyond the vocabulary."""
        seen = ids >= self.first
        at = ids[seen] - self.first
        which, of = (at // self.patches).unique(return_inverse=True)
        projector = self.model.model.multi_modal_projector
        numbers = which.tolist()
        if self.watched:
            features = self._encode_learning(self.pixels([opened(self.watched[i]) for i in numbers]))
        else:
            features = torch.stack([self.features[i] for i in numbers]).to(hidden.device)
        dtype = list(projector.parameters())[-1].dtype  # while it is trained, its copy's
        found = projector(features.to(dtype))
        return hidden.index_put((seen,), found[of, at % self.patches].to(hidden.dtype))

    def unused(self, hidden: Tensor) -> Tensor:
        """The same, and gradients of zero for what is trained here: texts alone do not use it, and nothing else may be."""
        parts = (self.model.model.multi_modal_projector, self.model.model.vision_tower)
        trained = [weight for part in parts for weight in part.parameters() if weight.requires_grad]
        return hidden + 0.0 * sum(weight.sum() for weight in trained) if torch.is_grad_enabled() else hidden


def ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, most: int) -> Iterator:
    """`map` by several threads, whose results are at most so many ahead of who takes them."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def digest(picture: Image.Image | str | Path) -> str:
    """Of its content."""
    if isinstance(picture, Image.Image):
        return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    if str(picture).startswith("data:"):
        return hashlib.sha256(str(picture).encode()).hexdigest()
    return embedded.sha256(Path(picture))


def opened(picture: Image.Image | str | Path) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if str(picture).startswith("data:"):
        return pictures.from_data_url(str(picture))
    try:
        return pictures.load(Path(picture))
    except UserError as error:
        raise UserError(f"The picture {picture} {error}.") from error


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise UserError("Write it as python -m finetune.vision MODEL FOLDER.")
    write_projector(Path(arguments[0]), Path(arguments[1]))
    embedded.say(f"{arguments[1]} is written.")


if __name__ == "__main__":
    embedded.command(main)
