"""ONNX Runtime on the CPU: the embedded default, and the proof of every graph's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vggedge_runtime.backends.base import Backend, Probabilities
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import SessionError
from vggedge_runtime.preprocess import Pixels


class OrtBackend(Backend):
    """Runs a graph through ``onnxruntime.InferenceSession``."""

    name = "ort"
    module = "onnxruntime"
    precisions = ("fp32",)  # it fuses nothing of the Q/DQ graphs
    computes_fp16_as_fp32 = True

    def _load(self, graph: Path, threads: int) -> None:
        self._session: Any = open_ort_session(graph, threads=threads)
        inputs = [each.name for each in self._session.get_inputs()]
        if inputs != ["images"]:
            raise SessionError(
                f"{graph}: takes the input {', '.join(inputs)}, needed is images alone. Export the bundle again."
            )

    def _run(self, images: Pixels) -> Probabilities:
        try:
            answer: Probabilities = self._session.run(None, {"images": images})[0]
        except Exception as error:  # its own exception types are not public
            raise SessionError(
                f"ONNX Runtime fails on images of shape {images.shape} ({error}). Try another batch size or precision."
            ) from error
        return answer

    def _close(self) -> None:
        self._session = None


def open_ort_session(graph: Path | bytes, *, threads: int = 0, prepack: bool = True) -> Any:
    """``onnxruntime.InferenceSession`` on the CPU for a graph file or its bytes.

    Args:
        graph: the file or its bytes.
        threads: of one inference; 0 leaves the number to the library.
        prepack: lay weights out anew for speed, which takes their memory once more for each node that reads them.

    Raises:
        MissingDependency: onnxruntime is not installed.
        SessionError: ONNX Runtime refuses the graph.
    """
    ort = require("onnxruntime", "ort")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # VGG is a chain; nothing runs side by side
    options.log_severity_level = 3
    # The graph runs as it was exported. ONNX Runtime would otherwise turn the float biases of a Q/DQ graph into
    # int32 steps, in FP16 where the graph is FP16: above 65504 steps they overflow, probabilities off by 1e-1.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exception types are not public
        shown = "a graph in memory" if isinstance(graph, bytes) else graph
        raise SessionError(f"{shown}: ONNX Runtime cannot load it ({error}).") from error
