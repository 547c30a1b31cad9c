import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import HUB_ADDRESS, ROOT, save_untrained, serving_page
from gradio_client import Client, handle_file
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard, constants

import train
from hep2.files import write_json
from hep2.hub import open_weights, pull, push, stage
from hep2.models import MODELS
from hep2.weights import load_weights

NAME = "lab/hep2"


@pytest.fixture(scope="module")
def server():
    with HubServer(HUB_ADDRESS) as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch):
    """An empty Hub and an empty cache; the token is good for writing."""
    server.reset()
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture(scope="module")
def run(untrained, tmp_path_factory):
    """A training run that was measured: untrained weights with figures, and a pickle that must not travel."""
    folder = shutil.copytree(untrained, tmp_path_factory.mktemp("runs") / "run")
    result = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 3}
    classes = ("Centromere", "Golgi", "Homogeneous", "NuMem", "Nucleolar", "Speckled")
    one = {"accuracy": 0.91234, "mean_class_accuracy": 0.8, "macro_f1": 0.7, "ece": 0.1}
    one |= {"per_class": dict.fromkeys(classes, result), "confusion": [[3] * 6] * 6, "reliability": []}
    models = dict.fromkeys(MODELS, one)
    metrics = {"protocol": "clean", "seed": 0, "fold": None, "test_size": 18, "dataset": "phantoms", "models": models}
    metrics["dataset_fingerprint"] = "0"
    specimen = {"folds": 4, "recipe": "tuned", "refused": 0.02, "models": models}
    blocks = {"accuracy": 0.75, "right": 55, "total": 73, "wrong": []}
    metrics["specimen"] = specimen | {"blocks": dict.fromkeys(MODELS, blocks)}
    write_json(folder / "metrics.json", metrics | {"revision": load_weights(folder).revision})
    (folder / "cnn" / "checkpoint.pt").write_bytes(b"a pickle")
    (folder / "cnn" / "log.jsonl").write_text("{}\n")
    return folder


EXAMPLES = {"00001.png": ("Golgi", b"\x89PNG a cell")}


def test_push_sends_all_in_one_commit_and_tags_it(hub, run):
    commit = push(run, NAME, version="1.2.3", examples=EXAMPLES)
    repository = hub.repositories[NAME]
    assert len(repository.commits) == 2  # the empty one, and ours
    assert repository.refs["v1.2.3"] == repository.refs["main"] == commit
    files = repository.commits[commit]
    assert files["examples/Golgi/00001.png"] == b"\x89PNG a cell"
    expected = {"README.md", "metrics.json", "cnn/log.jsonl", "examples/Golgi/00001.png", ".gitattributes"}
    expected |= {f"{name}/{file}" for name in [*MODELS, "refusal"] for file in ("config.json", "model.safetensors")}
    assert set(files) == expected


def test_card_shows_the_figures_that_travel(hub, run, tmp_path):
    whole = shutil.copytree(run, tmp_path / "run")
    (whole / "confusion_ensemble.png").write_bytes(b"\x89PNG")
    (whole / "vit" / "curves.png").write_bytes(b"\x89PNG")
    stage(whole, tmp_path / "staged", NAME)
    card = (tmp_path / "staged" / "README.md").read_text()
    shown = re.findall(r"!\[.+\]\((.+)\)", card)
    assert shown == ["confusion_ensemble.png", "vit/curves.png"]
    assert all((tmp_path / "staged" / file).is_file() for file in shown)


