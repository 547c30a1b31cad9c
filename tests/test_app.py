import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from inspect import isgenerator
from pathlib import Path

import gradio as gr
import httpx2
import numpy as np
import pytest
from conftest import ROOT, serving_page
from gradio_client import Client, handle_file
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from page_api import call, upload
from PIL import Image
from uploads import uploads

import app
from hep2.data import load_cells, split
from hep2.imaging import load_cell
from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_field, phantom_files
from hep2.reader import Reader
from hep2.weights import load_weights

MODELS = ["cnn", "rescnn", "vit", "ensemble"]
LEAKS = ("Traceback", "/tmp", "/usr", "/home", "/root", str(ROOT), "site-packages")


@pytest.fixture(scope="module")
def page(untrained):
    with serving_page("--weights", str(untrained)) as page:
        yield page


@pytest.fixture(scope="module")
def address(page):
    return page.address


@pytest.fixture(scope="module")
def client(address):
    client = Client(address, verbose=False)
    yield client
    client.close()


@pytest.fixture(scope="module")
def web(address):
    with httpx2.Client(base_url=address, timeout=120) as web:
        yield web


def test_classify_answers_what_the_reader_says(client, untrained):
    reader = Reader(load_weights(untrained))
    answer = client.predict(handle_file("examples/Golgi/2.png"), api_name="/classify")
    expected = next(reader.read([("2.png", Path("examples/Golgi/2.png"))])).as_dict()
    assert answer == expected | {"file": "2.png"}


def test_page_api_and_command_line_agree_to_the_last_digit(web, untrained, tmp_path):
    files = []
    for number, (_, image, _) in enumerate(phantom_files(5, seed=3)):
        files.append(tmp_path / f"{number:02}.png")
        Image.fromarray(image).save(files[-1])
    command = [sys.executable, "-m", "hep2", "classify", "--json", "--weights", str(untrained), *map(str, files)]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [json.loads(line) | {"file": path.name} for line, path in zip(lines, files, strict=True)]
    sent = [upload(web, path.name, path.read_bytes()) for path in files]
    assert call(web, "classify_batch", sent) == ("complete", [expected])
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: call(web, "classify", one), sent))
    assert answers == [("complete", [one]) for one in expected]
    # The page's own function is `explain`, and so is this endpoint's.
    assert [call(web, "explain", one)[1][0] for one in sent[:6]] == expected[:6]


def test_explain_gives_a_map_of_each_model(client):
    reading, maps = client.predict(handle_file("examples/NuMem/1.png"), api_name="/explain")
    assert reading["models"].keys() == set(MODELS)
    assert [one["caption"] for one in maps] == MODELS
    assert all(Path(one["image"]).read_bytes().startswith(b"\x89PNG") for one in maps)


def test_models_names_source_and_revision(client, untrained):
    answer = client.predict(api_name="/models")
    assert answer["models"] == MODELS
    assert answer["revision"] == load_weights(untrained).revision
    assert answer["source"] == f"folder {untrained.name}"
    assert answer["notes"] == ["metrics.json is not there: how good these weights are is not known"]


def test_api_names_and_documents_the_public_functions_alone(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/classify", "/classify_batch", "/explain", "/models", "/specimen"}
    for endpoint in endpoints.values():
        assert len(endpoint["description"]) > 40
        assert all("value" not in one["label"] for one in endpoint["returns"])
    assert endpoints["/classify"]["parameters"][0]["parameter_name"] == "image"


def test_specimen_reads_fields_and_names_what_it_cannot_read(web):
    image, cells = phantom_field("NuMem", np.random.default_rng(0), shape=(480, 640), nucleus=60.0)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    field, bad = upload(web, "field.png", file.getvalue()), upload(web, "bad.png", b"no image")
    kind, (answer,) = call(web, "specimen", [field, field], None)
    assert kind == "complete"
    assert answer["files"] == ["field.png", "field (2).png"]
    assert len(cells) < answer["cells"] < 3 * len(cells)
    assert {cell["field"] for cell in answer["per_cell"]} == {0, 1}
    assert "not an image" in call(web, "specimen", [bad], None)[1][0]["error"]
    assert "pixel size is -1" in call(web, "specimen", [field], -1)[1][0]["error"]
    assert "pixel size is 'abc'" in call(web, "specimen", [field], "abc")[1][0]["error"]
    assert "no image came" in call(web, "specimen", None, None)[1][0]["error"]


def test_every_kind_of_upload_gets_its_answer_and_costs_no_other(web):
    kinds = uploads()
    sent = {name: upload(web, name, data) for name, (data, _) in kinds.items()}
    kind, (answers,) = call(web, "classify_batch", list(sent.values()))
    assert kind == "complete"
    for (name, (_, error)), answer in zip(kinds.items(), answers, strict=True):
        check_answer(name, error, answer)
        assert call(web, "classify", sent[name]) == ("complete", [answer])
    assert len(kinds) >= 40


def check_answer(name: str, error: str | None, answer: dict) -> None:
    if error is None:
        assert answer["verdict"] in CLASS_NAMES, name
    else:
        assert error in answer["error"], name
    assert not any(leak in json.dumps(answer) for leak in LEAKS), answer


@pytest.mark.parametrize("endpoint", ["classify", "classify_batch", "explain"])
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["/etc/passwd"],
        [17],
        [[["a"]]],
        [{"path": 3}],
        [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}],
        [{"path": "app.py", "meta": {"_type": "gradio.FileData"}}],
        [[{"path": "app.py", "meta": {"_type": "gradio.FileData"}}]],
        [{"path": "hep2/bundled/cnn/config.json", "meta": {"_type": "gradio.FileData"}}],
        [{"path": "/tmp/gradio/../../etc/passwd", "meta": {"_type": "gradio.FileData"}}],
        [{"path": "http://127.0.0.1:9/cell.png", "meta": {"_type": "gradio.FileData"}}],
        [{"path": "http://localhost/cell.png", "url": "http://[::1]/", "meta": {"_type": "gradio.FileData"}}],
        [{"path": "https://example.org/cell.png", "meta": {"_type": "gradio.FileData"}}],
        [{"path": "file:///etc/passwd", "meta": {"_type": "gradio.FileData"}}],
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_get_words_and_no_file(web, endpoint, arguments):
    kind, answer = call(web, endpoint, *arguments)
    assert kind == "error"
    assert "do not fit" in answer["error"]
    assert not any(leak in json.dumps(answer) for leak in LEAKS)


