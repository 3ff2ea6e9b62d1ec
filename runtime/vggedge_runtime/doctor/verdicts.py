"""The answer for each stage of the work, in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vggedge_runtime.doctor.clashes import TRAINING_PYTHONS, Facts
from vggedge_runtime.doctor.findings import Finding, Verdict, parse_version
from vggedge_runtime.doctor.machine import Machine

_TRAIN = ("TensorFlow", "Keras")
_EXPORT = (*_TRAIN, "tf2onnx", "onnx", "ONNX Runtime")
_RTX_TARGETS = "8.0 8.6 8.9 12.0 12.1"


def give_verdicts(facts: Facts, backends: Mapping[str, str]) -> tuple[Verdict, ...]:
    """One verdict a stage.

    Args:
        facts: what was found.
        backends: name -> module of the library behind it, in the order of ``auto``.
    """
    train, export = _library_stage("train", _TRAIN, facts), _library_stage("export", _EXPORT, facts)
    return (train, export, _engines(facts), _running(facts, backends))


def _library_stage(stage: str, names: Sequence[str], facts: Facts) -> Verdict:
    version = parse_version(facts.machine.python)[:2]
    if not TRAINING_PYTHONS[0] <= version <= TRAINING_PYTHONS[1]:
        return _verdict(stage, False, f"no: Python {facts.machine.python}; needed is 3.11 to 3.13")
    backend = facts.detail("Keras", "backend")
    if backend not in (None, "tensorflow"):
        return _verdict(stage, False, f"no: Keras runs on {backend}; export KERAS_BACKEND=tensorflow")
    wrong = [facts.findings[name] for name in names if facts.findings[name].status not in ("ok", "installed")]
    if wrong:
        return _verdict(stage, False, f"no: {_list(wrong)}")
    if any(facts.findings[name].status == "installed" for name in names):
        return _verdict(stage, None, "yes")
    if stage != "train":
        return _verdict(stage, True, "yes")
    gpus = facts.detail("TensorFlow", "gpus")
    return _verdict(stage, True, "yes, on the GPU" if gpus not in (None, "0") else "yes, on the CPU")


def _engines(facts: Facts) -> Verdict:
    machine, stage = facts.machine, "build engines"
    tensorrt, rtx = facts.findings["TensorRT"], facts.findings["TensorRT-RTX"]
    said: list[str] = []
    if tensorrt.status in ("ok", "installed") and machine.has_gpu:
        said.append(f"for this machine's {machine.gpu.name} (TensorRT {tensorrt.found})")
    if rtx.status in ("ok", "installed"):
        targets = (facts.detail("TensorRT-RTX", "targets") or _RTX_TARGETS).split()
        ahead = ", ".join(each for each in targets if parse_version(each) >= (8,))
        said.append(f"ahead of time for desktop GPUs of compute capability {ahead} (TensorRT-RTX)")
    if not said:
        wanted = tensorrt if machine.jetson is not None or machine.has_gpu else rtx
        if tensorrt.status in ("ok", "installed"):
            return _verdict(stage, False, f"no: TensorRT {tensorrt.found} is there, a GPU that CUDA can use is not")
        return _verdict(stage, False, f"no: {_list([wanted])}")
    untried = "installed" in {tensorrt.status, rtx.status}
    jetson = "" if machine.jetson is not None else "; not for a Jetson, which builds its own"
    says = f"yes, {'; '.join(said)}{jetson}"
    return _verdict(stage, None if untried else True, says)


def _running(facts: Facts, backends: Mapping[str, str]) -> Verdict:
    by_module = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT"}
    by_module["tensorrt_rtx"] = "TensorRT-RTX"
    runs: list[Finding] = []
    for module in backends.values():
        finding = facts.findings.get(by_module.get(module, ""))
        if finding is not None and finding.status in ("ok", "installed") and _finds_its_device(finding, facts.machine):
            runs.append(finding)
    if not runs:
        return _verdict("run here", False, f"no: {_list([facts.findings['ONNX Runtime']])}")
    on = {
        device: [each.name for each in runs if (each.group == "engines") == (device == "GPU")]
        for device in ("GPU", "CPU")
    }
    says = "yes, " + "; ".join(f"{' or '.join(names)} on the {device}" for device, names in on.items() if names)
    untried = any(each.status == "installed" for each in runs)
    if facts.machine.has_gpu and not any(each.group == "engines" for each in runs):
        says += "; the GPU stays unused" + ("" if _has_engine_backend(backends) else ": no backend for it yet")
    return _verdict("run here", None if untried else True, says)


def _has_engine_backend(backends: Mapping[str, str]) -> bool:
    return any(module.startswith("tensorrt") for module in backends.values())


def _finds_its_device(finding: Finding, machine: Machine) -> bool:
    return finding.group != "engines" or machine.has_gpu


def _list(findings: Sequence[Finding]) -> str:
    """What is wrong with them, and the commands that mend it, each once."""
    wrong: dict[str, list[str]] = {}
    for each in findings:
        is_absent = each.status in ("missing", "not needed here")
        wrong.setdefault("missing" if is_absent else each.status, []).append(each.name)
    said = "; ".join(f"{', '.join(names)} {status}" for status, names in wrong.items())
    reasons = [each.reason for each in findings if each.status == "not needed here" and each.reason]
    return said + (f" ({reasons[0]})" if reasons else "")


def _verdict(stage: str, can: bool | None, says: str) -> Verdict:
    if can is None:
        says = says.replace("yes", "yes by the metadata", 1)
    return Verdict(stage, can, says)  # type: ignore[arg-type]  # the four callers name the four stages
