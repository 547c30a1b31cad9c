"""The six staining patterns: names, order, colours, meaning; and the figures others published for these cells."""

from dataclasses import dataclass

IMAGE_SIZE = 78  # rows and columns of a cell image, in pixels, as in the dataset
DEFAULT_DATASET = "Genius-Society/HEp2"  # on the Hugging Face Hub
CELLS_IN_DATASET = 13_596
PROTOCOLS = ("deduplicated", "reference", "specimen")  # that divide it: see `hep2.data.split`


def is_synthetic(dataset: object) -> bool:
    """Tell whether the name of a dataset stands for cells that the package draws: `synthetic[:COUNT]`."""
    return str(dataset).partition(":")[0] == "synthetic"


ICAP_URL = "https://www.anapatterns.org"


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One staining pattern and what it points to.

    The families follow the International Consensus on ANA Patterns (ICAP, anapatterns.org). The mapping from the
    dataset's class names to families is ours: it names families and makes no diagnosis.
    """

    name: str
    colour: str  # as in every figure and on the page; told apart by readers with the common colour blindnesses
    families: tuple[str, ...]
    antigens: str
    associations: str
    nuclear: bool = True  # whether the antigens lie in the nucleus


# In the order of the dataset's labels: the position is the class index everywhere.
PATTERNS = (
    Pattern(
        name="Centromere",
        colour="#036D94",
        families=("AC-3",),
        antigens="CENP-A, CENP-B, CENP-C",
        associations="limited systemic sclerosis, primary biliary cholangitis",
    ),
    Pattern(
        name="Golgi",
        colour="#C5B808",
        families=("AC-22",),
        antigens="giantin, golgins",
        associations="varied, not clearly systemic",
        nuclear=False,
    ),
    Pattern(
        name="Homogeneous",
        colour="#20A876",
        families=("AC-1",),
        antigens="dsDNA, nucleosomes, histones",
        associations="systemic lupus erythematosus, drug-induced lupus, juvenile idiopathic arthritis, "
        "autoimmune hepatitis",
    ),
    Pattern(
        name="NuMem",
        colour="#FA88BE",
        families=("AC-11", "AC-12"),
        antigens="lamins; nuclear pore complex",
        associations="systemic lupus erythematosus, Sjögren's syndrome; primary biliary cholangitis",
    ),
    Pattern(
        name="Nucleolar",
        colour="#B7461D",
        families=("AC-8", "AC-9", "AC-10"),
        antigens="PM/Scl, Th/To; fibrillarin; RNA polymerase I, NOR-90",
        associations="systemic sclerosis and its overlaps, Sjögren's syndrome",
    ),
    Pattern(
        name="Speckled",
        colour="#B368FE",
        families=("AC-4", "AC-5"),
        antigens="SS-A/Ro, SS-B/La, Mi-2; Sm, U1-RNP, RNA polymerase III",
        associations="Sjögren's syndrome, systemic lupus erythematosus, dermatomyositis; mixed connective tissue "
        "disease, systemic sclerosis. The dense fine speckled AC-2, often without systemic disease, may be mixed in",
    ),
)
CLASS_NAMES = tuple(pattern.name for pattern in PATTERNS)

MODEL_TITLES = {"cnn": "CNN", "rescnn": "ResCNN", "vit": "ViT", "ensemble": "Stack ensemble"}

# What the reference, a course report, gives for its own four models on 2,039 test cells of its own random split
# (its Table 3, and the weakest figures of its Tables 4 to 7).
REFERENCE_RESULTS = {
    name: dict(
        zip(
            ("accuracy", "macro_precision", "macro_recall", "macro_f1", "golgi_recall", "speckled_f1"),
            figures,
            strict=True,
        )
    )
    for name, figures in {
        "cnn": (0.89, 0.89, 0.88, 0.88, 0.80, 0.82),
        "rescnn": (0.89, 0.89, 0.88, 0.89, 0.84, 0.81),
        "vit": (0.94, 0.95, 0.94, 0.94, 0.89, 0.91),
        "ensemble": (0.95, 0.95, 0.95, 0.95, 0.90, 0.94),
    }.items()
}
