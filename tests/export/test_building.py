"""Engines built in a process of their own: real ones with TensorRT-RTX, and the ways in which a process can end."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vggedge_export import building
from vggedge_export.audit import KernelNode, NetworkFacts
from vggedge_export.build_memory import check_fits, estimate_need
from vggedge_export.build_monitor import PhaseTree
from vggedge_export.building import BuildResult, build_engines, check_builder, choose_builder, choose_graphs
from vggedge_export.engine_config import EngineConfig
from vggedge_export.engine_inspector import read_layers
from vggedge_runtime import tensorrt_api
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.dependencies import is_installed
from vggedge_runtime.engine_cache import list_engines, read_engine
from vggedge_runtime.errors import BundleError, EngineError, MissingDependency, UsageError
from vggedge_runtime.memory import FreeMemory

pytest.importorskip("onnx")
FAKES = Path(__file__).parents[1] / "fakes"
RTX_GRAPHS = ("fp32", "fp16", "int8-rtx", "mixed-rtx")
needs_rtx = pytest.mark.skipif(not is_installed("tensorrt_rtx"), reason="TensorRT-RTX is not installed")
FREE = FreeMemory(16_000_000_000, None, False)


@pytest.fixture(scope="module")
def vgg_bundle() -> Iterator[Any]:
    """The module tests/fakes/vgg_bundle.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FAKES)
        import vgg_bundle

        yield vgg_bundle


