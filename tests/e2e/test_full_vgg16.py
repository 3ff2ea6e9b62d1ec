"""The full VGG-16 exports on an ordinary PC: under 4 GB, and still Keras's numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_vgg16_export.py"


def test_memory_and_parity() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)

    assert figures["peak_bytes"] < 4e9
    assert figures["max_abs_difference"]["fp32"] <= 1e-5
    assert figures["agreement"]["fp32"] == 1.0
