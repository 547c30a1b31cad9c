"""Many callers at once; `python -m pytest -m load -s` runs it and prints what it measured (some minutes)."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from conftest import serving_page
from page_api import call, upload

pytestmark = pytest.mark.load
CELL = Path("examples/Golgi/1.png").read_bytes()


def client(address: str, requests: int) -> list[tuple[str, object]]:
    with httpx2.Client(base_url=address, timeout=300) as web:
        image = upload(web, "cell.png", CELL)
        return [call(web, "classify", image) for _ in range(requests)]


def resident_megabytes(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def test_64_clients_with_20_requests_each_are_all_answered():
    with serving_page() as page:
        # The memory to compare with is that under the same 64 clients.
        with ThreadPoolExecutor(64) as pool:
            list(pool.map(lambda _: client(page.address, 3), range(64)))
        early = resident_megabytes(page.process.pid)
        started = time.perf_counter()
        with ThreadPoolExecutor(64) as pool:
            asked = [pool.submit(client, page.address, 20) for _ in range(64)]
            # Meanwhile the page itself stays usable.
            with httpx2.Client(base_url=page.address, timeout=300) as web:
                visits = []
                while not all(future.done() for future in asked):
                    begun = time.perf_counter()
                    assert web.get("/").status_code == 200
                    visits.append(time.perf_counter() - begun)
                    time.sleep(0.5)
            answers = [answer for future in asked for answer in future.result()]
        seconds = time.perf_counter() - started
        assert len(answers) == 64 * 20
        assert all(kind == "complete" and data[0]["verdict"] == "Golgi" for kind, data in answers)
        assert len({json.dumps(data) for _, data in answers}) == 1
        client(page.address, 2_000 - 64 * 3 - 64 * 20)
        late = resident_megabytes(page.process.pid)
        print(f"\n{len(answers) / seconds:.0f} requests/s; slowest visit of the page meanwhile {max(visits):.1f} s")
        print(f"memory after 200 requests {early:.0f} MB, after 2,000 {late:.0f} MB")
        assert late < 1.1 * early


def test_beyond_the_queues_bound_a_caller_is_told_that_the_page_is_busy():
    with serving_page() as page, httpx2.Client(base_url=page.address, timeout=300) as web:
        image = upload(web, "cell.png", CELL)

        def push(_) -> httpx2.Response:
            return httpx2.post(f"{page.address}gradio_api/call/classify", json={"data": [image]}, timeout=300)

        with ThreadPoolExecutor(64) as pool:
            pushed = list(pool.map(push, range(1_200)))
        busy = [answer for answer in pushed if answer.status_code != 200]
        print(f"\n{len(busy)} of {len(pushed)} were told that the page is busy")
        assert busy
        assert all(answer.status_code == 503 and "queue is full" in answer.text.lower() for answer in busy)
        # The queue empties, and the next caller is answered.
        for _ in range(120):
            if push(None).status_code == 200:
                break
            time.sleep(1)
        assert call(web, "classify", image)[0] == "complete"
