"""A headless Chromium for tests of pages, over the pipe of its DevTools: no driver and no other package.

    with Browser(tmp_path) as page:
        page.open(address)
        page.wait("document.body.dataset.ready === 'yes'")
        page.click("#lasso")

Every message that the page writes to its console, and every error, is in `page.messages`.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--hide-scrollbars", "--mute-audio",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-features=Translate,MediaRouter",
)  # fmt: skip
KEYS = {
    "Enter": 13,
    "Escape": 27,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "End": 35,
    "Home": 36,
}
MOVE_S = 0.016  # between two places of a finger
SECONDS = 90  # for one answer, also on a loaded machine


class Browser:
    """One page of a headless Chromium; the test is skipped where there is none."""

    def __init__(self, folder: Path, *options: str):
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
        (our_in, out), (inside, our_out) = os.pipe(), os.pipe()
        words = [program, *OPTIONS, *options, f"--user-data-dir={folder / 'chromium'}", "about:blank"]
        # Chromium reads commands from descriptor 3, and writes to 4. The shell puts the pipes there.
        script = f'exec 3<&{inside} 4>&{out}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "chromium", *words], pass_fds=(inside, out), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(inside)
        os.close(out)
        self.reading, self.writing = our_in, our_out
        self.text, self.number, self.session = b"", 0, ""
        self.lifted = 0.0  # when the last finger left, in seconds since 1970
        self.messages: list[str] = []
        self.events: deque[dict] = deque()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self.session = ""
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        os.close(self.reading)
        os.close(self.writing)

    def call(self, method: str, **parameters: Any) -> dict:
        """The result of a method of the DevTools protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        number = self.number
        while True:
            answer = self._next(time.monotonic() + SECONDS)
            assert answer is not None, f"{method}: no answer"
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self, deadline: float) -> dict | None:
        """The next message from the browser; None if there is none before the deadline. Records what consoles say."""
        while b"\0" not in self.text:
            wait = deadline - time.monotonic()
            if wait <= 0 or not select.select([self.reading], [], [], wait)[0]:
                return None
            data = os.read(self.reading, 1 << 20)
            assert data, "the browser has ended"
            self.text += data
        line, self.text = self.text.split(b"\0", 1)
        message = json.loads(line)
        given, kind = message.get("params", {}), message.get("method", "")
        if kind == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(a.get("value", a.get("description"))) for a in given["args"]))
        elif kind == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.messages.append(details.get("exception", {}).get("description", details["text"]))
        elif kind == "Log.entryAdded":
            self.messages.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
        elif kind:
            self.events.append(message)
        return message

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = SECONDS) -> None:
        """Wait until an expression is true in the page."""
        deadline = time.monotonic() + seconds
        while not self.run(f"(() => {{ try {{ return Boolean({condition}); }} catch {{ return false; }} }})()"):
            assert time.monotonic() < deadline, f"never: {condition}; the console says {self.messages}"
            time.sleep(0.05)

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of the element, in view."""
        script = f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: "nearest"}});
            const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})()"""
        x, y = self.run(script)
        return x, y

    def click(self, selector: str) -> None:
        self.wait(f"document.querySelector({json.dumps(selector)})")
        x, y = self.place(selector)
        self.drag([(x, y)])

    def drag(self, path: list[tuple[float, float]]) -> None:
        """Press the mouse at the first place, move along the path, and let go."""
        (x, y), *rest = path
        event = {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **event)
        for x, y in rest:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left", buttons=1)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, **event)

    def touch(self, *fingers: list[tuple[float, float]]) -> None:
        """Put fingers down, move each along its path, and lift them. Paths of a place alone are taps.

        The times that the browser is told are those of a quick hand, so that a slow machine makes no slow fingers.
        """
        steps = max(map(len, fingers))
        start = max(self.lifted, time.time() - steps * MOVE_S)
        for step in range(steps):
            points = [
                {"x": path[min(step, len(path) - 1)][0], "y": path[min(step, len(path) - 1)][1], "id": finger}
                for finger, path in enumerate(fingers)
            ]
            kind = "touchMove" if step else "touchStart"
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=points, timestamp=start + step * MOVE_S)
        self.lifted = start + steps * MOVE_S
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[], timestamp=self.lifted)

    def tap(self, selector: str) -> None:
        self.wait(f"document.querySelector({json.dumps(selector)})")
        self.touch([self.place(selector)])

    def press(self, key: str) -> None:
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        event = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, selector: str, text: str) -> None:
        self.click(selector)
        self.call("Input.insertText", text=text)

    def choose_file(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def size(self, width: int, height: int, dark: bool = False, scale: float = 1, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone, maxTouchPoints=5)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
