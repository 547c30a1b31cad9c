"""The page as its users have it: Debian's chromium, driven by Playwright, on the page in a process of its own."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, serving_page
from uploads import cell, encoded, tiff, uploads

from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_field

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt-get install chromium)")

FILE_SHOWN = "document.querySelector('.reading .file')?.textContent"


@pytest.fixture(scope="module")
def address():
    with serving_page() as page:
        yield page.address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Open the page in a browser of its own; afterwards, no console error and no request elsewhere must have been."""
    contexts, complaints = [], []

    def open_page(**options):
        context = browser.new_context(**({"viewport": {"width": 1440, "height": 1000}} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        allowed = (address, "data:", "blob:")
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(allowed) else None)
        page.goto(address)
        page.wait_for_selector(".reading .name")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def wait_for_reading(page, name: str) -> None:
    page.wait_for_function(f"name => {FILE_SHOWN} === name", arg=name)


def click_example(page, number: int) -> None:
    page.locator("#examples button").nth(number).click()
    wait_for_reading(page, f"{CLASS_NAMES[number // 5]} {number % 5 + 1}")


def give(page, *files: tuple[str, bytes], box: str = "upload") -> None:
    payload = [{"name": name, "mimeType": "application/octet-stream", "buffer": data} for name, data in files]
    page.locator(f"#{box} input[type=file]").first.set_input_files(payload)


def test_first_visit_shows_a_cell_already_read(visit):
    page = visit()
    assert page.locator(".reading .name").first.inner_text() == "Centromere"
    assert page.locator(".reading .bars").count() == 4
    assert "Not for clinical use" in page.content()
    assert page.locator("#examples button").count() == 30


def test_a_click_on_an_example_reads_it(visit):
    page = visit()
    for number in range(2, 30, 5):
        click_example(page, number)
        assert page.locator(".reading .name").first.inner_text() == CLASS_NAMES[number // 5]
        assert f"Synthetic, drawn as {CLASS_NAMES[number // 5]}" in page.locator(".reading .verdict").inner_text()


def test_an_example_can_be_read_by_keyboard(visit):
    page = visit()
    page.locator("#examples button").nth(0).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_for_reading(page, "Centromere 2")


def test_of_two_quick_clicks_the_last_one_counts(visit):
    page = visit()
    # On a slow line the second click comes while the first is being answered.
    network = page.context.new_cdp_session(page)
    slow = {"offline": False, "latency": 700, "downloadThroughput": -1, "uploadThroughput": -1}
    network.send("Network.emulateNetworkConditions", slow)
    examples = page.locator("#examples button")
    examples.nth(7).click()
    examples.nth(12).click()
    wait_for_reading(page, "Homogeneous 3")
    page.wait_for_timeout(2_000)
    wait_for_reading(page, "Homogeneous 3")


def test_the_examples_are_named_for_those_who_hear_the_page(visit):
    page = visit()
    page.get_by_role("button", name="Read example Golgi 2", exact=True).click()
    wait_for_reading(page, "Golgi 2")


def test_nothing_is_kept_in_the_browser(visit):
    page = visit()
    give(page, ("mine.png", encoded(cell(), "PNG")))
    wait_for_reading(page, "mine.png")
    kept = page.evaluate("""async () => [
      Object.entries(localStorage), Object.entries(sessionStorage), document.cookie,
      (await indexedDB.databases()).map((database) => database.name),
    ]""")
    assert "mine" not in str(kept)
    assert kept[3] == []


def test_nothing_jumps_when_a_reading_arrives(visit):
    page = visit()

    def places() -> list:
        boxes = [".reading .models", ".reading .verdict", "#examples", "#upload"]
        scrolled = page.evaluate("window.scrollY")
        return [page.locator(box).first.bounding_box()["y"] + scrolled for box in boxes]

    before = places()
    for number in (3, 12, 29):
        click_example(page, number)
        assert places() == pytest.approx(before, abs=1)


def test_the_choice_of_models_hides_bars_and_keeps_the_cell(visit):
    page = visit()
    click_example(page, 6)
    page.get_by_label("ViT").uncheck()
    titles = page.locator(".reading .models h3:visible")
    playwright.expect(titles).to_have_text(["CNN", "ResCNN", "Stack ensemble"])
    click_example(page, 7)
    playwright.expect(titles).to_have_text(["CNN", "ResCNN", "Stack ensemble"])


def test_maps_open_on_demand_and_stay_open_and_every_image_has_a_text(visit):
    page = visit()
    page.get_by_text("Where did each model look?").click()
    maps = page.get_by_alt_text("Map of what ViT looked at")
    assert maps.is_visible()
    click_example(page, 8)
    playwright.expect(maps).to_be_visible()
    page.get_by_text("Where did each model look?").click()
    click_example(page, 9)
    playwright.expect(maps).to_be_hidden()
    assert page.eval_on_selector_all("img", "images => images.filter(image => !image.alt).length") == 0


@pytest.mark.parametrize("name, data", [("mine.png", encoded(cell(), "PNG")), ("mine.tif", tiff(cell() / 3.0))])
def test_an_upload_is_read_and_shown_as_given_and_as_the_models_see_it(visit, name, data):
    page = visit()
    give(page, (name, data))
    wait_for_reading(page, name)
    assert page.locator(".reading .name").first.inner_text() == "Golgi"
    widths = page.eval_on_selector_all(".reading .top img", "images => images.map(image => image.naturalWidth)")
    assert widths == [78, 78]


def test_a_pasted_image_is_read(visit):
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
        wait_for_reading(page, name)


def test_a_file_that_is_no_image_gets_words(visit):
    page = visit()
    give(page, ("letter.pdf", b"%PDF-1.7"))
    wait_for_reading(page, "letter.pdf")
    text = page.locator(".reading").first.inner_text()
    assert "could not be read" in text
    assert "PNG, JPEG, TIFF" in text


def test_many_files_of_every_kind_get_a_table_counts_and_a_csv(visit, tmp_path):
    page = visit()
    files = [(name, data) for name, (data, _) in uploads().items() if len(name) < 200 and "/" not in name]
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "queue/join" in request.url else None)
    give(page, *files)
    good = sum(1 for name, (_, error) in uploads().items() if error is None and name in dict(files))
    playwright.expect(page.locator("#counts h3")).to_have_text(f"{good} cells", timeout=60_000)
    with page.expect_download() as download:
        page.locator("#download a").first.click()
    download.value.save_as(tmp_path / "readings.csv")
    with open(tmp_path / "readings.csv", newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == len(files)
    # Each line has a verdict, an error, or the word that it was refused.
    for row in rows:
        assert bool(row["verdict"]) + bool(row["error"]) + ("refused: " in row["warnings"]) == 1, row
    assert len(asked) == 2  # handed over, and read once
    shown = page.locator("#table").inner_text()
    assert "not an image of a known kind" in shown
    assert "/tmp" not in shown


def test_the_table_of_many_cells_can_be_sorted(visit):
    page = visit()
    names = ("Speckled", "Centromere", "NuMem")
    give(page, *((f"{name}.png", Path(ROOT / f"examples/{name}/1.png").read_bytes()) for name in names))
    first = page.locator("#table").get_by_role("row").filter(has_text=".png").first
    playwright.expect(first).to_contain_text("Speckled.png", timeout=60_000)
    page.get_by_label("Open cell menu").first.click()
    page.get_by_role("menuitem", name="Sort ascending").click()
    playwright.expect(first).to_contain_text("Centromere.png")


def test_a_file_taken_out_of_the_list_is_taken_out_of_the_table(visit):
    page = visit()
    page.get_by_role("tab", name="Many cells").click()
    names = ("Golgi", "NuMem")
    # Both are called 1.png, as files from two folders are.
    files = [("1.png", Path(ROOT / f"examples/{name}/1.png").read_bytes()) for name in names]
    give(page, *files, box="upload-many")
    table, box = page.locator("#table"), page.locator("#upload-many")
    playwright.expect(table.get_by_role("row").filter(has_text="1 (2).png")).to_contain_text("NuMem", timeout=60_000)
    box.get_by_label("Remove this file").first.click()
    playwright.expect(page.locator("#counts h3")).to_have_text("1 cell", timeout=30_000)
    playwright.expect(table.get_by_role("row").filter(has_text="1.png")).to_contain_text("NuMem")
    # The same where the other tab has handed them over.
    page.get_by_role("tab", name="One cell").click()
    give(page, ("a.png", files[0][1]), ("b.png", files[1][1]), ("c.png", files[0][1]))
    playwright.expect(page.locator("#counts h3")).to_have_text("3 cells", timeout=30_000)
    box.get_by_label("Remove this file").first.click()
    playwright.expect(page.locator("#counts h3")).to_have_text("2 cells", timeout=30_000)
    playwright.expect(table.get_by_role("row").filter(has_text="a.png")).to_have_count(0)
    box.get_by_label("Clear").click()
    playwright.expect(table.get_by_role("row").filter(has_text=".png")).to_have_count(0, timeout=30_000)


def test_the_models_tab_shows_results_confusion_and_curves(visit):
    page = visit()
    page.get_by_role("tab", name="Models").click()
    page.wait_for_selector("details[open] .plate")
    text = page.locator("body").inner_text()
    for expected in ("random split", "held-out specimens", "the source", "Confusion", "revision"):
        assert re.search(expected, text, re.IGNORECASE), expected


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_no_width_scrolls_sideways_and_every_text_has_contrast_aa(visit, scheme, width):
    page = visit(color_scheme=scheme, viewport={"width": width, "height": 900})

    def check() -> None:
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(Path(ROOT / "tests/contrast.js").read_text()) == []

    for tab in ("One cell", "Many cells", "A field", "Models"):
        page.get_by_role("tab", name=tab).click()
        check()
    # And filled: a failure, a refusal, a table with both, a field with its cells.
    stripes = np.tile(np.repeat([0, 255], 6), (78, 7))[:, :78].astype(np.uint8)
    page.get_by_role("tab", name="One cell").click()
    for name, data in (("letter.pdf", b"%PDF-1.7"), ("stripes.png", encoded(stripes, "PNG"))):
        give(page, (name, data))
        wait_for_reading(page, name)
        check()
    assert page.locator(".reading .name").first.inner_text() == "No verdict"
    give(page, ("letter.pdf", b"%PDF-1.7"), ("stripes.png", encoded(stripes, "PNG")), ("a.png", encoded(cell(), "PNG")))
    playwright.expect(page.locator("#counts h3")).to_have_text("2 cells", timeout=60_000)
    check()
    page.get_by_role("tab", name="A field").click()
    field, _ = phantom_field("NuMem", np.random.default_rng(0), shape=(480, 640), nucleus=60.0)
    give(page, ("field.png", encoded(field, "PNG")), box="upload-field")
    page.wait_for_selector("#specimen .name", timeout=60_000)
    check()


def test_a_click_on_an_example_field_reads_it(visit):
    page = visit()
    page.get_by_role("tab", name="A field").click()
    page.locator("#field-examples button[aria-label='Read example NuMem 1']").click()
    page.wait_for_selector("#specimen .name")
    assert page.locator("#specimen .name").inner_text() == "NuMem"


def test_a_field_shows_its_cells_outlined_and_one_by_one(visit):
    page = visit()
    page.goto(f"{page.url}?seen=1")  # as a Space adds one
    page.wait_for_selector(".reading .name")
    page.get_by_role("tab", name="A field").click()
    image, _ = phantom_field("NuMem", np.random.default_rng(0), shape=(480, 640), nucleus=60.0)
    give(page, ("field.png", encoded(image, "PNG")), box="upload-field")
    page.wait_for_selector("#specimen .name")
    assert page.locator("#specimen .name").inner_text() == "NuMem"
    outlines, cards = page.locator("#specimen svg a"), page.locator("#specimen .card")
    assert outlines.count() == cards.count() >= 8
    assert sum("NuMem" in outline.get_attribute("aria-label") for outline in outlines.all()) >= 5
    outlines.first.click()
    target = outlines.first.get_attribute("href")
    assert page.url.endswith(f"/?seen=1{target}")
    assert page.locator(f"{target}:target .bars li").count() == 6
    with page.expect_download() as download:
        page.get_by_role("link", name="specimen.csv").or_(page.locator("a[download='specimen.csv']")).first.click()
    rows = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
    assert len(rows) == cards.count()
