"""The page's API as curl uses it."""

import json
import re

import httpx2


def upload(web: httpx2.Client, name: str, data: bytes) -> dict:
    """Send a file, and return it as the endpoints take it."""
    answer = web.post("gradio_api/upload", files={"files": (name, data)})
    assert answer.status_code == 200, answer.text
    return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}


def call(web: httpx2.Client, endpoint: str, *arguments) -> tuple[str, object]:
    """Call an endpoint; returns its last event, complete or error, and the data; or "refused" and why."""
    answer = web.post(f"gradio_api/call/{endpoint}", json={"data": list(arguments)})
    if answer.status_code != 200:
        return "refused", answer.json()
    text = web.get(f"gradio_api/call/{endpoint}/{answer.json()['event_id']}").text
    kind, data = re.findall(r"event: (\w+)\ndata: (.*)", text)[-1]
    return kind, json.loads(data)
