from __future__ import annotations

from pathlib import Path

import pytest

from vggedge.cli import output


@pytest.mark.parametrize(
    ("size", "text"), [(1, "0.0 kB"), (1_234, "1.2 kB"), (99_999, "100.0 kB"), (100_000, "0.10 MB"), (5e8, "500.00 MB")]
)
def test_format_bytes(size: int, text: str) -> None:
    assert output.format_bytes(size) == text


def test_a_path_that_is_no_text_can_be_encoded() -> None:
    shown = output.format_path(Path("caf\udce9/a.png"))

    assert shown == "caf\ufffd/a.png"
    output.print_json([shown])


@pytest.mark.parametrize("text", [":cat:", "[bold]x[/]", "a:smile:b"])
def test_names_are_printed_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.print_line(text)
    output.print_table(text, [text], [[text]])
    output.print_note(text)
    output.print_error(text)
    printed = capsys.readouterr()

    assert printed.out.count(text) == 4
    assert printed.err.count(text) == 2


def test_a_piped_table_is_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table("", ["path"], [["x" * 300]])

    assert "x" * 300 in capsys.readouterr().out


def test_skipped_files_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_skipped([])
    assert capsys.readouterr().err == ""
    output.print_skipped([Path("cat/b.heic"), Path("dog/README")])
    assert capsys.readouterr().err == "2 file(s) skipped, not read as images (.heic, no suffix): first cat/b.heic\n"
