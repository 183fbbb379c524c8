"""Where weights lie: files, folders, and the hub and its cache. Only what is used is fetched."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from forcingkv.headmaps import InputError
from forcingkv.headmaps.files import inside
from forcingkv.models import hub
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.hub import HubPlace, hub_place
from forcingkv.models.places import locate
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from tests.conftest import Ran, random_model, small_spec
from tests.models.test_checkpoints import FIRST, assert_same, sharded, spec_with_source, with_lora

SPEC = small_spec()
STATE: dict[str, Tensor] = {name: tensor.clone() for name, tensor in random_model(SPEC).state_dict().items()}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def into_cache(
    folder: Path, cache: Path, repository: str = "me/ckpt", only: Callable[[str], bool] = bool
) -> Path:
    """Put a folder's files into a cache as the hub's client keeps it: a snapshot of links into `blobs`."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "blobs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    snapshot = home / "snapshots" / COMMIT
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        name = file.relative_to(folder)
        if only(name.as_posix()):
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = home / "blobs" / f"{number:064x}"
            blob.write_bytes(file.read_bytes())
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with no network to be used: what HF_HUB_OFFLINE=1 sets when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_shards_in_the_hub_s_cache_are_read(offline: Path, tmp_path: Path) -> None:
    snapshot = into_cache(sharded(STATE, tmp_path / "files"), offline)
    by_name = load_weights(SPEC, "me/ckpt")
    assert_same(by_name, STATE)
    assert by_name.taken[0].startswith(f"me/ckpt, revision {COMMIT[:12]} (the hub cannot be asked: ")
    assert by_name.taken[0].endswith(": transformer/diffusion_pytorch_model.safetensors.index.json")
    for place in (
        snapshot,
        snapshot / "transformer",
        "me/ckpt@main",
        f"me/ckpt@{COMMIT}",
        "me/ckpt:transformer",
    ):
        assert_same(load_weights(SPEC, place), STATE)
    reopened, arguments = by_name.__reduce__()
    assert_same(reopened(*arguments), STATE)


def test_a_file_in_the_hub_s_cache_is_read_again_elsewhere(offline: Path, tmp_path: Path) -> None:
    """Its link's target has no suffix, which says what a file is."""
    (tmp_path / "files").mkdir()
    save_file(STATE, tmp_path / "files" / "one.safetensors")
    snapshot = into_cache(tmp_path / "files", offline)
    opened = load_weights(SPEC, snapshot / "one.safetensors")
    reopened, arguments = opened.__reduce__()
    assert_same(reopened(*arguments), STATE)


def test_what_is_not_in_the_cache_is_refused_without_network(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"me/none is no file or folder here, and cannot be fetched from the hub"
    ):
        load_weights(SPEC, "me/none")
    into_cache(sharded(STATE, tmp_path / "files"), offline, only=lambda name: FIRST not in name)
    with pytest.raises(InputError, match=f"lacks the shard {FIRST}"):
        load_weights(SPEC, "me/ckpt")
    with pytest.raises(InputError, match=r"me/ckpt@v2 is no file or folder here"):
        load_weights(SPEC, "me/ckpt@v2")


def linked(tmp_path: Path, target: Path) -> Path:
    """A folder of shards whose first is a link."""
    folder = sharded(STATE, tmp_path / "snapshots" / "abc") / "transformer"
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / FIRST).rename(target)
    (folder / FIRST).symlink_to(target)
    return folder


@pytest.mark.parametrize(
    ("target", "refused"),
    [
        ("snapshots/abc/transformer/elsewhere", False),
        ("blobs/0f", False),
        ("blobs/deeper/0f", False),
        ("snapshots/abc/0f", True),
        ("snapshots/other/transformer/0f", True),
        ("0f", True),
        ("blobs.old/0f", True),
        ("../0f", True),
    ],
)
def test_a_link_may_lead_into_the_folder_and_the_repository_s_blobs(
    target: str, refused: bool, tmp_path: Path
) -> None:
    folder = linked(tmp_path / "models--me--ckpt", tmp_path / "models--me--ckpt" / target)
    if refused:
        with pytest.raises(InputError, match=f"names the file '{FIRST}', which is not inside the folder"):
            load_weights(SPEC, folder)
    else:
        assert_same(load_weights(SPEC, folder), STATE)


def test_blobs_beside_a_folder_that_is_no_snapshot_are_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0f").write_text("x")
    (tmp_path / "copies" / "abc").mkdir(parents=True)
    (tmp_path / "copies" / "abc" / "f").symlink_to(tmp_path / "blobs" / "0f")
    with pytest.raises(InputError, match="not inside the folder"):
        inside(tmp_path / "copies" / "abc", "f")


