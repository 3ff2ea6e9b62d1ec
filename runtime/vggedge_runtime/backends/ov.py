"""OpenVINO on the CPU: what runs the int8 graph at the speed of INT8 where there is no GPU."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vggedge_runtime.backends.base import Backend, Probabilities
from vggedge_runtime.backends.openvino_steps import use_unsigned_steps
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import SessionError
from vggedge_runtime.preprocess import Pixels

_ONE_BY_ONE = 4
"""Up to so many images run one after the other: that takes up to a fifth more time than a batch of them, but it saves
the second model, and the golden images meet what will answer single ones."""


def has_exact_int8(machine: str, cpuinfo: str) -> bool | None:
    """Whether OpenVINO's INT8 convolutions add exactly on this CPU; None where that was not measured.

    Without VNNI, x86 adds the products of bytes in 16 bits, and they overflow (OpenVINO's documentation: "Saturation
    (overflow) issue"). With oneDNN held to AVX2, or to AVX-512 without VNNI, the golden images of three of five int8
    graphs were off by 0.3 to 0.9.

    Args:
        machine: as ``platform.machine()`` names it.
        cpuinfo: content of /proc/cpuinfo; empty if there is none.
    """
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), None)
    if machine not in {"x86_64", "AMD64"} or flags is None:
        return None
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags.split())


def _ask_cpu() -> bool | None:
    path = Path("/proc/cpuinfo")
    return has_exact_int8(platform.machine(), path.read_text("utf-8", "replace") if path.exists() else "")


_EXACT_INT8 = _ask_cpu()


class OpenVinoBackend(Backend):
    """Runs a graph through ``openvino.Core``, in FP32 and INT8 only: FP16 tensors are FP32 on its CPU plugin.

    ``auto`` takes INT8 where it was seen to be right and faster: on x86 with VNNI.
    """

    name = "openvino"
    module = "openvino"
    precisions = ("int8", "fp32") if _EXACT_INT8 else ("fp32",)
    computes_fp16_as_fp32 = True

    def _load(self, graph: Path, threads: int) -> None:
        self._openvino: Any = require("openvino", "openvino")
        try:
            self._core = self._openvino.Core()
            self._model = self._core.read_model(str(graph))
        except Exception as error:  # RuntimeError, or what its readers raise
            raise _loading_error(graph, error) from error
        self._check(graph)
        # Nothing is left to a default that depends on the CPU: where it has bfloat16, that would be taken for FP32.
        self._settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        self._shape = list(self._model.inputs[0].partial_shape)[1:]
        self._large: Any = None
        try:
            use_unsigned_steps(self._model)
            self._small: Any = self._compile(1)  # a batch left open costs a single image a third more time
            # Set once, the input costs 9 us a call less than handed over each time: a tenth of a compact VGG's latency.
            self._held: Any = np.empty(self._small.get_compiled_model().inputs[0].shape, np.uint8)
            self._small.set_input_tensor(self._openvino.Tensor(self._held, shared_memory=True))
            self._made = self._small.get_output_tensor().data
        except Exception as error:
            raise _loading_error(graph, error) from error

    def _check(self, graph: Path) -> None:
        inputs = [each.any_name for each in self._model.inputs]
        if inputs != ["images"]:
            raise SessionError(
                f"{graph}: takes the input {', '.join(inputs)}, needed is images alone. Export the bundle again."
            )
        if _EXACT_INT8 is False and _is_quantized(self._model.get_ordered_ops()):
            raise SessionError(
                f"{graph}: is quantised, and this CPU has neither AVX-512 VNNI nor AVX-VNNI, without which OpenVINO's "
                "INT8 sums overflow. Take --precision fp32, or --backend ort for the right INT8 answers, slowly."
            )

    def _compile(self, batch: int) -> Any:
        """A request for batches of ``batch`` images, -1 for any."""
        self._model.reshape([batch, *self._shape])
        return self._core.compile_model(self._model, "CPU", self._settings).create_infer_request()

    def _run(self, images: Pixels) -> Probabilities:
        try:
            if len(images) == 1:
                return self._run_one(images)
            if len(images) <= _ONE_BY_ONE:
                return np.concatenate([self._run_one(images[i : i + 1]) for i in range(len(images))])
            if self._large is None:
                # One for all sizes: those of their own are 15 % faster, and each holds the weights once more.
                self._large = self._compile(-1)
            answer: Probabilities = self._large.infer({0: np.ascontiguousarray(images)})[0]
        except Exception as error:  # RuntimeError
            raise SessionError(
                f"OpenVINO fails on images of shape {images.shape} ({error}). Try another batch size or precision."
            ) from error
        return answer

    def _run_one(self, images: Pixels) -> Probabilities:
        self._held[:] = images
        self._small.infer(share_outputs=True)  # else it copies them into a dictionary that nobody reads
        answer: Probabilities = self._made.copy()
        return answer

    def _close(self) -> None:
        # Requests before the model they came from, and that before its library.
        self._made = self._held = None
        self._small = self._large = self._model = self._core = None


def _is_quantized(nodes: Sequence[Any]) -> bool:
    return any(node.get_type_name() == "FakeQuantize" for node in nodes)


def _loading_error(graph: Path, error: Exception) -> SessionError:
    return SessionError(f"{graph}: OpenVINO cannot load it ({error}). Export the bundle again, or try --backend ort.")
