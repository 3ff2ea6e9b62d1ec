"""The command line: one file a command; each parses, calls and prints, and holds no logic of its own.

Tables go to stdout, progress and diagnostics to stderr, so that ``--json`` can be piped. Exit codes:
0 done, 1 failed, 2 wrong usage, 3 a gate was not met (export and verify: accuracy), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import vggedge
from vggedge.cli import (
    bench,
    build,
    doctor,
    evaluate,
    export,
    finetune,
    images,
    import_weights,
    infer,
    inspect,
    models,
    output,
    pack,
    train,
    verify,
)
from vggedge_runtime.errors import VggedgeError


class _Commands(TyperGroup):
    """Says that Ctrl-C was understood.

    Here, below typer's own handler: that one ends without a word, and with a code that differs between its versions.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, typer.Abort):
            output.print_error("stopped by Ctrl-C; nothing half-written was left behind.")
            raise typer.Exit(code=130) from None


app = typer.Typer(
    name="vggedge",
    cls=_Commands,
    help="Train a VGG, export it to FP16 and INT8 TensorRT engines, and run it where TensorFlow cannot go.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    models,
    train,
    finetune,
    evaluate,
    import_weights,
    export,
    build,
    infer,
    bench,
    verify,
    inspect,
    pack,
    images,
    doctor,
):
    app.command(module.NAME)(module.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        output.print_line(f"vggedge {vggedge.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train a VGG, export it to FP16 and INT8 TensorRT engines, and run it where TensorFlow cannot go."""


def main() -> None:
    """Entry point of the ``vggedge`` command."""
    try:
        app(prog_name="vggedge")
    except VggedgeError as error:
        output.print_error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # the system's answer, not a defect of ours: a full disk, a folder without permission
        output.print_error(f"the system refused: {error}. Check space and permissions there.")
        sys.exit(1)
