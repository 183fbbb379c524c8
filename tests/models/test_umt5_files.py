"""Text encoders as people have them: each layout gives the embeddings of Wan's layout of the same weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from forcingkv.headmaps import InputError
from forcingkv.models import umt5
from forcingkv.models.encoder_places import find_encoder
from forcingkv.models.text_encoder import load_prompt_encoder, open_encoder
from forcingkv.runtime import memory
from tests.models.test_text_encoder import LENGTH, PROMPTS, encoder, wan_state, write_tokenizer

State = dict[str, Tensor]
LINEAR = re.compile(
    r"SelfAttention\.[qkvo]\.weight|wi_\d\.weight|wo\.weight|attn\.[qkvo]\.|ffn\.(gate\.0|fc\d)\."
)
SHARED = "shared.weight"
FP8 = torch.float8_e4m3fn


def transformers_state() -> State:
    """As files of one have it: the embedding once."""
    state = encoder().state_dict()
    return {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}


def in_8_bits(state: State, scale: float | Callable[[Tensor], Tensor] | None = None) -> tuple[State, State]:
    """Matrices in 8-bit floats and the rest in bfloat16: what is stored, and what it means."""
    stored, meant = {}, {}
    for name, tensor in state.items():
        if LINEAR.search(name):
            factor = scale(tensor) if callable(scale) else torch.tensor(scale or 1.0)
            stored[name] = (tensor / factor).to(FP8)
            meant[name] = (stored[name].float() * factor).to(torch.bfloat16)
            if scale:
                stored[name.removesuffix(".weight") + ".scale_weight"] = factor
        else:
            stored[name] = meant[name] = tensor.to(torch.bfloat16)
    return stored, meant


def as_wan(state: State, folder: Path) -> Path:
    """Wan's folder with weights in transformers' naming."""
    write_tokenizer(folder / "google" / "umt5-xxl")
    named = transformers.UMT5EncoderModel(encoder().config)
    named.load_state_dict({**state, "encoder.embed_tokens.weight": state[SHARED]}, assign=True)
    torch.save(wan_state(named), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


def embeddings(place: Path, tokenizer: Path | None = None) -> list[Any]:
    loaded = load_prompt_encoder(place, tokenizer)
    return [loaded.encode(prompt, LENGTH) for prompt in PROMPTS]


def same(place: Path, meant: State, tmp_path: Path, tolerance: float = 0.0) -> None:
    """The embeddings are those of Wan's folder with what the weights mean."""
    for found, expected in zip(embeddings(place), embeddings(as_wan(meant, tmp_path / "wan")), strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)
        assert np.abs(expected).max() > 0.1


def one_file(state: State, folder: Path, name: str = "umt5.safetensors") -> Path:
    write_tokenizer(folder / "google" / "umt5-xxl")
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["umt5.safetensors", "umt5.pth"])
@pytest.mark.parametrize("prefix", ["", "text_encoders.umt5xxl.transformer.", "module."])
def test_one_file_in_the_naming_of_transformers(name: str, prefix: str, tmp_path: Path) -> None:
    state = transformers_state()
    spiece = {"spiece_model": torch.zeros(9, dtype=torch.uint8), "lm_head.weight": torch.zeros(8, 24)}
    path = one_file({f"{prefix}{key}": t for key, t in {**state, **spiece}.items()}, tmp_path, name)
    same(path, state, tmp_path)


