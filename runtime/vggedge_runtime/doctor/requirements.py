"""Whether what the installed packages say they need is installed, in a version that they accept."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec


class Unmet(msgspec.Struct, frozen=True):
    """A requirement that is not met: ``by``, "onnx 1.23.2", needs "protobuf>=6.31.1", and ``found`` is installed."""

    by: str
    needs: str
    found: str | None


class Requirements(msgspec.Struct, frozen=True):
    """What was checked.

    Attributes:
        checked: number of requirements.
        unmet: those that are not met.
        reason: why nothing could be checked; None if it was.
    """

    checked: int
    unmet: tuple[Unmet, ...] = ()
    reason: str | None = None


def normalise(name: str) -> str:
    """Name of a distribution as the packaging standard (PEP 503) compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_distributions(path: Sequence[str] | None = None) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions by normalised name; of two with one name the first, which is the one imported."""
    kwargs: dict[str, Any] = {} if path is None else {"path": list(path)}
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(**kwargs):
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:  # a half-deleted package: no metadata file, or one without a version
            continue
        if name and version:
            found.setdefault(normalise(name), distribution)
    return found


def check_requirements(
    distributions: Mapping[str, importlib.metadata.Distribution], names: Iterable[str], ours: str = "vggedge"
) -> Requirements:
    """Check what ``names`` need, and what that needs, and so on.

    Of ``ours`` the extras are looked at, too: a missing optional library is no clash, one of a wrong version is.

    Args:
        distributions: by normalised name.
        names: where to begin; those that are not installed are passed over.
        ours: our own distribution.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return Requirements(0, reason="the package packaging, which compares versions, is not installed")
    unmet: list[Unmet] = []
    checked = 0
    seen: set[str] = set()
    waiting = [normalise(name) for name in (ours, *names)]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in distributions:
            continue
        seen.add(name)
        distribution = distributions[name]
        for text in _requires(distribution):
            try:
                need = Requirement(text)
                wanted = _applies(need, optional=name == ours)
                there = distributions.get(normalise(need.name))
                if wanted is None or (there is None and wanted == "extra"):
                    continue
                met = there is not None and need.specifier.contains(there.version, prereleases=True)
            except Exception:  # text that is no requirement, or a version that is none: not ours to mend
                continue
            checked += 1
            waiting.append(normalise(need.name))
            if not met:
                needs = f"{need.name}{need.specifier}"
                unmet.append(Unmet(f"{name} {distribution.version}", needs, None if there is None else there.version))
    return Requirements(checked, tuple(sorted(dict.fromkeys(unmet), key=lambda each: (each.by, each.needs))))


def _requires(distribution: importlib.metadata.Distribution) -> list[str]:
    try:
        return distribution.requires or []
    except Exception:  # as above: unreadable metadata
        return []


def _applies(need: Any, *, optional: bool) -> str | None:
    """Who asks for it here: "always", "extra" for an extra of ours only, None for nobody."""
    if need.marker is None or need.marker.evaluate({"extra": ""}):
        return "always"
    if optional:
        extras = re.findall(r"""extra\s*==\s*["']([^"']+)["']""", str(need.marker))
        if any(need.marker.evaluate({"extra": extra}) for extra in extras):
            return "extra"
    return None
