"""What a specimen gives back to keep: a table of its cells, and its fields with the cells outlined and numbered."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hep2.fields.specimen import CellPrediction, SpecimenPrediction
from hep2.patterns import CLASS_NAMES, MODEL_TITLES, PATTERNS

MITOTIC_COLOUR, REJECTED_COLOUR = "#FF0000", "#FFFFFF"
BAR_SHARE = 0.2  # of a picture's width that a scale bar takes at most
BARS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # micrometres


def specimen_rows(specimen: SpecimenPrediction) -> list[list]:
    """Lay out the cells as a table, its header first.

    Returns
    -------
    list of list
        One row a cell: its field and number, the specimen's verdict, the weights' revision, its place, its own
        verdict, and the probabilities of all models.
    """
    models = [f"{model}_{name}" for model in MODEL_TITLES for name in CLASS_NAMES]
    place = ["top", "left", "height", "width"]
    own = ["verdict", "probability", "agreement", "rejected", "mitotic"]
    rows = [["field", "cell", "specimen", "revision", *place, *own, *models]]
    for cell in specimen.cells:
        answer = cell.as_dict()
        numbers = [answer["models"][model][name] for model in MODEL_TITLES for name in CLASS_NAMES]
        about = [specimen.files[cell.field], cell.number, specimen.verdict, specimen.weights["revision"]]
        rows.append([*about, *answer["bbox"], *(answer[key] for key in own), *numbers])
    return rows


def colour_of(cell: CellPrediction) -> str:
    """Return the colour of a cell's outline."""
    if cell.mitotic:
        return MITOTIC_COLOUR
    colours = {pattern.name: pattern.colour for pattern in PATTERNS}
    return colours.get(cell.prediction.verdict, REJECTED_COLOUR)


def draw_overlay(specimen: SpecimenPrediction, intensity: np.ndarray, field: int = 0) -> Image.Image:
    """Draw one field of a specimen with its cells outlined and numbered, below it verdict, legend and scale bar.

    Parameters
    ----------
    specimen
        What `predict_specimen` returned.
    intensity : ndarray of shape (rows, columns)
        The field, as decoded.
    field
        Which of the specimen's fields it is.

    Returns
    -------
    Image
        As wide as the field, and somewhat taller.
    """
    cells = [cell for cell in specimen.cells if cell.field == field]
    low, high = np.quantile(intensity, [0.01, 0.998])
    grey = ((intensity - low) / max(high - low, 1e-9)).clip(0, 1)
    drawn = Image.fromarray((255 * grey).astype(np.uint8)).convert("RGB")
    size = max(10, round(max(drawn.size) / 80))
    font, pen = ImageFont.load_default(size), ImageDraw.Draw(drawn)
    for cell in cells:
        outline = [(float(column), float(row)) for row, column in cell.found.outline]
        pen.line([*outline, outline[0]], fill=colour_of(cell), width=max(1, size // 8), joint="curve")
        row, column = cell.found.centre
        edge = {"fill": "#FFFFFF", "stroke_fill": "#000000", "stroke_width": max(1, size // 8)}
        pen.text((column, row), str(cell.number), font=font, anchor="mm", **edge)
    legend = _legend(specimen, cells, drawn.width, font, specimen.pixel_sizes[field])
    picture = Image.new("RGB", (drawn.width, drawn.height + legend.height))
    picture.paste(drawn)
    picture.paste(legend, (0, drawn.height))
    return picture


def _legend(
    specimen: SpecimenPrediction,
    cells: list[CellPrediction],
    width: int,
    font: ImageFont.FreeTypeFont,
    pixel_size: float | None,
) -> Image.Image:
    """Draw a strip: the verdict, what the colours mean and how many cells have each, and the scale."""
    verdict = specimen.verdict + ("" if specimen.probability is None else f" {specimen.probability:.0%}")
    colours = [colour_of(cell) for cell in cells]
    names = {pattern.colour: pattern.name for pattern in PATTERNS}
    names |= {MITOTIC_COLOUR: "mitotic", REJECTED_COLOUR: "rejected"}
    entries = [(verdict, None), *((f"{name} {colours.count(c)}", c) for c, name in names.items() if c in colours)]
    length = 0
    if pixel_size:
        microns = max((bar for bar in BARS if bar / pixel_size <= BAR_SHARE * width), default=BARS[0])
        entries.append((f"{microns} µm", "bar"))
        length = round(microns / pixel_size)
    size = round(font.size)
    places, left, top = [], size, size // 2
    for text, colour in entries:
        mark = {None: 0, "bar": length + size // 2}.get(colour, 3 * size // 2)
        needed = mark + round(font.getlength(text)) + 2 * size
        if left > size and left + needed > width:  # on the next line
            left, top = size, top + 3 * size // 2
        places.append((left, top, mark))
        left += needed
    strip = Image.new("RGB", (width, top + 2 * size), "#202020")
    pen = ImageDraw.Draw(strip)
    for (text, colour), (left, top, mark) in zip(entries, places, strict=True):
        if colour == "bar":
            pen.rectangle((left, top + size // 2, left + length, top + size // 2 + size // 4), fill="#FFFFFF")
        elif colour:
            pen.rectangle((left, top, left + size, top + size), fill=colour)
        pen.text((left + mark, top), text, fill="#FFFFFF", font=font)
    return strip
