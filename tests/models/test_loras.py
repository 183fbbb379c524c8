"""LoRAs in every layout that people have come to the same weights; alpha is found wherever it stands."""

from __future__ import annotations

import json
import pickle
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import Weights, load_weights
from forcingkv.models.lora import Lora, LoraLike
from forcingkv.runtime.spec import PublicWeights
from tests.conftest import random_model, small_spec
from tests.models.lora_files import (
    LAYOUTS,
    MODULES,
    Pair,
    at,
    base,
    checkpoint,
    drawn,
    merged_by_hand,
    named,
    pairs,
    plain_file,
    state_file,
    with_alphas,
    worst,
)

Q = "blocks.0.self_attn.q"
RANKS = {module: 2 + number % 3 for number, module in enumerate(MODULES)}
ALPHAS = {module: 1.5 * (1 + number % 4) for number, module in enumerate(MODULES)}


def loaded(folder: Path, *loras: LoraLike) -> Weights:
    return load_weights(small_spec(), checkpoint(folder), lora=list(loras))


def factor(weights: Weights, pair: Pair, module: str = Q) -> float:
    """What up @ down was multiplied by, by projection on it."""
    added = (weights[f"{module}.weight"].double() - base()[f"{module}.weight"].double()).flatten()
    product = (pair.up.double() @ pair.down.double()).flatten()
    return float(added @ product / (product @ product))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_to_the_same_weights(layout: str, tmp_path: Path) -> None:
    made = pairs(RANKS, ALPHAS)
    weights = loaded(tmp_path, at(LAYOUTS[layout](made, tmp_path / "lora"), 0.75))
    assert worst(weights, merged_by_hand(made, 0.75)) <= 1e-6
    untouched = [name for name in base() if name.removesuffix(".weight") not in MODULES]
    assert all(torch.equal(weights[name], base()[name]) for name in untouched)
    (record,) = weights.loras
    assert (record.modules, record.ranks, record.strength) == (len(MODULES), (2, 3, 4), 0.75)
    assert (record.alphas, record.alpha_known, record.kinds) == ((1.5, 3.0, 4.5, 6.0), True, ("LoRA",))


def test_names_of_a_layer_are_those_that_diffusers_gives_it(tmp_path: Path) -> None:
    """What diffusers itself makes of a file of ComfyUI's layout is the same LoRA."""
    made = pairs(alphas=6.0)
    state = named(made, "diffusion_model.", "lora_down.weight", "lora_up.weight")
    state = with_alphas(state, {m: p for m, p in made.items() if m.startswith("blocks")}, "diffusion_model.")
    state[f"diffusion_model.{Q}.diff_b"] = drawn((36,), 7)
    copies = {name: tensor.clone() for name, tensor in state.items()}  # some are scaled in place
    theirs = _convert_non_diffusers_wan_lora_to_diffusers(copies)
    ours = loaded(tmp_path, state_file(state, tmp_path / "a.safetensors"))
    assert worst(ours, loaded(tmp_path, state_file(theirs, tmp_path / "b.safetensors"))) <= 1e-6
    assert not torch.equal(ours[f"{Q}.bias"], base()[f"{Q}.bias"])


def from_peft(config: peft.PeftConfig, folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """What PEFT merges an adapter with random matrices to, and the folder it saves it in."""
    wrapped = peft.get_peft_model(random_model(small_spec()), config, adapter_name="style")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.1)
    wrapped.save_pretrained(folder)
    model = wrapped.merge_and_unload()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "style"


