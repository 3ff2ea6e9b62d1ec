"""What a Jetson says of itself: board, Jetson Linux (L4T), JetPack, power mode."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from vggedge_runtime.doctor.findings import parse_version
from vggedge_runtime.doctor.system import Run, read_text

JETPACKS: dict[tuple[int, ...], str] = {
    (32, 7): "4.6",
    (35,): "5",
    (35, 1): "5.0.2",
    (35, 2, 1): "5.1",
    (35, 3, 1): "5.1.1",
    (35, 4, 1): "5.1.2",
    (35, 5): "5.1.3",
    (35, 6): "5.1.4",
    (35, 6, 2): "5.1.5",
    (36,): "6",
    (36, 3): "6.0",
    (36, 4): "6.1",
    (36, 4, 3): "6.2",
    (36, 4, 4): "6.2.1",
    (36, 5): "6.2",
    (38,): "7",
    (38, 2): "7.0",
    (38, 4): "7.1",
    (39,): "7",
    (39, 2): "7.2",
}
"""L4T -> JetPack. Source: developer.nvidia.com/embedded/jetpack-archive, docs.nvidia.com/jetson/archives, and the
download pages of JetPack 7.0 to 7.2. A release that is not here takes the name of the nearest shorter number."""


class Jetson(msgspec.Struct, frozen=True, kw_only=True):
    """A Jetson; each is None where nobody says.

    Attributes:
        board: as the device tree names it.
        l4t: release of Jetson Linux, "36.4.3".
        jetpack: of the installed package, else the one that brings this L4T.
        power_mode: name of the active one, "MAXN_SUPER".
        best_mode: (number, name) of the mode without limits; None if it is active, or unknown.
    """

    board: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    power_mode: str | None = None
    best_mode: tuple[int, str] | None = None


def jetpack_of(l4t: str) -> str | None:
    """JetPack that comes with a release of Jetson Linux: ``"36.4.3"`` -> ``"6.2"``; None if nobody knows."""
    numbers = parse_version(l4t)
    for length in range(len(numbers), 0, -1):
        if numbers[:length] in JETPACKS:
            return JETPACKS[numbers[:length]]
    return None


def read_jetson(root: Path, run: Run) -> Jetson | None:
    """Read the files and ask nvpmodel; None if this is no Jetson.

    Either file tells a Jetson: a container has the device tree but seldom /etc/nv_tegra_release.
    """
    board = next((text for path in ("proc/device-tree/model", "sys/firmware/devicetree/base/model")
                  if (text := read_text(root / path))), None)  # fmt: skip
    release = read_text(root / "etc/nv_tegra_release")
    match = re.search(r"R(\d{1,3})\D*?REVISION:\s*(\d{1,3}(?:\.\d{1,3})*)", release)
    if match is None and not re.search(r"jetson|tegra|orin|thor", board or "", re.IGNORECASE):
        return None
    l4t = f"{match.group(1)}.{match.group(2)}" if match else None
    number, name = _read_power_mode(root, run)
    modes = {int(each): text for each, text in _modes(root)}
    best = next(((each, text) for each, text in modes.items() if text.upper().startswith("MAXN")), None)
    for each, text in modes.items():
        if text.upper() == "MAXN_SUPER":  # above MAXN where a board has both
            best = (each, text)
    is_best = best is not None and (best[0] == number or best[1] == name)
    return Jetson(
        board=board,
        l4t=l4t,
        jetpack=_read_package(root) or (jetpack_of(l4t) if l4t else None),
        power_mode=name or (modes.get(number) if number is not None else None),
        best_mode=None if is_best or (number is None and name is None) else best,
    )


def _read_package(root: Path) -> str | None:
    """JetPack of the nvidia-jetpack package, "6.2"; None where it is not installed."""
    status = read_text(root / "var/lib/dpkg/status")
    for paragraph in re.findall(r"^Package: nvidia-jetpack\n(?:.+\n?)*", status, re.MULTILINE):
        version = re.search(r"^Version: ([\d.]+)", paragraph, re.MULTILINE)
        if version and re.search(r"^Status: .* installed$", paragraph, re.MULTILINE):
            return version.group(1)
    return None


def _read_power_mode(root: Path, run: Run) -> tuple[int | None, str | None]:
    """(number, name) of the active power mode: asked, else from the file that keeps it over a reboot."""
    said = run(["nvpmodel", "-q"])
    text = said.text if said is not None and said.code == 0 else ""
    name = re.search(r"NV Power Mode:\s*(\S+)", text)
    number = re.search(r"^\s*(\d{1,3})\s*$", text, re.MULTILINE) or re.search(
        r"pmode:\s*(\d{1,9})\b", read_text(root / "var/lib/nvpmodel/status")
    )
    return (int(number.group(1)) if number else None), (name.group(1) if name else None)


def _modes(root: Path) -> list[tuple[str, str]]:
    return re.findall(r"<\s*POWER_MODEL\s+ID=(\d{1,3})\s+NAME=(\S+)\s*>", read_text(root / "etc/nvpmodel.conf"))
