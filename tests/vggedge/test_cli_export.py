from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from vggedge.architecture import get_spec
from vggedge.cli import export, export_tables
from vggedge.cli.export_tables import describe_graph, print_export
from vggedge.data import open_images
from vggedge.model import ModelCard, build_vgg, read_model, write_model
from vggedge_export.calibration import METHODS
from vggedge_export.pipeline import ExportConfig, ExportResult
from vggedge_export.verification import Images
from vggedge_runtime.bundle import Bundle, DataRecord, GraphRecord
from vggedge_runtime.errors import ModelError
from vggedge_runtime.evidence import CalibrationRecord, Comparison
from vggedge_runtime.paired import build_paired_change
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.session import Session
from vggedge_runtime.statistics import build_proportion

CommandLine = Callable[..., tuple[object, str, str]]
FINGERS = ("0", "1", "2", "3", "4", "5")


class TestRefusedBeforeTensorFlowLoads:
    @pytest.fixture(autouse=True)
    def _block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever reaches for one of these gets another message than the tests want."""
        for name in ("tensorflow", "keras", "tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, None)

    @pytest.fixture
    def place(self, tmp_path: Path, tiny_bundle: Path) -> Path:
        """Models with all kinds of defects, and things in the way."""
        (tmp_path / "text.keras").write_text("no archive")
        (tmp_path / "folder.keras").mkdir()
        (tmp_path / "weights.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
        (tmp_path / "bad-ranges.ranges.json").write_text('{"fc1": 0}')
        for name in ("good", "bad-ranges", "no-image", "no-labels", "bad-labels", "bad-image"):
            with zipfile.ZipFile(tmp_path / f"{name}.keras", "w") as archive:
                archive.writestr("config.json", "{}")
        (tmp_path / "no-image.labels.txt").write_text("a\nb\n")
        (tmp_path / "no-labels.image.json").write_text('{"height": 64, "width": 64}')
        (tmp_path / "bad-labels.labels.txt").write_bytes(b"\xff\xfe")
        (tmp_path / "bad-labels.image.json").write_text('{"height": 64, "width": 64}')
        (tmp_path / "bad-image.labels.txt").write_text("a\nb\n")
        (tmp_path / "bad-image.image.json").write_text('{"height": 0, "width": 64}')
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.txt").write_text("years of work")
        return tmp_path

    @pytest.mark.parametrize(
        ("model", "output", "options", "code", "message"),
        [
            ("good", "mine", (), 1, "mine: exists and is no bundle"),
            ("good", "mine/thesis.txt", (), 1, "thesis.txt: exists and is no bundle"),
            ("good", "mine/thesis.txt/new", (), 1, "thesis.txt/new: cannot be written"),
            ("good", "new", ("--precision", "fp8"), 2, "precisions are ('fp8',); known: fp32, fp16, int8"),
            ("good", "new", ("--precision", "fp32,int4,"), 2, "int4"),
            ("good", "new", ("--precision", " , "), 2, "precisions are ()"),
            ("good", "new", ("--calibration-images", "0"), 2, "--calibration-images"),
            ("good", "new", ("--selection-images", "0"), 2, "--selection-images"),
            ("good", "new", ("--selection-images", "9", "--calibrator", "max"), 2, "nothing is to be chosen"),
            ("good", "new", ("--selection-images", "9", "--precision", "fp16", "--max-drop", "1"), 2, "chosen"),
            ("good", "new", ("--calibrator", "median"), 2, "known: auto, max, percentile, entropy, mse"),
            ("good", "new", ("--max-drop", "-1"), 2, "the limit (--max-drop) is -1; needed are above 0 to 100 points"),
            ("good", "new", ("--max-drop", "nan"), 2, "the limit (--max-drop) is nan"),
            ("good", "new", ("--accept-undecided",), 2, "--accept-undecided without --max-drop"),
            ("bad-ranges", "new", (), 1, "bad-ranges.ranges.json: no INT8 ranges"),
            ("good", "new", ("--precision",), 2, "--precision"),
            ("good", "new", ("--engine",), 1, "neither tensorrt nor tensorrt_rtx is installed"),
            ("nowhere", "new", (), 1, "nowhere.keras: no such file"),
            ("nowhere", "tiny", (), 1, "nowhere.keras: no such file"),
            ("text", "new", (), 1, "text.keras: 10 bytes that are no .keras archive"),
            ("folder", "new", (), 1, "folder.keras: is a folder"),
            ("weights.h5", "new", (), 1, "weights.h5: not a .keras file"),
            ("no-image", "new", (), 1, "no-image.labels.txt is beside it, no-image.image.json is not"),
            ("no-labels", "new", (), 1, "no-labels.image.json is beside it, no-labels.labels.txt is not"),
            ("bad-labels", "new", (), 1, "bad-labels.labels.txt: not UTF-8"),
            ("bad-image", "new", (), 1, "0x64 is no image size"),
        ],
    )
    def test_and_everything_is_left_alone(
        self,
        model: str,
        output: str,
        options: tuple[str, ...],
        code: int,
        message: str,
        place: Path,
        command_line: CommandLine,
    ) -> None:
        def content() -> dict[Path, bytes | None]:
            return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}

        before = content()
        name = model if "." in model else f"{model}.keras"
        arguments = [place / name, "--calibration", "fingers:12", "-o", place / output]
        engine = () if "--engine" in options else ("--no-engine",)
        found, out, err = command_line("export", *arguments, *engine, *options)
        assert message in err
        assert (found, out) == (code, "")
        assert content() == before

    def test_a_typo_in_the_data(self, place: Path, command_line: CommandLine) -> None:
        (place / "good.labels.txt").write_text("a\nb\n")
        (place / "good.image.json").write_text('{"height": 64, "width": 64}')
        options = ["--calibration", place / "photoz", "-o", place / "new", "--no-engine"]
        code, _, err = command_line("export", place / "good.keras", *options)
        assert code == 1
        assert "photoz: no such folder" in err

    @pytest.mark.parametrize("missing", ["--calibration", "-o"])
    def test_needed_options(self, missing: str, place: Path, command_line: CommandLine) -> None:
        options = {"--calibration": "fingers:12", "-o": place / "new"}
        del options[missing]
        given = [each for pair in options.items() for each in pair]
        code, _, err = command_line("export", place / "good.keras", *given)
        assert code == 2
        assert "Missing option" in err

    def test_a_good_model_gets_as_far_as_tensorflow(self, place: Path, command_line: CommandLine) -> None:
        """Or the tests above would prove nothing."""
        options = ["--calibration", "fingers:12", "-o", place / "new", "--no-engine"]
        code, _, err = command_line("export", place / "good.keras", *options)
        assert code == 1
        assert "tensorflow" in err
        assert "vggedge[train]" in err


class TestOptions:
    """With stand-ins for reading the model and for the pipeline."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """What the pipeline was asked for; set ``card``, ``shape``, ``classes`` and ``inside`` before."""
        asked: dict[str, Any] = {"card": None, "shape": (None, 64, 64, 3), "classes": 6, "inside": "rescaling"}

        def read_model(path: Path) -> Any:
            sides = SimpleNamespace(shape=asked["shape"]), SimpleNamespace(shape=(None, asked["classes"]))
            return SimpleNamespace(name="net", inputs=[sides[0]], outputs=[sides[1]]), asked["card"]

        def run(model: Any, path: Path, **options: Any) -> Any:
            asked.update(options, model=model(), path=path)
            return {"bundle": str(path)}

        monkeypatch.setattr(export, "read_card", lambda path: asked["card"])
        monkeypatch.setattr(export, "read_ranges", lambda path: asked.get("ranges"))
        monkeypatch.setattr(export, "read_model", read_model)
        monkeypatch.setattr(export, "normalizing_layer", lambda model: asked["inside"])
        monkeypatch.setattr(export, "check_exportable", lambda model, normalization: None)
        monkeypatch.setattr(export, "export", run)
        return asked

    def run(self, command_line: CommandLine, *options: object) -> tuple[object, str, str]:
        return command_line("export", "m.keras", "-o", "new-bundle", "--no-engine", *options)

    def test_what_reaches_the_pipeline(self, asked: dict[str, Any], command_line: CommandLine) -> None:
        spec = ImageSpec(height=64, width=64, kernel="nearest")
        asked["card"] = ModelCard(labels=FINGERS, image=spec)
        options = ["--calibration", "fingers:60", "--calibration-images", 12, "--precision", "int8, fp16", "--json"]
        code, out, err = self.run(command_line, *options)
        assert (code, err) == (0, "")
        assert msgspec.json.decode(out) == {"bundle": "new-bundle"}
        assert asked["path"] == Path("new-bundle")
        assert asked["model"].name == "net"
        assert (asked["image"], asked["labels"]) == (spec, FINGERS)
        assert (asked["config"].precisions, asked["config"].engine) == (("int8", "fp16"), "none")

    def test_without_options_nothing_is_limited_and_all_calibrators_are_compared(
        self, asked: dict[str, Any], command_line: CommandLine
    ) -> None:
        assert self.run(command_line, "--calibration", "fingers:24", "--json")[0] == 0
        assert asked["config"] == ExportConfig(engine="none")
        assert (asked["config"].calibrator, asked["config"].max_drop) == ("auto", None)
        assert asked["ranges"] is None

    def test_every_choice_of_precision_reaches_the_pipeline(
        self, asked: dict[str, Any], command_line: CommandLine
    ) -> None:
        asked["ranges"] = {"fc1": 3.5}
        options = ["--max-drop", "1.5", "--accept-undecided", "--calibrator", "mse", "--no-int8-first", "--int8-last"]
        assert self.run(command_line, "--calibration", "fingers:24", *options, "--json")[0] == 0
        assert asked["config"] == ExportConfig(
            max_drop=1.5,
            accept_undecided=True,
            calibrator="mse",
            quantize_first=False,
            quantize_last=True,
            engine="none",
        )
        assert asked["ranges"] == {"fc1": 3.5}

    def test_the_cache_is_the_users_unless_none_is_wanted(
        self, asked: dict[str, Any], command_line: CommandLine, users_cache: Path
    ) -> None:
        assert self.run(command_line, "--calibration", "fingers:24", "--json")[0] == 0
        assert asked["cache"] == users_cache / "vggedge/calibration"
        assert self.run(command_line, "--calibration", "fingers:24", "--no-cache", "--json")[0] == 0
        assert asked["cache"] is None

    def pixels(self, images: Images, source: str) -> None:
        """Check that all sets together are ``source``, each image once."""
        found = [image.tobytes() for each in images.by_use().values() for image in each.images]
        whole = open_images(source, ImageSpec(height=64, width=64)).read()
        assert sorted(found) == sorted(image.tobytes() for image in whole)
        assert len(set(found)) == len(found)

    def test_calibration_selection_and_evaluation_share_no_image(
        self, asked: dict[str, Any], command_line: CommandLine
    ) -> None:
        options = ["--calibration-images", 12, "--selection-images", 18, "--json"]
        assert self.run(command_line, "--calibration", "fingers:60", *options)[0] == 0
        images = asked["images"]
        assert {use: len(each.images) for use, each in images.by_use().items()} == {
            "calibration": 12,
            "selection": 18,
            "evaluation": 30,
        }
        np.testing.assert_array_equal(np.bincount(images.calibration.targets), [2] * 6)
        self.pixels(images, "fingers:60")

    def test_never_more_than_a_third_is_for_calibration(self, asked: dict[str, Any], command_line: CommandLine) -> None:
        assert self.run(command_line, "--calibration", "fingers:24", "--json")[0] == 0
        assert [len(each.images) for each in asked["images"].by_use().values()] == [8, 8, 8]

    @pytest.mark.parametrize("options", [("--calibrator", "max"), ("--precision", "fp16", "--max-drop", "1")])
    def test_where_nothing_is_chosen_no_image_is_for_that(
        self, options: tuple[str, ...], asked: dict[str, Any], command_line: CommandLine
    ) -> None:
        assert self.run(command_line, "--calibration", "fingers:24", *options, "--json")[0] == 0
        assert asked["images"].selection is None
        assert (len(asked["images"].calibration.images), len(asked["images"].evaluation.images)) == (12, 12)

    @pytest.mark.parametrize(("options", "count"), [((), 500), (("--max-drop", "1"), 700)])
    def test_a_plan_is_searched_on_more_images_than_a_calibrator(
        self, options: tuple[str, ...], count: int, asked: dict[str, Any], command_line: CommandLine
    ) -> None:
        asked["card"] = ModelCard(labels=FINGERS, image=ImageSpec(height=8, width=8))
        data = ["--calibration", "fingers:800", "--calibration-images", 100, "--evaluation", "fingers:12@9"]
        assert self.run(command_line, *data, *options, "--json")[0] == 0
        assert len(asked["images"].selection.images) == count

    def test_the_seed_is_that_of_the_choice_of_images(self, asked: dict[str, Any], command_line: CommandLine) -> None:
        found = []
        for seed in (0, 0, 1):
            options = ["--calibration", "fingers:60", "--calibration-images", 12, "--seed", seed, "--json"]
            assert self.run(command_line, *options)[0] == 0
            self.pixels(asked["images"], "fingers:60")
            found.append([each.images.tobytes() for each in asked["images"].by_use().values()])
        assert found[0] == found[1]
        assert all(first != other for first, other in zip(found[0], found[2], strict=True))

    def test_evaluation_of_its_own(self, asked: dict[str, Any], command_line: CommandLine) -> None:
        options = ["--calibration", "fingers:60", "--evaluation", "fingers:18@9", "--calibration-images", 30, "--json"]
        assert self.run(command_line, *options)[0] == 0
        named = {use: (each.name, len(each.images)) for use, each in asked["images"].by_use().items()}
        assert named == {
            "calibration": ("fingers:60@0", 30),
            "selection": ("fingers:60@0", 30),
            "evaluation": ("fingers:18@9", 18),
        }

    def test_without_a_card_the_labels_are_the_datas_and_that_is_said(
        self, asked: dict[str, Any], command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(export, "print_export", lambda result: None)
        asked["shape"] = (None, 32, 48, 3)
        code, out, err = self.run(command_line, "--calibration", "fingers:24")
        assert (code, out) == (0, "")
        assert "labels are the data's class names" in err
        assert (asked["labels"], asked["image"]) == (FINGERS, ImageSpec(height=32, width=48))
        assert "no labels file" not in self.run(command_line, "--calibration", "fingers:24", "--json")[2]

    @pytest.mark.parametrize(
        ("pixels", "darkest", "brightest"), [("0..1", 0.0, 1.0), ("-1..1", -1.0, 1.0), ("imagenet", -2.1179, 2.64)]
    )
    def test_pixels_of_a_model_that_does_not_say(
        self, pixels: str, darkest: float, brightest: float, asked: dict[str, Any], command_line: CommandLine
    ) -> None:
        asked["inside"] = None
        assert self.run(command_line, "--calibration", "fingers:24", "--pixels", pixels, "--json")[0] == 0
        found = asked["image"].normalization
        assert min((0 - mean) / std for mean, std in zip(found.mean, found.std, strict=True)) == pytest.approx(
            darkest, abs=1e-4
        )
        assert max((255 - mean) / std for mean, std in zip(found.mean, found.std, strict=True)) == pytest.approx(
            brightest, abs=1e-4
        )

    def test_caffe_pixels_are_what_keras_applications_make_of_them(
        self, asked: dict[str, Any], command_line: CommandLine
    ) -> None:
        keras = pytest.importorskip("keras")
        asked["inside"] = None
        assert self.run(command_line, "--calibration", "fingers:24", "--pixels", "caffe", "--json")[0] == 0
        found = asked["image"].normalization
        assert found.order == "bgr"
        pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3)).astype(np.float32)
        wanted = keras.applications.vgg16.preprocess_input(pixels.copy())
        np.testing.assert_allclose(((pixels - found.mean) / found.std)[..., ::-1], wanted, atol=1e-4)

    def test_raw_pixels_are_a_choice(self, asked: dict[str, Any], command_line: CommandLine) -> None:
        asked["inside"] = None
        assert self.run(command_line, "--calibration", "fingers:24", "--pixels", "raw", "--json")[0] == 0
        assert asked["image"] == ImageSpec(height=64, width=64)

    def test_the_rest_of_the_calibration_data_is_called_that(
        self, asked: dict[str, Any], command_line: CommandLine
    ) -> None:
        assert self.run(command_line, "--calibration", "fingers:24", "--json")[0] == 0
        assert asked["images"].evaluation.name == "the rest of fingers:24@0, which training may have seen"

    @pytest.mark.parametrize(
        ("model", "options", "code", "message"),
        [
            ({"classes": 7}, (), 2, "the model has 7 classes and no labels file, and the data has 6"),
            ({"labels": ("a", "b")}, (), 2, "trained on the classes a, b, the data has 0, 1"),
            ({"labels": FINGERS[::-1]}, (), 2, "trained on the classes 5, 4"),
            ({}, ("--evaluation", "{two}"), 2, "evaluation images have the classes cat, dog"),
            ({"classes": 1}, (), 2, "the model has 2 classes and no labels file, and the data has 6"),
            ({"inside": None}, (), 2, "Say it with --pixels: raw, 0..1, -1..1, imagenet, caffe"),
            ({}, ("--pixels", "0-1"), 2, "--pixels is '0-1'; known: raw, 0..1"),
            ({"labels": FINGERS}, ("--pixels", "0..1"), 2, "leave --pixels out"),
            ({}, ("--calibration", "nowhere"), 1, "nowhere: no such folder"),
            ({}, ("--calibration", "fingers:2"), 1, "2 image(s), and 3 sets are made of them"),
        ],
    )
    def test_what_does_not_fit(
        self,
        model: dict[str, Any],
        options: tuple[str, ...],
        code: int,
        message: str,
        asked: dict[str, Any],
        tmp_path: Path,
        command_line: CommandLine,
    ) -> None:
        for name in ("cat", "dog"):
            (tmp_path / "two" / name).mkdir(parents=True)
            (tmp_path / "two" / name / "1.png").touch()
        asked.update(model)
        if "labels" in model:
            asked["card"] = ModelCard(labels=model["labels"], image=ImageSpec(height=64, width=64))
        filled = [each.format(two=tmp_path / "two") for each in options]
        found, out, err = self.run(command_line, "--calibration", "fingers:24", *filled, "--json")
        assert message in err
        assert (found, out) == (code, "")
        assert "config" not in asked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network for 32x32 images: what is tested is the way, not the accuracy."""
    pytest.importorskip("tensorflow")
    path = tmp_path_factory.mktemp("model") / "small.keras"
    card = ModelCard(labels=FINGERS, image=ImageSpec(height=32, width=32))
    write_model(build_vgg(get_spec("vgg9-compact", input=(32, 32, 3)), seed=3), path, card)
    return path


