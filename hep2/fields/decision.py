"""What the cells of a specimen's fields show together: its pattern, or why it has none of the six."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from hep2.fields.segmentation import FoundField
from hep2.fields.stain import Stain
from hep2.patterns import CLASS_NAMES

if TYPE_CHECKING:
    from hep2.fields.specimen import CellPrediction

NEGATIVE = "negative or too faint"
NO_PATTERN = "no pattern of the six"
UNCLEAR = "no clear pattern"
NO_CELLS = "no cells found"
MITOSES_MEAN = {
    "stained": "the antigen sits on the chromatin, as of Homogeneous and Centromere",
    "unstained": "the antigen leaves the chromatin, as of Speckled, Nucleolar and NuMem",
}

WEAK = 50.0  # signal of a typical cell over noise: below, what shows no pattern is negative, and what does is weak
NOTHING = 5.0  # the same, below which no pattern is believed
LEAST_FIT = 0.64  # of the cells to round ones of one size, below which nuclei were not seen: a cytoplasmic stain
CLEAR_FIT = 0.71  # from which they were; between the two the models must be sure,
SURE = 0.9  # the mean of the cells' top probability
CYCLING = 0.42  # spread of the cells' brightness, from which it goes by the cell cycle, as of PCNA and CENP-F
MOST_REJECTED = 1 / 3  # of the cells, above which the specimen has no pattern of the six
LEAST_PROBABILITY = 0.5  # of a specimen's likeliest pattern, below which none stands out
BETWEEN = 0.4  # of its probability, from which a runner-up leaves open which of Homogeneous and Speckled it is
COARSE = 12.0  # pixels of a nucleus, below which speckles cannot be told from an even stain
MITOSES = 2  # of one kind, and hardly any of the other, that settle what they can
SETTLED = 0.2  # probability from which the pattern that mitoses speak for is the verdict
LOW_CONFIDENCE = 0.7  # probability of the verdict, below which the answer says so
SECOND = 0.2  # of the pooled probability, at the lower end of its interval, that makes a second pattern real
FEW = 10  # cells, below which a verdict says that it rests on few
RESAMPLES = 1000
DIGITS = 6  # of a probability in an answer


def decide(cells: list["CellPrediction"], fields: list[tuple[FoundField, Stain]]) -> dict:
    """Say what the cells of some fields show together.

    Returns
    -------
    dict
        The fields of `SpecimenPrediction` from `verdict` on: a pattern with its probability, or why there is none.
    """
    if not cells:
        return {"verdict": NO_CELLS, "warnings": ["no whole cell was found: is it a field of cells, bright on dark?"]}
    weights = [len(found.cells) for found, _ in fields]

    def typical(values: Iterable[float]) -> float:
        return float(np.average(list(values), weights=weights))

    interphase = [cell for cell in cells if not cell.mitotic] or cells
    values = np.stack([cell.prediction.probabilities["ensemble"] for cell in interphase])  # (cells, 6)
    mean, low, high = _interval(values)
    order = mean.argsort()[::-1]
    first, verdict = order[0], NO_PATTERN
    objection, remarks = _objection(interphase, fields, typical, CLASS_NAMES[first], float(values.max(1).mean())), []
    if objection is None:
        verdict, (first, objection, remarks) = UNCLEAR, _settle(mean, cells)
    why = [f"{'unclear' if verdict == UNCLEAR else 'rejected'}: {objection}"] if objection else []
    signal = typical(stain.signal for _, stain in fields)
    if signal < NOTHING or (objection and signal < WEAK):
        faint = f"a typical cell's light is {signal:.0f} times the background's noise: expose longer, or it is negative"
        return {"verdict": NEGATIVE, "warnings": [faint, *why]}
    if objection:
        return {"verdict": verdict, "warnings": why}
    if signal < WEAK:
        remarks.append(f"weak signal: a typical cell's light is only {signal:.0f} times the background's noise")
    if mean[first] < LOW_CONFIDENCE:
        remarks.append(f"low confidence: the verdict has a probability of {mean[first]:.0%}")
    if len(interphase) < FEW:
        remarks.append(f"only {len(interphase)} cells were read: the verdict rests on few")
    other = next(label for label in order if label != first)
    there = low[other] > SECOND
    if there:
        remarks.append(f"mixed: {CLASS_NAMES[other]} is there too, with a probability of {mean[other]:.0%}")
    return {
        "verdict": CLASS_NAMES[first],
        "probability": round(float(mean[first]), DIGITS),
        "interval": (round(float(low[first]), DIGITS), round(float(high[first]), DIGITS)),
        "second": CLASS_NAMES[other] if there else None,
        "warnings": remarks,
    }


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean of probabilities (cells, 6), and its 95 % bootstrap interval's ends, (6,) each."""
    random = np.random.default_rng(0)
    # How often each resample draws each cell: (resamples, cells), which takes less memory than the drawn cells.
    often = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
    low, high = np.quantile(often @ values / len(values), [0.025, 0.975], axis=0)
    return values.mean(0), low, high


