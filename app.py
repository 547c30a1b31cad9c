"""The page and its API: `python app.py`, or a Hugging Face Space as it is. What it calls lives in `hep2`."""

import argparse
import csv
import io
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import spaces  # before PyTorch: on ZeroGPU it lends the card, elsewhere it does nothing
from gradio.blocks import BlockFunction
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from hep2.__main__ import add_weights_option
from hep2.data import load_cells
from hep2.fields import check_pixel_size, draw_overlays, read_specimen, specimen_rows
from hep2.hub import open_weights
from hep2.imaging import Cell, ImageError, load_cell, make_cell, read_intensity
from hep2.patterns import CLASS_NAMES, MODEL_TITLES, is_synthetic
from hep2.pipeline import held_out_examples
from hep2.reader import Explanation, Failure, Gathering, Reader, csv_header, csv_row
from hep2.uploads import folder_of_uploads
from hep2.views import (
    NO_VERDICT,
    counts_html,
    failure_html,
    model_details_html,
    models_html,
    specimen_html,
    verdict_html,
)
from hep2.weights import Weights, best_device

SYNTHETIC = Path(__file__).with_name("examples")
FIELDS = [SYNTHETIC / "fields" / f"{name}.png" for name in CLASS_NAMES]
CSS = Path(__file__).with_name("hep2") / "views.css"
TITLE = "HEp-2 cells: four models and a verdict"
INTRODUCTION = """# HEp-2 cells: four models and a verdict
The staining pattern of a HEp-2 cell points to the antibodies in a patient's serum. Click a cell, or give your own.
**Not for clinical use**: on a new patient's slide the models are right less often than they say (see Models)."""
UPLOAD_LABEL = "Your own images"
UPLOAD_TEXT = "Drop, paste or choose one or many, each of one cell: PNG, JPEG, TIFF, BMP or WebP, 8 to 32 bit."
SYNTHETIC_TEXT = "**Examples**: synthetic cells, drawn by a program. A click reads one."
HELD_OUT_TEXT = "**Examples**: published cells that no model was trained on, with their labels. A click reads one."
FIELD_EXAMPLES_TEXT = "**Examples**: synthetic fields, drawn by a program. A click reads one."
FIELD_TEXT = """One or several whole fields of **one specimen**: dozens of cells, bright on dark, as the camera of a
microscope gives them. The cells are found, each is read, and all together say what the specimen shows. What is given
later joins the same specimen: clear the box for another."""
TABLE = ("file", "verdict", "probability", "models agree", "remarks")
NOTHING_READ = ([], counts_html([]), None)  # table, counts and CSV
NO_SPECIMEN = ("", None, None)  # reading, table and pictures
NO_IMAGE = "no image came; give one file: PNG, JPEG, TIFF, BMP or WebP"
FITTING = (
    "it takes each image (and several as a list) as a file that was uploaded to /gradio_api/upload before, "
    'as {"path": …, "meta": {"_type": "gradio.FileData"}}, which handle_file of gradio_client does; no other paths, '
    "and no addresses; uploads are deleted within the hour: if it is longer ago, give it again"
)
TOGETHER = 8  # requests to /classify that are answered at once; more cost memory and gain nothing
KEPT = (600, 3000)  # seconds: every ten minutes, files older than 50 minutes are deleted; they may be a patient's
MOST_IMAGES = 10_000  # in one request: some minutes of two cores
MOST_PIXELS = 200_000_000  # of all fields of one specimen together, which are held at once
QUEUE = 256  # requests that may wait; one more is told that the page is busy
# No font comes from elsewhere. Gradio's greys and mid-tones are too faint on their grounds for contrast AA.
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
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_800",
    button_secondary_background_fill_hover_dark="*neutral_600",
)
SCRIPT = """() => {
  // Gradio's file box takes drops and choices; a pasted image is handed to it here.
  document.addEventListener("paste", (event) => {
    const files = event.clipboardData && event.clipboardData.files;
    const boxes = [...document.querySelectorAll("#upload, #upload-many, #upload-field")];
    const input = boxes.find((box) => box.checkVisibility())?.querySelector("input[type=file]");
    if (files && files.length && input) {
      input.files = files;
      input.dispatchEvent(new Event("change", { bubbles: true }));
    }
  });
  document.addEventListener("click", (event) => {
    const summary = event.target.closest("#result .maps summary");
    if (summary) summary.closest("#result").dataset.maps = summary.parentElement.open ? "" : "open";
    // A cell in a field leads to its card on this page, whatever the address is.
    const link = event.target.closest("#specimen a[href^='#']");
    if (link) {
      event.preventDefault();
      window.location.hash = link.getAttribute("href");
    }
  });
  // Gradio calls its thumbnails "Thumbnail 7 of 30": who cannot see them wants to hear what they show.
  const named = setInterval(() => {
    const thumbnails = document.querySelectorAll(".pictures button[aria-label^='Thumbnail']");
    const seen = {};
    for (const thumbnail of thumbnails) {
      const caption = thumbnail.textContent.trim();
      const key = thumbnail.closest(".pictures").id + caption;
      seen[key] = (seen[key] || 0) + 1;
      thumbnail.setAttribute("aria-label", `Read example ${caption} ${seen[key]}`);
    }
    if (document.querySelector("#field-examples button[aria-label^='Read']")) clearInterval(named);
  }, 200);
}"""

