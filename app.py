"""The page: `python app.py`, or a Hugging Face Space as it is. What it calls lives in `hep2`."""

import argparse
import csv
import os
from pathlib import Path

import gradio as gr

from hep2.evaluation import MODEL_TITLES
from hep2.hub import open_weights
from hep2.imaging import ImageError, read_intensity
from hep2.patterns import CLASS_NAMES
from hep2.reader import Failure, Reader, csv_header, csv_row
from hep2.views import counts_html, doubts_of, failure_html, models_html, verdict_html

EXAMPLES = Path(__file__).with_name("examples")
TITLE = "HEp-2 cells: four models and a verdict"
INTRODUCTION = """# HEp-2 cells: four models and a verdict
The staining pattern of a HEp-2 cell points to the antibodies in a patient's serum. Click a cell, or give your own.
**Not for clinical use.**"""
UPLOAD_LABEL = "Your own: drop, paste or choose images of single cells (PNG, JPEG, TIFF, BMP, WebP)"
EXAMPLES_TEXT = "**Examples**: synthetic cells, drawn by a program. A click reads one."
TABLE = ("file", "verdict", "probability", "models agree", "remarks")
FILE_TYPES = [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"]
QUEUE = 256  # requests that may wait; one more is told that the page is busy

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto; }
#examples .grid-container { grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 6px; padding: 0; }
#examples .grid-wrap { max-height: none; padding: 0; overflow: visible; }
#examples .caption-label { font-size: 10.5px; line-height: 1.3; inset: auto 2px 2px 2px; max-width: none;
  padding: 1px 2px; text-align: center; }
