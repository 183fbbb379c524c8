"""Text embeddings: both layouts of the encoder against transformers, and what the runtime gets."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from forcingkv.headmaps import InputError
from forcingkv.models.text_encoder import PromptCutWarning, load_prompt_encoder
from forcingkv.runtime.prompts import clean_prompt
from tests.conftest import Ran

WIDTH, LENGTH = 24, 12
PROMPTS = ["a red kite", "a kite &amp;  a red red dune", "kite"]
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "kite", "dune", "&"]


def write_tokenizer(folder: Path) -> None:
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=len(WORDS),
        d_model=WIDTH,
        d_kv=5,
        d_ff=36,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    )
    model = transformers.UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


WAN = [
    (r"^shared\.weight$", "token_embedding.weight"),
    (r"^encoder\.final_layer_norm\.weight$", "norm.weight"),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight$", r"blocks.\1.norm1.weight"),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight$", r"blocks.\1.attn.\2.weight"),
    (
        r"^encoder\.block\.(\d+)\..*relative_attention_bias\.weight$",
        r"blocks.\1.pos_embedding.embedding.weight",
    ),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight$", r"blocks.\1.norm2.weight"),
    (r"^encoder\.block\.(\d+)\..*\.wi_0\.weight$", r"blocks.\1.ffn.gate.0.weight"),
    (r"^encoder\.block\.(\d+)\..*\.wi_1\.weight$", r"blocks.\1.ffn.fc1.weight"),
    (r"^encoder\.block\.(\d+)\..*\.wo\.weight$", r"blocks.\1.ffn.fc2.weight"),
]


def wan_state(model: Any) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, wan in WAN:
            if re.match(pattern, name):
                state[re.sub(pattern, wan, name)] = tensor
    return state


def wan_folder(folder: Path) -> Path:
    write_tokenizer(folder / "google" / "umt5-xxl")
    torch.save(wan_state(encoder()), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


def diffusers_folder(folder: Path) -> Path:
    encoder().save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


def transformers_folder(folder: Path) -> Path:
    encoder().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


LAYOUTS = {"Wan": wan_folder, "diffusers": diffusers_folder, "transformers": transformers_folder}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_are_those_of_the_padded_masked_encoder(layout: str, tmp_path: Path) -> None:
    """Wan pads to the whole length, masks padding, and zeroes what it gives: compared without ours."""
    folder = LAYOUTS[layout](tmp_path / "encoder")
    loaded = load_prompt_encoder(folder)
    reference, tokenizer = encoder(), loaded.tokenizer
    for prompt in PROMPTS:
        padded = tokenizer(clean_prompt(prompt), padding="max_length", max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            states = reference(padded.input_ids, attention_mask=padded.attention_mask).last_hidden_state[0]
        found = loaded.encode(prompt, LENGTH)
        tokens = int(padded.attention_mask.sum())
        assert found.shape == (tokens, WIDTH)
        np.testing.assert_allclose(found, states[:tokens].numpy(), atol=1e-5)


def test_long_prompts_are_cut(tmp_path: Path) -> None:
    loaded = load_prompt_encoder(transformers_folder(tmp_path))
    with pytest.warns(PromptCutWarning, match=r"has 41 tokens, the last 29 are not used"):
        assert loaded.encode("a " * 40, LENGTH).shape == (LENGTH, WIDTH)
    with pytest.raises(InputError, match="the prompt is empty"):
        loaded.encode(" \n ", LENGTH)


def test_prompts_are_cleaned_as_wan_cleans_them() -> None:
    assert clean_prompt("  a “red”\n\tkite &amp;amp; dune ") == 'a "red" kite & dune'


def missing(state: dict[str, Any]) -> None:
    del state["blocks.1.ffn.fc2.weight"]


def extra(state: dict[str, Any]) -> None:
    state["blocks.1.more.weight"] = torch.zeros(1)


def reshaped(state: dict[str, Any]) -> None:
    state["blocks.2.attn.k.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, "missing encoder.block.1.layer.1.DenseReluDense.wo.weight"),
        (extra, "unexpected blocks.1.more.weight"),
        (reshaped, r"encoder.block.2.layer.0.SelfAttention.k.weight is \(3, 3\) instead of \(20, 24\)"),
        (lambda state: state.clear(), "is not the text encoder of Wan"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    folder = wan_folder(tmp_path)
    file = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)
    with pytest.raises(InputError, match=message):
        load_prompt_encoder(folder)


def test_encoders_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file or folder"):
        load_prompt_encoder(tmp_path / "no" / "such" / "folder")
    with pytest.raises(InputError, match="holds no text encoder; expected Wan's folder"):
        load_prompt_encoder(tmp_path)
    folder = wan_folder(tmp_path / "wan")
    with pytest.raises(InputError, match="cannot be read by transformers' AutoTokenizer"):
        load_prompt_encoder(folder, tokenizer=tmp_path / "elsewhere")


SPEC = f'base = "self-forcing"\nname = "narrow"\ntext_width = {WIDTH}\ntext_length = {LENGTH}\n'


def test_encode_writes_what_generate_reads(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC)
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    folder, out = diffusers_folder(tmp_path / "encoder"), tmp_path / "embeds.safetensors"
    words = ["encode", "--model", tmp_path / "spec.toml", "--text-encoder", folder, "--out", out]
    ran = run(*words, "--prompts", tmp_path / "prompts.txt", "--json")
    assert ran.code == 0, ran.err
    made = {"out": str(out), "prompts": 3, "width": WIDTH, "tokens": [4, 8, 2]}
    assert json.loads(ran.out) == {**made, "dtype": "float32", "went_on_after": 0, "notes": []}
    assert [tuple(t.shape) for t in load_file(out).values()] == [(4, WIDTH), (8, WIDTH), (2, WIDTH)]

    (tmp_path / "switched.jsonl").write_text(json.dumps({"prompts": ["a kite", "a dune"]}) + "\n")
    assert json.loads(run(*words, "--prompts", tmp_path / "switched.jsonl", "--json").out)["prompts"] == 2
    (tmp_path / "switched.jsonl").write_text('{"prompts": "a kite"}\n')
    ran = run(*words, "--prompts", tmp_path / "switched.jsonl")
    assert (ran.code, "line 1 is not a line of prompts" in ran.err) == (2, True), ran.err
    ran = run("encode", "--model", "demo", "--prompts", tmp_path / "prompts.txt", "--out", out)
    assert (ran.code, "there is nothing to encode" in ran.err) == (2, True), ran.err
    words[2] = "self-forcing"
    ran = run(*words, "--prompts", tmp_path / "prompts.txt")
    assert (ran.code, "gives embeddings of width 24; expected 4096" in ran.err) == (2, True), ran.err


def test_releases_of_transformers_that_encode_noise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = transformers_folder(tmp_path), importlib.metadata.version
    for version, works in (("5.0.1", False), ("4.57.1", True), ("5.1.0", True)):
        others = {"transformers": version}
        monkeypatch.setattr(importlib.metadata, "version", lambda name, v=others: v.get(name) or real(name))
        if works:
            assert load_prompt_encoder(folder)
            continue
        with pytest.raises(
            InputError, match=r"transformers is release 5\.0\.1, which .*not 5\.0\..*pip install"
        ):
            load_prompt_encoder(folder)
