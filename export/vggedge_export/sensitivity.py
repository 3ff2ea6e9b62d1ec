"""Which layers may be INT8 within an accuracy budget: each one's harm alone, then the plan that keeps most work.

The search never sees the images that prove the graph, so its choice cannot flatter the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vggedge_export.verification import Scores, divergence
from vggedge_runtime.errors import GateError
from vggedge_runtime.evidence import PlanPoint, PrecisionPlan, Sensitivity
from vggedge_runtime.paired import PairedChange, build_paired_change, score_interval
from vggedge_runtime.progress import Advance

_Z = 2.326
"""99 %: 95 % as at the gate, times the square root of 2. The proof is made on other images, and the difference of two
estimates has twice the variance of one; a plan that just kept the budget here would miss it there every other time."""

_SMALLEST_DIVERGENCE = 1e-12  # keeps layers without any apart by their work


@dataclass(frozen=True)
class Search:
    """What a search for a plan works on.

    Attributes:
        layers: names of the layers that can be INT8, in the order of the graph.
        macs: multiply-accumulates for one image of all convolutions and dense layers, by name.
        answer: from the layers in INT8 to the answers on the selection images, (n, classes).
        reference: the float graph's answers to them.
        targets: their classes, (n,).
        max_drop: the budget, points of accuracy.
        progress: told how many plans were tried.
    """

    layers: Sequence[str]
    macs: Mapping[str, int]
    answer: Callable[[frozenset[str]], Scores]
    reference: Scores
    targets: NDArray[np.int64]
    max_drop: float
    progress: Advance
    _alone: dict[str, PairedChange] = field(default_factory=dict, init=False, repr=False)
    _tried: dict[frozenset[str], PlanPoint] = field(default_factory=dict, init=False, repr=False)

    def run(self) -> PrecisionPlan:
        """Find the plan.

        1. Every layer is measured in INT8 alone. Its divergence over its work is the order of the next step.
        2. Starting with all in INT8, layers leave it, the most harmful for its work first, until the loss of the
           whole plan, measured and not added up, keeps the budget. Where none of these plans does, the layer of most
           work that keeps it alone is the plan.
        3. Those that left come back, the most work first, where the budget still holds: harm does not add up.

        Raises:
            GateError: not even one layer can be INT8.
        """
        sensitivities = self._sensitivities()
        chosen = self._come_back(self._leave([each.layer for each in sensitivities]))
        return PrecisionPlan(
            max_drop=self.max_drop,
            images=len(self.targets),
            total_macs=sum(self.macs.values()),
            chosen=chosen,
            sensitivities=sensitivities,
            tried=tuple(self._tried.values()),
            rule=self._rule(),
        )

    def _sensitivities(self) -> tuple[Sensitivity, ...]:
        found = []
        for number, layer in enumerate(self.layers):
            self.progress(number, len(self.layers), "measuring each layer in INT8")
            scores = self.answer(frozenset([layer]))
            harm = divergence(self.reference, scores)
            change = self._alone[layer] = self._change(scores)
            found.append(Sensitivity(layer=layer, macs=self.macs[layer], divergence=harm, change=change))
        self.progress(len(self.layers), len(self.layers), "measuring each layer in INT8")
        return tuple(sorted(found, key=lambda each: -max(each.divergence, _SMALLEST_DIVERGENCE) / each.macs))

    def _leave(self, order: Sequence[str]) -> PlanPoint:
        for count in range(len(order)):
            self.progress(count, len(order), "searching a plan")
            point = self._try(frozenset(order[:count]))
            if point.fits:
                break
        else:
            # The order goes by harm for the work: a layer of next to no work leaves early, and may still do no harm.
            point = self._try(frozenset(order) - {self._best_alone()})
        self.progress(len(order), len(order), "searching a plan")
        return point

    def _best_alone(self) -> str:
        """The layer of most work that keeps the budget where all others are in float."""
        fitting = [layer for layer, change in self._alone.items() if self._fits(change)]
        if fitting:
            return max(fitting, key=lambda layer: self.macs[layer])
        nearest, change = min(self._alone.items(), key=lambda each: self._most(each[1]))
        few = "" if self._can_be_decided() else ", which are too few to show of any that it does"
        raise GateError(
            f"no layer can be INT8 within {self.max_drop:g} points on {len(self.targets)} selection images{few}: "
            f"{nearest} alone loses {-change.points:.2f} points on them, at most {self._most(change):.2f} with 99 % "
            "confidence. Nothing was written. Choose on more images (--selection-images), allow more (--max-drop), "
            "leave INT8 out (--precision fp32,fp16), or fine-tune the model for it (vggedge finetune)."
        )

    def _come_back(self, point: PlanPoint) -> PlanPoint:
        left = sorted(point.float_layers, key=lambda layer: -self.macs[layer])
        for number, layer in enumerate(left):
            self.progress(number, len(left), "putting layers back into INT8")
            found = self._try(frozenset(point.float_layers) - {layer})
            point = found if found.fits else point
        if left:
            self.progress(len(left), len(left), "putting layers back into INT8")
        return point

    def _try(self, in_float: frozenset[str]) -> PlanPoint:
        if in_float in self._tried:
            return self._tried[in_float]
        in_int8 = frozenset(self.layers) - in_float
        is_measured = len(in_int8) == 1
        change = self._alone[next(iter(in_int8))] if is_measured else self._change(self.answer(in_int8))
        point = PlanPoint(
            float_layers=tuple(layer for layer in self.layers if layer in in_float),
            int8_share=sum(self.macs[layer] for layer in in_int8) / sum(self.macs.values()),
            change=change,
            fits=self._fits(change),
        )
        self._tried[in_float] = point
        return point

    def _change(self, scores: Scores) -> PairedChange:
        return build_paired_change(self.reference.argmax(1) == self.targets, scores.argmax(1) == self.targets)

    def _fits(self, change: PairedChange) -> bool:
        if self._can_be_decided():
            return self._most(change) <= self.max_drop
        return change.points >= 0

    def _can_be_decided(self) -> bool:
        """Whether the images are enough to say of a plan that changes nothing that it keeps the budget."""
        nothing = np.ones(len(self.targets), dtype=bool)
        return self._most(build_paired_change(nothing, nothing)) <= self.max_drop

    def _most(self, change: PairedChange) -> float:
        """Points that a plan with this change may lose at most, with the confidence of _Z."""
        return 100 * score_interval(change.lost, change.gained, change.n, _Z)[1]

    def _rule(self) -> str:
        if self._can_be_decided():
            return (
                f"the most INT8 work found whose loss is at most {self.max_drop:g} points with 99 % confidence, on "
                f"{len(self.targets)} selection images"
            )
        return (
            f"the most INT8 work found without any loss on {len(self.targets)} selection images, which are too few to "
            f"show of any plan that its loss is at most {self.max_drop:g} points"
        )
