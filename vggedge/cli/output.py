"""How every command speaks: tables on stdout, progress and errors on stderr, JSON when asked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vggedge_runtime.progress import Advance

_PIPE_WIDTH = 10_000  # columns; print(width=...) would be cut to the 80 that rich assumes for a pipe

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, nothing else.")]


def print_json(result: Any) -> None:
    """Print a msgspec Struct (or plain data) as indented JSON on stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(result, enc_hook=_plain), indent=2).decode() + "\n")
    sys.stdout.flush()  # a reader that has gone is met here, where typer ends quietly, and not at Python's exit


def print_line(text: str = "") -> None:
    """Print one line of the result on stdout, as it is."""
    Console(emoji=False, highlight=False, soft_wrap=True).print(escape(text))


def print_note(text: str) -> None:
    """Print one line about what is going on on stderr."""
    Console(emoji=False, stderr=True, highlight=False, soft_wrap=True).print(escape(text), style="dim")


def print_skipped(paths: Sequence[Path]) -> None:
    """Say on stderr which files were left out because no image format of theirs is read; nothing if there are none."""
    if paths:
        kinds = sorted({path.suffix.lower() or "no suffix" for path in paths})
        print_note(f"{len(paths)} file(s) skipped, not read as images ({', '.join(kinds)}): first {paths[0]}")


def print_error(text: str) -> None:
    """Print an error on stderr."""
    Console(emoji=False, stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout: the first column to the left, the others, being numbers, to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console = Console(emoji=False, highlight=False)
    if not console.is_terminal:
        # A pipe has no width: never fold a table that a script is going to read.
        console.width = _PIPE_WIDTH
    if title:  # not rich's own title, which is folded to the width of the table
        console.print(f"[bold]{escape(title)}[/]", soft_wrap=True)
    console.print(table)


def format_bytes(size: int) -> str:
    """``1234567`` as ``1.23 MB``, decimal as files are sold."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def format_path(path: Path) -> str:
    """A path as text that can be encoded: bytes that are no UTF-8 become replacement characters."""
    return os.fsencode(path).decode("utf-8", "replace")


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Advance]:
    """Yield a callback that draws one bar a step on stderr; plain lines where stderr is no terminal."""
    console = Console(emoji=False, stderr=True, highlight=False, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def advance(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
                if not console.is_terminal:
                    console.print(f"{what} ...", style="dim")
            bars.update(tasks[what], completed=done, total=total)

        yield advance


def _plain(value: Any) -> Any:
    """Encode what msgspec does not know: NumPy scalars and arrays, and paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