def _objection(
    cells: list["CellPrediction"],
    fields: list[tuple[FoundField, Stain]],
    typical: Callable[[Iterable[float]], float],
    likeliest: str,
    top: float,
) -> str | None:
    """Say why the fields show none of the six patterns, or None where nothing speaks against it."""
    rejected = sum(cell.prediction.rejected for cell in cells) / len(cells)
    if rejected > MOST_REJECTED:
        return f"{rejected:.0%} of the cells show none of the six patterns"
    if typical(found.dark for found, _ in fields) > 0.5:
        return f"the cells resemble {likeliest}, but the stain lies round dark nuclei"
    if typical(found.rings for found, _ in fields) > 0.5:
        return (
            None if likeliest == "Golgi" else f"the cells resemble {likeliest}, but the stain lies outside the nuclei"
        )
    fit = typical(found.fit for found, _ in fields)
    if fit < LEAST_FIT or (fit < CLEAR_FIT and top < SURE):
        return "what is stained is not round and of one size, as nuclei are"
    spread = typical(stain.spread for _, stain in fields)
    if spread > CYCLING and likeliest in ("Homogeneous", "Speckled", "Centromere"):
        return f"the cells resemble {likeliest}, but differ in brightness as by the cell cycle"
    return None


def _settle(mean: np.ndarray, cells: list["CellPrediction"]) -> tuple[int, str | None, list[str]]:
    """Choose a class by the mean probability, mitoses, and resolution: the class, what leaves it open, and remarks."""
    homogeneous, speckled, numem = (CLASS_NAMES.index(name) for name in ("Homogeneous", "Speckled", "NuMem"))
    first, second = mean.argsort()[::-1][:2]
    close = f"{CLASS_NAMES[first]} has {mean[first]:.0%} and {CLASS_NAMES[second]} {mean[second]:.0%}"
    if first in (homogeneous, speckled) and np.median([cell.found.diameter for cell in cells]) < COARSE:
        return first, f"nuclei of less than {COARSE:.0f} pixels tell no speckles from an even stain", []
    kinds = [cell.mitosis for cell in cells]
    stained, unstained = kinds.count("stained"), kinds.count("unstained")
    if stained >= max(MITOSES, 5 * unstained) and first in (homogeneous, speckled, numem):
        remark = f"the chromatin of {stained} mitoses is stained"
        if mean[homogeneous] < SETTLED:
            return first, f"the cells resemble {CLASS_NAMES[first]}, but {remark}", []
        if mean[homogeneous] * BETWEEN > mean[speckled]:
            return homogeneous, None, [f"{remark}, as of Homogeneous"]
    elif unstained >= max(MITOSES, 5 * stained) and first in (homogeneous, speckled):
        remark = f"the chromatin of {unstained} mitoses is not stained"
        if mean[speckled] < SETTLED:
            return first, f"the cells resemble {CLASS_NAMES[first]}, but {remark}", []
        return speckled, None, [f"{remark}, as of Speckled"]
    # The dense fine speckled pattern, AC-2, lies between the two.
    between = {first, second} == {homogeneous, speckled} and mean[second] > BETWEEN * mean[first]
    return first, close if between or mean[first] < LEAST_PROBABILITY else None, []
