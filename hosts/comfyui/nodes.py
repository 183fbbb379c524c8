"""What ComfyUI calls: each node is a class with its inputs, outputs, and the method that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from forcingkv.commands.baked import ModelOptions, bake_model
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import Chunk, Prompt, Session, Video
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.kv.policies import policy_names
from forcingkv.runtime.text import TextInput, read_embeds

CATEGORY = "forcingkv"
MOST_SEED = 2**53 - 1
PREVIEW = 512
"""Pixels of a preview's longer side."""


class LoadBundle:
    """Opens a bundle that `forcingkv export` wrote."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES: ClassVar = ("FORCINGKV_SESSION",)
    RETURN_NAMES: ClassVar = ("session",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {
            "required": {
                "bundle": ("STRING", {"default": "", "tooltip": "Folder that forcingkv export wrote."})
            },
            "optional": {
                "device": ("STRING", {"default": "", "tooltip": "cpu, cuda, cuda:1; empty: the default."}),
                "backend": (["default", "onnxruntime", "torch", "tensorrt", "tensorrt-rtx"],),
            },
        }

    @classmethod
    def IS_CHANGED(cls, bundle: str, **_: object) -> str:  # noqa: N802
        return _written(bundle)

    def load(self, bundle: str, device: str = "", backend: str = "default") -> tuple[Session]:
        asked = None if backend == "default" else backend
        return (Session.open(Path(bundle.strip()), device=device.strip() or None, backend=asked),)


class LoadModel:
    """Bakes a model with its policy and head map the first time, as `forcingkv generate --model` does, and
    opens it in torch."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES: ClassVar = ("FORCINGKV_SESSION",)
    RETURN_NAMES: ClassVar = ("session",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "model": (
                    "STRING",
                    {"default": "self-forcing", "tooltip": "Preset, or a spec file (.toml)."},
                ),
                "policy": (policy_names(), {"default": "forcing-kv"}),
            },
            "optional": {
                "checkpoint": ("STRING", {"default": "", "tooltip": "A file, a folder or a hub id."}),
                "headmap": ("STRING", {"default": "", "tooltip": "Empty: the one that ships, if any."}),
                "vae": ("STRING", {"default": "", "tooltip": "Weights of the decoder."}),
                "device": ("STRING", {"default": "", "tooltip": "cpu, cuda, cuda:1; empty: the default."}),
            },
        }

    @classmethod
    def IS_CHANGED(  # noqa: N802
        cls, model: str, checkpoint: str = "", headmap: str = "", vae: str = "", **_: object
    ) -> str:
        return _written(model, checkpoint, headmap, vae)

    def load(
        self,
        model: str,
        policy: str,
        checkpoint: str = "",
        headmap: str = "",
        vae: str = "",
        device: str = "",
    ) -> tuple[Session]:
        options = ModelOptions(
            model=model.strip(),
            checkpoint=checkpoint.strip() or None,
            headmap=Path(headmap.strip()) if headmap.strip() else None,
            policy=policy,
            vae=Path(vae.strip()) if vae.strip() else None,
        )
        where = device.strip() or None
        baked = bake_model(options, LaneOptions("torch", device=where), None, ())
        return (Session.open(baked.bundle, backend="torch", device=where),)


