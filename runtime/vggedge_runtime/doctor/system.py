"""How the doctor reads the system: files that may not be there, and tools that may hang."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TypeAlias

import msgspec

_TIMEOUT_S = 8.0  # nvidia-smi wakes a sleeping GPU, which takes seconds
_DEATH_S = 2.0
_MOST_BYTES = 1 << 16  # of what a tool prints


class Output(msgspec.Struct, frozen=True):
    """What a tool printed, and its exit code."""

    code: int
    text: str


Run: TypeAlias = Callable[[Sequence[str]], Output | None]
"""Runs a tool; None where there is no such tool."""


def run_tool(command: Sequence[str], timeout_s: float = _TIMEOUT_S) -> Output | None:
    """Run a tool and give what it printed on stdout and stderr; None if it is not there.

    One that hangs is killed, and its exit code is that of coreutils' timeout, 124.
    """
    with anonymous_file() as printed:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError:
            return None
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return Output(124, f"{command[0]} did not answer within {timeout_s:g} s")
        finally:
            end_process(process)
        text = os.pread(printed.fileno(), _MOST_BYTES, 0).decode("utf-8", "replace")
    return Output(code, text)


def anonymous_file() -> IO[bytes]:
    """A file without a name; in memory where the system can, so that a full or read-only disk does not matter."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("vggedge-doctor"), "w+b")
    return tempfile.TemporaryFile()


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session, and all that it started; do not wait for what cannot die.

    A process in a call of a hung driver ends when that call does, which may be never.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_DEATH_S)


def read_text(path: Path) -> str:
    """Text of a file without white space and NULs at its ends; "" where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "replace").strip("\0 \n\t")
    except OSError:
        return ""


def parse_integer(text: str) -> int | None:
    """A number without sign, of at most 18 digits; None for anything else."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