@pytest.mark.parametrize("name", ["/etc/passwd", "../blobs/0f", "a/../../blobs/0f", "a\\b", ""])
def test_names_that_lead_out_are_refused_by_their_text(name: str, tmp_path: Path) -> None:
    snapshot = into_cache(sharded(STATE, tmp_path / "files"), tmp_path / "cache")
    with pytest.raises(InputError, match=r"not inside the folder; expected relative names without '\.\.'"):
        inside(snapshot, name)
    index = next((tmp_path / "files" / "transformer").glob("*.json"))
    content = json.loads(index.read_text())
    content["weight_map"]["proj_out.bias"] = name
    index.write_text(json.dumps(content))
    snapshot = into_cache(tmp_path / "files", tmp_path / "cache")
    with pytest.raises(InputError, match="not inside the folder"):
        load_weights(SPEC, snapshot)


def test_how_places_on_the_hub_are_written() -> None:
    for text, place in {
        "a/b": HubPlace("a/b"),
        "a/b@v1": HubPlace("a/b", "v1"),
        "a/b@refs/pr/3:c/d.pt": HubPlace("a/b", "refs/pr/3", "c/d.pt"),
        "a/b:c/d e.pt": HubPlace("a/b", None, "c/d e.pt"),
        "a/b:c++/d-2.pt": HubPlace("a/b", None, "c++/d-2.pt"),
    }.items():
        assert hub_place(text, "a file") == place
        assert str(place) == text
    for text in ("a", "a/b/c", "checkpoints/x.pt", "/a/b", "https://huggingface.co/a/b", "a/b:", "C:\\a\\b"):
        with pytest.raises(
            InputError, match="there is no such file or folder; expected a file, or a repository"
        ):
            hub_place(text, "a file")
    for text in ("a/b:/c", "a/b:../c", "a/b:c\\d", "a/b@../../c", "a/b@v1:c/../../d"):
        with pytest.raises(InputError, match="which is no place in a repository"):
            hub_place(text, "a file")


