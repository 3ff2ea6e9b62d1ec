"""Proves a bundle again: its graphs answer labelled images on this machine, and are compared and judged as at export.

Nothing is written. FP32 and INT8 graphs need a backend only; a graph with FP16 needs one that computes FP16, or the
export extra for its rounding twin.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from vggedge_export.float16 import rounding_twin
from vggedge_export.graph import read_graph
from vggedge_export.verification import LabelledImages, Scores, batch_for, compare_scores, graph_scores
from vggedge_runtime.backends.base import load_backend_class
from vggedge_runtime.backends.ort import OrtBackend
from vggedge_runtime.bundle import Bundle, DataRecord, GraphRecord
from vggedge_runtime.device import describe_environment
from vggedge_runtime.errors import BundleError, GateError, MissingDependency, UsageError
from vggedge_runtime.evidence import Comparison, Obtained
from vggedge_runtime.graphs import PRECISIONS, graphs_of
from vggedge_runtime.paired import Verdict, check_limit, find_flips, judge_drop
from vggedge_runtime.progress import Advance, ignore_progress
from vggedge_runtime.session import Session
from vggedge_runtime.statistics import Proportion

REFERENCE = "fp32"


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """What a graph may lose against fp32.

    Attributes:
        max_drop: points of accuracy.
        accept_undecided: whether a graph is let through for which the images are too few to decide.
        source: who set it: ``user``, or the ``manifest``, where export keeps its own.
    """

    max_drop: float
    accept_undecided: bool
    source: Literal["user", "manifest"]


class FlippedImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image to which fp32 and another graph answer different classes.

    Attributes:
        image: where to find it: a file, or its number in the data.
        true: its class.
        reference: what fp32 says.
        candidate: what the graph says.
        reference_margin: how far fp32's first class is above its second, probability from 0 to 1.
        candidate_margin: the same of the graph.
    """

    image: str
    true: str
    reference: str
    candidate: str
    reference_margin: float
    candidate_margin: float


class GraphProof(msgspec.Struct, frozen=True, kw_only=True):
    """What one graph answers here. ``backend`` to ``right_difference`` are None where it could not be proved.

    Attributes:
        name: of the graph.
        in_manifest: its accuracy as export found it.
        not_proved: why nothing could be shown of it on this machine, and what would help; None if it was proved.
        backend: what ran it, or its rounding twin.
        obtained: whether this very graph ran.
        accuracy: images whose top-1 class is the true one.
        comparison: with fp32 on the same backend; its flips are in ``flips``. None for fp32 itself.
        right_difference: right answers here minus those in the manifest, where export proved on the same images.
        intervals_overlap: whether both accuracies' 95 % intervals do, where it proved on others.
        flips: all images with another answer than fp32's, those first on which fp32 was surest.
        verdict: whether it keeps the limit; None without a limit, and for fp32.
    """

    name: str
    in_manifest: Proportion
    not_proved: str | None = None
    backend: str | None = None
    obtained: Obtained | None = None
    accuracy: Proportion | None = None
    comparison: Comparison | None = None
    right_difference: int | None = None
    intervals_overlap: bool | None = None
    flips: tuple[FlippedImage, ...] = ()
    verdict: Verdict | None = None


