"""vggedge doctor: what this machine and its libraries can do, what is missing, and the command that adds it."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vggedge.cli import output
from vggedge_runtime.doctor import Diagnosis, Finding, diagnose

NAME = "doctor"

_WIDTH = 100  # columns, where stdout is no terminal, or a wider one
_GROUPS = {
    "machine": "This machine",
    "training": "Training",
    "export": "Export",
    "engines": "Engines",
    "running": "Running",
}
_STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red", "unknown": "yellow"}


def command(
    quick: Annotated[
        bool, typer.Option("--quick", help="Read which libraries are installed, but do not try to import them.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="An import that takes longer counts as hanging.")
    ] = 30.0,
    json: output.JsonFlag = False,
) -> None:
    """Say what works here, what is missing or broken, and what to do. Exit code 0, whatever it finds."""
    with output.progress(quiet=json) as advance:
        found = diagnose(quick=quick, timeout_s=timeout, progress=advance)
    if json:
        output.print_json(found)
    else:
        print_diagnosis(found)


def print_diagnosis(found: Diagnosis) -> None:
    """Print the table, what deserves attention, and the verdicts; no wider than 100 columns."""
    console = Console(emoji=False, highlight=False)
    console.width = min(console.width, _WIDTH) if console.is_terminal else _WIDTH
    console.print(_build_table(found.findings))
    _print_attention(console, found)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for verdict in found.verdicts:
        style = "bold red" if verdict.can is False else "bold green"
        table.add_row(f"[bold]{verdict.stage}[/]", f"[{style}]{escape(verdict.says)}[/]")
    console.print("[bold]Verdict[/]")
    console.print(table)


def _build_table(findings: tuple[Finding, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("found", overflow="fold")
    for group, title in _GROUPS.items():
        table.add_row(f"[bold]{title}[/]")
        for each in findings:
            if each.group == group:
                style = _STYLES.get(each.status, "dim")
                table.add_row(f"  {each.name}", f"[{style}]{each.status}[/]", escape(_describe_found(each)))
    return table


def _describe_found(finding: Finding) -> str:
    if finding.status == "not needed here" and finding.found is None:
        return finding.reason or ""
    extra = " ".join(finding.details[name] for name in ("providers", "devices", "targets") if name in finding.details)
    extra = extra.replace("ExecutionProvider", "")
    return (finding.found or "") + (f" ({extra})" if extra else "")


def _print_attention(console: Console, found: Diagnosis) -> None:
    wrong = [each for each in found.findings if each.status == "broken" or (each.status == "ok" and each.reason)]
    wrong += [each for each in found.findings if each.status == "unknown" and each.reason]
    wrong = [each for each in wrong if _describe(each)]  # unmet requirements have no words but those of the clashes
    if wrong or found.clashes:
        console.print("[bold]Needs attention[/]")
        for each in wrong:
            _print_entry(console, each.name, _describe(each), each.add)
        for clash in found.clashes:
            words = f"{_sentence(clash.problem)} Source: {clash.source}"
            _print_entry(console, clash.found, words, clash.cure)
        console.print()
    missing = [each for each in found.findings if each.status == "missing"]
    if missing:
        console.print("[bold]Missing[/]")
        for command in dict.fromkeys(each.add for each in missing):
            parts = [each for each in missing if each.add == command]
            for each in parts:  # what one command adds is listed above it
                _print_entry(console, each.name, _describe(each), command if each is parts[-1] else None)
        console.print()


def _describe(finding: Finding) -> str:
    """Why it is so, what it costs, and advice: those that are known."""
    said = [_sentence(finding.reason)] if finding.reason else []
    said += [f"Without it: {finding.without}."] if finding.without and finding.status != "ok" else []
    said += [_sentence(finding.advice)] if finding.advice else []
    return " ".join(said)


def _sentence(text: str) -> str:
    """With a full stop, and a capital where the first word is none of a file or option."""
    first = text.partition(" ")[0]
    start = text[:1].upper() if first.isalpha() else text[:1]
    return start + text[1:].rstrip(".") + "."


def _print_entry(console: Console, name: str, words: str, command: str | None) -> None:
    """A name, what is to say of it, and what to do on a line of its own, unbroken, so that it can be copied."""
    lines = textwrap.wrap(
        f"{name}: {words}",
        console.width,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
    )
    text = Text("\n".join(lines))
    text.stylize("bold", 0, len(name) + 2)
    console.print(text, soft_wrap=True)
    if command is not None:
        console.print(Text(f"    To do: {command}", style="cyan"), soft_wrap=True)
