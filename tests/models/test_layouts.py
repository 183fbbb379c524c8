"""Layouts of checkpoints that other tools write: each is made here, and read rightly or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import Weights, load_weights
from forcingkv.runtime.spec import PublicWeights
from tests.conftest import random_model, small_spec
from tests.models.test_checkpoints import assert_same, in_diffusers, in_fastvideo, prefixed, sharded

State = dict[str, Tensor]
SPEC = small_spec()
STATE: State = {name: tensor.clone() for name, tensor in random_model(SPEC).state_dict().items()}
OTHER: State = {name: tensor + 1 for name, tensor in STATE.items()}
Q = "blocks.1.self_attn.q.weight"


def load_pt(content: Any, folder: Path, **options: Any) -> Weights:
    torch.save(content, folder / "c.pt")
    return load_weights(options.pop("spec", SPEC), folder / "c.pt", **options)


def load_flat(state: State, folder: Path, metadata: dict[str, str] | None = None, **options: Any) -> Weights:
    whole = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(whole, folder / "c.safetensors", metadata=metadata)
    return load_weights(options.pop("spec", SPEC), folder / "c.safetensors", **options)


PREFIXES = [
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "module.",
    "module.model.",
    "transformer.",
    "base_model.model.",
    "base_model.model.model.",
    "generator.model.",
    "_orig_mod.",
    "_orig_mod.module._fsdp_wrapped_module.model.",
    "online_model.",
    "blocks.",
    "head.",
]


def test_names_of_fastvideo_are_read(tmp_path: Path) -> None:
    named = in_fastvideo(STATE)
    assert "blocks.1.to_out.weight" in named
    assert "blocks.1.self_attn_residual_norm.norm.weight" in named
    assert_same(load_flat(named, tmp_path), STATE)
    assert_same(load_flat(prefixed(named, "model."), tmp_path), STATE)


@pytest.mark.parametrize("naming", [dict, in_diffusers], ids=["wan", "diffusers"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_common_prefix_is_found_and_said(prefix: str, naming: Any, tmp_path: Path) -> None:
    flat = load_flat(prefixed(naming(STATE), prefix), tmp_path)
    assert_same(flat, STATE)
    assert flat.taken == ((f"c.safetensors: the names behind the prefix {prefix}",) if prefix else ())
    assert_same(load_pt(prefixed(naming(STATE), prefix), tmp_path), STATE)


def test_wrappers_are_looked_through_at_any_depth(tmp_path: Path) -> None:
    wrapped = {
        name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn._orig_mod.module.").replace(
            "blocks.", "_fsdp_wrapped_module.blocks._fsdp_wrapped_module."
        ): tensor
        for name, tensor in STATE.items()
    }
    assert_same(load_flat(prefixed(wrapped, "model."), tmp_path), STATE)


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        ({"state_dict": STATE}, "state_dict"),
        ({"ema": STATE, "epoch": 3}, "ema"),
        (
            {"module": prefixed(STATE, "module."), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
            "module",
        ),
        ({"generator": STATE, "generator_ema": {}}, "generator"),
        (
            {"generator_ema": {}, "model": {}, "state_dict": {"student": {"net": STATE}}},
            "state_dict.student.net",
        ),
        ({"state_dict": {"generator": prefixed(STATE, "model."), "critic": OTHER}}, "state_dict.generator"),
        ({"args": {"lr": 0.1, "betas": [0.9, 0.99]}, "params_ema": STATE}, "params_ema"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_entries_are_looked_through(content: Any, entry: str, tmp_path: Path) -> None:
    weights = load_pt(content, tmp_path)
    assert_same(weights, STATE)
    assert f"c.pt: the entry {entry}" in weights.taken[0]


def tree(state: State) -> dict[str, Any]:
    """A table of tables, one for each part of a name."""
    root: dict[str, Any] = {}
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        table = root
        for part in path:
            table = table.setdefault(part, {})
        table[leaf] = tensor
    return root


def test_a_table_for_each_module_is_read(tmp_path: Path) -> None:
    assert_same(load_pt(tree(STATE), tmp_path), STATE)
    assert_same(load_pt({"model": tree(STATE), "step": 1}, tmp_path), STATE)
    with pytest.raises(InputError, match=r"1 tensors: unexpected extra.weight"):
        load_pt({"model": tree(STATE | {"extra.weight": torch.ones(2)})}, tmp_path)


def test_of_several_entries_the_documented_one_is_taken_and_said(tmp_path: Path) -> None:
    both = {"generator": STATE, "generator_ema": OTHER}
    taken = load_pt(both, tmp_path)
    assert_same(taken, OTHER)
    assert taken.taken == ("c.pt: the entry generator_ema (the first in order; it also holds generator)",)
    named = load_pt(both, tmp_path, spec=small_spec(source=PublicWeights("a/b", "c", key="generator")))
    assert_same(named, STATE)
    assert named.taken == ("c.pt: the entry generator (named by the preset)",)
    assert_same(load_pt(both, tmp_path, key="generator"), STATE)
    other = load_pt(
        {"generator_ema": OTHER}, tmp_path, spec=small_spec(source=PublicWeights("a/b", "c", "generator"))
    )
    assert_same(other, OTHER)
    assert "no entry generator, which the preset names" in other.taken[0]
    flat = load_flat(prefixed(STATE, "generator.") | prefixed(OTHER, "generator_ema."), tmp_path)
    assert_same(flat, OTHER)
    assert "it also holds generator" in flat.taken[0]
    assert_same(load_weights(SPEC, tmp_path / "c.safetensors", key="generator"), STATE)
    lightning = {"state_dict": prefixed(STATE, "generator.model.") | prefixed(OTHER, "generator_ema.model.")}
    assert_same(load_pt(lightning, tmp_path), OTHER)
    assert_same(load_pt(lightning, tmp_path, key="generator"), STATE)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"student": STATE, "teacher_ema": OTHER}, "student, teacher_ema"),
        ({"model": STATE, "ema": OTHER}, "model, ema"),
        ({"generator": STATE, "net": OTHER}, "generator, net"),
        ({**STATE, "ema": OTHER}, "the file itself, ema"),
        (prefixed(STATE, "ema_model.") | prefixed(OTHER, "online_model."), "ema_model, online_model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_is_guessed_between_entries_that_fit(content: Any, names: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"holds the model 2 times: {names}.*--key"):
        load_pt(content, tmp_path)


def without(state: State, name: str) -> State:
    return {other: tensor for other, tensor in state.items() if other != name}


@pytest.mark.parametrize(
    "content",
    [
        {"generator_ema": without(OTHER, Q), "generator": STATE},
        {"generator": without(STATE, Q), "critic": OTHER},
        {"generator": without(STATE, Q), "generator_ema": {}},
    ],
    ids=["ema", "critic", "alone"],
)
def test_an_entry_with_a_fault_is_not_replaced_by_another(content: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"1 tensors: missing {Q}"):
        load_pt(content, tmp_path)


def test_a_preset_s_entry_with_a_fault_is_not_replaced(tmp_path: Path) -> None:
    spec = small_spec(source=PublicWeights("a/b", "c", key="generator"))
    strange = {f"x.{number}": tensor for number, tensor in enumerate(STATE.values())}
    with pytest.raises(InputError, match="none of its"):
        load_pt({"generator": strange, "generator_ema": STATE}, tmp_path, spec=spec)


def test_a_critic_is_not_taken_for_the_model(tmp_path: Path) -> None:
    for content in (
        {"critic": STATE},
        {"generator": {}, "fake_score": STATE},
        prefixed(STATE, "critic.model."),
    ):
        with pytest.raises(InputError, match=r"holds the model only as (critic|fake_score).*--key"):
            load_pt(content, tmp_path)
    assert_same(load_pt({"critic": STATE}, tmp_path, key="critic"), STATE)


def test_a_file_of_something_else_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"none of its 1 tensors has a name of the model; it has conv.weight"
    ):
        load_pt({"conv.weight": torch.ones(2)}, tmp_path)
    with pytest.raises(InputError, match="no tensors at all"):
        load_pt({"generator": {}, "step": 3}, tmp_path)
    with pytest.raises(InputError, match="holds a list; expected a table of tensors"):
        load_pt([torch.ones(2)], tmp_path)
    deep: dict[str, Any] = STATE  # type: ignore[assignment]
    for _ in range(40):
        deep = {"x": deep}
    with pytest.raises(InputError, match="tables within tables"):
        load_pt(deep, tmp_path)


EXTRAS = {
    "freqs": torch.ones(4, 3, dtype=torch.complex64),
    "model.freqs": torch.ones(4),
    "model.blocks.0.self_attn.freqs_cos": torch.ones(4),
    "_cls_pred_branch.0.weight": torch.ones(3),
    "_cls_pred_branch.1.bias": torch.ones(3),
    "_register_tokens.tokens": torch.ones(3),
    "model.gan_ca_blocks.0.weight": torch.ones(3),
    "n_averaged": torch.ones((), dtype=torch.int64),
}


def test_training_heads_and_buffers_are_left_out_and_named(tmp_path: Path) -> None:
    weights = load_pt({"generator": prefixed(STATE, "model.") | EXTRAS}, tmp_path)
    assert_same(weights, STATE)
    assert weights.taken[-1] == (
        "c.pt: left out, since the model does without: *.freqs_cos, _cls_pred_branch.* (2), "
        "_register_tokens.*, freqs (2), gan_ca_blocks.*, n_averaged"
    )


def test_other_models_of_one_file_are_left_out_and_named(tmp_path: Path) -> None:
    beside = {
        "first_stage_model.encoder.weight": torch.ones(2),
        "text_encoders.t5.shared.weight": torch.ones(2),
    }
    weights = load_flat(prefixed(STATE, "model.diffusion_model.") | beside, tmp_path)
    assert_same(weights, STATE)
    assert weights.taken[-1].endswith("first_stage_model.*, text_encoders.*")


@pytest.mark.parametrize(
    "name", ["img_emb.proj.0.weight", "blocks.0.cross_attn.k_img.weight", "vae_like.x", "blocks.4.modulation"]
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_anything_else_is_refused_by_name(name: str, prefix: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"1 tensors: unexpected {name}"):
        load_flat(prefixed(STATE | {name: torch.ones(2)}, prefix), tmp_path)


WORDS = st.text("abxyz_", min_size=1, max_size=6)
PARTS = st.lists(
    st.one_of(WORDS, st.sampled_from(["model", "module", "generator", "0", "blocks"])), max_size=4
)


def nested(state: State, entries: list[str], prefix: list[str]) -> Any:
    """The tensors behind a prefix, in tables within tables, with an empty table and a number beside each."""
    content: Any = prefixed(state, "".join(f"{part}." for part in prefix))
    for entry in reversed(entries):
        content = {"empty": {}, "steps": 7, entry: content}
    return content


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PARTS, PARTS, st.booleans())
@example([], [], False)
@example(["module"], ["module", "module"], True)
@example(["generator", "generator"], ["blocks", "0"], False)
def test_any_nesting_and_prefix_is_found(
    tmp_path: Path, entries: list[str], prefix: list[str], diffusers: bool
) -> None:
    named = in_diffusers(STATE) if diffusers else STATE
    assert_same(load_pt(nested(named, entries, prefix), tmp_path), STATE)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(STATE)),
    st.sampled_from(["missing", "extra", "misshapen"]),
    PARTS,
    PARTS,
    st.booleans(),
)
def test_a_tensor_that_does_not_fit_is_never_taken_silently(
    tmp_path: Path, name: str, fault: str, entries: list[str], prefix: list[str], beside: bool
) -> None:
    """With another entry that fits beside it too, if `beside`."""
    spoilt = dict(STATE)
    if fault == "missing":
        del spoilt[name]
    elif fault == "extra":
        name = f"{name}.more"
        spoilt[name] = torch.ones(2)
    else:
        spoilt[name] = torch.ones(2, 3, 5)
    content = nested(spoilt, entries, prefix)
    if beside:
        content = {"generator_ema": content, "generator": OTHER}
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_pt(content, tmp_path)


def test_shards_of_any_layout_are_read(tmp_path: Path) -> None:
    folder = sharded(STATE, tmp_path)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert_same(load_weights(SPEC, index), STATE)
    assert_same(load_weights(SPEC, folder / "transformer"), STATE)
