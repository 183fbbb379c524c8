"""`forcingkv serve`: bundles over the network, with a page."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path
from typing import Annotated

from typer import Option

from forcingkv.commands.console import need, say
from forcingkv.commands.models import BackendOrOwn, Threads
from forcingkv.commands.served_text import ServedEncoder
from forcingkv.headmaps.errors import InputError
from forcingkv.serve.settings import TOKEN


def serve(
    bundle: Annotated[list[str], Option(help="Folder that export wrote, or NAME=FOLDER; may be repeated.")],
    data: Annotated[Path, Option(help="Folder for jobs, their videos, and saved states.")] = Path(
        "forcingkv-served"
    ),
    host: Annotated[
        str, Option(help="Address to listen at. One that others can reach needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token_file: Annotated[
        Path | None, Option(help=f"File with the token that clients must have; or the variable {TOKEN}.")
    ] = None,
    origin: Annotated[
        list[str] | None, Option(help="Origin of a page elsewhere that may use it: https://studio.example.")
    ] = None,
    name: Annotated[
        list[str] | None, Option(help="Name by which it is asked for besides, such as a proxy's.")
    ] = None,
    sessions: Annotated[
        int, Option(min=1, help="Sessions at a time, where memory allows as many; others wait.")
    ] = 16,
    embeds: Annotated[
        list[str] | None,
        Option(help="Embeddings of the prompts that clients may ask for: FILE, or BUNDLE=FILE."),
    ] = None,
    text_encoder: Annotated[
        str | None,
        Option(
            help="UMT5, which makes embeddings of clients' words: a folder, a file or a hub id; needs torch."
        ),
    ] = None,
    backend: BackendOrOwn = None,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1, mps, xpu.")] = None,
    threads: Threads = None,
    expect_digest: Annotated[
        list[str] | None,
        Option(metavar="SHA256", help="As for `generate`: one for each --bundle, in their order."),
    ] = None,
    open_page: Annotated[bool, Option("--open", help="Open the page in a browser once it is there.")] = False,
    log_level: Annotated[str, Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve bundles: live sessions over WebSockets, jobs over HTTP, and a page to use them from.

    It listens on this machine alone unless a token is given. Ctrl-C or SIGTERM lets sessions end, or keeps
    their states, first; a second one ends it at once.

    Example: forcingkv serve --bundle demo-out/bundles/forcing-kv --bundle demo-out/bundles/full
    """
    need("serve", "fastapi", "uvicorn", "websockets", "prometheus_client", "multipart", "av")
    from forcingkv.serve.bundles import BundleChoice
    from forcingkv.serve.listening import listening
    from forcingkv.serve.logs import log_to_stderr
    from forcingkv.serve.run import make_server, open_service
    from forcingkv.serve.settings import Limits, Settings, is_loopback

    if log_level not in ("debug", "info", "warning", "error"):
        raise InputError(f"is {log_level!r}", where="--log-level", expected="debug, info, warning or error")
    folders = dict[str, Path]()
    for name_of, folder in map(_named, bundle):
        if name_of in folders:
            hint = "Name one: --bundle NAME=FOLDER."
            raise InputError(f"two are called {name_of}", where="--bundle", hint=hint)
        folders[name_of] = folder
    texts = dict(_named(one, next(iter(folders)) if len(folders) == 1 else None) for one in embeds or ())
    if unknown := texts.keys() - folders.keys():
        raise InputError(f"there is no bundle {min(unknown)!r}", where="--embeds", expected="BUNDLE=FILE")
    settings = Settings(
        data=data,
        host=host,
        port=port,
        token=_token(token_file),
        origins=tuple(origin or ()),
        hosts=tuple(name or ()),
        sessions=sessions,
        backend=backend,
        device=device,
        threads=threads,
        limits=Limits(),
    )
    digests: list[str | None] = [*expect_digest] if expect_digest else [None] * len(bundle)
    if len(digests) != len(bundle):
        what = f"is given {len(digests)} times, and --bundle {len(bundle)} times"
        raise InputError(what, where="--expect-digest", expected="one for each --bundle")
    choices = [
        BundleChoice(one, folder, texts.get(one), digest=digest)
        for (one, folder), digest in zip(folders.items(), digests, strict=True)
    ]
    opened = listening(host, port, settings.limits.reader * 2)
    with opened:
        encode = None
        if text_encoder:
            say("loading the text encoder", error=True)
            encode = ServedEncoder(text_encoder)
        say("opening the bundles", error=True)
        service = open_service(settings, choices, encode)
        for one in service.engine.bundles.values():
            if encode and one.encodes:
                encode.check(one.bundle.plan.spec)
        log_to_stderr(log_level)
        places, at = service.engine.places, opened.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        for one in service.engine.bundles.values():
            info = one.info
            fits = places.fit(one.name)
            say(
                f"{info.name}: {info.model}, {info.policy}, {info.width}x{info.height}, {fits} sessions fit",
                error=True,
            )
        token = "a token is asked for" if settings.token else "no token: this machine only"
        also = "" if is_loopback(host) else ", without TLS: put a proxy before it"
        ready = f"serving on http://{shown}:{at}/ ({token}{also})"

        def on_ready() -> None:
            say(ready, error=True)
            if open_page:
                webbrowser.open(f"http://{shown}:{at}/")

        make_server(service, on_ready).run(sockets=[opened])


def _named(text: str, otherwise: str | None = None) -> tuple[str, Path]:
    """NAME=PLACE, or a place whose name is that of its folder."""
    name, equals, place = text.partition("=")
    if equals and name and "/" not in name:
        return name, Path(place)
    if otherwise is None:
        otherwise = Path(text).resolve().name
    return otherwise, Path(text)


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("cannot be read", where=str(file), expected="a file with a token") from error
    if not token:
        raise InputError("is empty", where=str(file), expected="a token")
    return token
