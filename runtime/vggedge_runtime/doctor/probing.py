"""Tries imports in processes of their own, several at a time, and survives whatever they do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vggedge_runtime.doctor.system import anonymous_file, end_process
from vggedge_runtime.progress import Advance, ignore_progress

_CHILD = Path(__file__).with_name("child.py")
_POLL_S = 0.02
_SHOWN_CHARACTERS = 400  # of a reason

_SIGNALS = {
    "SIGILL": "an instruction that this processor does not have: built for another one",
    "SIGKILL": "killed by the system, most often for want of memory",
}


class Probe(msgspec.Struct, frozen=True):
    """How an import went.

    Attributes:
        version: the module's own ``__version__``.
        file: where it was imported from.
        details: its answer to the first question; see ``child.ASK``.
        absent: no such module.
        error: why it does not work; None if it does.
        tried: whether it was imported at all; if not, ``error`` says why not.
    """

    version: str | None = None
    file: str | None = None
    details: dict[str, str] = {}
    absent: bool = False
    error: str | None = None
    tried: bool = True


def probe_modules(
    groups: Sequence[Sequence[str]],
    *,
    path: Sequence[str] | None = None,
    timeout_s: float = 30.0,
    progress: Advance = ignore_progress,
) -> dict[str, Probe]:
    """Import every module of ``groups`` in child processes: one a group, all groups at a time.

    What ends, crashes or hangs its process is reported as broken, and the rest of its group goes on in a new one.

    Args:
        groups: module names; those of a group share a process, as they do in use.
        path: ``sys.path`` of the children; this process's if None.
        timeout_s: how long one import may take.
        progress: told after each module.
    """
    found: dict[str, Probe] = {}
    total = sum(map(len, groups))
    children = [_Child(group, sys.path if path is None else path, timeout_s) for group in groups if group]
    try:
        while True:
            for child in children:
                child.poll(found)
            progress(len(found), total, "trying the libraries")
            if all(child.is_done for child in children):
                return found
            time.sleep(_POLL_S)
    finally:
        for child in children:
            child.kill()


class _Child:
    """The process of one group; starts another one for the rest when it ends before its time."""

    def __init__(self, names: Sequence[str], path: Sequence[str], timeout_s: float) -> None:
        self.is_done = False
        self._left = list(names)
        self._path = list(path)
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._current: str | None = None

    def poll(self, found: dict[str, Probe]) -> None:
        """Take what was reported since the last call into ``found``; start, restart or end the process."""
        if self.is_done:
            return
        if self._process is None and not self._start(found):
            return
        ended = self._process is not None and self._process.poll() is not None  # asked before the last read
        self._read(found)
        if not self._left:
            self._finish()
        elif ended:
            self._give_up(found, self._describe_end())
        elif time.monotonic() - self._since > self._timeout_s:
            self._give_up(found, f"its import did not end within {self._timeout_s:g} s")

    def kill(self) -> None:
        """End the process and what it started; nothing if it has ended."""
        process, self._process = self._process, None
        if process is None:
            return
        end_process(process)
        self._results.close()
        self._stderr.close()

    def _start(self, found: dict[str, Probe]) -> bool:
        self._results, self._stderr = anonymous_file(), anonymous_file()
        self._position, self._since, self._current = 0, time.monotonic(), None
        descriptor = self._results.fileno()
        environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(_CHILD), str(descriptor), json.dumps(self._path), *self._left],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=(descriptor,),
                start_new_session=True,  # Ctrl-C is for this process, which then kills them all
                env=environment,
            )
        except OSError as error:
            found.update({name: Probe(error=f"Python did not start: {error}", tried=False) for name in self._left})
            self._left.clear()
            self._results.close()
            self._stderr.close()
            self.is_done = True
            return False
        return True

    def _read(self, found: dict[str, Probe]) -> None:
        data = os.pread(self._results.fileno(), 1 << 20, self._position)
        complete = data[: data.rfind(b"\n") + 1]
        self._position += len(complete)
        for line in complete.splitlines():
            report = json.loads(line)
            self._since = time.monotonic()
            self._current = report.get("starts")
            if "ends" in report:
                name = report.pop("ends")
                found[name] = _to_probe(report)
                self._left.remove(name)

    def _give_up(self, found: dict[str, Probe], reason: str) -> None:
        name = self._current or self._left[0]
        found[name] = Probe(error=_shorten(reason), tried=self._current is not None)
        self._left.remove(name)
        self.kill()
        self.is_done = not self._left

    def _finish(self) -> None:
        self.kill()
        self.is_done = True

    def _describe_end(self) -> str:
        code = self._process.returncode if self._process is not None else 0
        size = os.fstat(self._stderr.fileno()).st_size
        end = os.pread(self._stderr.fileno(), _SHOWN_CHARACTERS, max(0, size - _SHOWN_CHARACTERS))
        said = end.decode("utf-8", "replace").strip().splitlines()
        last = f" Its last words: {said[-1]}" if said else ""
        if code >= 0:
            return f"its import ends Python (exit code {code}).{last}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        means = f", {_SIGNALS[name]}" if name in _SIGNALS else ""
        return f"its import crashes Python ({name}{means}).{last}"


def _to_probe(report: Mapping[str, Any]) -> Probe:
    error = report.get("error")
    return Probe(
        version=report.get("version"),
        file=report.get("file"),
        details=report.get("details", {}),
        absent=report.get("absent", False),
        error=None if error is None else _shorten(error),
    )


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 4] + " ..."
