"""Reading HEp-2 cells: four models, their training and their verdict. The modules build on each other in this order:

patterns, files, imaging, phantoms, data; augmentation, inference, models, training, recipes; evaluation, weights, hub,
explain, reader, refusal, segmentation, fields, bulk, uploads, stress, pipeline, specimens, peers, bench, views.
"""

__version__ = "0.1.0"
