import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HUB_ADDRESS, ROOT, run_train, save_untrained
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard, constants

from hep2.checkpoints import load_classifier, read_json, write_json
from hep2.hub import create_repository, find_weights, pull, push, stage
from hep2.models import MODELS
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET
from hep2.predictor import Predictor

NAME = "lab/hep2"
EXAMPLES = {"00001.png": ("Golgi", b"\x89PNG a cell")}


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


def measure(folder: Path, **changes) -> None:
    """Write figures for the weights in a folder, as an evaluation would."""
    per_class = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 3}
    one = {"accuracy": 0.91234, "mean_class_accuracy": 0.8, "macro_f1": 0.7, "ece": 0.1}
    one |= {"per_class": dict.fromkeys(CLASS_NAMES, per_class), "confusion": [[3] * 6] * 6, "reliability": []}
    models = dict.fromkeys(MODELS, one)
    metrics = {"protocol": "deduplicated", "seed": 0, "fold": None, "test_size": 1018, "dataset": "synthetic:40"}
    metrics |= {"dataset_fingerprint": "0", "trained_on_fingerprint": "0", "models": models, "rejected": 0.012}
    blocks = {name: {"accuracy": 0.75, "right": 55, "total": 73, "wrong": []} for name in MODELS}
    specimen = {"folds": 4, "seed": 0, "recipe": "default", "rejected": 0.02, "models": models, "blocks": blocks}
    specimen |= {"shifted": {"models": models, "blocks": {name: {"right": 40, "total": 73} for name in MODELS}}}
    metrics |= {"specimen": specimen, "revision": load_classifier(folder).revision}
    write_json(folder / "metrics.json", metrics | changes)


@pytest.fixture(scope="module")
def run(untrained, tmp_path_factory):
    """A training run that was measured: untrained weights with figures, and a pickle that must not travel."""
    folder = shutil.copytree(untrained, tmp_path_factory.mktemp("runs") / "run")
    measure(folder)
    (folder / "cnn").mkdir()
    (folder / "cnn" / "checkpoint.pt").write_bytes(b"a pickle")
    (folder / "cnn" / "log.jsonl").write_text('{"epoch": 1}\n')
    return folder


def test_push_sends_all_in_one_commit_and_tags_it(hub, run):
    commit, tag = push(run, NAME, version="1.2.3", examples=EXAMPLES)
    repository = hub.repositories[NAME]
    assert tag == "v1.2.3"
    assert len(repository.commits) == 2  # the empty one, and ours
    assert repository.refs == {"main": commit, "v1.2.3": commit}
    files = repository.commits[commit]
    assert files["examples/Golgi/00001.png"] == b"\x89PNG a cell"
    expected = {"README.md", "config.json", "model.safetensors", "metrics.json", "cnn/log.jsonl", ".gitattributes"}
    assert set(files) == expected | {"examples/Golgi/00001.png"}


def test_a_tag_stays_and_the_next_push_takes_the_next_free_one(hub, run):
    commits, tags = zip(
        *(push(run, NAME, version="1.0.0", examples={f"{n}.png": ("NuMem", b"\x89PNG")}) for n in range(3)),
        strict=True,
    )
    assert tags == ("v1.0.0", "v1.0.0-2", "v1.0.0-3")
    assert len(set(commits)) == 3
    assert hub.repositories[NAME].refs == {"main": commits[-1], **dict(zip(tags, commits, strict=True))}
    assert pull(f"{NAME}@v1.0.0")[0].name == commits[0]
    assert pull(NAME)[0].name == commits[2]


def test_push_takes_the_tag_it_is_given_and_sends_nothing_under_one_that_is_there(hub, run):
    first, tag = push(run, NAME, version="1.0.0", tag="for-the-paper")
    assert tag == "for-the-paper"
    before = dict(hub.repositories[NAME].refs)
    assert before == {"main": first, "for-the-paper": first}
    for taken in ("for-the-paper", "main"):
        for attempt in (
            lambda taken=taken: push(run, NAME, version="1.0.0", tag=taken, examples=EXAMPLES),
            lambda taken=taken: create_repository(NAME, tag=taken),
        ):
            with pytest.raises(ValueError, match=f"has '{taken}' already, and a tag stays: name another"):
                attempt()
    assert hub.repositories[NAME].refs == before
    assert push(run, NAME, version="1.0.0", examples=EXAMPLES)[1] == "v1.0.0"


