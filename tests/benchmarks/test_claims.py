"""The studies of the claims: their arithmetic, their rules, and that each script runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge.architecture import get_spec
from vggedge.training import TrainConfig, train

ROOT = Path(__file__).parents[2]
CLAIMS = ROOT / "benchmarks/claims"
SCRIPTS = (
    *("vanishing_gradients", "local_response_normalization", "depth"),
    *("one_by_one", "multi_scale", "parameters_and_time"),
)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of the folder, as its scripts do."""
    monkeypatch.syspath_prepend(CLAIMS)
    return importlib.import_module


def make_trials(load: Any, variant: str, counts: tuple[int, ...], n: int = 1000) -> list[Any]:
    """Trials with so many right answers each, always of the first images."""
    trial = load("trials").Trial
    return [trial(variant, seed, np.arange(n) < count, 1, 1) for seed, count in enumerate(counts)]


@pytest.mark.parametrize(
    ("share", "freedom", "wanted"),
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 7, 2.365), (0.995, 4, 4.604), (0.5, 3, 0.0)],
)
def test_student_quantiles_are_those_of_the_tables(load: Any, share: float, freedom: int, wanted: float) -> None:
    assert load("trials").student_quantile(share, freedom) == pytest.approx(wanted, abs=6e-4)


def test_a_difference_has_the_interval_of_seeds_and_images(load: Any) -> None:
    first = make_trials(load, "a", (700, 720, 740))
    second = make_trials(load, "b", (600, 600, 600))
    found = load("trials").compare(first, second)
    assert found.by_seed == pytest.approx((10, 12, 14))
    # Of the images 100 differ in all seeds, 20 in two thirds, 20 in one third.
    points = np.repeat([100, 200 / 3, 100 / 3, 0], [100, 20, 20, 860])
    error = np.sqrt(4 / 3 + points.var(ddof=1) / 1000)
    assert (found.mean, found.high - found.mean) == pytest.approx((12, 4.3027 * error), rel=1e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert str(found) == f"+12.0 [{found.low:+.1f}, {found.high:+.1f}]"


def test_only_trials_of_the_same_seeds_are_compared(load: Any) -> None:
    trials = load("trials")
    with pytest.raises(ValueError, match="same seeds"):
        trials.compare(make_trials(load, "a", (1, 2)), make_trials(load, "b", (1, 2, 3)))
    with pytest.raises(ValueError, match="at least 2"):
        trials.compare(make_trials(load, "a", (1,)), make_trials(load, "b", (2,)))


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (0.1, 2, 0, "supported"),
        (-0.1, 2, 0, "not shown here"),
        (-2, -0.1, 0, "contradicted here"),
        (-1, 3, -2, "supported"),
        (-4, -3, -2, "contradicted here"),
    ],
)
def test_an_interval_decides(load: Any, low: float, high: float, margin: float, verdict: str) -> None:
    assert load("reporting").judge(low, high, margin=margin) == verdict


DEPTHS = ("vgg9", "vgg11", "vgg13", "vgg16", "vgg19")


@pytest.mark.parametrize(
    ("accuracies", "verdicts"),
    [
        ((700, 750, 800, 900, 900), ["supported", "supported"]),
        ((700, 750, 800, 850, 950), ["supported", "contradicted here"]),
        ((900, 700, 700, 700, 600), ["contradicted here", "supported"]),
        ((700, 701, 702, 703, 718), ["supported", "not shown here"]),
        ((700, 701, 700, 701, 702), ["not shown here", "supported"]),
    ],
)
def test_the_rule_of_depth(load: Any, accuracies: tuple[int, ...], verdicts: list[str]) -> None:
    groups = {
        name: make_trials(load, name, tuple(count + step for step in (-4, 4, -2, 2, 0)))
        for name, count in zip(DEPTHS, accuracies, strict=True)
    }
    assert [part.verdict for part in load("depth").judge_depth(groups)] == verdicts


def test_the_rule_of_one_by_one(load: Any) -> None:
    counts = {"vgg13": (850, 860, 855), "vgg16-1x1": (800, 810, 806), "vgg16": (900, 911, 905)}
    groups = {name: make_trials(load, name, each) for name, each in counts.items()}
    parts = load("one_by_one").judge_kernels(groups)
    assert [part.verdict for part in parts] == ["supported", "contradicted here"]


