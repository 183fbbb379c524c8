"""Where text encoders lie: Wan's folder, those of diffusers and transformers, single files, the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forcingkv.headmaps.errors import InputError, first_line
from forcingkv.headmaps.files import there
from forcingkv.headmaps.reading import read_json
from forcingkv.models.hub import hub_id
from forcingkv.models.umt5 import CONFIG, WAN_ENCODER

WAN_FILES = "models_t5_umt5-xxl-enc-*"
WAN_TOKENIZER = "google/umt5-xxl"
"""Of Wan's folder, and the repository on the hub that it is a copy of."""
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
LAYOUTS = (
    f"Wan's folder with {WAN_ENCODER}, a folder with text_encoder/ (diffusers), one with the weights"
    " (transformers), or a file"
)
_WITH_FOLDERS = ("text_encoder/*", "tokenizer/*", WAN_FILES, f"{WAN_TOKENIZER}/*")
"""What is fetched of a repository with folders, or of Wan's."""
_PLAIN = ("*.json", "*.safetensors", "*.bin", "*.model")
"""And of one of transformers, at its root."""


@dataclass(frozen=True)
class EncoderPlace:
    """The files of an encoder on this machine."""

    weights: Sequence[Path]
    tokenizers: Sequence[Path]
    """Folders that may hold its tokenizer, the likeliest first."""
    name: str

    def tokenizer(self) -> Path:
        """The folder with its tokenizer. Raises InputError, naming those that were looked at, for none."""
        for folder in self.tokenizers:
            if any((folder / name).is_file() for name in TOKENIZER_FILES):
                return folder
        looked = ", ".join(map(str, self.tokenizers))
        raise InputError(
            f"has no tokenizer beside it: cannot be read by transformers' AutoTokenizer (looked at {looked})",
            where=str(self.weights[0]),
            hint=f"Name its folder or repository: --tokenizer {WAN_TOKENIZER}",
        )


def find_encoder(place: str | Path) -> EncoderPlace:
    """The files of the encoder in a folder, a file or a repository on the hub, which is fetched.

    Raises InputError where there is none, or more than one could be meant.
    """
    path, name = Path(place), Path(place).name
    if not there(place):
        return _in_folder(_fetched(hub_id(place, "a folder with the text encoder, a file")), name)
    return _in_folder(path, path.resolve().name) if path.is_dir() else _file(path)


def _file(path: Path) -> EncoderPlace:
    folder = path.parent
    beside = [folder / WAN_TOKENIZER, folder / "tokenizer", folder, folder.parent / "tokenizer"]
    return EncoderPlace([path], beside, path.name)


def _in_folder(folder: Path, name: str) -> EncoderPlace:
    wan = sorted(folder.glob(WAN_FILES))
    wan = [path for path in wan if path.name == WAN_ENCODER] or wan
    if len(wan) > 1:
        what = f"holds {len(wan)} text encoders: {', '.join(path.name for path in wan)}"
        raise InputError(what, where=str(folder), hint="Name the file.")
    if wan:
        return _file(wan[0])
    inner = folder / "text_encoder"
    own = inner if inner.is_dir() else folder
    _refuse_other(own / CONFIG)
    weights = sorted(own.glob("*.safetensors")) or sorted(own.glob("*.bin")) or sorted(own.glob("*.pth"))
    if not weights:
        raise InputError("holds no text encoder", where=str(own), expected=LAYOUTS)
    beside = [folder / "tokenizer", own, folder.parent / "tokenizer"]
    return EncoderPlace(weights, beside if own != folder else [own, *beside], name)


def _refuse_other(config: Path) -> None:
    """Raise InputError for a config of another model: nothing else is wrong with the folder."""
    content = read_json(config) if config.is_file() else None
    kind = (
        content.get("model_type", content.get("_class_name", "no model"))
        if isinstance(content, dict)
        else None
    )
    if content is not None and kind != "umt5":
        raise InputError(f"describes {kind}", where=str(config), expected="umt5, the text encoder of Wan")


def _fetched(repository: str) -> Path:
    """A repository's encoder and tokenizer, from the hub or its cache."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(_WITH_FOLDERS)))
        if (folder / "text_encoder").is_dir() or any(folder.glob(WAN_FILES)):
            return folder
        # Repositories hold encoders of many models, and terabytes: first what it says that it is.
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=[CONFIG]))
        _refuse_other(folder / CONFIG)
        if (folder / CONFIG).is_file():
            huggingface_hub.snapshot_download(
                repository, allow_patterns=list(_PLAIN), ignore_patterns=["*/*"]
            )
        return folder
    except InputError:
        raise
    except (OSError, ValueError) as error:  # HTTP, connection and repository errors are OSErrors
        what = f"is no file or folder here, and cannot be fetched from the hub ({first_line(error)})"
        hint = "Check the name, the network and the access rights, or fetch it by other means."
        raise InputError(what, where=repository, hint=hint) from error
