"""The command line: one file a command; each parses, calls and prints, and holds no logic of its own.

Tables go to stdout, progress and diagnostics to stderr, so that ``--json`` can be piped. Exit codes:
0 done, 1 failed, 2 wrong usage, 3 a gate (accuracy, latency) was not met.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import vggedge
from vggedge.cli import bench, export, images, infer, models, output, train
from vggedge_runtime.errors import VggedgeError

app = typer.Typer(
    name="vggedge",
    help="Train a VGG, export it to FP16 and INT8 TensorRT engines, and run it where TensorFlow cannot go.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (models, train, export, infer, bench, images):
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
        app()
    except VggedgeError as error:
        output.print_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        output.print_error("stopped by Ctrl-C; nothing half-written was left behind.")
        sys.exit(130)
