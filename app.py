"""The page and its API: `python app.py`, or a Hugging Face Space as it is. What it calls lives in `hep2`."""

import argparse
import os
import signal
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree

import gradio as gr
import spaces  # noqa: F401 (before PyTorch: on ZeroGPU it lends a GPU, elsewhere it does nothing)
from fastapi import Depends
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from hep2.checkpoints import Weights
from hep2.formats import EXPECTED
from hep2.hub import find_weights
from hep2.images import decode, make_cell
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET, MODEL_TITLES, is_synthetic
from hep2.predictor import Predictor
from hep2.ui import api
from hep2.ui.fragments import counts_html, examples_html, image_uri, models_html, steps_html, stretched
from hep2.ui.handlers import Example, Page

SYNTHETIC = Path(__file__).with_name("examples")
UI = Path(__file__).with_name("hep2") / "ui"
TITLE = "HEp-2 cells: four models and a verdict"
SUMMARY = "The staining pattern of a HEp-2 cell points to the antibodies in a patient's serum."
INTRODUCTION = f"""# {TITLE}
{SUMMARY} Click a cell, or give your own. **Not for clinical use**: on a new patient's slide the models are wrong more
often than on slides they know (see Models)."""
UPLOAD_TEXT = f"Drop, paste or choose one or many images of one cell each: {EXPECTED}, 8 to 32 bit."
EXAMPLES_TEXT = "**Examples**: {} Click to classify."
SYNTHETIC_TEXT = "synthetic cells, drawn by a program."
HELD_OUT_TEXT = "published cells that no model was trained on, with their labels."
FIELD_TEXT = """One or several whole fields of **one specimen**: dozens of cells, bright on dark. The cells are found
and classified, and all together give the pattern. Fields that are given later join the specimen."""
NO_FIELD = '<section class="reading"><p>The verdict and the picture with its cells will be shown here.</p></section>'
MODELS_SHOWN = f"""<fieldset id="shown" class="choices"><legend>Models shown</legend>{
    "".join(
        f'<label><input type="checkbox" value="{name}" checked> {title}</label>' for name, title in MODEL_TITLES.items()
    )
}</fieldset>"""
DOUBTFUL_ONLY = '<p class="choices"><label><input type="checkbox" id="doubtful"> Doubtful ones only</label></p>'
ABOUT = f"""## How it works
1. An image is decoded and resized to 78 × 78 pixels, and its 1st and 99th intensity percentiles become black and white.
2. CNN, ResCNN and ViT each give six calibrated probabilities; the stack ensemble combines CNN and ViT into the verdict.
3. An image unlike the training cells is rejected. In a field each cell is found first, and the verdicts are pooled.

## How to cite
The dataset [{DEFAULT_DATASET}](https://huggingface.co/datasets/{DEFAULT_DATASET}), the course report that comes with
it, and the International Consensus on ANA Patterns ([anapatterns.org](https://www.anapatterns.org)); see the README."""
CONCURRENT = 8  # requests to /classify that are answered at once; more cost memory and gain nothing
KEPT = (600, 3000)  # seconds: every ten minutes, files older than 50 minutes are deleted; they may be a patient's
MAX_WAITING = 256  # requests; one more is told that the page is busy
# No font comes from elsewhere. Gradio's greys and mid-tones are too faint on their backgrounds for contrast AA.
THEME = gr.themes.Soft(
    primary_hue="emerald", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    color_accent="*primary_700",
    link_text_color="*primary_700",
    link_text_color_dark="*primary_300",
    block_label_text_color="*primary_800",
    block_label_text_color_dark="white",
    block_label_background_fill_dark="*primary_800",
    block_title_text_color="*primary_800",
    block_title_text_color_dark="white",
    block_title_background_fill_dark="*primary_800",
    checkbox_border_color="*neutral_500",
    checkbox_border_color_dark="*neutral_400",
    button_secondary_background_fill_hover_dark="*neutral_600",
)
HEAD = f"""<script>Object.defineProperty(navigator, "language", {{ value: "en" }});</script>
<meta name="description" content="{SUMMARY}"><meta property="og:title" content="{TITLE}">
<meta property="og:description" content="{SUMMARY} Four models classify it.">"""
# Buttons within our own HTML tell the server which they are.
CLICK = """element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-click]");
  if (button) trigger("click", { chosen: button.dataset.click });
});"""


