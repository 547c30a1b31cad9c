"""What the page shows, as fragments of HTML: pure functions from values to text, with every name escaped."""

import base64
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import count

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from hep2.checkpoints import Weights
from hep2.evaluation import draw_confusion, draw_curves, draw_reliability
from hep2.fields import CellPrediction, SpecimenPrediction, colour_of
from hep2.images import Cell, Decoded
from hep2.models import BASE_MODELS, MODELS
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET, ICAP_URL, IMAGE_SIZE, MODEL_TITLES, PATTERNS, REFERENCE_RESULTS
from hep2.predictor import Explanation, Failure, Prediction

COLOURS = {pattern.name: pattern.colour for pattern in PATTERNS} | {"rejected": "#8B93A1", "mitotic": "#FF0000"}
NO_VERDICT = "No verdict"
AS_FIELD = '<p><button type="button" class="copy" data-click="field">Read as a field</button></p>'
TOO_SMALL_FOR_FIELD = 2 * IMAGE_SIZE  # pixels: an image of no more on one side is taken for no field
PREVIEW, FIELD_PREVIEW = 320, 1200  # largest side of a picture, in pixels
STAMPS = count()
MAX_ROWS = 300  # predictions, or cells of a specimen, that are shown one by one
HUB = "https://huggingface.co"