@pytest.fixture(scope="module")
def compact(vgg_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG-16 at compact widths in every graph; not to be built into."""
    folder = tmp_path_factory.mktemp("compact") / "vgg"
    return vgg_bundle.write_vgg_bundle(folder, ("fp32", "fp16", "int8", "int8-rtx", "mixed-rtx"), **vgg_bundle.COMPACT)


@pytest.fixture
def bundle(compact: Path, tmp_path: Path) -> Path:
    """A copy of it whose graphs are links."""
    copy = tmp_path / "vgg"
    for file in compact.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(compact)).parent.mkdir(parents=True, exist_ok=True)
            os.link(file, copy / file.relative_to(compact))
    return copy


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """``fake("10_3", end="SIGKILL")``: children find that TensorRT, with these answers; gives the log of its calls."""

    def use(version: str = "11_4", **answers: Any) -> Path:
        for folder in (FAKES, FAKES / f"tensorrt_{version}", FAKES / "cuda"):
            monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
        log = tmp_path / "calls"
        monkeypatch.setenv("FAKE_TENSORRT", json.dumps({"log": str(log)} | answers))
        return log

    return use


def files(bundle: Path) -> list[str]:
    """Everything in the bundle's engines, hidden files too."""
    found = (bundle / "engines").rglob("*")
    return sorted(str(path.relative_to(bundle / "engines")) for path in found if path.is_file())


# --- real engines


def check_engines(bundle: Path, result: BuildResult, names: tuple[str, ...], layers: list[str]) -> None:
    assert [each.record.key.graph for each in result.engines] == list(names)
    for each in result.engines:
        record = each.record
        assert not each.was_there
        assert len(read_engine(bundle, record.key)) == record.size_bytes
        assert record.audit is not None
        assert (record.audit.convolutions, record.audit.dense) == (13, 3)
        in_int8 = {"int8-rtx": layers, "mixed-rtx": layers[2:]}.get(record.key.graph, [])
        assert list(record.audit.int8) == in_int8
        assert record.audit.not_int8 == ()


@needs_rtx
@pytest.mark.parametrize("batches", [(1, 1, 1), (1, 4, 8)], ids=["static", "dynamic"])
def test_rtx_builds_compact_vgg16_in_every_graph_and_none_twice(
    batches: tuple[int, int, int], bundle: Path, vgg_bundle: Any
) -> None:
    told: list[tuple[int, int, str]] = []
    config = EngineConfig(batches)
    graphs = choose_graphs(Bundle.open(bundle), "tensorrt_rtx", None)
    result = build_engines(bundle, "tensorrt_rtx", graphs, config, progress=lambda *what: told.append(what))
    assert graphs == RTX_GRAPHS
    check_engines(bundle, result, RTX_GRAPHS, [*vgg_bundle.LAYERS, "fc1", "fc2"])
    assert all(each.record.key.batches == batches for each in result.engines)
    assert len(files(bundle)) == 8
    assert {what for *_, what in told} == {"building tensorrt_rtx engines"}
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    assert (told[0][:2], told[-1][:2]) == ((0, 400), (400, 400))
    assert len(told) > 50
    again = build_engines(bundle, "tensorrt_rtx", graphs, config)
    assert [each.was_there for each in again.engines] == [True] * 4
    assert [each.record for each in again.engines] == [each.record for each in result.engines]


@needs_rtx
def test_what_is_damaged_or_forced_is_built_again_and_another_choice_lies_beside_it(bundle: Path) -> None:
    def build(**choices: Any) -> bool:
        force = choices.pop("force", False)
        result = build_engines(bundle, "tensorrt_rtx", ["fp16"], EngineConfig(**choices), force=force)
        assert read_engine(bundle, result.engines[0].record.key)
        return result.engines[0].was_there

    assert not build()
    assert build()
    assert not build(force=True)
    plan = next((bundle / "engines").rglob("*.engine"))
    plan.write_bytes(plan.read_bytes()[:-1])
    assert not build()
    assert not build(targets=("8.9",))
    assert [record.key.devices for record in list_engines(bundle)].count(("8.9",)) == 1
    assert len(list_engines(bundle)) == 2


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("name", RTX_GRAPHS)
def test_rtx_builds_full_vgg16_within_seconds(name: str, vgg_bundle: Any, tmp_path: Path) -> None:
    bundle = vgg_bundle.write_vgg_bundle(tmp_path / "full", (name,), **vgg_bundle.FULL)
    for batches in ((1, 1, 1), (1, 4, 8)):
        result = build_engines(bundle, "tensorrt_rtx", (name,), EngineConfig(batches))
        check_engines(bundle, result, (name,), [*vgg_bundle.LAYERS, "fc1", "fc2"])
        record = result.engines[0].record
        assert record.build_seconds < 30
        graph_bytes = Bundle.open(bundle).manifest.files[f"graphs/model.{name}.onnx"].size_bytes
        assert 0.95 < record.size_bytes / graph_bytes < 1.05


@needs_rtx
def test_the_parent_never_loads_tensorrt(bundle: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from vggedge_export.building import *;"
        "from vggedge_export.engine_config import EngineConfig;"
        "check_builder('tensorrt_rtx');"
        "build_engines(Path(sys.argv[1]), 'tensorrt_rtx', ['fp16'], EngineConfig());"
        "assert not [name for name in sys.modules if name.startswith('tensorrt')]"
    )
    subprocess.run([sys.executable, "-c", script, str(bundle)], check=True)
    assert len(list_engines(bundle)) == 1


@needs_rtx
def test_a_device_needs_no_onnx_and_no_training_library(bundle: Path) -> None:
    block = (
        "import sys\nfor name in ('onnx', 'onnxruntime', 'tensorflow', 'keras', 'tf2onnx'): sys.modules[name] = None\n"
    )
    script = block + (
        "from vggedge_export import building\n"
        f"building.BOOTSTRAP = {block!r} + building.BOOTSTRAP\n"
        "from vggedge.cli import main\nmain()"
    )
    arguments = ["build", str(bundle), "--for", "rtx", "--precision", "int8"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [record.key.graph for record in list_engines(bundle)] == ["int8-rtx", "mixed-rtx"]


# --- what can be refused before anything starts


def test_a_builder_is_chosen_without_loading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"tensorrt", "tensorrt_rtx"}
    for module in (building, tensorrt_api):
        monkeypatch.setattr(module, "is_installed", lambda name: name in installed)
    monkeypatch.setattr(building, "_has_gpu", lambda: True)
    assert choose_builder() == "tensorrt"
    monkeypatch.setattr(building, "_has_gpu", lambda: False)
    assert choose_builder() == "tensorrt_rtx"
    installed.remove("tensorrt_rtx")
    assert choose_builder() == "tensorrt"  # which then says what it lacks
    with pytest.raises(MissingDependency, match=r"tensorrt_rtx is not installed.*vggedge\[rtx\]"):
        choose_builder("tensorrt_rtx")
    with pytest.raises(UsageError, match="'openvino' is unknown"):
        choose_builder("openvino")


def test_graphs_are_chosen_by_product_precision_and_name(compact: Path) -> None:
    bundle = Bundle.open(compact)
    assert choose_graphs(bundle, "tensorrt", None) == ("fp32", "fp16", "int8")
    assert choose_graphs(bundle, "tensorrt_rtx", ("int8", "fp16")) == ("fp16", "int8-rtx", "mixed-rtx")
    assert choose_graphs(bundle, "tensorrt_rtx", ("mixed-rtx",)) == ("mixed-rtx",)
    assert choose_graphs(bundle, "tensorrt", ("int8",)) == ("int8",)
    with pytest.raises(UsageError, match="precision 'fp8' is unknown; known: fp32, fp16, int8, and the graphs"):
        choose_graphs(bundle, "tensorrt", ("fp8",))
    with pytest.raises(UsageError, match="no int8-rtx graph for tensorrt in it; it has for tensorrt: fp32, fp16, int8"):
        choose_graphs(bundle, "tensorrt", ("int8-rtx",))
    with pytest.raises(BundleError, match="no graph in it was made for openvino"):
        choose_graphs(bundle, "openvino", None)


def test_a_bundle_that_cannot_be_written_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BundleError, match="you may not write there"):
        build_engines(bundle, "tensorrt_rtx", ["fp16"], EngineConfig())


