"""Whole slide fields in, a specimen's pattern out: finds the cells, classifies each, and pools what the models say."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hep2.fields.decision import NO_CELLS, decide
from hep2.fields.segmentation import ONE_CELL, FoundCell, crop, find_cells
from hep2.fields.stain import measure_stain
from hep2.images import Cell, Decoded, ImageError, ImageSource, decode
from hep2.patterns import CLASS_NAMES

if TYPE_CHECKING:
    from hep2.predictor import Prediction, Predictor

PIXEL_SIZES = (0.02, 1.0)  # micrometres, in the specimen: from an oversampled 100x objective to a 10x

Field = ImageSource | tuple[str, ImageSource | Decoded]


def check_pixel_size(pixel_size: float | None) -> None:
    """Raise ValueError for what are no micrometres a pixel of a microscope for such slides; None is right."""
    low, high = PIXEL_SIZES
    if pixel_size is not None and not (isinstance(pixel_size, (int, float)) and low <= pixel_size <= high):
        raise ValueError(f"the pixel size is {pixel_size!r}: give micrometres, {low} to {high}, or leave it out")


@dataclass(frozen=True, kw_only=True)
class CellPrediction:
    """One cell of a specimen: its number, the field it lies in, where, and its prediction."""

    number: int  # from 1, through all fields, as in picture and table
    field: int
    found: FoundCell
    prediction: "Prediction"
    mitosis: str | None = None  # "stained" or "unstained", by its chromatin

    @property
    def mitotic(self) -> bool:
        return self.mitosis is not None

    @property
    def counted(self) -> bool:
        return not self.mitotic and not self.prediction.rejected

    def as_dict(self) -> dict:
        answer = self.prediction.as_dict()
        kept = {key: answer[key] for key in ("verdict", "probability", "agreement", "models")}
        flags = {"rejected": self.prediction.rejected, "mitotic": self.mitotic, "mitosis": self.mitosis}
        return {"number": self.number, "field": self.field, "bbox": list(self.found.bbox), **kept, **flags}


@dataclass(frozen=True, kw_only=True)
class SpecimenPrediction:
    """What one specimen shows, from all its cells together.

    `verdict` is one of the six patterns, or `NEGATIVE`, `NO_PATTERN`, `UNCLEAR` or `NO_CELLS`, which have no
    probability. `second` names another pattern that is really there, if there is one.
    """

    files: list[str]
    cells: list[CellPrediction]
    weights: dict[str, str]
    verdict: str
    warnings: list[str]
    probability: float | None = None
    interval: tuple[float, float] | None = None
    second: str | None = None
    pixel_sizes: tuple[float | None, ...]  # micrometres, of each field, where they are known
    nuclei: tuple[float, ...] = ()  # diameter of a typical nucleus in each field, in pixels
    signal: float = 0.0  # of a typical cell over the background's noise

    @property
    def counts(self) -> dict[str, int]:
        verdicts = [cell.prediction.verdict for cell in self.cells if cell.counted]
        return {name: verdicts.count(name) for name in CLASS_NAMES}

    @property
    def mitoses(self) -> dict[str, int]:
        """How many cells in mitosis have stained chromatin, and how many have not."""
        kinds = [cell.mitosis for cell in self.cells]
        return {kind: kinds.count(kind) for kind in ("stained", "unstained")}

    def as_dict(self) -> dict:
        return {
            "files": self.files,
            "verdict": self.verdict,
            "probability": self.probability,
            "interval": None if self.interval is None else list(self.interval),
            "second": self.second,
            "cells": len(self.cells),
            "counts": self.counts,
            "rejected": sum(cell.prediction.rejected and not cell.mitotic for cell in self.cells),
            "mitotic": sum(cell.mitotic for cell in self.cells),
            "mitoses": self.mitoses,
            "pixel_size": list(self.pixel_sizes),
            "nucleus": [round(diameter, 1) for diameter in self.nuclei],
            "signal": round(self.signal, 1),
            "per_cell": [cell.as_dict() for cell in self.cells],
            "warnings": self.warnings,
            "weights": self.weights,
        }


def predict_specimen(
    predictor: "Predictor",
    sources: Iterable[Field],
    *,
    pixel_size: float | None = None,
    channel: str | int | None = None,
    plane: int | None = None,
    progress: Callable[[Iterable, int, str], Iterable] = lambda items, total, step: items,
    classify_cells: Callable[[Sequence[tuple[str, Cell]]], Iterable["Prediction"]] | None = None,
) -> SpecimenPrediction:
    """Read the pattern of one specimen from its fields.

    Parameters
    ----------
    predictor
        What `hep2.load` returns.
    sources
        The fields: paths, bytes or arrays, each alone or as (name, source), or decoded already as (name, `Decoded`).
    pixel_size
        Micrometres, in the place of what the files say.
    channel, plane
        As `hep2.images.decode` takes them.
    progress
        Wraps the fields whose cells are found, then the cells that are classified: (items, total, step) to items.
    classify_cells
        Takes the place of the predictor's own, where the models run elsewhere.

    Raises
    ------
    ValueError
        If `pixel_size` is none that a microscope for such slides can have, or a source is no image.
    FileNotFoundError
        If a path names no file.
    """
    if isinstance(sources, ImageSource):
        raise ValueError("specimen takes the fields of one specimen: of one field, give [field]")
    check_pixel_size(pixel_size)
    fields = [decode_field(source, number, channel, plane) for number, source in enumerate(sources)]
    names = [name for name, _ in fields]
    sizes = tuple(_pixel_size(decoded, pixel_size) for _, decoded in fields)
    known = {"files": names, "weights": predictor.origin, "pixel_sizes": sizes}
    if all(max(decoded.intensity.shape) < ONE_CELL for _, decoded in fields):
        remark = "the image is no larger than one cell is: give it as a cell, not as a field"
        return SpecimenPrediction(cells=[], verdict=NO_CELLS, warnings=[remark], **known)
    steps = progress(list(zip(fields, sizes, strict=True)), len(fields), "Finding cells")
    found, stains = [], []
    for (_, decoded), size in steps:
        found.append(find_cells(decoded.intensity, size))
        stains.append(measure_stain(decoded.intensity, found[-1]) if found[-1].cells else None)
    warnings = [
        warning if len(fields) == 1 else f"{name}: {warning}"
        for (name, decoded), one in zip(fields, found, strict=True)
        for warning in (*decoded.warnings, *one.notes)
    ]
    placed, crops = [], []
    for number, ((_, decoded), one) in enumerate(zip(fields, found, strict=True)):
        for cell, mitosis in zip(one.cells, stains[number].mitoses if one.cells else (), strict=True):
            try:
                crops.append((f"cell {len(crops) + 1}", Cell(crop(decoded.intensity, cell, one.nucleus), ())))
            except ImageError:  # a crop without any light
                continue
            placed.append({"number": len(crops), "field": number, "found": cell, "mitosis": mitosis})
    predictions = progress((classify_cells or predictor.classify_cells)(crops), len(crops), "Classifying cells")
    cells = [
        CellPrediction(prediction=prediction, **place) for place, prediction in zip(placed, predictions, strict=True)
    ]
    # A field without cells says nothing of how they are stained.
    seen = [(one, stain) for one, stain in zip(found, stains, strict=True) if stain]
    decision = decide(cells, seen)
    decision["warnings"] = warnings + decision["warnings"]
    nuclei = tuple(one.nucleus for one in found)
    signal = float(np.median([stain.signal for _, stain in seen])) if seen else 0.0
    return SpecimenPrediction(cells=cells, nuclei=nuclei, signal=signal, **known, **decision)


def decode_field(source: Field, number: int, channel: str | int | None, plane: int | None) -> tuple[str, Decoded]:
    """Name a field, if need be by its number from 0, and decode it; an error says which field it is of."""
    name, image = source if isinstance(source, tuple) else (None, source)
    if name is None:
        name = str(image) if isinstance(image, (str, Path)) else f"field {number + 1}"
    try:
        return name, image if isinstance(image, Decoded) else decode(image, channel=channel, plane=plane)
    except (ImageError, OSError) as error:
        raise type(error)(f"{name}: {error}") from error


def _pixel_size(decoded: Decoded, given: float | None) -> float | None:
    """Return what was given, or what the file says where a microscope for such slides can have it."""
    if given is not None:
        return given
    low, high = PIXEL_SIZES
    return decoded.pixel_size if decoded.pixel_size and low <= decoded.pixel_size <= high else None
