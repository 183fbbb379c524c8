"""The command line: a module for each command, and modules of the options and output that commands share.

Heavy imports happen inside the functions, so that --help answers at once.
"""

from __future__ import annotations

import typer

from forcingkv.commands import (
    analyze,
    bench,
    demo,
    doctor,
    encode,
    evaluate,
    export,
    generate,
    headmap,
    inspect,
    plan,
    policies,
    serve,
)

__all__ = ["app"]

app = typer.Typer(
    name="forcingkv",
    help="Head maps for autoregressive video diffusion: analyze -> head map -> export -> generate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.add_typer(analyze.app, name="analyze")
app.add_typer(headmap.app, name="headmap")
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("encode")(encode.encode)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("policies")(policies.policies)
app.command("serve")(serve.serve)
