"""The functions behind the page and its API, on one predictor."""

import csv
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any, NamedTuple

import gradio as gr
import spaces
import xlsxwriter
from PIL import Image

from hep2.fields import check_pixel_size, decode_field, draw_overlay, specimen_rows
from hep2.fields.segmentation import CLEAR_FIT, find_cells
from hep2.images import Cell, Decoded, decode, make_cell
from hep2.patterns import MODEL_TITLES
from hep2.predictor import Predictor
from hep2.tables import COLUMNS, harmless, table_row
from hep2.ui.api import NO_IMAGE
from hep2.ui.fragments import (
    TOO_SMALL_FOR_FIELD,
    counts_html,
    empty_html,
    message_html,
    model_details_html,
    progress_html,
    report_html,
    specimen_html,
    table_html,
    verdict_html,
)

CSS = Path(__file__).with_name("page.css")
STOPPED = "Nothing more is computed. Change the list, or read it again."
MAX_IMAGES = 10_000  # in one request: some minutes of two cores
MAX_PIXELS = 200_000_000  # of all fields of one specimen together, which are held at once
STEP = 64  # cells between two signs of progress
SEVERAL = 4  # round nuclei of one size, from which an image is a field


class Example(NamedTuple):
    """An image to show: what its row is called, the path, the name that is shown, what is known of its pattern."""

    row: str
    path: Path
    name: str
    truth: str = ""


