"""8-bit floats with scales, of a checkpoint and of a text encoder: both doors give the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.encoder_places import find_encoder
from forcingkv.models.text_encoder import open_encoder
from forcingkv.models.umt5 import open_umt5
from tests.models.test_layouts import SPEC, STATE, State
from tests.models.test_text_encoder import write_tokenizer
from tests.models.test_umt5_files import transformers_state

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Door:
    """One way by which weights come in."""

    state: Callable[[], State]
    q: str
    """One of its matrices, without `weight`."""
    vector: str
    other: str
    """A weight of another model that may stand beside it."""
    open: Callable[[Path], Callable[[str], Tensor]]


def open_as_encoder(path: Path) -> Callable[[str], Tensor]:
    write_tokenizer(path.parent / "google" / "umt5-xxl")
    return open_encoder(find_encoder(path)).files.read


DOORS = {
    "checkpoint": Door(
        lambda: STATE,
        "blocks.1.self_attn.q",
        "blocks.1.self_attn.q.bias",
        "text_encoders.umt5.shared",
        lambda path: load_weights(SPEC, path).__getitem__,
    ),
    "encoder": Door(
        transformers_state,
        "encoder.block.1.layer.0.SelfAttention.q",
        "encoder.final_layer_norm.weight",
        "decoder.block.0.layer.0.SelfAttention.q",
        open_as_encoder,
    ),
}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> Door:
    return DOORS[request.param]


def matrices(state: State) -> list[str]:
    """Those whose columns are even."""
    return [name for name, tensor in state.items() if tensor.dim() == 2 and tensor.shape[1] % 2 == 0]


def scaled(
    state: State,
    key: str = "scale_weight",
    shape: Callable[[int, int], tuple[int, ...]] = lambda rows, columns: (),
    dtype: torch.dtype = FP8,
) -> tuple[State, State]:
    """Matrices in scaled FP8, and what they stand for, in float64 by another way than the reader's."""
    torch.manual_seed(3)
    stored: State = dict(state)
    meant: State = dict(state)
    for name in matrices(state):
        rows, columns = state[name].shape
        scale = torch.rand(shape(rows, columns)) + 0.5
        stored[name] = (state[name] * 4).to(dtype)
        stored[name.removesuffix("weight") + key] = scale
        values = stored[name].double()
        for row in range(rows):
            if scale.dim() == 3:
                width = columns // scale.shape[1]
                for block in range(scale.shape[1]):
                    values[row, block * width : (block + 1) * width] *= float(scale[row, block, 0])
            else:
                values[row] *= float(scale.flatten()[row if scale.numel() > 1 else 0])
        meant[name] = values.float()
    return stored, meant


def opened(
    door: Door,
    state: State,
    folder: Path,
    metadata: dict[str, str] | None = None,
    name: str = "c.safetensors",
) -> Callable[[str], Tensor]:
    folder.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({name: t.contiguous().clone() for name, t in state.items()}, folder / name, metadata)
    else:
        torch.save(state, folder / name)
    return door.open(folder / name)


SHAPES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "one number": lambda rows, columns: (),
    "one in a list": lambda rows, columns: (1,),
    "a row": lambda rows, columns: (rows,),
    "a column": lambda rows, columns: (rows, 1),
    "blocks": lambda rows, columns: (rows, 2, 1),
}


