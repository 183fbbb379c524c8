"""Where the project's caches lie, on each system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.cache_folder import cache_folder


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ada")


SYSTEMS = {
    "linux": "/home/ada/.cache/forcingkv",
    "darwin": "/home/ada/Library/Caches/forcingkv",
    "win32": "/home/ada/AppData/Local/forcingkv/Cache",
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_has_its_own_place(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert cache_folder() == Path(SYSTEMS[system])
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/ada")
    assert cache_folder() == Path("/scratch/ada/forcingkv")


def test_windows_is_asked_where_local_data_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/users/ada/local")
    assert cache_folder() == Path("/users/ada/local/forcingkv/Cache")


@pytest.mark.parametrize("given", ["", "caches", "./caches", "~/caches"])
def test_a_relative_folder_counts_as_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be another folder for each folder that a command is started in."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == Path("/home/ada/.cache/forcingkv")


@pytest.mark.parametrize("home", [None, "ada"], ids=["no home", "a relative home"])
def test_a_user_without_a_home_is_told_what_to_set(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    if home:
        monkeypatch.setenv("HOME", home)
    with pytest.raises(InputError, match=r"has no home folder\. Set XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/ada")
    assert cache_folder() == Path("/scratch/ada/forcingkv")
