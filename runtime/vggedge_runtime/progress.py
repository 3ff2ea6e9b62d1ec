"""How long work reports that it goes on: one signature for all packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Advance: TypeAlias = Callable[[int, int, str], None]
"""``advance(done, total, what)``: ``done`` of ``total`` units of ``what`` are finished."""


def ignore_progress(done: int, total: int, what: str) -> None:
    """Nobody wants to know."""
