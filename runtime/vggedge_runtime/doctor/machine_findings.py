"""The findings about the machine itself, from its facts."""

from __future__ import annotations

import msgspec

from vggedge_runtime.doctor.clashes import RUNTIME_PYTHONS
from vggedge_runtime.doctor.findings import Finding, Status, parse_version
from vggedge_runtime.doctor.jetson import Jetson
from vggedge_runtime.doctor.machine import Machine

EXPORT_PEAK_BYTES = int(3.5 * 2**30)
"""Memory that the export of a full vgg16 (224x224, 138 million parameters) takes at its peak: 3.43 GiB measured."""


_STATUSES: dict[str, tuple[str, str | None]] = {
    "802": ("its fabric is not ready", "sudo systemctl start nvidia-fabricmanager"),
    "803": ("the driver's library and its kernel module differ in version", "sudo reboot"),
    "804": ("the compatibility libraries of this container do not go with this GPU; use an image for its driver", None),
}
"""What cuInit answers -> (advice, command). Source: CUresult in NVIDIA's CUDA driver API reference."""


def describe_machine(machine: Machine) -> list[Finding]:
    """One finding a part; those of a Jetson on a Jetson only."""
    found = [
        _python(machine),
        _simple("operating system", machine.os, "finding the right packages"),
        _cpu(machine),
        _memory(machine),
        _gpu(machine),
        _driver(machine),
        _cuda(machine),
    ]
    if machine.jetson is not None:
        jetson = machine.jetson
        found += [
            _simple("Jetson", jetson.board, "naming the board in benchmarks"),
            _simple("L4T", jetson.l4t, "telling which JetPack this is"),
            _simple("JetPack", jetson.jetpack, "CUDA and TensorRT"),
            _power_mode(jetson),
        ]
    elif machine.governor is not None:
        found.append(_simple("CPU governor", machine.governor, "steady clocks in benchmarks"))
    return found


def format_memory(size: int) -> str:
    """``25276866560`` as ``23.5 GiB``."""
    return f"{size / 2**30:.1f} GiB"


def _simple(name: str, value: str | None, good_for: str) -> Finding:
    status: Status = "ok" if value else "unknown"
    return Finding(name=name, group="machine", status=status, found=value, good_for=good_for)


def _power_mode(jetson: Jetson) -> Finding:
    finding = Finding(
        name="power mode",
        group="machine",
        status="ok",
        found=jetson.power_mode,
        good_for="full clocks; latencies are of the mode that they were measured in",
    )
    if jetson.power_mode is None:
        return msgspec.structs.replace(finding, status="unknown", reason="neither nvpmodel nor its files say")
    if jetson.best_mode is None:
        return finding
    number, name = jetson.best_mode
    add = f"sudo nvpmodel -m {number} && sudo jetson_clocks"
    return msgspec.structs.replace(finding, reason=f"{name} has higher clocks", add=add)


def _python(machine: Machine) -> Finding:
    version = parse_version(machine.python)[:2]
    runs = RUNTIME_PYTHONS[0] <= version <= RUNTIME_PYTHONS[1]
    return Finding(
        name="Python",
        group="machine",
        status="ok" if runs else "unknown",  # a rule of clashes.py says why
        found=machine.python,
        good_for="3.11 to 3.13 train and export, 3.10 to 3.13 run bundles",
    )


def _cpu(machine: Machine) -> Finding:
    names = [machine.cpu or machine.architecture]
    if machine.cores is not None:
        usable = machine.usable_cores or machine.cores
        names.append(f"{machine.cores} cores" + (f", {usable} of them usable" if usable < machine.cores else ""))
    names += [" ".join(machine.cpu_features)] if machine.cpu_features else []
    details = {"architecture": machine.architecture}
    return Finding(name="CPU", group="machine", status="ok", found=", ".join(names), details=details)


def _memory(machine: Machine) -> Finding:
    total, available = machine.total_bytes, machine.available_bytes
    if total is None or available is None:
        return Finding(name="memory", group="machine", status="unknown", reason="/proc/meminfo does not say")
    little = available < EXPORT_PEAK_BYTES and machine.jetson is None
    return Finding(
        name="memory",
        group="machine",
        status="ok",
        found=f"{format_memory(available)} free of {format_memory(total)}",
        good_for="the export of a full vgg16 takes 3.5 GiB at its peak",
        reason="too little free for the export of a full vgg16, which takes 3.5 GiB" if little else None,
    )


