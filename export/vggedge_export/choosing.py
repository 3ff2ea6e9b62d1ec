"""What is chosen by how INT8 answers: the calibrator, and the layers that may be INT8 at all.

Choices are made on selection images, which set no range and prove nothing, and with FP32 between the layers: what
FP16 adds is far below what INT8 does, and ONNX Runtime would have to be made to round to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vggedge_export.calibration import Activations
from vggedge_export.calibrators import CALIBRATORS
from vggedge_export.graph import Graph
from vggedge_export.quantization import QuantizationRecipe, input_scales, quantized_graph, quantized_layers
from vggedge_export.sensitivity import Search
from vggedge_export.verification import LabelledImages, Scores, divergence, graph_scores
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.evidence import CalibrationRecord, CalibratorScore, PrecisionPlan
from vggedge_runtime.preprocess import Pixels
from vggedge_runtime.progress import Advance, ignore_progress
from vggedge_runtime.statistics import build_proportion

AUTO = "auto"
CALIBRATOR_IMAGES = 500
"""Selection images that calibrators are compared on: their divergence is a mean over images and steady long before
an accuracy is."""


@dataclass
class Chooser:
    """Chooses on one set of images.

    Attributes:
        folder: for graphs that are only tried.
        ask_float: from images to the FP32 graph's answers.
        images: the selection images; None where nothing will have to be chosen.
        calibrator: a name from calibrators.py, or ``auto`` to choose.
        progress: told what goes on.
    """

    folder: Path
    ask_float: Callable[[Pixels], Scores]
    images: LabelledImages | None
    calibrator: str
    progress: Advance
    _float_scores: Scores | None = field(default=None, repr=False)

    def choose_scales(
        self, base: Graph, recipe: QuantizationRecipe, found: Activations, trained: Mapping[str, float] | None
    ) -> tuple[dict[str, float], CalibrationRecord]:
        """(scale of every quantised layer's input, where it comes from).

        Args:
            base: FP32 graph that is to be quantised.
            recipe: how.
            found: what its tensors hold over the calibration images.
            trained: input magnitudes by layer that quantisation-aware training fixed, which are then taken.

        Raises:
            ModelError: ``trained`` lacks a layer.
        """
        layers = quantized_layers(base, recipe)
        if trained is not None:
            if missing := [layer.name for layer in layers if layer.name not in trained]:
                raise ModelError(
                    f"the trained INT8 ranges have none for {', '.join(missing)}. They belong to another model or to "
                    "another choice of layers; fine-tune again, or remove the ranges file beside the model."
                )
            return input_scales(base, recipe, trained), CalibrationRecord(method="trained")

        def scales_by(method: str) -> dict[str, float]:
            return input_scales(base, recipe, {layer.name: found.magnitude(layer.input[0], method) for layer in layers})

        if self.calibrator != AUTO:
            return scales_by(self.calibrator), CalibrationRecord(method=self.calibrator)
        images = self._selection().images
        images = images[spread_rows(len(images), CALIBRATOR_IMAGES)]
        candidates = []
        for number, method in enumerate(CALIBRATORS):
            self.progress(number, len(CALIBRATORS), "comparing calibrators")
            scores = self._try(quantized_graph(base, recipe, scales_by(method)), images)
            candidates.append(self._score(method, scores))
        self.progress(len(CALIBRATORS), len(CALIBRATORS), "comparing calibrators")
        best = min(candidates, key=lambda each: each.divergence)
        return scales_by(best.method), CalibrationRecord(method=best.method, candidates=tuple(candidates))

    def find_plan(
        self,
        base: Graph,
        recipe: QuantizationRecipe,
        scales: Mapping[str, float],
        macs: Mapping[str, int],
        max_drop: float,
    ) -> PrecisionPlan:
        """Which of the layers in ``scales`` may be INT8 within ``max_drop`` points.

        Raises:
            GateError: none.
        """
        images = self._selection().images

        def answer(in_int8: frozenset[str]) -> Scores:
            return self._try(quantized_graph(base, recipe, {name: scales[name] for name in in_int8}), images)

        return Search(
            layers=list(scales),
            macs=macs,
            answer=answer,
            reference=self._reference(),
            targets=self._selection().targets,
            max_drop=max_drop,
            progress=self.progress,
        ).run()

    def _score(self, method: str, scores: Scores) -> CalibratorScore:
        wanted = self._reference()[spread_rows(len(self._selection().images), CALIBRATOR_IMAGES)]
        same = int((scores.argmax(1) == wanted.argmax(1)).sum())
        return CalibratorScore(
            method=method, divergence=divergence(wanted, scores), agreement=build_proportion(same, len(scores))
        )

    def _reference(self) -> Scores:
        if self._float_scores is None:
            self._float_scores = self.ask_float(self._selection().images)
        return self._float_scores

    def _try(self, graph: Graph, images: Pixels) -> Scores:
        scratch = self.folder / "candidate.onnx"
        graph.write(scratch)
        del graph
        scores = graph_scores(scratch, images, "", ignore_progress)
        scratch.unlink()
        return scores

    def _selection(self) -> LabelledImages:
        if self.images is None:
            raise UsageError(
                "there are no selection images, and calibrator=auto and max_drop choose by how INT8 answers. Give some "
                "that neither calibrate nor prove, or name a calibrator and set no limit."
            )
        return self.images


def spread_rows(length: int, count: int) -> NDArray[np.int64]:
    """``count`` of ``length`` rows, or all, evenly spread: a folder's images come class by class."""
    kept = min(count, length)
    return np.arange(kept, dtype=np.int64) * length // kept
