"""Train the models: `python train.py --dataset … --output DIR`, or `accelerate launch train.py …` on several devices.

Killed at any moment and started again with the same command, it goes on behind the last whole epoch.
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from hep2 import __version__
from hep2.checkpoints import load_classifier
from hep2.data import PROTOCOLS, Cells, load_cells
from hep2.evaluation import comparison_table
from hep2.hub import create_repository, push, stage
from hep2.models import MODELS
from hep2.patterns import DEFAULT_DATASET
from hep2.pipeline import held_out_examples, train
from hep2.recipes import RECIPES, choose_plan
from hep2.rejection import fit_rejection


def main(argv: list[str] | None = None) -> int:
    """Train, then measure on the test part; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to train on")
    what.add_argument("--dataset", default=DEFAULT_DATASET, help="Hub name, local folder, or synthetic[:COUNT]")
    what.add_argument("--protocol", choices=PROTOCOLS, default="deduplicated", help="how the cells are divided")
    what.add_argument("--fold", type=int, default=0, help="0 to 3, of the protocol 'specimen' (default: 0)")
    how = parser.add_argument_group("how")
    models = f"some of {', '.join(MODELS)} (default: all); the ensemble needs cnn, rescnn and vit"
    how.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), metavar="MODEL", help=models)
    how.add_argument("--recipe", choices=tuple(RECIPES), default="default", help="see hep2/recipes.py")
    teachers = "pretrained timm networks in place of the recipe's, NAME or NAME=FILE; 'none' trains without"
    how.add_argument("--teacher", nargs="+", metavar="NAME[=FILE]", help=teachers)
    how.add_argument("--epochs", type=int, help="in place of the recipe's, for all networks but the stack")
    how.add_argument("--batch-size", type=int, help="over all processes together, in place of the recipe's")
    how.add_argument("--seed", type=int, default=0, help="of the split, the first weights and every epoch (default: 0)")
    how.add_argument("--mixed-precision", choices=("no", "bf16"), help="default: bf16 on a GPU")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="weights, logs, curves, figures")
    journey = parser.add_argument_group("to the Hub")
    journey.add_argument("--push", metavar="OWNER/NAME", help="send the finished run there, with held-out examples")
    journey.add_argument("--tag", help=f"of what is pushed (default: v{__version__}, or the next that is free)")
    journey.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    journey.add_argument("--dry-run", action="store_true", help="with --push: only stage what would go, and list it")
    arguments = parser.parse_args(argv)
    if not arguments.push and (arguments.private or arguments.dry_run or arguments.tag):
        parser.error("--private, --tag and --dry-run go with --push OWNER/NAME")
    if arguments.push and set(arguments.models) != set(MODELS):
        parser.error("argument --push: only whole runs travel; leave --models out")
    if "ensemble" in arguments.models and set(arguments.models) != set(MODELS):
        parser.error("argument --models: the ensemble needs cnn, rescnn and vit; what is trained is not trained again")
    again = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    precision = arguments.mixed_precision or ("bf16" if torch.cuda.is_available() else "no")
    accelerator = Accelerator(mixed_precision=precision)
    try:
        changes = {"epochs": arguments.epochs, "batch_size": arguments.batch_size}
        plan, files = choose_plan(arguments.recipe, arguments.teacher, changes)
        if arguments.push and not arguments.dry_run and accelerator.is_main_process:
            create_repository(arguments.push, tag=arguments.tag, private=arguments.private)
        cells = load_cells(arguments.dataset)
        result = train(
            cells,
            arguments.output,
            plan=plan,
            recipe=arguments.recipe,
            names=tuple(arguments.models),
            protocol=arguments.protocol,
            seed=arguments.seed,
            fold=arguments.fold,
            files=files,
            fit_rejection=fit_rejection,
            accelerator=accelerator,
        )
        if accelerator.is_main_process:
            print(comparison_table(result["models"], cells.source))
            if arguments.push:
                _push(arguments, cells)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        if isinstance(error, ConnectionError):
            print("train.py: log in with `hf auth login` or set HF_TOKEN, or train without --push", file=sys.stderr)
            print(f"train.py: what is trained lies in {arguments.output}; push it with: {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"train.py: interrupted; it goes on behind the last whole epoch with: {again}", file=sys.stderr)
        return 130
    finally:
        accelerator.end_training()
    return 0


def _push(arguments: argparse.Namespace, cells: Cells) -> None:
    examples = held_out_examples(load_classifier(arguments.output), cells, arguments.dataset)
    if arguments.dry_run:
        staged = arguments.output / "staged"
        shutil.rmtree(staged, ignore_errors=True)
        stage(arguments.output, staged, arguments.push, examples)
        for path in sorted(path for path in staged.rglob("*") if path.is_file()):
            print(f"{path.stat().st_size:10,}  {path.relative_to(staged)}")
        print(f"this would go to {arguments.push} in one commit; it lies in {staged}")
        return
    commit, tag = push(
        arguments.output,
        arguments.push,
        version=__version__,
        tag=arguments.tag,
        private=arguments.private,
        examples=examples,
    )
    print(f"pushed to {arguments.push}, commit {commit}, tag {tag}")


if __name__ == "__main__":
    sys.exit(main())
