"""A browser without a screen, for the tests of pages."""

import shutil
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    """Chromium, driven by Selenium. A test that needs it is skipped where it is not installed."""
    from selenium import webdriver

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium with its driver is installed (on Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def show_as_on_a_phone(browser, width: int, scheme: str = "light") -> None:
    """Gives the browser a phone's screen, and the wish for a light or a dark page."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    phone = {"width": width, "height": 600, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)


def page_width(browser) -> int:
    """The page's width in pixels. If it is more than the screen's, the page scrolls sideways."""
    return browser.execute_script("return document.documentElement.scrollWidth")