def image_uri(values: np.ndarray, kind: str = "PNG", largest: int | None = None, **options: int) -> str:
    """Encode an image (rows, columns[, 3]) in [0, 1] as a data URI, no larger than `largest` pixels a side."""
    image = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
    if largest:
        image.thumbnail((largest, largest))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def stretched(intensity: np.ndarray, quantiles: tuple[float, float] = (0, 1)) -> np.ndarray:
    """Map an image (rows, columns) of any range to [0, 1]."""
    low, high = np.quantile(intensity[:: 1 + len(intensity) // 1000], quantiles)
    return (intensity - low) / max(float(high - low), 1e-9)


def _section(body: str, said: str, kind: str = "", label: str = "Result") -> str:
    # The stamp tells an answer from the one before, where both are alike.
    about = f'data-said="{escape(said)}" data-stamp="{next(STAMPS)}" aria-label="{escape(label)}"'
    return f'<section class="reading {kind}" {about}>{body}</section>'


def percent(probability: float) -> str:
    return f"{probability:.1%}".replace("%", "&nbsp;%")


def _sentences(texts: Iterable[str], kind: str) -> str:
    items = "".join(f"<li>{escape(text[0].upper() + text[1:])}{'' if text[-1] in '.?' else '.'}</li>" for text in texts)
    return f'<ul class="remarks {kind}">{items}</ul>' if items else ""


def _bars(shares: dict[str, float], values: dict[str, str] | None = None) -> str:
    rows = (
        f'<li style="--colour:{COLOURS[name]};--share:{share:.2%}"><span>{name}</span>'
        f"<span>{values[name] if values else percent(share)}</span></li>"
        for name, share in shares.items()
    )
    return f'<ul class="bars">{"".join(rows)}</ul>'


def _model_bars(prediction: Prediction, models: Iterable[str]) -> str:
    return "".join(
        f'<div data-model="{name}"><h3>{MODEL_TITLES[name]}</h3>'
        f"{_bars(dict(zip(CLASS_NAMES, map(float, prediction.probabilities[name]), strict=True)))}</div>"
        for name in models
    )


def _name(verdict: str) -> str:
    dot = f'<i class="dot" style="--colour:{COLOURS[verdict]}"></i>' if verdict in COLOURS else ""
    return f'<h2 class="name">{dot}{escape(verdict[0].upper() + verdict[1:])}</h2>'


def _agreement(prediction: Prediction) -> str:
    # The answer's `agreement` counts the ensemble too, which always agrees with itself.
    return f"{prediction.agreement - 1} of {len(BASE_MODELS)} base models agree"


def examples_html(examples: Iterable[tuple[str, str, str, np.ndarray]], kind: str) -> str:
    """Lay out thumbnails to click on, a row for each caption, from (id, caption, spoken name, image) of each."""
    rows: dict[str, str] = {}
    for identity, caption, spoken, image in examples:
        source = image_uri(stretched(image), "WEBP", 156, quality=60)
        rows[caption] = rows.get(caption, "") + (
            f'<button type="button" data-click="{escape(identity)}" aria-pressed="false" aria-label="Classify example '
            f'{escape(spoken)}" title="{escape(spoken)}"><img src="{source}" alt=""></button>'
        )
    body = "".join(f"<h2>{escape(caption)}</h2><div>{buttons}</div>" for caption, buttons in rows.items())
    return f'<div class="examples {kind}">{body}</div>'


def steps_html(decoded: Decoded, cell: Cell) -> str:
    """Picture the steps that an image takes: as it came, preprocessed, and to six probabilities."""
    figures = "".join(
        f'<figure><img src="{image_uri(image)}" alt=""><figcaption>{caption}</figcaption></figure>'
        for image, caption in ((stretched(decoded.intensity), "1 Decoded"), (cell.pixels[0], "2 Preprocessed"))
    )
    shares = dict(zip(CLASS_NAMES, (0.02, 0.01, 0.02, 0.01, 0.04, 0.9), strict=True))
    bars = f'<div>{_bars(shares)}<p class="small">3 Classified</p></div>'
    return f'<div class="reading"><div class="card">{figures}{bars}</div></div>'


def verdict_html(explanation: Explanation, decoded: Decoded, truth: str = "") -> str:
    """Show one prediction: a card with the verdict, the bars of all models, and the saliency maps."""
    prediction = explanation.prediction
    cell, verdict = prediction.cell.pixels[0], prediction.verdict
    rows, columns = decoded.intensity.shape
    if prediction.rejected:
        head = _name(NO_VERDICT) + "<p>The bars are what the models would say of a cell: they mean nothing here.</p>"
        head += AS_FIELD if min(rows, columns) > TOO_SMALL_FOR_FIELD else ""
    else:
        agree = "" if prediction.agreement == len(MODELS) else " doubt"
        head = (
            f'{_name(verdict)}<p><b class="probability">{percent(prediction.probability)}</b> by the stack ensemble '
            f'<span class="badge{agree}">{_agreement(prediction)}</span></p>'
        )
    said = f"{prediction.file}: {verdict or NO_VERDICT}" + (f", {prediction.probability:.1%}" if verdict else "")
    maps = "".join(
        f'<figure data-model="{name}"><img class="cell" alt="Saliency map of {MODEL_TITLES[name]}" src="'
        f'{image_uri(0.45 * cell[..., None] + 0.55 * matplotlib.colormaps["inferno"](values)[..., :3], "WEBP")}">'
        f"<figcaption>{MODEL_TITLES[name]}</figcaption></figure>"
        for name, values in explanation.maps.items()
    )
    body = f"""
  <div class="card" style="--colour:{COLOURS.get(verdict, COLOURS["rejected"])}">
    <figure><img src="{image_uri(stretched(decoded.intensity), largest=PREVIEW)}" alt="The image as it came, {rows} by
      {columns} pixels"><figcaption>Original</figcaption></figure>
    <figure><img class="cell" src="{image_uri(cell)}" alt="The 78 by 78 pixels that the models are given">
      <figcaption>Preprocessed</figcaption></figure>
    <div><p class="file">{escape(prediction.file)}</p>{head}<p class="truth">{escape(truth)}</p></div>
    {_sentences(prediction.warnings, "failed" if prediction.rejected else "doubt")}
    {meaning_html(verdict) if verdict else ""}
  </div>
  {_model_bars(prediction, ["ensemble"])}<div class="models">{_model_bars(prediction, BASE_MODELS)}</div>
  <details class="maps"><summary>Saliency maps: what spoke for each model's answer</summary>
    <div class="models four">{maps}</div><p class="small">Bright spoke for the class. CNN and ResCNN: class activation.
    ViT: Grad-CAM of its last layer. Stack ensemble: the mean of CNN and ViT.</p></details>
  <p><button type="button" class="copy" data-copy="{escape(json.dumps(prediction.as_dict()))}">Copy as JSON</button>
  </p>"""
    return _section(body, said, "rejected" * prediction.rejected, f"Prediction for {prediction.file}")


def meaning_html(verdict: str) -> str:
    """Say what a pattern points to, and that this is no diagnosis."""
    pattern = PATTERNS[CLASS_NAMES.index(verdict)]
    return f"""<dl class="meaning"><dt>ICAP family</dt><dd>{", ".join(pattern.families)}</dd>
<dt>Typical antigens</dt><dd>{escape(pattern.antigens)}</dd><dt>Associations</dt><dd>{escape(pattern.associations)}</dd>
<dt>Source</dt><dd><a href="{ICAP_URL}" target="_blank" rel="noopener">International Consensus on ANA Patterns</a>; the
mapping from class to family is ours. A pattern is not a diagnosis.</dd></dl>"""


def message_html(title: str, text: str, file: str = "", kind: str = "failed") -> str:
    """Show a failure, or what became of a job."""
    body = f"""<div class="card"><div><p class="file">{escape(file)}</p><h2 class="name">{escape(title)}</h2>
<p>{escape(text)}</p></div></div>"""
    return _section(body, title, kind)


def empty_html() -> str:
    """Take away what was shown: to an empty text Gradio keeps the old."""
    return _section("", "")


def progress_html(words: str, share: float | None = None) -> str:
    """Show how far a job is."""
    value = "" if share is None else f' value="{share:.3f}"'
    return _section(f'<p>{escape(words)}</p><progress aria-label="Progress"{value}></progress>', "", "progress")


def counts_html(predictions: Sequence[Prediction | Failure]) -> str:
    """Draw how many cells have each verdict."""
    read = [one for one in predictions if isinstance(one, Prediction)]
    counts = {name: sum(one.verdict == name for one in read) for name in CLASS_NAMES}
    counts["rejected"] = len(read) - sum(counts.values())
    most, shown = max(*counts.values(), 1), {name: str(count) for name, count in counts.items()}
    bars = _bars({name: count / most for name, count in counts.items()}, shown)
    return f'<section class="reading counts"><h2>{_count(predictions)}</h2>{bars}</section>'


def _count(predictions: Sequence[Prediction | Failure]) -> str:
    failed = sum(isinstance(one, Failure) for one in predictions)
    read = len(predictions) - failed
    return f"{read:,} cell{'' if read == 1 else 's'}" + (f", {failed:,} not read" if failed else "")


def table_html(predictions: Sequence[Prediction | Failure]) -> str:
    """Show many predictions: a row each, which opens to its bars; of very many the doubtful ones first."""
    rows, cut = list(predictions), ""
    if len(rows) > MAX_ROWS:
        rows = sorted(rows, key=lambda one: not _doubtful(one))[:MAX_ROWS]
        cut = f"{MAX_ROWS} of {len(predictions):,}, doubtful ones first; the files have all. "
    body = f'<p class="small">{cut}A row opens to its bars.</p><div class="rows">{"".join(map(_row, rows))}</div>'
    return _section(body, _count(predictions))


def _doubtful(one: Prediction | Failure) -> bool:
    return isinstance(one, Failure) or bool(one.warnings)


def _row(one: Prediction | Failure) -> str:
    kind = "doubtful" if _doubtful(one) else ""
    if isinstance(one, Failure):
        parts = f"<i></i><b>{escape(one.file)}</b><span>Not read</span><span>{escape(one.error)}</span>"
        return f'<p class="row failed {kind}">{parts}</p>'
    source = image_uri(one.cell.pixels[0], "WEBP", quality=50)
    said = f"{percent(one.probability)}, {_agreement(one)}" if one.verdict else ""
    dot = f'<i class="dot" style="--colour:{COLOURS.get(one.verdict, COLOURS["rejected"])}"></i>'
    return f"""<details class="{kind}"><summary class="row">
<img src="{source}" alt="" loading="lazy"><b>{escape(one.file)}</b>
<span>{dot}{one.verdict or NO_VERDICT}</span><span>{said} <em>{escape("; ".join(one.warnings))}</em></span></summary>
<div class="models four">{_model_bars(one, MODELS)}</div></details>"""


def specimen_html(specimen: SpecimenPrediction, fields: Sequence[np.ndarray]) -> str:
    """Show a specimen: its verdict, its fields with the cells outlined, the counts, and the cells by doubt."""
    verdict, answer = specimen.verdict, specimen.as_dict()
    head, warnings = _name(verdict), list(specimen.warnings)
    if specimen.probability is not None:
        head += f"""<p><b class="probability">{percent(specimen.probability)}</b> mean over {len(specimen.cells)} cells
<span class="badge">95 % bootstrap interval {" to ".join(map(percent, specimen.interval))}</span></p>"""
    elif specimen.cells:
        warnings.append("without a verdict for the specimen, those of its single cells mean little")
    counts = specimen.counts | {"rejected": answer["rejected"], "mitotic": answer["mitotic"]}
    toggles = "".join(
        f'<label><input type="checkbox" checked data-toggle="{name}"><i class="dot" style="--colour:'
        f'{COLOURS[name]}"></i>{name} {count}</label>'
        for name, count in counts.items()
        if count
    )
    certainty = [cell.prediction.probability if cell.counted else -1 for cell in specimen.cells]
    order = sorted(range(len(specimen.cells)), key=certainty.__getitem__)
    cards = "".join(_cell_card(specimen.cells[number]) for number in order[:MAX_ROWS])
    cut = f" ({MAX_ROWS} of {len(order)})" if len(order) > MAX_ROWS else ""
    said = verdict + ("" if specimen.probability is None else f", {specimen.probability:.1%}")
    body = f"""<div class="card" style="--colour:{COLOURS.get(verdict, COLOURS["rejected"])}"><div>{head}</div>
{_sentences(warnings, "doubt")}{meaning_html(verdict) if verdict in CLASS_NAMES else ""}</div>
<div class="toggles" role="group" aria-label="Cells shown">{toggles}<label>Zoom <input type="range" min="1" max="6"
step="0.5" value="1" data-zoom></label></div>
<div class="beside"><div>{"".join(_field_picture(specimen, *one) for one in enumerate(fields))}</div>
<div class="chosen"><p class="small">Point at a cell, or click it: its bars are shown here.</p></div></div>
<details><summary>All cells, the most doubtful first{cut}</summary><div class="cards">{cards}</div></details>"""
    return _section(body, said, label="Prediction for the specimen")


def _field_picture(specimen: SpecimenPrediction, number: int, field: np.ndarray) -> str:
    """Draw one field with its cells as links to their cards."""
    rows, columns = field.shape
    size = max(rows, columns) / 60
    shapes = ""
    for cell in specimen.cells:
        if cell.field == number:
            points = " ".join(f"{column:.0f},{row:.0f}" for row, column in cell.found.outline)
            row, column = cell.found.centre
            shapes += (
                f'<a href="#cell-{cell.number}" data-cell="{_kind(cell)}" aria-label="Cell {cell.number}: '
                f'{_said(cell)}"><polygon points="{points}" stroke="{colour_of(cell)}"/><text x="{column:.0f}" '
                f'y="{row:.0f}" font-size="{size:.0f}">{cell.number}</text></a>'
            )
    source = image_uri(stretched(field, (0.01, 0.998)), "WEBP", FIELD_PREVIEW, quality=85)
    name = escape(specimen.files[number])
    return f"""<figure class="field"><div tabindex="0" role="group" aria-label="Field {name}"><svg
viewBox="0 0 {columns} {rows}"><image href="{source}" width="{columns}" height="{rows}"/>{shapes}</svg></div>
<figcaption>{name}</figcaption></figure>"""


def _kind(cell: CellPrediction) -> str:
    return "mitotic" if cell.mitotic else cell.prediction.verdict or "rejected"


def _said(cell: CellPrediction) -> str:
    verdict, probability = cell.prediction.verdict, cell.prediction.probability
    said = f"{verdict} {probability:.0%}" if verdict else NO_VERDICT
    return said + ", mitotic: not counted" * cell.mitotic


def _cell_card(cell: CellPrediction) -> str:
    source = image_uri(cell.prediction.cell.pixels[0], "WEBP", quality=60)
    shares = dict(zip(CLASS_NAMES, map(float, cell.prediction.probabilities["ensemble"]), strict=True))
    return f"""<figure class="small-card" id="cell-{cell.number}" style="border-color:{colour_of(cell)}">
<img class="cell" src="{source}" alt="Cell {cell.number}">
<figcaption>{cell.number}: {_said(cell)}</figcaption>{_bars(shares)}</figure>"""


def report_html(specimen: SpecimenPrediction, shown: str, style: str, date: str) -> str:
    """Make a page of its own of a specimen as it is shown, to be printed or kept."""
    files, weights = escape(", ".join(specimen.files)), escape(" ".join(specimen.weights.values()))
    return f"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Report: {escape(specimen.verdict)}</title>
<style>{style}</style><body class="report"><h1>HEp-2 specimen</h1><p>{files}. {date}. Weights: {weights}. <b>Not for
clinical use.</b></p>{shown}</body></html>"""


def models_html(weights: Weights) -> str:
    """Tell how the models do on a new patient and on a random split, beside the reference, and where all comes from."""
    metrics, training = weights.metrics, weights.training
    specimen = metrics.get("specimen") or {}
    blocks = specimen.get("blocks", {}).get("ensemble")
    lead = "How many specimens of new patients these weights get right was not measured: expect less than below."
    if blocks:
        lead = f"On a new patient: {blocks['right']} of {blocks['total']} specimens right"
    random, held_out = metrics.get("models", {}), specimen.get("models", {})
    shifted = specimen.get("shifted", {}).get("models", {})
    rows = ""
    for name, title in MODEL_TITLES.items():
        parts = [(held_out, "mean_class_accuracy"), (held_out, "ece"), (shifted, "mean_class_accuracy")]
        parts += [(random, "accuracy"), (random, "mean_class_accuracy"), (random, "ece")]
        values = [part.get(name, {}).get(field) for part, field in parts]
        cells = "".join(f"<td>{'–' if value is None else format(value, '.3f')}</td>" for value in values)
        rows += f'<tr><th scope="row">{title}</th>{cells}<td>{REFERENCE_RESULTS[name]["accuracy"]:.2f}</td></tr>'
    links = {"Dataset": f"{HUB}/datasets/{DEFAULT_DATASET}", "Patterns (ICAP)": ICAP_URL}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", weights.source):
        links["Weights"] = f"{HUB}/{weights.source}"
    if space := os.environ.get("SPACE_ID"):
        links["Code"] = f"{HUB}/spaces/{space}/tree/main"
    linked = " · ".join(f'<a href="{url}" target="_blank" rel="noopener">{name}</a>' for name, url in links.items())
    shares = ["mean class accuracy", "ECE"]
    columns = [*shares, "shifted cells", "accuracy", *shares, "accuracy"]
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return f"""<section class="reading"><h2 class="name">{lead}</h2>
<p>Held-out specimens: no cell of them was in the training, as with a new patient. Random split: other cells of the same
specimens were. ECE is the expected calibration error. The reference is the course report that is re-implemented here.
</p><div class="scroll" tabindex="0" role="group" aria-label="Results"><table><thead><tr><td></td>
<th colspan="3" scope="colgroup">held-out specimens</th><th colspan="3" scope="colgroup">random split</th>
<th scope="colgroup">reference</th></tr><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>
<details><summary>Weights, recipe and seed</summary><p>{escape(weights.source)}, revision
<code>{escape(weights.revision)}</code>; dataset {escape(str(training["dataset"]))}, recipe
{escape(str(training["recipe"]))}, protocol {escape(str(training["protocol"]))}, seed {training["seed"]}.
{escape(" ".join(weights.notes))}</p></details>
<p>{linked}</p></section>"""


def model_details_html(weights: Weights) -> str:
    """Draw each model's confusion matrix, calibration and training curves; it takes some seconds."""
    parts = []
    for name, title in MODEL_TITLES.items():
        random = weights.metrics.get("models", {}).get(name)
        held_out = (weights.metrics.get("specimen") or {}).get("models", {}).get(name)
        plates = ""
        for result, split in ((held_out, "held-out specimens"), (random, "random split")):
            if result:
                label = f"{title}, {split}"
                plates += _plate(draw_confusion(result, label), f"{label}: confusion matrix")
                plates += _plate(draw_reliability(result, label), f"{label}: reliability, ECE {result['ece']:.3f}")
        if history := weights.history(name):
            plates += _plate(draw_curves(history, title), f"{title}: loss and accuracy over {len(history)} epochs")
        opened = " open" if name == "ensemble" else ""
        parts.append(f"<details{opened}><summary>{title}: figures</summary><div>{plates}</div></details>")
    return f'<section class="reading">{"".join(parts)}</section>'


def _plate(figure: Figure, alt: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="webp", dpi=90)
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return f'<img class="plate" loading="lazy" src="{source}" alt="{escape(alt)}">'
