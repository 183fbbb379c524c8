"""`forcingkv encode`: text embeddings ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from forcingkv.commands.console import AsJson, emit, need, progress_bar, read_prompts
from forcingkv.commands.models import Model
from forcingkv.headmaps.errors import InputError


def encode(
    prompts: Annotated[Path, Option(help="Text file, one prompt a line, or interactive .jsonl.")],
    out: Annotated[Path, Option(help="File to write (.safetensors).")],
    model: Model = "self-forcing",
    text_encoder: Annotated[
        str, Option(help="Wan's folder or its .pth, a diffusers or transformers folder, or a hub id.")
    ] = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    tokenizer: Annotated[
        str | None, Option(help="Its folder or hub id; default: beside the encoder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Encode prompts with UMT5, so that generating needs neither the 11 GB encoder nor torch.

    Example: forcingkv encode --prompts prompts.txt --text-encoder Wan2.1-T2V-1.3B --out embeds.safetensors
    """
    need("text", "torch", "transformers", "ftfy")
    from forcingkv.models.presets import load_spec
    from forcingkv.models.text_encoder import load_prompt_encoder
    from forcingkv.runtime.text import write_embeds

    spec = load_spec(model)
    if spec.text.kind != "umt5":
        raise InputError(
            f"{spec.name} takes words as they are: there is nothing to encode",
            where="model",
            expected="a model with the text encoder umt5",
        )
    texts = list(dict.fromkeys(read_prompts(prompts)))
    arrays = []
    with progress_bar() as shown:
        task = shown.add_task("loading the text encoder", total=len(texts))
        encoder = load_prompt_encoder(text_encoder, tokenizer)
        if encoder.width != spec.text_width:
            raise InputError(
                f"gives embeddings of width {encoder.width}",
                where=encoder.name,
                expected=f"{spec.text_width}, as {spec.name} takes",
            )
        shown.update(task, description="encoding prompts")
        for text in texts:
            arrays.append(encoder.encode(text, spec.text_length))
            shown.advance(task)
    write_embeds(out, texts, arrays, {"encoder": encoder.name, "text_length": spec.text_length})
    tokens = [len(array) for array in arrays]
    if as_json:
        emit({"out": str(out), "prompts": len(texts), "width": encoder.width, "tokens": tokens})
        return
    print(f"{out}: {len(texts)} prompts of {min(tokens)} to {max(tokens)} tokens, width {encoder.width}")
