"""`forcingkv policies`: what the policies show each group of heads, and what that takes of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from forcingkv.commands.console import AsJson, console, emit, must_end, need, say
from forcingkv.commands.plan import known_heads


def policies(
    name: Annotated[str | None, Argument(help="Policy, or its file (.toml); default: all that ship.")] = None,
    model: Annotated[str, Option(help="Preset or spec file (.toml).")] = "self-forcing",
    resolution: Annotated[
        str | None, Option(help="WIDTHxHEIGHT or a name, such as 480p; default: the model's.")
    ] = None,
    headmap: Annotated[
        Path | None,
        Option(help="Head map; default: the published number of heads of each label, or the costliest."),
    ] = None,
    heads: Annotated[
        str | None,
        Option(help="Instead of a head map: how many heads have each label, static=134,dynamic=226."),
    ] = None,
    picture: Annotated[
        Path | None, Option(help="Also draw which frames heads see, chunk by chunk, to this file (.png).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the cache policies that ship, or say of one what its heads see, what it takes and its source.

    Example: forcingkv policies forcing-kv --model self-forcing --picture timeline.png
    """
    if picture is not None:
        need("analyze", "matplotlib")
        must_end(picture, ".png")
    from forcingkv.measure.policy_report import plans_of, policy_lines, policy_report, table_lines
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.kv.policies import load_about, load_policy, policy_names

    spec = load_spec(model)
    geometry = spec.geometry(resolution)
    names = policy_names() if name is None else [name]
    chosen = {given: load_policy(given) for given in names}
    known = known_heads(spec, headmap, heads)
    planned, left_out = plans_of(spec, geometry, list(chosen.values()), known, strict=name is not None)
    about = {policy.name: load_about(given) for given, policy in chosen.items()}
    if picture is not None:
        from forcingkv.commands.policy_picture import write_policies_picture, write_policy_picture

        if name is None:
            write_policies_picture([one.plan for one in planned], picture)
        else:
            write_policy_picture(planned[0].plan, picture)
        console.print(f"{picture}: which frames heads see", soft_wrap=True)
    report = policy_report(spec, geometry, planned, left_out, about)
    if as_json:
        emit(report)
    else:
        say(*(table_lines(report) if name is None else policy_lines(report)))