@pytest.mark.parametrize("name", ["c_scaled.safetensors", "c.pt"])
@pytest.mark.parametrize("key", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_fp8_is_what_it_stands_for(
    door: Door, key: str, shape: str, name: str, tmp_path: Path
) -> None:
    dtype = torch.float8_e5m2 if shape == "a row" else FP8
    stored, meant = scaled(door.state(), key, SHAPES[shape], dtype)
    stored["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    stored |= {name.replace("weight", "scale_input"): torch.ones(()) for name in matrices(meant)}
    read = opened(door, stored, tmp_path, name=name)
    for weight, expected in meant.items():
        torch.testing.assert_close(read(weight).float(), expected, rtol=1e-6, atol=0)
    assert read(f"{door.q}.weight").dtype == torch.float32


def note(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


READ = '{"format": "float8_e4m3fn"}'


def test_notes_of_comfyui_are_read(door: Door, tmp_path: Path) -> None:
    stored, meant = scaled(door.state(), "weight_scale")
    names = [name.removesuffix(".weight") for name in matrices(meant)]
    stored |= {f"{name}.comfy_quant": note(READ) for name in names}
    stored |= {f"{name}.input_scale": torch.ones(()) for name in names}
    layers = {name: {"format": "float8_e5m2", "full_precision_matrix_mult": True} for name in names}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    read = opened(door, stored, tmp_path, metadata)
    torch.testing.assert_close(read(f"{door.q}.weight"), meant[f"{door.q}.weight"], rtol=1e-6, atol=0)


NOTES = [
    ('{"format": "nvfp4"}', "describes weights stored as nvfp4"),
    ('{"format": "float8_e4m3fn", "convrot": true}', "describes weights stored as convrot"),
    ("no JSON", "is not a note on how weights are stored"),
    ("[]", "is not a note"),
    ('["format"]', "is not a note"),
    ("", "is not a note"),
    ("[" * 100_000, "is not a note"),
]


@pytest.mark.parametrize(("text", "message"), NOTES)
def test_notes_on_other_weights_are_refused(door: Door, text: str, message: str, tmp_path: Path) -> None:
    stored, _ = scaled(door.state(), "weight_scale")
    with pytest.raises(InputError, match=rf"{door.q}\.comfy_quant {message}"):
        opened(door, stored | {f"{door.q}.comfy_quant": note(text)}, tmp_path)
    if text:
        with pytest.raises(InputError, match=rf"metadata _quantization_metadata {message}"):
            opened(door, stored, tmp_path, {"_quantization_metadata": text})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"blocks.0.ffn.0": {"format": "mxfp8"}}, "describes weights stored as mxfp8"),
        (3, "is not a note"),
        ({"q": 3}, "is not a note"),
    ],
)
def test_metadata_on_other_weights_are_refused(
    door: Door, layers: object, message: str, tmp_path: Path
) -> None:
    stored, _ = scaled(door.state())
    with pytest.raises(InputError, match=rf"_quantization_metadata {message}.*Take the file in bfloat16"):
        opened(door, stored, tmp_path, {"_quantization_metadata": json.dumps({"layers": layers})})


def put(kind: str, *value: Any) -> Callable[[State, Door], None]:
    """Another tensor beside the query; without a value, none."""

    def change(state: State, door: Door) -> None:
        state.pop(f"{door.q}.{kind}", None)
        state.update({f"{door.q}.{kind}": one for one in value})

    return change


def rows(*more: int) -> Callable[[State, Door], None]:
    """A scale of as many rows as the query."""
    return lambda state, door: state.update(
        {f"{door.q}.scale_weight": torch.ones(len(state[f"{door.q}.weight"]), *more)}
    )


def but_one(value: float) -> Callable[[State, Door], None]:
    """A scale a row, all of them 1 but that of one."""

    def change(state: State, door: Door) -> None:
        scale = torch.ones(len(state[f"{door.q}.weight"]))
        scale[3] = value
        state[f"{door.q}.scale_weight"] = scale

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("scale_weight"), "1 tensors: missing the scale of Q.weight: the file is one of scaled weights"),
        (put("scale_weight", torch.ones(5)), r"Q.scale_weight is \(5,\), which is no known scale of"),
        (put("scale_weight", torch.ones(2, 3)), r"is \(2, 3\), which is no known scale"),
        (rows(5, 1), r"is \(\d+, 5, 1\), which is no known scale"),
        (rows(0, 1), r"is \(\d+, 0, 1\), which is no known scale"),
        (rows(24), r"is \(\d+, 24\), which is no known scale"),
        (put("scale_weight", torch.ones(2, dtype=torch.uint8)), r"is \(2,\), which is no known scale"),
        (put("scale_weight", torch.ones((), dtype=torch.uint8)), "is stored as uint8, which is no known sca"),
        (put("scale_weight", torch.tensor(float("nan"))), "Q.scale_weight is not finite"),
        (put("scale_weight", torch.tensor(float("inf"))), "Q.scale_weight is not finite"),
        (put("scale_weight", torch.tensor(0.0)), "Q.scale_weight is not positive"),
        (but_one(float("nan")), "Q.scale_weight is not finite"),
        (but_one(-1.0), "Q.scale_weight is not positive"),
        (
            put("weight_scale", torch.ones(())),
            "Q.scale_weight and Q.weight_scale are both the scale of Q.wei",
        ),
        (put("weight_scale_inv", torch.ones(())), "unexpected Q.weight_scale_inv"),
        (put("x.scale_weight", torch.ones(())), "unexpected Q.x.scale_weight"),
        (put("x.input_scale", torch.ones(())), "unexpected Q.x.input_scale"),
        (put("comfy_quant", torch.ones(3)), "Q.comfy_quant is not a note"),
        (put("comfy_quant", torch.ones(3, dtype=torch.int64)), "Q.comfy_quant is not a note"),
        (
            lambda s, door: s.update({f"{door.q}.weight": s[f"{door.q}.weight"].bfloat16()}),
            "Q.scale_weight is a scale, and Q.weight is stored as bfloat16",
        ),
        (
            lambda s, door: s.update({door.vector: s[door.vector].to(FP8)}),
            "1 tensors: missing the scale of VECTOR",
        ),
    ],
)
def test_spoilt_scales_are_refused(
    door: Door, change: Callable[[State, Door], None], message: str, tmp_path: Path
) -> None:
    stored, _ = scaled(door.state())
    change(stored, door)
    with pytest.raises(InputError, match=message.replace("Q", door.q).replace("VECTOR", door.vector)):
        opened(door, stored, tmp_path)