def test_one_safetensors_file_in_the_naming_of_wan(tmp_path: Path) -> None:
    path = one_file(wan_state(encoder()), tmp_path)
    same(path, transformers_state(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_that_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in transformers_state().items()}
    path = one_file(state, tmp_path)
    assert f"torch.{open_encoder(find_encoder(path)).dtype}" == str(dtype)
    loaded = load_prompt_encoder(path).model
    kept = {str(p.dtype) for name, p in loaded.named_parameters() if not name.endswith("wo.weight")}
    assert kept == {str(dtype)}
    wo = loaded.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype
    assert wo == (torch.float32 if dtype == torch.float16 else dtype), (
        "transformers keeps it so: it overflows"
    )
    same(path, state, tmp_path)


def test_the_few_in_another_dtype_follow_the_many(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in transformers_state().items()}
    mixed = {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in state.items()}
    same(one_file(mixed, tmp_path), state, tmp_path)


def a_row(tensor: Tensor) -> Tensor:
    return 2.0 ** torch.arange(len(tensor)).remainder(3)[:, None]


@pytest.mark.parametrize("naming", ["transformers", "Wan"])
@pytest.mark.parametrize("scale", [None, 0.25, a_row], ids=["plain", "scaled", "scaled by row"])
def test_8_bit_floats_are_what_they_mean(naming: str, scale: Any, tmp_path: Path) -> None:
    """Powers of two as scales, so that nothing rounds and both must be the same to the bit."""
    stored, meant = in_8_bits(transformers_state(), scale)
    if naming == "Wan":
        own = in_8_bits(wan_state(encoder()), scale)[0]
        path = one_file(own, tmp_path, "umt5-xxl-enc-fp8_e4m3fn.safetensors")
    else:
        mark = {"scaled_fp8": torch.zeros(2, dtype=FP8), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
        path = one_file({**stored, **(mark if scale else {})}, tmp_path)
    same(path, meant, tmp_path)


def test_comfy_s_scaled_file_of_2025(tmp_path: Path) -> None:
    """Names of umt5_xxl_fp8_e4m3fn_scaled.safetensors, any scale: within what bfloat16 rounds."""
    stored, meant = in_8_bits(transformers_state(), 0.0123)
    stored = {n: t.to(torch.float16) if t.dtype == torch.bfloat16 else t for n, t in stored.items()}
    stored["scaled_fp8"] = torch.zeros(0, dtype=FP8)
    path = one_file(stored, tmp_path, "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    assert open_encoder(find_encoder(path)).dtype == "bfloat16"
    same(path, meant, tmp_path, tolerance=1e-6)


def test_comfy_s_scaled_file_of_today(tmp_path: Path) -> None:
    stored, meant = in_8_bits(transformers_state(), 0.5)
    said = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    state = {}
    for name, tensor in stored.items():
        if name.endswith(".scale_weight"):
            layer = name.removesuffix(".scale_weight")
            state |= {
                f"{layer}.weight_scale": tensor,
                f"{layer}.input_scale": tensor,
                f"{layer}.comfy_quant": said,
            }
        else:
            state[name] = tensor
    same(one_file(state, tmp_path), meant, tmp_path)


def without_a_scale() -> State:
    stored, _ = in_8_bits(transformers_state(), 0.5)
    del stored["encoder.block.1.layer.0.SelfAttention.q.scale_weight"]
    return stored


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without_a_scale, r"missing the scale of encoder.block.1.layer.0.SelfAttention.q.weight"),
        (
            lambda: {n: t.to(torch.int8) for n, t in transformers_state().items()},
            r"k\.weight is stored as int8",
        ),
        (lambda: {n: t.double() for n, t in transformers_state().items()}, r"k\.weight is float64"),
    ],
)
def test_what_is_quantised_otherwise_is_refused(
    state: Callable[[], State], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        load_prompt_encoder(one_file(state(), tmp_path))


def diffusers_folder(folder: Path, **config: Any) -> Path:
    """As Wan's public folder: not tied by its config, the embedding in the file once."""
    model = encoder()
    model.save_pretrained(folder / "text_encoder", max_shard_size="8KB")
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False} | config))
    write_tokenizer(folder / "tokenizer")
    return folder


def test_a_folder_whose_config_does_not_tie_the_embedding(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "diffusers")
    assert len(list((folder / "text_encoder").glob("model-*.safetensors"))) > 1, "as shards"
    same(folder, transformers_state(), tmp_path)
    same(folder / "text_encoder", transformers_state(), tmp_path)
    binary = folder / "text_encoder" / "pytorch_model.bin"
    torch.save(transformers_state(), binary)
    for shard in (folder / "text_encoder").glob("*.safetensors*"):
        shard.unlink()
    same(folder, transformers_state(), tmp_path)


