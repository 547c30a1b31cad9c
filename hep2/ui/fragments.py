"""Readings and figures as fragments of HTML: pure functions from values to text, with every name escaped."""

import base64
import io
from collections.abc import Sized
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from hep2.evaluation import draw_curves, draw_reliability, train_label
from hep2.fields import CellReading, SpecimenReading, colour_of
from hep2.patterns import CLASS_NAMES, ICAP_URL, MODEL_TITLES, PATTERNS, SOURCE_RESULTS
from hep2.reader import Explanation, Failure, Reading
from hep2.weights import Weights, own_specimens_text, specimen_models

COLOURS = {pattern.name: pattern.colour for pattern in PATTERNS}
NO_VERDICT = "no verdict"
PREVIEW = 320  # largest side of a picture of an upload, in pixels
FIELD_PREVIEW = 1200  # the same of a field
MOST_CARDS = 200  # cells of a specimen that are shown one by one


def picture(values: np.ndarray) -> str:
    """Encode an image (rows, columns[, 3]), floats in [0, 1], as a PNG in a data URI."""
    file = io.BytesIO()
    Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def preview(intensity: np.ndarray) -> np.ndarray:
    """Scale an image (rows, columns) of any size and range for showing it; returns floats in [0, 1]."""
    image = Image.fromarray(intensity)
    image.thumbnail((PREVIEW, PREVIEW))
    values = np.asarray(image, dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    return (values - low) / max(high - low, 1e-9)


def overlay(cell: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Lay a map (78, 78) in [0, 1] over a cell (78, 78) in [0, 1]; returns (78, 78, 3) in [0, 1]."""
    colour = matplotlib.colormaps["inferno"](attention)[..., :3]
    return 0.45 * cell[..., None] + 0.55 * colour


def verdict_html(explanation: Explanation, uploaded: np.ndarray, truth: str = "") -> str:
    """Show one reading: images, verdict, doubts, bars of all models, maps, and what the pattern means."""
    reading = explanation.reading
    cell = reading.cell.pixels[0]
    doubts = "".join(f"<li>{escape(_sentence(doubt))}</li>" for doubt in reading.warnings)
    return f"""
<section class="reading" aria-label="Reading of {escape(reading.file)}">
  <div class="top">
    <figure><img src="{picture(preview(uploaded))}" alt="The image as it was given, {uploaded.shape[0]} by
      {uploaded.shape[1]} pixels"><figcaption>given</figcaption></figure>
    <figure><img class="cell" src="{picture(cell)}" alt="The 78 by 78 pixels the models were given">
      <figcaption>what the models see</figcaption></figure>
    <div class="verdict" aria-live="polite">
      <p class="file">{escape(reading.file)}</p>
      {_headline(reading)}
      <p>{escape(truth)}</p>
    </div>
  </div>
  <ul class="doubts">{doubts}</ul>
  <div class="models">{"".join(_bars(reading, name) for name in reading.probabilities)}</div>
  <details class="maps"><summary>Where did each model look?</summary>
    <div class="models">{"".join(_map(explanation, name) for name in reading.probabilities)}</div>
    <p class="small">CNN and ResCNN: what spoke for their class (class activation). ViT: the patches it read (attention
    over all layers). Stack ensemble: the mean of CNN and ViT. Bright is much, dark is little.</p>
  </details>
  {"" if reading.refused else meaning_html(reading.verdict)}
</section>"""


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")


def _headline(reading: Reading) -> str:
    if reading.refused:
        return f"""<p class="name">{NO_VERDICT.capitalize()}</p>
      <p>The bars below are what the models would say if it were a cell: they mean nothing here.</p>"""
    dot = f'<span class="dot" style="background:{COLOURS[reading.verdict]}"></span>'
    return f"""<p class="name">{dot}{reading.verdict}</p>
      <p>{reading.probability:.1%} by the stack ensemble<br>{reading.agreement} of 4 models agree</p>"""


def meaning_html(verdict: str) -> str:
    """Say what a pattern points to, and that this is no diagnosis."""
    pattern = next(pattern for pattern in PATTERNS if pattern.name == verdict)
    return f"""<dl class="meaning">
  <div><dt>ICAP family</dt><dd>{", ".join(pattern.families)}</dd></div>
  <div><dt>Typical antigens</dt><dd>{escape(pattern.antigens)}</dd></div>
  <div><dt>Associations</dt><dd>{escape(pattern.associations)}</dd></div>
</dl>
<p class="small">After the <a href="{ICAP_URL}" target="_blank" rel="noopener">International Consensus on ANA
Patterns</a>; the mapping from class to family is ours. A pattern is not a diagnosis. Not for clinical use.</p>"""


def failure_html(failure: Failure) -> str:
    """Show why an image could not be read."""
    title = "This image could not be read" if failure.file else "This could not be done"
    return f"""<section class="reading failed" role="alert"><p class="file">{escape(failure.file)}</p>
<p class="name">{title}</p><p>{escape(failure.error)}</p></section>"""


def counts_html(readings: list[Reading | Failure]) -> str:
    """Draw how many cells got each verdict."""
    verdicts = [reading.verdict for reading in readings if isinstance(reading, Reading)]
    most = max([verdicts.count(name) for name in CLASS_NAMES] + [1])
    rows = "".join(
        _bar(name, verdicts.count(name) / most, str(verdicts.count(name)), COLOURS[name]) for name in CLASS_NAMES
    )
    remarks = {"got no verdict": verdicts.count(None), "could not be read": len(readings) - len(verdicts)}
    tail = ", ".join(f"{count} {text}" for text, count in remarks.items() if count)
    tail = f'<p class="small">{tail}: see the table.</p>' if tail else ""
    return f'<section class="reading"><h3>{_cells(verdicts)}</h3><ul class="bars">{rows}</ul>{tail}</section>'


def _cells(cells: Sized) -> str:
    return f"{len(cells)} cell{'' if len(cells) == 1 else 's'}"


def specimen_html(specimen: SpecimenReading, fields: list[np.ndarray]) -> str:
    """Show a specimen: its verdict, its fields with the cells outlined, the counts, and the cells by doubt."""
    verdict = specimen.verdict
    head = f'<p class="name">{escape(verdict[0].upper() + verdict[1:])}</p>'
    if specimen.probability is not None:
        dot = f'<span class="dot" style="background:{COLOURS[verdict]}"></span>'
        low, high = specimen.interval
        head = f"""<p class="name">{dot}{verdict}</p><p>{specimen.probability:.1%}, the mean over its cells; between
{low:.1%} and {high:.1%} in 95 of 100 draws of as many cells</p>"""
    answer = specimen.as_dict()
    most = max([*specimen.counts.values(), answer["refused"], answer["mitotic"], 1])
    others = {"refused": (answer["refused"], "#999999"), "mitotic": (answer["mitotic"], "#FF0000")}
    rows = {name: (count, COLOURS[name]) for name, count in specimen.counts.items()} | others
    counts = "".join(_bar(name, count / most, str(count), colour) for name, (count, colour) in rows.items())
    warnings = list(specimen.warnings)
    if verdict not in CLASS_NAMES and specimen.cells:
        warnings.append("without a verdict for the specimen, what its single cells were read as means little")
    doubts = "".join(f"<li>{escape(_sentence(text))}</li>" for text in warnings)
    pictures = "".join(_field_picture(specimen, number, field) for number, field in enumerate(fields))
    order = sorted(range(len(specimen.cells)), key=lambda number: _certainty(specimen.cells[number]))
    gallery = "".join(_cell_card(specimen.cells[number], number) for number in order[:MOST_CARDS])
    left_out = f'<p class="small">{MOST_CARDS} of {len(order)}.</p>' if len(order) > MOST_CARDS else ""
    meaning = meaning_html(verdict) if verdict in CLASS_NAMES else ""
    return f"""<section class="reading" aria-label="Reading of the specimen">
<div class="verdict" aria-live="polite">{head}</div><ul class="doubts">{doubts}</ul>{pictures}
<p class="small">Each cell in its pattern's colour, white where it was refused, red in mitosis. Point at a cell to see
what it was read as; a click leads to its bars.</p>
<h3>{_cells(specimen.cells)}</h3><ul class="bars">{counts}</ul>
<h3>The cells, the most doubtful first</h3>{left_out}<div class="cards">{gallery}</div>{meaning}
</section>"""


def _certainty(cell: CellReading) -> float:
    return cell.reading.probability if cell.counted else -1.0


def _field_picture(specimen: SpecimenReading, number: int, field: np.ndarray) -> str:
    """Draw one field with its cells as links to their cards."""
    rows, columns = field.shape
    small = Image.fromarray(field)
    small.thumbnail((FIELD_PREVIEW, FIELD_PREVIEW))
    values = np.asarray(small, dtype=np.float32)
    low, high = np.quantile(values, [0.01, 0.998])
    source = picture((values - low) / max(float(high - low), 1e-9))
    shapes = ""
    for position, cell in enumerate(specimen.cells):
        if cell.field == number:
            points = " ".join(f"{column:.0f},{row:.0f}" for row, column in cell.found.outline)
            title = f"Cell {position + 1}: {_said(cell)}"
            shapes += (
                f'<a href="#cell-{position + 1}" aria-label="{title}"><polygon points="{points}" '
                f'stroke="{colour_of(cell)}"><title>{title}</title></polygon></a>'
            )
    return f"""<figure class="field"><svg viewBox="0 0 {columns} {rows}" role="group" aria-label="Field
{escape(specimen.files[number])}, {rows} by {columns} pixels"><image href="{source}" width="{columns}" height="{rows}"/>
{shapes}</svg><figcaption>{escape(specimen.files[number])}</figcaption></figure>"""


def _said(cell: CellReading) -> str:
    if cell.reading.refused:
        return NO_VERDICT
    mitotic = ", in mitosis: not counted" if cell.mitotic else ""
    return f"{cell.reading.verdict} {cell.reading.probability:.0%}{mitotic}"


def _cell_card(cell: CellReading, position: int) -> str:
    bars = "".join(
        _bar(label, float(p), f"{p:.0%}", COLOURS[label])
        for label, p in zip(CLASS_NAMES, cell.reading.probabilities["ensemble"], strict=True)
    )
    return f"""<figure class="card" id="cell-{position + 1}" style="border-color:{colour_of(cell)}">
<img class="cell" loading="lazy" src="{picture(cell.reading.cell.pixels[0])}" alt="Cell {position + 1}">
<figcaption>{position + 1}: {_said(cell)}</figcaption><ul class="bars">{bars}</ul></figure>"""


def models_html(weights: Weights) -> str:
    """Tell which weights are loaded, what they were trained on and how they did, beside the source's figures."""
    training = weights.configs["ensemble"]["training"]
    minutes = sum(weights.configs[name]["training"].get("seconds", 0) for name in weights.models) / 60
    size = weights.metrics.get("test_size", 0)
    return f"""<section class="reading">
<h3>The weights</h3>
<p>{escape(weights.source)}, revision <code>{escape(weights.revision)}</code>. {escape(" ".join(weights.notes))}
Trained on {escape(training["dataset"])} (recipe {escape(training["recipe"])}, {minutes:.0f} minutes in all), divided by
the protocol {escape(training["protocol"])} with seed {escape(str(training["seed"]))}.</p>
<h3>How the models do</h3>
<p>Random split: {size:,} test cells that took no part in training, calibration or stacking, but come from specimens
that others of their cells were trained on. Held-out specimens: every cell of a specimen kept away from training, as a
new patient's would be. The source is the course report that this project re-builds.</p>
<div class="scroll">{_results_table(weights)}</div>{_specimen_note(weights)}
</section>"""


def _results_table(weights: Weights) -> str:
    fields = {"accuracy": "accuracy", "mean_class_accuracy": "mean class", "macro_f1": "macro F1", "ece": "ECE"}
    random, specimen = weights.metrics.get("models", {}), weights.metrics.get("specimen", {}).get("models", {})
    rows = ""
    for name, title in MODEL_TITLES.items():
        measured = [part.get(name, {}).get(field) for part in (random, specimen) for field in fields]
        source = [SOURCE_RESULTS[name][field] for field in ("accuracy", "macro_recall", "macro_f1")]
        cells = "".join(f"<td>{'–' if value is None else format(value, '.4f')}</td>" for value in measured)
        cells += "".join(f'<td class="source">{value:.2f}</td>' for value in source)
        rows += f'<tr><th scope="row">{title}</th>{cells}</tr>'
    columns = [*fields.values(), *fields.values(), *list(fields.values())[:3]]
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return f"""<table><caption><span>Mean class is the mean of the classes' recalls; ECE is the expected
calibration error, of which less is better.</span></caption>
<thead><tr><td></td><th scope="colgroup" colspan="4">random split</th><th scope="colgroup" colspan="4">held-out
specimens</th><th scope="colgroup" colspan="3">the source, random split</th></tr><tr><td></td>{head}</tr></thead>
<tbody>{rows}</tbody></table>"""


def _specimen_note(weights: Weights) -> str:
    specimen = weights.metrics.get("specimen")
    if specimen is None:
        return "<p><strong>Held-out specimens were not measured: expect less on a new patient.</strong></p>"
    blocks = specimen["blocks"]["ensemble"]
    return (
        "<p>The held-out figures are not of the models that answer here, but of "
        f"{escape(specimen_models(specimen))}, over {specimen['folds']} folds. Their stack ensemble read "
        f"{blocks['right']:d} of {blocks['total']:d} held-out specimens right as a whole; {specimen['refused']:.1%} of "
        f"their cells would get no verdict. <strong>{escape(own_specimens_text(weights.metrics))}</strong></p>"
    )


def model_details_html(weights: Weights) -> str:
    """Show each model's classes, confusion matrix, calibration and training curves; it takes a second to draw."""
    return f'<section class="reading">{"".join(_details(weights, name) for name in weights.models)}</section>'


def _details(weights: Weights, name: str) -> str:
    title, result = MODEL_TITLES[name], weights.metrics.get("models", {}).get(name)
    tables = figures = ""
    if result:
        tables = f'<div class="scroll">{_class_table(result)}</div><div class="scroll">{_confusion_table(result)}</div>'
        alt = f"{title}: share of right verdicts against their probability, ECE {result['ece']:.4f}"
        figures = _plate(draw_reliability(result, title), alt)
    specimen = weights.metrics.get("specimen", {}).get("models", {}).get(name)
    if specimen:
        alt = f"{title} on held-out specimens: share of right verdicts, ECE {specimen['ece']:.4f}"
        figures += _plate(draw_reliability(specimen, f"{title}, held-out specimens"), alt)
    if history := weights.history(name):
        last = history[-1]
        alt = (
            f"{title}: loss and accuracy over {last['epoch']} epochs, "
            f"validation accuracy {last['validation_accuracy']:.4f} at the end"
        )
        figures += _plate(draw_curves(history, title, train_label(weights.configs[name]["training"])), alt)
    opened = " open" if name == "ensemble" else ""
    return f"<details{opened}><summary>{title}, class by class</summary>{tables}<div>{figures}</div></details>"


def _class_table(result: dict) -> str:
    rows = "".join(
        f'<tr><th scope="row">{label}</th>'
        + "".join(f"<td>{row[field]:.4f}</td>" for field in ("precision", "recall", "f1"))
        + f"<td>{row['support']:,}</td></tr>"
        for label, row in result["per_class"].items()
    )
    head = "".join(f'<th scope="col">{column}</th>' for column in ("precision", "recall", "F1", "cells"))
    return f"""<table><caption><span>By class</span></caption><thead><tr><td></td>{head}</tr></thead>
<tbody>{rows}</tbody></table>"""


def _confusion_table(result: dict) -> str:
    head = "".join(f'<th scope="col">{label}</th>' for label in CLASS_NAMES)
    rows = ""
    for label, counts in zip(CLASS_NAMES, result["confusion"], strict=True):
        cells = ""
        for count in counts:
            # The errors are a few per cent: on a linear scale they would all look alike.
            shade = 100 * (count / max(1, sum(counts))) ** 0.4
            cells += f'<td style="background:color-mix(in srgb, #0072B2 {0.45 * shade:.0f}%, transparent)">{count}</td>'
        rows += f'<tr><th scope="row">{label}</th>{cells}</tr>'
    return f"""<table class="confusion"><caption><span>Confusion: rows are labels, columns are verdicts</span></caption>
<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"""


def _plate(figure: Figure, alt: str) -> str:
    """Put a figure on a white plate, which reads the same in a light and a dark page."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    source = "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
    return f'<img class="plate" src="{source}" alt="{escape(alt)}">'


def _bars(reading: Reading, name: str) -> str:
    rows = "".join(
        _bar(label, float(p), f"{p:.1%}", COLOURS[label])
        for label, p in zip(CLASS_NAMES, reading.probabilities[name], strict=True)
    )
    return f'<div data-model="{name}"><h3>{MODEL_TITLES[name]}</h3><ul class="bars">{rows}</ul></div>'


def _bar(label: str, share: float, value: str, colour: str) -> str:
    filled = f'<span style="width:{share:.2%};background:{colour}"></span>'
    return f'<li><span>{label}</span><span class="value">{value}</span><span class="track">{filled}</span></li>'


def _map(explanation: Explanation, name: str) -> str:
    cell, title = explanation.reading.cell.pixels[0], MODEL_TITLES[name]
    source = picture(overlay(cell, explanation.maps[name]))
    image = f'<img class="cell" src="{source}" alt="Map of what {title} looked at">'
    return f'<figure data-model="{name}">{image}<figcaption>{title}</figcaption></figure>'