def test_push_again_leaves_no_old_cell(hub, run):
    first, _ = push(run, NAME, version="1.0.0", examples=EXAMPLES)
    second, _ = push(run, NAME, version="1.0.0", examples={"00002.png": ("NuMem", b"\x89PNG another")})
    before, after = (set(hub.repositories[NAME].commits[commit]) for commit in (first, second))
    assert before - after == {"examples/Golgi/00001.png"}
    assert after - before == {"examples/NuMem/00002.png"}


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


def test_find_weights_pulls_and_says_source_and_commit(hub, run):
    commit, tag = push(run, NAME, version="1.0.0", examples=EXAMPLES)
    weights = find_weights(f"{NAME}@{tag}")
    assert (weights.source, weights.revision, weights.notes) == (NAME, commit, ())
    assert weights.metrics == read_json(run / "metrics.json")
    assert weights.history("cnn") == [{"epoch": 1}]
    assert [(path.name, label) for path, label in weights.examples()] == [("00001.png", "Golgi")]
    assert find_weights(f"{NAME}@{commit}").revision == find_weights(NAME).revision == commit


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
        ("model.safetensors", b"garbage", r"model.safetensors is damaged"),
        ("config.json", b"{}", r"config.json: format None"),
        ("model.safetensors", None, r"model.safetensors is missing"),
        ("config.json", None, r"config.json is missing"),
    ],
)
def test_find_weights_names_what_was_tampered_with(file, content, message, hub, run):
    push(run, NAME, version="1.0.0")
    repository = hub.repositories[NAME]
    files = {path: data for path, data in repository.files("main")[1].items() if path != file}
    repository.commit(files if content is None else files | {file: content})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_weights(NAME)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lab/nothing", "lab/nothing is no folder here, and is not on the Hub, or is private"),
        ("lab/not a name", "lab/not a name is no folder here"),
        (f"{NAME}@v9", "has no revision 'v9'"),
        (f"{NAME}@refs/pr/1", "has no revision 'refs/pr/1'"),
        (f"{NAME}@", "lab/hep2@ names no revision"),
        ("./lab/folder", "no such folder"),
    ],
)
def test_find_weights_of_what_does_not_exist_says_so(name, message, hub, run):
    push(run, NAME, version="1.0.0")
    with pytest.raises(FileNotFoundError, match=message):
        find_weights(name)


def test_private_repository_needs_the_token(hub, run, monkeypatch):
    push(run, NAME, version="1.0.0", private=True)
    assert find_weights(NAME).source == NAME
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="is private: check the name, give a token"):
        find_weights(NAME)


def test_push_needs_a_good_token(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConnectionError, match=f"does not let us push to {NAME}"):
        push(run, NAME, version="1.0.0")
    with pytest.raises(ConnectionError, match=f"does not let us push to {NAME}"):
        create_repository(NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(run, NAME, version="1.0.0")


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ([403], f"does not let us push to {NAME}"),
        ([0, 0, 403], f"the push to {NAME} failed"),
        ([0, 0, 0, 0, 0, 0, 0, 0, 403], f"{NAME} has the run as [0-9a-f]{{40}}, but without a tag"),
    ],
)
def test_push_says_how_far_it_came(failures, message, hub, run):
    hub.failures = [*failures, *[403] * 20]
    with pytest.raises(ConnectionError, match=message):
        push(run, NAME, version="1.0.0")


@pytest.mark.parametrize("status", [429, 503])
def test_push_and_pull_wait_for_a_hub_that_is_busy_for_a_moment(hub, run, status):
    hub.failures = [status]
    commit, tag = push(run, NAME, version="1.0.0")
    assert hub.repositories[NAME].refs[tag] == commit
    hub.failures = [status]
    assert pull(NAME)[0].name == commit


def test_push_sends_nothing_private_to_a_public_repository(hub, run):
    first, _ = push(run, NAME, version="1.0.0")
    with pytest.raises(PermissionError, match="is public already: make it private"):
        push(run, NAME, version="1.1.0", private=True)
    assert hub.repositories[NAME].refs == {"main": first, "v1.0.0": first}


def test_pull_never_takes_an_older_copy_in_silence(hub, run):
    first, _ = push(run, NAME, version="1.0.0")
    second, _ = push(run, NAME, version="1.1.0", examples=EXAMPLES)
    pull(f"{NAME}@{first}")
    before = find_weights(NAME)
    assert (before.revision, before.notes) == (second, ())
    third, _ = push(run, NAME, version="1.2.0")
    # The Hub says which commit it is, and fails before it says what lies there.
    hub.failures = [0, *[400] * 40]
    weights = find_weights(NAME)
    assert weights.revision == second != third
    assert "the cached revision" in weights.notes[0]


