"""Prompts through the UMT5 encoder of Wan, by transformers: embeddings made ahead of time."""

from __future__ import annotations

import html
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from forcingkv.headmaps.errors import InputError, first_line
from forcingkv.models.hub import hub_id
from forcingkv.models.tensor_files import TensorFiles, check_fit, open_tensors

WAN_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
WAN_TOKENIZER = "google/umt5-xxl"
BROKEN_TRANSFORMERS = "5.0."
"""Releases of transformers that load UMT5 without its embeddings, silently: what they encode is noise."""

# Wan's name of a tensor in a block -> that of transformers.
_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    **{f"attn.{part}.weight": f"layer.0.SelfAttention.{part}.weight" for part in "qkvo"},
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_WHOLE = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
TIED = "encoder.embed_tokens.weight"
"""What transformers also calls `shared.weight`."""
_IN_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class PromptEncoder:
    """A text encoder with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    """Where it came from, for the record."""

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return int(self.model.config.d_model)

    @torch.no_grad()
    def encode(self, prompt: str, length: int) -> npt.NDArray[np.float32]:
        """The embedding of a prompt: (tokens, width), at most `length` tokens, without padding.

        Wan pads with zeros after encoding and masks padding while encoding, so what is not there
        need not be computed. Raises InputError for a prompt that is empty.
        """
        text = clean_prompt(prompt)
        if not text:
            raise InputError("the prompt is empty", where="prompt", expected="some words")
        tokens = self.tokenizer(text, max_length=length, truncation=True, return_tensors="pt")
        states = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        embedding: npt.NDArray[np.float32] = states[0].float().numpy()
        return embedding


def clean_prompt(prompt: str) -> str:
    """A prompt as Wan cleans it: broken encodings repaired, HTML entities and runs of spaces resolved."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def load_prompt_encoder(place: str | Path, tokenizer: str | Path | None = None) -> PromptEncoder:
    """Load a UMT5 encoder in the dtype of its file.

    Args:
        place: a folder of Wan (with `models_t5_umt5-xxl-enc-bf16.pth`), that file itself, a folder of
            diffusers (with `text_encoder/`) or of transformers, or a hub id of one of the latter.
        tokenizer: its folder or hub id; None: the one beside the encoder (`google/umt5-xxl/` in
            Wan's folder, `tokenizer/` in that of diffusers, the folder itself in that of transformers).

    Raises InputError where encoder or tokenizer cannot be found or read, a tensor does not fit, or this
    release of transformers is known to load UMT5 wrongly.
    """
    release = importlib.metadata.version("transformers")
    if release.startswith(BROKEN_TRANSFORMERS):
        what = f"is release {release}, which loads UMT5 with wrong embeddings"
        expected, hint = "4.51 or later, but not 5.0", "Install another: pip install 'transformers>=5.1'"
        raise InputError(what, where="transformers", expected=expected, hint=hint)
    path = Path(place)
    if path.is_file() or (path / WAN_ENCODER).is_file():
        file = path if path.is_file() else path / WAN_ENCODER
        model, words = _wan_encoder(open_tensors(file)), tokenizer or file.parent / WAN_TOKENIZER
        return PromptEncoder(model, _pretrained("AutoTokenizer", words), file.name)
    if not path.exists():
        hub_id(place, "a folder with the text encoder, a file")
    in_folders = (path / "text_encoder").is_dir() or not path.exists()
    encoder, beside = ({"subfolder": name} if in_folders else {} for name in ("text_encoder", "tokenizer"))
    model = _pretrained("UMT5EncoderModel", place, dtype="auto", **encoder).eval()
    words = _pretrained("AutoTokenizer", tokenizer or place, **({} if tokenizer else beside))
    return PromptEncoder(model, words, path.name)


def _pretrained(kind: str, place: str | Path, **options: str) -> Any:
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(str(place), **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"cannot be read by transformers' {kind} ({first_line(error)})"
        hint = "Name the folder with --text-encoder and, if it lies elsewhere, --tokenizer."
        raise InputError(what, where=str(place), hint=hint) from error


def _wan_encoder(files: TensorFiles) -> Any:
    """The encoder of transformers with weights in Wan's naming; sizes follow from their shapes."""
    import transformers

    shapes = files.shapes
    try:
        vocabulary, width = shapes["token_embedding.weight"]
        inner = shapes["blocks.0.attn.q.weight"][0]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        hidden = shapes["blocks.0.ffn.fc1.weight"][0]
    except (KeyError, ValueError) as error:
        what = "is not the text encoder of Wan"
        raise InputError(what, where=str(files.where), expected=WAN_ENCODER) from error
    layers = 1 + max(int(match[1]) for name in shapes if (match := _IN_BLOCK.match(name)))
    config = transformers.UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=hidden,
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = wanted.pop(TIED, None) is not None
    names = {_transformers_name(name): name for name in shapes}
    check_fit(files, names, wanted, "the text encoder of Wan")
    state = {name: files.read(stored) for name, stored in names.items()}
    if tied:
        state[TIED] = state["shared.weight"]
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _transformers_name(name: str) -> str:
    match = _IN_BLOCK.match(name)
    if match is None:
        return _WHOLE.get(name, name)
    inner = _BLOCK.get(match[2])
    return f"encoder.block.{match[1]}.{inner}" if inner else name
