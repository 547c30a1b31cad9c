"""The digits that the bundled weights give for the bundled examples.

`python -m tests.answers` writes them to `tests/answers.json` anew. Run it when the weights are replaced, and not to
make a failing test pass.
"""

import json
from pathlib import Path

import hep2

EXAMPLES = Path(__file__).parents[1] / "examples"
ANSWERS = Path(__file__).with_name("answers.json")
KEPT = ("verdict", "agreement", "models")


def example_answers(predictor: hep2.Predictor) -> dict[str, dict]:
    """Map each example's path to the part of its answer that depends on the weights alone."""
    files = sorted(EXAMPLES.glob("[A-Z]*/*.png"))
    predictions = predictor.classify(files)
    return {
        file.relative_to(EXAMPLES).as_posix(): {key: prediction.as_dict()[key] for key in KEPT}
        for file, prediction in zip(files, predictions, strict=True)
    }


if __name__ == "__main__":
    answers = example_answers(hep2.load(device="cpu"))
    lines = [f"{json.dumps(file)}: {json.dumps(answer)}" for file, answer in answers.items()]
    ANSWERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
