"""A headless Chromium, driven by its DevTools protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1 "
    "--remote-allow-origins=* --remote-debugging-port=0 --window-size=1280,900"
).split()


class Page:
    """One tab."""

    def __init__(self, socket):
        self._socket, self._numbers, self.requests, self.errors = socket, itertools.count(1), [], []
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := json.loads(self._socket.recv())).get("id") != number:
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"][:200])
            elif message["method"] == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
        assert "error" not in message, message
        return message["result"]

    def open(self, path: Path) -> None:
        address = path.resolve().as_uri()
        self.call("Page.navigate", url=address)
        wait_for(lambda: self.run("document.readyState + location.href") == f"complete{address}")

    def run(self, script: str):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def mouse(self, selector: str, *kinds: str) -> None:
        """Real events of the mouse in the middle of an element."""
        self.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
        box = self.run(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in kinds:
            self.call("Input.dispatchMouseEvent", type=kind, **place, button="left", clickCount=1)

    def click(self, selector: str) -> None:
        self.mouse(selector, "mousePressed", "mouseReleased")


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@contextmanager
def open_browser(folder: Path):
    """A Page, or the test is skipped where there is no browser."""
    websocket = pytest.importorskip("websocket", reason="needs the package websocket-client")
    program = next((found for found in map(shutil.which, NAMES) if found), None)
    if program is None:
        pytest.skip("needs a Chromium (Debian: apt-get install chromium)")
    port_file, log = folder / "profile" / "DevToolsActivePort", folder / "browser.log"
    command = [program, *FLAGS, f"--user-data-dir={port_file.parent}", "about:blank"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_for(lambda: process.poll() is not None or port_file.is_file() and port_file.read_text().strip())
        assert process.poll() is None, log.read_text()
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=20) as answer:
            tab = next(entry for entry in json.load(answer) if entry["type"] == "page")
        socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=30)
        yield Page(socket)
        socket.close()
    finally:
        process.terminate()
        process.wait(20)
