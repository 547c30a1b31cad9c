"""Reading HEp-2 cells: four models, their training and their verdict. The modules build on each other in this order:

patterns, imaging, phantoms, data; augmentation, models, training, recipes; evaluation, weights, hub, explain, reader,
refusal, fields, bulk, stress, pipeline, specimens, bench, views.
"""

__version__ = "0.1.0"