def test_the_readmes_commands_make_a_space(hub, tmp_path):
    text = (ROOT / "README.md").read_text()
    commands = re.search(r"<!-- deploy -->\n```sh\n(.*?)```", text, re.DOTALL)[1].replace("OWNER/SPACE", "lab/cells")
    create, upload = (line for line in commands.splitlines() if "create" in line or "upload" in line)
    fork = tmp_path / "fork"
    ignored = shutil.ignore_patterns("runs", ".git", "__pycache__", ".*_cache", "*.safetensors")
    shutil.copytree(ROOT, fork, ignore=ignored)
    (fork / "runs").mkdir()
    (fork / "runs" / "checkpoint.pt").write_bytes(b"a pickle")
    hf = str(Path(sys.executable).with_name("hf"))
    for command in (create, upload):
        subprocess.run([hf, *shlex.split(command)[1:]], cwd=fork, check=True, capture_output=True)
    settings = hub.repositories["lab/cells"].settings
    assert (settings["sdk"], settings["hardware"]) == ("gradio", "zero-a10g")
    assert hub.repositories["lab/cells"].private
    _, files = hub.repositories["lab/cells"].files("main")
    assert {"app.py", "README.md", "requirements.txt", "hep2/models.py", "hep2/views.css"} <= set(files)
    assert "examples/Golgi/1.png" in files
    assert not [path for path in files if path.startswith(("runs/", ".git/", "tests/"))]


def test_push_again_makes_another_commit_and_keeps_the_first_tag(hub, run):
    first = push(run, NAME, version="1.0.0")
    second = push(run, NAME, version="1.1.0", examples=EXAMPLES)
    assert first != second
    assert hub.repositories[NAME].refs["v1.0.0"] == first
    assert pull(f"{NAME}@v1.0.0")[0].name == first
    assert pull(f"{NAME}@{second}")[0].name == pull(NAME)[0].name == second


def test_push_of_a_version_again_moves_its_tag_and_leaves_no_old_cell(hub, run):
    first = push(run, NAME, version="1.0.0", examples=EXAMPLES)
    second = push(run, NAME, version="1.0.0", examples={"00002.png": ("NuMem", b"\x89PNG another")})
    repository = hub.repositories[NAME]
    assert repository.refs["v1.0.0"] == repository.refs["main"] == second != first
    before, after = (set(repository.commits[commit]) for commit in (first, second))
    assert before - after == {"examples/Golgi/00001.png"}
    assert after - before == {"examples/NuMem/00002.png"}


def test_open_weights_takes_a_revision_with_slashes(hub, run):
    push(run, NAME, version="1.0.0")
    with pytest.raises(FileNotFoundError, match="has no revision 'refs/pr/1'"):
        open_weights(f"{NAME}@refs/pr/1")


def test_open_weights_pulls_and_says_source_and_commit(hub, run):
    commit = push(run, NAME, version="1.0.0")
    weights = open_weights(f"{NAME}@v1.0.0")
    assert (weights.source, weights.revision, weights.notes) == (NAME, commit, ())
    assert list(weights.models) == list(MODELS)
    assert weights.metrics == load_weights(run).metrics


def test_pull_never_fetches_a_pickle(hub, run):
    push(run, NAME, version="1.0.0")
    repository = hub.repositories[NAME]
    repository.commit(repository.files("main")[1] | {"cnn/pytorch_model.bin": b"evil", "model.pkl": b"evil"})
    folder, _ = pull(NAME)
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pkl", ".pt")]
    assert not [path for _, path in hub.requests if path.endswith((".bin", ".pkl"))]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("cnn/model.safetensors", b"garbage", r"cnn/model.safetensors is damaged"),
        ("vit/config.json", b"{}", r"vit/config.json: format None"),
        ("rescnn/model.safetensors", None, r"rescnn/model.safetensors is missing"),
    ],
)
def test_open_weights_names_what_was_tampered_with(file, content, message, hub, run):
    push(run, NAME, version="1.0.0")
    repository = hub.repositories[NAME]
    files = {path: data for path, data in repository.files("main")[1].items() if path != file}
    repository.commit(files if content is None else files | {file: content})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_weights(NAME)


def test_pull_of_what_does_not_exist_says_so(hub, run):
    with pytest.raises(FileNotFoundError, match="lab/nothing is no folder here, and is not on the Hub, or is private"):
        open_weights("lab/nothing")
    push(run, NAME, version="1.0.0")
    with pytest.raises(FileNotFoundError, match="has no revision 'v9'"):
        open_weights(f"{NAME}@v9")
    with pytest.raises(FileNotFoundError, match="lab/hep2@ names no revision"):
        open_weights(f"{NAME}@")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_weights("./lab/folder")


