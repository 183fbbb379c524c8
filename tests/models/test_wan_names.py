"""Names of Wan's VAE files as diffusers has them, against diffusers' own conversion and a public mapping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from forcingkv.headmaps.errors import InputError
from forcingkv.models.decoders.wan_names import in_diffusers_names
from tests.models.test_decoder_files import wan22_name, wan_name
from tests.models.test_decoders import SMALL, SMALL22, small_vae

diffusers = pytest.importorskip("diffusers")


def test_wan_2_1_is_named_as_diffusers_itself_names_it() -> None:
    """Two blocks a stage, the only number that diffusers converts."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    names = [wan_name(name) for name in small_vae(SMALL | {"num_res_blocks": 2}).state_dict()]
    assert len(names) == 194
    ours = in_diffusers_names({name: name for name in names}, "file")
    assert ours == convert_wan_vae_to_diffusers({name: name for name in names})


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_number_of_blocks_follows_from_the_names(blocks: int) -> None:
    state = small_vae(SMALL | {"num_res_blocks": blocks}).state_dict()
    flat = {}
    for name in state:
        stage, _, layer = name.partition(".up_blocks.")[2].partition(".")
        if layer:  # those of a stage in one row, its resampling last
            number, rest = (
                (blocks + 1, layer[len("upsamplers.0") :])
                if layer.startswith("up")
                else (int(layer.split(".")[1]), layer[len("resnets.0") :])
            )
            flat[wan_name(f"decoder.upsamples.{int(stage) * (blocks + 2) + number}{rest}")] = name
        else:
            flat[wan_name(name)] = name
    found = in_diffusers_names(flat, "file")
    assert found == {name: name for name in state}


def test_wan_2_2_has_a_row_of_layers_in_each_stage() -> None:
    state = small_vae(SMALL22).state_dict()
    assert wan22_name("decoder.up_blocks.1.upsampler.time_conv.weight") == (
        "decoder.upsamples.1.upsamples.2.time_conv.weight"
    )
    found = in_diffusers_names({wan22_name(name): name for name in state}, "file")
    assert found == {name: name for name in state}


def test_two_tensors_of_one_name_are_refused() -> None:
    names = ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma")
    with pytest.raises(InputError, match=r"holds two tensors that are both decoder\.mid_block"):
        in_diffusers_names(dict.fromkeys(names, 0), "file")


def test_a_public_mapping_of_all_names(data: Path) -> None:
    with safe_open(data / "golden" / "wan21_vae.safetensors", "np") as file:
        wanted = json.loads(file.metadata()["spec"])["diffusers_names"]
    assert in_diffusers_names({name: name for name in wanted}, "file") == {
        place: name for name, place in wanted.items()
    }
