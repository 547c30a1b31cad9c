import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gradio as gr
import httpx2
import numpy as np
import pytest
from conftest import ROOT, field_of, free_port, serving_page
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from page_api import call, upload
from PIL import Image
from uploads import uploads

import app
import hep2
from hep2.images import load_cell
from hep2.patterns import CLASS_NAMES
from hep2.predictor import Predictor
from hep2.synthetic import synthetic_files
from hep2.ui import api, handlers

MODELS = ["cnn", "rescnn", "vit", "ensemble"]
LEAKS = ("Traceback", "/tmp", "/usr", "/home", "/root", str(ROOT), "site-packages")
GOLGI = ROOT / "examples/Golgi/1.png"


@pytest.fixture(scope="module")
def served(untrained):
    with serving_page("--weights", str(untrained)) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    client = Client(served.address, verbose=False)
    yield client
    client.close()


@pytest.fixture(scope="module")
def web(served):
    with httpx2.Client(base_url=served.address, timeout=120) as web:
        yield web


def test_classify_answers_what_the_predictor_says(client, untrained):
    answer = client.predict(handle_file("examples/Golgi/2.png"), api_name="/classify")
    (expected,) = hep2.load(untrained, "cpu").classify([("2.png", "examples/Golgi/2.png")])
    assert answer == expected.as_dict()


def test_one_image_where_a_list_is_expected_is_a_list_of_one_and_a_list_for_one_is_an_error(client):
    (answer,) = client.predict(handle_file("examples/Golgi/2.png"), api_name="/classify_batch")
    assert answer == client.predict(handle_file("examples/Golgi/2.png"), api_name="/classify")
    specimen = client.predict(handle_file("examples/fields/NuMem.png"), api_name="/specimen")
    assert specimen["files"] == ["NuMem.png"]
    with pytest.raises(AppError, match="an image is a data URI"):
        client.predict([handle_file("examples/Golgi/2.png")], api_name="/classify")


def test_page_api_and_command_line_agree(web, untrained, tmp_path):
    files = []
    for number, (_, image, _) in enumerate(synthetic_files(2, seed=3)):
        files.append(tmp_path / f"{number:02}.png")
        Image.fromarray(image).save(files[-1])
    command = [sys.executable, "-m", "hep2", "classify", "--json", "--weights", str(untrained), *map(str, files)]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [json.loads(line) | {"file": path.name} for line, path in zip(lines, files, strict=True)]
    sent = [upload(web, path.name, path.read_bytes()) for path in files]
    kind, (answers,) = call(web, "classify_batch", sent)
    assert kind == "complete"
    with ThreadPoolExecutor(8) as pool:
        single = list(pool.map(lambda one: call(web, "classify", one), sent))
    for one, batched, (kind, (alone,)) in zip(expected, answers, single, strict=True):
        assert kind == "complete"
        # The page's own function is `explain`, and so is this endpoint's.
        for answer in (batched, alone, call(web, "explain", sent[files.index(tmp_path / one["file"])])[1][0]):
            assert answer.keys() == one.keys()
            assert (answer["file"], answer["verdict"]) == (one["file"], one["verdict"])
            for model in MODELS:
                assert answer["models"][model] == pytest.approx(one["models"][model], abs=2e-5)


def test_explain_gives_a_map_of_each_model(client):
    prediction, maps = client.predict(handle_file("examples/NuMem/1.png"), api_name="/explain")
    assert prediction["models"].keys() == set(MODELS)
    assert [one["caption"] for one in maps] == MODELS
    for one in maps:
        with Image.open(one["image"]) as image:
            assert image.size == (78, 78)


def test_models_names_source_and_revision(client, untrained):
    answer = client.predict(api_name="/models")
    assert answer["models"] == MODELS
    assert answer["revision"] == hep2.load(untrained, "cpu").weights.revision
    assert untrained.name in answer["source"]


