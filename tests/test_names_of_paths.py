"""Names of files and folders that mean something else to a shell, a pattern, a URL, FFmpeg or a terminal.

Each command that reads or writes a place is given such names, relative to the working folder, since some mean
something only at the start of a path.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from forcingkv.analyze.run import SampleRecorder
from forcingkv.analyze.storage import Storage
from forcingkv.headmaps import HeadMap, InputError, read_headmap
from forcingkv.headmaps.folders import new_folder
from forcingkv.headmaps.writing import new_file, write_text
from forcingkv.measure.bench import turns
from forcingkv.measure.demo_comparison import (
    SHOWN_FRAMES,
    PolicyRun,
    write_comparison_sheet,
    write_comparison_video,
)
from forcingkv.measure.tables import PlainConsole
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from forcingkv.runtime.bundle_files import BUNDLE
from forcingkv.runtime.text import read_embeds
from forcingkv.runtime.video import open_writer
from tests.conftest import Ran, headmap_of, small_spec
from tests.models.test_text_encoder import SPEC, wan_folder
from tests.runtime.conftest import small_bundle

Run = Callable[..., Ran]

pytestmark = pytest.mark.usefixtures("white_pictures")

ALL = "runs [v1] *?{a,b} 50%d #x $y^$ ~ 'q\" \\b ü日 :fire: [b] a::b seed=3"
NAMES = (ALL, "-rf", "~", "~me", "[/b]", "file:v1", "v1:x", "sample=9", "%03d", ".hidden", " ends with ")
CHUNKS_OF_3 = ("--first-chunk-frames=3", "--chunk-frames=3")
FRAMES_9 = ("--prompt", "b a d", "--seconds", "0.5")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path(request.param).mkdir(parents=True)
    return str(request.param)


def leaf(name: str) -> str:
    """The name without the folders before it."""
    return Path(name).name


def done(ran: Ran) -> Ran:
    assert ran.code == 0, ran.err
    return ran


def places() -> set[str]:
    """All files and folders below the working folder."""
    return {path.as_posix() for path in Path().rglob("*")}


def test_head_maps(name: str, run: Run) -> None:
    spec = small_spec(layers=2)
    one, other = f"{name}/{leaf(name)}.json", f"{name}/other {leaf(name)}.json"
    before = places()
    headmap_of(spec, [[0], [1]]).write(Path(one))
    headmap_of(spec, [[0], [2]]).write(Path(other))
    assert one in done(run("headmap", "validate", "--", one)).out
    done(run("headmap", "show", "--", one))
    written = done(run("headmap", "convert", f"--out={name}/c.json", "--to", "forcing-kv-json", "--", one))
    assert f"{name}/c.json: 2 layers" in written.out
    assert read_headmap(f"{name}/c.json").labels == HeadMap.read(one).labels
    compared = done(run("analyze", "compare", f"--out={name}/p.png", "--", one, other))
    assert one in compared.out
    assert f"picture: {name}/p.png" in compared.out
    assert Path(f"{name}/p.png").read_bytes().startswith(b"\x89PNG")
    assert places() - before == {one, other, f"{name}/c.json", f"{name}/p.png"}


def test_bundles_videos_and_states(name: str, run: Run) -> None:
    shutil.copytree(small_bundle("forcing-kv"), f"{name}/{leaf(name)}")
    bundle = f"--bundle={name}/{leaf(name)}"
    before = places()
    video = f"{name}/{leaf(name)}.mp4"
    assert (
        f"{video}: 9 frames" in done(run("generate", bundle, *FRAMES_9, f"--out={video}", "--enlarge=8")).out
    )
    done(
        run(
            "generate",
            bundle,
            *FRAMES_9,
            f"--out={name}/{leaf(name)}.rgb",
            f"--save={name}/s",
            "--save-every=1",
        )
    )
    done(run("generate", bundle, "--seconds=1.2", f"--restore={name}/s", f"--out={name}/rest.rgb"))
    made = places() - before - {path for path in places() if path.startswith(f"{name}/s/")}
    assert made == {video, f"{name}/{leaf(name)}.rgb", f"{name}/rest.rgb", f"{name}/s"}
    shown = done(run("inspect", f"--picture={name}/m.png", "--", f"{name}/{leaf(name)}"))
    assert shown.out.startswith(f"{name}/{leaf(name)}\n")
    assert f"{name}/m.png: where the memory goes" in shown.err
    measured = done(run("evaluate", f"--video={video}", *CHUNKS_OF_3, f"--out={name}/v.csv", "--json"))
    assert [one["video"] for one in json.loads(measured.out)["videos"]] == [video]
    assert Path(f"{name}/v.csv").is_file()
    assert Bundle.open(f"{name}/{leaf(name)}").path == Path(f"{name}/{leaf(name)}")


def test_a_folder_of_pictures(name: str, run: Run) -> None:
    folder = f"{name}/pictures"
    done(run("generate", f"--bundle={small_bundle('forcing-kv')}", *FRAMES_9, f"--out={folder}"))
    assert len([path for path in Path(folder).iterdir() if path.suffix == ".png"]) == 9
    assert {path.parent.as_posix() for path in Path().rglob("*.png")} == {folder}


def test_statistics_are_those_of_the_folder_and_of_no_other(name: str) -> None:
    """Neither a pattern that its name is, nor a column that its name sets, nor a home folder."""
    other = Path(name.replace("*", "x").replace("?", "y") + "z")
    for folder, value in ((Path(name), 1), (other, 2)):
        (folder / "stats").mkdir(parents=True)
        content = io.BytesIO()  # polars itself takes ~ and file: in names for something else
        pl.DataFrame({"sample": [value], "seed": [value]}).write_parquet(content)
        (folder / "stats/sample-0001.parquet").write_bytes(content.getvalue())
    storage = Storage(f"{name}/stats")
    assert storage.samples() == [1]
    assert storage.scan([1]).collect().to_dict(as_series=False) == {"sample": [1], "seed": [1]}
    storage.clear()
    assert (storage.samples(), Storage(f"{other}/stats").samples()) == ([], [1])


@pytest.mark.usefixtures("white_pictures")
@pytest.mark.parametrize("name", [ALL, "~"], indirect=True)
def test_an_analysis(name: str, run: Run) -> None:
    write_text(Path(f"{name}/{leaf(name)}.toml"), 'base = "demo"\nname = "tiny"\nlayers = 1\n')
    write_text(Path(f"{name}/p.txt"), "a 3 moving left\n")
    before = places()
    model = (f"--model={name}/{leaf(name)}.toml", "--random-weights", f"--prompts={name}/p.txt")
    words = ("--chunks=3", "--samples=1", "--rows=8", f"--out={name}/out")
    ran = done(run("analyze", "heads", *model, *words))
    assert f"written: {name}/out/headmap.json" in ran.err
    made = {f"{name}/out/{file}" for file in ("stats/sample-0000.parquet", "stats/versions.json")}
    made |= {f"{name}/out/{file}" for file in ("stats", "headmap.json", "stability.json", "report.html")}
    assert places() - before == {f"{name}/out", *made}
    done(run("analyze", "report", f"--out={name}/again", "--rule=quota", "--", f"{name}/out"))
    assert Path(f"{name}/again/headmap.json").is_file()


@pytest.mark.parametrize("name", [ALL], indirect=True)
def test_what_is_made_of_a_head_map(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TIMED_SECONDS", 0.02)
    write_text(Path(f"{name}/{leaf(name)}.toml"), 'base = "demo"\nname = "tiny"\nlayers = 1\n')
    spec, headmap = load_spec(f"{name}/{leaf(name)}.toml"), f"{name}/map.json"
    headmap_of(spec, [[0]]).write(Path(headmap))
    model = (f"--model={name}/{leaf(name)}.toml", "--policy=forcing-kv", f"--headmap={headmap}")
    done(run("plan", *model, "--gpu=h200"))
    ran = done(run("export", *model, "--random-weights", "--no-verify", f"--out={name}/b"))
    assert ran.out.startswith(f"{name}/b: tiny")
    assert Bundle.open(f"{name}/b").headmap == HeadMap.read(headmap)
    timed = run("bench", f"--bundle={name}/b", "--rounds=1", "--no-decode", f"--sweep={name}/sweep")
    assert f"written: {name}/sweep/" in done(timed).out


@pytest.mark.parametrize("name", [ALL, "-rf", "~", "v1:x"], indirect=True)
def test_prompts_that_are_encoded(name: str, run: Run) -> None:
    write_text(Path(f"{name}/{leaf(name)}.toml"), SPEC)
    write_text(Path(f"{name}/{leaf(name)}.txt"), "a red kite\n")
    wan_folder(Path(f"{name}/{leaf(name)}").absolute())
    before = places()
    given = {"model": f"{leaf(name)}.toml", "prompts": f"{leaf(name)}.txt", "text-encoder": leaf(name)}
    given |= {"tokenizer": f"{leaf(name)}/google/umt5-xxl", "out": f"{leaf(name)}.safetensors"}
    done(run("encode", *(f"--{option}={name}/{file}" for option, file in given.items())))
    assert places() - before == {f"{name}/{leaf(name)}.safetensors"}
    assert read_embeds(f"{name}/{leaf(name)}.safetensors").prompts == ("a red kite",)


@pytest.mark.parametrize("name", [ALL], indirect=True)
def test_what_the_demo_writes_beside_its_analysis_and_bundles(name: str) -> None:
    """These two and a picture, by `write_bytes`; the rest by functions that other commands call too."""
    runs = {"full": PolicyRun([np.zeros((max(SHOWN_FRAMES) + 1, 32, 32, 3), np.uint8)])}
    before = places()
    write_comparison_video(runs, Path(f"{name}/policies.mp4"), 16)
    write_comparison_sheet(runs, ["a 3 moving left"], Path(f"{name}/policies.png"))
    assert places() - before == {f"{name}/policies.mp4", f"{name}/policies.png"}


@pytest.mark.parametrize("place", [".", "/", "..", "a/..", ""])
def test_a_place_that_is_no_file_is_refused(
    place: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    headmap_of(small_spec(), [[0], [1], [], []]).write(Path("map.json"))
    ran = run("headmap", "convert", "map.json", f"--out={place}")
    assert ran.code == 2
    assert "is a folder; expected the name of a file" in ran.err
    assert places() == {"map.json"}
    with pytest.raises(InputError, match="is a folder"), new_file(Path(place)):
        pass


def test_links_are_written_through_and_devices_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("sub/real")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    write_text(tmp_path / "link", "text")
    assert ((tmp_path / "link").is_symlink(), (tmp_path / "sub/real").read_text()) == (True, "text")
    wrong = {"folder": "is a folder", "pipe": "is a pipe or a device", "circle": "cannot be written"}
    for name, message in wrong.items():
        with pytest.raises(InputError, match=f"{name} {message}"):
            write_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo()
    assert not list(tmp_path.rglob("*.forcingkv"))


def test_a_url_is_no_name_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a path it would be a folder `s3:` here, and nothing at the URL."""
    monkeypatch.chdir(tmp_path)
    url = Path("s3://bucket/x")
    with pytest.raises(InputError, match="s3:/bucket/x is a URL; expected a file or folder here"):
        write_text(url, "text")
    with pytest.raises(InputError, match="is a URL"), new_folder(url, BUNDLE):
        pass
    with pytest.raises(InputError, match="is a URL"):
        open_writer(url, fps=8)
    with pytest.raises(InputError, match=r"is a URL.*--stats"):
        Storage(url / "stats")
    assert not places()