class GenerateVideo:
    """Makes a video, and shows each chunk as soon as it is there."""

    CATEGORY = CATEGORY
    FUNCTION = "generate"
    RETURN_TYPES: ClassVar = ("IMAGE", "FLOAT")
    RETURN_NAMES: ClassVar = ("frames", "fps")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "session": ("FORCINGKV_SESSION",),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
                "seed": ("INT", {"default": 0, "min": 0, "max": MOST_SEED, "control_after_generate": True}),
                "seconds": ("FLOAT", {"default": 5.0, "min": 0.1, "max": 3600.0, "step": 0.1}),
            },
            "optional": {
                "embeds": ("STRING", {"default": "", "tooltip": "File of embeddings that has the prompts."}),
                "switches": ("FORCINGKV_SWITCHES",),
            },
        }

    @classmethod
    def IS_CHANGED(cls, embeds: str = "", **_: object) -> str:  # noqa: N802
        return _written(embeds)

    def generate(
        self,
        session: Session,
        prompt: str,
        seed: int,
        seconds: float,
        embeds: str = "",
        switches: tuple[tuple[float, str], ...] = (),
    ) -> tuple[Any, float]:
        import torch

        spec = session.spec
        chunks = spec.chunks_for(seconds)
        video = session.generate(_text(session, prompt, embeds), seed=seed, chunks=chunks)
        for second, other in switches:
            at = spec.chunks_for(second)
            if at >= chunks:
                what = f"is at {second:g} s, and the video ends before its chunk {at} begins"
                raise InputError(what, where="the switch", expected="an earlier second, or a longer video")
            video.switch(_text(session, other, embeds), at=at)
        frames = np.concatenate([chunk.frames for chunk in _shown(video, chunks)])
        return torch.from_numpy(frames.astype(np.float32) / 255), float(spec.fps)


class SwitchPrompt:
    """Another prompt from a second of the video on. Several are chained."""

    CATEGORY = CATEGORY
    FUNCTION = "switch"
    RETURN_TYPES: ClassVar = ("FORCINGKV_SWITCHES",)
    RETURN_NAMES: ClassVar = ("switches",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "second": ("FLOAT", {"default": 2.5, "min": 0.1, "max": 3600.0, "step": 0.1}),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
            },
            "optional": {"switches": ("FORCINGKV_SWITCHES",)},
        }

    def switch(
        self, second: float, prompt: str, switches: tuple[tuple[float, str], ...] = ()
    ) -> tuple[tuple[tuple[float, str], ...]]:
        return (tuple(sorted((*switches, (second, prompt)))),)


def _written(*places: str) -> str:
    """When files were written: ComfyUI keeps what a node gave until this is another text.

    Of a bundle its manifest, which has the digests of all others; of what is no file here nothing.
    """
    found = []
    for place in filter(None, map(str.strip, places)):
        path = Path(place)
        path = path / "manifest.json" if (path / "manifest.json").is_file() else path
        with suppress(OSError):
            found.append(f"{path.stat().st_mtime_ns}, {path.stat().st_size}")
    return "; ".join(found)


def _text(session: Session, prompt: str, embeds: str) -> Prompt:
    if not embeds.strip():
        return prompt
    return TextInput(prompt, read_embeds(embeds.strip()).get(prompt, session.spec))


def _shown(video: Video, chunks: int) -> Iterator[Chunk]:
    """The chunks of a video, each shown in ComfyUI as it comes; the button that cancels ends it."""
    from PIL import Image

    bar = import_module("comfy.utils").ProgressBar(chunks)
    for chunk in video:
        picture = Image.fromarray(chunk.frames[-1])
        picture = picture.resize(_preview_size(picture.size), Image.Resampling.NEAREST)
        # Raises where it was cancelled.
        bar.update_absolute(chunk.index + 1, chunks, ("JPEG", picture, PREVIEW))
        yield chunk


def _preview_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = max(1, PREVIEW // max(size))
    return size[0] * scale, size[1] * scale


NODE_CLASS_MAPPINGS = {
    "ForcingKVLoadBundle": LoadBundle,
    "ForcingKVLoadModel": LoadModel,
    "ForcingKVGenerate": GenerateVideo,
    "ForcingKVSwitchPrompt": SwitchPrompt,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ForcingKVLoadBundle": "forcingkv: load a bundle",
    "ForcingKVLoadModel": "forcingkv: load a model",
    "ForcingKVGenerate": "forcingkv: generate a video",
    "ForcingKVSwitchPrompt": "forcingkv: switch the prompt",
}