def examples_of(weights: Weights, dataset: str | None, folder: Path) -> tuple[dict[str, Example], str]:
    """Find cells to click on: held-out cells of the dataset or of the weights' source, else the synthetic ones.

    Cells of the dataset are written into `folder`.
    """
    cells = weights.examples()
    if dataset:
        from hep2.data import load_cells  # slow to import, and rarely needed
        from hep2.pipeline import held_out_examples

        held_out = held_out_examples(weights, load_cells(dataset), dataset)
        for name, (label, data) in held_out.items():
            path = folder / label / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        cells = [(path, label) for label in CLASS_NAMES for path in sorted((folder / label).iterdir())]
    # What came with weights that were trained on synthetic cells is synthetic too.
    text, truth = HELD_OUT_TEXT, "Its label: "
    if not cells or is_synthetic(dataset or weights.training["dataset"]):
        text, truth = SYNTHETIC_TEXT, "Synthetic, drawn as "
    cells = cells or [(SYNTHETIC / label / f"{number}.png", label) for label in CLASS_NAMES for number in range(1, 6)]
    examples, count = {}, Counter()
    for path, label in cells:
        count[label] += 1
        examples[f"{label}-{count[label]}"] = Example(label, path, f"{label} {count[label]}", truth + label)
    for path in sorted((SYNTHETIC / "hard").glob("*.png")):
        examples[path.stem] = Example("Hard, or to be rejected", path, path.stem, "Synthetic")
    return examples, text


def field_examples() -> dict[str, Example]:
    paths = [SYNTHETIC / "fields" / f"{label}.png" for label in CLASS_NAMES]
    return {f"field-{path.stem}": Example(path.stem, path, path.stem, "") for path in paths}


def thumbnails(examples: dict[str, Example], kind: str) -> str:
    images = ((key, one.row, one.name, decode(one.path).intensity) for key, one in examples.items())
    return examples_html(images, kind)


def upload_box(tab: str, label: str) -> gr.File:
    return gr.File(label=label, file_count="multiple", elem_id=f"{tab}-upload", elem_classes="upload", height=170)


def advanced(pixel_size: bool = False) -> list:
    """Lay out what few need: the pixel size, and which channel and plane of a file to read."""
    with gr.Accordion("Advanced", open=False):
        size = [gr.Number(None, label="Micrometres a pixel (empty: as the file says)", step=0.01)] if pixel_size else []
        channel = gr.Textbox("", label="Channel: a name, a colour, or a number from 1 (empty: the stain's)")
        return [*size, channel, gr.Number(None, label="Plane, from 1 (empty: the sharpest)", precision=0)]


def build(page: Page, examples_text: str, first: str) -> gr.Blocks:
    """Lay out the page. `first` is the prediction that a visitor finds."""
    # What serves the page alone is no part of the API.
    private = {"api_visibility": "private", "show_progress": "hidden"}
    every = private | {"trigger_mode": "multiple"}  # kept back till one is answered, another would get lost
    example = image_uri(stretched(decode(SYNTHETIC / "Homogeneous" / "1.png").intensity), "WEBP", 48, quality=1)
    cells = {key: one for key, one in page.examples.items() if not key.startswith("field-")}
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=KEPT) as blocks:
        gr.Markdown(INTRODUCTION)
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("One cell", id="one", elem_id="tab-one"), gr.Row():
                with gr.Column(scale=4, min_width=300):
                    upload = upload_box("one", "Your own images")
                    gr.Markdown(UPLOAD_TEXT)
                    one_options = advanced()
                    gr.Markdown(EXAMPLES_TEXT.format(examples_text))
                    gallery = gr.HTML(thumbnails(cells, "cells"), js_on_load=CLICK)
                with gr.Column(scale=8, min_width=320, elem_classes="sticky"):
                    result = gr.HTML(first, elem_id="one-result", js_on_load=CLICK)
                    gr.HTML(MODELS_SHOWN)
            with gr.Tab("Many cells", id="many", elem_id="tab-many"):
                with gr.Row():
                    with gr.Column(min_width=300):
                        many = upload_box("many", "Your own images")
                        gr.Markdown(UPLOAD_TEXT)
                        many_options = advanced()
                    with gr.Column(min_width=300):
                        many_counts = gr.HTML(counts_html([]))
                        many_files = gr.File(label="Downloads", interactive=False, height=150, elem_id="many-files")
                        stop_many = gr.Button("Stop", elem_id="stop-many")
                gr.HTML(DOUBTFUL_ONLY)
                many_result = gr.HTML(elem_id="many-result")
            with gr.Tab("A field", id="field", elem_id="tab-field"), gr.Row():
                with gr.Column(scale=4, min_width=300):
                    field = upload_box("field", "Fields of one specimen")
                    gr.Markdown(FIELD_TEXT)
                    field_options = advanced(pixel_size=True)
                    again = gr.Button("Read again with these", size="sm")
                    gr.Markdown(EXAMPLES_TEXT.format(SYNTHETIC_TEXT.replace("cells", "fields")))
                    fields = gr.HTML(thumbnails(field_examples(), "fields"), js_on_load=CLICK)
                with gr.Column(scale=8, min_width=320):
                    stop_field = gr.Button("Stop", elem_id="stop-field")
                    field_result = gr.HTML(NO_FIELD, elem_id="field-result")
                    field_files = gr.File(label="Downloads", interactive=False, height=240, elem_id="field-files")
            with gr.Tab("Models", id="models", elem_id="tab-models") as models_tab:
                gr.HTML(models_html(page.weights))
                details = gr.HTML()
        with gr.Accordion("How it works, and how to cite", open=False):
            speckled = decode(SYNTHETIC / "Speckled" / "1.png")
            gr.HTML(steps_html(speckled, make_cell(speckled)))
            gr.Markdown(ABOUT)
        if os.environ.get("SPACE_ID"):
            gr.DuplicateButton()

        given = gr.State()  # the upload that is shown under One cell
        gallery.click(page.show_example, None, result, **every)
        # A box that is filled while its tab is closed tells of no change: these do.
        many_handed, field_handed = gr.State(), gr.State()
        outputs = [result, upload, given, tabs, many, many_handed]
        upload.upload(page.show_upload, [upload, *one_options], outputs, **every)
        result.click(page.show_as_field, given, [tabs, field, field_handed], **every)
        fields.click(page.show_field_example, None, field, **every)
        # The change of a list ends the job that runs for the list before, and begins another.
        many_outputs, field_outputs = [many_result, many_counts, many_files], [field_result, field_files]
        again_or_handed = [again.click, field_handed.change]
        for work, box, options, outputs, stop, triggers in (
            (page.classify_many, many, many_options, many_outputs, stop_many, [many_handed.change]),
            (page.show_specimen, field, field_options, field_outputs, stop_field, again_or_handed),
        ):
            job = gr.State()
            gr.on([box.change, box.clear, *triggers], page.begin, job, [job, outputs[0]], **every)
            job.change(work, [box, *options, job], outputs, **every)
            stop.click(page.stop, job, None, **private)
        models_tab.select(page.show_models, None, details, **private)

        with gr.Row(visible=False):
            image = api.ImageParameter("image", api.IMAGE, example)
            images = api.ImageParameter("images", api.listed(api.IMAGE), [example, example])
            channel, plane = api.Parameter("channel", api.CHANNEL), api.Parameter("plane", api.PLANE)
            pixel_size = api.Parameter("pixel_size", api.PIXEL_SIZE)
            prediction, predictions = (
                api.Parameter("prediction", api.PREDICTION),
                api.Parameter("predictions", api.listed(api.PREDICTION)),
            )
            specimen, known = api.Parameter("specimen", api.SPECIMEN), api.Parameter("weights", api.KNOWN)
            maps, button = api.Parameter("maps", api.MAPS), gr.Button()
        button.click(page.classify, [image, channel, plane], prediction, concurrency_limit=CONCURRENT)
        button.click(page.classify_batch, [images, channel, plane], predictions)
        button.click(page.explain, [image, channel, plane], [prediction, maps])
        button.click(page.specimen, [images, pixel_size, channel, plane], specimen)
        button.click(page.models, None, known)
    return blocks