def test_private_repository_needs_the_token(hub, run, monkeypatch):
    push(run, NAME, version="1.0.0", private=True)
    assert open_weights(NAME).source == NAME
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="is private: check the name, give a token"):
        open_weights(NAME)


def test_push_without_a_good_token_keeps_the_run(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConnectionError, match=f"the run is whole in {run}: push it again"):
        push(run, NAME, version="1.0.0")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(run, NAME, version="1.0.0")


def test_train_finds_out_before_training_that_it_may_not_push(hub, run, monkeypatch, tmp_path, capsys):
    push(run, NAME, version="1.0.0")
    arguments = ["--dataset", "phantoms:40", "--output", str(tmp_path / "run"), "--push", NAME, "--private"]
    for token, message in (
        ("hf_wrong", "log in with `hf auth login` or set HF_TOKEN"),
        (TOKEN, f"{NAME} is public already: make it private"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        AcceleratorState._reset_state(True)
        assert train.main(arguments) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("status", [429, 503])
def test_push_waits_for_a_hub_that_is_busy_for_a_moment(hub, run, status):
    hub.failures = [status]
    commit = push(run, NAME, version="1.0.0")
    assert hub.repositories[NAME].refs["v1.0.0"] == commit


def test_push_sends_nothing_private_to_a_public_repository(hub, run):
    first = push(run, NAME, version="1.0.0")
    with pytest.raises(PermissionError, match="is public already: make it private"):
        push(run, NAME, version="1.1.0", private=True)
    assert hub.repositories[NAME].refs == {"main": first, "v1.0.0": first}


def test_push_leaves_files_that_are_not_ours(hub, run):
    push(run, NAME, version="1.0.0")
    repository = hub.repositories[NAME]
    others = {"banner.png", "confusion_notes/mine.png", "archive/cnn/model.safetensors", "other/config.json"}
    repository.commit(repository.files("main")[1] | dict.fromkeys({*others, "confusion_vit.png"}, b"theirs"))
    push(run, NAME, version="1.1.0")
    files = set(repository.files("main")[1])
    assert others <= files
    assert "confusion_vit.png" not in files  # an earlier run's
    folder, _ = pull(NAME)
    assert not any((folder / name).exists() for name in others)


def test_pull_waits_for_a_hub_that_is_busy_for_a_moment(hub, run):
    commit = push(run, NAME, version="1.0.0")
    hub.failures = [503]
    assert pull(NAME)[0].name == commit


def test_pull_never_takes_an_older_copy_in_silence(hub, run):
    first, second = push(run, NAME, version="1.0.0"), push(run, NAME, version="1.1.0", examples=EXAMPLES)
    pull(f"{NAME}@{first}")
    before = open_weights(NAME)
    assert (before.revision, before.notes) == (second, ())
    third = push(run, NAME, version="1.2.0")
    # The Hub says which commit it is, and fails before it says what lies there.
    hub.failures = [0, *[400] * 40]
    weights = open_weights(NAME)
    assert weights.revision == second != third
    assert "the cached revision" in weights.notes[0]


def test_an_interrupted_download_leaves_the_older_copy_in_use(hub, run):
    first = push(run, NAME, version="1.0.0")
    open_weights(NAME)
    changed = shutil.copytree(run, run.parent / "changed")
    save_untrained(changed, seed=1)
    write_json(changed / "metrics.json", load_weights(run).metrics | {"revision": load_weights(changed).revision})
    push(changed, NAME, version="1.1.0")
    hub.truncations = 40
    assert open_weights(NAME).revision == first
    hub.truncations, hub.failures = 0, [503] * 40
    weights = open_weights(NAME)
    assert weights.revision == first
    assert "the cached revision" in weights.notes[0]


def test_pull_with_a_wrong_token_says_so(hub, run, monkeypatch):
    push(run, NAME, version="1.0.0")
    open_weights(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(FileNotFoundError, match="the Hub refuses the token"):
        open_weights(NAME)


def test_pull_takes_the_cached_revision_when_the_hub_is_down_and_says_so(hub, run):
    commit = push(run, NAME, version="1.0.0")
    open_weights(NAME)
    hub.failures = [503] * 20
    weights = open_weights(NAME)
    assert weights.revision == commit
    assert f"the cached revision of {NAME} answers" in weights.notes[0]


def test_pull_without_cache_when_the_hub_is_down_names_the_bundled_weights(hub, run):
    hub.failures = [503] * 20
    with pytest.raises(FileNotFoundError, match=r"no whole copy is cached.*use the bundled weights"):
        open_weights(NAME)


def test_interrupted_download_is_an_error_and_goes_on_the_next_time(hub, run):
    commit = push(run, NAME, version="1.0.0")
    hub.truncations = 40
    with pytest.raises(FileNotFoundError, match="no whole copy is cached"):
        open_weights(NAME)
    hub.truncations = 0
    assert open_weights(NAME).revision == commit


def test_offline_is_respected(hub, run):
    push(run, NAME, version="1.0.0")
    open_weights(NAME)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    code = f"from hep2.hub import open_weights; print(open_weights({NAME!r}).notes)"
    before = len(hub.requests)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "HF_HUB_OFFLINE is set: the cached revision" in result.stdout
    assert len(hub.requests) == before


def test_stage_writes_a_card_that_the_hub_can_read(run, tmp_path):
    stage(run, tmp_path / "staged", NAME, EXAMPLES)
    card = ModelCard.load(tmp_path / "staged" / "README.md")
    assert card.data.license == "mit"
    assert card.data.model_name == "hep2"
    assert len(card.data.eval_results) == 3 * len(MODELS)
    assert {result.metric_value for result in card.data.eval_results} == {0.9123, 0.8, 0.7}
    for part in (
        "0.9123",
        "Not for clinical use",
        "Protocol clean, seed 0, 18 test cells",
        "| Golgi | 0.5000 | 0.5000 | 0.5000 | 3 |",
        "On held-out specimens, which is what a new patient is like: 4 folds",
        "reads 55 of 73 specimens right",
        "calibration error",
        "## Limits",
        "## Licence and citation",
        f"--weights {NAME} cell.png",
    ):
        assert part in card.text
    assert not list((tmp_path / "staged").rglob("*.pt"))


def test_stage_refuses_a_run_that_was_not_measured_as_it_is(untrained, run, tmp_path):
    with pytest.raises(FileNotFoundError, match="measure the run"):
        stage(untrained, tmp_path / "staged", NAME)
    other = shutil.copytree(run, tmp_path / "other")
    figures = load_weights(run).metrics
    for spoil in ({"revision": "another"}, {"models": {"cnn": figures["models"]["cnn"]}}):
        write_json(other / "metrics.json", figures | spoil)
        with pytest.raises(ValueError, match="not of these four models as they are now: measure the run"):
            stage(other, tmp_path / "staged", NAME)


def test_train_push_serve_and_classify(hub, few_refusals, tmp_path, capsys):
    AcceleratorState._reset_state(True)
    arguments = ["--dataset", "phantoms:40", "--epochs", "2", "--output", str(tmp_path / "run"), "--push", NAME]
    assert train.main([*arguments, "--dry-run"]) == 0
    assert "examples/Golgi/Golgi-" in capsys.readouterr().out
    assert hub.repositories == {}
    # The Hub fails after the training; what the message says is then done, and trains nothing again.
    hub.failures = [0, *[403] * 20]
    AcceleratorState._reset_state(True)
    assert train.main(arguments) == 1
    hub.failures = []
    message = capsys.readouterr().err
    assert "which trains nothing that is trained" in message
    again = shlex.split(message.strip().splitlines()[-1])
    assert again[:2] == ["python", "train.py"]
    AcceleratorState._reset_state(True)
    assert train.main(again[2:]) == 0
    files = hub.repositories[NAME].files("main")[1]
    assert len([path for path in files if path.startswith("examples/")]) == 30
    with serving_page("--weights", NAME) as page:
        client = Client(page.address, verbose=False)
        answer = client.predict(handle_file("examples/Golgi/1.png"), api_name="/classify")
        client.close()
    assert answer["weights"] == {"source": NAME, "revision": hub.repositories[NAME].refs["main"]}
    assert len(answer["models"]) == 4
