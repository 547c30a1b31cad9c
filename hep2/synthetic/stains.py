"""What each staining pattern of the consensus (ICAP, AC-0 to AC-28) lights up in a cell, between mitoses and in them.

Each function draws the light of one cell. `random` is the cell's own; `serum` begins anew with each cell of a field, so
that what is drawn from it is the same in all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from hep2.synthetic.drawing import Nucleus, Random, dome, draw_body, grain, places_round, scatter, spots, turned


def _centromere(nucleus: Nucleus, random: Random, serum: Random) -> np.ndarray:
    # Some fifty kinetochores, one a chromosome: small sharp dots that keep apart.
    count = random.integers(35, 60)
    places = scatter(nucleus, count, 0.9, random, apart=4.0)
    dots = spots(
        nucleus.depth.shape, places, random.uniform(0.8, 1.25, len(places)), random.lognormal(-0.2, 0.35, len(places))
    )
    return dots + random.uniform(0.04, 0.14) * nucleus.inside


def _golgi(nucleus: Nucleus, random: Random, serum: Random) -> np.ndarray:
    # Ribbons and granules beside the nucleus, on one side of it, in a faint cytoplasm; the nucleus stays dark.
    light = random.uniform(0.02, 0.1) * np.exp(np.minimum(nucleus.depth, 0) / 12) * (1 - 0.5 * nucleus.inside)
    for _ in range(random.integers(1, 3)):
        middle, arc = random.uniform(0, 2 * np.pi), random.uniform(0.5, 1.3)
        count = random.integers(10, 26)
        angle = middle + arc * random.uniform(-1, 1, count)
        distance = nucleus.radius * 1.02 + random.gamma(2.0, 1.8, count)
        sizes, peaks = random.uniform(1.1, 2.6, count), random.lognormal(-0.6, 0.4, count)
        light += spots(light.shape, places_round(nucleus, angle, distance), sizes, peaks)
    return light


def _homogeneous(nucleus: Nucleus, random: Random, serum: Random) -> np.ndarray:
    texture = 1 + random.uniform(0.02, 0.08) * grain(nucleus.depth.shape, random.uniform(1.5, 3.0), random)
    return dome(nucleus, 0.3, random.uniform(0.8, 2.5)) * texture


def _numem(nucleus: Nucleus, random: Random, serum: Random) -> np.ndarray:
    # A bright rim round an evenly grainy nucleus, in a faint cytoplasm.
    shape = nucleus.depth.shape
    uneven = 1 + 0.15 * grain(shape, 3.0, random)
    rim = np.exp(-((nucleus.depth - 1.5) ** 2) / (2 * random.uniform(1.0, 1.5) ** 2)) * uneven
    inner = random.uniform(0.35, 0.55) * (1 + 0.1 * grain(shape, 1.5, random))
    cytoplasm = random.uniform(0.05, 0.15) * np.exp(np.minimum(nucleus.depth, 0) / 10)
    return rim + nucleus.inside * inner + (1 - nucleus.inside) * cytoplasm * (1 + 0.3 * grain(shape, 1.5, random))


def _nucleolar(nucleus: Nucleus, random: Random, serum: Random) -> np.ndarray:
    # One to five nucleoli, each a clump of a few blobs, in a dim nucleus.
    shape = nucleus.depth.shape
    haze = gaussian_filter(nucleus.inside, random.uniform(1.5, 4.0))
    light = random.uniform(0.05, 0.18) * haze * (1 + 0.15 * grain(shape, 2.0, random))
    for place in scatter(nucleus, random.integers(1, 6), 0.6, random, apart=9.0):
        count = random.integers(1, 4)
        places = place + random.normal(0, 2.0, (count, 2))
        light += spots(shape, places, random.uniform(1.6, 3.2, count), random.uniform(0.5, 1.0, count))
    return light


def _speckled(nucleus: Nucleus, random: Random, serum: Random) -> np.ndarray:
    # Grains of uneven brightness throughout the nucleus, few of them very bright, the nucleoli left out, and a dim
    # grainy cytoplasm.
    shape = nucleus.depth.shape
    fine = np.exp(random.uniform(0.38, 0.48) * grain(shape, random.uniform(0.75, 1.1), random))
    coarse = np.exp(0.25 * grain(shape, 4.0, random))
    nucleoli = scatter(nucleus, random.integers(2, 5), 0.6, random, apart=13.0)
    holes = spots(shape, nucleoli, random.uniform(3.0, 4.2, len(nucleoli)), random.uniform(0.8, 1.0, len(nucleoli)))
    body = dome(nucleus, 0.35, random.uniform(1.8, 2.8)) * fine * coarse * (1 - np.clip(holes, 0, 0.9))
    cytoplasm = random.uniform(0.06, 0.2) * np.exp(np.minimum(nucleus.depth, 0) / 10)
    return (body + cytoplasm * (1 + 0.3 * grain(shape, 1.5, random))) / 2


def _dense_fine(nucleus: Nucleus, random: Random, serum: Random) -> np.ndarray:
    # AC-2: grains all over the nucleus, of uneven size and light, the nucleoli among them.
    shape = nucleus.depth.shape
    grains = serum.uniform(0.15, 0.3) * (grain(shape, 0.9, random) + grain(shape, 2.0, random))
    return dome(nucleus, 0.25, random.uniform(1.0, 2.0)) * np.exp(grains) / 1.5


def _dots(nucleus: Nucleus, random: Random, serum: Random, count: tuple, away: tuple, arc: float = 3.14) -> np.ndarray:
    # AC-6 (PML bodies) and AC-7 (coilin): some dots in a faint nucleus, where centromeres would be fifty. AC-18 (GW
    # bodies): dots in the cytoplasm. AC-24: the centrosome, one or two dots side by side. `away` is in radii.
    number = random.integers(*count)
    angle = random.uniform(-np.pi, np.pi) + random.uniform(-arc, arc, number)
    places = places_round(nucleus, angle, nucleus.radius * random.uniform(*np.square(away), number) ** 0.5)
    dots = spots(nucleus.depth.shape, places, random.uniform(0.8, 1.7, number), random.uniform(0.5, 1.2, number))
    return dots + _faint(nucleus, random, serum) + serum.uniform(0, 0.08 if away[0] else 0.35) * nucleus.inside


def _cycling(nucleus: Nucleus, random: Random, serum: Random, dark: float) -> np.ndarray:
    # AC-13 (PCNA) and AC-14 (CENP-F): speckled nuclei, each as bright and coarse as its place in the cell cycle has it;
    # a share `dark` of them, in G1, is hardly stained.
    shape, place = nucleus.depth.shape, max(random.uniform(-dark / (1 - dark), 1), 0)
    grains = np.exp((0.3 + 0.3 * place) * grain(shape, random.choice([0.8, 1.2, 2.0]), random))
    nucleoli = scatter(nucleus, random.integers(1, 5), 0.6, random, apart=13.0)
    holes = spots(shape, nucleoli, random.uniform(3.0, 5.0, len(nucleoli)), random.uniform(0.4, 1.0, len(nucleoli)))
    return (serum.uniform(0.03, 0.15) + place) * dome(nucleus, 0.3, 1.5) * grains * (1 - holes.clip(0, 0.9)) / 1.5


def _fibrous(nucleus: Nucleus, random: Random, serum: Random, length: float, web: bool = False) -> np.ndarray:
    # AC-15 (actin: straight, parallel), AC-16 (vimentin, keratins: a web round the nucleus), AC-17 (vinculin: short
    # pieces towards the border, on a diffuse stain).
    along, across = turned(nucleus, random.uniform(0, np.pi))
    wave = random.uniform(0.5, 1.5) * grain(along.shape, 10, random)
    ring, ray = nucleus.depth + 4 * wave, nucleus.angle * nucleus.radius
    width, strength, darker = serum.uniform(0.7, 1.1), serum.uniform(0.4, 0.8), serum.uniform(0.2, 0.8)
    texture = -np.inf
    for axes in [(ring, ray), (ray, ring)] if web else [(across, along)]:
        threads = gaussian_filter(random.normal(size=(200, 200)), (width, length), mode="wrap")
        drawn = map_coordinates(threads / threads.std(), [axis + wave for axis in axes], order=1, mode="grid-wrap")
        texture = np.maximum(texture, drawn)
    pieces = 0.8 + 1.8 * (texture - 1.5).clip(0) * (1 - nucleus.inside)
    light = np.exp(strength * texture) if length > 5 else pieces
    return draw_body(nucleus, random) * (1 - darker * nucleus.inside) * light / 2


def _cytoplasmic(
    nucleus: Nucleus, random: Random, serum: Random, light: tuple, size: float, rough: float
) -> np.ndarray:
    # AC-0 (hardly stained), AC-19 (ribosomes: dense), AC-20 (Jo-1: fine speckles), AC-21 (mitochondria: a coarse net);
    # the nucleus is darker than the cytoplasm, of AC-0 often like it.
    darker = serum.uniform(0.4, 1) if light[1] > 0.3 else serum.uniform(0, 0.5)
    rough, size = rough * serum.uniform(0.7, 1.3), size * serum.uniform(0.8, 1.3)
    texture = np.exp(rough * grain(nucleus.depth.shape, size, random))
    return serum.uniform(*light) * draw_body(nucleus, random) * texture * (1 - darker * nucleus.inside)


def _rods_and_rings(nucleus: Nucleus, random: Random, serum: Random) -> np.ndarray:
    # AC-23 (IMPDH2): a few rods and rings near the nucleus, in most cells.
    light, turn = _faint(nucleus, random, serum), np.linspace(-np.pi, np.pi, 40)
    for _ in range(random.choice(4, p=[0.15, 0.45, 0.3, 0.1])):
        middle = places_round(nucleus, random.uniform(-np.pi, np.pi), nucleus.radius * random.uniform(0.5, 1.2))
        tilt, size = random.uniform(0, np.pi), random.uniform(4, 13)
        points = np.stack([turn / np.pi, random.uniform(-0.2, 0.2) * np.cos(turn)], axis=1) * size  # a bent rod
        if random.random() < 0.3:
            points = np.stack([np.sin(turn), np.cos(turn)], axis=1) * random.uniform(2.5, 4.0)
        points = points @ np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        light += spots(light.shape, middle + points, np.full(40, 1.0), np.full(40, 0.15))
    return light


def _faint(nucleus: Nucleus, random: Random, serum: Random) -> np.ndarray:
    """Draw a faint, slightly grainy cell."""
    return serum.uniform(0.03, 0.2) * draw_body(nucleus, random) * (1 + 0.15 * grain(nucleus.depth.shape, 1.2, random))


def draw_mitosis(nucleus: Nucleus, tilt: float, stain: "Stain", random: Random) -> np.ndarray:
    """Draw a round cell in mitosis in place of `nucleus`, its plate of chromatin at an angle of `tilt`.

    A metaphase from the side or obliquely, or an anaphase. The plate is bright where the antigen sits on chromosomes,
    else dark in what stain the cell has.
    """
    along, across = turned(nucleus, tilt)
    length, width, apart = random.choice([(15, 6, 0), (13, 4.5, 0), (14, 10, 0), (13, 4.5, 8)])
    plate = np.exp(-((along / (length * random.uniform(0.85, 1.15))) ** 4) - ((abs(across) - apart) / width) ** 4)
    body = random.uniform(*stain.glow) / (1 + np.exp(np.hypot(along, across) - 1.05 * nucleus.radius))
    body *= 1 + 0.1 * grain(along.shape, 1.2, random)
    dark = body * (1 - random.uniform(0.5, 0.9) * plate)
    wide = random.uniform(5, 9) if stain.mitosis == "poles" else 1.3
    poles = np.exp(-((along / wide) ** 2) - ((abs(across) - apart - 15) / random.uniform(1, 2)) ** 2)
    match stain.mitosis:
        case "stained plate":
            return body + random.uniform(1.2, 1.9) * plate * (1 + 0.1 * grain(along.shape, 1.2, random))
        case "kinetochores":
            return body + random.uniform(0.5, 1.0) * plate**2 * np.exp(0.4 * grain(along.shape, 1.0, random))
        case "scattered pieces":
            return dark + 0.5 * (1 - plate) * (body > 0.5 * body.max()) * (grain(along.shape, 1.5, random) - 1).clip(0)
        case "spindle":
            cone = (abs(along) < 2 + 0.5 * (15 - abs(across))) & (abs(across) < 16)
            return dark + gaussian_filter(cone.astype(float), 1) * (1 - 0.5 * plate) + poles
        case "centrosomes" | "poles":
            return dark + poles
        case "bridge":
            return dark + np.exp(-((along / random.uniform(4, 13)) ** 4) - (across / 1.8) ** 2)
    return dark


class Stain(NamedTuple):
    """How a pattern is drawn."""

    draw: Callable[[Nucleus, Random, Random], np.ndarray]
    mitosis: str = "dark plate"
    glow: tuple[float, float] = (0.3, 0.9)  # light of a cell in mitosis besides its plate
    mitoses: float = 0.05  # share of the cells
    full: float | None = None  # light that fills the camera's range, if not the brightest there is


STAINS = {
    "Centromere": Stain(_centromere, "kinetochores", (0.02, 0.15)),
    "Golgi": Stain(_golgi, "scattered pieces", (0.1, 0.4)),
    "Homogeneous": Stain(_homogeneous, "stained plate", (0.02, 0.3)),
    "NuMem": Stain(_numem),
    "Nucleolar": Stain(_nucleolar),
    "Speckled": Stain(_speckled),
}
# Hardly stained cells, and those that the mitotic patterns leave as dim between mitoses.
_negative, _dim = (partial(_cytoplasmic, light=light, size=1.5, rough=0.1) for light in [(0.02, 0.12), (0.05, 0.25)])
# Patterns that are none of the six: what must not be taken for one of them.
OTHER_PATTERNS = {
    "AC-0 negative": Stain(_negative, glow=(0.03, 0.15), full=1),
    "AC-2 dense fine speckled": Stain(_dense_fine, "stained plate", (0.05, 0.3)),
    "AC-6 multiple nuclear dots": Stain(partial(_dots, count=(5, 20), away=(0, 0.85))),
    "AC-7 few nuclear dots": Stain(partial(_dots, count=(1, 6), away=(0, 0.85))),
    "AC-13 PCNA-like": Stain(partial(_cycling, dark=0.3), glow=(0.1, 0.4)),
    "AC-14 CENP-F-like": Stain(partial(_cycling, dark=0.6), glow=(0.6, 1.3)),
    "AC-15 fibrillar linear": Stain(partial(_fibrous, length=30)),
    "AC-16 fibrillar filamentous": Stain(partial(_fibrous, length=8, web=True)),
    "AC-17 fibrillar segmental": Stain(partial(_fibrous, length=4)),
    "AC-18 discrete cytoplasmic dots": Stain(partial(_dots, count=(3, 20), away=(0.9, 1.6)), glow=(0.05, 0.3)),
    "AC-19 dense fine cytoplasmic": Stain(partial(_cytoplasmic, light=(0.5, 1), size=1.0, rough=0.1), glow=(0.6, 1.2)),
    "AC-20 fine cytoplasmic": Stain(partial(_cytoplasmic, light=(0.4, 1), size=0.9, rough=0.35), glow=(0.6, 1.2)),
    "AC-21 mitochondrial": Stain(partial(_cytoplasmic, light=(0.5, 1), size=1.2, rough=0.8), glow=(0.6, 1.2)),
    "AC-23 rods and rings": Stain(_rods_and_rings, glow=(0.05, 0.3)),
    "AC-24 centrosome": Stain(partial(_dots, count=(1, 3), away=(0.9, 1.2), arc=0.1), "centrosomes", (0.05, 0.3), 0.1),
    "AC-25 spindle fibres": Stain(_dim, "spindle", (0.1, 0.4), 0.2, full=1.5),
    "AC-26 NuMA-like": Stain(_speckled, "poles", (0.1, 0.5), 0.2),
    "AC-27 intercellular bridge": Stain(_dim, "bridge", (0.05, 0.3), 0.2, full=1.5),
    "AC-28 mitotic chromosomal": Stain(_dim, "stained plate", (0.1, 0.4), 0.2, full=1.5),
}
