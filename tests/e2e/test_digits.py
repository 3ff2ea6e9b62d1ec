"""examples/digits: real scans, through the very commands that its README prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vggedge_runtime import Bundle

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(folder that the README calls ``demo/digits``, what each command printed)."""
    pytest.importorskip("sklearn")
    work = tmp_path_factory.mktemp("digits")
    (work / "examples").symlink_to(ROOT / "examples")
    block = re.search(r"```sh\n(.*?)```", (ROOT / "examples" / "digits" / "README.md").read_text(), re.DOTALL)
    assert block is not None
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    printed = []
    for command in block.group(1).splitlines():
        done = subprocess.run(
            command, shell=True, cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        printed.append(done.stdout)
    return work / "demo" / "digits", printed


def test_held_out_accuracy(digits: tuple[Path, list[str]]) -> None:
    manifest = Bundle.open(digits[0] / "bundle").manifest
    evidence = {name: graph.evidence for name, graph in manifest.graphs.items()}

    assert manifest.labels == tuple("0123456789")
    assert evidence["fp32"].images == 355
    assert evidence["fp32"].accuracy.share >= 0.97
    assert evidence["fp32"].max_abs_difference <= 1e-5
    assert evidence["int8"].accuracy.share >= evidence["fp32"].accuracy.share - 0.01
    assert evidence["int8-rtx"].accuracy.share >= evidence["fp32"].accuracy.share - 0.01


def test_answers_are_printed(digits: tuple[Path, list[str]]) -> None:
    answers = [line.split()[1] for line in digits[1][3].splitlines() if ".png" in line]

    assert len(answers) == 35  # scans of a seven held out
    assert answers.count("7") >= 33
