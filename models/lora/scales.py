"""What the product of a LoRA's matrices is multiplied by: alpha over rank, and where alpha stands.

PEFT: scale = alpha / rank, with rank-stabilised LoRA (rsLoRA) alpha / sqrt(rank). Programs keep alpha in four
places, and some nowhere. They are asked in this order, for each module by itself:

1. the tensor `MODULE.alpha` of the file (kohya, musubi, LyCORIS);
2. the file's metadata `lora_adapter_metadata` (diffusers): PEFT's configuration as JSON;
3. `adapter_config.json` beside the file (PEFT, diffusion-pipe);
4. the file's metadata `ss_network_alpha` (kohya);
5. what is known of a preset's own LoRA (`ModelSpec.source.lora_alpha`).

Where none of them says it, alpha is taken as the rank (scale 1), as all programs do, and the record says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import shown
from forcingkv.headmaps.reading import parse_json, read_json
from forcingkv.models.tensor_files import TensorFiles

T = TypeVar("T")

CONFIG = "adapter_config.json"
DIFFUSERS, KOHYA, KOHYA_MODULE = "lora_adapter_metadata", "ss_network_alpha", "ss_network_module"
KOHYA_RANK = "ss_network_dim"

_ALPHA = re.compile(r'(^|[_.]|network)alpha$|"(?!text_encoder)([\w.]+\.)?lora_alpha"', re.IGNORECASE)
"""Keys or texts of metadata that say an alpha."""

TENSOR = "alpha tensors of the file"
PRESET = "the model's preset"
NOWHERE = "taken as the rank: nothing says it"
WHOLE = "no scale: whole matrices"

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin training (`init_lora_weights`) that subtract the first matrices from the weights."""

_MUST_BE_EMPTY = {
    "fan_in_fan_out": "its matrices are transposed",
    "layer_replication": "it makes copies of layers",
    "alora_invocation_tokens": "it acts only after certain words",
    "modules_to_save": "it replaces whole layers",
    "trainable_token_indices": "it replaces whole tokens",
}
"""Fields of PEFT's configuration, and why a LoRA in which they say something cannot be merged."""

_KINDS = ("LORA", "LOHA", "LOKR")


@dataclass(frozen=True)
class Scale:
    """What a product is multiplied by, and the alpha that says so (None where a kind has none)."""

    factor: float
    alpha: float | None
    source: str


@dataclass(frozen=True)
class AdapterConfig:
    """What PEFT's configuration says of ranks and alphas."""

    where: str
    rank: int | None
    alpha: float | None
    ranks: Mapping[str, int]
    """Pattern of module names -> rank."""
    alphas: Mapping[str, float]
    stabilised: bool
    """Whether alpha is divided by the root of the rank (rsLoRA)."""
    decomposed: bool
    """Whether it is a DoRA, which has magnitudes."""

    @classmethod
    def of(cls, data: Any, where: str) -> AdapterConfig:
        """Read it. Raises InputError for values of another type, and for what cannot be merged."""
        if not isinstance(data, Mapping):
            raise InputError(f"is {shown(data)}", where=where, expected="a table: PEFT's configuration")
        kind = str(data.get("peft_type") or "LORA").rpartition(".")[2].upper()
        if kind not in _KINDS:
            raise InputError(f"is of {kind}, which is not merged", where=where, expected=" or ".join(_KINDS))
        for name, why in _MUST_BE_EMPTY.items():
            if data.get(name):
                raise InputError(f"has {name} {shown(data[name])}: {why}, which is not merged", where=where)
        begun = str(data.get("init_lora_weights"))
        if begun.lower().startswith(_CHANGES_BASE):
            raise InputError(
                f"has init_lora_weights {begun!r}: the weights that it belongs to were changed at first",
                where=where,
                hint="PEFT saves it as a plain LoRA with path_initial_model_for_weight_conversion.",
            )
        alpha = data.get("lora_alpha" if kind == "LORA" else "alpha")
        if kind == "LORA" and alpha is None and "alpha" in data:
            raise InputError(f"has alpha {shown(data['alpha'])}", where=where, expected="lora_alpha")
        return cls(
            where=where,
            rank=None if data.get("r") is None else _rank(data["r"], f"{where}: r"),
            alpha=None if alpha is None else _number(alpha, f"{where}: alpha"),
            ranks=_patterns(data, "rank_pattern", where, _rank),
            alphas=_patterns(data, "alpha_pattern", where, _number),
            stabilised=bool(data.get("use_rslora")),
            decomposed=bool(data.get("use_dora")),
        )

    def scale(self, module: str, rank: int | None) -> Scale | None:
        """That of a module, as the file names it; rank None: its matrices do not show it.

        None where the configuration does not say it. Raises InputError where it has another rank than the
        matrices.
        """
        said = self.ranks.get(_pattern_of(self.ranks, module, self.where), self.rank)
        if None not in (rank, said) and rank != said:
            what = f"has rank {said} for {module}, whose matrices have {rank}"
            hint = "It seems to belong to another file: put them apart, or mend it."
            raise InputError(what, where=self.where, hint=hint)
        alpha = self.alphas.get(_pattern_of(self.alphas, module, self.where), self.alpha)
        divisor = rank or said
        if alpha is None or divisor is None:
            return None
        return Scale(alpha / (math.sqrt(divisor) if self.stabilised else divisor), alpha, self.name)

    @property
    def name(self) -> str:
        """What a record calls it."""
        return DIFFUSERS if self.where.endswith(DIFFUSERS) else CONFIG

    def check_patterns(self, modules: Iterable[str]) -> None:
        """Raise InputError for a pattern that names none of the modules: their scale would be another."""
        names = list(modules)
        for pattern in (*self.ranks, *self.alphas):
            if not any(_pattern_of((pattern,), name, self.where) for name in names):
                what = f"has a rank or an alpha for {pattern!r}, which names no module of the file"
                raise InputError(what, where=self.where, expected=f"patterns of names such as {names[0]}")