def main(argv: list[str] | None = None) -> int:
    """Load the weights and serve the page; returns the exit status."""
    parser = argparse.ArgumentParser(description="The page and API that classify HEp-2 cells. Not for clinical use.")
    parser.add_argument("--weights", help="OWNER/NAME[@revision] on the Hub, or a folder (default: the bundled ones)")
    parser.add_argument("--dataset", help="Hub name or local folder: examples are its test cells (default: synthetic)")
    parser.add_argument("--host", default=None, help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="to listen on, 1 to 65535 (default: the first free one from 7860)")
    arguments = parser.parse_args(argv)
    if arguments.port is not None and not 0 < arguments.port < 65536:
        parser.error(f"argument --port: {arguments.port} is not between 1 and 65535")
    # Told to stop, the server ends as if interrupted, and deletes what was uploaded.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = api.folder_for_uploads()
    try:
        weights = find_weights(arguments.weights)
        (folder / "examples").mkdir()
        examples, text = examples_of(weights, arguments.dataset, folder / "examples")
        # The first view is computed before the models move to a GPU, which ZeroGPU lends to requests alone.
        first = Page(Predictor(weights, "cpu")).show(next(iter(examples.values())))
        blocks = build(Page(Predictor(weights), examples | field_examples()), text, first)
        for note in weights.notes:
            print(f"app.py: note: {note}", file=sys.stderr)
        # Told of every finished job, those who wait would each gather a letter for all the others.
        blocks.queue(max_size=MAX_WAITING, status_update_rate=1)
        blocks.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            theme=THEME,
            css_paths=UI / "page.css",
            js=(UI / "page.js").read_text(),
            i18n=gr.I18n(en={"common.upload": "Upload"}),
            footer_links=["api", "settings"],
            run_history=False,
            enable_monitoring=False,
            max_file_size="200mb",
            ssr_mode=False,
            allowed_paths=[str(SYNTHETIC)],
            # The page keeps next to nothing between two events, and a caller of the API opens a session with each call.
            state_session_capacity=100,
            app_kwargs={
                "dependencies": [Depends(api.guard)],
                "middleware": [Middleware(GZipMiddleware), Middleware(api.Responses, head=HEAD)],
            },
            # With gradio[mcp] installed, the API's functions are tools for an assistant as well.
            mcp_server=find_spec("mcp") is not None,
        )
    except (ValueError, OSError) as error:  # wrong weights or dataset, a port that is taken, another's address
        print(f"app.py: {error}", file=sys.stderr)
        return 1
    finally:
        rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
