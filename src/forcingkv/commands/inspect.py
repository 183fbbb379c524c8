"""`forcingkv inspect`: what is in a bundle. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forcingkv.commands.console import emit

__all__ = ["inspect"]


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder that export wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a bundle's digests and print what it holds.

    Example: forcingkv inspect bundle
    """
    from forcingkv.headmaps.fields import to_data
    from forcingkv.runtime import Bundle

    opened = Bundle.open(bundle)
    manifest, plan = opened.manifest, opened.plan
    if as_json:
        emit(to_data(manifest))
        return
    width, height = manifest.resolution
    print(f"{bundle}: {manifest.model.name} at {width}x{height}, policy {manifest.policy.name}")
    for role, size in plan.kv_bytes_by_role().items():
        print(f"  KV {role:9s} {size / 1e6:9.3f} MB")
    for phase in manifest.plan.phases:
        tokens = ", ".join(f"{name} {n}" for name, n in phase.items() if name != "first_chunk")
        print(f"  from chunk {phase['first_chunk']}: {tokens} tokens")
    for name, record in manifest.files.items():
        print(f"  {name:16s} {record.bytes:10d} bytes  sha256 {record.sha256[:12]}")