def test_a_folder_is_no_file(web, page):
    """Gradio would put it on its list of files to delete, and stop deleting when it comes to it."""
    one = upload(web, "cell.png", Path("examples/Golgi/1.png").read_bytes())
    for folder in (Path(one["path"]).parent, page.cache):
        kind, answer = call(web, "classify", one | {"path": str(folder)})
        assert (kind, "do not fit" in answer["error"]) == ("error", True)


def test_more_than_one_request_may_hold_is_refused_with_the_bound(monkeypatch):
    monkeypatch.setattr(app, "MOST_IMAGES", 2)
    app.check_count(["a.png", "b.png"])
    with pytest.raises(gr.Error, match="3 images came, at most 2"):
        app.check_count(["a.png", "b.png", "c.png"])
    monkeypatch.setattr(app, "MOST_PIXELS", 2 * 78 * 78)
    assert len(app.fields_of(["examples/Golgi/1.png"] * 2, None)) == 2
    assert "million pixels: give fewer" in app.fields_of(["examples/Golgi/1.png"] * 3, None).error


def test_no_two_images_of_one_request_have_one_name():
    names = [name for name, _ in app._named(["x/a.png", "y/a.png", "z/a (2).png", "w/a.png", "b.png"])]
    assert len(set(names)) == 5
    assert names[:2] == ["a.png", "a (2).png"]


def test_no_image_and_superfluous_arguments_are_answered(web):
    _, (answer,) = call(web, "classify", None)
    assert "no image" in answer["error"]
    assert call(web, "classify_batch", None) == call(web, "classify_batch", []) == ("complete", [[answer]])
    one = upload(web, "cell.png", Path("examples/Golgi/1.png").read_bytes())
    assert call(web, "classify", one, "more", 3)[1][0]["verdict"] in CLASS_NAMES


def test_names_too_long_for_a_request_are_refused(web):
    answer = web.post("gradio_api/upload", files={"files": ("a" * 5_000 + ".png", b"")})
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "app.py",
        str(ROOT / "app.py"),
        str(ROOT / "hep2/bundled/cnn/model.safetensors"),
        "hep2/bundled/cnn/config.json",
        "/tmp/gradio/../../etc/passwd",
        "../../../../etc/passwd",
        "http://127.0.0.1:9/",
        "/proc/self/environ",
    ],
)
@pytest.mark.parametrize("route", ["gradio_api/file=", "gradio_api/proxy=", "file=", "static/", "assets/"])
def test_nothing_outside_uploads_and_examples_is_served(web, route, path):
    answer = web.get(route + path)
    assert answer.status_code >= 400
    assert "root:" not in answer.text
    assert "import" not in answer.text


def test_the_pages_own_events_open_no_other_file(web):
    # Gradio hides private events, but does not refuse a caller who knows their names.
    secret = {"path": str(ROOT / "app.py"), "meta": {"_type": "gradio.FileData"}}
    for name in ("show_upload", "read_many"):
        kind, answer = call(web, name, [secret])
        assert kind == "error"
        assert "do not fit" in answer["error"]