def _gpu(machine: Machine) -> Finding:
    gpu = machine.gpu
    parts = [gpu.name or ""]
    parts += [f"compute capability {gpu.capability}"] if gpu.capability else []
    if gpu.total_bytes is not None and gpu.free_bytes is not None:
        parts.append(f"{format_memory(gpu.free_bytes)} free of {format_memory(gpu.total_bytes)}")
    parts += [f"and {gpu.others} more"] if gpu.others else []
    common = Finding(
        name="GPU",
        group="machine",
        status="ok",
        found=", ".join(parts) if gpu.name else None,
        good_for="running TensorRT engines",
        without="no engine runs here; the rest works, and engines for desktop GPUs are built all the same",
    )
    status, reason, advice, add = _judge_gpu(machine)
    return msgspec.structs.replace(common, status=status, reason=reason, advice=advice, add=add)


def _judge_gpu(machine: Machine) -> tuple[Status, str | None, str | None, str | None]:
    """(status, reason, advice, command) of the GPU, the commonest causes first."""
    gpu = machine.gpu
    container = "in a container: start it with --gpus all, on a Jetson with --runtime nvidia"
    if machine.has_gpu:
        return "ok", None, None, None
    if gpu.smi_error is not None and "version mismatch" in gpu.smi_error:
        return "broken", gpu.smi_error, "the driver was updated while its old kernel module is loaded", "sudo reboot"
    if not gpu.has_libcuda and gpu.name is not None:
        capabilities = "in a container: it was started without compute among NVIDIA_DRIVER_CAPABILITIES"
        return "broken", f"nvidia-smi sees it, CUDA does not: {gpu.error}", capabilities, None
    if not gpu.has_libcuda and gpu.in_kernel:
        return "broken", f"the driver is in the kernel, its library is not here: {gpu.error}", container, None
    if not gpu.has_libcuda and machine.jetson is not None:
        return "broken", f"this Jetson's GPU cannot be used: {gpu.error}", container, "sudo apt install nvidia-jetpack"
    if gpu.has_libcuda and gpu.status in _STATUSES:
        return "broken", f"{gpu.error} (CUDA status {gpu.status})", *_STATUSES[gpu.status]
    if gpu.has_libcuda and gpu.name is not None and gpu.visible is not None:
        return "broken", gpu.error, f"CUDA_VISIBLE_DEVICES={gpu.visible!r} may hide it", "unset CUDA_VISIBLE_DEVICES"
    if gpu.has_libcuda and (gpu.in_kernel or gpu.is_on_the_bus or machine.jetson is not None or gpu.smi_error):
        return "broken", gpu.error or gpu.smi_error, container, None
    if gpu.is_on_the_bus:
        command = "sudo ubuntu-drivers install" if machine.os_id == "ubuntu" else None
        return "missing", "an NVIDIA GPU is in this machine, its driver is not", "install NVIDIA's driver", command
    return "missing", "no NVIDIA GPU", None, None


def _driver(machine: Machine) -> Finding:
    gpu = machine.gpu
    finding = Finding(
        name="NVIDIA driver",
        group="machine",
        status="ok",
        found=gpu.driver or ("that of L4T" if gpu.has_libcuda and machine.jetson is not None else None),
        good_for="everything that runs on the GPU",
        without="no engine runs here",
    )
    if finding.found is not None:
        return finding
    if gpu.has_libcuda:
        return msgspec.structs.replace(finding, status="unknown")
    return _without_gpu(finding, machine)


def _cuda(machine: Machine) -> Finding:
    gpu = machine.gpu
    parts = [f"{gpu.cuda} is the newest that the driver runs"] if gpu.cuda else []
    parts += [f"toolkit {machine.toolkit}".replace("unknown", "of unknown version")] if machine.toolkit else []
    finding = Finding(
        name="CUDA",
        group="machine",
        status="ok",
        found=", ".join(parts) or None,
        good_for="TensorRT; its toolkit compiles pycuda",
        without="no engine runs here",
    )
    return finding if gpu.cuda else _without_gpu(finding, machine)


def _without_gpu(finding: Finding, machine: Machine) -> Finding:
    """Missing where there is a GPU, else not needed."""
    gpu = machine.gpu
    there = gpu.is_on_the_bus or gpu.in_kernel or gpu.name is not None or machine.jetson is not None
    if there:
        return msgspec.structs.replace(finding, status="missing", reason="it comes with NVIDIA's driver; see GPU")
    return msgspec.structs.replace(finding, status="not needed here", reason="no NVIDIA GPU")