# Maps that were unfolded stay so for the next cell. On a phone the reading lies below what was clicked.
SHOW = """() => {
  const result = document.querySelector("#result"), maps = result.querySelector(".maps");
  if (maps) maps.open = result.dataset.maps === "open";
  if (window.innerWidth < 700 && result.checkVisibility()) result.scrollIntoView({ behavior: "smooth" });
}"""

# Pictures to click on, and nothing else.
GALLERY = {
    "show_label": False,
    "container": False,
    "height": "auto",
    "allow_preview": False,
    "interactive": False,
    "buttons": [],
    "elem_classes": "pictures",
}

# Which models are shown is the browser's own business: views.css hides the others.
CHOOSE = """(models) => { document.querySelector("#result").dataset.models = models.join(" "); }"""


class Chosen(NamedTuple):
    """An image to be shown: where it lies, its name, what the gallery calls it, and what is known of its pattern."""

    path: str
    name: str
    caption: str = ""
    truth: str = ""


class Page:
    """The functions behind the page and its API, on one reader that was loaded before the first request."""

    def __init__(self, reader: Reader, examples: list[Chosen], examples_text: str) -> None:
        self.weights = reader.weights
        self.examples, self.examples_text = examples, examples_text
        # On ZeroGPU these borrow a card for some seconds; with a card of one's own, or none, they are as they were.
        # Only the models need it: decoding, finding cells, and the progress bar, which cannot travel, stay here.
        self._explain = spaces.GPU(duration=10)(reader.explain)
        read_cells = spaces.GPU(duration=lambda cells: 10 + len(cells) // 100)(reader.read_cells)
        self._read = partial(reader.read, read_cells=read_cells)
        self._read_specimen = partial(read_specimen, reader, read_cells=read_cells)
        self.read_together = Gathering(lambda named: list(self._read(named)))
        if os.environ.get("SPACES_ZERO_GPU"):  # there each visitor borrows on an allowance of their own
            self.read_together = lambda named: next(self._read([named]))

    def show_example(self, event: gr.SelectData) -> str:
        return reading_html(self._explain, self.examples[event.index])

    def show_field_example(self, event: gr.SelectData) -> list[str]:
        return [str(FIELDS[event.index])]

    def show_upload(self, paths: list[str] | None, handed: int) -> tuple:
        """Show a single image at once; hand many over to the tab that reads many. The box is ready for the next.

        `handed` counts how often many were handed over.
        """
        if not paths:
            return gr.skip(), None, gr.skip(), gr.skip(), gr.skip()
        if len(paths) > 1:
            return gr.skip(), None, gr.Tabs(selected="many"), paths, handed + 1
        reading = reading_html(self._explain, Chosen(paths[0], Path(paths[0]).name))
        return reading, None, gr.skip(), gr.skip(), gr.skip()

    def read_many(self, paths: list[str] | None, progress=gr.Progress()) -> tuple:  # noqa: B008 (Gradio finds it here)
        """Read many images into a table, a chart of the counts and a CSV file."""
        if not paths:
            return NOTHING_READ
        check_count(paths)
        readings = list(progress.tqdm(self._read(_named(paths)), total=len(paths), unit="cells", desc="Reading"))
        rows = [
            [reading.file, "not read", None, None, reading.error]
            if isinstance(reading, Failure)
            else [
                reading.file,
                reading.verdict or NO_VERDICT,
                reading.probability,
                reading.agreement,
                "; ".join(reading.warnings),
            ]
            for reading in readings
        ]
        text = io.StringIO(newline="")
        table = [csv_header(self.weights), *(csv_row(reading, self.weights) for reading in readings)]
        csv.writer(text).writerows(table)
        # Where Gradio itself would put it, and deletes it in time: a copy elsewhere would stay.
        file = save_bytes_to_cache(text.getvalue().encode(), "readings.csv", get_upload_folder())
        return rows, counts_html(readings), file

    def read_specimen(self, paths: list[str] | None, pixel_size: float | None, progress=gr.Progress()) -> tuple:  # noqa: B008
        """Read the fields of one specimen into an overlay, its cells sorted by doubt, a table and a picture to keep."""
        if not paths:
            return NO_SPECIMEN
        pixel_size = pixel_size or None
        fields = fields_of(paths, pixel_size)
        if isinstance(fields, Failure):
            if len(paths) > 1:
                fields = Failure(fields.file, f"{fields.error}. Taken out of the list (×), it costs the others nothing")
            return failure_html(fields), None, None
        specimen = self._read_specimen(
            fields,
            pixel_size=pixel_size,
            progress=lambda items, total, step: progress.tqdm(items, total=total, desc=step),
        )
        text = io.StringIO(newline="")
        csv.writer(text).writerows(specimen_rows(specimen))
        table = save_bytes_to_cache(text.getvalue().encode(), "specimen.csv", get_upload_folder())
        pictures = []
        intensities = [intensity for _, intensity, _ in fields]
        for name, picture in zip(specimen.files, draw_overlays(specimen, intensities), strict=True):
            file = io.BytesIO()
            picture.save(file, "PNG")
            name = f"{Path(name).stem}-cells.png"
            pictures.append(save_bytes_to_cache(file.getvalue(), name, get_upload_folder()))
        return specimen_html(specimen, intensities), table, pictures

    def specimen(self, fields: list[str] | None, pixel_size: float | None = None) -> dict:
        """Find and read the cells in whole slide fields of one specimen, and say what pattern it has.

        Answers verdict, probability, its interval, counts of each pattern, and every cell with its place. The verdict
        is a pattern, or "negative or too faint", "no pattern of the six", or "no cells found". A field that cannot be
        read is answered by {"file", "error"}.

        Args:
            fields: images of many cells, bright on dark; PNG, JPEG, TIFF, BMP or WebP, 8 to 32 bit
            pixel_size: micrometres a pixel, or 0 or nothing if not known: it narrows the search for the nuclei
        """
        if not fields:
            return Failure("", NO_IMAGE).as_dict()
        pixel_size = pixel_size or None  # 0 is not known, as on the page
        named = fields_of(fields, pixel_size)
        if isinstance(named, Failure):
            return named.as_dict()
        return self._read_specimen(named, pixel_size=pixel_size).as_dict()

    def classify(self, image: str | None) -> dict:
        """Read one image of a HEp-2 cell: verdict, its probability, and six probabilities of each of four models.

        An image that cannot be read is answered by {"file", "error"}.

        Args:
            image: one cell whose nucleus fills most of the image; PNG, JPEG, TIFF, BMP or WebP, 8 to 32 bit
        """
        if not image:
            return Failure("", NO_IMAGE).as_dict()
        return self.read_together((Path(image).name, Path(image))).as_dict()

    def classify_batch(self, images: list[str] | None) -> list[dict]:
        """Read many images of one HEp-2 cell each: a list of what classify answers, in the order of the images.

        Args:
            images: one cell each; PNG, JPEG, TIFF, BMP or WebP, 8 to 32 bit
        """
        if not images:
            return [Failure("", NO_IMAGE).as_dict()]
        check_count(images)
        return [answer.as_dict() for answer in self._read(_named(images))]

    def explain(self, image: str | None) -> tuple[dict, list[tuple[Image.Image, str]]]:
        """Read one image of a HEp-2 cell and tell where each model looked.

        Answers what classify answers, and for each model an 8-bit grey image of 78 x 78, bright where it looked.

        Args:
            image: one cell whose nucleus fills most of the image; PNG, JPEG, TIFF, BMP or WebP, 8 to 32 bit
        """
        if not image:
            return Failure("", NO_IMAGE).as_dict(), []
        try:
            explanation = self._explain(Path(image).name, load_cell(Path(image)))
        except (ImageError, OSError) as error:
            return Failure(Path(image).name, str(error)).as_dict(), []
        maps = [(Image.fromarray((255 * values).round().astype("uint8")), n) for n, values in explanation.maps.items()]
        return explanation.reading.as_dict(), maps

    def models(self) -> dict:
        """Tell which weights are loaded (source and revision), the models' names, and their measured figures."""
        weights = self.weights
        names = {"models": list(weights.models), "source": weights.source, "revision": weights.revision}
        return names | {"notes": list(weights.notes), "metrics": weights.metrics}

    def show_models(self, filled: bool) -> tuple:
        return gr.skip() if filled else self.model_details, True

    @cached_property
    def model_details(self) -> str:
        return model_details_html(self.weights)


def reading_html(explain: Callable[[str, Cell], Explanation], chosen: Chosen) -> str:
    """Read one image and return what the page shows of it."""
    path, name, _, truth = chosen
    try:
        uploaded, notes = read_intensity(Path(path))
        cell = make_cell(uploaded, notes)
    except (ImageError, OSError) as error:
        return failure_html(Failure(name, str(error)))
    return verdict_html(explain(name, cell), uploaded, truth)


def fields_of(paths: list[str], pixel_size: float | None) -> list[tuple] | Failure:
    """Decode the fields of one specimen as `hep2.fields.read_specimen` takes them, or say what cannot be read."""
    try:
        check_pixel_size(pixel_size)
    except ValueError as error:
        return Failure("", str(error))
    fields, pixels = [], 0
    for name, path in _named(paths):
        try:
            fields.append((name, *read_intensity(path)))
        except (ImageError, OSError) as error:
            return Failure(name, str(error))
        pixels += fields[-1][1].size
        if pixels > MOST_PIXELS:
            most = MOST_PIXELS // 1_000_000
            return Failure(name, f"with this field there are more than {most} million pixels: give fewer, or smaller")
    return fields


def check_count(paths: list[str]) -> None:
    """Raise an error for the caller if there are too many images for one request."""
    if len(paths) > MOST_IMAGES:
        raise gr.Error(
            f"{len(paths)} images came, at most {MOST_IMAGES} can be read at once: send them in parts",
            print_exception=False,
        )


def _named(paths: Iterable[str]) -> list[tuple[str, Path]]:
    """Name each file; of several with one name, from several folders, the later ones are numbered."""
    named, taken, seen = [], set(), Counter()
    for path in map(Path, paths):
        name = path.name
        while name in taken:
            seen[path.name] += 1
            name = f"{path.stem} ({seen[path.name] + 1}){path.suffix}"
        taken.add(name)
        named.append((name, path))
    return named


def examples_of(weights: Weights, dataset: str | None, folder: Path) -> tuple[list[Chosen], str]:
    """Find cells to click on: held-out cells of the dataset or of the weights' source, else the synthetic ones.

    Cells of the dataset are written into `folder`.
    """
    if dataset:
        cells = []
        for name, (label, data) in held_out_examples(weights, load_cells(dataset), dataset).items():
            path = folder / label / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            cells.append((path, label))
        cells.sort(key=lambda cell: (CLASS_NAMES.index(cell[1]), cell[0].name))
    else:
        cells = weights.examples()
    # What came with weights that were trained on phantoms are phantoms too.
    drawn = is_synthetic(dataset or weights.configs["ensemble"]["training"]["dataset"])
    text, truth = HELD_OUT_TEXT, "Its label: "
    if drawn or not cells:
        text, truth = SYNTHETIC_TEXT, "Synthetic, drawn as "
    if not cells:
        cells = [(SYNTHETIC / name / f"{number}.png", name) for name in CLASS_NAMES for number in range(1, 6)]
    return [Chosen(str(path), f"{label} {path.stem}", label, truth + label) for path, label in cells], text


class Blocks(gr.Blocks):
    """Gradio's page, with words for a caller whose arguments do not fit: Gradio itself answers "error": null."""

    async def preprocess_data(self, block_fn: BlockFunction, inputs: list, *rest, **options) -> list:
        try:
            for path in paths_in(inputs):
                # Of a folder Gradio would keep account as of a file, and fail for good when it comes to delete it. What
                # lies at an address it would fetch, of any size.
                if not Path(path).is_file():
                    raise FileNotFoundError(path)
            return await super().preprocess_data(block_fn, inputs, *rest, **options)
        except Exception as error:  # whatever a sender can bring about
            message = f"/{block_fn.api_name} got arguments that do not fit: {FITTING}"
            raise gr.Error(message, print_exception=False) from error


def paths_in(value: object) -> Iterator[str]:
    """Find the paths of all files in the arguments of a request."""
    if isinstance(value, dict):
        if "meta" in value and isinstance(value.get("path"), str):
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from paths_in(part)


def build(page: Page, first: str) -> gr.Blocks:
    """Lay out the page. `first` is the reading that a visitor finds."""
    titles = [(title, name) for name, title in MODEL_TITLES.items()]
    with Blocks(title=TITLE, analytics_enabled=False, delete_cache=KEPT) as blocks:
        gr.Markdown(INTRODUCTION)
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("One cell", id="one"), gr.Row():
                with gr.Column(scale=5, min_width=320):
                    upload = gr.File(label=UPLOAD_LABEL, file_count="multiple", elem_id="upload", height=170)
                    gr.Markdown(UPLOAD_TEXT)
                    gr.Markdown(page.examples_text)
                    gallery = gr.Gallery(
                        [(example.path, example.caption) for example in page.examples],
                        label="Examples",
                        columns=5,
                        elem_id="examples",
                        **GALLERY,
                    )
                with gr.Column(scale=7, min_width=320):
                    shown = gr.CheckboxGroup(titles, value=list(MODEL_TITLES), label="Models shown")
                    result = gr.HTML(first, elem_id="result")
            with gr.Tab("Many cells", id="many"):
                many = gr.File(label=UPLOAD_LABEL, file_count="multiple", elem_id="upload-many", height=170)
                gr.Markdown(UPLOAD_TEXT)
                counts = gr.HTML(counts_html([]), elem_id="counts")
                table = gr.Dataframe(
                    headers=list(TABLE),
                    column_widths=["190px", "125px", "150px", "165px", "500px"],
                    wrap=True,
                    max_height=480,
                    interactive=False,
                    label="Readings",
                    elem_id="table",
                )
                download = gr.File(label="All readings as CSV", interactive=False, elem_id="download")
            with gr.Tab("A field", id="field"):
                gr.Markdown(FIELD_TEXT)
                with gr.Row(equal_height=True):
                    scale = gr.Number(0, label="Micrometres a pixel; 0 if not known", step=0.01, scale=3)
                    again = gr.Button("Read again with this", scale=1)
                field = gr.File(
                    label="Fields of one specimen", file_count="multiple", elem_id="upload-field", height=170
                )
                gr.Markdown(FIELD_EXAMPLES_TEXT)
                field_gallery = gr.Gallery(
                    [(str(path), path.stem) for path in FIELDS],
                    label="Examples of fields",
                    columns=6,
                    elem_id="field-examples",
                    **GALLERY,
                )
                with gr.Row():
                    specimen_table = gr.File(
                        label="All cells as CSV", interactive=False, height=150, elem_id="field-table"
                    )
                    specimen_pictures = gr.File(
                        label="Fields with the cells drawn in", interactive=False, height=150, elem_id="field-pictures"
                    )
                specimen_result = gr.HTML(elem_id="specimen")
            with gr.Tab("Models", id="models") as models_tab:
                gr.HTML(models_html(page.weights))
                details, filled = gr.HTML(), gr.State(False)

        # Events that serve the page alone are no part of the API.
        private = {"api_visibility": "private"}
        # Answered in their order: kept back till the first is answered, a second click would ask for the first again.
        select = {"show_progress": "hidden", "trigger_mode": "multiple"}
        gallery.select(page.show_example, None, result, **select, **private).then(None, None, None, js=SHOW, **private)
        shown.change(None, shown, None, js=CHOOSE, **private)
        read_many = {"fn": page.read_many, "outputs": [table, counts, download], "show_progress_on": counts, **private}
        handed = gr.State(0)
        shown_upload = [result, upload, tabs, many, handed]
        upload.upload(page.show_upload, [upload, handed], shown_upload, trigger_mode="multiple", **private).then(
            None, None, None, js=SHOW, **private
        )
        # Given here, handed over by the other tab, or taken out of the list: what is shown follows the list. Its change
        # is no such sign: where the other tab has filled it, it comes twice.
        gr.on([many.upload, many.delete, many.clear, handed.change], inputs=many, **read_many)
        field_gallery.select(page.show_field_example, None, field, **select, **private)
        gr.on(
            [field.change, scale.submit, again.click],
            page.read_specimen,
            [field, scale],
            [specimen_result, specimen_table, specimen_pictures],
            show_progress_on=specimen_result,
            **private,
        )
        # Sent once to a visitor: sent again, what was unfolded would close.
        models_tab.select(page.show_models, filled, [details, filled], **private)

        with gr.Row(visible=False):
            image, images = gr.File(label="image"), gr.File(label="images", file_count="multiple")
            reading, readings, known = gr.JSON(label="reading"), gr.JSON(label="readings"), gr.JSON(label="weights")
            pixel_size, specimen = gr.Number(label="pixel_size", value=None), gr.JSON(label="specimen")
            maps, button = gr.Gallery(label="maps", format="png"), gr.Button()
        button.click(page.classify, image, reading, api_name="classify", concurrency_limit=TOGETHER)
        button.click(page.classify_batch, images, readings, api_name="classify_batch")
        button.click(page.explain, image, [reading, maps], api_name="explain")
        button.click(page.specimen, [images, pixel_size], specimen, api_name="specimen")
        button.click(page.models, None, known, api_name="models")
    return blocks


def main(argv: list[str] | None = None) -> int:
    """Load the weights and serve the page; returns the exit status."""
    parser = argparse.ArgumentParser(description="The page and API that read HEp-2 cells. Not for clinical use.")
    add_weights_option(parser)
    parser.add_argument("--dataset", help="Hub name or local folder: examples are its test cells (default: synthetic)")
    parser.add_argument("--host", default=None, help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="to listen on, 1 to 65535 (default: the first free one from 7860)")
    arguments = parser.parse_args(argv)
    if arguments.port is not None and not 0 < arguments.port < 65536:
        parser.error(f"argument --port: {arguments.port} is not between 1 and 65535")
    # Told to stop, the server ends as if interrupted, and deletes what was uploaded.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with folder_of_uploads(*KEPT) as kept, tempfile.TemporaryDirectory(prefix="hep2-examples-") as folder:
        try:
            weights = open_weights(arguments.weights)
            examples, text = examples_of(weights, arguments.dataset, Path(folder))
        except (ValueError, OSError) as error:
            print(f"app.py: {error}", file=sys.stderr)
            return 1
        # The first view is read before the models move to a card, which ZeroGPU lends to requests alone.
        first = reading_html(Reader(weights).explain, examples[0])
        reader = Reader(weights.to(best_device()))
        blocks = build(Page(reader, examples, text), first)
        kept.update(Path(path) for block in blocks.blocks.values() for path in block.keep_in_cache)
        for note in weights.notes:
            print(f"app.py: note: {note}", file=sys.stderr)
        # Told of every finished job, those who wait would each gather a letter for all the others.
        blocks.queue(max_size=QUEUE, status_update_rate=1)
        try:
            blocks.launch(
                server_name=arguments.host,
                server_port=arguments.port,
                theme=THEME,
                css_paths=CSS,
                js=SCRIPT,
                footer_links=["api"],
                run_history=False,
                enable_monitoring=False,
                max_file_size="200mb",
                ssr_mode=False,
                # The page keeps nothing between two events, and a caller of the API opens a session with each call.
                state_session_capacity=100,
                # With gradio[mcp] installed, the API's functions are tools for an assistant as well.
                mcp_server=find_spec("mcp") is not None,
            )
        except OSError as error:  # the port is taken, or the address is not ours
            print(f"app.py: {error} Give another --port or --host.", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
