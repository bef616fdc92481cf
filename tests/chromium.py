"""Headless Chromium for tests: Debian's, driven by selenium."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = None if BROWSER and DRIVER else "Chromium is not installed: apt-get install chromium chromium-driver"
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


@contextmanager
def opened(profile: Path, width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A driver with a new profile in ``profile``; its console log can be read."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """A page in the browser, of whatever program."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def load(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """From an empty page; below a width of 600 on a phone."""
        self.look(width, height, dark)
        self.driver.get("about:blank")
        self.driver.get(address)

    def look(self, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def js(self, expression: str) -> Any:
        return self.driver.execute_script(f"return {expression}")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + 60
        while not self.js(condition):
            assert time.monotonic() < end, f"never: {condition}\n{self.js('document.body.innerText')}"
            time.sleep(0.02)

    def texts(self, selector: str) -> list[str]:
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent)")

    def text(self, selector: str) -> str:
        [text] = self.texts(selector)
        return text

    def count(self, selector: str) -> int:
        return len(self.texts(selector))

    def click(self, selector: str) -> None:
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, key: str, shift: bool = False) -> None:
        """As the keyboard would, wherever the focus is."""
        code = {"Escape": 27, "Enter": 13, "Tab": 9}.get(key, 0)
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        if text := {"Enter": "\r"}.get(key, key if len(key) == 1 else ""):
            event["text"] = text
        for kind in ("keyDown", "keyUp"):
            self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, **event})
