from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from vggedge.architecture import get_spec
from vggedge.cli import evaluate as command
from vggedge.cli.evaluate import EvaluateAnswer
from vggedge.data import open_images
from vggedge.evaluation import AS_DEPLOYED, Evaluation
from vggedge.model import ModelCard, build_vgg, import_keras, write_model
from vggedge_runtime.preprocess import ImageSpec, Normalization
from vggedge_runtime.session import Session
from vggedge_runtime.statistics import build_class_figures, build_proportion

CommandLine = Callable[..., tuple[object, str, str]]
FINGERS = ("0", "1", "2", "3", "4", "5")
LABELS = ("a-red", "b-green", "c-blue")
COLOURS = ((250, 0, 0), (0, 250, 0), (0, 0, 250))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four 60x40 pictures a colour; one of the green ones is blue."""
    for index, label in enumerate(LABELS):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(4):
            shown = 2 if (index, number) == (1, 3) else index
            Image.new("RGB", (60, 40), COLOURS[shown]).save(tmp_path / "photos" / label / f"{number}.png")
    return tmp_path / "photos"


def decode(out: str) -> EvaluateAnswer:
    return msgspec.json.decode(out, type=EvaluateAnswer)


class TestBundle:
    @pytest.fixture(autouse=True)
    def _block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A device has none of these."""
        for name in ("tensorflow", "keras", "tf2onnx"):
            monkeypatch.setitem(sys.modules, name, None)

    @pytest.fixture
    def bundle(self, tiny: Any, tmp_path: Path) -> Path:
        """Names the brightest colour of 4x6 pictures."""
        folder: Path = tiny(tmp_path / "colours", labels=LABELS).path
        return folder

    def test_json(self, bundle: Path, photos: Path, command_line: CommandLine) -> None:
        code, out, err = command_line("evaluate", bundle, photos, "--json")
        assert (code, err) == (0, "")
        answer = decode(out)
        assert (answer.model, answer.graph, answer.backend) == (str(bundle), "fp32", "ort")
        result = answer.result
        assert (result.n, result.labels, result.protocol) == (12, LABELS, AS_DEPLOYED)
        assert result.accuracy == build_proportion(11, 12)
        assert result.confusion == ((4, 0, 0), (0, 3, 1), (0, 0, 4))
        assert [each.recall for each in result.classes] == [1.0, 0.75, 1.0]

    def test_tables(self, bundle: Path, photos: Path, command_line: CommandLine) -> None:
        code, out, err = command_line("evaluate", bundle, photos)
        assert code == 0
        rows = [" ".join(line.split()) for line in out.splitlines()]
        assert f"{bundle} (fp32 on ort) on {photos}, 12 images" in out
        assert "accuracy [95 %] 91.67 % [64.6, 98.5]" in rows
        assert "b-green 0 3 1" in rows
        assert "b-green 4 75.00 % 100.00 % 85.71 %" in rows
        assert "Protocol: as deployed, 4x6 pixels; 1 view an image." in out
        assert "evaluating" in err

    def test_it_is_what_the_device_answers(self, bundle: Path, photos: Path, command_line: CommandLine) -> None:
        paths = sorted(photos.rglob("*.png"))
        with Session.open(bundle) as session:
            probabilities = session.predict(paths)
        true = np.repeat(range(3), 4)
        wanted = -np.log(np.maximum(probabilities[np.arange(12), true], 1e-7)).mean()
        found = decode(command_line("evaluate", bundle, photos, "--json")[1]).result.cross_entropy
        assert found == pytest.approx(wanted, rel=1e-5)

    def test_crops_of_several_scales(self, bundle: Path, photos: Path, command_line: CommandLine) -> None:
        options = ["--scales", "6, 8,10", "--crops", 2, "--flip", "--images", 9, "--json"]
        code, out, _ = command_line("evaluate", bundle, photos, *options)
        assert code == 0
        result = decode(out).result
        assert (result.n, result.protocol.views) == (9, 24)
        assert result.description == "Q = 6, 8, 10; 2x2 crops of 4x6; mirrored, too; 24 views an image"
        assert result.accuracy.count >= 8

    def test_a_chosen_graph(self, tiny: Any, photos: Path, tmp_path: Path, command_line: CommandLine) -> None:
        bundle = tiny(tmp_path / "two", ("fp32", "int8"), labels=LABELS).path
        answer = decode(command_line("evaluate", bundle, photos, "--precision", "int8", "--json")[1])
        assert answer.graph == "int8"

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (("--dense", "--scales", "8"), 2, "Give the MODEL.keras"),
            (("--scales", "5"), 2, "scale 5: an image whose shorter side"),
            (("--scales", "64;80"), 2, "--scales is '64;80'; needed are lengths in pixels"),
            (("--scales", ""), 2, "needed are lengths"),
            (("--scales", "8,8"), 2, "different lengths"),
            (("--crops", "3"), 2, "needs scales"),
            (("--crops", "0", "--scales", "8"), 2, "--crops"),
            (("--images", "0"), 2, "--images"),
            (("--backend", "abacus"), 2, "abacus"),
            (("--precision", "fp8"), 2, "fp8"),
        ],
    )
    def test_wrong_options(
        self,
        options: tuple[str, ...],
        code: int,
        message: str,
        bundle: Path,
        photos: Path,
        command_line: CommandLine,
    ) -> None:
        found, out, err = command_line("evaluate", bundle, photos, *options)
        assert message in err
        assert (found, out) == (code, "")

    def test_other_classes(self, tiny_bundle: Path, photos: Path, command_line: CommandLine) -> None:
        code, out, err = command_line("evaluate", tiny_bundle, photos)
        assert (code, out) == (2, "")
        assert "trained on the classes red, green, blue, the data has a-red, b-green, c-blue" in err

    def test_no_data(self, bundle: Path, tmp_path: Path, command_line: CommandLine) -> None:
        assert "nowhere: no such folder" in command_line("evaluate", bundle, tmp_path / "nowhere")[2]

    def test_a_damaged_picture(self, bundle: Path, photos: Path, command_line: CommandLine) -> None:
        (photos / "b-green" / "1.png").write_bytes(b"no picture")
        code, out, err = command_line("evaluate", bundle, photos, "--json")
        assert (code, out) == (1, "")
        assert str(photos / "b-green" / "1.png") in err

    def test_a_folder_that_is_no_bundle(self, photos: Path, command_line: CommandLine) -> None:
        code, _, err = command_line("evaluate", photos, photos)
        assert code == 1
        assert "error:" in err


