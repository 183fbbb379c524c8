"""`forcingkv demo`: the whole way on the model that ships: analyze -> head map -> export -> generate."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from typer import Option

from forcingkv.commands.console import MOST, AsJson, default_prompts, emit, need, progress_bar, say
from forcingkv.commands.models import (
    BackendOrOwn,
    Compiled,
    ComputeDtype,
    Device,
    Provider,
    Threads,
    text_inputs,
)
from forcingkv.headmaps import DYNAMIC, STATIC, InputError
from forcingkv.measure.tables import PlainConsole

MODEL = "demo"
POLICIES = ("full", "window", "dummy-forcing", "forcing-kv")


def demo(
    out: Annotated[Path, Option(help="Folder for everything it makes.")] = Path("demo-out"),
    samples: Annotated[int, Option(min=1, max=MOST, help="Videos to measure heads on.")] = 6,
    prompts: Annotated[int, Option(min=1, max=MOST, help="Prompts to compare policies on.")] = 40,
    seed: Annotated[int, Option(min=0, help="Seed of the noise.")] = 0,
    backend: BackendOrOwn = None,
    device: Device = None,
    dtype: ComputeDtype = None,
    provider: Provider = None,
    compiled: Compiled = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Analyze the shipped model, export it with every policy, generate, and compare.

    With --device heads are measured there too, in float32 whatever --dtype says.

    Example: forcingkv demo --json
    """
    need("analyze", "torch", "polars", "sklearn", "seaborn")
    need("export", "onnx", "onnxscript")
    need("video", "av")
    from forcingkv.analyze import Job, Labelling, analyze_heads, analyze_statistics
    from forcingkv.analyze.report.pictures import headmap_picture
    from forcingkv.analyze.results import check_places
    from forcingkv.analyze.run import choose_device
    from forcingkv.export import export_bundle
    from forcingkv.export.bundle_writer import check_out
    from forcingkv.headmaps.writing import check_file, write_bytes
    from forcingkv.measure.demo_comparison import (
        compare_policies,
        comparison_rows,
        comparison_table,
        write_comparison_sheet,
        write_comparison_video,
    )
    from forcingkv.measure.nominal import in_words
    from forcingkv.models.checkpoint import load_weights
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime import Session
    from forcingkv.runtime.kv.policies import load_policy

    # A device of torch's: heads are measured there too. Refused now, not after that.
    on_torch = backend == "torch" or (backend is None and bool(device))
    measured_on = choose_device(device) if device and on_torch else "cpu"
    check_places(out / "analysis", None, samples=samples, restart=True)
    for name in POLICIES:
        check_out(out / "bundles" / name)
    for name in ("headmap.png", "policies.mp4", "policies.png"):
        check_file(out / name)
        if (out / name).exists() and not (out / "analysis" / "headmap.json").exists():
            what = "is there, and is none of an earlier demo"
            raise InputError(what, where=str(out / name), hint="Choose another --out.")
    spec = load_spec(MODEL)
    weights = load_weights(spec)
    texts = default_prompts(MODEL)
    asked = [texts[number % len(texts)] for number in range(prompts)]
    with progress_bar() as shown:
        task = shown.add_task("1/3 measuring heads (samples)", total=samples)
        job = Job(
            spec, weights, text_inputs(spec, texts[::-1], None), seed, device=measured_on, threads=threads
        )
        analysis = analyze_heads(
            job,
            out / "analysis",
            samples=samples,
            restart=True,
            command=["forcingkv", "demo"],
            progress=lambda done, _: shown.update(task, completed=done),
        )
        headmap = analysis.headmap
        dummies = analyze_statistics(out / "analysis" / "stats", Labelling(rule="dummy")).headmap
        task = shown.add_task("2/3 exporting (bundles)", total=len(POLICIES))
        for number, name in enumerate(POLICIES):
            policy = load_policy(name)
            fitting = (one for one in (headmap, dummies) if set(one.counts()) <= set(policy.groups))
            labels = next(fitting, None) if policy.needs_headmap else None
            export_bundle(spec, weights, policy, out / "bundles" / name, headmap=labels)
            shown.update(task, completed=number + 1)
        task = shown.add_task("3/3 generating (prompts)", total=prompts)
        with ExitStack() as stack:
            sessions = {
                name: stack.enter_context(
                    Session.open(
                        out / "bundles" / name,
                        backend=backend,
                        device=device,
                        dtype=dtype,
                        provider=provider,
                        compiled=compiled,
                        threads=threads,
                    )
                )
                for name in POLICIES
            }
            chunks = spec.chunks_to_fill
            runs = compare_policies(
                sessions, asked, chunks, seed, lambda done: shown.update(task, completed=done)
            )
            rows = comparison_rows(runs, sessions, asked)
    write_bytes(out / "headmap.png", headmap_picture(headmap).light)
    write_comparison_video(runs, out / "policies.mp4", spec.fps)
    write_comparison_sheet(runs, asked, out / "policies.png")
    if as_json:
        counted = {STATIC: 0, DYNAMIC: 0} | headmap.counts()
        emit({"model": spec.name, "headmap": counted, "policies": rows, "out": str(out)})
        return
    PlainConsole(width=100).print(comparison_table(rows, chunks))
    say(f"head map: {in_words(headmap)} heads (rule {headmap.rule.name}). {analysis.verdict}")
    say(f"look at: {out}/policies.mp4, {out}/policies.png, {out}/headmap.png, {out}/analysis/report.html")
    bundles = " ".join(f"--bundle {out}/bundles/{name}" for name in ("forcing-kv", "full"))
    say(f"try it live, side by side: forcingkv serve {bundles} --open")
