"""Which decoder a file holds: by its tensors where they tell, else by its name.

The tiny decoders of several video models have the same layers, so that a file of one loads as another and
makes wrong colours. Their published names tell them apart; a file of another name is what the user says.
Wan 2.1 and 2.2 are told apart by the number of their latents' channels, which the tensors show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import there

_TINY = re.compile(r"^decoder\.\d+\.(conv\.)?(\d+\.)?weight$")
"""Tensors of a TAEHV: its layers have numbers."""
_VAE = re.compile(r"^decoder\.(middle|upsamples|mid_block|up_blocks)\.")
"""Tensors of a Wan VAE, in Wan's naming and in that of diffusers."""

_BEFORE = re.compile(r"((?:.*?\.)?)decoder\.")

_OTHER_LATENTS = (
    (r"(?<![a-z])lighttae", "LightTAE of another model than Wan 2.1 and 2.2"),
    (r"(?<![a-z])tae(hv|hy)", "the tiny decoder of HunyuanVideo, by its published name"),
    (r"(?<![a-z])taecvx", "the tiny decoder of CogVideoX"),
    (r"(?<![a-z])taeos", "the tiny decoder of Open-Sora"),
    (r"(?<![a-z])taem1", "the tiny decoder of Mochi"),
    (r"(?<![a-z])taeltx", "the tiny decoder of LTX-Video"),
    (r"(?<![a-z])tae(sd|f\d|qi)", "a tiny decoder of images"),
    (r"qwen_?image", "the VAE of Qwen-Image, which was trained for images"),
    (r"(?<![a-z])lightvae", "LightVAE, a Wan VAE with fewer channels"),
)
"""Names of files that hold a decoder of other latents, or layers that are not read; the first that fits."""


def kind_by_name(path: Path) -> str | None:
    """The kind of decoder that a file's published name says; None for any other name.

    Raises InputError for a name that says that the file is a decoder of other latents.
    """
    stem = re.sub(r"[-. ]", "_", path.name.lower())
    if re.search(r"light_?tae_?w(an)?2_?[12]", stem):
        return "lighttae"
    if re.search(r"taew(an)?2_?[12]", stem):
        return "taehv"
    if re.search(r"wan(_video)?_?2_[12]_vae", stem):
        return "wan-vae"
    for pattern, model in _OTHER_LATENTS:
        if re.search(pattern, stem):
            hint = "If the file was given another one's name, rename it."
            expected = "Wan2.1_VAE.pth (wan-vae), taew2_1.pth (taehv), lighttaew2_1.pth (lighttae), or of 2.2"
            raise InputError(f"is {model}", where=str(path), expected=expected, hint=hint)
    return None


def check_name(kind: str, path: Path) -> None:
    """Raise InputError where the name of a file says that it is another kind of decoder.

    Folders have the names of whole models, which say little about the decoder in them.
    """
    if not there(path):
        what, expected = "cannot be read: there is no such file or folder", f"weights of {kind}"
        raise InputError(what, where=str(path), expected=expected)
    named = None if path.is_dir() else kind_by_name(path)
    if named and named != kind:
        what = f"is the decoder {named}, by its name"
        expected = f"weights of {kind}"
        hint = f"Say --decoder {named}; or rename the file, if it is not what it is called."
        raise InputError(what, where=str(path), expected=expected, hint=hint)


def is_decoder(name: str) -> bool:
    """Whether a tensor is of a decoder, whatever stands before its name."""
    return _BEFORE.match(name) is not None


def without_prefix(names: Iterable[str]) -> dict[str, str]:
    """Name without what stands before `decoder.`, where all names begin with that -> name."""
    names = list(names)
    before = {match[1] for match in map(_BEFORE.match, names) if match}
    prefix = before.pop() if len(before) == 1 else ""
    shared = prefix if all(name.startswith(prefix) for name in names) else ""
    return {name.removeprefix(shared): name for name in names}


def check_tensors(kind: str, names: Iterable[str], where: str) -> None:
    """Raise InputError where the tensors are those of another kind of decoder."""
    names = list(names)
    tiny = any(map(_TINY.match, names)) and not any(map(_VAE.match, names))
    vae = any(map(_VAE.match, names))
    if kind == "wan-vae" and tiny:
        hint = "Say --decoder taehv for taew2_1 or 2_2, --decoder lighttae for lighttaew2_1 or 2_2."
        raise InputError("holds a tiny decoder, not the Wan VAE", where=where, hint=hint)
    if kind != "wan-vae" and vae:
        raise InputError("holds the Wan VAE, not a tiny decoder", where=where, hint="Say --decoder wan-vae.")