def test_a_real_export(
    model: Path,
    tiny_bundle: Path,
    command_line: CommandLine,
    capsys: pytest.CaptureFixture[str],
    users_cache: Path,
) -> None:
    """Into the place of an older bundle; its JSON is the whole result, its tables say the same."""
    options = ["--calibration", "fingers:36", "--calibration-images", 12, "--precision", "int8", "--no-engine"]
    code, out, _ = command_line("export", model, "-o", tiny_bundle, *options, "--json")
    assert code == 0
    result = msgspec.json.decode(out, type=ExportResult)
    assert result.bundle == str(tiny_bundle)
    assert result.engines == ()
    assert result.manifest == Bundle.open(tiny_bundle).manifest
    assert tuple(result.manifest.graphs) == ("fp32", "int8", "int8-rtx")
    fp32, int8 = result.manifest.graphs["fp32"].evidence, result.manifest.graphs["int8"].evidence
    assert (fp32.against, fp32.images, fp32.agreement.count) == ("keras", 12, 12)
    assert fp32.max_abs_difference < 1e-4
    assert fp32.accuracy == result.manifest.keras_accuracy
    assert int8.against == "fp32"
    assert [path.name for path in tiny_bundle.parent.iterdir()] == ["tiny"]

    image = open_images("fingers:1@5", result.manifest.image).read()
    with Session.open(tiny_bundle, precision="fp32") as exact, Session.open(tiny_bundle, precision="int8") as coarse:
        np.testing.assert_allclose(exact.predict(image), coarse.predict(image), atol=0.1)

    print_export(result)
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert "Proof on the rest of fingers:36@0, which training may have seen, 12 images" in shown
    assert {"fp32", "int8", "int8-rtx"} <= set(rows)
    for name in ("int8", "int8-rtx"):
        calibration = result.manifest.graphs[name].calibration
        assert [each.method for each in calibration.candidates] == [*METHODS] * (2 if name == "int8" else 1)
        of_equalised = ", of equalised layers" if calibration.equalized else ""
        assert f"{name}: INT8 ranges by {calibration.method}{of_equalised}; " in shown
        for each in calibration.candidates:
            assert f"{each.method} {each.divergence:.2g}" in shown
        change = str(result.manifest.graphs[name].evidence.change).replace(" points", "")
        assert next(line for line in shown.splitlines() if line.split()[:1] == [name]).count(change) == 1
    assert "Gate" not in shown
    assert list((users_cache / "vggedge/calibration").glob("*.npz"))
    assert f"Bundle: {tiny_bundle}" in shown