def test_an_analysis_tries_its_place_before_it_measures(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(*_: object) -> None:
        raise AssertionError("a sample is measured that cannot be kept")

    monkeypatch.setattr(SampleRecorder, "record", record)
    write_text(tmp_path / "tiny.toml", 'base = "demo"\nname = "tiny"\nlayers = 1\n')
    write_text(tmp_path / "p.txt", "a 3 moving left\n")
    (tmp_path / "nowhere").symlink_to("absent/folder")
    words = (
        f"--model={tmp_path}/tiny.toml",
        "--random-weights",
        f"--prompts={tmp_path}/p.txt",
        "--samples=1",
    )
    ran = run("analyze", "heads", *words, "--chunks=3", f"--out={tmp_path}/nowhere")
    assert (ran.code, "stats/.trial cannot be written" in ran.err) == (2, True), ran.err


TOO_LONG = "a" * 256
"""More than a file system takes for one name."""


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--model", f"{TOO_LONG}.toml"),
        ("plan", "--model=demo", "--policy", f"{TOO_LONG}.toml"),
        ("export", "--model=demo", "--policy=window", "--checkpoint", TOO_LONG, "--out=b"),
        ("export", "--model=demo", "--policy=window", "--out", f"{TOO_LONG}/b"),
        ("evaluate", "--video", f"{TOO_LONG}.mp4", *CHUNKS_OF_3, "--out=v.csv"),
        ("encode", "--prompts=p.txt", "--text-encoder", TOO_LONG, "--out=e"),
        ("encode", "--prompts=p.txt", "--text-encoder=e", "--out", TOO_LONG),
        ("headmap", "convert", TOO_LONG, "--out=m.json"),
    ],
)
def test_a_name_that_the_system_does_not_take_is_refused(
    words: tuple[str, ...], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(Path("p.txt"), "a 3 moving left\n")
    ran = run(*words)
    said = "File name too long)" in ran.err or "there is no " in ran.err
    assert (ran.code, TOO_LONG in ran.err, said) == (2, True, True), ran.err
    assert places() == {"p.txt"}


def test_consoles_show_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "runs [v1]/[/b] :fire: [red]x[/red]"
    PlainConsole(width=80).print(text)
    assert capsys.readouterr().out == f"{text}\n"