@pytest.mark.slow
def test_an_interrupted_download_leaves_the_older_copy_in_use_and_goes_on_the_next_time(hub, run):
    first, _ = push(run, NAME, version="1.0.0")
    assert find_weights(NAME).revision == first
    changed = shutil.copytree(run, run.parent / "changed")
    save_untrained(changed, seed=1)
    measure(changed)
    second, _ = push(changed, NAME, version="1.1.0")
    hub.truncations = 40
    assert find_weights(NAME).revision == first
    hub.truncations, hub.failures = 0, [503] * 40
    weights = find_weights(NAME)
    assert weights.revision == first
    assert f"the cached revision of {NAME} answers" in weights.notes[0]
    hub.failures = []
    assert find_weights(NAME).revision == second


def test_pull_with_a_wrong_token_says_so(hub, run, monkeypatch):
    push(run, NAME, version="1.0.0")
    find_weights(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(FileNotFoundError, match="the Hub does not accept the token"):
        find_weights(NAME)


def test_pull_without_cache_when_the_hub_is_down_names_the_bundled_weights(hub, run):
    hub.failures = [503] * 20
    with pytest.raises(FileNotFoundError, match=r"no whole copy is cached.*use the bundled weights"):
        find_weights(NAME)


def test_pull_blames_the_cache_where_the_cache_cannot_be_written(hub, run):
    push(run, NAME, version="1.0.0")
    cache = Path(constants.HF_HUB_CACHE)
    cache.write_text("a file where a folder should be")
    with pytest.raises(OSError, match=rf"cannot be kept in the cache {cache}.*set HF_HOME"):
        find_weights(NAME)
    cache.unlink()


def test_offline_is_respected(hub, run):
    push(run, NAME, version="1.0.0")
    find_weights(NAME)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    code = f"from hep2.hub import find_weights; print(find_weights({NAME!r}).notes)"
    before = len(hub.requests)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "HF_HUB_OFFLINE is set: the cached revision" in result.stdout
    assert len(hub.requests) == before


def card_of(run: Path, destination: Path) -> ModelCard:
    stage(run, destination, NAME, EXAMPLES)
    return ModelCard.load(destination / "README.md")


def test_the_card_leads_with_new_specimens_and_the_hub_can_read_it(run, tmp_path):
    card = card_of(run, tmp_path / "staged")
    assert card.data.license == "mit"
    assert card.data.model_name == "hep2"
    assert card.data.datasets is None  # no published cell was trained on
    assert len(card.data.eval_results) == 2 * 3 * len(MODELS)
    assert {result.metric_value for result in card.data.eval_results} == {0.9123, 0.8, 0.7}
    assert [result.dataset_config for result in card.data.eval_results[:: 3 * len(MODELS)]] == [
        "held-out specimens",
        "deduplicated",
    ]
    parts = [
        "Not for clinical use",
        "On a new patient: 55 of 73 specimens right",
        "| Stack ensemble | 55 of 73 | 0.9123 | 0.8000 | 0.1000 |",
        "40 of 73 specimens right and a mean class accuracy of\n0.8000",
        "Protocol `deduplicated`, seed 0: 1,018 test cells",
        "| Stack ensemble | 0.9123 | 0.8000 | 0.7000 | 0.1000 |",
        "| Golgi | 0.5000 | 0.5000 | 0.5000 | 3 |",
        f"--weights {NAME} cell.png",
        "## Limitations",
        "## Licence and citation",
        "Genius-Society/HEp2",
        "ICAP",
    ]
    assert [part for part in parts if part not in card.text] == []
    places = [card.text.index(part) for part in parts[:9]]
    assert places == sorted(places)
    assert not re.search(r"\{[{%]|[%}]\}|Undefined", card.text)
    assert not list((tmp_path / "staged").rglob("*.pt"))


def test_the_card_says_where_held_out_specimens_were_not_measured(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    metrics = {key: value for key, value in read_json(run / "metrics.json").items() if key != "specimen"}
    write_json(other / "metrics.json", metrics)
    card = card_of(other, tmp_path / "random")
    assert "Held-out specimens were not measured" in card.text
    assert "On a new patient" not in card.text
    write_json(other / "metrics.json", metrics | {"protocol": "specimen", "fold": 2})
    card = card_of(other, tmp_path / "specimen")
    assert "Protocol `specimen`, seed 0, fold 2" in card.text
    assert "random split has cells" not in card.text


def test_the_card_names_the_dataset_and_sets_the_references_figures_beside_ours(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    config = read_json(other / "config.json")
    write_json(other / "config.json", config | {"training": config["training"] | {"dataset": DEFAULT_DATASET}})
    measure(other, dataset=DEFAULT_DATASET)
    card = card_of(other, tmp_path / "staged")
    assert card.data.datasets == [DEFAULT_DATASET]
    assert "| Stack ensemble | 0.9123 | 0.8000 | 0.7000 | 0.1000 | 0.95 |" in card.text
    assert "synthetic" not in card.text


def test_the_card_shows_the_figures_that_travel(run, tmp_path):
    whole = shutil.copytree(run, tmp_path / "run")
    (whole / "held_out").mkdir()
    shown = ["held_out/reliability_ensemble.png", "confusion_ensemble.png", "cnn/curves.png"]
    for file in (*shown, "confusion_vit.png"):
        (whole / file).write_bytes(b"\x89PNG")
    card = card_of(whole, tmp_path / "staged")
    assert re.findall(r"!\[.+\]\((.+)\)", card.text) == shown
    assert all((tmp_path / "staged" / file).is_file() for file in (*shown, "confusion_vit.png"))


def test_stage_takes_no_run_that_was_not_measured_as_it_is(untrained, run, tmp_path):
    with pytest.raises(ValueError, match=r"metrics.json is not there.*measure the run"):
        stage(untrained, tmp_path / "staged", NAME)
    other = shutil.copytree(run, tmp_path / "other")
    figures = read_json(run / "metrics.json")
    for change, message in (
        ({"revision": "another"}, "are of other weights"),
        ({"models": {"cnn": figures["models"]["cnn"]}}, "does not have all four models"),
    ):
        write_json(other / "metrics.json", figures | change)
        with pytest.raises(ValueError, match=rf"{message}.*measure the run"):
            stage(other, tmp_path / "staged", NAME)
    assert not (tmp_path / "staged").exists()


def test_train_finds_out_before_training_that_it_may_not_push(hub, run, teacher_file, monkeypatch, tmp_path, capsys):
    push(run, NAME, version="1.0.0", tag="taken")
    for token, options, message in (
        ("hf_wrong", [], "set HF_TOKEN"),
        (TOKEN, ["--private"], f"{NAME} is public already: make it private"),
        (TOKEN, ["--tag", "taken"], f"{NAME} has 'taken' already"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        assert run_train(tmp_path / "run", teacher_file, "--push", NAME, *options) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_and_push_and_load_what_was_pushed(hub, trained, teacher_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hep2.pipeline.save_figure", lambda *_: None)
    folder = shutil.copytree(trained, tmp_path / "run")  # it trains nothing that is trained
    assert run_train(folder, teacher_file, "--push", NAME, "--dry-run") == 0
    assert "examples/Golgi/Golgi-" in capsys.readouterr().out
    assert hub.repositories == {}
    assert run_train(folder, teacher_file, "--push", NAME) == 0
    repository, said = hub.repositories[NAME], capsys.readouterr().out
    assert repository.refs["main"] in said
    (tag,) = repository.refs.keys() - {"main"}
    assert tag in said
    assert len([path for path in repository.files(tag)[1] if path.startswith("examples/")]) == 30
    weights = find_weights(f"{NAME}@{tag}")
    assert (weights.source, weights.revision) == (NAME, repository.refs["main"])
    (prediction,) = Predictor(weights, "cpu").classify([ROOT / "examples" / "Golgi" / "1.png"])
    assert prediction.as_dict()["weights"] == {"source": NAME, "revision": repository.refs["main"]}


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
    for line in (create, upload):
        subprocess.run([hf, *shlex.split(line)[1:]], cwd=fork, check=True, capture_output=True)
    settings = hub.repositories["lab/cells"].settings
    assert (settings["sdk"], settings["hardware"]) == ("gradio", "zero-a10g")
    assert hub.repositories["lab/cells"].private
    _, files = hub.repositories["lab/cells"].files("main")
    assert {"app.py", "README.md", "requirements.txt", "hep2/models.py", "hep2/ui/page.css"} <= set(files)
    assert "examples/Golgi/1.png" in files
    assert not [path for path in files if path.startswith(("runs/", ".git/", "tests/"))]