class TestRefusedBeforeTensorFlowLoads:
    @pytest.fixture
    def model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for name in ("tensorflow", "keras"):
            monkeypatch.setitem(sys.modules, name, None)
        with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
            archive.writestr("config.json", "{}")
        (tmp_path / "m.labels.txt").write_text("".join(f"{label}\n" for label in FINGERS))
        (tmp_path / "m.image.json").write_text('{"height": 64, "width": 96}')
        return tmp_path / "m.keras"

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (("fingers:6", "--scales", "64"), 2, "Use scales of at least 96"),
            (("fingers:6", "--precision", "fp32"), 2, "--backend and --precision choose within a bundle"),
            (("fingers:6", "--backend", "ort"), 2, "--backend and --precision choose within a bundle"),
            (("nowhere",), 1, "nowhere: no such folder"),
            (("fingers:6",), 1, "vggedge[train]"),  # got so far, or the others would prove nothing
        ],
    )
    def test_what_is_wrong(
        self, options: tuple[str, ...], code: int, message: str, model: Path, command_line: CommandLine
    ) -> None:
        found, out, err = command_line("evaluate", model, *options)
        assert message in err
        assert (found, out) == (code, "")

    def test_other_classes(self, model: Path, photos: Path, command_line: CommandLine) -> None:
        assert "trained on the classes 0, 1, 2" in command_line("evaluate", model, photos)[2]

    def test_no_model(self, tmp_path: Path, command_line: CommandLine) -> None:
        assert "m.keras: no such file" in command_line("evaluate", tmp_path / "m.keras", "fingers:6")[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network for 32x32 images: what is tested is the way, not the accuracy."""
    pytest.importorskip("tensorflow")
    path = tmp_path_factory.mktemp("model") / "small.keras"
    card = ModelCard(labels=FINGERS, image=ImageSpec(height=32, width=32))
    write_model(build_vgg(get_spec("vgg9-compact", input=(32, 32, 3)), seed=3), path, card)
    return path


class TestKeras:
    def test_as_deployed(self, model: Path, command_line: CommandLine) -> None:
        code, out, err = command_line("evaluate", model, "fingers:30", "--json")
        assert (code, err) == (0, "")
        answer = decode(out)
        assert (answer.model, answer.graph, answer.backend) == (str(model), None, "keras")
        images = open_images("fingers:30", ImageSpec(height=32, width=32))
        network = import_keras().models.load_model(model)
        wanted = network.predict_on_batch(images.read().astype(np.float32)).argmax(1)
        assert answer.result.accuracy == build_proportion(int((wanted == images.targets).sum()), 30)

    def test_dense(self, model: Path, command_line: CommandLine) -> None:
        options = ["fingers:12", "--json", "--scales"]
        cropped = decode(command_line("evaluate", model, *options, "32")[1]).result
        dense = decode(command_line("evaluate", model, *options, "32", "--dense")[1]).result
        assert dense.cross_entropy == pytest.approx(cropped.cross_entropy, abs=1e-5)
        several = decode(command_line("evaluate", model, *options, "32,64,80", "--dense")[1]).result
        assert several.description == "Q = 32, 64, 80; the whole image, dense; 3 views an image"

    def test_without_a_card_the_labels_are_the_datas_and_that_is_said(
        self, model: Path, tmp_path: Path, command_line: CommandLine
    ) -> None:
        (tmp_path / "bare.keras").write_bytes(model.read_bytes())
        code, out, err = command_line("evaluate", tmp_path / "bare.keras", "fingers:12")
        assert code == 0
        assert "labels are the data's class names" in err
        assert "fingers:12@0, 12 images" in out
        code, out, err = command_line("evaluate", tmp_path / "bare.keras", "fingers:12", "--json")
        assert (code, err) == (0, "")
        assert decode(out).result == msgspec.structs.replace(
            decode(command_line("evaluate", model, "fingers:12", "--json")[1]).result,
            seconds=decode(out).result.seconds,
        )

    def test_data_with_other_classes_than_a_model_without_a_card(
        self, model: Path, photos: Path, tmp_path: Path, command_line: CommandLine
    ) -> None:
        (tmp_path / "bare.keras").write_bytes(model.read_bytes())
        code, out, err = command_line("evaluate", tmp_path / "bare.keras", photos)
        assert (code, out) == (1, "")
        assert "array of (12, 6); needed is (12, 3)" in err


class TestForeignModels:
    """Networks of one layer, each with something in the way."""

    def write(self, path: Path, shape: tuple[int | None, ...], *layers: Any, card: ImageSpec | None = None) -> Path:
        keras = import_keras()
        model = keras.Sequential([keras.Input(shape), *layers])
        if card is None:
            model.save(path)
        else:
            write_model(model, path, ModelCard(labels=FINGERS, image=card))
        return path

    @pytest.fixture
    def layers(self) -> Any:
        pytest.importorskip("tensorflow")
        return import_keras().layers

    def test_normalised_by_the_image_spec(self, layers: Any, tmp_path: Path, command_line: CommandLine) -> None:
        """The same network with its Rescaling inside and outside."""

        def head() -> list[Any]:
            draw = import_keras().initializers.GlorotUniform(seed=1)
            return [layers.Flatten(), layers.Dense(6, activation="softmax", kernel_initializer=draw)]

        inside = self.write(tmp_path / "in.keras", (8, 8, 3), layers.Rescaling(1 / 255), *head())
        card = ImageSpec(height=8, width=8, normalization=Normalization(mean=(0.0,) * 3, std=(255.0,) * 3))
        outside = self.write(tmp_path / "out.keras", (8, 8, 3), *head(), card=card)
        first, second = (
            decode(command_line("evaluate", path, "fingers:12", "--json")[1]).result for path in (inside, outside)
        )
        assert first.cross_entropy == pytest.approx(second.cross_entropy, rel=1e-5)
        assert first.confusion == second.confusion

    def test_what_is_refused(self, layers: Any, tmp_path: Path, command_line: CommandLine) -> None:
        flat, dense, rescaling = layers.Flatten(), layers.Dense(6, bias_initializer="ones"), layers.Rescaling(1.0)
        spec = ImageSpec(height=8, width=8)
        twice = ImageSpec(height=8, width=8, normalization=Normalization(mean=(0.0,) * 3, std=(255.0,) * 3))
        cases: list[tuple[tuple[int | None, ...], list[Any], ImageSpec | None, int, str]] = [
            ((8, 8, 3), [flat, dense], None, 2, "nothing says what its pixels"),
            ((8, 8, 3), [flat, dense], spec, 1, "made into probabilities by vggedge export: evaluate its bundle"),
            ((8, 8, 1), [rescaling, flat, dense], None, 1, "evaluate its bundle"),
            ((8, 8, 3), [rescaling, flat, layers.Dense(1)], None, 1, "at least 2 classes"),
            ((None, None, 3), [rescaling, layers.GlobalAveragePooling2D(), dense], None, 1, "images of any size"),
            ((8, 8, 3), [rescaling, flat, layers.Softmax()], None, 1, "needed is (12, 6)"),
            ((8, 8, 3), [rescaling, flat, dense], twice, 1, "doing both gives wrong answers"),
        ]
        for number, (shape, parts, card, code, message) in enumerate(cases):
            copies = [type(part).from_config(part.get_config()) for part in parts]  # a layer is built for one shape
            path = self.write(tmp_path / f"{number}.keras", shape, *copies, card=card)
            found, out, err = command_line("evaluate", path, "fingers:12")
            assert message in err, number
            assert (found, out) == (code, ""), number

    def test_dense_needs_a_vgg(self, layers: Any, tmp_path: Path, command_line: CommandLine) -> None:
        path = self.write(
            tmp_path / "m.keras", (8, 8, 3), layers.Rescaling(1.0), layers.Flatten(), layers.Dense(6, "softmax")
        )
        code, out, err = command_line("evaluate", path, "fingers:12", "--dense")
        assert (code, out) == (1, "")
        assert "not a VGG of this family" in err


def test_many_classes_are_shown_by_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    confusion = np.diag(np.full(13, 10))
    confusion[4] = [0, 7, 0, 0, 3, *[0] * 8]
    confusion[8, 9] = 2
    labels = tuple(f"class{number:02}" for number in range(13))
    result = Evaluation(
        data="many",
        n=132,
        protocol=AS_DEPLOYED,
        description="as deployed",
        accuracy=build_proportion(123, 132),
        top5_accuracy=build_proportion(130, 132),
        balanced_accuracy=0.95,
        cross_entropy=0.25,
        labels=labels,
        confusion=tuple(map(tuple, confusion.tolist())),
        classes=build_class_figures(confusion, labels),
        seconds=1.0,
    )
    command._print_tables(
        EvaluateAnswer(model="m.keras", graph=None, backend="keras", image=ImageSpec(height=8, width=8), result=result)
    )
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "top-5 accuracy [95 %] 98.48 % [94.6, 99.6]" in rows
    assert "class04 10 30.00 % 100.00 % 46.15 %" in rows
    assert "class04 class01 7 70.00 %" in rows
    assert "class08 class09 2 16.67 %" in rows
    assert "The 2 most frequent confusions" in rows
    shown = [row.split()[0] for row in rows if re.match(r"class\d\d \d", row)]
    assert len(shown) == 10
    assert shown[:2] == ["class04", "class08"]
