from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vggedge.cli import infer
from vggedge_runtime.session import Session

CommandLine = Callable[..., tuple[object, str, str]]
COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with red.png, green.png and, one level below, blue.png."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name, colour in COLOURS.items():
        place = folder / "below" if name == "blue" else folder
        Image.new("RGB", (60, 40), colour).save(place / f"{name}.png")
    return folder


def test_json_is_a_list_and_alone_on_stdout(tiny_bundle: Path, photos: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("infer", tiny_bundle, photos / "red.png", "--top", 3, "--json")
    assert (code, err) == (0, "")
    (answer,) = json.loads(out)
    assert answer["image"] == str(photos / "red.png")
    assert answer["error"] is None
    assert answer["guesses"][0]["label"] == "red"
    # softmax of (10, 0, 0)
    wanted = [np.exp(10) / (np.exp(10) + 2), 1 / (np.exp(10) + 2), 1 / (np.exp(10) + 2)]
    assert [guess["probability"] for guess in answer["guesses"]] == pytest.approx(wanted, abs=1e-6)


def test_a_folder_is_its_images_at_any_depth(tiny_bundle: Path, photos: Path, command_line: CommandLine) -> None:
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden.png").write_bytes(b"no image")
    code, out, _ = command_line("infer", tiny_bundle, photos, "--json")
    assert code == 0
    assert [(Path(each["image"]).name, each["guesses"][0]["label"]) for each in json.loads(out)] == [
        ("blue.png", "blue"),
        ("green.png", "green"),
        ("red.png", "red"),
    ]


def test_sources_keep_their_order(tiny_bundle: Path, photos: Path, command_line: CommandLine) -> None:
    sources = [photos / "red.png", photos / "below", photos / "green.png", photos / "red.png"]
    code, out, _ = command_line("infer", tiny_bundle, *sources, "--json")
    assert code == 0
    assert [each["guesses"][0]["label"] for each in json.loads(out)] == ["red", "blue", "green", "red"]


def test_the_table(tiny_bundle: Path, photos: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("infer", tiny_bundle, photos)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if ".png" in line]
    assert rows[0] == [str(photos / "below/blue.png"), "blue", "100.0", "%"]
    assert len(rows) == 3
    assert err.splitlines() == ["fp32 on ort (auto: the first installed of ort, openvino)", "answering ..."]


def test_more_classes_than_there_are(tiny_bundle: Path, photos: Path, command_line: CommandLine) -> None:
    code, out, _ = command_line("infer", tiny_bundle, photos / "red.png", "--top", 9)
    assert code == 0
    assert all(name in out for name in COLOURS)
    code, out, _ = command_line("infer", tiny_bundle, photos / "red.png", "--top", 9, "--json")
    assert len(json.loads(out)[0]["guesses"]) == 3


def test_an_unreadable_image_does_not_stop_the_others(
    tiny_bundle: Path, photos: Path, command_line: CommandLine
) -> None:
    broken = photos / "a-broken.png"
    broken.write_bytes((photos / "red.png").read_bytes()[:50])
    code, out, err = command_line("infer", tiny_bundle, photos, "--json")
    assert code == 1
    answers = json.loads(out)
    assert [bool(each["error"]) for each in answers] == [True, False, False, False]
    assert answers[0]["guesses"] == []
    assert f"error: {broken}" in err
    code, out, err = command_line("infer", tiny_bundle, photos)
    assert code == 1
    assert "a-broken" not in out
    assert "a-broken" in err
    assert sum(".png" in line for line in out.splitlines()) == 3


def test_only_unreadable_images(tiny_bundle: Path, tmp_path: Path, command_line: CommandLine) -> None:
    (tmp_path / "text.png").write_text("no image")
    code, out, err = command_line("infer", tiny_bundle, tmp_path / "text.png")
    assert (code, out) == (1, "")
    assert "not an image that Pillow can read" in err


def test_images_are_held_one_at_a_time(
    tiny_bundle: Path, photos: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    predict = Session.predict

    def spy(self: Session, images: Any) -> Any:
        asked.append(images)
        return predict(self, images)

    monkeypatch.setattr(infer.Session, "predict", spy)
    assert command_line("infer", tiny_bundle, photos)[0] == 0
    assert [type(each).__name__ for each in asked] == ["PosixPath"] * 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{bundle}", "nowhere.png"], 2, "nowhere.png: no such file or folder"),
        (["{bundle}", "{empty}"], 1, "no image in this folder or below it"),
        (["{empty}", "{photos}"], 1, "no manifest.json in it"),
        (["{bundle}", "{photos}", "--backend", "tpu"], 2, "backend 'tpu' is unknown"),
        (["{bundle}", "{photos}", "--precision", "fp8"], 2, "precision 'fp8' is unknown"),
        (["{bundle}", "{photos}", "--precision", "int8"], 1, "no int8 graph"),
        (["{bundle}", "{photos}", "--top", "0"], 2, "'--top'"),
        (["{bundle}", "{photos}", "--threads", "-1"], 2, "'--threads'"),
        (["{bundle}"], 2, "Missing argument"),
    ],
)
@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_errors(
    arguments: list[str],
    code: int,
    message: str,
    json_option: list[str],
    tiny_bundle: Path,
    photos: Path,
    tmp_path: Path,
    command_line: CommandLine,
) -> None:
    (tmp_path / "empty").mkdir()
    filled = [each.format(bundle=tiny_bundle, photos=photos, empty=tmp_path / "empty") for each in arguments]
    found, out, err = command_line("infer", *filled, *json_option)
    assert (found, out) == (code, "")
    assert message in err


def test_a_damaged_bundle_answers_nothing(tiny_bundle: Path, photos: Path, command_line: CommandLine) -> None:
    graph = tiny_bundle / "graphs/model.fp32.onnx"
    shutil.copy(tiny_bundle / "labels.txt", graph)
    code, out, err = command_line("infer", tiny_bundle, photos)
    assert (code, out) == (1, "")
    assert "its content is not what export wrote" in err