class Page:
    """The functions behind the page and its API, on one predictor that was loaded before the first request."""

    def __init__(self, predictor: Predictor, examples: dict[str, Example] | None = None) -> None:
        self.predictor, self.weights, self.examples = predictor, predictor.weights, examples or {}
        self.live: set[int] = set()  # the jobs that somebody waits for
        # On ZeroGPU these borrow a GPU for some seconds; elsewhere they are as they were. Only the models need it.
        self.explain_cell = spaces.GPU(duration=10)(predictor.explain)
        self.classify_cells = spaces.GPU(duration=lambda cells: 10 + len(cells) // 100)(predictor.classify_cells)

    def show(self, example: Example, channel: str | None = None, plane: float | None = None) -> str:
        """Classify one image, and return what the page shows of it."""
        try:
            decoded = decode(example.path, **chosen(channel, plane))
            cell = cell_of(decoded)
        except (ValueError, OSError) as error:
            return message_html("This image could not be read", str(error), example.name)
        return verdict_html(self.explain_cell((example.name, cell)), decoded, example.truth)

    def show_example(self, event: gr.EventData) -> str:
        return self.show(self.examples[event.chosen])

    def show_field_example(self, event: gr.EventData) -> list[str]:
        return [str(self.examples[event.chosen].path)]

    def show_upload(self, paths: list[str] | None, channel: str, plane: float | None) -> tuple:
        """Show a single image at once; hand many over to the tab for many. The box is ready for the next."""
        if not paths:
            return gr.skip(), None, *[gr.skip()] * 4
        if len(paths) > 1:
            return gr.skip(), None, gr.skip(), gr.Tabs(selected="many"), paths, time.monotonic_ns()
        example = Example("", Path(paths[0]), Path(paths[0]).name, "")
        return self.show(example, channel, plane), None, paths, *[gr.skip()] * 3

    def show_as_field(self, paths: list[str] | None) -> tuple:
        return gr.Tabs(selected="field"), paths, time.monotonic_ns()

    def begin(self, job: int | None) -> tuple[int, str]:
        """Announce a job, which ends the one before it in its tab: the last state of a list wins."""
        self.live.discard(job)
        self.live.add(job := time.monotonic_ns())
        return job, progress_html("Starting")

    def stop(self, job: int) -> None:
        self.live.discard(job)

    def classify_many(self, paths: list[str] | None, channel: str, plane: float | None, job: int) -> Iterator[tuple]:
        """Classify many images into a table and files, which Gradio takes into its care before they are deleted."""
        predictions = []
        check_count(paths or [])
        for prediction in self._classify(named(paths or []), channel, plane):
            predictions.append(prediction)
            if job not in self.live:
                yield message_html("Stopped", STOPPED, kind="doubt"), gr.skip(), None
                return
            if len(predictions) % STEP == 0:
                done = f"{len(predictions):,} of {len(paths):,} cells"
                yield progress_html(done, len(predictions) / len(paths)), gr.skip(), None
        if not predictions:
            yield empty_html(), counts_html([]), None
            return
        rows = [COLUMNS, *(table_row(prediction, self.weights.revision) for prediction in predictions)]
        with TemporaryDirectory() as folder:
            yield table_html(predictions), counts_html(predictions), spreadsheets(rows, Path(folder) / "cells")

    def show_specimen(
        self, paths: list[str] | None, pixel_size: float | None, channel: str, plane: float | None, job: int
    ) -> Iterator[tuple]:
        """Read the fields of one specimen into a verdict, its cells, and files."""
        if not paths:
            yield empty_html(), None
            return
        try:
            fields = fields_of(named(paths), pixel_size, channel, plane)
        except (ValueError, OSError) as error:
            yield message_html("This specimen could not be read", str(error)), None
            return
        specimen = None
        for specimen in in_steps(partial(self._specimen, fields, pixel_size)):
            if job not in self.live:
                yield message_html("Stopped", STOPPED, kind="doubt"), None
                return
            if isinstance(specimen, str):
                yield progress_html(specimen), None
        shown = specimen_html(specimen, [decoded.intensity for _, decoded in fields])
        with TemporaryDirectory() as folder:
            files = spreadsheets(specimen_rows(specimen), Path(folder) / "specimen")
            for number, (name, decoded) in enumerate(fields):
                files.append(f"{folder}/{Path(name).stem}-cells.png")
                draw_overlay(specimen, decoded.intensity, number).save(files[-1])
            files.append(f"{folder}/report.html")
            report = report_html(specimen, shown, CSS.read_text(), time.strftime("%Y-%m-%d"))
            Path(files[-1]).write_text(report, encoding="utf-8")
            yield shown, files

    def _classify(self, images: Iterable, channel: str | None, plane: float | None) -> Iterator:
        return self.predictor.classify(images, **chosen(channel, plane), classify_cells=self.classify_cells)

    def _specimen(self, fields: list[tuple[str, Decoded]], pixel_size: float | None, progress: Callable) -> Any:
        options = {"progress": progress, "classify_cells": self.classify_cells}
        return self.predictor.specimen(fields, pixel_size=pixel_size or None, **options)

    def classify(self, image: tuple, channel: str | None = None, plane: int | None = None) -> dict:
        """Classify one image of a HEp-2 cell: verdict, its probability, and six probabilities of each of four models.

        What shows no HEp-2 cell has no verdict (null). An image that cannot be read is an error.

        Args:
            image: a data URI or base64 text (or an uploaded file) of one cell that fills most of the image
            channel: which channel to read: a name that the file gives, red, green, blue, or a number from 1
            plane: which plane of a stack to read, from 1
        """
        (prediction,) = self.classify_cells([named_cell(image, channel, plane)])
        return prediction.as_dict()

    def classify_batch(self, images: list, channel: str | None = None, plane: int | None = None) -> list[dict]:
        """Classify many images of one HEp-2 cell each: a list of what classify answers, in the order of the images.

        An image that cannot be read is answered by {"file", "error"}, and costs no other its answer.

        Args:
            images: data URIs or base64 texts (or uploaded files)
            channel: as classify takes it
            plane: as classify takes it
        """
        check_count(require(images))
        return [answer.as_dict() for answer in self._classify(images, channel, plane)]

    def explain(
        self, image: tuple, channel: str | None = None, plane: int | None = None
    ) -> Iterator[tuple[dict, list]]:
        """Classify one image of a HEp-2 cell, and tell what in it spoke for each model's answer.

        Answers what classify answers, and for each model an 8-bit grey image of 78 x 78: its saliency map.

        Args:
            image: as classify takes it
            channel: as classify takes it
            plane: as classify takes it
        """
        explanation = self.explain_cell(named_cell(image, channel, plane))
        with TemporaryDirectory() as folder:
            maps = []
            for model, values in explanation.maps.items():
                path = f"{folder}/{model}.png"
                Image.fromarray((255 * values).round().astype("uint8")).save(path)
                maps.append({"image": gr.FileData(path=path).model_dump(), "caption": model})
            yield explanation.prediction.as_dict(), maps

    def specimen(
        self, fields: list, pixel_size: float | None = None, channel: str | None = None, plane: int | None = None
    ) -> dict:
        """Find and classify the cells in whole slide fields of one specimen, and say what pattern it has.

        Answers verdict, probability, its interval, counts of each pattern, and every cell with its place. The verdict
        is a pattern, or says in words why there is none. A field that cannot be read is an error.

        Args:
            fields: data URIs or base64 texts (or uploaded files) of images of many cells, bright on dark
            pixel_size: micrometres a pixel, if known: it narrows the search for the nuclei
            channel: as classify takes it
            plane: as classify takes it
        """
        try:
            decoded = fields_of(require(fields), pixel_size, channel, plane)
            return self._specimen(decoded, pixel_size, lambda items, total, step: items).as_dict()
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def models(self) -> dict:
        """Tell which weights are loaded (source and revision), the models' names, and their measured figures."""
        known = {"models": list(MODEL_TITLES), **self.predictor.origin}
        return known | {"notes": list(self.weights.notes), "metrics": self.weights.metrics}

    def show_models(self) -> str:
        return self._model_details

    @cached_property
    def _model_details(self) -> str:
        return model_details_html(self.weights)


def chosen(channel: str | None, plane: float | None) -> dict:
    """Give channel and plane, as a visitor chose them, the way `hep2.images.decode` takes them."""
    channel = (channel or "").strip()
    return {"channel": int(channel) if channel.isdecimal() else channel or None, "plane": int(plane) if plane else None}


def cell_of(decoded: Decoded) -> Cell:
    """Prepare an image as a cell, but for one that shows several: a field without a verdict. That takes a second."""
    cell = make_cell(decoded)
    if cell.is_field or min(decoded.intensity.shape) <= TOO_SMALL_FOR_FIELD:
        return cell
    found = find_cells(decoded.intensity)
    if len(found.cells) < SEVERAL or found.fit < CLEAR_FIT:
        return cell
    remark = f"the image shows {len(found.cells)} cells: cut one out, or give it as a field"
    return Cell(cell.pixels, (remark, *cell.warnings), is_field=True)


def named_cell(image: tuple, channel: str | None, plane: int | None) -> tuple[str, Cell]:
    """Decode and prepare the image of a caller, or raise an error for the caller if it cannot be read."""
    name, source = require(image)
    try:
        return name, cell_of(decode(source, **chosen(channel, plane)))
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def require(given: Any) -> Any:
    """Return what came, or raise an error for the caller if nothing did."""
    if not given:
        raise gr.Error(NO_IMAGE, print_exception=False)
    return given


def check_count(images: list) -> None:
    """Raise an error for the caller if there are too many images for one request."""
    if len(images) > MAX_IMAGES:
        message = f"{len(images)} images came, at most {MAX_IMAGES} can be classified at once: send them in parts"
        raise gr.Error(message, print_exception=False)


def named(paths: Iterable[str]) -> list[tuple[str, Path]]:
    """Name each file; of several with one name, from several folders, the later ones are numbered."""
    result, seen = {}, Counter()
    for path in map(Path, paths):
        name = path.name
        while name in result:
            seen[path.name] += 1
            name = f"{path.stem} ({seen[path.name] + 1}){path.suffix}"
        result[name] = path
    return list(result.items())


def fields_of(
    images: Iterable, pixel_size: float | None, channel: str | None, plane: float | None
) -> list[tuple[str, Decoded]]:
    """Decode the fields of one specimen, or raise an error with the name of the one that cannot be read."""
    check_pixel_size(pixel_size or None)
    fields, pixels = [], 0
    for number, image in enumerate(images):
        fields.append(decode_field(image, number, **chosen(channel, plane)))
        name = fields[-1][0]
        pixels += fields[-1][1].intensity.size
        if pixels > MAX_PIXELS:
            most = MAX_PIXELS // 1_000_000
            raise ValueError(f"up to {name} there are more than {most} million pixels: give fewer fields, or smaller")
    return fields


class Stopped(Exception):
    """Ends a job that nobody waits for any more."""


def in_steps(work: Callable[[Callable], Any]) -> Iterator[Any]:
    """Yield words on the progress of `work(progress)`, then its result; it ends soon after this is closed."""
    words, closed = ["Starting"], Event()

    def progress(items: Iterable, total: int, step: str) -> Iterator:
        for number, item in enumerate(items, start=1):
            if closed.is_set():
                raise Stopped
            words[0] = f"{step}: {number} of {total}"
            yield item

    pool = ThreadPoolExecutor(1)
    job = pool.submit(copy_context().run, work, progress)  # ZeroGPU finds the visitor in the context
    try:
        while not wait([job], timeout=0.2).done:
            yield words[0]
        yield job.result()
    finally:
        closed.set()
        pool.shutdown(wait=False)


def spreadsheets(rows: list, stem: Path) -> list[str]:
    """Write rows, their header first, as CSV that Excel reads rightly, and as XLSX; returns the paths."""
    with open(f"{stem}.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(map(harmless, rows))
    with xlsxwriter.Workbook(f"{stem}.xlsx", {"strings_to_formulas": False, "strings_to_urls": False}) as book:
        sheet = book.add_worksheet()
        for number, row in enumerate(rows):
            sheet.write_row(number, 0, row)
    return [f"{stem}.csv", f"{stem}.xlsx"]