@pytest.mark.parametrize(
    ("none", "lrn", "verdict"),
    [
        (900, 901, "supported"),
        (900, 950, "contradicted here"),
        (900, 915, "not shown here"),
        (167, 167, "not shown here"),
    ],
)
def test_the_rule_of_lrn(load: Any, none: int, lrn: int, verdict: str) -> None:
    counts = {"none": none, "lrn": lrn, "first": 930}
    groups = {name: make_trials(load, name, (each - 3, each, each + 3, each)) for name, each in counts.items()}
    groups["lrn"] = make_trials(load, "lrn", (lrn - 2, lrn + 2, lrn, lrn))
    assert load("local_response_normalization").judge_lrn(groups).verdict == verdict


def test_the_rule_of_multi_scale(load: Any) -> None:
    module = load("multi_scale")
    single = {
        "S = 72": make_trials(load, "S = 72", (800, 805, 803)),
        "S = 80": make_trials(load, "S = 80", (700, 705, 703)),
        module.JITTER: make_trials(load, module.JITTER, (850, 853, 855)),
    }
    several = single | {module.JITTER: make_trials(load, module.JITTER, (800, 802, 807))}
    parts = module.judge_scales(single, several)
    assert [part.verdict for part in parts] == ["supported", "contradicted here"]
    assert "- S = 72:" in parts[0].figures  # the better of the fixed ones
    assert "+5.0" in parts[0].figures


def test_hands_of_varying_size(load: Any) -> None:
    module = load("multi_scale")
    images = module.open_zoomed(12, 3)
    assert (len(images), images.read_one(5).shape, images.read_scaled(5, 88).shape) == (12, (64, 64, 3), (88, 88, 3))
    np.testing.assert_array_equal(images.read_one(7), images.read_scaled(7, 64))
    np.testing.assert_array_equal(module.open_zoomed(8, 3).read_one(7), images.read_one(7))
    # Above the hand's own picture its first row is repeated, which noise never does.
    pictures = [module.draw_zoomed(3, index) for index in range(30)]
    borders = [int((picture == picture[0]).all(axis=(1, 2)).sum()) - 1 for picture in pictures]
    assert 0 <= min(borders) < 6
    assert 18 < max(borders) <= 24  # half of what 96 pixels have beyond a hand of half their side


def test_the_image_is_judged_at_its_own_scale(load: Any) -> None:
    module = load("multi_scale")
    images = module.open_zoomed(2, 0)
    np.testing.assert_array_equal(module.show_at(images, 88).read_one(1), images.read_scaled(1, 88)[12:76, 12:76])


def test_a_profile_is_summed_by_run_and_kind(load: Any) -> None:
    def event(name: str, operation: str, microseconds: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": operation}}

    def events(scale: int) -> list[dict[str, Any]]:
        return [
            {"cat": "Session", "name": "model_run", "dur": 99},
            event("block1_conv1", "FusedConv", 6000 * scale),
            event("block1_conv2", "Conv", 1000 * scale),
            event("fc1", "FusedGemm", 2000 * scale),
            event("block1_pool", "MaxPool", 1000 * scale),
        ]

    timing = load("parameters_and_time").read_profile([*events(50), *events(1), *events(3)], warmup=1)
    assert timing.milliseconds == {"convolutions": [7, 21], "dense layers": [2, 6], "the rest": [1, 3]}
    assert timing.shares("convolutions") == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [([0.6, 0.9], "supported"), ([0.4, 0.9], "not shown here"), ([0.4, 0.5], "contradicted here")],
)
def test_a_majority_in_all_cases(load: Any, shares: list[float], verdict: str) -> None:
    assert load("parameters_and_time").judge_majority(shares) == verdict


def probe(load: Any, **changes: Any) -> tuple[Any, Any, Any]:
    """(images, a watcher, a function that trains with or without it)."""
    trials = load("trials")
    data = trials.open_held("fingers:24")
    watcher = load("vanishing_gradients").gradient_watch_class()(data.read(range(8)), data.targets[:8])
    spec = get_spec("vgg9-compact", input=(64, 64, 3), **changes)
    config = TrainConfig(epochs=1, patience=0, batch_size=8)
    return data, watcher, lambda *callbacks: train(spec, data, config, callbacks=callbacks).model


def test_gradients_are_those_of_the_loss(load: Any) -> None:
    data, watcher, run = probe(load, normalization="none", dropout=0.0)
    model = run(watcher)
    assert watcher.layers[0] == "block1_conv1"
    assert watcher.layers[-1] == "predictions"
    assert np.array(watcher.norms).shape == (2, 9)
    # The last kernel's gradient by hand: outputs of fc2 times (probabilities - truth), on average.
    import keras

    hidden = keras.Model(model.inputs, model.get_layer("fc2").output).predict(data.read(range(8)), verbose=0)
    errors = model.predict(data.read(range(8)), verbose=0) - np.eye(6)[data.targets[:8]]
    assert watcher.norms[-1][-1] == pytest.approx(np.linalg.norm(hidden.T @ errors / 8), rel=1e-3)


