"""What a transformer block costs TensorRT's parser, in layers, and of which kinds.

    python benchmarks/block_layers.py

Exports the demo model's kind of model with three and with four layers and parses both; the difference is a
block with static and dynamic heads. The count depends on the groups and roles of the policy, on no size.
Rows: the graph for ONNX Runtime, the graph for TensorRT without the plugin, and with it. Prints a table in
Markdown.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from forcingkv.export import export_bundle
from forcingkv.export.engine_builder import parse_report
from forcingkv.export.precision import Target
from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.models.checkpoint import random_weights
from forcingkv.models.presets import load_spec
from forcingkv.runtime.flavour import FLAVOURS
from forcingkv.runtime.policies import load_policy

RTX = FLAVOURS["tensorrt-rtx"]
ROWS: dict[str, tuple[Target, bool]] = {
    "as for ONNX Runtime": ("onnx", False),
    "for TensorRT, no plugin": ("tensorrt-rtx", False),
    "for TensorRT, with the plugin": ("tensorrt-rtx", True),
}


def graph(layers: int, target: Target, folder: Path) -> Path:
    """The step graph of a model with that many layers, half of the heads static."""
    spec = replace(load_spec("demo"), layers=layers)
    half = spec.heads // 2
    labels = (("static",) * half + ("dynamic",) * (spec.heads - half),) * layers
    headmap = HeadMap(ModelIdentity(spec.name, layers, spec.heads), labels, Rule("given"))
    out = folder / f"{target}-{layers}"
    if not out.exists():
        export_bundle(
            spec,
            random_weights(spec),
            load_policy("forcing-kv"),
            out,
            headmap=headmap,
            target=target,
            sms=() if target == "onnx" else (89,),
            verify=False,
        )
    return out / "step.onnx"


def block(target: Target, plugin: bool, folder: Path) -> Counter[str]:
    """Kinds of layers of one block, and how many of each."""
    less, more = (
        Counter(parse_report(graph(layers, target, folder), RTX, plugins=plugin)["kinds"])
        for layers in (3, 4)
    )
    return more - less


def main() -> None:
    """Parse and print."""
    print("| step graph | layers a block | of these |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (target, plugin) in ROWS.items():
            print(name, file=sys.stderr, flush=True)
            kinds = block(target, plugin, Path(folder))
            told = ", ".join(f"{kind.lower()} {n}" for kind, n in kinds.most_common(9))
            print(f"| {name} | {kinds.total()} | {told} |")


if __name__ == "__main__":
    main()
