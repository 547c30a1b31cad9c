"""What the API's endpoints take and answer, as JSON schemas; and what every request to the page must hold to."""

import base64
import binascii
import os
from pathlib import Path
from shutil import rmtree
from tempfile import gettempdir, mkdtemp
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from fastapi import HTTPException, Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hep2.formats import EXPECTED

ENDPOINTS = {"classify": 3, "classify_batch": 3, "explain": 3, "specimen": 4, "models": 0}  # and how many inputs
NO_IMAGE = f"no image came; give one: {EXPECTED}"
FITTING = (
    "an image is a data URI or base64 text, or a file that was uploaded to /gradio_api/upload before, as handle_file "
    "of gradio_client does; no other paths, and no addresses; uploads are deleted within the hour: give it again then"
)
FOLDER = "GRADIO_TEMP_DIR"  # where Gradio looks up its folder for uploads and downloads
PREFIX = "hep2-uploads-"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'self' https://huggingface.co https://*.hf.space",
}

TEXT, NUMBER, WHOLE, TRUTH = ({"type": name} for name in ("string", "number", "integer", "boolean"))
NUMBERS = {"type": "object", "additionalProperties": NUMBER}


def listed(items: dict) -> dict:
    return {"type": "array", "items": items}


def _object(**properties: dict) -> dict:
    return {"type": "object", "properties": properties}


WEIGHTS = {"source": TEXT, "revision": TEXT}
VERDICT = {"verdict": TEXT, "probability": NUMBER}
MODELS = {"agreement": WHOLE, "models": {"type": "object", "additionalProperties": NUMBERS}}
REMARKS = {"warnings": listed(TEXT), "weights": _object(**WEIGHTS)}
PREDICTION = _object(file=TEXT, **VERDICT, **MODELS, **REMARKS)
CELL = _object(number=WHOLE, field=WHOLE, bbox=listed(WHOLE), **VERDICT, **MODELS, rejected=TRUTH, mitotic=TRUTH)
FOUND = {"cells": WHOLE, "counts": NUMBERS, "rejected": WHOLE, "mitotic": WHOLE, "per_cell": listed(CELL)}
SPECIMEN = _object(files=listed(TEXT), **VERDICT, interval=listed(NUMBER), second=TEXT, **FOUND, **REMARKS)
KNOWN = _object(models=listed(TEXT), **WEIGHTS, notes=listed(TEXT), metrics={"type": "object"})
IMAGE = TEXT | {"additional_description": "a data URI, or base64; or an uploaded file (handle_file)"}
CHANNEL = TEXT | {"additional_description": "a name that the file gives, red, green, blue, or a number from 1"}
PLANE = WHOLE | {"additional_description": "a number from 1"}
MAPS = listed(_object(image=_object(path=TEXT, url=TEXT), caption=TEXT))
PIXEL_SIZE = NUMBER | {"additional_description": "micrometres"}


class Parameter(gr.HTML):
    """An input or output of the API, with a JSON schema and an example; nothing on the page."""

    def __init__(self, label: str, schema: dict, example: Any = None) -> None:
        self.schema, self.example = schema, example
        super().__init__(label=label)

    def api_info(self) -> dict:
        return self.schema

    def example_payload(self) -> Any:
        return self.example

    def example_value(self) -> Any:
        return self.example


class ImageParameter(Parameter):
    """One image or many, to (name, path or bytes) of each."""

    def preprocess(self, payload: Any) -> Any:
        if not payload or self.schema["type"] != "array":
            return payload and _image(payload, "image")
        payload = payload if isinstance(payload, list) else [payload]
        return [_image(one, f"image {number}") for number, one in enumerate(payload, start=1)]


def _image(payload: Any, name: str) -> tuple[str, Path | bytes]:
    path = payload.get("path") if isinstance(payload, dict) else None
    if is_upload(path):
        return Path(path).name, Path(path)
    try:
        return name, base64.b64decode(payload.rpartition(",")[2], validate=True)
    except (AttributeError, ValueError, binascii.Error) as error:
        raise gr.Error(f"this does not fit: {FITTING}", print_exception=False) from error


def is_upload(path: Any) -> bool:
    """Tell whether something is the path of a file that Gradio took from a visitor, or made for one."""
    folder = Path(os.environ[FOLDER]).resolve()
    return isinstance(path, str) and Path(path).is_file() and folder in Path(path).resolve().parents


async def guard(request: Request) -> None:
    """Reject uploads that another site's page sends, unknown endpoints, and files that are not uploads.

    Gradio itself would print a traceback for the last two, answer no words, and fetch what lies at an address.
    """
    if request.method != "POST":
        return
    origin, host = request.headers.get("origin"), request.headers.get("x-forwarded-host", request.headers.get("host"))
    if request.url.path.endswith("/upload") and origin and urlsplit(origin).netloc != host:
        raise HTTPException(403, f"uploads from pages of {origin} are not accepted: send a data URI, or no Origin")
    name = request.path_params.get("api_name", "").strip("/")
    if name and name not in (*ENDPOINTS, "predict"):  # predict is what the page itself posts its events to
        raise HTTPException(404, f"there is no endpoint /{name}: there are /{', /'.join(ENDPOINTS)}")
    if request.headers.get("content-type", "").startswith("application/json"):
        content = await request.json()
        if name in ENDPOINTS and isinstance(content, dict) and isinstance(content.get("data"), list):
            # Gradio wants all inputs: who leaves out the last ones means what is usual.
            content["data"][:] = [*content["data"], *[None] * ENDPOINTS[name]][: ENDPOINTS[name]]
        left = [content]
        while left:
            value = left.pop()
            if isinstance(value, dict) and "path" in value and "meta" in value and not is_upload(value["path"]):
                raise HTTPException(422, f"the arguments do not fit: {FITTING}")
            left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


class Responses:
    """ASGI middleware that adds `HEADERS` to every response, and `head` to the page.

    What Gradio itself is given as a head comes into the page when its scripts have run: too late for the language that
    its own words are in, which is the browser's, in a page that is English throughout; and not at all for a preview.
    """

    def __init__(self, app: ASGIApp, head: str) -> None:
        self.app, self.head = app, f"<head>{head}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []

        async def change(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if headers.get("content-type", "").startswith("text/html"):
                    held.append(message)
                    return
            elif held:
                message["body"] = message.get("body", b"").replace(b"<head>", self.head, 1)
                headers = MutableHeaders(scope=held[0])
                if "content-length" in headers:
                    headers["content-length"] = str(len(message["body"]))
                await send(held.pop())
            await send(message)

        await self.app(scope, receive, change)


def folder_for_uploads() -> Path:
    """Make a new folder for Gradio, and delete those of runs that were killed: what lies there may be a patient's."""
    parent = Path(os.environ.get(FOLDER, gettempdir()))
    parent.mkdir(parents=True, exist_ok=True)
    for folder in parent.glob(f"{PREFIX}*-*"):
        process = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not (process.isdecimal() and _is_running(int(process))):
            rmtree(folder, ignore_errors=True)
    folder = mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent)
    os.environ[FOLDER] = folder
    return Path(folder)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return process != os.getpid()  # this process has made none yet: a container gives the same number again
