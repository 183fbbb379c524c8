"""What a file of weights is that does not fit a model, where its names and shapes tell."""

from __future__ import annotations

import re
from collections.abc import Iterable

from forcingkv.models.tensor_files import Shapes

_IMAGE = re.compile(r"\b(k_img|v_img|img_emb|image_embedder|add_[kv]_proj)\b")
SHARD = re.compile(r"-\d+-of-\d+\.\w+$")
"""How names of shards end."""
_PATCH = "patch_embedding.weight"


def told_of(names: Iterable[str]) -> str | None:
    """What names say that are none of a model; None where they say nothing that is known."""
    names = list(names)
    if any(name.endswith("_flat_param") for name in names):
        return (
            "FSDP saved it as flat parameters, whose parts only that run can tell apart: save it with"
            " StateDictType.FULL_STATE_DICT."
        )
    if any(".lora_" in name for name in names):
        return "It is a LoRA: give it with --lora, and the model with --checkpoint."
    return None


def what_it_is(found: Shapes, wanted: Shapes, file: str) -> str | None:
    """What a file of that name is, or in what its model is another than the one that is wanted.

    `found`, `wanted`: shapes of both, by Wan name.
    """
    if found and all(0 in shape for shape in found.values()):
        return "Its tensors are empty, as ZeRO 3 leaves them: zero_to_fp32.py makes one file of all parts."
    if SHARD.search(file):
        return "By its name it is one shard of several: name their folder, or their index."
    if any(_IMAGE.search(name) for name in found):
        return "It is of an image-to-video model: this one takes none. Its text-to-video edition would fit."
    if any("vace" in name for name in found):
        return "It is of VACE, which takes control videos: this model has no such layers."
    theirs, ours = _sizes(found), _sizes(wanted)
    if theirs != ours and None not in theirs:
        return "It has {} layers of width {} and takes {} channels; this model has {}, {} and {}.".format(
            *theirs, *ours
        )
    return None


def _sizes(shapes: Shapes) -> tuple[int | None, ...]:
    """Layers, width, and channels of the latents."""
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    patch = shapes.get(_PATCH, ())
    return len(blocks), *(patch[:2] if len(patch) > 1 else (None, None))
