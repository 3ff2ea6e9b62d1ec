"""The libraries of each stage: what each is for, what its absence costs, and what adds it where."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import msgspec

from vggedge_runtime.doctor.findings import Finding, Group
from vggedge_runtime.doctor.machine import Machine
from vggedge_runtime.doctor.probing import Probe


class Library(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table.

    Attributes:
        module: what is imported to try it.
        distributions: names under which it is installed, the usual one first.
        add: command that adds it on a machine; None where there is none.
        needless: why this machine can do without; None if it cannot.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    group: Group
    good_for: str
    without: str
    add: Callable[[Machine], str | None]
    needless: Callable[[Machine], str | None] = lambda machine: None


def pip(extra: str) -> Callable[[Machine], str | None]:
    """The command that installs an extra of ours, on every machine."""
    return lambda machine: f"pip install 'vggedge[{extra}]'"


def _on_a_jetson(machine: Machine) -> str | None:
    return "a Jetson runs bundles; train and export on a PC" if machine.jetson is not None else None


def _add_tensorrt(machine: Machine) -> str | None:
    if machine.jetson is None:
        return "pip install 'vggedge[tensorrt]'"
    if machine.system_tensorrt:
        python = re.search(r"python3\.\d+", machine.system_tensorrt[0])
        return f"{python.group() if python else 'python3'} -m venv --system-site-packages NEW"
    return "sudo apt install nvidia-jetpack"


def _needless_tensorrt(machine: Machine) -> str | None:
    if machine.jetson is None and not machine.has_gpu:
        return "it builds for the GPU at hand, and CUDA finds none"
    return None


def _needless_rtx(machine: Machine) -> str | None:
    if machine.architecture not in ("x86_64", "AMD64"):
        return "NVIDIA publishes it for x86-64 only"
    return None


LIBRARIES: tuple[Library, ...] = (
    Library(
        name="TensorFlow",
        module="tensorflow",
        distributions=("tensorflow", "tensorflow-cpu", "tf-nightly"),
        group="training",
        good_for="training, and the Keras model that export starts from",
        without="no train, finetune, evaluate of a .keras file, export",
        add=pip("train"),
        needless=_on_a_jetson,
    ),
    Library(
        name="Keras",
        module="keras",
        distributions=("keras",),
        group="training",
        good_for="building, training and reading models",
        without="no train, finetune, evaluate of a .keras file, export",
        add=pip("train"),
        needless=_on_a_jetson,
    ),
    Library(
        name="h5py",
        module="h5py",
        distributions=("h5py",),
        group="training",
        good_for=".h5 data sets and weight files",
        without="no .h5 file can be read",
        add=pip("train"),
        needless=_on_a_jetson,
    ),
    Library(
        name="safetensors",
        module="safetensors",
        distributions=("safetensors",),
        group="training",
        good_for="torchvision's weights, without torch",
        without="import-weights does not read .safetensors files",
        add=pip("train"),
        needless=_on_a_jetson,
    ),
    Library(
        name="Matplotlib",
        module="matplotlib.figure",
        distributions=("matplotlib",),
        group="training",
        good_for="learning curves, and the plot of a mixed-precision plan",
        without="no learning curves, no plot of a mixed plan, without which export --max-drop refuses",
        add=pip("train"),
        needless=_on_a_jetson,
    ),
    Library(
        name="tf2onnx",
        module="tf2onnx",
        distributions=("tf2onnx",),
        group="export",
        good_for="converting Keras to ONNX",
        without="no export",
        add=pip("export"),
        needless=_on_a_jetson,
    ),
    Library(
        name="onnx",
        module="onnx",
        distributions=("onnx",),
        group="export",
        good_for="the graphs in FP32, FP16 and INT8",
        without="no export, no verify",
        add=pip("export"),
        needless=_on_a_jetson,
    ),
    Library(
        name="TensorRT",
        module="tensorrt",
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        group="engines",
        good_for="engines for the GPU of this very machine, a Jetson's included",
        without="no engine for this GPU",
        add=_add_tensorrt,
        needless=_needless_tensorrt,
    ),
    Library(
        name="TensorRT-RTX",
        module="tensorrt_rtx",
        distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
        group="engines",
        good_for="engines for desktop GPUs, built without one",
        without="no engine ahead of time for desktop GPUs",
        add=pip("rtx"),
        needless=_needless_rtx,
    ),
    Library(
        name="NumPy",
        module="numpy",
        distributions=("numpy",),
        group="running",
        good_for="everything",
        without="nothing runs",
        add=lambda machine: "pip install vggedge",
    ),
    Library(
        name="Pillow",
        module="PIL.Image",
        distributions=("pillow",),
        group="running",
        good_for="reading images",
        without="no image can be read",
        add=lambda machine: "pip install vggedge",
    ),
    Library(
        name="ONNX Runtime",
        module="onnxruntime",
        distributions=(
            "onnxruntime",
            "onnxruntime-gpu",
            "onnxruntime-openvino",
            "onnxruntime-directml",
            "onnxruntime-migraphx",
        ),
        group="running",
        good_for="running bundles on the CPU, and the proof at export",
        without="no infer and bench on the CPU, no export, no verify",
        add=pip("ort"),
    ),
    Library(
        name="OpenVINO",
        module="openvino",
        distributions=("openvino",),
        group="running",
        good_for="running bundles on the CPU, INT8 at full speed",
        without="INT8 graphs run slowly on the CPU: ONNX Runtime fuses nothing in them",
        add=pip("openvino"),
    ),
    Library(
        name="pycuda",
        module="pycuda.driver",
        distributions=("pycuda",),
        group="running",
        good_for="buffers and streams of TensorRT engines",
        without="no TensorRT engine runs",
        # On a Jetson the extra would bring a second TensorRT beside that of JetPack.
        add=lambda machine: "pip install 'vggedge[tensorrt]'" if machine.jetson is None else "pip install pycuda",
        needless=lambda machine: None if machine.has_gpu else "there is no GPU that CUDA can use",
    ),
)

PROBE_GROUPS: tuple[tuple[str, ...], ...] = (
    ("tensorflow", "keras", "tf2onnx"),
    ("tensorrt", "pycuda.driver"),
    ("tensorrt_rtx",),
    ("numpy", "PIL.Image", "onnx", "onnxruntime", "openvino", "h5py", "safetensors", "matplotlib.figure"),
)
"""Modules that are tried in one process each. The first group imports TensorFlow once instead of three times."""


def describe_library(
    library: Library, probe: Probe | None, versions: Mapping[str, str], machine: Machine, backends: frozenset[str]
) -> Finding:
    """The finding of one library.

    Args:
        library: its row in the table.
        probe: how its import went; None if it was not tried.
        versions: of the installed distributions, by normalised name.
        machine: where it is to run.
        backends: modules of the backends that this vggedge has.
    """
    distribution = next((name for name in library.distributions if name in versions), library.distributions[0])
    installed = versions.get(distribution)
    needless = _needless(library, machine, backends)
    change = msgspec.structs.replace
    finding = Finding(
        name=library.name,
        group=library.group,
        status="installed",
        found=installed,
        good_for=library.good_for,
        without=library.without,
    )
    if probe is None and installed is not None:
        return finding
    if (probe is None or probe.absent) and installed is None:
        if needless is not None:
            return change(finding, status="not needed here", reason=needless)
        reason, advice = _explain_absence(library, machine)
        return change(finding, status="missing", reason=reason, advice=advice, add=library.add(machine))
    if probe is None or not probe.tried:
        return change(finding, status="unknown", reason=None if probe is None else probe.error)
    if probe.error is None:
        details = dict(probe.details) | ({"file": probe.file} if probe.file else {})
        return change(finding, status="ok", found=installed or probe.version or "no version", details=details)
    reason = f"installed, but its files are gone ({probe.error})" if probe.absent else probe.error
    command, advice = explain_error(probe.error)
    add = command if command or advice else _reinstall(distribution, library, machine)
    return change(finding, status="broken", reason=reason, add=add, advice=advice)


def _needless(library: Library, machine: Machine, backends: frozenset[str]) -> str | None:
    used_by = {"openvino": "openvino", "pycuda.driver": "tensorrt"}.get(library.module)
    if used_by is not None and used_by not in backends:
        return "no backend of this vggedge uses it"
    return library.needless(machine)


def _explain_absence(library: Library, machine: Machine) -> tuple[str | None, str | None]:
    if library.module == "pycuda.driver" and machine.toolkit is None:
        return None, "it is compiled while it is installed, which needs the CUDA toolkit with nvcc on the PATH"
    if library.module == "tensorrt" and machine.jetson is not None and machine.system_tensorrt:
        return (
            f"JetPack has installed it in {', '.join(machine.system_tensorrt)}, where this Python does not look",
            "make a virtual environment with the Python of that folder, which sees the system's packages",
        )
    return None, None


def _reinstall(distribution: str, library: Library, machine: Machine) -> str | None:
    command = library.add(machine)
    if command is None or not command.startswith("pip install"):
        return command
    return f"pip install --force-reinstall --no-deps {distribution}"


def blame_tensorflow(findings: Sequence[Finding]) -> list[Finding]:
    """Say of what fails as TensorFlow does that TensorFlow is why: one defect, one cure."""
    tensorflow = next(each for each in findings if each.name == "TensorFlow")
    return [
        msgspec.structs.replace(each, reason="TensorFlow, which it imports, is broken", add=None, advice=None)
        if tensorflow.status == each.status == "broken" and each.reason == tensorflow.reason and each is not tensorflow
        else each
        for each in findings
    ]


_ERRORS: tuple[tuple[str, str | None, str | None], ...] = (
    # blakeblackshear/frigate issue 23582: containers for L4T R39 come without it.
    (
        r"libnvdla_compiler\.so",
        None,
        "mount the host's libnvdla_compiler.so into the container, or use NVIDIA's own image for this L4T",
    ),
    (
        r"libcuda\.so",
        None,
        "install NVIDIA's driver; start a container with --gpus all, on a Jetson with --runtime nvidia",
    ),
    # microsoft/onnxruntime issue 21063, and NumPy's own message.
    (
        r"_ARRAY_API not found|compiled using NumPy 1|multiarray failed to import",
        "pip install 'numpy<2'",
        "it was compiled for NumPy 1; a newer version of it is better, where there is one",
    ),
    # protobuf.dev/support/cross-version-runtime-guarantee
    (r"Descriptors cannot be created|Gencode/Runtime|'runtime_version'", "pip install -U protobuf", None),
    # tensorflow.org/install/pip: the official packages need AVX.
    (r"SIGILL", None, "it needs a package built for this processor; TensorFlow's own need AVX"),
    (r"GLIBC(?:XX)?_\d", None, "it was built for a newer libc: take an older version of it, or a newer Linux"),
    (r"No module named '(?:jax|torch)'", "export KERAS_BACKEND=tensorflow", None),
)
"""What a failed import says -> the command that mends it, and advice."""


def explain_error(error: str) -> tuple[str | None, str | None]:
    """(command, advice) against a known error of an import; (None, None) for an unknown one."""
    for pattern, command, advice in _ERRORS:
        if re.search(pattern, error):
            return command, advice
    return None, None