# --- memory


def test_the_estimate_holds_what_was_measured_for_full_vgg16() -> None:
    for graph_bytes, peak_bytes in ((553_434_660, 1.849e9), (276_719_639, 1.038e9), (142_480_743, 0.658e9)):
        need = estimate_need("x", graph_bytes, EngineConfig(), FREE, builds_on_gpu=False)
        assert 1 <= need.host_bytes / peak_bytes < 1.1
        assert (need.gpu_bytes, need.workspace_bytes) == (0, None)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (FreeMemory(16 * 10**9, 24 * 10**9, False), 3_968_000_000),  # the cap, in steps of 64 MB
        (FreeMemory(16 * 10**9, 4 * 10**9, False), 1_920_000_000),  # (4 - 0.1) / 2
        (FreeMemory(4 * 10**9, 4 * 10**9, True), 1_664_000_000),  # (4 - 0.1 - 0.55) / 2: both from one memory
        (FreeMemory(600_000_000, 600_000_000, True), 64_000_000),
    ],
    ids=["card", "small card", "Jetson", "nothing left"],
)
def test_the_workspace_is_half_of_what_is_left(free: FreeMemory, expected: int) -> None:
    need = estimate_need("x", 100_000_000, EngineConfig(), free, builds_on_gpu=True)
    assert need.workspace_bytes == expected
    assert need.gpu_bytes == 100_000_000 + expected
    asked = estimate_need("x", 100_000_000, EngineConfig(workspace_bytes=5), free, builds_on_gpu=True)
    assert asked.workspace_bytes == 5


@pytest.mark.parametrize(
    ("free", "on_gpu", "fits"),
    [
        (FreeMemory(600_000_000, None, False), False, True),
        (FreeMemory(500_000_000, None, False), False, False),
        (FreeMemory(600_000_000, 2_000_000_000, False), True, True),
        (FreeMemory(500_000_000, 2_000_000_000, False), True, False),
        (FreeMemory(600_000_000, 150_000_000, False), True, False),
        (FreeMemory(720_000_000, 720_000_000, True), True, True),
        (FreeMemory(700_000_000, 700_000_000, True), True, False),
        (FreeMemory(700_000_000, 700_000_000, True, 50_000_000), True, True),
        (FreeMemory(500_000_000, None, False, 40_000_000), False, False),
        (FreeMemory(500_000_000, None, False, 60_000_000), False, True),
        (FreeMemory(100_000_000, 100_000_000, True, 9_000_000_000), True, False),  # a GPU cannot use swap
    ],
)
def test_what_cannot_fit_is_refused_with_figures(free: FreeMemory, on_gpu: bool, fits: bool) -> None:
    need = estimate_need("int8", 100_000_000, EngineConfig(), free, builds_on_gpu=on_gpu)
    if fits:
        check_fits(need)
    else:
        message = r"int8 cannot be built .*a graph of 0\.10 GB needs about 0\.55 GB.*free: 0\.\d\d GB.*--workspace"
        with pytest.raises(EngineError, match=message):
            check_fits(need)


