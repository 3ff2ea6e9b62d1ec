"""diagnose(): everything that the doctor looks at, in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from vggedge_runtime.backends.base import BACKENDS, load_backend_class
from vggedge_runtime.doctor.clashes import Facts, find_clashes
from vggedge_runtime.doctor.findings import Clash, Finding, Verdict
from vggedge_runtime.doctor.libraries import LIBRARIES, PROBE_GROUPS, blame_tensorflow, describe_library
from vggedge_runtime.doctor.machine import Machine, read_machine
from vggedge_runtime.doctor.machine_findings import describe_machine
from vggedge_runtime.doctor.probing import probe_modules
from vggedge_runtime.doctor.requirements import Requirements, check_requirements, read_distributions
from vggedge_runtime.doctor.system import Run, run_tool
from vggedge_runtime.doctor.verdicts import give_verdicts
from vggedge_runtime.progress import Advance, ignore_progress

_DEVICE = "vggedge_runtime.device"


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """All that was found.

    Attributes:
        quick: whether libraries were looked at by their metadata only.
        requirements_checked: how many of the installed packages' own requirements were compared.
    """

    quick: bool
    machine: Machine
    findings: tuple[Finding, ...]
    clashes: tuple[Clash, ...]
    requirements_checked: int
    verdicts: tuple[Verdict, ...]


def diagnose(
    *,
    quick: bool = False,
    timeout_s: float = 30.0,
    progress: Advance = ignore_progress,
    root: Path = Path("/"),
    run: Run = run_tool,
    path: Sequence[str] | None = None,
    driver: dict[str, str] | None = None,
    architecture: str | None = None,
    python: str | None = None,
) -> Diagnosis:
    """Look at this machine and at every library that vggedge may use.

    Args:
        quick: read the libraries' metadata instead of importing them.
        timeout_s: how long one import may take before it counts as hanging.
        progress: told while imports are tried.
        root: the folder below which /proc, /sys and /etc are looked for.
        run: runs NVIDIA's tools.
        path: where libraries are looked for; ``sys.path`` if None.
        driver: what the CUDA driver says, see ``device.describe_gpu``; asked in a child process if None.
        architecture: of the processor; this machine's if None.
        python: its version; this one's if None.
    """
    if driver is None:
        driver = _ask_driver(timeout_s)
    probes = {} if quick else probe_modules(PROBE_GROUPS, path=path, timeout_s=timeout_s, progress=progress)
    machine = read_machine(root, run, driver=driver, architecture=architecture, python=python)
    distributions = read_distributions(path)
    versions = {name: str(each.version) for name, each in distributions.items()}
    backends = {name: load_backend_class(name).module for name in BACKENDS}
    libraries = blame_tensorflow(
        [
            describe_library(each, probes.get(each.module), versions, machine, frozenset(backends.values()))
            for each in LIBRARIES
        ]
    )
    names = [name for each in LIBRARIES for name in each.distributions]
    requirements = check_requirements(distributions, names)
    facts = Facts(machine, versions, {each.name: each for each in libraries})
    return Diagnosis(
        quick=quick,
        machine=machine,
        findings=(*describe_machine(machine), *libraries, _describe_requirements(requirements)),
        clashes=find_clashes(facts, requirements),
        requirements_checked=requirements.checked,
        verdicts=give_verdicts(facts, backends),
    )


def _ask_driver(timeout_s: float) -> dict[str, str]:
    """What ``device.describe_gpu`` says in a process of its own: a driver that is half installed may hang or crash."""
    probe = probe_modules([[_DEVICE]], timeout_s=timeout_s)[_DEVICE]
    return probe.details if probe.error is None else {"libcuda": "found", "error": probe.error}


def _describe_requirements(requirements: Requirements) -> Finding:
    good_for = "finding versions that clash, by what the installed packages say they need"
    finding = Finding(name="requirements", group="running", status="ok", good_for=good_for)
    if requirements.reason is not None:
        return msgspec.structs.replace(
            finding, status="unknown", reason=requirements.reason, add="pip install packaging"
        )
    unmet = len(requirements.unmet)
    found = f"{requirements.checked} checked, {unmet or 'none'} unmet"
    return msgspec.structs.replace(finding, status="broken" if unmet else "ok", found=found)