TARGETS = ["q", "k", "ffn.0", "text_embedding.0", "head.head"]
PATTERNS = {
    "rank_pattern": {"ffn.0": 2, r"blocks\.1\.self_attn\.q": 3},
    "alpha_pattern": {"self_attn.k": 9, "head.head": 1},
}


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, use_rslora=True),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, **PATTERNS),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, use_rslora=True, **PATTERNS),
        pytest.param(
            peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, lora_bias=True),
            # PEFT takes a bias for a matrix that was torn apart.
            marks=pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
        ),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True),
        peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS, **PATTERNS),
        peft.LoKrConfig(r=2, alpha=6, target_modules=TARGETS),
        peft.LoKrConfig(r=2, alpha=6, target_modules=TARGETS, decompose_both=True),
        peft.LoKrConfig(r=20, alpha=6, target_modules=TARGETS),
    ],
    ids=["LoRA", "rsLoRA", "patterns", "rsLoRA with patterns", "bias", "DoRA", "LoHa", "LoKr", "LoKr of four",
         "LoKr of whole matrices"],
)  # fmt: skip
def test_what_peft_saves_is_merged_as_peft_merges_it(config: peft.PeftConfig, tmp_path: Path) -> None:
    expected, folder = from_peft(config, tmp_path / "saved")
    for place in (folder, folder / "adapter_model.safetensors"):
        weights = loaded(tmp_path, place)
        assert worst(weights, expected) <= 2e-6
        assert worst(weights, base()) > 0.1, "nothing was merged"
        assert weights.loras[0].alpha_from == ("adapter_config.json",)


# Alpha


def test_alpha_of_peft_is_honoured(tmp_path: Path) -> None:
    """Case 7: r 4 and lora_alpha 16 are a scale of 4; with rsLoRA 8; by patterns, of each layer its own."""
    made = pairs(modules=(Q, "blocks.1.self_attn.q"))
    folder = tmp_path / "style"
    file = plain_file(made, folder / "adapter_model.safetensors")
    for config, scales in [
        ({"r": 4, "lora_alpha": 16}, (4.0, 4.0)),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, (8.0, 8.0)),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {r"blocks.1.self_attn.q": 2}}, (4.0, 0.5)),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"q": 4}}, (4.0, 4.0)),
        ({"r": 4}, (1.0, 1.0)),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config))
        for place in (folder, file):
            weights = loaded(tmp_path, place)
            found = [factor(weights, pair, module) for module, pair in made.items()]
            assert found == pytest.approx(scales), config


def test_where_alpha_stands(tmp_path: Path) -> None:
    made = pairs(modules=(Q,))
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})}
    rows: list[tuple[dict[str, str] | None, float, tuple[str, ...]]] = [
        (metadata, 4.0, ("lora_adapter_metadata",)),
        ({"ss_network_alpha": "8.0", "ss_network_dim": "4"}, 2.0, ("ss_network_alpha",)),
        ({"format": "pt"}, 1.0, ("taken as the rank: nothing says it",)),
        (None, 1.0, ("taken as the rank: nothing says it",)),
        (metadata | {"ss_network_alpha": "8"}, 4.0, ("lora_adapter_metadata",)),
        ({"lora_adapter_metadata": json.dumps({"text_encoder.r": 2, "text_encoder.lora_alpha": 5})}, 1.0,
         ("taken as the rank: nothing says it",)),
    ]  # fmt: skip
    for number, (given_metadata, scale, source) in enumerate(rows):
        weights = loaded(tmp_path, plain_file(made, tmp_path / f"{number}.safetensors", given_metadata))
        assert factor(weights, made[Q]) == pytest.approx(scale)
        assert weights.loras[0].alpha_from == source
        assert weights.loras[0].alpha_known == ("rank" not in source[0])
    state = with_alphas(named(pairs(alphas=12.0, modules=(Q,)), "", "lora_A.weight", "lora_B.weight"),
                        pairs(alphas=12.0, modules=(Q,)), "")  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        state[f"{Q}.alpha"] = torch.tensor([12]).to(dtype)
        weights = loaded(tmp_path, state_file(state, tmp_path / "own.safetensors", metadata))
        assert factor(weights, made[Q]) == pytest.approx(3.0), "the tensor is nearer than the metadata"