def test_two_plans_are_held_where_the_best_is_kept() -> None:
    one, best = (
        estimate_need("x", 10**8, EngineConfig(keep_best=count), FREE, builds_on_gpu=False).host_bytes
        for count in (1, 3)
    )
    assert best - one == 10**8


# --- a child that does not end well; TensorRT is the fake


@pytest.mark.parametrize("version", ["10_3", "11_4"])
def test_the_whole_enterprise_path(version: str, fake: Callable[..., Path], bundle: Path, users_cache: Path) -> None:
    log = fake(version)
    graphs = choose_graphs(Bundle.open(bundle), "tensorrt", None)
    result = build_engines(bundle, "tensorrt", graphs, EngineConfig((1, 4, 8), optimization_level=4))
    assert [each.record.key.graph for each in result.engines] == ["fp32", "fp16", "int8"]
    for each in result.engines:
        assert each.record.key.devices == ("Orin (8.7)",)
        assert each.record.key.options == {"optimization_level": "4"}
        assert each.record.audit is not None
        assert each.record.audit.convolutions == 13
    assert len(result.engines[2].record.audit.int8) == 15
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert [call[1] for call in calls if call[0] == "create_network"] == [2, 2, 2]
    assert [call[0] for call in calls if call[0] == "set_memory_pool_limit"] == ["set_memory_pool_limit"] * 3
    caches = list((users_cache / "vggedge/timing").glob(f"tensorrt-{version.replace('_', '.')}.*-Orin-8.7*.cache"))
    assert len(caches) == 1
    caches[0].unlink()


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("SIGKILL", r"killed while it built fp16, .*too much memory.*needs about 0\.25 GB.*free: .*add swap"),
        ("SIGSEGV", r"crashed while it built fp16 \(signal SIGSEGV\).*needs about 0\.25 GB"),
    ],
)
def test_a_child_that_is_killed_is_an_error_with_figures(
    end: str, message: str, fake: Callable[..., Path], bundle: Path
) -> None:
    fake(end=end)
    with pytest.raises(EngineError, match=message):
        build_engines(bundle, "tensorrt", ["fp16"], EngineConfig())
    assert not (bundle / "engines").exists()


def test_a_child_that_is_killed_while_it_writes_leaves_no_file(
    fake: Callable[..., Path], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    patch = """
        import os, signal
        from pathlib import Path
        def die(self, data):
            with self.open("wb") as stream:
                stream.write(bytes(data)[:10])
            os.kill(os.getpid(), signal.SIGKILL)
        Path.write_bytes = die
        """
    monkeypatch.setattr(building, "BOOTSTRAP", patched(patch))
    with pytest.raises(EngineError, match="killed while it built fp16"):
        build_engines(bundle, "tensorrt", ["fp16"], EngineConfig(timing_cache=False))
    assert not (bundle / "engines").exists()


def patched(patch: str) -> str:
    """What starts a child, with ``patch`` before it begins."""
    return building.BOOTSTRAP.replace("main()", textwrap.dedent(patch).strip() + "\nmain()")


def test_what_a_child_says_arrives_as_itself(fake: Callable[..., Path], bundle: Path, tmp_path: Path) -> None:
    fake(errors=["no tactic"])
    with pytest.raises(EngineError, match=r"tensorrt 11\.4\.1 does not build the graph: no tactic\.$"):
        build_engines(bundle, "tensorrt", ["fp16"], EngineConfig())
    with pytest.raises(UsageError, match=r"targets are 8\.9"):
        build_engines(bundle, "tensorrt", ["fp16"], EngineConfig(targets=("8.9",)))
    (bundle / "graphs/model.fp16.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.fp16\.onnx: missing"):
        build_engines(bundle, "tensorrt", ["fp16"], EngineConfig())


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (f"OSError({errno.ENOSPC}, 'No space left on device', 'x.engine')", OSError, "No space left.*x.engine"),
        ("MemoryError()", EngineError, "memory that is free does not suffice"),
        ("KeyError('surprise')", RuntimeError, "(?s)defect of vggedge.*Traceback.*surprise"),
    ],
)
def test_other_errors_of_a_child(
    raised: str,
    expected: type[Exception],
    message: str,
    fake: Callable[..., Path],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake()
    patch = f"""
        from vggedge_export import build_worker
        def fail(*arguments, **options):
            raise {raised}
        build_worker.build_into = fail
        """
    monkeypatch.setattr(building, "BOOTSTRAP", patched(patch))
    with pytest.raises(expected, match=message):
        build_engines(bundle, "tensorrt", ["fp16"], EngineConfig())


def test_a_child_that_does_not_even_start_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "BOOTSTRAP", "import sys; sys.exit(3)")
    with pytest.raises(EngineError, match=r"crashed while it loaded tensorrt \(exit code 3\)"):
        build_engines(bundle, "tensorrt", ["fp16"], EngineConfig())


