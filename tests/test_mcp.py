"""The page's functions as tools of an assistant: the real client of the Model Context Protocol on the running page."""

import ast
import base64

import pytest
from conftest import ROOT, serving_page

from hep2.ui.api import ENDPOINTS

anyio = pytest.importorskip("anyio")
session = pytest.importorskip("mcp.client.session", reason="mcp is not installed")
transport = pytest.importorskip("mcp.client.streamable_http", reason="mcp is not installed")

GOLGI = base64.b64encode((ROOT / "examples/Golgi/1.png").read_bytes()).decode()
FIELD = "data:image/png;base64," + base64.b64encode((ROOT / "examples/fields/NuMem.png").read_bytes()).decode()


@pytest.fixture(scope="module")
def tools():
    with serving_page() as page:
        yield lambda *calls: anyio.run(ask, page.address, *calls)


async def ask(address: str, *calls: tuple[str, dict]) -> list:
    """Open a session, and return the list of tools and what each call answers."""
    async with (
        transport.streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _),
        session.ClientSession(read, write) as client,
    ):
        await client.initialize()
        return [(await client.list_tools()).tools, *[await client.call_tool(name, given) for name, given in calls]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_tool_takes_an_image_that_an_assistant_can_give(tools):
    listed, *answers = tools(
        ("classify", {"image": GOLGI}),
        ("classify", {"image": f"data:image/png;base64,{GOLGI}", "plane": 1}),
        ("classify_batch", {"images": [GOLGI, "bm8gaW1hZ2U="]}),
        ("explain", {"image": GOLGI}),
        ("specimen", {"fields": [FIELD], "pixel_size": 0.15}),
        ("models", {}),
    )
    assert {tool.name for tool in listed} == set(ENDPOINTS)
    for tool in listed:
        assert len(tool.description) > 40
        described = tool.inputSchema["properties"].values()
        assert all(one["description"] and ("type" in one or "anyOf" in one) for one in described)
    assert not any(answer.isError for answer in answers)
    plain, uri, batch, explained, specimen, models = (ast.literal_eval(one.content[0].text) for one in answers)
    assert plain["verdict"] == uri["verdict"] == batch[0]["verdict"] == explained[0]["verdict"] == "Golgi"
    assert "not an image" in batch[1]["error"]
    assert specimen["verdict"] == "NuMem"
    assert models["models"] == ["cnn", "rescnn", "vit", "ensemble"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_read_is_an_error_in_words(tools):
    _, broken, absent = tools(("classify", {"image": "bm8gaW1hZ2U="}), ("classify", {"image": "/etc/passwd"}))
    assert broken.isError and "not an image" in broken.content[0].text
    assert absent.isError and "data URI or base64" in absent.content[0].text
