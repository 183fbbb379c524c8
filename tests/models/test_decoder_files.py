"""Weights of the decoders: each published layout is read, and refused when anything in it is wrong."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.models import decoders
from forcingkv.models.decoders import StreamingDecoder, load_decoder
from forcingkv.models.decoders.wan_files import load_wan_vae
from forcingkv.models.decoders.wan_vae import WanVaeDecoder
from tests.models.test_decoders import SMALL, SMALL22, State, small_taehv, small_vae


def wan_name(name: str) -> str:
    """A name of diffusers as Wan's own files have it."""
    for pattern, place in (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}"),
        (r"down_blocks", "downsamples"),
        (r"\.norm1\.", ".residual.0."),
        (r"\.conv1\.", ".residual.2."),
        (r"\.norm2\.", ".residual.3."),
        (r"\.conv2\.", ".residual.6."),
        (r"conv_shortcut", "shortcut"),
        (r"coder\.conv_in", "coder.conv1"),
        (r"norm_out", "head.0"),
        (r"conv_out", "head.2"),
    ):
        name = re.sub(pattern, place, name)
    return name


def wan22_name(name: str) -> str:
    """A name of diffusers as `Wan2.2_VAE.pth` has it, of `SMALL22`: one block a stage down, two up."""
    for pattern, place in (
        (r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.1"),
        (r"down_blocks\.(\d)\.resnets", r"downsamples.\1.downsamples"),
        (r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.2"),
        (r"up_blocks\.(\d)\.resnets", r"upsamples.\1.upsamples"),
    ):
        name = re.sub(pattern, place, name)
    return wan_name(name)


def as_folder(state: Mapping[str, Tensor], path: Path, config: Mapping[str, Any] = SMALL) -> Path:
    folder = path / "vae"
    folder.mkdir()
    content = {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.42.1", **config}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(dict(state), folder / "diffusion_pytorch_model.safetensors")
    return path


def as_safetensors(state: Mapping[str, Tensor], path: Path) -> Path:
    save_file(dict(state), path / "weights.safetensors")
    return path / "weights.safetensors"


def as_wan_pth(state: Mapping[str, Tensor], path: Path) -> Path:
    return as_pth({wan_name(name): tensor for name, tensor in state.items()}, path)


def as_wan22_pth(state: Mapping[str, Tensor], path: Path) -> Path:
    return as_pth({wan22_name(name): tensor for name, tensor in state.items()}, path)


def as_folder22(state: Mapping[str, Tensor], path: Path) -> Path:
    """As Wan2.2-TI2V-5B-Diffusers has it."""
    return as_folder(state, path, SMALL22 | {"clip_output": False})


def as_pth(state: Mapping[str, Tensor], path: Path) -> Path:
    torch.save(dict(state), path / "weights.pth")
    return path / "weights.pth"


def read_small_vae(path: Path) -> StreamingDecoder:
    """The sizes of a single file follow from its tensors; mean and deviation of 4 channels nobody knows."""
    known = {name: SMALL[name] for name in ("latents_mean", "latents_std")}
    return load_wan_vae(path) if path.is_dir() else load_wan_vae(path, known)


def taehv_state() -> State:
    """As in the published file, the encoder is there too."""
    return dict(_drawn())


@cache
def _drawn() -> State:
    encoder = {"encoder.0.weight": torch.ones(64, 3, 3, 3), "encoder.0.bias": torch.zeros(64)}
    return {**encoder, **load_decoder("taehv", seed=1).state_dict()}


def read_taehv(path: Path) -> StreamingDecoder:
    return load_decoder("taehv", path)


def tae22_state() -> State:
    return {**taehv_state(), **small_taehv(2).state_dict()}


LAYOUTS = {
    "diffusers folder": (small_vae, as_folder, read_small_vae),
    "diffusers file": (small_vae, as_safetensors, read_small_vae),
    "Wan2.1_VAE.pth": (small_vae, as_wan_pth, read_small_vae),
    "diffusers folder of 2.2": (lambda: small_vae(SMALL22), as_folder22, read_small_vae),
    "Wan2.2_VAE.pth": (lambda: small_vae(SMALL22), as_wan22_pth, read_small_vae),
    "taew2_2.pth": (tae22_state, as_pth, read_taehv),
    "taew2_1.pth": (taehv_state, as_pth, read_taehv),
    "taew2_1.safetensors": (taehv_state, as_safetensors, read_taehv),
}
Written = tuple[State, Callable[[Mapping[str, Tensor], Path], Path], Callable[[Path], StreamingDecoder]]


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Written:
    make, write, read = LAYOUTS[request.param]
    made: Any = make()
    return dict(made.state_dict() if isinstance(made, nn.Module) else made), write, read


def test_each_layout_reads_back(layout: Written, tmp_path: Path) -> None:
    state, write, read = layout
    path = write({name: tensor.to(torch.bfloat16) for name, tensor in state.items()}, tmp_path)
    found = read(path)
    for name, tensor in found.named_parameters():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name].to(torch.bfloat16).float()), name
    if isinstance(found, WanVaeDecoder):
        assert found.mean.flatten().tolist() == pytest.approx(SMALL["latents_mean"])
        assert found.std.flatten().tolist() == pytest.approx(SMALL["latents_std"])


NAMED = {"decoder.conv_in.bias", "decoder.1.bias"}


@pytest.mark.parametrize("fault", ["missing", "unexpected", "instead of"])
def test_a_tensor_that_does_not_fit_is_named(layout: Written, fault: str, tmp_path: Path) -> None:
    state, write, read = layout
    (name,) = NAMED & state.keys()
    if fault == "missing":
        del state[name]
    elif fault == "unexpected":
        name = "decoder.surplus.bias"
        state[name] = torch.zeros(3)
    else:
        state[name] = torch.zeros(5)
    with pytest.raises(InputError, match=rf"1 tensors: .*{re.escape(name)}") as raised:
        read(write(state, tmp_path))
    assert fault in str(raised.value)


def test_an_encoder_of_another_shape_is_another_model(tmp_path: Path) -> None:
    state = small_vae().state_dict()
    state["encoder.conv_in.bias"] = torch.zeros(3)
    with pytest.raises(InputError, match=r"encoder\.conv_in\.bias is \(3,\) instead of \(8,\)"):
        load_wan_vae(as_safetensors(state, tmp_path), SMALL)


def test_a_file_without_the_encoder_will_do(tmp_path: Path) -> None:
    state = {n: t for n, t in small_vae().state_dict().items() if n.startswith(("decoder", "post_quant"))}
    decoder = load_wan_vae(as_wan_pth(state, tmp_path), SMALL)
    assert dict(decoder.named_parameters()).keys() == state.keys()


def test_half_a_file_is_refused(layout: Written, tmp_path: Path) -> None:
    state, write, read = layout
    path = write(state, tmp_path)
    file = next(f for f in tmp_path.rglob("*") if f.suffix in (".pth", ".safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=re.escape(file.name)):
        read(path)


@pytest.mark.parametrize("kind", decoders.KINDS)
def test_a_pickled_object_is_never_run(kind: str, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return builtins.open, (str(tmp_path / "ran"), "w")

    torch.save({"decoder.1.weight": torch.ones(2), "trap": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth"):
        load_decoder(kind, tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ({"is_residual": True}, r"missing decoder\.up_blocks\.0\.upsampler"),
        ({"in_channels": 12}, "in_channels = 12"),
        ({"patch_size": 2}, "out_channels = 3"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"dim_mult": None}, "config.json"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_a_config_of_another_vae_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = as_folder(small_vae().state_dict(), tmp_path) / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=named):
        load_decoder("wan-vae", tmp_path)


@pytest.mark.parametrize("name", ["absent", "absent.pth", "absent.safetensors", ""])
@pytest.mark.parametrize("kind", decoders.KINDS)
def test_a_path_with_nothing_there_is_an_input_error(kind: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
        load_decoder(kind, tmp_path / name)


def test_a_kind_that_is_not_there_is_an_input_error() -> None:
    with pytest.raises(InputError, match="expected one of wan-vae, taehv"):
        load_decoder("vae")


def test_wan_vae_says_that_it_needs_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"diffusers.*forcingkv\[models\]"):
        load_decoder("wan-vae")
