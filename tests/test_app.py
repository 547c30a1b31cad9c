import pytest
from conftest import serving_page
from gradio_client import Client, handle_file

from hep2.reader import Reader
from hep2.weights import load_weights


@pytest.fixture(scope="module")
def address(untrained):
    with serving_page(str(untrained)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    client = Client(address, verbose=False)
    yield client
    client.close()


def test_classify_answers_what_the_reader_says(client, untrained):
    reader = Reader(load_weights(untrained))
    answer = client.predict(handle_file("examples/Golgi/2.png"), api_name="/classify")
    expected = next(reader.read_files(["examples/Golgi/2.png"])).as_dict()
    assert answer == expected | {"file": "2.png"}


def test_classify_of_no_image_says_why_without_a_path(client):
    with pytest.raises(Exception, match="not an image") as caught:
        client.predict(handle_file("LICENSE"), api_name="/classify")
    assert "/" not in str(caught.value)


def test_classify_batch_loses_nothing_by_a_bad_file(client):
    files = ["examples/Golgi/1.png", "LICENSE", "examples/NuMem/1.png"]
    answers = client.predict([handle_file(file) for file in files], api_name="/classify_batch")
    assert ["error" in answer for answer in answers] == [False, True, False]


def test_models_names_source_and_revision(client, untrained):
    answer = client.predict(api_name="/models")
    assert answer["models"] == ["cnn", "rescnn", "vit", "ensemble"]
    assert answer["revision"] == load_weights(untrained).revision


def test_api_names_the_public_functions_alone(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/classify", "/classify_batch", "/models"}
