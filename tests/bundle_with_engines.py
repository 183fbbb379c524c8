"""A bundle with engines, as far as its manifest says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from forcingkv.headmaps.files import record_file
from forcingkv.prune.launcher import KERNELS
from forcingkv.runtime import Bundle
from forcingkv.runtime.engines import EngineRecord, KernelRecord

WARNING = "the keys of a chunk are more than fused attention takes in one go, so it may be slower here"


def bundle_with_engines(plain: Path, out: Path) -> Path:
    """A bundle as export for two GPUs would leave it, with files that only look like engines."""
    manifest = Bundle.open(plain).manifest
    out.mkdir()
    for name in manifest.files:
        (out / name).write_bytes((plain / name).read_bytes())
    engines, kernels, files = [], [], dict(manifest.files)
    for sm in (89, 120):
        for number, graph in enumerate(("prompt", "step", "decode"), 1):
            file = f"engines/{graph}-sm{sm}.engine"
            (out / file).parent.mkdir(exist_ok=True)
            (out / file).write_bytes(f"{graph} for {sm}".encode())
            files[file] = record_file(out / file)
            engines.append(
                EngineRecord(
                    graph=graph,
                    flavour="tensorrt-rtx",
                    version="1.7.1",
                    sm=sm,
                    file=file,
                    layers=1000 * number,
                    plugin_layers=number,
                    needs_plugin=False,
                    phases=number,
                    weight_bytes=number * 10**9,
                    activation_bytes=number * 10**8,
                    scratch_bytes=number * 10**7,
                    seconds=number / 2,
                    peak_bytes=number * 10**10,
                )
            )
    for name in KERNELS:
        file = f"{name}.cubin"
        (out / file).write_bytes(name.encode())
        files[file] = record_file(out / file)
        kernels.append(
            KernelRecord(
                name,
                "float32",
                12,
                80,
                file,
                name,
                warps=4,
                shared_bytes=0,
                registers=30 + len(name),
                spill_bytes=0,
            )
        )
    whole = replace(
        manifest, engines=tuple(engines), kernels=tuple(kernels), files=files, warnings=(WARNING,)
    )
    (out / "manifest.json").write_text(whole.to_text())
    return out