def test_api_documents_what_it_takes_and_what_it_answers(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {f"/{name}" for name in api.ENDPOINTS}
    for endpoint in endpoints.values():
        assert len(endpoint["description"]) > 40
        for one in endpoint["returns"]:
            assert one["type"] in ("object", "array") or one["type"]["type"] in ("object", "array")
    image, channel, plane = endpoints["/classify"]["parameters"]
    assert (image["parameter_name"], channel["parameter_name"], plane["parameter_name"]) == (
        "image",
        "channel",
        "plane",
    )
    assert channel["parameter_has_default"] and plane["parameter_has_default"]
    assert "data URI" in image["python_type"]["description"]
    # The example that the API's page shows works as it stands.
    assert client.predict(image["example_input"], api_name="/classify")["models"].keys() == set(MODELS)


def test_what_cannot_be_read_is_an_error_to_a_program_and_no_loss_to_a_batch(client, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for endpoint, given in (("classify", broken), ("explain", broken), ("specimen", [broken])):
        files = [handle_file(one) for one in given] if isinstance(given, list) else handle_file(given)
        with pytest.raises(AppError, match="not an image"):
            client.predict(files, api_name=f"/{endpoint}")
    answers = client.predict([handle_file(broken), handle_file(GOLGI)], api_name="/classify_batch")
    assert answers[0].keys() == {"file", "error"}
    assert answers[1]["models"]


def test_a_channel_and_a_plane_can_be_chosen(client, tmp_path):
    colours = np.zeros((78, 78, 3), np.uint8)
    colours[..., 0], colours[..., 1] = load_cell("examples/Golgi/1.png").pixels[0] * 255, 9
    Image.fromarray(colours).save(tmp_path / "two.png")
    image = handle_file(tmp_path / "two.png")
    red = client.predict(image, channel="red", api_name="/classify")
    assert client.predict(image, channel="1", api_name="/classify")["models"] == red["models"]
    with pytest.raises(AppError, match="channel"):
        client.predict(image, channel="ultraviolet", api_name="/classify")
    with pytest.raises(AppError, match="plane"):
        client.predict(image, plane=4, api_name="/classify")


def test_specimen_reads_fields_and_names_what_it_cannot_read(web, tmp_path):
    image, cells = field_of("NuMem")
    Image.fromarray(image.astype(np.uint8)).save(tmp_path / "field.png")
    field = upload(web, "field.png", (tmp_path / "field.png").read_bytes())
    kind, (answer,) = call(web, "specimen", [field, field])
    assert kind == "complete"
    assert len(cells) < answer["cells"] < 3 * len(cells)
    assert {cell["field"] for cell in answer["per_cell"]} == {0, 1}
    bad = upload(web, "bad.png", b"no image")
    for words, given in (
        ("bad.png: .*not an image", ([bad], None)),
        ("pixel size is -1", ([field], -1)),
        ("pixel size is 'abc'", ([field], "abc")),
        ("no image came", (None, None)),
    ):
        kind, answer = call(web, "specimen", *given)
        assert (kind, bool(re.search(words, answer["error"]))) == ("error", True), answer


def test_every_kind_of_upload_gets_its_answer_and_costs_no_other(web):
    kinds = uploads()
    sent = {name: upload(web, name, data) for name, (data, _) in kinds.items()}
    kind, (answers,) = call(web, "classify_batch", list(sent.values()))
    assert kind == "complete"
    for (name, (_, error)), answer in zip(kinds.items(), answers, strict=True):
        assert ("error" in answer) == (error is not None), name
        assert (error or "") in answer.get("error", ""), name
        assert not any(leak in json.dumps(answer) for leak in LEAKS), answer
        kind, _ = call(web, "classify", sent[name])
        assert kind == ("error" if error else "complete"), name


@pytest.mark.parametrize("endpoint", ["classify", "classify_batch", "explain", "specimen"])
@pytest.mark.parametrize(
    "given",
    [
        "/etc/passwd",
        17,
        [["a"]],
        {"path": 3},
        {"path": "/etc/passwd"},
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        [{"path": "app.py", "meta": {"_type": "gradio.FileData"}}],
        {"path": "hep2/weights/config.json", "meta": {"_type": "gradio.FileData"}},
        {"path": "/tmp/gradio/../../etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "http://127.0.0.1:9/cell.png", "meta": {"_type": "gradio.FileData"}},
        {"path": "http://localhost/cell.png", "url": "http://[::1]/", "meta": {"_type": "gradio.FileData"}},
        {"path": "https://example.org/cell.png", "meta": {"_type": "gradio.FileData"}},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_get_words_and_no_file(web, endpoint, given):
    kind, answer = call(web, endpoint, given)
    assert kind in ("error", "refused")
    assert "not fit" in json.dumps(answer)
    assert not any(leak in json.dumps(answer) for leak in LEAKS)


def test_a_folder_is_no_file(web, served):
    """Gradio would put it on its list of files to delete, and stop deleting when it comes to it."""
    one = upload(web, "cell.png", GOLGI.read_bytes())
    for folder in (Path(one["path"]).parent, served.cache):
        assert call(web, "classify", one | {"path": str(folder)})[0] == "refused"


def test_the_last_inputs_may_be_left_out_and_superfluous_ones_are(web):
    one = upload(web, "cell.png", GOLGI.read_bytes())
    short, whole = call(web, "classify", one), call(web, "classify", one, None, None, "more", 3)
    assert short[0] == "complete"
    assert short == whole
    assert "no image" in call(web, "classify", None)[1]["error"]
    assert "no image" in call(web, "classify_batch", [])[1]["error"]


def test_more_than_one_request_may_hold_is_rejected_with_the_bound(monkeypatch):
    monkeypatch.setattr(handlers, "MAX_IMAGES", 2)
    handlers.check_count(["a.png", "b.png"])
    with pytest.raises(gr.Error, match="3 images came, at most 2"):
        handlers.check_count(["a.png", "b.png", "c.png"])
    monkeypatch.setattr(handlers, "MAX_PIXELS", 2 * 78 * 78)
    assert len(handlers.fields_of([("a", GOLGI)] * 2, None, None, None)) == 2
    with pytest.raises(ValueError, match="million pixels: give fewer"):
        handlers.fields_of([("a", GOLGI)] * 3, None, None, None)


def test_no_two_images_of_one_request_have_one_name():
    names = [name for name, _ in handlers.named(["x/a.png", "y/a.png", "z/a (2).png", "w/a.png", "b.png"])]
    assert len(set(names)) == 5
    assert names[:2] == ["a.png", "a (2).png"]


@pytest.mark.parametrize(
    "given, expected", [(("", None), (None, None)), (("2", 3.0), (2, 3)), ((" red ", 0), ("red", None))]
)
def test_chosen_gives_channel_and_plane_as_the_decoder_takes_them(given, expected):
    assert tuple(handlers.chosen(*given).values()) == expected


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "app.py",
        str(ROOT / "app.py"),
        "hep2/weights/config.json",
        "../../etc/passwd",
        "/proc/self/environ",
    ],
)
@pytest.mark.parametrize("route", ["gradio_api/file=", "gradio_api/proxy=", "file=", "static/", "assets/"])
def test_nothing_outside_uploads_and_examples_is_served(web, route, path):
    answer = web.get(route + path)
    assert answer.status_code >= 400
    assert "root:" not in answer.text
    assert "import" not in answer.text


def test_headers_let_only_hugging_face_embed_and_no_other_site_upload(web):
    for answer in (web.get("/"), web.get("gradio_api/info"), web.get("nowhere")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "https://huggingface.co" in answer.headers["content-security-policy"]
        assert "x-frame-options" not in answer.headers
    files = {"files": ("cell.png", GOLGI.read_bytes())}
    assert web.post("gradio_api/upload", files=files, headers={"Origin": "https://evil.example"}).status_code == 403
    own = {"Origin": str(web.base_url).rstrip("/")}
    assert web.post("gradio_api/upload", files=files, headers=own).status_code == 200
    space = {"Origin": "https://own-space.hf.space", "X-Forwarded-Host": "own-space.hf.space"}
    assert web.post("gradio_api/upload", files=files, headers=space).status_code == 200
    assert web.post("gradio_api/upload", files={"files": ("a" * 5_000 + ".png", b"")}).status_code == 413


@pytest.mark.slow
def test_unknown_endpoints_get_words_and_leave_no_traceback_and_a_killed_run_no_upload(untrained, tmp_path):
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(tmp_path)}
    command = [sys.executable, "app.py", "--weights", str(untrained), "--port"]

    def start(port: int, log: Path) -> subprocess.Popen:
        with log.open("a") as output:
            options = {"cwd": ROOT, "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen([*command, str(port)], **options)
        for _ in range(600):
            try:
                httpx2.get(f"http://127.0.0.1:{port}/")
                return process
            except httpx2.TransportError:
                time.sleep(0.2)
        raise AssertionError("the page did not start")

    log = tmp_path / "log"
    port = free_port()
    process = start(port, log)
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}/") as web:
        for route in ("call", "run", "api"):
            answer = web.post(f"gradio_api/{route}/nothing", json={"data": []})
            assert (answer.status_code, "/classify_batch" in answer.text) == (404, True)
        sent = Path(upload(web, "private.png", GOLGI.read_bytes())["path"])
    assert sent.is_file()
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    assert "Traceback" not in log.read_text()
    process = start(port, log)
    try:
        assert not sent.exists()
    finally:
        process.terminate()
        process.wait(timeout=30)
    assert not list(tmp_path.rglob("*.png"))  # ended in order, it leaves nothing


def test_uploads_and_downloads_lie_where_gradio_deletes_them_within_the_hour(web, served):
    assert sum(app.KEPT) <= 3600
    sent = [upload(web, f"private-{number}.png", GOLGI.read_bytes()) for number in range(2)]
    assert call(web, "explain", sent[0])[0] == "complete"
    assert len(list(served.cache.rglob("private-*"))) == 2
    time.sleep(0.5)
    maps = list(served.cache.rglob("vit.png"))
    assert maps and all(api.PREFIX in str(path) for path in maps)
    assert not list(Path(tempfile.gettempdir()).glob("private-*"))


def test_examples_are_held_out_cells_where_the_weights_carry_them(untrained, tmp_path):
    weights = hep2.load(untrained, "cpu").weights
    drawn, text = app.examples_of(weights, None, tmp_path)
    assert (len(drawn), drawn["Golgi-3"].truth) == (35, "Synthetic, drawn as Golgi")
    assert "synthetic" in text
    for label in CLASS_NAMES:
        shutil.copytree(ROOT / "examples" / label, tmp_path / "examples" / label)
    carried, text = app.examples_of(replace(weights, folder=tmp_path), None, tmp_path / "unused")
    assert carried["Golgi-3"].truth == "Its label: Golgi"
    assert "no model was trained on" in text


def test_the_page_lends_a_gpu_only_what_can_travel(untrained, monkeypatch, tmp_path):
    travelled = []

    def lend(duration):
        def wrap(function):
            def travelling(*arguments, **options):
                travelled.append(function.__name__)
                answer = function(*pickle.loads(pickle.dumps(arguments)), **pickle.loads(pickle.dumps(options)))
                return pickle.loads(pickle.dumps(answer))

            return travelling

        return wrap

    monkeypatch.setattr(handlers.spaces, "GPU", lend)
    shown = handlers.Page(Predictor(hep2.load(untrained, "cpu").weights, "cpu"))
    image, _ = field_of("NuMem")
    Image.fromarray(image.astype(np.uint8)).save(tmp_path / "field.png")
    *_, (html, files) = shown.show_specimen([str(tmp_path / "field.png")] * 2, 0, "", None, shown.begin(None)[0])
    names = [Path(file).name for file in files]
    assert names == ["specimen.csv", "specimen.xlsx", "field-cells.png", "field (2)-cells.png", "report.html"]
    *_, (html, counts, files) = shown.classify_many([str(GOLGI)] * 3, "", None, shown.begin(None)[0])
    assert "3 cells" in counts
    assert "1 (3).png" in html
    assert "Saliency" in shown.show(handlers.Example("", GOLGI, "1.png"))
    assert travelled == ["classify_cells", "classify_cells", "explain"]


def test_a_job_ends_when_the_next_of_its_tab_begins_or_it_is_stopped(untrained):
    shown = handlers.Page(hep2.load(untrained, "cpu"))
    first, _ = shown.begin(None)
    job = shown.classify_many([str(GOLGI)] * 200, "", None, first)
    assert "64 of 200 cells" in next(job)[0]
    second, _ = shown.begin(first)
    assert "Stopped" in list(job)[-1][0]
    job = shown.classify_many([str(GOLGI)] * 200, "", None, second)
    next(job)
    shown.stop(second)
    assert "Stopped" in list(job)[-1][0]
    assert not shown.live


def test_a_closed_job_ends():
    seen = []

    def work(progress):
        for item in progress(range(1_000), 1_000, "Working"):
            seen.append(item)
            time.sleep(0.01)

    steps = handlers.in_steps(work)
    assert "Working" in [next(steps), next(steps)][1]
    steps.close()
    time.sleep(0.1)
    count = len(seen)
    time.sleep(0.1)
    assert len(seen) == count < 1_000


@pytest.mark.parametrize("arguments", [["--weights", "/nowhere"], ["--dataset", "/nowhere"]])
def test_the_page_does_not_start_on_wrong_weights_or_dataset(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(api.FOLDER, str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert app.main(arguments) == 1
    assert "/nowhere" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_readme_carries_a_complete_space_configuration():
    space = SpaceCard.load(ROOT / "README.md").data.to_dict()
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
def test_the_documented_clients_work_as_they_stand(served, language):
    """README.md or docs/usage.md shows how the API is called, on the default address."""
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    codes = [code for text in texts for code in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]
    codes = [code for code in codes if "127.0.0.1:7860" in code and "classify" in code]
    assert codes
    if language == "sh" and shutil.which("curl") is None:
        pytest.skip("there is no curl")
    for code in codes:
        code = code.replace("http://127.0.0.1:7860/", served.address)
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert re.search(r"['\"]verdict['\"]: ", output)
