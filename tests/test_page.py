"""The page as its users have it: chromium, driven by Playwright, on the page in a process of its own."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT, serving_page
from PIL import Image
from uploads import cell, encoded, tiff, uploads

from hep2.patterns import CLASS_NAMES
from hep2.synthetic import reduce_field, synthetic_cell, synthetic_field

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt-get install chromium)"),
    pytest.mark.flaky(reruns=2),  # a browser on a busy machine is late once in some hundred tests
]

FILE_SHOWN = "document.querySelector('#one-result .file')?.textContent"
GOLGI, FIELD = ROOT / "examples/Golgi/1.png", ROOT / "examples/fields/NuMem.png"


@pytest.fixture(scope="module")
def served():
    with serving_page() as page:
        yield page


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, served):
    """Open the page in a browser of its own; afterwards, no console error and no request elsewhere must have been."""
    contexts, complaints = [], []

    def open_page(query: str = "", **options):
        context = browser.new_context(**({"viewport": {"width": 1440, "height": 1000}} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        allowed = (served.address, "data:", "blob:")
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(allowed) else None)
        page.goto(served.address + query)
        page.wait_for_selector("#one-result .name", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    # What a page asks for when it is left or loaded anew ends in the middle.
    assert [
        text
        for text in complaints
        if not re.search("AbortError|network error|errored out|error 404|INCOMPLETE_CHUNKED", text)
    ] == []


def wait_for_prediction(page, name: str) -> None:
    page.wait_for_function(f"name => {FILE_SHOWN} === name && !document.querySelector('.busy')", arg=name)


def click_example(page, number: int) -> None:
    page.locator(".examples.cells button").nth(number).click()
    wait_for_prediction(page, f"{CLASS_NAMES[number // 5]} {number % 5 + 1}")


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def give(page, *files: tuple[str, bytes], box: str = "one-upload") -> None:
    payload = [{"name": name, "mimeType": "application/octet-stream", "buffer": data} for name, data in files]
    page.locator(f"#{box} input[type=file]").first.set_input_files(payload)


def many(count: int) -> list[tuple[str, bytes]]:
    return [(f"{number:04}.png", GOLGI.read_bytes()) for number in range(count)]


def counted(page, text: str) -> None:
    playwright.expect(page.locator(".counts h2")).to_have_text(text, timeout=60_000)


def test_first_visit_shows_a_verdict_that_leads(visit):
    page = visit()
    assert page.locator("#one-result .name").inner_text() == "Centromere"
    assert page.locator("#one-result .bars").count() == 4
    assert "Not for clinical use" in page.content()
    assert page.locator(".examples.cells button").count() == 35
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
    assert all(later <= earlier + 1 for earlier, later in zip([0, *levels], levels, strict=False))


def test_the_first_page_weighs_less_than_500_kilobytes(visit):
    page, loaded = visit(), []
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    network.send("Network.setCacheDisabled", {"cacheDisabled": True})
    network.on("Network.loadingFinished", lambda event: loaded.append(event["encodedDataLength"]))
    page.reload()
    page.wait_for_selector("#one-result .name")
    page.wait_for_timeout(1_500)
    assert 100_000 < sum(loaded) < 500_000


def test_a_click_classifies_an_example_of_each_class(visit):
    page = visit()
    for number in range(2, 30, 5):
        click_example(page, number)
        assert page.locator("#one-result .name").inner_text() == CLASS_NAMES[number // 5]
        assert f"Synthetic, drawn as {CLASS_NAMES[number // 5]}" in page.locator("#one-result .card").inner_text()
        assert page.locator("#said").text_content().startswith(f"{CLASS_NAMES[number // 5]} 3: ")
    page.get_by_role("button", name="Classify example Not a cell").click()
    playwright.expect(page.locator("#one-result .name")).to_have_text("No verdict")
    assert page.locator("#one-result .rejected .bars").first.is_visible()


def test_an_example_can_be_classified_by_keyboard_and_focus_is_seen(visit):
    page = visit()
    page.locator(".examples.cells button").nth(0).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_for_prediction(page, "Centromere 2")
    page.get_by_label("ViT").focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_on_a_slow_line_the_old_verdict_is_dimmed_at_once_and_the_last_click_counts(visit):
    page = visit()
    network = page.context.new_cdp_session(page)
    slow = {"offline": False, "latency": 700, "downloadThroughput": -1, "uploadThroughput": -1}
    network.send("Network.emulateNetworkConditions", slow)
    page.locator(".examples.cells button").nth(7).click()
    assert page.locator("#one-result.busy").count() == 1
    page.locator(".examples.cells button").nth(12).click()
    wait_for_prediction(page, "Homogeneous 3")
    page.wait_for_timeout(2_000)
    wait_for_prediction(page, "Homogeneous 3")


def test_an_upload_takes_the_mark_from_the_old_example(visit):
    page = visit()
    click_example(page, 6)
    assert page.locator("[aria-pressed=true]").count() == 1
    give(page, ("mine.png", encoded(cell(), "PNG")))
    wait_for_prediction(page, "mine.png")
    assert page.locator("[aria-pressed=true]").count() == 0
    kept = page.evaluate("""async () => [
      Object.entries(localStorage), Object.entries(sessionStorage), document.cookie,
      (await indexedDB.databases()).map((database) => database.name),
    ]""")
    assert "mine" not in str(kept)
    assert kept[3] == []


def test_captions_cover_no_cell_and_the_verdict_stays_in_sight(visit):
    page = visit(viewport={"width": 1366, "height": 768})
    page.locator(".examples.cells button").nth(29).scroll_into_view_if_needed()
    click_example(page, 29)
    box = page.locator("#one-result .name").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 768
    for width in (768, 1000):
        page.set_viewport_size({"width": width, "height": 900})
        captions = [one.bounding_box() for one in page.locator(".examples.cells h2").all()]
        images = [one.bounding_box() for one in page.locator(".examples.cells img").all()]
        for image in images:
            assert not any(image["y"] < one["y"] + one["height"] / 2 < image["y"] + image["height"] for one in captions)


def test_the_choice_of_models_hides_bars_and_keeps_the_cell(visit):
    page = visit()
    click_example(page, 6)
    page.get_by_label("ViT").uncheck()
    titles = page.locator("#one-result [data-model] h3:visible")
    playwright.expect(titles).to_have_text(["Stack ensemble", "CNN", "ResCNN"])
    click_example(page, 7)
    playwright.expect(titles).to_have_text(["Stack ensemble", "CNN", "ResCNN"])


def test_maps_open_on_demand_and_stay_open_and_every_image_has_a_text(visit):
    page = visit()
    page.get_by_text("Saliency maps").click()
    maps = page.get_by_alt_text("Saliency map of ViT")
    assert maps.is_visible()
    click_example(page, 8)
    playwright.expect(maps).to_be_visible()
    page.get_by_text("Saliency maps").click()
    click_example(page, 9)
    playwright.expect(maps).to_be_hidden()
    assert page.eval_on_selector_all("img", "images => images.filter(one => !one.hasAttribute('alt')).length") == 0


@pytest.mark.parametrize("name, data", [("mine.png", encoded(cell(), "PNG")), ("mine.tif", tiff(cell() / 3.0))])
def test_an_upload_is_shown_as_it_came_and_preprocessed(visit, name, data):
    page = visit()
    give(page, (name, data))
    wait_for_prediction(page, name)
    assert page.locator("#one-result .name").inner_text() == "Golgi"
    widths = page.eval_on_selector_all("#one-result .card img", "images => images.map(image => image.naturalWidth)")
    assert widths == [78, 78]


def test_a_channel_can_be_chosen(visit):
    page = visit()
    colours = np.zeros((78, 78, 3), np.uint8)
    colours[..., 0] = synthetic_cell("Homogeneous", np.random.default_rng(0))
    colours[..., 1] = cell()
    page.get_by_role("button", name="Advanced").click()
    page.get_by_label("Channel").fill("red")
    page.get_by_label("Channel").press("Tab")
    give(page, ("two.png", encoded(colours, "PNG")))
    wait_for_prediction(page, "two.png")
    assert page.locator("#one-result .name").inner_text() == "Homogeneous"
    page.get_by_label("Channel").fill("7")
    give(page, ("three.png", encoded(colours, "PNG")))
    wait_for_prediction(page, "three.png")
    assert "could not be read" in page.locator("#one-result .name").inner_text()


def test_a_pasted_image_is_classified_and_a_file_that_is_no_image_gets_words(visit):
    page = visit()
    for name in ("pasted.png", "pasted again.png"):
        page.evaluate(
            """([name, bytes]) => {
              const data = new DataTransfer();
              data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
              document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
            }""",
            [name, list(encoded(cell(), "PNG"))],
        )
        wait_for_prediction(page, name)
    give(page, ("letter.pdf", b"%PDF-1.7"))
    wait_for_prediction(page, "letter.pdf")
    text = page.locator("#one-result").inner_text()
    assert "could not be read" in text
    assert "PNG, JPEG, TIFF" in text


# Too large for a cell, rejected, and with several nuclei: each alone is enough.
@pytest.mark.parametrize(("name", "factor"), [("NuMem", 1), ("Nucleolar", 0.5), ("NuMem", 0.5)])
def test_a_field_given_as_a_cell_gets_no_verdict_but_the_way_to_one(visit, name, factor):
    page = visit()
    field, _ = reduce_field(np.asarray(Image.open(ROOT / f"examples/fields/{name}.png")), [], factor)
    give(page, ("field.png", encoded(field, "PNG")))
    playwright.expect(page.locator("#one-result .name")).to_have_text("No verdict", timeout=30_000)
    page.get_by_role("button", name="Read as a field").click()
    playwright.expect(page.locator("#field-result .name")).to_have_text(name, timeout=30_000)
    playwright.expect(page).to_have_url(re.compile(r"\?tab=field$"))


def test_an_enlarged_cell_gets_a_verdict(visit):
    page = visit()
    give(page, ("enlarged.png", encoded(np.asarray(Image.open(GOLGI).resize((400, 400))), "PNG")))
    playwright.expect(page.locator("#one-result .name")).to_have_text("Golgi", timeout=30_000)
    assert not page.get_by_role("button", name="Read as a field").count()


def test_a_prediction_is_copied_as_json(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy as JSON").click()
    assert page.evaluate("navigator.clipboard.readText().then(JSON.parse)")["verdict"] == "Centromere"


def test_tab_and_example_are_in_the_address(visit):
    page = visit("?tab=one&example=Golgi-1")
    wait_for_prediction(page, "Golgi 1")
    open_tab(page, "Models")
    assert page.url.endswith("?tab=models")
    page.go_back()
    playwright.expect(page.get_by_role("tab", name="One cell")).to_have_attribute("aria-selected", "true")
    page.go_forward()
    page.reload()
    playwright.expect(page.get_by_role("tab", name="Models")).to_have_attribute("aria-selected", "true")


def test_the_page_is_english_in_every_browser_and_can_be_shared(visit):
    page = visit(locale="de-DE")
    open_tab(page, "Many cells")
    give(page, ("a.png", GOLGI.read_bytes()), box="many-upload")
    counted(page, "1 cell")
    labels = page.eval_on_selector_all("[aria-label], [title]", "all => all.map(one => one.ariaLabel + one.title)")
    assert not re.search(r"common\.|Hochladen|Löschen|Einstellungen", " ".join(labels) + page.inner_text("body"))
    assert page.locator("meta[property='og:title']").first.get_attribute("content").startswith("HEp-2")
    assert page.locator("footer .divider:visible").count() == 0


def test_files_of_every_kind_get_a_row_counts_and_tables(visit, tmp_path):
    page = visit()
    kinds = {name: one for name, one in uploads().items() if len(name) < 200 and "/" not in name}
    kinds["=1+1.png"] = (GOLGI.read_bytes(), None)
    give(page, *((name, data) for name, (data, _) in kinds.items()))
    failed = sum(error is not None for _, error in kinds.values())
    counted(page, f"{len(kinds) - failed} cells, {failed} not read")
    rows = page.locator("#many-result .row")
    assert rows.count() == len(kinds)
    assert "/tmp" not in page.locator("#many-result").inner_text()
    page.get_by_label("Doubtful ones only").check()
    assert failed <= page.locator("#many-result .row:visible").count() < len(kinds)
    page.get_by_label("Doubtful ones only").uncheck()
    rows.filter(has_text="no-extension").click()
    assert page.locator("#many-result details[open] .bars").count() == 4
    for suffix in ("csv", "xlsx"):
        with page.expect_download() as download:
            page.locator(f"#many-files a[download$='.{suffix}']").first.click()
        download.value.save_as(tmp_path / f"cells.{suffix}")
    assert (tmp_path / "cells.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    with open(tmp_path / "cells.csv", newline="", encoding="utf-8-sig") as opened:
        table = list(csv.DictReader(opened))
    assert len(table) == len(kinds)
    assert "'=1+1.png" in [row["file"] for row in table]
    assert not any(row["file"].startswith(("=", "+", "-", "@", "\t")) for row in table)
    sheet = openpyxl.load_workbook(tmp_path / "cells.xlsx").active
    assert sheet.max_row == len(kinds) + 1
    assert all(value.data_type != "f" for row in sheet.rows for value in row)


@pytest.mark.slow
def test_the_last_state_of_the_list_wins(visit):
    page = visit()
    open_tab(page, "Many cells")
    give(page, *many(60), box="many-upload")
    counted(page, "60 cells")
    box = page.locator("#many-upload")
    for _ in range(3):
        box.get_by_label("Remove this file").first.click()
    counted(page, "57 cells")
    assert "0000.png" not in page.locator("#many-result").inner_text()
    # Cleared in the middle of a job, and given anew.
    give(page, *many(600), box="many-upload")
    page.wait_for_selector("#many-result .progress")
    box.get_by_label("Clear").click()
    counted(page, "0 cells")
    give(page, *many(3), box="many-upload")
    counted(page, "3 cells")
    page.wait_for_timeout(2_000)
    counted(page, "3 cells")
    assert page.locator("#many-result .row").count() == 3


@pytest.mark.slow
def test_a_job_can_be_stopped_and_ends_with_its_page(visit, served):
    page = visit()
    open_tab(page, "Many cells")
    give(page, *many(600), box="many-upload")
    stop = page.locator("#stop-many")
    stop.click(timeout=120_000)
    playwright.expect(page.locator("#many-result .name")).to_have_text("Stopped")
    page.wait_for_timeout(1_500)
    playwright.expect(page.locator("#many-result .name")).to_have_text("Stopped")
    playwright.expect(stop).to_be_hidden()
    other = visit("?tab=many")
    give(other, *many(600), box="many-upload")
    other.wait_for_selector("#many-result .progress progress[value]", timeout=120_000)
    other.close()
    page.wait_for_timeout(2_500)  # the batch that is under way ends
    used = cpu_seconds(served.process.pid)
    page.wait_for_timeout(2_000)
    assert cpu_seconds(served.process.pid) - used < 1


def cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / 100


@pytest.mark.parametrize("width", [390, 1366])
def test_a_click_on_an_example_field_shows_progress_and_result_in_sight(visit, width):
    page = visit("?tab=field", viewport={"width": width, "height": 768})
    page.get_by_role("button", name="Classify example NuMem").click()
    playwright.expect(page.locator("#field-result .progress")).to_be_in_viewport()
    playwright.expect(page.locator("#stop-field")).to_be_visible()
    playwright.expect(page.locator("#field-result .name")).to_have_text("NuMem", timeout=30_000)
    playwright.expect(page.locator("#field-result .name")).to_be_in_viewport()


def test_a_field_shows_its_cells_and_gives_files_to_keep(visit):
    page = visit("?tab=field")
    image, _ = synthetic_field("NuMem", np.random.default_rng(0), shape=(480, 640), nucleus=60.0)
    give(page, ("field.png", encoded(image, "PNG")), box="field-upload")
    page.wait_for_selector("#field-result .field")
    outlines = page.locator("#field-result svg a")
    assert outlines.count() == page.locator("#field-result .small-card").count() >= 5
    outlines.first.click()
    assert page.locator("#field-result .chosen .bars li").count() == 6
    kind = outlines.first.get_attribute("data-cell")
    page.locator(f"[data-toggle='{kind}']").uncheck()
    playwright.expect(outlines.first).to_be_hidden()
    page.locator(f"[data-toggle='{kind}']").check()
    page.locator("[data-zoom]").fill("3")
    width = page.locator("#field-result svg").bounding_box()["width"]
    assert width > 2.5 * page.locator("#field-result .field > div").bounding_box()["width"]
    names = page.eval_on_selector_all("#field-files a[download]", "all => all.map(one => one.download)")
    assert {"specimen.csv", "specimen.xlsx", "field-cells.png", "report.html"} <= set(names)
    with page.expect_download() as download:
        page.locator("#field-files a[download='report.html']").first.click()
    report = Path(download.value.path()).read_text()
    assert "NuMem" in report and "Not for" in report and "<svg" in report


def test_a_wrong_pixel_size_with_two_fields_is_told_in_words(visit):
    page = visit("?tab=field")
    page.locator("#tab-field, .tabitem:visible").get_by_role("button", name="Advanced").last.click()
    page.get_by_label("Micrometres").fill("7")
    give(page, ("a.png", FIELD.read_bytes()), ("b.png", FIELD.read_bytes()), box="field-upload")
    playwright.expect(page.locator("#field-result")).to_contain_text("pixel size is 7")
    assert "Taken out" not in page.locator("#field-result").inner_text()


def test_the_models_tab_begins_with_new_patients_and_draws_figures(visit):
    page = visit("?tab=models")
    playwright.expect(page.locator("h2:visible").first).to_contain_text(re.compile(r"On a new patient: \d+ of \d+"))
    page.wait_for_selector("details[open] .plate", timeout=60_000)
    text = page.locator("body").inner_text()
    for expected in ("random split", "held-out specimens", "reference"):
        assert expected in text


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_no_width_scrolls_sideways_and_axe_finds_nothing_against_wcag_aa(visit, scheme, width):
    page = visit(color_scheme=scheme, viewport={"width": width, "height": 900})

    def check() -> None:
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]})
        assert not found.violations_count, found.generate_report()

    for tab in ("Many cells", "Models", "A field", "One cell"):
        open_tab(page, tab)
        check()
    # And filled: a failure, a rejection, a table with both, a field with its cells.
    stripes = np.tile(np.repeat([0, 255], 6), (78, 7))[:, :78].astype(np.uint8)
    for name, data in (("letter.pdf", b"%PDF-1.7"), ("stripes.png", encoded(stripes, "PNG"))):
        give(page, (name, data))
        wait_for_prediction(page, name)
        check()
    give(page, ("letter.pdf", b"%PDF-1.7"), ("stripes.png", encoded(stripes, "PNG")), ("a.png", encoded(cell(), "PNG")))
    counted(page, "2 cells, 1 not read")
    check()
    open_tab(page, "A field")
    page.get_by_role("button", name="Classify example NuMem").click()
    page.wait_for_selector("#field-result .field", timeout=30_000)
    check()