def test_a_missing_gpu_is_told_by_the_check(fake: Callable[..., Path]) -> None:
    fake(gpu=None)
    with pytest.raises(EngineError, match="no NVIDIA driver here"):
        check_builder("tensorrt")
    fake()
    check_builder("tensorrt")


def test_all_graphs_are_measured_before_the_first_is_built(fake: Callable[..., Path], bundle: Path) -> None:
    log = fake()
    config = EngineConfig(workspace_bytes=10**15)
    with pytest.raises(EngineError, match=r"fp32 cannot be built .*1000000\.00 GB of that workspace"):
        build_engines(bundle, "tensorrt", ["fp32", "fp16"], config)
    assert not log.exists()


# --- Ctrl-C


def interrupt(
    bundle: Path, script: str, *, group: bool, after: int = 5, pause: float = 0, number: int = signal.SIGINT
) -> tuple[int, str]:
    """Run a build in a process of its own and end it after so many of its 200 steps: (exit code, stderr)."""
    whole = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from vggedge_export import building
        from vggedge_export.engine_config import EngineConfig
        SCRIPT
        def progress(done, total, what):
            print(done, flush=True)
        graphs = ["fp32", "fp16"]
        building.build_engines(Path(sys.argv[1]), sys.argv[2], graphs, EngineConfig(), progress=progress)
        """
    ).replace("SCRIPT", textwrap.dedent(script).strip())
    product = "tensorrt" if "FAKE_TENSORRT" in os.environ else "tensorrt_rtx"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", whole, str(bundle), product],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if int(line) >= after:
                time.sleep(pause)
                (os.killpg if group else os.kill)(process.pid, number)
                break
        code = process.wait(60)
        return code, process.stderr.read()


SLOW = """
building.BOOTSTRAP = building.BOOTSTRAP.replace("main()", '''
import time
from vggedge_export import build_worker
told = build_worker._watch
def slow(*arguments):
    watch = told(*arguments)
    def later(share):
        time.sleep(0.03)
        return watch(share)
    return later
build_worker._watch = slow
main()
''')
"""


def test_engines_that_were_finished_before_ctrl_c_stay(fake: Callable[..., Path], bundle: Path) -> None:
    fake()
    code, _ = interrupt(bundle, SLOW.replace("0.03", "0.2"), group=True, after=105)
    assert code == -signal.SIGINT
    assert [record.key.graph for record in list_engines(bundle)] == ["fp32"]
    assert len(files(bundle)) == 2


def test_a_child_whose_parent_was_killed_ends_too(fake: Callable[..., Path], bundle: Path) -> None:
    fake()
    script = SLOW.replace("0.03", "0.2") + textwrap.dedent(
        """
        import contextlib
        real = building._start
        @contextlib.contextmanager
        def start(job):
            with real(job) as (process, messages):
                (building.Path(job.bundle) / "pid").write_text(str(process.pid))
                yield process, messages
        building._start = start
        """
    )
    code, _ = interrupt(bundle, script, group=False, number=signal.SIGKILL)
    assert code == -signal.SIGKILL
    status = Path("/proc") / (bundle / "pid").read_text() / "stat"
    deadline = time.monotonic() + 20
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (bundle / "engines").exists()


@needs_rtx
@pytest.mark.parametrize("after", [0, 5], ids=["while the child starts", "while it builds"])
@pytest.mark.parametrize("group", [True, False], ids=["as a terminal sends it", "to the parent only"])
def test_ctrl_c_stops_a_real_build_and_leaves_nothing(group: bool, after: int, bundle: Path) -> None:
    code, err = interrupt(bundle, SLOW, group=group, after=after, pause=0.1)
    assert code == -signal.SIGINT  # how Python ends by a KeyboardInterrupt
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert err.count("Traceback") == 1  # the parent's own; the child says nothing
    assert not (bundle / "engines").exists()


def test_a_child_that_does_not_listen_is_killed(fake: Callable[..., Path], bundle: Path) -> None:
    fake(end="hang")
    started = time.monotonic()
    # The fake hangs after half of its steps; the pause lets it get there.
    code, err = interrupt(bundle, "building._GRACE_SECONDS = 2", group=False, after=50, pause=1)
    assert code == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert 2 <= time.monotonic() - started < 60
    assert not (bundle / "engines").exists()


# --- leftovers


def test_leftovers_of_killed_builds_are_removed_and_nothing_else(fake: Callable[..., Path], bundle: Path) -> None:
    fake()
    gone = subprocess.Popen(["true"])
    gone.wait()
    old, mine, whole = (bundle / "engines" / name for name in ("old", "mine", "whole"))
    for folder in (old, mine, whole):
        folder.mkdir(parents=True)
    (old / "fp16.engine").write_bytes(b"a plan without a record")
    os.utime(old, (1, 1))
    (mine / f".fp16.engine.partial-{os.getpid()}").write_bytes(b"somebody is writing this")
    (mine / f".fp16.engine.partial-{gone.pid}").write_bytes(b"nobody is")
    (whole / "engine.json").write_text("{}")
    os.utime(whole, (1, 1))
    build_engines(bundle, "tensorrt", ["fp16"], EngineConfig(timing_cache=False))
    left = [name for name in files(bundle) if not name.endswith(("/fp16.engine", "/engine.json"))]
    assert left == [f"mine/.fp16.engine.partial-{os.getpid()}"]
    assert (whole / "engine.json").exists()
    assert not old.exists()


# --- the best of several, timed on a GPU; both are fakes


@pytest.mark.parametrize("version", ["10_3", "11_4"])
def test_the_fastest_of_three_engines_is_kept(version: str, fake: Callable[..., Path], bundle: Path) -> None:
    log = fake(version, latencies_ms=[3.0, 1.5, 2.0])
    result = build_engines(bundle, "tensorrt", ["fp16"], EngineConfig((1, 4, 8), keep_best=3))
    assert result.engines[0].latencies_ms == pytest.approx((3.0, 1.5, 2.0))
    plan = json.loads(read_engine(bundle, result.engines[0].record.key)[10:])
    assert plan["latency_ms"] == 1.5
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert [call[1] for call in calls if call[0] == "set_flag"] == ["DISABLE_TIMING_CACHE"] * 3


def test_without_pycuda_the_best_is_missed_before_anything_is_built(
    fake: Callable[..., Path], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.endswith("fakes/cuda")])
    if is_installed("pycuda"):
        pytest.skip("pycuda is installed here")
    with pytest.raises(MissingDependency, match=r"pycuda.driver is not installed.*vggedge\[tensorrt\]"):
        build_engines(bundle, "tensorrt", ["fp16"], EngineConfig(keep_best=2))
    assert not log.exists()


# --- phases


def test_a_step_counts_as_done_as_far_as_the_phases_inside_it() -> None:
    tree = PhaseTree()
    tree.start("Building engine", None, 4)
    assert tree.share == 0
    tree.step("Building engine", 0)
    assert tree.share == 0.25
    tree.start("Timing tactics", "Building engine", 2)
    tree.step("Timing tactics", 0)
    assert tree.share == 0.375
    tree.start("Timing nodes", "Timing tactics", 10)
    tree.step("Timing nodes", 4)
    assert tree.share == pytest.approx(0.25 + 0.25 * (0.5 + 0.5 * 0.5))
    tree.finish("Timing nodes")
    tree.finish("Timing tactics")  # before its last step
    assert tree.share == pytest.approx(0.4375)  # it does not fall
    tree.step("Building engine", 3)
    assert tree.share == 1


def test_a_phase_without_steps_or_without_a_beginning_does_no_harm() -> None:
    tree = PhaseTree()
    tree.start("Building engine", None, 0)
    tree.step("never began", 3)
    tree.finish("never began")
    assert tree.share == 0
    tree.finish("Building engine")
    assert tree.share == 1


# --- the inspector's JSON


FACTS = NetworkFacts(
    kernels=(KernelNode("conv1", True, True, 1728),),
    float32=frozenset(),
    quantizing=frozenset(),
    has_float16=False,
    outputs=frozenset(),
)


def layer(**content: Any) -> dict[str, Any]:
    tensor = {"Name": "x", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Int8"}
    usual = {"Name": "conv1 + relu1", "LayerType": "CaskConvolution", "Inputs": [tensor], "Outputs": [tensor]}
    return usual | {"Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu1]"} | content


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}, "Int8"),
        ({"Format/Datatype": "Row major linear FP32"}, "Float"),
        ({"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}, "Half"),
        ({"Format/Datatype": "Half"}, "Half"),
        ({"Format/Datatype": "UInt8"}, "UInt8"),
        ({"Format": "Row major linear FP32 format (kLINEAR)", "DataType": "Int8"}, "Int8"),
        ({"Format/Datatype": "N/A due to dynamic shapes"}, "N/A due to dynamic shapes"),
    ],
)
def test_types_are_read_from_either_form(told: dict[str, str], expected: str) -> None:
    tensor = {"Name": "x", "Dimensions": [1, 3, 8, 8]} | told
    rows = read_layers(json.dumps({"Layers": [layer(Inputs=[tensor])]}), FACTS)
    assert rows[0].layer.inputs == (expected,)


def test_weights_are_told_or_of_the_inputs_type_where_a_layer_multiplies() -> None:
    layers = [
        layer(Weights={"Type": "Half", "Count": 1728}),
        layer(Constants=[{"Name": "k", "Dimensions": [64, 3, 3, 3], "Format/Datatype": "Int8"}]),
        layer(LayerType="gemm"),
        layer(LayerType="Reformat"),
        layer(LayerType="CaskPooling", Weights={}),
        layer(LayerType="NoOp"),
    ]
    rows = read_layers(json.dumps({"Layers": layers, "Bindings": ["x"]}), FACTS)
    assert [row.layer.weights for row in rows] == [("Half",), ("Int8",), ("Int8",), (), ()]
    assert [row.constant_sizes for row in rows] == [(1728,), (1728,), (), (), ()]
    assert [row.layer.nodes for row in rows] == [("conv1", "relu1")] * 3 + [("relu1",)] * 2
    assert rows[4].layer.kind == "pooling"


def test_names_only_are_no_layers() -> None:
    assert read_layers(json.dumps({"Layers": ["conv1 + relu1", "fc"]}), FACTS) == ()


@pytest.mark.parametrize(
    "text",
    ["no json", "[]", '{"Bindings": []}', '{"Layers": [{"Name": "x"}]}', '{"Layers": [3]}'],
)
def test_a_form_that_is_not_known_is_an_error(text: str) -> None:
    with pytest.raises(EngineError, match=r"in a form that is not known"):
        read_layers(text, FACTS)


def test_a_job_survives_the_pipe() -> None:
    from vggedge_export.build_worker import BuildJob

    job = BuildJob(product="tensorrt", bundle="b", graphs=("fp16",), config=EngineConfig((1, 4, 8), ("8.9",), 5, 4))
    assert msgspec.json.decode(msgspec.json.encode(job), type=BuildJob) == job
