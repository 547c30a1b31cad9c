"""Synthetic HEp-2 cells and fields, made from nothing but a seed."""

from hep2.synthetic.cells import (
    OTHER_PATTERNS,
    SyntheticCell,
    synthetic_cell,
    synthetic_field,
    synthetic_fields,
    synthetic_files,
)

__all__ = [
    "OTHER_PATTERNS",
    "SyntheticCell",
    "synthetic_cell",
    "synthetic_field",
    "synthetic_fields",
    "synthetic_files",
]