@dataclass
class Hub:
    """A hub of one repository, `me/ckpt`: its files lie in a folder, and what is fetched of it is noted."""

    folder: Path
    cache: Path
    fetched: list[str] = field(default_factory=list)
    asked: list[str | None] = field(default_factory=list)

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def model_info(self, repository: str, *, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        self.asked.append(revision)
        if repository != "me/ckpt":
            raise OSError("Repository Not Found\nfor url")
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        siblings = [
            SimpleNamespace(rfilename=file.relative_to(self.folder).as_posix(), size=file.stat().st_size)
            for file in files
        ]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def snapshot_download(
        self,
        repository: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        local_files_only: bool = False,
    ) -> str:
        if local_files_only:
            raise OSError("nothing of it")
        found = huggingface_hub.utils.filter_repo_objects(
            [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()],
            allow_patterns=allow_patterns,
        )
        names = sorted(set(found))
        self.fetched += [name for name in names if name not in self.fetched]
        return str(into_cache(self.folder, self.cache, only=lambda name: name in self.fetched))


@pytest.fixture
def online(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    served = Hub(tmp_path / "served", cache)
    served.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: served)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", served.snapshot_download)
    return served


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(STATE, folder / name)
        else:
            torch.save({"generator": STATE}, folder / name)


def test_of_the_preset_s_repository_its_files_are_fetched(online: Hub) -> None:
    expected, _ = with_lora(online.folder)
    write(online.folder, "models/other.pt", "transformer/a.safetensors", "README.md")
    said: list[str] = []
    weights = load_weights(spec_with_source(), "me/ckpt", progress=said.append)
    torch.testing.assert_close(weights["blocks.0.ffn.0.weight"], expected["blocks.0.ffn.0.weight"])
    assert online.fetched == ["models/base.pt", "models/lora.pt"]
    size = sum((online.folder / name).stat().st_size for name in online.fetched)
    readable = hub.readable(size)
    names = "models/base.pt, models/lora.pt"
    assert said == [f"fetching {readable} of me/ckpt, revision {COMMIT[:12]}, to {online.cache}: {names}"]
    assert weights.taken[0] == f"me/ckpt, revision {COMMIT[:12]}: models/base.pt and models/lora.pt"
    load_weights(spec_with_source(), "me/ckpt", progress=said.append)
    assert len(said) == 1, "what lies in the cache is not fetched again"


def test_of_shards_the_index_is_fetched_first_and_then_what_it_names(online: Hub) -> None:
    sharded(STATE, online.folder)
    write(online.folder, "vae/a.safetensors", "text_encoder/b.safetensors", "unused.bin")
    assert_same(load_weights(SPEC, "me/ckpt"), STATE)
    assert online.fetched[0].endswith(".index.json")
    assert {Path(name).parent.name for name in online.fetched} == {"transformer"}
    assert len(online.fetched) == 3
    (online.folder / "transformer" / FIRST).unlink()
    with pytest.raises(InputError, match=f"lacks the shard transformer/{FIRST}"):
        load_weights(SPEC, "me/ckpt")


@pytest.mark.parametrize("name", ["other.pt", "deep/er/x.pth", "a.ckpt", "checkpoints/model.safetensors"])
def test_the_only_file_of_weights_is_taken_whatever_its_name(name: str, online: Hub) -> None:
    write(online.folder, name, "notes/readme.md", "config.json")
    from_hub = load_weights(SPEC, "me/ckpt")
    assert_same(from_hub, STATE)
    assert online.fetched == [name]
    assert from_hub.taken[0].endswith(f"{name}, the only file of weights in it")
    from_folder = load_weights(SPEC, online.folder)
    assert_same(from_folder, STATE)
    assert from_folder.taken[0] == f"{online.folder}: {name}, the only file of weights in it"


def test_several_files_of_weights_are_listed_and_none_is_fetched(online: Hub) -> None:
    write(online.folder, "a.pt", "b/c.pth", "d/e.safetensors")
    with pytest.raises(
        InputError, match=r"holds 3 files of weights: a.pt \(.* kB\), b/c.pth \(.*\), d/e.safetensors"
    ):
        load_weights(SPEC, "me/ckpt")
    assert online.fetched == []
    with pytest.raises(InputError, match=r"holds 3 files of weights: a.pt, b/c.pth, d/e.safetensors"):
        load_weights(SPEC, online.folder)
    assert_same(load_weights(SPEC, "me/ckpt:b/c.pth"), STATE)
    assert_same(load_weights(SPEC, "me/ckpt:d"), STATE)
    assert online.fetched == ["b/c.pth", "d/e.safetensors"]
    with pytest.raises(InputError, match=r"me/ckpt holds no x.pt; expected one of a.pt \("):
        load_weights(SPEC, "me/ckpt:x.pt")


def test_a_revision_is_asked_for_and_pinned(online: Hub) -> None:
    write(online.folder, "a.pt")
    located = locate(SPEC, "me/ckpt@v1.0:a.pt")
    assert online.asked == ["v1.0"]
    assert located.again == f"me/ckpt@{COMMIT}:a.pt"


def test_one_safetensors_file_is_taken_and_what_lies_beside_it_is_said(tmp_path: Path) -> None:
    write(tmp_path, "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth")
    weights = load_weights(SPEC, tmp_path)
    assert weights.taken[0] == f"{tmp_path}: diffusion_pytorch_model.safetensors, not Wan2.1_VAE.pth"


def test_a_hub_that_does_not_answer(online: Hub) -> None:
    with pytest.raises(InputError, match=r"a/b is no file.* fetched from the hub \(Repository Not Found\)"):
        load_weights(SPEC, "a/b")


def test_no_room_is_said_before_anything_is_fetched(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    write(online.folder, "a.pt")
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda place: SimpleNamespace(free=10))
    with pytest.raises(InputError, match=r"me/ckpt needs .* where 10 B are free.*HF_HOME"):
        load_weights(SPEC, "me/ckpt")
    assert online.fetched == []


def test_a_repository_that_changes_meanwhile_is_refused(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    write(online.folder, "a.pt")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *given, **more: str(online.cache / "f00")
    )
    with pytest.raises(InputError, match=r"me/ckpt has changed from 0123456789ab to f00"):
        load_weights(SPEC, "me/ckpt")


def test_commands_say_what_they_took(run: Callable[..., Ran], tmp_path: Path) -> None:
    own = tmp_path / "two.toml"
    own.write_text('base = "demo"\nname = "two"\nlayers = 1\nheads = 1\nffn_width = 32\n')
    state = random_model(load_spec(str(own))).state_dict()
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()},
        tmp_path / "c.safetensors",
    )
    said = "c.safetensors: the names behind the prefix model.diffusion_model."
    words = ("export", "--model", own, "--policy", "full", "--no-verify", "--out", tmp_path / "bundle")
    ran = run(*words, "--checkpoint", tmp_path / "c.safetensors")
    assert (ran.code, f"weights: {said}" in ran.err) == (0, True)
    assert Bundle.open(tmp_path / "bundle").manifest.taken == (said,)
    assert " ".join(run("inspect", tmp_path / "bundle").out.split()).count(f"weights {said}") == 1


@pytest.mark.parametrize("preset", ["causal-forcing++-2step", "causal-forcing++-1step"])
def test_the_file_of_a_preset_is_found_beside_those_of_its_relatives(preset: str, tmp_path: Path) -> None:
    """All of Causal Forcing's weights lie in one repository; each of its frame-wise files is of FSDP."""
    source = load_spec(preset).source
    assert source is not None
    for number, place in enumerate(
        ("chunkwise/causal_forcing.pt", "framewise/causal_forcing.pt", source.file)
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"model._fsdp_wrapped_module.{name}": number * value for name, value in STATE.items()}
        others = {name: value - 1 for name, value in tensors.items()}
        torch.save({"generator": others, "generator_ema": tensors}, tmp_path / place)
    found = load_weights(dataclasses.replace(SPEC, source=source), tmp_path)
    assert_same(found, {name: 2 * value for name, value in STATE.items()})