FEW = ["--calibration", "fingers:60", "--calibration-images", 12, "--precision", "int8", "--no-engine"]


def test_a_gate_that_images_cannot_decide_ends_with_code_3_and_the_old_bundle_as_it_was(
    model: Path, tiny_bundle: Path, command_line: CommandLine
) -> None:
    before = {path: path.read_bytes() for path in tiny_bundle.parent.rglob("*") if path.is_file()}
    code, out, err = command_line("export", model, "-o", tiny_bundle, *FEW, "--max-drop", "2", "--calibrator", "max")
    assert (code, out) == (3, "")
    assert "24 evaluation images are too few for a limit of 2 points" in err
    assert "Needed are at least 133." in err
    assert "Name more (--evaluation, --evaluation-images), allow more, or add --accept-undecided." in err
    assert {path: path.read_bytes() for path in tiny_bundle.parent.rglob("*") if path.is_file()} == before


def test_what_is_let_through_undecided_is_told_as_that(
    model: Path, tmp_path: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-drop", "2", "--accept-undecided", "--calibrator", "max"]
    code, out, _ = command_line("export", model, "-o", tmp_path / "b", *FEW, *options, "--json")
    assert code == 0
    result = msgspec.json.decode(out, type=ExportResult)
    manifest = result.manifest
    assert manifest == Bundle.open(tmp_path / "b").manifest
    assert manifest.gate is not None
    assert (manifest.gate.max_drop, manifest.gate.accept_undecided) == (2.0, True)
    assert list(manifest.gate.verdicts) == list(manifest.graphs)[1:]
    assert {verdict.decision for verdict in manifest.gate.verdicts.values()} == {"undecided"}
    print_export(result)
    shown = capsys.readouterr().out
    for name, graph in list(manifest.graphs.items())[1:]:
        assert f"Gate, {name}: let through undecided: {manifest.gate.verdicts[name].describe()}." in shown
        plan = graph.plan
        assert plan is not None
        assert f"{name}: INT8 ranges by max{', of equalised layers' if name.endswith('-rtx') else ''}." in shown
        assert f"{name}: {100 * plan.chosen.int8_share:.2f} % of the multiply-accumulates in INT8" in shown
        assert f"{plan.rule}. Plot: plans/{name}.png." in shown
        assert (tmp_path / "b/plans" / f"{name}.png").is_file()


def record(**changes: Any) -> GraphRecord:
    """Of a graph on 100 images that loses 12 and gains 2."""
    before, after = np.ones(100, bool), np.arange(100) >= 12
    before[12:14] = False
    proof = Comparison(
        against="fp32",
        obtained="emulated",
        images=100,
        max_abs_difference=0.5,
        agreement=build_proportion(86, 100),
        accuracy=build_proportion(88, 100),
        change=build_paired_change(before, after),
    )
    settings = {"file": "f", "precision": "int8", "made_for": (), "op_counts": {}, "evidence": proof} | changes
    return GraphRecord(**settings)


def test_a_loss_that_is_no_chance_is_pointed_out() -> None:
    (line,) = describe_graph("int8", record())
    assert line == (
        "int8: loses accuracy, and not by chance: 12 images lost, 2 gained (exact McNemar test, p = 0.013)."
    )


def test_layers_kept_in_fp32_and_trained_ranges_are_said() -> None:
    calibration = CalibrationRecord(method="trained")
    lines = describe_graph("fp16", record(kept_fp32={"conv": 123456.0, "fc": 70000.0}, calibration=calibration))[1:]
    assert lines == [
        "fp16: in FP32, as FP16 ends at 65504: conv (1.2e+05), fc (7e+04).",
        "fp16: INT8 ranges as training fixed them.",
    ]


def test_a_card_for_a_grey_model_of_one_unit_has_two_labels(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    inputs = keras.Input((32, 24, 1))
    model = keras.Model(inputs, keras.layers.Dense(1, "sigmoid")(keras.layers.Flatten()(inputs)))
    card = ModelCard(labels=("no", "yes"), image=ImageSpec(height=32, width=24))
    write_model(model, tmp_path / "m.keras", card)
    assert read_model(tmp_path / "m.keras")[1] == card
    (tmp_path / "m.labels.txt").write_text("yes\n")
    with pytest.raises(ModelError, match="1 labels for 1 outputs, which tell 2 classes apart"):
        read_model(tmp_path / "m.keras")
    wrong = ModelCard(labels=("no", "yes"), image=ImageSpec(height=24, width=24))
    with pytest.raises(ModelError, match=r"the model takes \(32, 24, 1\), the image spec gives \(24, 24, 3\)"):
        write_model(model, tmp_path / "m.keras", wrong)


def test_a_model_from_elsewhere(tmp_path: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    """Grey, one sigmoid unit, no labels and no image spec beside it: what is added is said in plain words."""
    keras = pytest.importorskip("keras")
    layers = keras.layers
    for name, seed in (("no", 0), ("yes", 1)):
        (tmp_path / "data" / name).mkdir(parents=True)
        rng = np.random.default_rng(seed)
        for number in range(8):
            pixels = rng.integers(100 * seed, 100 * seed + 100, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    inputs = keras.Input((16, 16, 1))
    outputs = layers.Conv2D(4, 3, activation="relu", name="conv")(layers.Rescaling(1 / 128, offset=-1)(inputs))
    outputs = layers.Dense(1, "sigmoid", name="top")(layers.Flatten()(outputs))
    keras.Model(inputs, outputs).save(tmp_path / "grey.keras")
    options = ["--calibration", tmp_path / "data", "--precision", "fp32,int8", "--no-engine"]
    code, out, err = command_line("export", tmp_path / "grey.keras", "-o", tmp_path / "b", *options)
    assert (code, "labels are the data's class names" in err) == (0, True)
    assert "Adapted: input: grey made of RGB, as Pillow's convert('L') does" in out
    assert "Adapted: output: one unit became two classes, [1 - p, p], p being the unit's sigmoid." in out
    with Session.open(tmp_path / "b") as session:
        assert session.labels == ("no", "yes")
        assert session.predict(tmp_path / "data/no/0.png").shape == (1, 2)

    keras.Model(inputs, layers.Conv2D(3, 1, name="map")(inputs)).save(tmp_path / "segmenter.keras")
    code, out, err = command_line("export", tmp_path / "segmenter.keras", "-o", tmp_path / "c", *options)
    assert (code, out, (tmp_path / "c").exists()) == (1, "", False)
    assert "of the layer 'map', is (None, 16, 16, 3)" in err


def test_doubts_about_the_whole_proof_are_told(
    model: Path, tmp_path: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network without training answers by chance, and here the images that prove it also calibrated."""
    options = ["--calibration", "fingers:24", "--evaluation", "fingers:24", "--calibration-images", 12]
    more = ["--precision", "fp32,int8", "--calibrator", "max", "--no-engine"]
    code, out, _ = command_line("export", model, "-o", tmp_path / "b", *options, *more)
    assert code == 0
    assert "Doubt: 12 of the 24 evaluation images also calibrated or chose" in out
    assert "Doubt: fp32 is hardly better than to answer always the most frequent class (16.7 %)." in out
    assert Bundle.open(tmp_path / "b").manifest.data["evaluation"].seen == 12


@pytest.mark.parametrize(
    ("max_drop", "asked", "size", "wanted"),
    [(None, None, 64, 500), (0.5, None, 64, 4000), (0.1, None, 64, 8192), (0.5, None, 224, 668), (5, None, 64, 500),
     (0.5, 70, 64, 70), (0.5, None, 512, 500)],
)  # fmt: skip
def test_how_many_images_choose(max_drop: float | None, asked: int | None, size: int, wanted: int) -> None:
    config = ExportConfig(max_drop=max_drop)
    assert export._selection_images(config, asked, ImageSpec(height=size, width=size)) == wanted


def test_a_fine_tuned_model_is_told_apart(tiny: Any, tmp_path: Path) -> None:
    def change(manifest: Any) -> Any:
        trained = msgspec.structs.replace(manifest.graphs["int8"], calibration=CalibrationRecord(method="trained"))
        data = {"evaluation": DataRecord(name="x", images=3, sha256="")}
        return msgspec.structs.replace(manifest, graphs=manifest.graphs | {"int8": trained}, data=data)

    manifest = tiny(tmp_path / "b", ("fp32", "int8"), change=change).manifest
    assert any("was fine-tuned for INT8" in line for line in export_tables._describe_doubts(manifest))
    plain = msgspec.structs.replace(manifest, graphs={"fp32": manifest.graphs["fp32"]})
    assert not any("was fine-tuned" in line for line in export_tables._describe_doubts(plain))
