"""From TensorRT's nested phases to one share of the whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """Open phases of one build. A step of a phase counts as done as far as the phases inside it are.

    TensorRT names a phase, its parent and its number of steps when it starts; a step may hold phases of its own, and
    names come again one after the other. The share never falls, though a phase may have fewer steps than it said.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Phase] = {}
        self._share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        self._open[name] = _Phase(parent, max(1, steps))

    def step(self, name: str, index: int) -> None:
        """Step ``index`` of the phase, from 0 on, is done."""
        if name in self._open:
            self._open[name].done = index + 1

    def finish(self, name: str) -> None:
        """The phase is over, maybe before its last step."""
        phase = self._open.pop(name, None)
        if phase is not None and phase.parent is None:
            self._share = 1.0

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        for name, phase in self._open.items():
            if phase.parent is None:
                self._share = max(self._share, self._share_of(name, phase))
        return self._share

    def _share_of(self, name: str, phase: _Phase) -> float:
        inside = [self._share_of(other, each) for other, each in self._open.items() if each.parent == name]
        return min(1.0, (phase.done + max(inside, default=0.0)) / phase.steps)


def build_monitor(trt: Any, watch: Callable[[float], bool]) -> Any:
    """An IProgressMonitor that tells ``watch`` the share done and stops where it says so; see ``was_stopped``."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Called from any thread of the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.was_stopped = False
            self._tree = PhaseTree()
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._tree.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._tree.finish(phase_name)
                self._tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                self._tree.step(phase_name, step)
                return self._tell()

        def _tell(self) -> bool:
            """Whether to go on. No exception may leave ``watch``: it would end in TensorRT, and with it the process."""
            self.was_stopped = self.was_stopped or not watch(self._tree.share)
            return not self.was_stopped

    return Monitor()
