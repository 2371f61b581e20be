"""A page in headless Chromium, driven over its DevTools protocol through two pipes: no network, no driver, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe")
SECONDS = 60.0


class Browser:
    """One Chromium with one page; its requests, and what its console and its security policy said, are kept.

    Raises:
        RuntimeError: Chromium is not installed.
    """

    def __init__(self) -> None:
        found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if found is None:
            raise RuntimeError("these tests need Chromium: apt-get install chromium (`.ci/run` does)")
        self.profile = tempfile.mkdtemp(prefix="fxopt-chromium-")
        mine, theirs = os.pipe(), os.pipe()  # (read, write): commands go through the first, answers come through the second
        # the protocol is spoken on file descriptors 3 and 4
        command = f'exec "$@" 3<&{mine[0]} 4>&{theirs[1]}'
        self.process = subprocess.Popen(["bash", "-c", command, "bash", found, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
                                        pass_fds=(mine[0], theirs[1]), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(mine[0])
        os.close(theirs[1])
        self.out, self.into = theirs[0], mine[1]
        self.number, self.rest, self.session = 0, b"", None
        self.requests: list[str] = []
        self.failed: list[tuple[str, str]] = []  # (url, why it was blocked) of those that came to nothing
        self.urls: dict[str, str] = {}
        self.said: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.send(f"{domain}.enable")
        self.send("Performance.enable", timeDomain="threadTicks")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command; events that come before its answer are looked at."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.into, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == self.number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while True:
            while b"\0" in self.rest:
                part, _, self.rest = self.rest.partition(b"\0")
                message = json.loads(part)
                self._event(message)
                if wanted(message):
                    return message
            if not select.select([self.out], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium said nothing for {SECONDS} s")
            more = os.read(self.out, 1 << 20)
            if not more:
                raise RuntimeError(f"Chromium ended with {self.process.wait(SECONDS)}")
            self.rest += more

    def _event(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
            self.urls[parameters["requestId"]] = parameters["request"]["url"]
        elif method == "Network.loadingFailed":
            self.failed.append((self.urls.get(parameters["requestId"], "?"), parameters.get("blockedReason", "")))
        elif method == "Log.entryAdded":
            self.said.append(parameters["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.said.append(details.get("exception", {}).get("description", details["text"]))

    def open(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of this size, and wait until it is loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address)
        end = time.monotonic() + SECONDS
        while self.run("document.readyState") != "complete" or self.run("location.href").startswith("about:"):
            if time.monotonic() > end:
                raise TimeoutError(f"{address} is not loaded after {SECONDS} s")
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", "an exception"))
        return found["result"].get("value")

    def busy(self) -> float:
        """Seconds that the page's main thread has computed (not waited for a core) since Chromium began to count; less after it began anew."""
        return next(metric["value"] for metric in self.send("Performance.getMetrics")["metrics"] if metric["name"] == "TaskDuration")

    def key(self, name: str) -> None:
        """Press and release a key."""
        typed = {"text": name} if len(name) == 1 else {"text": "\r"} if name == "Enter" else {}
        code = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9}.get(name, ord(name[0]))
        self.send("Input.dispatchKeyEvent", type="keyDown", key=name, windowsVirtualKeyCode=code, **typed)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    def picture(self, file: Path) -> None:
        """A screenshot as PNG."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for each in (self.into, self.out):
            os.close(each)
        shutil.rmtree(self.profile, ignore_errors=True)
