"""Jobs over HTTP: by hand, and by OpenAI's own client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest

from tests.serve.served import PROMPT, Served, serving

FORM = {"model": "window", "prompt": PROMPT, "seconds": "1", "seed": "7"}


def asked(served: Served, **fields: Any) -> dict[str, Any]:
    with served.http() as http:
        answer = http.post("/v1/videos", json=FORM | fields)
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
    return job


def done(served: Served, name: str) -> dict[str, Any]:
    end = time.monotonic() + 60
    with served.http() as http:
        while (job := http.get(f"/v1/videos/{name}").json())["status"] in ("queued", "in_progress"):
            assert time.monotonic() < end
            time.sleep(0.05)
    found: dict[str, Any] = job
    return found


def test_a_video_is_made_and_fetched(served: Served, tmp_path: Path) -> None:
    job = asked(served)
    assert (job["object"], job["model"], job["seconds"], job["error"]) == ("video", "window", "1", None)
    job = done(served, job["id"])
    assert (job["status"], job["progress"]) == ("completed", 100)
    with served.http() as http:
        answer = http.get(f"/v1/videos/{job['id']}/content")
        assert answer.headers["content-type"] == "video/mp4"
        part = http.get(f"/v1/videos/{job['id']}/content", headers={"Range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, answer.content[100:200])
        path = tmp_path / "one.mp4"
        path.write_bytes(answer.content)
        with av.open(path) as video:
            spec = served.service.engine.bundle("window").bundle.plan.spec
            assert sum(1 for _ in video.decode(video=0)) == spec.frames_of(spec.chunks_for(1))
        gone = http.delete(f"/v1/videos/{job['id']}").json()
        assert gone == {"id": job["id"], "object": "video.deleted", "deleted": True}
        assert http.get(f"/v1/videos/{job['id']}").status_code == 404
    assert not list((served.service.settings.data / "videos").iterdir())


def test_the_same_seed_gives_the_same_file(served: Served) -> None:
    names = [done(served, asked(served)["id"])["id"] for _ in range(2)]
    with served.http() as http:
        one, two = (http.get(f"/v1/videos/{name}/content").content for name in names)
    assert one == two


@pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")  # theirs, not ours
def test_openais_client_makes_polls_and_downloads_one(served: Served, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    job = client.videos.create_and_poll(
        model="pruned", prompt=PROMPT, seconds="4", extra_body={"seed": 3}, poll_interval_ms=50
    )
    assert (job.status, job.model, job.seconds) == ("completed", "pruned", "4")
    client.videos.download_content(job.id).write_to_file(tmp_path / "one.mp4")
    listed = client.videos.list(limit=1)
    assert [one.id for one in listed.data] == [job.id]
    assert client.videos.delete(job.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(job.id)
    with pytest.raises(openai.BadRequestError, match="zebra"):
        client.videos.create(prompt="zebra")
    with av.open(tmp_path / "one.mp4") as video:
        assert video.streams.video[0].height == 8


def test_jobs_are_listed_page_by_page(served: Served) -> None:
    names = [done(served, asked(served, seconds=0.1)["id"])["id"] for _ in range(3)]
    with served.http() as http:
        first = http.get("/v1/videos", params={"limit": 2}).json()
        assert [job["id"] for job in first["data"]] == names[:0:-1]
        assert first["has_more"]
        rest = http.get("/v1/videos", params={"after": first["last_id"], "limit": 100}).json()
        assert rest["data"][0]["id"] == names[0]
        upwards = http.get("/v1/videos", params={"order": "asc", "limit": 100}).json()
        assert [job["id"] for job in upwards["data"]][-3:] == names


WRONG = {
    "a word that the model does not know": ({"prompt": "zebra"}, 400, "zebra"),
    "no prompt": ({"prompt": ""}, 400, "prompt"),
    "another model": ({"model": "sora-2"}, 404, "pruned, window"),
    "another size": ({"size": "1280x720"}, 400, "12x8"),
    "no size": ({"size": "large"}, 400, "size"),
    "no length": ({"seconds": 0}, 400, "seconds"),
    "a word as length": ({"seconds": "four"}, 400, "seconds"),
    "too long": ({"seconds": 1e9}, 400, "3600 seconds"),
    "a name that is not known": ({"sed": 7}, 400, "sed"),
    "a seed below zero": ({"seed": -1}, 400, "seed"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", ["json", "data"])
def test_what_cannot_be_made_is_refused(served: Served, name: str, kind: str) -> None:
    fields, status, word = WRONG[name]
    with served.http() as http:
        sent: dict[str, Any] = {kind: FORM | fields}
        answer = http.post("/v1/videos", **sent)
    error = answer.json()["error"]
    assert (answer.status_code, word in error["message"]) == (status, True), error


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "application/json"),
        (b"[" * 9000, "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"prompt=a", "text/plain"),
        (b"", "multipart/form-data"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x"),
        (b"--x\r\n\r\n", "multipart/form-data; boundary=y"),
    ],
)
def test_what_is_no_request_is_refused(served: Served, body: bytes, kind: str) -> None:
    with served.http() as http:
        answer = http.post("/v1/videos", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"code", "message", "type", "param"}


@pytest.mark.parametrize(
    "path", ["../jobs.sqlite", "..%2fjobs.sqlite", "%2e%2e%2fjobs.sqlite", "video_0", "a" * 5000, "video_%00"]
)
def test_no_name_leads_to_a_file(served: Served, path: str) -> None:
    with served.http() as http:
        for address in (f"/v1/videos/{path}", f"/v1/videos/{path}/content", f"/{path}"):
            answer = http.get(address)
            assert answer.status_code in (404, 405), (address, answer.status_code)
            assert b"SQLite" not in answer.content


def test_a_job_that_was_cut_off_says_so_and_others_are_there(
    small_bundles: dict[str, Path], tmp_path: Path
) -> None:
    """The service is killed in the middle of a video, with another finished and a third waiting."""
    words = [sys.executable, "-m", "forcingkv", "serve", "--bundle", f"window={small_bundles['window']}"]
    words += ["--data", str(tmp_path), "--port", "0", "--sessions", "1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        line = next(line for line in process.stderr if line.startswith("serving on"))
        served = Served(int(line.split(":")[2].split("/")[0]), None)  # type: ignore[arg-type]
        first = done(served, asked(served)["id"])
        second = asked(served, seconds=3600)
        third = asked(served)
        with served.http() as http:
            while http.get(f"/v1/videos/{second['id']}").json()["progress"] < 1:
                time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    with serving(tmp_path, small_bundles) as again, again.http() as http:
        assert http.get(f"/v1/videos/{first['id']}").json()["status"] == "completed"
        assert http.get(f"/v1/videos/{first['id']}/content").status_code == 200
        cut = http.get(f"/v1/videos/{second['id']}").json()
        assert (cut["status"], cut["error"]["code"]) == ("failed", "interrupted")
        assert "stopped before" in cut["error"]["message"]
        assert http.get(f"/v1/videos/{second['id']}/content").status_code == 409
        assert done(again, third["id"])["status"] == "completed"
        assert len(list((tmp_path / "videos").iterdir())) == 2
