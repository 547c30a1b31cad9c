"""The staining pattern of HEp-2 cells: four models, their training, and their verdict.

To begin with: `hep2.load()` gives a `Predictor`; `predictor.classify([path, …])` predicts cells, and
`predictor.specimen([path, …])` the fields of one specimen.
"""

from importlib import import_module

__all__ = ["MODELS", "Predictor", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import on first use: PyTorch takes seconds, for which `python -m hep2 --help` need not wait."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("hep2.models" if name == "MODELS" else "hep2.predictor"), name)
