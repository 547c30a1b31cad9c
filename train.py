"""Train the models: `python train.py --dataset … --output DIR`, or `accelerate launch train.py …` on several devices.

Killed at any moment and started again with the same command, it goes on behind the last whole epoch.
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hep2 import __version__
from hep2.data import PROTOCOLS, Cells, load_cells
from hep2.evaluation import comparison_table
from hep2.hub import create_repository, push, stage
from hep2.models import MODELS
from hep2.patterns import DEFAULT_DATASET
from hep2.pipeline import evaluate_weights, held_out_examples, train_models
from hep2.recipes import RECIPES
from hep2.weights import load_weights


def main(argv: list[str] | None = None) -> int:
    """Train, then measure on the test part; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to train on")
    what.add_argument("--dataset", default=DEFAULT_DATASET, help="Hub name, local folder, or phantoms[:COUNT]")
    what.add_argument("--protocol", choices=PROTOCOLS, default="clean", help="how the cells are divided")
    what.add_argument("--fold", type=int, default=0, help="0 to 3, of the protocol 'specimen' (default: 0)")
    how = parser.add_argument_group("how")
    models = f"some of {', '.join(MODELS)} (default: all); the ensemble needs its members in the same --output"
    how.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), metavar="MODEL", help=models)
    how.add_argument("--recipe", choices=tuple(RECIPES), default="tuned", help="see hep2/recipes.py (default: tuned)")
    how.add_argument("--epochs", type=int, help="in place of the recipe's, for all models but the ensemble")
    how.add_argument("--batch-size", type=int, help="over all processes together, in place of the recipe's")
    how.add_argument("--seed", type=int, default=0, help="of the split, the first weights and every epoch (default: 0)")
    how.add_argument("--mixed-precision", choices=("no", "bf16"), default="bf16", help="bf16 halves the time")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="weights, logs, curves, figures")
    journey = parser.add_argument_group("to the Hub")
    journey.add_argument("--push", metavar="OWNER/NAME", help="send the finished run there, with held-out examples")
    journey.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    journey.add_argument("--dry-run", action="store_true", help="with --push: only stage what would go, and list it")
    arguments = parser.parse_args(argv)
    if not arguments.push and (arguments.private or arguments.dry_run):
        parser.error("--private and --dry-run go with --push OWNER/NAME")
    if arguments.push:  # said now, not after hours of training
        try:
            validate_repo_id(arguments.push)
        except HFValidationError as error:
            parser.error(f"argument --push: {error}")
        if set(arguments.models) != set(MODELS):
            parser.error("argument --push: only whole runs travel; leave --models out")
    changes = {"epochs": arguments.epochs, "batch_size": arguments.batch_size}
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    try:
        if arguments.push and not arguments.dry_run and accelerator.is_main_process:
            _open(arguments)
        cells = load_cells(arguments.dataset)
        train_models(
            cells,
            arguments.output,
            names=tuple(arguments.models),
            recipe=arguments.recipe,
            protocol=arguments.protocol,
            seed=arguments.seed,
            fold=arguments.fold,
            changes={key: value for key, value in changes.items() if value is not None},
            accelerator=accelerator,
        )
        if accelerator.is_main_process:
            # Those that lie there from before are measured with the others, so that metrics.json has them all.
            trained = tuple(name for name in MODELS if (arguments.output / name / "config.json").exists())
            weights = load_weights(arguments.output, trained)
            print(comparison_table(evaluate_weights(weights, cells, arguments.output)["models"], cells.source))
            if arguments.push:
                _push(arguments, cells, sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    finally:
        accelerator.end_training()
    return 0


def _open(arguments: argparse.Namespace) -> None:
    # Before hours of training: a token that may not write is found out now.
    try:
        create_repository(arguments.push, private=arguments.private)
    except ConnectionError as error:
        later = "or train without --push, and give the same command with it afterwards"
        raise ConnectionError(f"{error}: log in with `hf auth login` or set HF_TOKEN, {later}") from error


def _push(arguments: argparse.Namespace, cells: Cells, given: list[str]) -> None:
    examples = held_out_examples(load_weights(arguments.output), cells, arguments.dataset)
    if arguments.dry_run:
        staged = arguments.output / "staged"
        shutil.rmtree(staged, ignore_errors=True)
        stage(arguments.output, staged, arguments.push, examples)
        for path in sorted(path for path in staged.rglob("*") if path.is_file()):
            print(f"{path.stat().st_size:10,}  {path.relative_to(staged)}")
        print(f"this would go to {arguments.push} in one commit, tagged v{__version__}; it lies in {staged}")
        return
    options = {"version": __version__, "private": arguments.private, "examples": examples}
    try:
        commit = push(arguments.output, arguments.push, **options)
    except ConnectionError as error:
        again = shlex.join(["python", "train.py", *given])
        raise ConnectionError(
            f"{error} with the same command, which trains nothing that is trained:\n{again}"
        ) from error
    print(f"pushed to {arguments.push}, commit {commit}, tag v{__version__}")


if __name__ == "__main__":
    sys.exit(main())
