"""Makes every graph of a bundle from the FP32 one, and proves each on images that had no part in making it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from vggedge_export.calibration import METHODS, Activations, Calibration
from vggedge_export.choosing import AUTO, Chooser
from vggedge_export.completion import layer_name
from vggedge_export.equalization import equalized_graph
from vggedge_export.float16 import float16_graph, has_float16, overflowing_nodes, rounding_twin
from vggedge_export.graph import Graph
from vggedge_export.layers import layer_macs, layer_outputs, layer_records, signal_to_noise
from vggedge_export.plots import write_plan_plot
from vggedge_export.quantization import (
    INT8,
    INT8_RTX,
    QuantizationRecipe,
    quantized_graph,
    quantized_layers,
    underflowing_layers,
)
from vggedge_export.verification import (
    Images,
    Scores,
    batch_for,
    check_alone,
    check_equal,
    check_parity,
    compare_scores,
    graph_scores,
    spread_rows,
)
from vggedge_runtime.bundle import GraphRecord
from vggedge_runtime.errors import GateError, UsageError
from vggedge_runtime.evidence import CalibrationRecord, GateRecord, Obtained, PrecisionPlan
from vggedge_runtime.graphs import GRAPHS, PRECISIONS, graphs_of
from vggedge_runtime.paired import Verdict, check_limit, judge_drop
from vggedge_runtime.preprocess import Pixels
from vggedge_runtime.progress import Advance, ignore_progress

_MIXED = {"int8": "mixed", "int8-rtx": "mixed-rtx"}
"""What an INT8 graph is called once some of its layers had to stay in float."""


class PrecisionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which graphs to make, and what they may cost in accuracy.

    Attributes:
        precisions: of fp32, fp16, int8; fp32 is always made, the others come from it.
        calibrator: how INT8 ranges are set: ``auto`` compares all on the selection images and takes the best.
        quantize_first: the first convolution in INT8, too; the most sensitive layer.
        quantize_last: the layer that makes the logits in INT8, too.
        max_drop: points of accuracy that a graph may lose against fp32. INT8 graphs that lose more become mixed
            ones; a graph that still does is not shipped. None sets no limit.
        accept_undecided: ship a graph, too, for which the evaluation images are too few to decide.
    """

    precisions: tuple[str, ...] = PRECISIONS
    calibrator: str = AUTO
    quantize_first: bool = True
    quantize_last: bool = False
    max_drop: float | None = None
    accept_undecided: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.precisions if name not in PRECISIONS]
        if unknown or not self.precisions:
            raise UsageError(f"precisions are {self.precisions}; known: {', '.join(PRECISIONS)}.")
        if self.calibrator not in (AUTO, *METHODS):
            raise UsageError(f"calibrator is {self.calibrator!r}; known: {AUTO}, {', '.join(METHODS)}.")
        if self.max_drop is not None:
            check_limit(self.max_drop)
        if self.accept_undecided and self.max_drop is None:
            raise UsageError(
                "--accept-undecided without --max-drop: there is no limit that images could be too few for. Set one."
            )

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs to make, fp32 first; an INT8 one may come out as the mixed one of its kind."""
        wanted = [g for p in PRECISIONS if p == "fp32" or p in self.precisions for g in graphs_of(p)]
        return tuple(name for name in wanted if name not in _MIXED.values())

    @property
    def needs_selection(self) -> bool:
        """Whether something is chosen by how it answers, so that images are needed to choose on."""
        return self.has_plan or ("int8" in self.precisions and self.calibrator == AUTO)

    @property
    def has_plan(self) -> bool:
        """Whether the layers that may be INT8 are searched for."""
        return "int8" in self.precisions and self.max_drop is not None

    def recipe(self, name: str) -> QuantizationRecipe:
        """The recipe of the graph ``int8`` or ``int8-rtx``."""
        recipe = {"int8": INT8, "int8-rtx": INT8_RTX}[name]
        return replace(recipe, quantize_first=self.quantize_first, quantize_last=self.quantize_last)


@dataclass
class GraphMaker:
    """Makes each graph, writes it, proves it, and keeps its answers to the evaluation images.

    Attributes:
        folder: of the bundle that is being written.
        graph: the FP32 graph; not changed.
        labels: class names.
        images: what to calibrate, choose and prove on.
        config: what to make.
        ranges: input magnitudes of layers that quantisation-aware training fixed, for the graph ``int8``.
        cache: folder for calibrations; None keeps none.
        progress: told what goes on.
    """

    folder: Path
    graph: Graph
    labels: tuple[str, ...]
    images: Images
    config: PrecisionConfig
    ranges: Mapping[str, float] | None = None
    cache: Path | None = None
    progress: Advance = ignore_progress

    def __post_init__(self) -> None:
        self.answers: dict[str, Scores] = {}
        self.records: dict[str, GraphRecord] = {}
        self.verdicts: dict[str, Verdict] = {}
        self._found: dict[bool, Activations] = {}
        self._chooser = Chooser(
            self.folder, self._ask_fp32, self.images.selection, self.config.calibrator, self.progress
        )

    def make_all(self, reference: Scores) -> dict[str, GraphRecord]:
        """Make all graphs, fp32 first; ``reference`` is what Keras answers to the evaluation images.

        Raises:
            GateError: a graph loses more than the limit, or the images are too few to tell.
        """
        (self.folder / "graphs").mkdir()
        self._prove("fp32", self.graph, reference, _Facts(layer_macs(self.graph)), _Record())
        check_parity(self.records["fp32"].evidence)
        for name in self.config.graphs[1:]:
            if name == "fp16":
                self._make_fp16()
            else:
                self._make_int8(name)
        return self.records

    @property
    def gate(self) -> GateRecord | None:
        """The limit and the verdicts; None where no limit was set."""
        if self.config.max_drop is None:
            return None
        return GateRecord(
            max_drop=self.config.max_drop,
            accept_undecided=self.config.accept_undecided,
            verdicts=self.verdicts,
        )

    def _make_fp16(self) -> None:
        found = self._measure(self.graph, is_even=False)
        facts = self._facts(self.graph, found)
        wide = overflowing_nodes(self.graph, found.largest)
        record = _Record(kept_fp32=_layers(self.graph, wide))
        self._prove("fp16", float16_graph(self.graph, wide), self.answers["fp32"], facts, record)

    def _make_int8(self, name: str) -> None:
        """Ranges come from the FP32 graph or its equalised form; types from that or from its FP16 cast."""
        recipe = self.config.recipe(name)
        chosen = self._choose_base(name, recipe)
        base = self._base(chosen.calibration.equalized)
        facts = self._facts(base, chosen.found)
        plan = None
        if self.config.max_drop is not None:
            plan = self._chooser.find_plan(base, recipe, chosen.scales, facts.macs, self.config.max_drop)
        in_float = plan.chosen.float_layers if plan else ()
        if in_float:
            name = _MIXED[name]
        facts = replace(facts, scales={layer: scale for layer, scale in chosen.scales.items() if layer not in in_float})
        record = _Record(calibration=chosen.calibration, plan=plan)
        del chosen
        if name != "int8":  # in FP16 between the layers
            wide, small = overflowing_nodes(base, facts.largest), underflowing_layers(base, facts.scales)
            record = replace(record, kept_fp32=_layers(base, wide), fp32_scales=small)
            base = float16_graph(base, {*wide, *small})  # lets the FP32 weights of an equalised graph go
        graphs = [quantized_graph(base, recipe, facts.scales)]
        del base
        self._prove(name, graphs.pop(), self.answers["fp32"], facts, record)  # alone, it can let the weights go
        if plan is not None:
            (self.folder / "plans").mkdir(exist_ok=True)
            write_plan_plot(plan, name, self.folder / "plans" / f"{name}.png")

    def _choose_base(self, name: str, recipe: QuantizationRecipe) -> _Base:
        """Which FP32 graph to quantise, by which scales: equalised for TensorRT-RTX, else whichever answers better.

        Equalisation is free where it helps: it changes weights and no operation. It cannot go with trained ranges,
        which are those of the model as it is.
        """
        trained = self.ranges if name == "int8" else None
        may_choose = self.config.calibrator == AUTO and trained is None
        variants = (True,) if name == "int8-rtx" else (False, True) if may_choose else (False,)
        bases = []
        for is_even in variants:
            graph = self._base(is_even)
            difference = self._check_equalized(graph) if is_even else None
            found = self._measure(graph, is_even)
            scales, calibration = self._chooser.choose_scales(graph, recipe, found, trained)
            calibration = msgspec.structs.replace(
                calibration,
                equalized=is_even,
                equalization_difference=difference,
                candidates=tuple(msgspec.structs.replace(each, equalized=is_even) for each in calibration.candidates),
            )
            bases.append(_Base(found, scales, calibration))
            del graph  # the full VGG-16 has room for one copy of its weights
        best = min(bases, key=lambda each: min((score.divergence for score in each.calibration.candidates), default=0))
        tried = tuple(score for each in bases for score in each.calibration.candidates)
        return replace(best, calibration=msgspec.structs.replace(best.calibration, candidates=tried))

    def _base(self, is_even: bool) -> Graph:
        return equalized_graph(self.graph) if is_even else self.graph

    def _check_equalized(self, graph: Graph) -> float:
        """Largest difference of a probability that equalisation made; ConversionError if it is more than rounding."""
        images, scratch = self.images.evaluation.images, self.folder / "equalized.onnx"
        rows = spread_rows(len(images), 4 * batch_for(images))
        graph.write(scratch)
        scores = graph_scores(scratch, images[rows], "proving equalisation", self.progress)
        scratch.unlink()
        difference = float(np.abs(scores - self.answers["fp32"][rows]).max())
        check_equal(difference, "the equalised graph", "the FP32 graph", len(rows))
        return difference

    def _prove(self, name: str, graph: Graph, reference: Scores, facts: _Facts, record: _Record) -> None:
        """Write ``graph``, let it or its rounding twin answer, compare, judge, and record all that."""
        file, evaluation = f"graphs/model.{name}.onnx", self.images.evaluation
        graph.write(self.folder / file)
        has_fp16 = has_float16(graph)
        obtained: Obtained = "emulated" if has_fp16 else "measured"
        twin = rounding_twin(graph) if has_fp16 else graph
        noise = signal_to_noise(facts.outputs, self._outputs(twin)) if facts.outputs else {}
        layers = layer_records(graph, facts.macs, largest=facts.largest, scales=facts.scales, snr_db=noise)
        counts = graph.op_counts()
        runnable = self.folder / file
        if has_fp16:
            runnable = self.folder / "twin.onnx"
            twin.write(runnable)
        del graph, twin  # ONNX Runtime is about to hold the weights once more
        scores = graph_scores(runnable, evaluation.images, f"proving {name}", self.progress)
        if name == "fp32":
            check_alone(runnable, evaluation.images)
        if has_fp16:
            runnable.unlink()
        evidence = compare_scores(
            reference,
            scores,
            evaluation.targets,
            labels=self.labels,
            against="keras" if name == "fp32" else "fp32",
            obtained=obtained,
        )
        self.answers[name] = scores
        self.records[name] = GraphRecord(
            file=file,
            precision=GRAPHS[name].precision,
            made_for=GRAPHS[name].made_for,
            op_counts=counts,
            evidence=evidence,
            layers=layers,
            calibration=record.calibration,
            plan=record.plan,
            kept_fp32=record.kept_fp32,
            fp32_scales=record.fp32_scales,
        )
        self._judge(name)

    def _judge(self, name: str) -> None:
        change = self.records[name].evidence.change
        if self.config.max_drop is None or change is None or name == "fp32":
            return
        verdict = self.verdicts[name] = judge_drop(change, self.config.max_drop)
        if verdict.decision == "fail":
            tune = ", or fine-tune the model for INT8 (vggedge finetune)" if GRAPHS[name].precision == "int8" else ""
            raise GateError(
                f"{name}: {verdict.describe()}. Nothing was written. Allow more (--max-drop), or leave that precision "
                f"out (--precision){tune}."
            )
        if verdict.decision == "undecided" and not self.config.accept_undecided:
            # Where no number of images would decide, more of them are no advice.
            more = "prove on more images (--evaluation, --evaluation-images), " if verdict.images_needed else ""
            raise GateError(
                f"{name}: {verdict.describe()}. Nothing was written. To go on, {more}allow more (--max-drop), or let "
                "it pass as it is (--accept-undecided)."
            )

    def _ask_fp32(self, images: Pixels) -> Scores:
        return graph_scores(self.folder / self.records["fp32"].file, images, "asking fp32", self.progress)

    def _measure(self, graph: Graph, is_even: bool) -> Activations:
        """What the float tensors of ``graph``, equalised or not, hold over the calibration images; measured once."""
        if is_even in self._found:
            return self._found[is_even]
        tensors: list[str] = []
        if "int8" in self.config.precisions:
            tensors = [layer.input[0] for layer in quantized_layers(graph, self.config.recipe("int8"))]
        images = self.images.calibration.images
        calibration = Calibration(
            images, batch_for(images), self.folder / "calibration.onnx", self.progress, self.cache
        )
        found = calibration.measure(graph, tensors, with_histograms=self.config.calibrator != "max")
        self._found[is_even] = found
        return found

    def _facts(self, base: Graph, found: Activations) -> _Facts:
        return _Facts(layer_macs(base), found.largest, self._outputs(base))

    def _outputs(self, graph: Graph) -> dict[str, NDArray[np.float32]]:
        images = self.images.evaluation.images
        rows = spread_rows(len(images), 2 * batch_for(images))
        return layer_outputs(graph, images[rows], self.folder / "layers.onnx")


@dataclass(frozen=True)
class _Base:
    """How an FP32 graph is to be quantised, equalised or not (``calibration.equalized``)."""

    found: Activations
    scales: dict[str, float]
    calibration: CalibrationRecord


@dataclass(frozen=True)
class _Record:
    """What the manifest says of how a graph was made; the fields are GraphRecord's."""

    calibration: CalibrationRecord | None = None
    plan: PrecisionPlan | None = None
    kept_fp32: dict[str, float] = field(default_factory=dict)
    fp32_scales: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Facts:
    """What is known of the float graph that another one is made from; no weights."""

    macs: dict[str, int]
    largest: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)


def _layers(graph: Graph, nodes: Mapping[str, float]) -> dict[str, float]:
    """Layers that these nodes of ``graph`` belong to, each with the largest magnitude that one of them met."""
    largest: dict[str, float] = {}
    for node in graph.nodes:
        if node.name in nodes:
            layer = layer_name(node)
            largest[layer] = max(nodes[node.name], largest.get(layer, 0.0))
    return largest
