"""What the doctor finds: the structs that ``--json`` prints."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

import msgspec

Group: TypeAlias = Literal["machine", "training", "export", "engines", "running"]
"""What a finding belongs to: this machine, or a stage of the work."""

Status: TypeAlias = Literal["ok", "installed", "missing", "broken", "unknown", "not needed here"]
"""``ok``: there, and it answered. ``installed``: there by its metadata, and nobody imported it (--quick)."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the machine or of its software.

    Attributes:
        found: version or value; None where there is none.
        good_for: what it does for vggedge.
        without: what its absence costs.
        add: the exact command that adds or mends it here; None where no command does.
        advice: what to do, in words, where a command is not all.
        reason: why it is broken, unknown or not needed, or what deserves attention although it is ok.
        details: more of it by name, such as the providers of ONNX Runtime.
    """

    name: str
    group: Group
    status: Status
    found: str | None = None
    good_for: str = ""
    without: str = ""
    add: str | None = None
    advice: str | None = None
    reason: str | None = None
    details: dict[str, str] = {}


class Clash(msgspec.Struct, frozen=True):
    """Parts that are known not to work together.

    Attributes:
        found: the parts and their versions.
        problem: what happens.
        cure: what to do.
        source: who says so.
    """

    found: str
    problem: str
    cure: str
    source: str


class Verdict(msgspec.Struct, frozen=True):
    """Whether one stage of the work can be done on this machine.

    Attributes:
        can: None where only metadata was read.
        says: the answer in words.
    """

    stage: Literal["train", "export", "build engines", "run here"]
    can: bool | None
    says: str


def parse_version(text: str | None) -> tuple[int, ...]:
    """Leading numbers of a version, trailing zeros dropped: ``"10.3.0+cuda"`` is (10, 3); () for what has none."""
    match = re.match(r"\s*[vV]?([0-9]{1,9}(?:\.[0-9]{1,9})*)", text or "")
    numbers = [int(part) for part in match.group(1).split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