class Scales:
    """Where the alphas of one file stand.

    Args:
        files: its tensors and metadata.
        preset: the alpha of a preset's own LoRA; None for all others.
        by_musubi: whether tensors of the file show that musubi wrote it.

    Raises InputError where the configuration cannot be read, or does not say what it should.
    """

    def __init__(self, files: TensorFiles, preset: float | None = None, by_musubi: bool = False) -> None:
        path, self._metadata = files.files[0], files.metadata
        self._where, self._preset = str(path), preset
        self.config = _config(path, self._metadata)
        self.beside = path.parent / CONFIG if self.config and self.config.name == CONFIG else None
        """The configuration, where it is a file of its own."""
        module = self._metadata.get(KOHYA_MODULE, "").lower()
        self.by_musubi = by_musubi or ("lokr" in module and "lycoris" not in module)
        """Whether musubi wrote the file, and not LyCORIS."""

    def of(self, module: str, rank: int, tensor: float | None) -> Scale:
        """That of a module, as the file names it; `tensor` is its own alpha in the file, if it has one."""
        if tensor is not None:
            return Scale(tensor / rank, tensor, TENSOR)
        configured = self.config.scale(module, rank) if self.config else None
        if configured:
            return configured
        if KOHYA in self._metadata:
            alpha = _number(self._metadata[KOHYA], f"{self._where}: metadata {KOHYA}")
            said = self._metadata.get(KOHYA_RANK, "")
            if said.isdecimal() and int(said) != rank:
                what = f"has metadata for rank {said}, and matrices of rank {rank} for {module}"
                raise InputError(what, where=self._where, hint="Nothing else says its alpha.")
            return Scale(alpha / rank, alpha, KOHYA)
        if self._preset is not None:
            return Scale(self._preset / rank, self._preset, PRESET)
        unread = [key for key, text in self._metadata.items() if _ALPHA.search(key) or _ALPHA.search(text)]
        if unread:
            what = f"speaks of an alpha in its metadata ({unread[0]}) in a way that is not known"
            hint = f'Say it in a file {CONFIG} beside it: {{"r": {rank}, "lora_alpha": ...}}'
            raise InputError(what, where=self._where, hint=hint)
        return Scale(1.0, float(rank), NOWHERE)


def _config(path: Path, metadata: Mapping[str, str]) -> AdapterConfig | None:
    """PEFT's configuration in the metadata or beside the file."""
    if DIFFUSERS in metadata:
        where = f"{path}: {DIFFUSERS}"
        data = parse_json(metadata[DIFFUSERS], where)
        if not isinstance(data, Mapping):
            raise InputError(f"is {shown(data)}", where=where, expected="a table")
        own = {
            name.removeprefix("transformer."): data[name] for name in data if name.startswith("transformer.")
        }
        return AdapterConfig.of(own or data, where)
    beside = path.parent / CONFIG
    if not beside.is_file():
        return None
    others = [file for file in path.parent.glob("adapter_model.*") if file.suffix in (".safetensors", ".bin")]
    if others and path.stem != "adapter_model":
        return None  # PEFT names the two: the configuration is that file's
    return AdapterConfig.of(read_json(beside), str(beside))


def _pattern_of(patterns: Iterable[str], module: str, where: str) -> str:
    """The first pattern that names the module by its end, as PEFT matches them; "" if none does."""
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except re.error as error:
            expected = "a regular expression of names of modules"
            raise InputError(
                f"has the pattern {pattern!r} ({error})", where=where, expected=expected
            ) from error
    return ""


def _patterns(data: Mapping[str, Any], name: str, where: str, read: Callable[[Any, str], T]) -> dict[str, T]:
    table = data.get(name) or {}
    if not isinstance(table, Mapping):
        raise InputError(f"is {shown(table)}", where=f"{where}: {name}", expected="a table")
    return {str(key): read(value, f"{where}: {name}: {key}") for key, value in table.items()}


def _rank(value: Any, where: str) -> int:
    """A rank. Raises InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"is {shown(value)}", where=where, expected="a whole number from 1 on")
    return value


def _number(value: Any, where: str) -> float:
    """A finite number, also as text. Raises InputError for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"is {shown(value)}", where=where, expected="a finite number")
    return number
