"""Synthetic HEp-2 cells and slide fields, made from nothing but a seed."""

from hep2.synthetic.cells import synthetic_cell, synthetic_files
from hep2.synthetic.fields import SyntheticCell, expose, reduce_field, synthetic_field, synthetic_fields
from hep2.synthetic.stains import OTHER_PATTERNS

__all__ = [
    "OTHER_PATTERNS",
    "SyntheticCell",
    "expose",
    "reduce_field",
    "synthetic_cell",
    "synthetic_field",
    "synthetic_fields",
    "synthetic_files",
]