@pytest.mark.parametrize("name", ["c_fp8_scaled.safetensors", "c.safetensors"])
@pytest.mark.parametrize("said", ["mark", "metadata", "input scale", "nothing"])
def test_a_file_that_says_it_is_scaled_and_has_no_scales_is_refused(
    door: Door, said: str, name: str, tmp_path: Path
) -> None:
    plain = {name: tensor.to(FP8) for name, tensor in door.state().items()}
    more = {
        "mark": {"scaled_fp8": torch.zeros(0, dtype=FP8)},
        "input scale": {f"{door.q}.scale_input": torch.ones(())},
    }
    metadata = {"_quantization_metadata": '{"layers": {}}'} if said == "metadata" else None
    if said == "nothing" and "scaled" not in name:
        for plain_name in ("c_unscaled.safetensors", "c-upscaled.safetensors"):
            weight = opened(door, plain, tmp_path / plain_name.split(".")[0], name=plain_name)(
                f"{door.q}.weight"
            )
            assert torch.equal(weight.float(), plain[f"{door.q}.weight"].float())
        return
    why = "the name of the file says" if said == "nothing" else "the file is one of scaled weights"
    message = rf"{len(plain)} tensors: missing the scale of .*: {why}.*Take the file in"
    with pytest.raises(InputError, match=message):
        opened(door, plain | more.get(said, {}), tmp_path, metadata, name)


def test_what_is_wrong_with_another_model_of_the_file_is_not_ours(door: Door, tmp_path: Path) -> None:
    """Its scale is spoilt in three ways, and those of plain FP8 stay plain."""
    other = {
        f"{door.other}.weight": torch.ones(4, 4),
        f"{door.other}.scale_weight": torch.full((3,), float("nan")),
        f"{door.other}.comfy_quant": note('{"format": "nvfp4"}'),
    }
    plain = {name: tensor.to(FP8) for name, tensor in door.state().items()}
    stored, meant = scaled(door.state())
    for state, expected in ((plain, plain), (stored, meant)):
        read = opened(door, state | other, tmp_path)
        for name, tensor in expected.items():
            torch.testing.assert_close(read(name).float(), tensor.float(), rtol=1e-6, atol=0)


def test_what_one_of_several_files_says_holds_for_all(tmp_path: Path) -> None:
    plain = {name: tensor.to(FP8) for name, tensor in transformers_state().items()}
    names = sorted(plain)
    for number, said in ((1, {}), (2, {"_quantization_metadata": '{"layers": {}}'})):
        save_file(
            {name: plain[name] for name in names[number - 1 :: 2]}, tmp_path / f"{number}.safetensors", said
        )
    with pytest.raises(InputError, match=f"{len(plain)} tensors: missing the scale of"):
        open_umt5([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], "encoder")
