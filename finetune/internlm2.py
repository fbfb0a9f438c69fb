"""InternLM2 to native parts, without remote code: its tokenizer.

Under transformers 5 the tokenizer code that InternLM2 ships puts its control tokens outside the embedding's 92544
rows, and LlamaTokenizer splits almost every text otherwise than InternLM2 does.
"""

import hashlib
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from finetune.errors import UserError

# Every InternLM2 model ships this one file; a flipped byte in it would pass all other checks and spoil the ids.
TOKENIZER_SHA256 = "f868398fc4e05ee1e8aeba95ddf18ddcc45b8bce55d5093bead5bbf80429b48b"
# The last slots of the vocabulary; tokenizer.model calls them [UNUSED_TOKEN_141] to [UNUSED_TOKEN_146].
CONTROL_TOKENS = {
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}


def build_tokenizer(model_file: Path) -> Tokenizer:
    """The fast tokenizer with the ids of InternLM2's own; UserError where `model_file` is not its tokenizer.model.

    `encode` puts <s> first. Control tokens written in a text count as such unless `encode_special_tokens` is set.
    Wanted difference: "[UNUSED_TOKEN_145]" in a text is just that, where InternLM2's own reads <|im_end|>.
    """
    pieces = _load_pieces(model_file)
    ids = range(pieces.vocab_size())
    names = [CONTROL_TOKENS.get(i, pieces.id_to_piece(i)) for i in ids]
    special = [i for i in ids if pieces.is_control(i) or pieces.is_unknown(i) or i in CONTROL_TOKENS]

    # No merge ends in a special piece: "<s>" as text is "<s" and ">".
    scores = {names[i]: pieces.get_score(i) for i in ids if i not in special}
    merges = [
        (score, cut, len(name) - cut, name)
        for name, score in scores.items()
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    merges.sort(reverse=True)  # best score first, as sentencepiece merges

    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[(name[:cut], name[cut:]) for _, cut, _, name in merges],
            unk_token="<unk>",  # noqa: S106 - no password
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # No space put in front, and no pre-tokenizer: pieces such as "}\n\n" and "\t▁\n" reach across words.
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([names[i] for i in special])  # found before the normalizer runs
    return tokenizer


def _load_pieces(model_file: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        data = model_file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read InternLM2's tokenizer {model_file} ({error.strerror}): "
            "the base's folder must hold the tokenizer.model that came with it"
        ) from None
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{model_file} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
    if (found := hashlib.sha256(data).hexdigest()) != TOKENIZER_SHA256:
        raise UserError(
            f"{model_file} is damaged or belongs to another model: its sha256 is {found[:8]}..., "
            f"InternLM2's is {TOKENIZER_SHA256[:8]}...; download tokenizer.model again from InternLM2's repository"
        )
    sentencepiece.set_min_log_level(2)  # it warns of the piece "\0" at each load
    return sentencepiece.SentencePieceProcessor(model_proto=data)