.reading { display: flex; flex-direction: column; gap: 12px; }
.reading .top { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; min-height: 184px; }
.reading figure { margin: 0; }
.reading figure img { height: 156px; width: 156px; object-fit: contain; background: #000; border-radius: 6px; }
.reading img.cell { image-rendering: pixelated; }
.reading figcaption, .reading .small { font-size: 13px; color: var(--body-text-color-subdued); }
.reading .verdict { flex: 1 1 200px; }
.reading .verdict p { margin: 0 0 4px; }
.reading .file { font-size: 13px; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.reading .name { font-size: 30px; font-weight: 700; line-height: 1.2; }
.reading .dot { display: inline-block; width: 18px; height: 18px; border-radius: 50%; margin-right: 10px; }
.reading .doubts { margin: 0; padding-left: 20px; min-height: 24px; font-weight: 600; }
.reading .models { display: grid; grid-template-columns: repeat(auto-fit, minmax(152px, 1fr)); gap: 14px; }
.reading h3 { margin: 0 0 6px; font-size: 15px; }
.reading .bars { list-style: none; margin: 0; padding: 0; font-size: 12.5px; }
.reading .bars li { display: grid; grid-template: auto 8px / 1fr auto; margin-bottom: 6px; line-height: 1.4; }
.reading .bars .value { font-variant-numeric: tabular-nums; }
.reading .track { grid-column: 1 / 3; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
.reading .track span { display: block; height: 100%; }
.reading summary { cursor: pointer; padding: 6px 0; }
.reading .meaning { margin: 0; display: grid; gap: 4px; }
.reading .meaning div { display: grid; grid-template-columns: 130px 1fr; }
.reading .meaning dt { color: var(--body-text-color-subdued); }
.reading .meaning dd { margin: 0; }
.reading.failed { min-height: 190px; }
.reading .scroll { overflow-x: auto; }
.reading table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.reading th, .reading td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--border-color-primary); }
.reading .source { color: var(--body-text-color-subdued); }
"""
# Gradio's file box takes drops and choices; a pasted image is handed to it here.
PASTE = """
() => document.addEventListener("paste", (event) => {
  const files = event.clipboardData && event.clipboardData.files;
  const input = document.querySelector("#upload input[type=file]");
  if (files && files.length && input) {
    input.files = files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }
})
"""


class Page:
    """The functions behind the page and its API, on one reader that was loaded before the first request."""

    def __init__(self, reader: Reader, examples: Path = EXAMPLES) -> None:
        self.reader = reader
        self.examples = [
            (str(examples / pattern / f"{number}.png"), f"{pattern} {number}", f"Synthetic, drawn as {pattern}")
            for pattern in CLASS_NAMES
            for number in range(1, 6)
        ]

    def show(self, chosen: tuple[str, str, str], models: list[str]) -> str:
        """Read one image, given as path, name and true label, and return what the page shows of it."""
        path, name, label = chosen
        try:
            explanation = self.reader.explain(name, Path(path))
            uploaded, _ = read_intensity(Path(path))
        except (ImageError, OSError) as error:
            return failure_html(Failure(name, str(error)))
        return verdict_html(explanation, uploaded, models, label)

    def show_example(self, models: list[str], event: gr.SelectData) -> tuple[str, tuple[str, str, str]]:
        chosen = self.examples[event.index]
        return self.show(chosen, models), chosen

    def show_upload(self, paths: list[str] | None, models: list[str]) -> tuple:
        """Show a single image at once; hand many over to the tab that reads many."""
        if not paths:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        if len(paths) > 1:
            return gr.skip(), gr.skip(), gr.Tabs(selected="many"), paths
        chosen = (paths[0], Path(paths[0]).name, "")
        return self.show(chosen, models), chosen, gr.skip(), gr.skip()

    def read_many(self, paths: list[str] | None, progress=gr.Progress()) -> tuple:  # noqa: B008 (Gradio finds it here)
        """Read many images into a table, a chart of the counts and a CSV file."""
        if not paths:
            return [], "", None
        names = ((Path(path).name, Path(path)) for path in paths)
        readings = list(progress.tqdm(self.reader.read(names), total=len(paths), unit="cells", desc="Reading"))
        rows = [
            [reading.file, "", None, None, reading.error]
            if isinstance(reading, Failure)
            else [reading.file, reading.verdict, reading.probability, reading.agreement, " ".join(doubts_of(reading))]
            for reading in readings
        ]
        file = Path(paths[0]).with_name("readings.csv")
        with open(file, "w", newline="", encoding="utf-8") as opened:
            models = list(self.reader.weights.models)
            csv.writer(opened).writerows([csv_header(models), *(csv_row(reading, models) for reading in readings)])
        return rows, counts_html(readings), str(file)

    def classify(self, image: str | None) -> dict:
        """Read one image of a HEp-2 cell: verdict, its probability, and six probabilities of each of four models."""
        if image is None:
            raise gr.Error("no image came; give one file: PNG, JPEG, TIFF, BMP or WebP", print_exception=False)
        answer = next(self.reader.read([(Path(image).name, Path(image))]))
        if isinstance(answer, Failure):
            raise gr.Error(answer.error, print_exception=False)
        return answer.as_dict()

    def classify_batch(self, images: list[str] | None) -> list[dict]:
        """Read many images: a list of what /classify answers; one that cannot be read gets {"file", "error"}."""
        return [answer.as_dict() for answer in self.reader.read((Path(p).name, Path(p)) for p in images or [])]

    def models(self) -> dict:
        """Tell which weights are loaded (source and revision), the models' names, and their measured figures."""
        weights = self.reader.weights
        names = {"models": list(weights.models), "source": weights.source, "revision": weights.revision}
        return names | {"metrics": weights.metrics}


def build(page: Page) -> gr.Blocks:
    """Lay out the page. Its first view shows a cell already read."""
    titles = [(title, name) for name, title in MODEL_TITLES.items()]
    # What is uploaded may be a patient's: every ten minutes, files older than 50 minutes are deleted.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3000)) as blocks:
        gr.Markdown(INTRODUCTION)
        chosen = gr.State(page.examples[0])
        with gr.Tabs() as tabs:
            with gr.Tab("Read a cell", id="one"), gr.Row():
                with gr.Column(scale=5, min_width=320):
                    upload = gr.File(
                        label=UPLOAD_LABEL, file_count="multiple", file_types=FILE_TYPES, elem_id="upload", height=150
                    )
                    gr.Markdown(EXAMPLES_TEXT)
                    gallery = gr.Gallery(
                        [(path, name) for path, name, _ in page.examples],
                        label="Examples",
                        show_label=False,
                        container=False,
                        columns=5,
                        height="auto",
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                        elem_id="examples",
                    )
                with gr.Column(scale=7, min_width=320):
                    shown = gr.CheckboxGroup(titles, value=list(MODEL_TITLES), label="Models shown")
                    result = gr.HTML(page.show(page.examples[0], list(MODEL_TITLES)))
            with gr.Tab("Many cells", id="many"):
                many = gr.File(
                    label=UPLOAD_LABEL, file_count="multiple", file_types=FILE_TYPES, elem_id="upload-many", height=150
                )
                counts = gr.HTML()
                table = gr.Dataframe(headers=list(TABLE), interactive=False, label="Readings", max_height=480)
                download = gr.File(label="All readings as CSV", interactive=False)
            with gr.Tab("The models", id="models"):
                gr.HTML(models_html(page.reader.weights))

        # Events that serve the page alone are no part of the API.
        private = {"api_visibility": "private"}
        gallery.select(page.show_example, shown, [result, chosen], show_progress="hidden", **private)
        shown.change(page.show, [chosen, shown], result, show_progress="hidden", **private)
        upload.upload(page.show_upload, [upload, shown], [result, chosen, tabs, many], **private)
        many.change(page.read_many, many, [table, counts, download], **private)

        with gr.Row(visible=False):
            image, images = gr.File(label="image"), gr.File(label="images", file_count="multiple")
            answer, button = gr.JSON(), gr.Button()
        button.click(page.classify, image, answer, api_name="classify")
        button.click(page.classify_batch, images, answer, api_name="classify_batch")
        button.click(page.models, None, answer, api_name="models")
    return blocks


def main(argv: list[str] | None = None) -> None:
    """Load the weights and serve the page."""
    parser = argparse.ArgumentParser(description="The page and API that read HEp-2 cells. Not for clinical use.")
    parser.add_argument(
        "--weights",
        default=os.environ.get("HEP2_WEIGHTS"),
        metavar="NAME",
        help="OWNER/NAME[@revision] on the Hub or a folder (default: HEP2_WEIGHTS, else the bundled ones)",
    )
    parser.add_argument("--host", default=None, help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=None)
    arguments = parser.parse_args(argv)
    blocks = build(Page(Reader(open_weights(arguments.weights))))
    blocks.queue(max_size=QUEUE)
    blocks.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        # No font, script or picture comes from elsewhere.
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        js=PASTE,
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        max_file_size="200mb",
        ssr_mode=False,
    )


if __name__ == "__main__":
    main()
