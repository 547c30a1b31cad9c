"""Whole slide fields: where the cells lie, and the pattern of the specimen that they show together."""

from hep2.fields.decision import MITOSES_MEAN, NEGATIVE, NO_CELLS, NO_PATTERN, UNCLEAR
from hep2.fields.drawing import colour_of, draw_overlay, specimen_rows
from hep2.fields.specimen import (
    CellPrediction,
    SpecimenPrediction,
    check_pixel_size,
    decode_field,
    predict_specimen,
)

__all__ = [
    "MITOSES_MEAN",
    "NEGATIVE",
    "NO_CELLS",
    "NO_PATTERN",
    "UNCLEAR",
    "CellPrediction",
    "SpecimenPrediction",
    "check_pixel_size",
    "colour_of",
    "decode_field",
    "draw_overlay",
    "predict_specimen",
    "specimen_rows",
]
