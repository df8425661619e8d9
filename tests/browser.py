"""A page in a real browser: chromium, headless, spoken to through a pipe in the DevTools protocol.

    with Browser() as browser:
        page = browser.open(path)
        page.evaluate("document.title")
        page.troubles          # what the console said, errors that were not caught, requests that were refused

No package is needed for it, and no port: messages are JSON, ended by a 0 byte, on the file descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any


NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60.0  # seconds


def chromium() -> str | None:
    """Where one is installed; the variable CHROMIUM names another."""
    return os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    def __init__(self, dark: bool = False) -> None:
        self.dark = dark

    def __enter__(self) -> Browser:
        command = chromium()
        assert command is not None
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        arguments = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *(f"--user-data-dir={self.folder.name}", "--remote-debugging-pipe", "about:blank"),
        ]
        # The shell puts the pipes where the browser looks for them.
        line = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", line, "bash", command, *arguments],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._sent = b"", 0
        self.events: list[dict[str, Any]] = []
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self._write)
        os.close(self._read)
        self.folder.cleanup()

    def open(self, path: Path, width: int = 1200, height: int = 900) -> Page:
        target = self.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.ask("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        page.ask("Emulation.setEmulatedMedia", {"features": [scheme]})
        page.ask("Page.navigate", {"url": path.resolve().as_uri()})
        page.wait_for("Page.loadEventFired")
        return page

    def ask(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None) -> Any:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number = self._sent
        while True:
            answer = self.read()
            if answer.get("id") != number:
                self.events.append(answer)
                continue
            assert "error" not in answer, answer
            return answer["result"]

    def read(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            found = os.read(self._read, 2**20) if ready else b""
            if not found:
                raise TimeoutError("the browser says nothing")
            self._buffer += found
        own, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(own)
        return message


class Page:
    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def ask(self, method: str, parameters: dict[str, Any] | None = None) -> Any:
        return self.browser.ask(method, parameters, self.session)

    def wait_for(self, event: str) -> None:
        while not any(self._own(event)):
            self.browser.events.append(self.browser.read())

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page, by the debugger: its content security policy does not hold here."""
        answer = self.ask("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key, on what has the focus."""
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", {"type": kind, "key": key, "text": text if kind == "keyDown" else ""})

    def click(self, selector: str) -> None:
        """By the mouse, in the middle of what is found first."""
        x, y = self.evaluate(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            "found.scrollIntoView({block: 'center'});"
            "const r = found.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1})

    def screenshot(self, path: Path) -> None:
        found = self.ask("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(found["data"]))

    def printed(self, path: Path) -> None:
        """As PDF."""
        path.write_bytes(base64.b64decode(self.ask("Page.printToPDF")["data"]))

    @property
    def troubles(self) -> list[str]:
        self.evaluate("0")  # what was said before is read
        found = [
            *self._own("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"),
            *self._own("Network.loadingFailed"),
        ]
        return [json.dumps(event["params"]) for event in found]

    @property
    def requests(self) -> list[str]:
        """Of what the page asked for, itself aside."""
        self.evaluate("0")
        urls: list[str] = [event["params"]["request"]["url"] for event in self._own("Network.requestWillBeSent")]
        return urls[1:]

    def _own(self, *names: str) -> list[dict[str, Any]]:
        return [e for e in self.browser.events if e.get("method") in names and e.get("sessionId") == self.session]
