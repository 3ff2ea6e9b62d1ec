"""Put the verdicts of results/*.json into README.md, between its two markers.

python benchmarks/claims/summary.py
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from reporting import RESULTS, Part, format_table

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- verdicts: written by summary.py -->", "<!-- end of verdicts -->"
ORDER = (
    "vanishing_gradients",
    "local_response_normalization",
    "depth",
    "one_by_one",
    "multi_scale",
    "parameters_and_time",
)


class Result(msgspec.Struct, frozen=True):
    """What the summary needs of a result."""

    claim: str
    parts: tuple[Part, ...]


def read_result(name: str) -> Result:
    """The committed result of one script."""
    return msgspec.json.decode((RESULTS / f"{name}.json").read_bytes(), type=Result)


def format_summary() -> str:
    """Every statement of every claim with its verdict, as a Markdown table."""
    rows = []
    for name, letter in zip(ORDER, "abcdef", strict=True):
        result = read_result(name)
        for number, part in enumerate(result.parts):
            claim = f"[({letter})](results/{name}.md) {result.claim}" if number == 0 else ""
            rows.append((claim, part.statement, f"**{part.verdict}**", part.figures))
    lines = format_table(("claim", "what was tested", "verdict", "figures"), rows)
    return "\n".join([lines[0], "| --- | --- | --- | --- |", *lines[2:]])


def insert_summary(text: str, summary: str) -> str:
    """``text`` with ``summary`` between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{summary}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(insert_summary(README.read_text(encoding="utf-8"), format_summary()), encoding="utf-8")
