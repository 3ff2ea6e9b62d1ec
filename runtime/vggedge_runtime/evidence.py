"""What a bundle's manifest says in proof of a graph: the records, without the work that fills them."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from vggedge_runtime.paired import ClassChange, Flip, PairedChange, Verdict
from vggedge_runtime.statistics import Proportion

Obtained: TypeAlias = Literal["measured", "emulated"]
"""``measured`` if this very graph ran; ``emulated`` if its rounding twin did, because ONNX Runtime computes FP16 in
FP32 on a CPU and would prove nothing."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """How a graph answers beside the one it was made from, on the same images.

    Attributes:
        against: ``keras`` or the name of a graph.
        obtained: whether this very graph ran.
        images: number of images.
        max_abs_difference: largest difference of any probability.
        agreement: images whose top-1 class is the same on both sides.
        accuracy: images whose top-1 class is the true one.
        change: of the accuracy, image by image; None in bundles from before this field, as the next two.
        classes: the same for each class, in the order of the labels.
        flips: images whose top-1 class differs, those first on which the reference was surest; the first 50 of them
            (``agreement`` has their number).
    """

    against: str
    obtained: Obtained
    images: int
    max_abs_difference: float
    agreement: Proportion
    accuracy: Proportion
    change: PairedChange | None = None
    classes: tuple[ClassChange, ...] = ()
    flips: tuple[Flip, ...] = ()


class LayerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One convolution or dense layer of a graph.

    Attributes:
        name: of the layer, as its author knows it.
        op: ONNX operator.
        precision: what it computes in.
        macs: multiply-accumulates for one image.
        largest_output: largest magnitude it gave on the calibration images; None where that was not measured.
        int8_magnitude: input magnitude that INT8 step 127 stands for; None where its input is not INT8.
        snr_db: power of its output in the float graph over the power of the difference, decibels; None where there
            is no difference at all, as in the fp32 graph itself.
    """

    name: str
    op: str
    precision: Literal["fp32", "fp16", "int8"]
    macs: int
    largest_output: float | None = None
    int8_magnitude: float | None = None
    snr_db: float | None = None


class CalibratorScore(msgspec.Struct, frozen=True, kw_only=True):
    """What one way to set INT8 ranges costs.

    Attributes:
        method: its name.
        equalized: whether the layers were equalised before.
        divergence: mean Kullback-Leibler divergence of the INT8 answers from the float ones, nats an image.
        agreement: images whose top-1 class is the same.
    """

    method: str
    equalized: bool = False
    divergence: float
    agreement: Proportion


class CalibrationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where the INT8 ranges of a graph come from.

    Attributes:
        method: the calibrator taken, or ``trained``: ranges that quantisation-aware training fixed.
        equalized: whether the layers were equalised before (Nagel et al. 2019, arXiv 1906.04721).
        equalization_difference: largest difference of a probability that this made, with everything in FP32; None
            where it was not done.
        candidates: all that were compared, on selection images and with FP32 between the layers; empty where one
            was asked for.
    """

    method: str
    equalized: bool = False
    equalization_difference: float | None = None
    candidates: tuple[CalibratorScore, ...] = ()


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True):
    """What one layer in INT8, and all others in float, does to the answers.

    Attributes:
        layer: its name.
        macs: its multiply-accumulates for one image.
        divergence: mean Kullback-Leibler divergence from the float answers, nats an image.
        change: of the accuracy.
    """

    layer: str
    macs: int
    divergence: float
    change: PairedChange


class PlanPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One plan that was tried.

    Attributes:
        float_layers: quantisable layers that it leaves in float.
        int8_share: share of all convolutions' and dense layers' multiply-accumulates that is INT8, 0 to 1.
        change: of the accuracy, on the selection images.
        fits: whether the loss on these images can be said to keep the budget.
    """

    float_layers: tuple[str, ...]
    int8_share: float
    change: PairedChange
    fits: bool


class PrecisionPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Which layers of a graph are INT8, and why.

    Attributes:
        max_drop: the budget, points of accuracy.
        images: selection images it was found on; never those that prove the graph.
        total_macs: multiply-accumulates for one image of all convolutions and dense layers.
        chosen: the plan taken.
        sensitivities: of every quantisable layer, the most harmful for its work first: the order in which layers
            left INT8.
        tried: all plans, in the order of the search.
        rule: how the plan was chosen, in words.
    """

    max_drop: float
    images: int
    total_macs: int
    chosen: PlanPoint
    sensitivities: tuple[Sensitivity, ...]
    tried: tuple[PlanPoint, ...]
    rule: str


class GateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The limit that export was given.

    Attributes:
        max_drop: points of accuracy that a graph may lose against fp32.
        accept_undecided: whether a graph was let through for which the images were too few to decide.
        verdicts: by graph.
    """

    max_drop: float
    accept_undecided: bool
    verdicts: dict[str, Verdict]