def test_a_configuration_belongs_to_the_file_that_peft_names(tmp_path: Path) -> None:
    made = pairs(modules=(Q,))
    folder = tmp_path / "several"
    other = plain_file(made, folder / "other.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}')
    assert factor(loaded(tmp_path, other), made[Q]) == pytest.approx(4.0)
    plain_file(made, folder / "adapter_model.safetensors")
    assert factor(loaded(tmp_path, other), made[Q]) == pytest.approx(1.0)
    assert factor(loaded(tmp_path, folder), made[Q]) == pytest.approx(4.0)


# Several at once


def preset(folder: Path) -> tuple[Path, dict[str, Pair]]:
    """A folder as LongLive's: base weights and a LoRA of rank 8 whose file does not say its alpha."""
    own = pairs(ranks=8, modules=(Q,), seed=1)
    place = folder / "repository"
    (place / "models").mkdir(parents=True)
    save_file(base(), place / "models" / "base.safetensors")
    plain_file(own, place / "models" / "lora.safetensors")
    return place, own


SOURCE = PublicWeights("x/y", "models/base.safetensors", lora="models/lora.safetensors", lora_alpha=16.0)


def scales_of(weights: Weights, *given: dict[str, Pair]) -> list[float]:
    """What each up @ down was multiplied by, by least squares."""
    products = [(pair[Q].up.double() @ pair[Q].down.double()).flatten() for pair in given]
    added = (weights[f"{Q}.weight"].double() - base()[f"{Q}.weight"].double()).flatten()
    found = torch.linalg.lstsq(torch.stack(products, 1), added.unsqueeze(1)).solution
    return [float(value) for value in found.flatten()]


def test_a_user_s_lora_is_added_to_the_preset_s_own(tmp_path: Path) -> None:
    """Case 2: the preset's alpha is for the preset's own file, which stays."""
    place, own = preset(tmp_path)
    style = pairs(ranks=2, modules=(Q,), seed=2)
    other = pairs(ranks=3, modules=(Q,), seed=3)
    spec = small_spec(source=SOURCE)
    first = plain_file(style, tmp_path / "style.safetensors")
    second = plain_file(other, tmp_path / "other.safetensors", {"ss_network_alpha": "6"})

    def scales(lora: list[LoraLike], **options: bool) -> list[float]:
        weights = load_weights(spec, place, lora=lora, **options)
        again = pickle.loads(pickle.dumps(weights))
        assert torch.equal(again[f"{Q}.weight"], weights[f"{Q}.weight"]), "another process merges the same"
        return scales_of(weights, own, style, other)

    assert scales([]) == pytest.approx([2, 0, 0], abs=1e-6)
    assert scales([first]) == pytest.approx([2, 1, 0], abs=1e-6)
    assert scales([first, Lora(second, -0.25)]) == pytest.approx([2, 1, -0.5], abs=1e-6)
    assert scales([f"{second}:0.5"], preset_lora=False) == pytest.approx([0, 0, 1], abs=1e-6)
    named_by_hand = place / "models" / "lora.safetensors"
    assert scales([Lora(named_by_hand, 0.5)], preset_lora=False) == pytest.approx([1, 0, 0], abs=1e-6)
    alone = load_weights(spec, place / "models" / "base.safetensors", lora=named_by_hand)
    assert scales_of(alone, own) == pytest.approx([2])
    assert [record.file for record in load_weights(spec, place, lora=first).loras] == [
        "lora.safetensors",
        "style.safetensors",
    ]


def test_a_preset_s_lora_that_is_left_out_need_not_be_there(tmp_path: Path) -> None:
    place, own = preset(tmp_path)
    (place / "models" / "lora.safetensors").unlink()
    spec = small_spec(source=SOURCE)
    with pytest.raises(InputError, match=r"but not models/lora.safetensors"):
        load_weights(spec, place)
    assert scales_of(load_weights(spec, place, preset_lora=False), own) == pytest.approx([0], abs=1e-9)
    with pytest.raises(InputError, match=r"small has no LoRA of its own to leave out"):
        load_weights(small_spec(), checkpoint(tmp_path), preset_lora=False)


def test_a_lora_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    place, own = preset(tmp_path)
    copy = plain_file(own, tmp_path / "copy.safetensors")
    with pytest.raises(InputError, match=r"copy.safetensors is the same LoRA as .*models/lora.safetensors"):
        load_weights(small_spec(source=SOURCE), place, lora=copy)
    with pytest.raises(InputError, match=r"would be added twice"):
        loaded(tmp_path, copy, Lora(copy, 0.5))


def test_the_digest_tells_strengths_and_configurations_apart(tmp_path: Path) -> None:
    """Statistics of other weights must not be added to."""
    folder = tmp_path / "style"
    plain_file(pairs(modules=(Q,)), folder / "adapter_model.safetensors")
    digests = [loaded(tmp_path).digest, loaded(tmp_path, folder).digest]
    for alpha in (4, 8):
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
        digests += [loaded(tmp_path, Lora(folder, s)).digest for s in (1.0, 0.5, -0.5, 0.1234567, 0.1234568)]
    assert len(set(digests)) == len(digests)
    place, own = preset(tmp_path)
    copy = plain_file(own, tmp_path / "copy.safetensors")
    spec = small_spec(source=SOURCE)
    by_preset, by_rank = load_weights(spec, place), load_weights(spec, place, lora=copy, preset_lora=False)
    assert scales_of(by_preset, own) == pytest.approx([2])
    assert scales_of(by_rank, own) == pytest.approx([1])
    assert by_preset.digest != by_rank.digest, "one file, two scales"


def test_strength_zero_adds_nothing(tmp_path: Path) -> None:
    weights = loaded(tmp_path, at(plain_file(pairs(), tmp_path / "a.safetensors"), 0.0))
    assert all(torch.equal(weights[name], tensor) for name, tensor in base().items())
    assert weights.loras[0].strength == 0


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "comes_in"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
    ],
)
def test_merged_weights_are_not_rounded(dtype: torch.dtype, comes_in: torch.dtype, tmp_path: Path) -> None:
    made = pairs(modules=(Q,))
    rounded = {name: tensor.to(dtype) for name, tensor in base().items()}
    save_file(rounded, tmp_path / "checkpoint.safetensors")
    weights = loaded(tmp_path, plain_file(made, tmp_path / "a.safetensors"))
    merged = weights[f"{Q}.weight"]
    expected = rounded[f"{Q}.weight"].double() + made[Q].product
    assert merged.dtype == comes_in
    assert float((merged.double() - expected).abs().max()) <= 1e-6
    read = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype  # which holds every number of 8 bits
    assert weights["blocks.1.self_attn.q.weight"].dtype == read, "what nothing is added to stays"


DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn")
STRENGTHS = st.floats(-2, 2).map(lambda value: round(value, 3))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_mixture_of_layouts_comes_to_the_same_weights(data: st.DataObject) -> None:
    """Layouts, ranks, alphas, strengths and dtypes of the matrices, in any number and order."""
    dtypes = st.sampled_from([getattr(torch, name) for name in DTYPES])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        expected = {name: tensor.double() for name, tensor in base().items()}
        loras = []
        for number in range(data.draw(st.integers(1, 3))):
            modules = tuple(data.draw(st.sets(st.sampled_from(MODULES), min_size=1).map(sorted)))
            ranks = {module: data.draw(st.integers(1, 5)) for module in modules}
            alphas = {module: float(data.draw(st.integers(1, 32))) / 4 for module in modules}
            made = pairs(ranks, alphas, data.draw(dtypes), number, modules)
            strength = data.draw(STRENGTHS)
            first, second = (data.draw(st.sampled_from(sorted(LAYOUTS))) for _ in range(2))
            written = (
                LAYOUTS[first](made, folder / f"{number}a"),
                LAYOUTS[second](made, folder / f"{number}b"),
            )
            once, again = (loaded(folder, at(file, 1.0)) for file in written)
            gaps = [once[f"{module}.weight"] - again[f"{module}.weight"] for module in modules]
            assert max(float(gap.abs().max()) for gap in gaps) <= 1e-6, (first, second)
            expected = merged_by_hand(made, strength, expected)
            loras.append(at(written[0], strength))
        found = loaded(folder, *data.draw(st.permutations(loras)))
        scale = max(1.0, max(float(tensor.abs().max()) for tensor in expected.values()))
        assert worst(found, expected) <= 1e-6 * scale