def test_watching_changes_nothing(load: Any) -> None:
    _, watcher, run = probe(load, normalization="every", dropout=0.3)
    for watched, alone in zip(run(watcher).get_weights(), run().get_weights(), strict=True):
        np.testing.assert_array_equal(watched, alone)


@pytest.mark.parametrize(
    ("none", "first", "verdict"),
    [
        ((167, 167, 900, 900), (900, 905, 910, 890), "supported"),
        ((167, 900, 900, 900), (900, 905, 910, 890), "not shown here"),
        ((167, 167, 167, 167), (167, 905, 910, 890), "not shown here"),
        ((900, 900, 900, 900), (167, 167, 167, 167), "contradicted here"),
    ],
)
def test_the_rule_of_stalls(load: Any, none: tuple[int, ...], first: tuple[int, ...], verdict: str) -> None:
    groups = {"none": make_watched(load, "none", none), "first": make_watched(load, "first", first)}
    part = load("vanishing_gradients").judge_stalls("glorot", groups)
    assert part.verdict == verdict
    assert f"{none.count(167)} of 4 seeds stall without, {first.count(167)} with" in part.figures


@pytest.mark.parametrize(
    ("starts", "lasts", "verdicts"),
    [
        ((1e-4, 4.9e-3), (5e-3, 5e-3), ["supported", "supported"]),
        ((1e-4, 5.1e-3), (5e-5, 5e-3), ["not shown here", "contradicted here"]),
        ((5.1e-3, 9e-2), (5e-2, 5e-2), ["contradicted here", "not shown here"]),
    ],
)
def test_the_rules_of_gradients(
    load: Any, starts: tuple[float, ...], lasts: tuple[float, ...], verdicts: list[str]
) -> None:
    groups = {
        "none": make_watched(load, "none", (1, 2), starts, lasts),
        "first": make_watched(load, "first", (1, 2), (1e-2, 1e-2), (5e-3, 5e-3)),
    }
    parts = load("vanishing_gradients").judge_gradients("he", groups)
    assert [part.verdict for part in parts] == verdicts
    assert f"{np.median(starts) / 1e-2:.2g} of it" in parts[0].figures


def make_watched(
    load: Any, variant: str, counts: tuple[int, ...], starts: tuple[float, ...] = (), lasts: tuple[float, ...] = ()
) -> list[Any]:
    """Trials whose gradients, of the first and the last convolution, start at ``starts`` and ``lasts``."""
    module = load("vanishing_gradients")
    trials = make_trials(load, variant, counts)
    begins = zip(starts or [1.0] * len(trials), lasts or [1.0] * len(trials), strict=True)
    return [
        module.Watched(trial, (module.FIRST, module.LAST), np.array([begin, (0.0, 0.0)]))
        for trial, begin in zip(trials, begins, strict=True)
    ]


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CLAIMS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "parameters_and_time" else pytest.mark.slow) for name in SCRIPTS],
)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    ended = run_script(name, "--quick", "--output", tmp_path / "new")
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in (tmp_path / "new").iterdir()} == {f"{name}.{each}" for each in ("json", "md", "png")}
    record = json.loads((tmp_path / "new" / f"{name}.json").read_text())
    for part in record["parts"]:
        assert f"{part['verdict']}: {part['statement']}" in ended.stdout
    assert record["protocol"]["command"] == f"python benchmarks/claims/{name}.py --quick"
    assert "written: " in ended.stderr


def test_a_quick_run_never_replaces_results() -> None:
    ended = run_script("depth", "--quick", "--output", CLAIMS / "results")
    assert ended.returncode == 2
    assert "--quick proves nothing" in ended.stderr


def test_an_output_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    ended = run_script("depth", "--output", tmp_path / "file" / "below")
    assert ended.returncode == 2
    assert "cannot be made" in ended.stderr


def test_the_readme_says_what_the_results_say(load: Any) -> None:
    text = (CLAIMS / "README.md").read_text(encoding="utf-8")
    summary = load("summary")
    assert summary.insert_summary(text, summary.format_summary()) == text


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_result_is_of_the_full_run(name: str) -> None:
    results = CLAIMS / "results"
    record = json.loads((results / f"{name}.json").read_text())
    assert record["protocol"]["command"] == f"python benchmarks/claims/{name}.py"
    text = (results / f"{name}.md").read_text(encoding="utf-8")
    for part in record["parts"]:
        assert f"**{part['verdict']}**: {part['statement']}" in text
    assert (results / f"{name}.png").stat().st_size > 10_000
