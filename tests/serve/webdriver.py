"""A headless Chromium behind the few calls of W3C WebDriver, and of Chromium's own, that the tests of the page need."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
START_S, WAIT_S = 120, 60
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="needs chromium and chromedriver on PATH"
)


class Browser:
    """One window."""

    def __init__(self, http: httpx.Client, session: str):
        self._http = http
        self._session = session

    def _call(self, path: str, **body: Any) -> Any:
        response = self._http.post(f"/session/{self._session}/{path}", json=body)
        value = response.json()["value"]
        if response.status_code != 200:
            raise AssertionError(f"{path}: {value['error']}: {value['message']}")
        return value

    def open(self, url: str) -> None:
        self._call("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns in the page."""
        return self._call("execute/sync", script=script, args=list(arguments))

    def cdp(self, command: str, **params: Any) -> Any:
        return self._call("goog/cdp/execute", cmd=command, params=params)

    def click(self, css: str) -> None:
        self._call(f"element/{self._find(css)}/click")

    def type(self, css: str, text: str) -> None:
        """Replace the text of a field, key by key."""
        element = self._find(css)
        self._call(f"element/{element}/clear")
        if text:
            self._call(f"element/{element}/value", text=text)

    def text(self, css: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", css)

    def wait(self, condition: str, *arguments: Any) -> Any:
        """The first true value of an expression over `arguments`, looked at once a frame by the page itself."""
        script = """
            const [condition, given, limit, done] = arguments;
            const holds = new Function("given", `return (${condition})`);
            const look = () => {
                const value = holds(given);
                if (value || performance.now() > end) done(value); else requestAnimationFrame(look);
            };
            const end = performance.now() + limit;
            look();"""
        value = self._call("execute/async", script=script, args=[condition, list(arguments), WAIT_S * 1000])
        assert value, f"it did not come to: {condition}"
        return value

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call: "browser" is the console, "performance" the network."""
        return self._call("se/log", type=kind)

    def requested(self) -> set[str]:
        """URLs that the page asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return {one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"}

    def screenshot(self) -> bytes:
        response = self._http.get(f"/session/{self._session}/screenshot")
        return base64.b64decode(response.json()["value"])

    def _find(self, css: str) -> str:
        return self._call("element", using="css selector", value=css)[ELEMENT]


@contextlib.contextmanager
def chromium(*, width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """A fresh Chromium under a chromedriver of its own, both ended with the block."""
    assert CHROMIUM is not None
    assert CHROMEDRIVER is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = subprocess.Popen(
            [CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert driver.stdout is not None
        try:
            port = next(
                found[1] for line in driver.stdout if (found := re.search(r"started successfully on port (\d+)", line))
            )
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_S, trust_env=False) as http:
                options = {
                    "binary": CHROMIUM,
                    "args": [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"],
                }
                wanted = {
                    "browserName": "chrome",
                    "goog:chromeOptions": options,
                    "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
                    "timeouts": {"script": (WAIT_S + 10) * 1000},
                }
                answer = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
                if "sessionId" not in answer:
                    raise AssertionError(f"Chromium did not start: {answer}")
                try:
                    yield Browser(http, answer["sessionId"])
                finally:
                    http.delete(f"/session/{answer['sessionId']}")
        finally:
            driver.terminate()
            driver.wait()
            driver.stdout.close()
