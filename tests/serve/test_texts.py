"""Prompts of clients where a model takes embeddings: from a file, or of a text encoder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forcingkv.commands.served_text import ServedEncoder
from forcingkv.headmaps.errors import InputError
from forcingkv.models.presets import load_spec
from forcingkv.runtime.text import TextInput, prompt_input
from tests.models.test_text_encoder import LENGTH, WIDTH, diffusers_folder

SPEC = replace(load_spec("self-forcing"), text_width=WIDTH, text_length=LENGTH)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ServedEncoder:
    return ServedEncoder(str(diffusers_folder(tmp_path_factory.mktemp("encoder"))))


def test_words_become_what_the_model_takes(encoder: ServedEncoder) -> None:
    encoder.check(SPEC)
    prompt = encoder(SPEC, "a red kite")
    assert isinstance(prompt, TextInput)
    assert prompt.text == "a red kite"
    found = prompt_input(SPEC, prompt)
    assert found.shape == (1, LENGTH, WIDTH)
    assert np.abs(found[0, :4]).min() > 0  # three words and the end
    assert not found[0, 4:].any()
    again = encoder(SPEC, "a red kite")
    assert isinstance(again, TextInput)
    np.testing.assert_array_equal(again.array, prompt.array)


def test_words_that_cannot_be_encoded_are_refused(encoder: ServedEncoder) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        encoder(SPEC, " \u200b ")


def test_what_is_too_long_is_cut_as_wan_does(encoder: ServedEncoder) -> None:
    prompt = encoder(SPEC, "a red kite " * 20)
    assert isinstance(prompt, TextInput)
    assert np.abs(prompt.array[0]).min(1).all()


def test_an_encoder_of_another_width_is_refused(encoder: ServedEncoder) -> None:
    with pytest.raises(InputError, match=f"gives embeddings of width {WIDTH}; expected 4096"):
        encoder.check(load_spec("self-forcing"))
