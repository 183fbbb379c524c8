"""Which decoder a file holds: what its tensors say, what its name says, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from forcingkv.headmaps.errors import InputError
from forcingkv.models.decoders import decoder_for, load_decoder
from forcingkv.models.decoders.latents import KNOWN, WAN21
from forcingkv.models.decoders.names import kind_by_name
from forcingkv.models.decoders.taehv import LightTaeDecoder, TaehvDecoder
from forcingkv.models.decoders.wan_files import load_wan_vae
from forcingkv.models.presets import load_spec
from forcingkv.runtime.spec import Decoder
from tests.conftest import Ran
from tests.models.test_decoder_files import as_folder, as_pth, as_safetensors, taehv_state, wan_name
from tests.models.test_decoders import SMALL, SMALL22, small_taehv, small_vae


@pytest.mark.parametrize("name", ["lighttaew2_1.safetensors", "decoder.pth"])
def test_lighttae_takes_latents_with_mean_and_deviation(name: str, tmp_path: Path) -> None:
    """The arithmetic of LightX2V (`need_scaled`): latents * std + mean, then the layers of taew2_1."""
    write = as_safetensors if name.endswith(".safetensors") else as_pth
    path = write(taehv_state(), tmp_path).rename(tmp_path / name)
    light = load_decoder("lighttae", path)
    plain = load_decoder("taehv", path.rename(tmp_path / ("plain" + path.suffix)))
    latents = torch.randn(1, 16, 2, 3, 2, generator=torch.Generator().manual_seed(3))
    config = AutoencoderKLWan().config
    mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, 16, 1, 1, 1) for name in ("mean", "std"))
    state, first = light.empty_state(3, 2), torch.ones(1)
    pixels, following = light(latents, first, state)
    expected, expected_following = plain(latents * std + mean, first, state)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    assert all(torch.allclose(following[name], expected_following[name]) for name in following)
    assert (pixels - plain(latents, first, state)[0]).abs().max() > 0.01, "the other kind makes other colours"


def test_mean_and_deviation_are_those_of_wan_s_vae() -> None:
    config = AutoencoderKLWan().config
    assert list(WAN21.mean) == config.latents_mean
    assert list(WAN21.std) == config.latents_std
    assert {channels: (len(one.mean), len(one.std)) for channels, one in KNOWN.items()} == {
        16: (16, 16),
        48: (48, 48),
    }
    for channels, scale in KNOWN.items():
        light = load_decoder("lighttae", channels=channels)
        assert isinstance(light, LightTaeDecoder)
        assert torch.equal(light.mean.flatten(), torch.tensor(scale.mean))
        assert torch.equal(light.std.flatten(), torch.tensor(scale.std))


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("taehv", "lighttaew2_1.pth", "is the decoder lighttae, by its name; expected weights of taehv. Say"),
        ("taehv", "LightTAE-W2.1-bf16.pth", "is the decoder lighttae, by its name"),
        ("taehv", "wan_light-taew2_1.pth", "is the decoder lighttae, by its name"),
        ("taehv", "my_taehv.pth", "is the tiny decoder of HunyuanVideo"),
        ("lighttae", "taew2_1.pth", "is the decoder taehv, by its name; expected weights of lighttae"),
        ("wan-vae", "taew2_1.pth", "is the decoder taehv, by its name"),
        ("taehv", "Wan2.1_VAE.pth", "is the decoder wan-vae, by its name"),
        ("taehv", "taehv.pth", "is the tiny decoder of HunyuanVideo, by its published name"),
        ("taehv", "taecvx.pth", "is the tiny decoder of CogVideoX"),
        ("lighttae", "lighttaehy1_5.pth", "is LightTAE of another model than Wan 2.1 and 2.2"),
        ("taehv", "lighttaew2_2.pth", "is the decoder lighttae, by its name"),
        ("wan-vae", "taew2_2.pth", "is the decoder taehv, by its name"),
        ("wan-vae", "qwen_image_vae.pth", "is the VAE of Qwen-Image, which was trained for images"),
        ("wan-vae", "lightvaew2_1.pth", "is LightVAE, a Wan VAE with fewer channels"),
        ("taehv", "Wan2.2_VAE.pth", "is the decoder wan-vae, by its name"),
    ],
)
def test_a_published_name_of_another_decoder_is_refused(
    kind: str, name: str, message: str, tmp_path: Path
) -> None:
    path = as_pth({"decoder.1.bias": torch.zeros(1)}, tmp_path).rename(tmp_path / name)
    with pytest.raises(InputError) as raised:
        load_decoder(kind, path)
    assert f"{path} {message}" in str(raised.value)


def test_names_that_say_what_they_are() -> None:
    names = [
        "Wan2_1_VAE_bf16.safetensors",
        "wan_2.1_vae.safetensors",
        "taew2_1.safetensors",
        "lighttaew2_1.pth",
        "Wan2.2_VAE.pth",
        "taew2_2.pth",
        "lighttaew2_2.safetensors",
    ]
    kinds = ["wan-vae", "wan-vae", "taehv", "lighttae", "wan-vae", "taehv", "lighttae"]
    assert [kind_by_name(Path(name)) for name in names] == kinds
    assert kind_by_name(Path("vae/diffusion_pytorch_model.safetensors")) is None


@pytest.mark.parametrize("kind", ["taehv", "lighttae"])
def test_the_tensors_of_the_vae_are_told_from_those_of_a_tiny_decoder(kind: str, tmp_path: Path) -> None:
    tiny = as_pth(taehv_state(), tmp_path)
    with pytest.raises(InputError, match=r"holds a tiny decoder, not the Wan VAE\. Say --decoder taehv for"):
        load_decoder("wan-vae", tiny)
    vae = as_safetensors(small_vae().state_dict(), tmp_path)
    with pytest.raises(InputError, match=r"holds the Wan VAE, not a tiny decoder\. Say --decoder wan-vae"):
        load_decoder(kind, vae)


def test_the_vae_of_wan_is_found_in_wan_s_folder_and_behind_diffsynth_s_wrapper(tmp_path: Path) -> None:
    state = small_vae().state_dict()
    wan = {wan_name(name): tensor for name, tensor in state.items()}
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel"}')
    as_pth(wan, tmp_path).rename(tmp_path / "Wan2.1_VAE.pth")
    torch.save({"model_state": wan}, tmp_path / "wrapped.pth")
    torch.save({f"model.{name}": tensor for name, tensor in wan.items()}, tmp_path / "prefixed.pth")
    for path in (tmp_path, tmp_path / "wrapped.pth", tmp_path / "prefixed.pth"):
        found = load_wan_vae(path, SMALL)
        for name, tensor in found.named_parameters():
            assert torch.equal(tensor, state[name]), name


def test_a_folder_s_name_says_nothing(tmp_path: Path) -> None:
    """Wan2.2-T2V-A14B has the VAE of Wan 2.1."""
    folder = tmp_path / "Wan2.2_VAE-of-A14B"
    folder.mkdir()
    state = small_vae().state_dict()
    found = load_decoder("wan-vae", as_folder(state, folder))
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.named_parameters())


@pytest.mark.parametrize(
    ("dtype", "told"), [(torch.int8, "stored as int8"), (torch.float8_e4m3fn, "torch.float8_e4m3fn")]
)
def test_weights_that_are_no_plain_floats_are_refused(dtype: torch.dtype, told: str, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in taehv_state().items()}
    with pytest.raises(InputError, match=rf"decoder\.1\.bias is {told}"):
        load_decoder("taehv", as_pth(state, tmp_path))


def test_export_refuses_by_name_before_it_writes(run: Callable[..., Ran], tmp_path: Path) -> None:
    vae = as_pth({"decoder.1.bias": torch.zeros(1)}, tmp_path).rename(tmp_path / "lighttaew2_1.pth")
    words = ["export", "--model", "longlive", "--random-weights", "--policy", "window", "--decoder", "taehv"]
    ran = run(*words, "--vae", vae, "--out", tmp_path / "bundle")
    assert (ran.code, "Say --decoder lighttae" in ran.err) == (2, True), ran.err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("entry", "prefix"),
    [("state_dict", ""), ("model_state", "model."), ("params_ema", ""), ("decoder", "module."), ("", "vae.")],
)
def test_a_decoder_is_found_behind_an_entry_and_a_prefix(entry: str, prefix: str, tmp_path: Path) -> None:
    vae, tiny = small_vae().state_dict(), taehv_state()
    for state, read in (
        ({wan_name(name): tensor for name, tensor in vae.items()}, lambda path: load_wan_vae(path, SMALL)),
        (tiny, lambda path: load_decoder("taehv", path)),
    ):
        named = {prefix + name: tensor for name, tensor in state.items()}
        torch.save({entry: named, "step": 3} if entry else named, tmp_path / "d.pth")
        plain = read(as_pth(state, tmp_path)).state_dict()
        found = read(tmp_path / "d.pth").state_dict()
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_entries_of_decoders_are_not_guessed(tmp_path: Path) -> None:
    state = taehv_state()
    torch.save({"params": state, "params_ema": state}, tmp_path / "d.pth")
    with pytest.raises(InputError, match="holds 2 entries that could be meant: params, params_ema"):
        load_decoder("taehv", tmp_path / "d.pth")


def test_a_folder_is_no_tiny_decoder(tmp_path: Path) -> None:
    as_pth(taehv_state(), tmp_path)
    with pytest.raises(InputError, match=r"is a folder; expected the file in it, such as taew2_1.pth"):
        load_decoder("taehv", tmp_path)


def test_a_decoder_with_values_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    state = taehv_state()
    state["decoder.1.bias"] = state["decoder.1.bias"] * float("nan")
    with pytest.raises(InputError, match=r"holds values that are no finite numbers: decoder.1.bias"):
        load_decoder("taehv", as_pth(state, tmp_path))


def test_a_decoder_of_wan_2_2_is_none_of_a_model_of_wan_2_1(tmp_path: Path) -> None:
    tiny = as_pth(TaehvDecoder(widths=(8, 8, 8, 8), latent_channels=48, patch=2).state_dict(), tmp_path)
    told = r"decodes 48 channels at strides 4 \(time\), 16 \(space\); expected 16 channels at strides 4"
    with pytest.raises(InputError, match=told):
        decoder_for(load_spec("self-forcing"), "taehv", tiny)
    spec = replace(load_spec("self-forcing"), latent_channels=48, decoder=Decoder("wan-vae", 16, 4))
    chosen, decoder = decoder_for(spec, "taehv", tiny)
    assert chosen.decoder == Decoder("taehv", 16, 4)
    assert isinstance(decoder, TaehvDecoder)
    assert decoder.patch == 2
    with pytest.raises(InputError, match=r"--vae Wan2\.2_VAE\.pth, --decoder taehv --vae taew2_2\.pth"):
        decoder_for(spec, None, None)
    assert isinstance(decoder_for(spec, "lighttae", None, random=True)[1], LightTaeDecoder)


def test_latents_of_channels_that_nobody_published_need_a_config(tmp_path: Path) -> None:
    vae, tiny = small_vae(SMALL22).state_dict(), small_taehv(2).state_dict()
    told = r"has latents of 4 channels, of which mean and deviation are not known; expected 16 or 48"
    for kind, state in (("wan-vae", vae), ("lighttae", tiny)):
        with pytest.raises(InputError, match=told):
            load_decoder(kind, as_safetensors(state, tmp_path))


def test_a_folder_of_wan_s_with_both_vaes_is_asked_which(tmp_path: Path) -> None:
    for name in ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth"):
        as_pth(small_vae().state_dict(), tmp_path).rename(tmp_path / name)
    with pytest.raises(InputError, match=r"holds Wan2.1_VAE.pth and Wan2.2_VAE.pth; expected the one"):
        load_decoder("wan-vae", tmp_path)


@pytest.mark.parametrize("name", ["none.pth", "x" * 300, "madebyollin/taehv"])
@pytest.mark.parametrize("kind", ["taehv", "wan-vae"])
def test_a_decoder_that_is_not_there(kind: str, name: str) -> None:
    with pytest.raises(InputError, match=f"there is no such file or folder; expected weights of {kind}"):
        load_decoder(kind, Path(name))
