"""What is chosen by how INT8 answers: the calibrator, and the layers that may be INT8 at all.

Choices are made on selection images, which set no range and prove nothing, and with FP32 between the layers: what
FP16 adds is far below what INT8 does, and ONNX Runtime would have to be made to round to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vggedge_export.calibration import METHODS, Activations
from vggedge_export.graph import Graph
from vggedge_export.quantization import QuantizationRecipe, input_scales, quantized_graph, quantized_layers
from vggedge_export.sensitivity import Search
from vggedge_export.verification import LabelledImages, Scores, divergence, graph_scores, spread_rows
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
        calibrator: one of calibration.METHODS, or ``auto`` to choose.
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
                    f"the trained INT8 ranges have none for {', '.join(missing)}. Leave --int8-last out, if it was "
                    "given: fine-tuning leaves that layer in float. Else the ranges belong to another model: fine-tune "
                    "again, or remove the ranges file beside the model."
                )
            return input_scales(base, recipe, trained), CalibrationRecord(method="trained")

        def scales_by(method: str) -> dict[str, float]:
            return input_scales(base, recipe, {layer.name: found.magnitude(layer.input[0], method) for layer in layers})

        if self.calibrator != AUTO:
            return scales_by(self.calibrator), CalibrationRecord(method=self.calibrator)
        images = self._selection().images
        images = images[spread_rows(len(images), CALIBRATOR_IMAGES)]
        candidates = []
        for number, method in enumerate(METHODS):
            self.progress(number, len(METHODS), "comparing calibrators")
            scores = self._try(quantized_graph(base, recipe, scales_by(method)), images)
            candidates.append(self._score(method, scores))
        self.progress(len(METHODS), len(METHODS), "comparing calibrators")
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
            GateError: not even one.
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
            method=method,
            equalized=False,
            divergence=divergence(wanted, scores),
            agreement=build_proportion(same, len(scores)),
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