def test_sizes_that_no_shape_shows_come_from_the_config(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "diffusers", layer_norm_epsilon=0.5)
    plain = embeddings(diffusers_folder(tmp_path / "plain"))
    assert np.abs(embeddings(folder)[0] - plain[0]).max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "text_encoder" / "config.json").write_text('{"model_type": "t5"}'),
            "describes t5",
        ),
        (
            lambda folder: next((folder / "text_encoder").glob("model-00002*")).unlink(),
            "does not fit the text encoder of Wan .*missing encoder.block",
        ),
        (
            lambda folder: save_file(
                {"shared.weight": torch.zeros(8, 24)}, folder / "text_encoder" / "model.fp16.safetensors"
            ),
            "shared.weight is in .* and .*Name the one file",
        ),
    ],
)
def test_folders_that_are_not_whole_are_refused(
    change: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    folder = diffusers_folder(tmp_path)
    change(folder)
    with pytest.raises(InputError, match=message):
        load_prompt_encoder(folder)


def test_a_second_embedding_that_differs_is_refused(tmp_path: Path) -> None:
    state = transformers_state()
    state["encoder.embed_tokens.weight"] = state[SHARED].clone()
    same(one_file(state, tmp_path), transformers_state(), tmp_path)
    state["encoder.embed_tokens.weight"] += 1
    with pytest.raises(InputError, match=r"embed_tokens\.weight differs from shared\.weight"):
        load_prompt_encoder(one_file(state, tmp_path))


def on_no_device(model: type, config: Any) -> Any:
    with torch.device("meta"):
        return model(config)


def test_an_embedding_that_is_not_tied_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a release of transformers does: here one whose classes tie nothing."""

    class Untied(transformers.UMT5EncoderModel):  # type: ignore[misc]
        def set_input_embeddings(self, new_embeddings: Any) -> None:
            self.shared = new_embeddings
            self.encoder.embed_tokens = torch.nn.Embedding.from_pretrained(torch.zeros(8, 24))

    monkeypatch.setattr(umt5, "empty_model", lambda config: on_no_device(Untied, config))
    with pytest.raises(InputError, match=r"embed_tokens is not shared.*pip install"):
        load_prompt_encoder(diffusers_folder(tmp_path))


def test_a_weight_that_nothing_fills_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class More(transformers.UMT5EncoderModel):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("forgotten", torch.zeros(3), persistent=False)

    monkeypatch.setattr(umt5, "empty_model", lambda config: on_no_device(More, config))
    with pytest.raises(InputError, match="leaves 1 weights of the encoder without a value: forgotten"):
        load_prompt_encoder(diffusers_folder(tmp_path))


def test_a_weight_that_is_left_over_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are compared with the model when they are opened; here it is another when they are loaded."""

    class Fewer(transformers.UMT5EncoderModel):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.encoder.final_layer_norm = torch.nn.Identity()

    opened = open_encoder(find_encoder(diffusers_folder(tmp_path)))
    monkeypatch.setattr(umt5, "empty_model", lambda config: on_no_device(Fewer, config))
    with pytest.raises(
        InputError, match=r"has 1 weights that the encoder does not know: encoder.final_layer"
    ):
        opened.load()


def test_files_that_are_no_encoder_for_us_are_refused(tmp_path: Path) -> None:
    (tmp_path / "umt5-xxl-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="is a GGUF file, which is not read"):
        load_prompt_encoder(tmp_path / "umt5-xxl-Q8_0.gguf")
    path = tmp_path / "alone" / "umt5.safetensors"
    path.parent.mkdir()
    save_file(transformers_state(), path)
    with pytest.raises(InputError, match=r"has no tokenizer beside it.*--tokenizer google/umt5-xxl"):
        load_prompt_encoder(path)
    one = as_wan(transformers_state(), tmp_path / "wan")
    (one / "models_t5_umt5-xxl-enc-bf16.pth").rename(one / "models_t5_umt5-xxl-enc-fp8.pth")
    (one / "models_t5_umt5-xxl-enc-int8.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds 2 text encoders: .*Name the file"):
        load_prompt_encoder(one)


def test_a_tokenizer_of_another_encoder_is_refused(tmp_path: Path) -> None:
    state = transformers_state()
    state[SHARED] = torch.randn(40, 24)
    path = one_file(state, tmp_path)
    with pytest.raises(InputError, match=r"tokenizer has 8 tokens, and the encoder umt5\.safetensors 40"):
        load_prompt_encoder(path)


def test_memory_is_asked_for_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = one_file(in_8_bits(transformers_state(), 0.5)[0], tmp_path)
    files = open_encoder(find_encoder(path))
    numbers = sum(tensor.numel() for tensor in transformers_state().values())
    largest = 4 * max(tensor.numel() for name, tensor in transformers_state().items() if LINEAR.search(name))
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * numbers + largest)
    files.require_memory()
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * numbers + largest - 1)
    with pytest.raises(
        InputError, match=r"the text encoder needs about .*\(weights in bfloat16 .*, conversion "
    ):
        files.require_memory()


@pytest.mark.parametrize("entry", ["state_dict", "encoder", "model"])
def test_an_encoder_is_found_in_whatever_entry(entry: str, tmp_path: Path) -> None:
    state = wan_state(encoder())
    path = one_file({entry: state, "step": 3}, tmp_path, "umt5.pth")  # type: ignore[dict-item]
    same(path, transformers_state(), tmp_path)
    torch.save({entry: state, "generator_ema": state}, path)
    with pytest.raises(InputError, match="holds 2 entries that could be meant"):
        open_encoder(find_encoder(path))


def test_the_embedding_may_go_by_its_other_name_alone(tmp_path: Path) -> None:
    state = transformers_state()
    named = {**state, "encoder.embed_tokens.weight": state[SHARED]}
    del named[SHARED]
    same(one_file(named, tmp_path), state, tmp_path)


def test_a_t5_is_called_a_t5(tmp_path: Path) -> None:
    state = transformers_state()
    biases = [name for name in state if "relative_attention_bias" in name]
    for name in biases[1:]:
        del state[name]
    with pytest.raises(InputError, match="It is a T5 and no UMT5"):
        open_encoder(find_encoder(one_file(state, tmp_path)))
