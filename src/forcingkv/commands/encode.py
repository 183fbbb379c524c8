"""`forcingkv encode`: text embeddings ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from forcingkv.commands.console import AsJson, emit, need, progress_bar, say
from forcingkv.commands.models import Model
from forcingkv.commands.stopping import exit_code
from forcingkv.headmaps.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forcingkv.models.text_encoder import CheckedPrompt, PromptTokenizer
    from forcingkv.models.umt5 import Umt5Files
    from forcingkv.runtime.embeds_writer import GrowingEmbeds
    from forcingkv.runtime.spec import ModelSpec


def encode(
    prompts: Annotated[Path, Option(help="Text file, one prompt a line, or interactive .jsonl.")],
    out: Annotated[Path, Option(help="File to write (.safetensors).")],
    model: Model = "self-forcing",
    text_encoder: Annotated[
        str,
        Option(
            help="Wan's folder, a diffusers or transformers folder, a file of either naming, or a hub id."
        ),
    ] = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    tokenizer: Annotated[
        str | None, Option(help="Its folder or hub id; default: beside the encoder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Encode prompts with UMT5, so that generating needs neither the 11 GB encoder nor torch.

    All prompts are checked before the encoder is loaded. What is encoded is kept: interrupted, the same
    command goes on.

    Example: forcingkv encode --prompts prompts.txt --text-encoder Wan2.1-T2V-1.3B --out embeds.safetensors
    """
    need("text", "torch", "transformers", "ftfy")
    from forcingkv.models.encoder_places import find_encoder
    from forcingkv.models.presets import load_spec
    from forcingkv.models.text_encoder import load_tokenizer, open_encoder
    from forcingkv.runtime.embeds_writer import check_place
    from forcingkv.runtime.prompts import clean_prompt, is_empty, read_prompts

    spec = load_spec(model)
    if spec.text.kind != "umt5":
        raise InputError(
            f"{spec.name} takes words as they are: there is nothing to encode",
            where="model",
            expected="a model with the text encoder umt5",
        )
    lines = read_prompts(prompts)
    for line in lines:  # again with the tokenizer, which may first have to be fetched
        with line.named():
            if is_empty(clean_prompt(line.text)):
                raise InputError("the prompt is empty once it is cleaned", expected="some words")
    check_place(out)
    place = find_encoder(text_encoder)
    files = open_encoder(place)
    words = load_tokenizer(place, tokenizer)
    _fit(files, words, spec)
    checked = words.check(lines, spec.text_length)
    for prompt in checked:
        for note in prompt.notes():
            say(f"note: {prompt.line.where}: {note}", error=True)
    files.require_memory()
    went_on = _encode(files, words, checked, out, spec.text_length)
    tokens = [len(prompt.tokens.ids) for prompt in checked]
    if as_json:
        emit(
            {
                "out": str(out),
                "prompts": len(checked),
                "width": files.width,
                "tokens": tokens,
                "dtype": files.dtype,
                "went_on_after": went_on,
                "notes": [_note(prompt) for prompt in checked if prompt.notes()],
            }
        )
        return
    say(f"{out}: {len(checked)} prompts of {min(tokens)} to {max(tokens)} tokens, width {files.width}")


def _fit(files: Umt5Files, words: PromptTokenizer, spec: ModelSpec) -> None:
    """Raise InputError unless encoder, tokenizer and model belong together, as far as their sizes say."""
    if files.width != spec.text_width:
        raise InputError(
            f"gives embeddings of width {files.width}",
            where=files.name,
            expected=f"{spec.text_width}, as {spec.name} takes",
        )
    words.check_fits(files)


def _encode(
    files: Umt5Files, words: PromptTokenizer, checked: Sequence[CheckedPrompt], out: Path, length: int
) -> int:
    """Write the embeddings; how many were there from an earlier run that was stopped."""
    from forcingkv.models.text_encoder import PromptEncoder, tokens_digest
    from forcingkv.models.torch_threads import use_threads
    from forcingkv.runtime.embeds_writer import growing_embeds

    growing: GrowingEmbeds | None = None
    use_threads()
    with progress_bar() as shown:
        task = shown.add_task("loading the text encoder", total=len(checked))
        encoder = PromptEncoder(files.load(), words.tokenizer, files.name)
        made = {
            "encoder": encoder.name,
            "encoder_dtype": files.dtype,
            "encoder_digest": encoder.digest,
            "tokens_digest": tokens_digest(checked),
            "text_length": length,
        }
        try:
            with growing_embeds(
                out,
                [prompt.line.text for prompt in checked],
                [prompt.tokens.cleaned for prompt in checked],
                [prompt.tokens.whole for prompt in checked],
                [(len(prompt.tokens.ids), encoder.width) for prompt in checked],
                made,
            ) as growing:
                went_on = growing.done
                if went_on:
                    say(f"going on after {went_on} of {len(checked)} prompts that are there", error=True)
                elif growing.begun_anew:
                    say("what was left unfinished is of another command: begun anew", error=True)
                shown.update(task, description="encoding prompts", completed=went_on)
                for prompt in checked[went_on:]:
                    with prompt.line.named():
                        growing.write(encoder.encode_tokens(prompt.tokens.ids))
                    shown.advance(task)
        except (KeyboardInterrupt, SystemExit) as error:
            done = growing.done if growing else 0
            say(f"stopped after {done} of {len(checked)} prompts: the same command goes on", error=True)
            raise typer.Exit(exit_code(error)) from error
    return went_on


def _note(prompt: CheckedPrompt) -> dict[str, object]:
    tokens = prompt.tokens
    return {
        "where": prompt.line.where,
        "line": prompt.line.line,
        "tokens": tokens.whole,
        "unused": tokens.unused,
        "cleaned": tokens.cleaned,
        "notes": prompt.notes(),
    }
