"""The staining pattern of HEp-2 cells: four models, their training, and their verdict.

To begin with: `hep2.load()` gives a `Predictor`; `predictor.classify([path, …])` predicts cells, and
`predictor.specimen([path, …])` the fields of one specimen.
"""

from hep2.models import MODELS
from hep2.predictor import Predictor, load

__all__ = ["MODELS", "Predictor", "load"]
__version__ = "0.1.0"
