"""Version pairs that are known to clash: a table of rules, each with what happens, what to do, and who says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from vggedge_runtime.doctor.findings import Clash, Finding, parse_version
from vggedge_runtime.doctor.machine import Machine
from vggedge_runtime.doctor.requirements import Requirements

RUNTIME_PYTHONS = ((3, 10), (3, 13))
"""First and last Python that the runtime supports."""
TRAINING_PYTHONS = ((3, 11), (3, 13))
"""First and last Python that training and export support."""


_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


class Facts(msgspec.Struct, frozen=True):
    """What the rules look at.

    Attributes:
        versions: of the installed distributions, by normalised name.
        findings: of the libraries, by their name in the table.
    """

    machine: Machine
    versions: Mapping[str, str] = {}
    findings: Mapping[str, Finding] = {}

    def version(self, *names: str) -> tuple[int, ...]:
        """Version of the first of these distributions that is installed; () if none is."""
        return parse_version(next((self.versions[name] for name in names if name in self.versions), None))

    def detail(self, library: str, name: str) -> str | None:
        """What a library answered, such as its devices; None if it was not asked."""
        return self.findings[library].details.get(name) if library in self.findings else None

    @property
    def jetson_linux(self) -> tuple[int, ...]:
        """Release of Jetson Linux; () on other machines."""
        return parse_version(self.machine.jetson.l4t if self.machine.jetson else None)

    @property
    def capability(self) -> str | None:
        """Compute capability of the GPU."""
        return self.machine.gpu.capability


class Rule(msgspec.Struct, frozen=True):
    """A row of the table; ``look`` gives the parts that clash, in words, or None."""

    look: Callable[[Facts], str | None]
    problem: str
    cure: str
    source: str


def _show(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _python(facts: Facts) -> str | None:
    version = parse_version(facts.machine.python)[:2]
    first, last = RUNTIME_PYTHONS
    return None if first <= version <= last else f"Python {facts.machine.python}"


def _training_python(facts: Facts) -> str | None:
    version = parse_version(facts.machine.python)[:2]
    first, last = TRAINING_PYTHONS
    if first <= version <= last or _python(facts) or facts.machine.jetson is not None:
        return None
    return f"Python {facts.machine.python}"


def _tf2onnx_keras(facts: Facts) -> str | None:
    tf2onnx, keras = facts.version("tf2onnx"), facts.version("keras")
    if tf2onnx and tf2onnx < (1, 17) and keras >= (3,):
        return f"tf2onnx {_show(tf2onnx)} and Keras {_show(keras)}"
    return None


def _onnxruntime_numpy(facts: Facts) -> str | None:
    onnxruntime, numpy = facts.version("onnxruntime", "onnxruntime-gpu"), facts.version("numpy")
    if onnxruntime and onnxruntime < (1, 19) and numpy >= (2,):
        return f"ONNX Runtime {_show(onnxruntime)} and NumPy {_show(numpy)}"
    return None


def _two_onnxruntimes(facts: Facts) -> str | None:
    found = [f"{name} {facts.versions[name]}" for name in _ONNXRUNTIMES if name in facts.versions]
    return " and ".join(found) if len(found) > 1 else None


def _keras_backend(facts: Facts) -> str | None:
    backend = facts.detail("Keras", "backend")
    return None if backend in (None, "tensorflow") else f"Keras runs on {backend}"


def _tensorflow_avx(facts: Facts) -> str | None:
    machine = facts.machine
    if not facts.version("tensorflow", "tensorflow-cpu") or machine.architecture != "x86_64":
        return None
    return None if machine.cpu_features is None or "avx" in machine.cpu_features else f"TensorFlow and {machine.cpu}"


def _old_tensorrt(facts: Facts) -> str | None:
    tensorrt = facts.version("tensorrt")
    return f"TensorRT {_show(tensorrt)}" if tensorrt and tensorrt < (10,) else None


def _old_jetpack(facts: Facts) -> str | None:
    return f"L4T {_show(facts.jetson_linux)}" if facts.jetson_linux and facts.jetson_linux < (36,) else None


def _tensorrt_11_jetpack(facts: Facts) -> str | None:
    tensorrt, linux = facts.version("tensorrt"), facts.jetson_linux
    if linux and tensorrt >= (11,) and (linux < (39, 2) or tensorrt < (11, 4, 1)):
        return f"TensorRT {_show(tensorrt)} and L4T {_show(linux)}"
    return None


def _sbsa_on_orin(facts: Facts) -> str | None:
    tensorrt = facts.version("tensorrt")
    board = facts.machine.jetson.board if facts.machine.jetson else None
    if tensorrt[:2] == (10, 13) and (facts.capability == "8.7" or "Orin" in (board or "")):
        return f"TensorRT {_show(tensorrt)} and {board or 'Orin'}"
    return None


def _cuda_13_driver(facts: Facts) -> str | None:
    packages = ("tensorrt-rtx-cu13", "tensorrt-cu13")
    found = [f"{name} {facts.versions[name]}" for name in packages if name in facts.versions]
    cuda = facts.machine.gpu.cuda
    if found and cuda is not None and parse_version(cuda) < (13,):
        return f"{' and '.join(found)}, and a driver for CUDA {cuda}"
    return None


def _rtx_capability(facts: Facts) -> str | None:
    targets = facts.detail("TensorRT-RTX", "targets")
    if targets is None or facts.capability is None or facts.capability in targets.split():
        return None
    return f"TensorRT-RTX and {facts.machine.gpu.name}, compute capability {facts.capability}"


def _turing_int8(facts: Facts) -> str | None:
    if facts.capability == "7.5" and "TensorRT-RTX" in facts.findings and facts.version("tensorrt-rtx-cu13"):
        return f"TensorRT-RTX and {facts.machine.gpu.name}, compute capability 7.5"
    return None


RULES: tuple[Rule, ...] = (
    Rule(
        _python,
        "vggedge is tested with Python 3.10 to 3.13 only.",
        "Use one of these.",
        "pyproject.toml of vggedge",
    ),
    Rule(
        _training_python,
        "training and export need Python 3.11 to 3.13; bundles run.",
        "Use one of these to train and export.",
        "pyproject.toml of vggedge",
    ),
    Rule(
        _tf2onnx_keras,
        "tf2onnx before 1.17 does not know Keras 3: 'Sequential' object has no attribute 'output_names'.",
        "pip install 'tf2onnx>=1.17'",
        "onnx/tensorflow-onnx issue 2348",
    ),
    Rule(
        _onnxruntime_numpy,
        "ONNX Runtime before 1.19 was compiled for NumPy 1: _ARRAY_API not found.",
        "pip install -U onnxruntime, or pip install 'numpy<2' where no newer one is to be had",
        "microsoft/onnxruntime issue 21063",
    ),
    Rule(
        _two_onnxruntimes,
        "both install the same folder: which one is imported depends on the order, and GPU providers may be gone.",
        f"pip uninstall -y {' '.join(_ONNXRUNTIMES)} && pip install 'vggedge[ort]'",
        "microsoft/onnxruntime issues 10685 and 26996",
    ),
    Rule(
        _keras_backend,
        "vggedge trains and converts with Keras's tensorflow backend.",
        "export KERAS_BACKEND=tensorflow",
        "vggedge/model.py of vggedge",
    ),
    Rule(
        _tensorflow_avx,
        "TensorFlow's packages need AVX, which this processor lacks: the import ends with SIGILL.",
        "Train on another machine, or build TensorFlow for this one.",
        "tensorflow.org/install/pip",
    ),
    Rule(
        _old_tensorrt,
        "vggedge builds strongly typed engines, which TensorRT has from 10 on.",
        "On a Jetson install JetPack 6 or later; elsewhere pip install -U 'vggedge[tensorrt]'",
        "docs.nvidia.com/deeplearning/tensorrt, release notes of 10",
    ),
    Rule(
        _old_jetpack,
        "JetPack before 6 has Python 3.8 or older and TensorRT 8.",
        "Install JetPack 6 or later; a Xavier, TX2 or Nano has none.",
        "developer.nvidia.com/embedded/jetpack-archive",
    ),
    Rule(
        _tensorrt_11_jetpack,
        "TensorRT 11 supports Jetsons from 11.4.1 and JetPack 7.2.2 on, on AGX Orin and Thor only.",
        "Keep the TensorRT 10 that comes with JetPack.",
        "docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-jetson.html",
    ),
    Rule(
        _sbsa_on_orin,
        "the SBSA build of TensorRT 10.13 has no code for compute capability 8.7.",
        "Use the TensorRT that comes with JetPack: 10.3 with JetPack 6, 10.16 with 7.2.",
        "NVIDIA-ISAAC-ROS/isaac-ros-cli issue 22",
    ),
    Rule(
        _cuda_13_driver,
        "engines are built, but do not run: CUDA 13 needs driver 580 or later.",
        "Install driver 580 or later, or the package for CUDA 12.",
        "docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html",
    ),
    Rule(
        _rtx_capability,
        "this TensorRT-RTX has no target for that compute capability.",
        "Use TensorRT for this GPU.",
        "the members of ComputeCapability in the installed package",
    ),
    Rule(
        _turing_int8,
        "TensorRT-RTX computes INT8 graphs in FP16 on this GPU, so INT8 gains nothing.",
        "Use the fp16 graph.",
        "the builder's own layer table for compute capability 7.5",
    ),
)


def find_clashes(facts: Facts, requirements: Requirements) -> tuple[Clash, ...]:
    """All clashes: by the table, and by what the installed packages themselves say they need."""
    found: list[Clash] = []
    for rule in RULES:
        parts = rule.look(facts)
        if parts is not None:
            found.append(Clash(parts, rule.problem, rule.cure, rule.source))
    for unmet in requirements.unmet:
        there = f"{unmet.found} is installed" if unmet.found else "it is not installed"
        found.append(
            Clash(unmet.by, f"it needs {unmet.needs}; {there}.", f"pip install '{unmet.needs}'", "its own metadata")
        )
    return tuple(found)