def test_examples_are_held_out_cells_where_the_weights_or_a_dataset_carry_them(untrained, tmp_path):
    weights = load_weights(untrained)
    with pytest.raises(ValueError, match=r"which cells of phantoms:40 .* they have not seen cannot be told"):
        app.examples_of(weights, "phantoms:40", tmp_path)
    for config in weights.configs.values():
        config["training"]["dataset_fingerprint"] = load_cells("phantoms:40").fingerprint
    drawn, text = app.examples_of(weights, None, tmp_path)
    assert (len(drawn), drawn[7].truth) == (30, "Synthetic, drawn as Golgi")
    assert "synthetic" in text

    chosen, text = app.examples_of(weights, "phantoms:40", tmp_path)
    assert "synthetic" in text  # and not called published
    assert {one.truth for one in chosen} == {f"Synthetic, drawn as {name}" for name in CLASS_NAMES}
    assert [one.caption for one in chosen] == [name for name in CLASS_NAMES for _ in range(5)]
    cells = load_cells("phantoms:40")
    test = {cells.names[position] for position in split(cells, "clean", 0).test}
    assert {Path(one.path).name for one in chosen} <= test

    carried = replace(weights, folder=tmp_path)
    (tmp_path / "examples").mkdir()
    for label in CLASS_NAMES[::-1]:
        Path(chosen[0].path).parent.parent.joinpath(label).rename(tmp_path / "examples" / label)
    again, text = app.examples_of(carried, None, tmp_path / "unused")
    assert [one.truth for one in again] == [f"Its label: {name}" for name in CLASS_NAMES for _ in range(5)]
    assert "no model was trained on" in text


def test_what_a_lent_card_computes_can_travel_between_processes(untrained):
    # On ZeroGPU readings are made in another process: arguments and answers must pickle.
    reader = Reader(load_weights(untrained))
    explanation = reader.explain("cell.png", load_cell("examples/Golgi/1.png"))
    assert pickle.loads(pickle.dumps(explanation)).reading.as_dict() == explanation.reading.as_dict()


def test_the_page_lends_a_card_only_what_can_travel(untrained, monkeypatch, tmp_path):
    travelled = []

    def lend(duration):
        def wrap(function):
            def travelling(*arguments, **options):
                travelled.append(function.__name__)
                answer = function(*pickle.loads(pickle.dumps(arguments)), **pickle.loads(pickle.dumps(options)))
                return iter(pickle.loads(pickle.dumps(list(answer)))) if isgenerator(answer) else answer

            return travelling

        return wrap

    monkeypatch.setattr(app.spaces, "GPU", lend)
    shown = app.Page(Reader(load_weights(untrained)), [], "")
    image, _ = phantom_field("NuMem", np.random.default_rng(0), shape=(480, 640), nucleus=60.0)
    Image.fromarray(image).save(tmp_path / "field.png")
    monkeypatch.setattr(app, "save_bytes_to_cache", lambda data, name, folder: name)
    _, table, pictures = shown.read_specimen([str(tmp_path / "field.png")] * 2, 0)
    assert (table, pictures) == ("specimen.csv", ["field-cells.png", "field (2)-cells.png"])
    assert shown.specimen([str(tmp_path / "field.png")])["cells"] > 5
    assert len(shown.read_many(["examples/Golgi/1.png"] * 3)[0]) == 3
    assert travelled == ["read_cells", "read_cells", "read_cells"]


def test_uploads_and_downloads_lie_where_gradio_deletes_them_within_the_hour(web, page):
    assert sum(app.KEPT) <= 3600
    sent = [upload(web, f"private-{number}.png", Path("examples/Golgi/1.png").read_bytes()) for number in range(2)]
    kind, (_, _, download) = call(web, "read_many", sent)
    assert kind == "complete"
    # What Gradio hands out is in its care; there must be no second copy.
    assert list(page.cache.rglob("readings.csv")) == [Path(download["path"])]
    assert len(list(page.cache.rglob("private-*"))) == 2
    assert not list(Path(tempfile.gettempdir()).glob("private-*"))


@pytest.mark.parametrize("arguments", [["--weights", "/nowhere"], ["--dataset", "/nowhere"]])
def test_the_page_does_not_start_on_wrong_weights_or_dataset(arguments, capsys):
    assert app.main(arguments) == 1
    assert "/nowhere" in capsys.readouterr().err


def test_readme_carries_a_complete_space_configuration():
    card = SpaceCard.load(ROOT / "README.md")
    space = card.data.to_dict()
    needed = {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "datasets"}
    assert needed | {"tags", "license", "short_description", "suggested_hardware"} <= set(space)
    assert (space["sdk"], space["app_file"], space["license"]) == ("gradio", "app.py", "mit")
    assert len(space["short_description"]) <= 60
    colours = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
    assert space["colorFrom"] in colours
    assert space["colorTo"] in colours
    # The Space's Gradio must be one that requirements.txt allows, and its Python the one that ZeroGPU has.
    (gradio,) = (line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("gradio"))
    assert Requirement(gradio).specifier.contains(space["sdk_version"])
    assert space["python_version"] == "3.12"


@pytest.mark.parametrize("language", ["python", "sh"])
def test_the_readmes_clients_work_as_they_stand(address, language):
    section = (ROOT / "README.md").read_text().partition("## The page and its API")[2].partition("\n## ")[0]
    (code,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert "127.0.0.1:7860" in code
    code = code.replace("http://127.0.0.1:7860/", address)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    if language == "sh" and shutil.which("curl") is None:
        pytest.skip("there is no curl")
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"['\"]verdict['\"]: ", output)
    assert re.search(r"['\"]file['\"]: ['\"]1.png['\"]", output)
