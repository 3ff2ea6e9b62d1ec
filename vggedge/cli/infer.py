"""vggedge infer: answers for images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from vggedge.cli import output
from vggedge_runtime.backends.base import backend_choices
from vggedge_runtime.errors import DataError, UsageError
from vggedge_runtime.preprocess import find_images, find_other_files
from vggedge_runtime.session import Session

NAME = "infer"


class Guess(msgspec.Struct, frozen=True):
    """A class and its probability."""

    label: str
    probability: float


class Answer(msgspec.Struct, frozen=True):
    """What the network says of one image, most probable class first; or why it could not be read."""

    image: str
    guesses: list[Guess]
    error: str | None = None


def command(
    bundle: Annotated[Path, typer.Argument(help="Folder written by vggedge export.")],
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE", help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show an image.")] = 1,
    backend: Annotated[str, typer.Option(help=f"One of {backend_choices()}.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16, int8, or the name of a graph.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads an inference; 0: the library's choice.")] = 0,
    json: output.JsonFlag = False,
) -> None:
    """Answer images with classes. An unreadable image is reported and the others are answered; exit code 1 then."""
    paths = _expand(sources)
    answers: list[Answer] = []
    with Session.open(bundle, backend, precision, threads=threads) as session:
        if not json:
            output.print_note(f"{session.graph} on {session.backend} ({session.why})")
        with output.progress(quiet=json) as advance:
            for index, path in enumerate(paths):
                answers.append(_answer(session, path, top))
                advance(index + 1, len(paths), "answering")
    if json:
        output.print_json(answers)
    else:
        _print_table(answers, top)
    failed = [answer for answer in answers if answer.error]
    for answer in failed:
        output.print_error(str(answer.error))
    if failed:
        raise typer.Exit(code=1)


def _expand(sources: list[Path]) -> list[Path]:
    paths: list[Path] = []
    for source in sources:
        if source.is_dir():
            found = find_images(source)
            output.print_skipped(find_other_files(source))
            if not found:
                raise DataError(f"{source}: no image in this folder or below it.")
            paths += found
        elif source.exists():
            paths.append(source)
        else:
            raise UsageError(f"{source}: no such file or folder.")
    return paths


def _answer(session: Session, path: Path, top: int) -> Answer:
    try:
        probabilities = session.predict(path)[0]
    except DataError as error:
        return Answer(output.format_path(path), [], str(error))
    best = probabilities.argsort()[::-1][:top]
    return Answer(output.format_path(path), [Guess(session.labels[i], float(probabilities[i])) for i in best])


def _print_table(answers: list[Answer], top: int) -> None:
    columns = ["image", *(f"{rank}." for rank in range(1, top + 1))]
    rows = [
        [answer.image, *(f"{guess.label}  {100 * guess.probability:.1f} %" for guess in answer.guesses)]
        for answer in answers
        if not answer.error
    ]
    if rows:
        output.print_table("", columns if top > 1 else ["image", "class"], rows)
