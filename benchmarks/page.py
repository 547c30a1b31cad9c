"""How quick the page is in a browser: start, clicks on examples, 500 files in one go.

    apt-get install chromium; pip install playwright
    python -m benchmarks.page [--weights NAME]

Starts `app.py` in a process of its own, on this machine alone, and drives it with the installed chromium. A click lasts
until the prediction that belongs to it is shown. Prints a table in Markdown.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from hep2.patterns import CLASS_NAMES
from hep2.synthetic import synthetic_files

ROOT = Path(__file__).parents[1]
CLICKS = 30
MANY = 500


def main(argv: list[str] | None = None) -> int:
    """Measure, and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="OWNER/NAME[@revision] or a folder (default: the bundled ones)")
    arguments = parser.parse_args(argv)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("benchmarks.page: there is no chromium: apt-get install chromium", file=sys.stderr)
        return 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/"
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", address.rpartition(":")[2].strip("/")]
    command += ["--weights", arguments.weights] if arguments.weights else []
    started = time.perf_counter()
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(address, server)
        ready = time.perf_counter() - started
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            loaded = []
            network = page.context.new_cdp_session(page)
            network.send("Network.enable")
            network.on("Network.loadingFinished", lambda event: loaded.append(event["encodedDataLength"]))
            page.goto(address)
            page.wait_for_selector("#one-result .name")
            page.wait_for_timeout(2_000)  # what is loaded behind the first view
            weight = sum(loaded) / 1_000
            clicks = [click(page, 7 * number % 30) for number in range(1, CLICKS + 1)]
            many = read_many(page)
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=30)
    print("| page | seconds or kB |\n|---|---|")
    print(f"| from its start to its first answer | {ready:.1f} |")
    print(f"| from a click to the verdict, median of {CLICKS} | {np.median(clicks):.3f} |")
    print(f"| the same, 95th percentile | {np.percentile(clicks, 95):.3f} |")
    print(f"| the first page, kB | {weight:.0f} |")
    print(f"| {MANY} files, from giving them to the table | {many:.1f} |")
    return 0


def wait_for(address: str, server: subprocess.Popen) -> None:
    """Wait until the page answers."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("app.py ended before it answered")


def click(page: Page, number: int) -> float:
    """Click on an example, and return the seconds until its verdict is painted, by the browser's own clock."""
    return page.evaluate(
        """([number, name]) => new Promise((done) => {
          const started = performance.now(), box = document.querySelector("#one-result");
          const seconds = () => done((performance.now() - started) / 1000);
          new MutationObserver((_, observer) => {
            if (box.querySelector(".file")?.textContent !== name) return;
            observer.disconnect();
            requestAnimationFrame(seconds);
          }).observe(box, { childList: true, subtree: true, characterData: true });
          document.querySelectorAll(".examples.cells button")[number].click();
        })""",
        [number, f"{CLASS_NAMES[number // 5]} {number % 5 + 1}"],
    )


def read_many(page: Page) -> float:
    """Give many files at once, and return the seconds until they are counted."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, image, _ in synthetic_files(-(-MANY // len(CLASS_NAMES))):
            paths.append(Path(folder) / name)
            Image.fromarray(image).save(paths[-1])
        page.get_by_role("tab", name="Many cells").click()
        started = time.perf_counter()
        page.locator("#many-upload input[type=file]").first.set_input_files(paths[:MANY])
        page.locator(".counts h2").filter(has_text=f"{MANY} cells").wait_for(timeout=600_000)
        return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
