"""How the models do on specimens that they have never seen: four folds, and the same cells shifted as a stranger's.

    python -m benchmarks.held_out_specimens --dataset … --output DIR [--recipe default] [--teacher NAME=FILE …]

Trains a whole set of weights on each fold of the protocol `specimen`; teacher, student, stack, temperature and
rejection of a fold have seen none of its test specimens. What is finished is not repeated. `--folds` trains some folds
alone, so that several processes can share the work; without it all are trained and measured.

Writes `DIR/metrics.json` (pooled, per fold, whole specimens, shifted, a k-nearest-neighbour baseline),
`predictions.csv` of all cells, `shifted/predictions.csv`, and a reliability figure of each model. Where DIR is
`OUTPUT/held_out` of a training run, `hep2.pipeline.evaluate` takes the figures into that run's metrics.

An H200 takes some four minutes a fold at the full length of `default`, two cores some three hours. To measure folds
that are trained already takes some three minutes of two cores.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from skimage.feature import local_binary_pattern
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.common import (
    SHIFT_SEED,
    add_recipe,
    count_blocks,
    make_accelerator,
    make_parser,
    shifted,
    table,
)
from hep2.checkpoints import load_classifier, write_json
from hep2.data import FOLDS, Cells, Split, blocks_of, load_cells, split
from hep2.evaluation import draw_reliability, metrics, save_figure
from hep2.models import MODELS
from hep2.patterns import IMAGE_SIZE, MODEL_TITLES
from hep2.pipeline import measure, train
from hep2.predictor import Output, Predictor
from hep2.recipes import Plan, choose_plan
from hep2.rejection import fit_rejection

NEIGHBOURS = 5


def main(argv: list[str] | None = None) -> int:
    """Train, measure, and print a table; returns the exit status."""
    parser = make_parser(__doc__, dataset=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, nargs="+", choices=range(FOLDS), help="train these alone, measure nothing")
    add_recipe(parser)
    arguments = parser.parse_args(argv)
    plan, files = choose_plan(arguments.recipe, arguments.teacher, {"epochs": arguments.epochs})
    cells, accelerator = load_cells(arguments.dataset), make_accelerator()
    for fold in arguments.folds or range(FOLDS):
        folder = arguments.output / f"fold-{fold}"
        if not is_finished(folder, cells, plan, arguments.recipe, arguments.seed):
            train(
                cells,
                folder,
                plan=plan,
                recipe=arguments.recipe,
                protocol="specimen",
                seed=arguments.seed,
                fold=fold,
                files=files,
                fit_rejection=fit_rejection,
                accelerator=accelerator,
            )
    if accelerator.is_main_process and not arguments.folds:
        result = {"folds": FOLDS, "seed": arguments.seed, "recipe": arguments.recipe}
        result |= measure_folds(cells, arguments.output, arguments.seed)
        write_json(arguments.output / "metrics.json", result)
        print(summary_table(result))
    accelerator.end_training()
    return 0


def is_finished(folder: Path, cells: Cells, plan: Plan, recipe: str, seed: int) -> bool:
    """Tell whether a folder holds measured weights of this very training; of another one, `train` says what to do."""
    if not (folder / "metrics.json").exists() or not (weights := load_classifier(folder)).metrics:
        return False
    models = {name: weights.config["models"][name]["training"].get("settings") for name in MODELS}
    trained = {key: weights.training.get(key) for key in ("recipe", "seed", "dataset_fingerprint", "teachers")}
    wanted = {"recipe": recipe, "seed": seed, "dataset_fingerprint": cells.fingerprint}
    wanted["teachers"] = {name: asdict(settings) for name, settings in plan.teachers.items()}
    settings = {name: asdict(settings) for name, settings in plan.models.items()}
    return json.loads(json.dumps([wanted, settings])) == [trained, models]


def measure_folds(cells: Cells, output: Path, seed: int = 0) -> dict:
    """Measure the weights in `output/fold-0` and so on, each on its own test cells as they are and shifted."""
    folds = [split(cells, "specimen", seed, fold) for fold in range(FOLDS)]
    plain, strangers = [], []
    for fold, parts in enumerate(folds):
        predictor = Predictor(load_classifier(output / f"fold-{fold}"))
        images = cells.images[parts.test]
        plain.append(predictor(images))
        strangers.append(predictor(shifted(images, SHIFT_SEED + fold)))
    result = summarise(cells, folds, plain, output)
    for name, measured in result["models"].items():
        figure = draw_reliability(measured, f"{MODEL_TITLES[name]}, held-out specimens")
        save_figure(figure, output / f"reliability_{name}.png")
    features, labels = simple_features(cells.images[:, 0].numpy()), cells.labels.numpy()
    return result | {
        "shifted": summarise(cells, folds, strangers, output / "shifted"),
        "nearest_neighbours": {
            "deduplicated": nearest_neighbours(features, labels, [split(cells, "deduplicated", seed)]),
            "specimen": nearest_neighbours(features, labels, folds),
        },
    }


def summarise(cells: Cells, folds: list[Split], answers: list[Output], output: Path) -> dict:
    """Measure the answers to the test cells of each fold: over all cells, per fold, and over whole specimens.

    Writes all of them into `output/predictions.csv`.
    """
    test, labels = np.concatenate([parts.test for parts in folds]), cells.labels.numpy()
    pooled = {name: np.concatenate([fold.probabilities[name] for fold in answers]) for name in MODELS}
    blocks = blocks_of(cells)[test]
    return measure(pooled, cells, test, output) | {
        "per_fold": [
            {name: metrics(values, labels[parts.test]) for name, values in fold.probabilities.items()}
            for parts, fold in zip(folds, answers, strict=True)
        ],
        "blocks": {name: count_blocks(values, blocks) for name, values in pooled.items()},
        "rejected": float(np.concatenate([fold.rejected for fold in answers]).mean()),
    }


def nearest_neighbours(features: np.ndarray, labels: np.ndarray, splits: list[Split]) -> dict:
    """Measure five nearest neighbours on `simple_features`, trained and tested by each split, over all test cells."""
    answers = []
    for parts in splits:
        known = np.concatenate([parts.train, parts.validation])
        classifier = make_pipeline(StandardScaler(), KNeighborsClassifier(NEIGHBOURS))
        answers.append(classifier.fit(features[known], labels[known]).predict_proba(features[parts.test]))
    return metrics(np.concatenate(answers), labels[np.concatenate([parts.test for parts in splits])])


def simple_features(images: np.ndarray) -> np.ndarray:
    """Describe images (cells, 78, 78) in [0, 1] by brightness, rings and texture, whatever their orientation.

    Sixteen quantiles, the mean of each of six rings round the centre, and the histograms of local binary patterns
    (Ojala et al. 2002, uniform, eight neighbours) at radii 1, 2 and 4: (cells, 52).
    """
    quantiles = np.quantile(images, np.linspace(0, 1, 16), axis=(1, 2)).T
    rows, columns = np.indices((IMAGE_SIZE, IMAGE_SIZE)) - (IMAGE_SIZE - 1) / 2
    ring = np.minimum(np.hypot(rows, columns) // (IMAGE_SIZE / 12), 5)
    rings = np.stack([images[:, ring == number].mean(1) for number in range(6)], axis=1)
    bytes_ = (images * 255).round().astype(np.uint8)  # the patterns compare neighbours: rounding keeps ties as ties
    textures = [
        [
            np.bincount(local_binary_pattern(image, 8, radius, "uniform").astype(int).ravel(), minlength=10)
            for image in bytes_
        ]
        for radius in (1, 2, 4)
    ]
    return np.concatenate([quantiles, rings, *(np.array(one) / IMAGE_SIZE**2 for one in textures)], axis=1)


def summary_table(result: dict) -> str:
    """Set out held-out specimens in Markdown: each fold, all cells, whole specimens, and the baseline."""
    rows = []
    for title, part in (("", result), (", shifted", result["shifted"])):
        for fold, models in enumerate(part["per_fold"]):
            rows.append([f"fold {fold}{title}", *(model["mean_class_accuracy"] for model in models.values())])
        for name, field in (("pooled", "mean_class_accuracy"), ("accuracy, pooled", "accuracy"), ("ECE", "ece")):
            rows.append([f"{name}{title}", *(model[field] for model in part["models"].values())])
        right = (f"{blocks['right']} of {blocks['total']}" for blocks in part["blocks"].values())
        rows.append([f"specimens right{title}", *right])
    baseline = {kind: values["mean_class_accuracy"] for kind, values in result["nearest_neighbours"].items()}
    return "\n".join(
        [
            table(["mean class accuracy", *(MODEL_TITLES[name] for name in result["models"])], rows),
            "",
            f"Rejected: {result['rejected']:.1%} of the cells, {result['shifted']['rejected']:.1%} of them shifted.",
            f"k-nearest-neighbour baseline: {baseline['deduplicated']:.4f} on a random split, "
            f"{baseline['specimen']:.4f} on held-out specimens.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