class Reproof(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a bundle's evidence on this machine.

    Attributes:
        bundle: the folder.
        data: the images that it was proved on.
        used_for: what export used these very images for, by their pixels: ``evaluation``, ``calibration`` or
            ``selection``; None for others.
        limit: what decides; None where nothing is judged.
        graphs: fp32 first.
        environment: this machine and its versions.
    """

    bundle: str
    data: DataRecord
    used_for: str | None
    limit: Limit | None
    graphs: tuple[GraphProof, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class ReproofConfig:
    """Choices of one proof.

    Attributes:
        backend: ``auto`` or a backend's name.
        precisions: names of precisions, each all of its graphs, or of graphs; all graphs if None. fp32 always answers.
        max_drop: points of accuracy that a graph may lose; None takes the manifest's limit, where it has one.
        accept_undecided: let a graph through, too, for which the images are too few to decide.
    """

    backend: str = "auto"
    precisions: tuple[str, ...] | None = None
    max_drop: float | None = None
    accept_undecided: bool = False

    def __post_init__(self) -> None:
        if self.max_drop is not None:
            check_limit(self.max_drop)
        if self.precisions is not None and not self.precisions:
            raise UsageError(f"no precision is named; known: {', '.join(PRECISIONS)}, and the graphs of the bundle.")


def check_files(bundle: Bundle, progress: Advance = ignore_progress) -> None:
    """Raise BundleError, with its name, for the first file that is missing or not what export wrote."""
    names = list(bundle.manifest.files)
    for index, name in enumerate(names):
        bundle.verified_path(name)
        progress(index + 1, len(names), "checking files")


def choose_limit(bundle: Bundle, config: ReproofConfig) -> Limit | None:
    """The user's limit, else the one that export had to keep, else None.

    Raises:
        UsageError: ``accept_undecided`` where there is no limit to decide on.
    """
    gate = bundle.manifest.gate
    if config.max_drop is not None:
        return Limit(max_drop=config.max_drop, accept_undecided=config.accept_undecided, source="user")
    if gate is not None:
        accept = config.accept_undecided or gate.accept_undecided
        return Limit(max_drop=gate.max_drop, accept_undecided=accept, source="manifest")
    if config.accept_undecided:
        raise UsageError(
            f"--accept-undecided, and neither --max-drop nor the manifest of {bundle.path} sets a limit to decide on. "
            "Set --max-drop, too."
        )
    return None


def choose_graphs(bundle: Bundle, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Graphs to prove, fp32 first, the others in the manifest's order.

    Raises:
        UsageError: an unknown precision or graph.
        BundleError: the bundle has no graph of a precision, or no fp32 to compare with.
    """
    there = bundle.manifest.graphs
    bundle.graph(REFERENCE)
    chosen = set(there) if wanted is None else {REFERENCE}
    for name in wanted or ():
        # int8 is a precision and one of its graphs: the precision, so that none of them is left unproved.
        found = [each for each in graphs_of(name) if each in there] if name in PRECISIONS else [name]
        if name not in PRECISIONS and name not in there:
            raise UsageError(
                f"precision {name!r} is unknown; known: {', '.join(PRECISIONS)}, and the graphs of this bundle: "
                f"{', '.join(there)}."
            )
        if not found:
            raise BundleError(f"{bundle.path}: no {name} graph in this bundle; it has: {', '.join(there)}.")
        chosen.update(found)
    return (REFERENCE, *(name for name in there if name in chosen and name != REFERENCE))


def reprove(
    bundle: Bundle,
    data: LabelledImages,
    config: ReproofConfig,
    *,
    place: Callable[[int], str] = str,
    progress: Advance = ignore_progress,
) -> Reproof:
    """Let every chosen graph answer ``data`` here, compare with fp32 and with the manifest, and judge.

    One session is open at a time, and each is closed before the next. A limit that is not met raises nothing:
    see check_gate.

    Args:
        bundle: its files were checked (check_files).
        data: images of the bundle's size, with its classes.
        config: what to prove, and the limit.
        place: from a row of ``data`` to where its user finds that image.
        progress: told what goes on.

    Raises:
        UsageError: an unknown graph or backend, or no limit to accept anything about.
        BundleError: a damaged file, or no graph of that precision.
        SessionError: a graph answers its golden inputs wrongly here.
        ConversionError: answers that are not finite.
        MissingDependency: the backend's library is not installed.
    """
    limit = choose_limit(bundle, config)
    names = choose_graphs(bundle, config.precisions)
    record = DataRecord(name=data.name, images=len(data.images), sha256=hashlib.sha256(data.images.data).hexdigest())
    uses = [use for use, each in bundle.manifest.data.items() if each.sha256 == record.sha256]
    used_for = "evaluation" if "evaluation" in uses else next(iter(uses), None)
    prover = _Prover(bundle, data, config.backend, limit, used_for == "evaluation", place, progress)
    return Reproof(
        bundle=str(bundle.path),
        data=record,
        used_for=used_for,
        limit=limit,
        graphs=prover.prove_all(names),
        environment=describe_environment(),
    )


def check_gate(result: Reproof) -> None:
    """Raise GateError if a limit was set and a graph does not keep it, or could not be proved."""
    if result.limit is None:
        return
    said = {"fail": "loses more", "undecided": "loses perhaps more, the images are too few to tell"}
    unmet = []
    for graph in result.graphs:
        if graph.not_proved is not None:
            unmet.append(f"{graph.name} could not be proved here")
        elif graph.verdict is not None and not is_met(graph.verdict, result.limit):
            unmet.append(f"{graph.name} {said[graph.verdict.decision]}")
    if unmet:
        decisions = {graph.verdict.decision for graph in result.graphs if graph.verdict is not None}
        cures = ["leave a graph out (--precision)", "allow more (--max-drop)"]
        if "undecided" in decisions and not result.limit.accept_undecided:
            cures[:0] = [
                "prove on more images (DATA, --images)",
                "let pass what cannot be decided (--accept-undecided)",
            ]
        if any(graph.not_proved is not None for graph in result.graphs):
            cures.insert(0, "install the extra that is named with each graph")
        raise GateError(
            f"needed is that every graph loses at most {result.limit.max_drop:g} points against fp32: "
            f"{'; '.join(unmet)}. To go on, {', '.join(cures[:-1])}, or {cures[-1]}."
        )


def is_met(verdict: Verdict, limit: Limit) -> bool:
    """Whether a graph with this verdict is let through."""
    return verdict.decision == "pass" or (verdict.decision == "undecided" and limit.accept_undecided)


@dataclass(frozen=True)
class _Answers:
    """What a graph answered, by what, and whether it was this very graph."""

    backend: str
    obtained: Obtained
    scores: Scores


@dataclass(frozen=True)
class _Prover:
    """Proves graphs one after the other; arguments as in ``reprove``."""

    bundle: Bundle
    data: LabelledImages
    backend: str
    limit: Limit | None
    is_same_data: bool
    place: Callable[[int], str]
    progress: Advance

    def prove_all(self, names: Sequence[str]) -> tuple[GraphProof, ...]:
        """Prove the graphs ``names``, of which the first is the reference of the others."""
        reference, *others = names
        with Session.open(self.bundle, self.backend, reference) as session:
            wanted = _Answers(session.backend, "measured", self._predict(session))
        proofs = [self._build_proof(reference, wanted, wanted)]
        for name in others:
            found = self._ask(name)
            if isinstance(found, str):
                accuracy = self.bundle.graph(name).evidence.accuracy
                proofs.append(GraphProof(name=name, in_manifest=accuracy, not_proved=found))
            else:
                proofs.append(self._build_proof(name, wanted, found))
        return tuple(proofs)

    def _ask(self, name: str) -> _Answers | str:
        """The answers of a graph, or of its rounding twin; or why there are none, in words."""
        record = self.bundle.graph(name)
        with Session.open(self.bundle, self.backend, name) as session:
            backend = session.backend
            if not (load_backend_class(backend).computes_fp16_as_fp32 and _has_float16(record)):
                return _Answers(backend, "measured", self._predict(session))
        try:
            scores = self._predict_twin(name, record)
        except MissingDependency as error:
            return f"backend {backend} computes its FP16 tensors in FP32, and cannot emulate them: {error}"
        return _Answers(OrtBackend.name, "emulated", scores)

    def _predict(self, session: Session) -> Scores:
        images, size, parts = self.data.images, batch_for(self.data.images), []
        for start in range(0, len(images), size):
            parts.append(session.predict(images[start : start + size]))
            self.progress(min(start + size, len(images)), len(images), f"proving {session.graph}")
        return np.concatenate(parts)

    def _predict_twin(self, name: str, record: GraphRecord) -> Scores:
        twin = rounding_twin(read_graph(self.bundle.verified_path(record.file)))
        with tempfile.TemporaryDirectory(prefix="vggedge-verify-") as folder:  # the bundle may be read-only
            path = Path(folder) / "twin.onnx"
            twin.write(path)
            del twin  # ONNX Runtime is about to hold the weights once more
            return graph_scores(path, self.data.images, f"emulating {name}", self.progress)

    def _build_proof(self, name: str, wanted: _Answers, found: _Answers) -> GraphProof:
        labels, targets = self.bundle.manifest.labels, self.data.targets
        in_manifest = self.bundle.graph(name).evidence.accuracy
        comparison = compare_scores(
            wanted.scores, found.scores, targets, labels=labels, against=REFERENCE, obtained=found.obtained
        )
        accuracy = comparison.accuracy
        flips = [
            FlippedImage(
                image=self.place(flip.image),
                true=labels[flip.true],
                reference=labels[flip.reference],
                candidate=labels[flip.candidate],
                reference_margin=flip.reference_margin,
                candidate_margin=flip.candidate_margin,
            )
            for flip in find_flips(wanted.scores, found.scores, targets, len(targets))
        ]
        is_reference = found is wanted
        return GraphProof(
            name=name,
            in_manifest=in_manifest,
            backend=found.backend,
            obtained=found.obtained,
            accuracy=accuracy,
            comparison=None if is_reference else msgspec.structs.replace(comparison, flips=()),
            right_difference=accuracy.count - in_manifest.count if self.is_same_data else None,
            intervals_overlap=None if self.is_same_data else _overlap(accuracy, in_manifest),
            flips=tuple(flips),
            verdict=None if is_reference else self._judge(comparison),
        )

    def _judge(self, comparison: Comparison) -> Verdict | None:
        if self.limit is None or comparison.change is None:
            return None
        return judge_drop(comparison.change, self.limit.max_drop)


def _has_float16(record: GraphRecord) -> bool:
    """Whether the graph has FP16 tensors: export then emulated it, or says so of a layer (newer bundles)."""
    return record.evidence.obtained == "emulated" or any(layer.precision == "fp16" for layer in record.layers)


def _overlap(one: Proportion, other: Proportion) -> bool:
    return one.low <= other.high and other.low <= one.high
