"""The page finds the objects of an uploaded picture once, and draws them again when the threshold is moved."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

from solq import Predictor
from solq.commands import demo
from solq.commands.settings import DemoConfig

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent from tests


@dataclass
class Page:
    """A page that is being served, and how often its model has run."""

    predictor: Predictor
    url: str = ""
    calls: int = 0

    def count(self, *_: Any) -> None:
        self.calls += 1


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install solq[demo]")
    model = tiny.solq_model()
    page = Page(Predictor(model, device="cpu"))
    model.register_forward_pre_hook(page.count)
    blocks = demo.build_page(page.predictor, 0.3)
    _, page.url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield page
    blocks.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return tiny.write_image(tmp_path / "noise.png", (48, 64))


def above(page: Page, picture: Path, threshold: float) -> int:
    detections = page.predictor(picture, threshold=threshold)
    return len(detections)


def test_threshold_does_not_run_the_model_again(page: Page, picture: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(page.url, verbose=False)
    before = page.calls
    drawn, table = client.predict(handle_file(str(picture)), 0.05, api_name="/find")
    assert page.calls == before + 1
    fewer_drawn, fewer = client.predict(0.6, api_name="/show")
    assert page.calls == before + 1
    assert len(table["data"]) == above(page, picture, 0.05) > len(fewer["data"]) == above(page, picture, 0.6)
    name, score, *box = table["data"][0]
    assert name in ("disc", "ring", "star")
    assert 0 < score <= 1
    assert len(box) == 4
    with Image.open(drawn) as image, Image.open(fewer_drawn) as other:
        assert image.size == other.size == (480, 360)
        assert image.tobytes() != other.tobytes()


def test_damaged_picture(page: Page, picture: Path, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:4000])
    with pytest.raises(AppError, match=r"half.png cannot be read as an image"):
        Client(page.url, verbose=False).predict(handle_file(str(tmp_path / "half.png")), 0.3, api_name="/find")


def test_in_a_browser(page: Page, picture: Path) -> None:
    """Upload, look, move the slider, look again: in headless Chromium."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no browser: neither Chromium nor Chrome is installed with its chromedriver")
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        wait = WebDriverWait(driver, 120)
        driver.get(page.url)
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "input[type=file]"))
        before = page.calls
        driver.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(picture))
        shown = wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#result img"))[0].get_attribute("src")
        assert page.calls == before + 1
        number = driver.find_element(By.CSS_SELECTOR, "#threshold input[type=number]")
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys("0.9", Keys.ENTER)
        wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "#result img").get_attribute("src") != shown)
        assert page.calls == before + 1
        if folder := os.environ.get("SOLQ_SCREENSHOTS"):
            driver.save_screenshot(str(Path(folder) / "demo.png"))
    finally:
        driver.quit()


def test_threshold_out_of_range(page: Page) -> None:
    with pytest.raises(ValueError, match=r"threshold is 2, must be in 0.05\.\.1"):
        demo.build_page(page.predictor, 2)


def test_port_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"port is 99999, must be in 1\.\.65535"):
        demo.demo(DemoConfig(tmp_path / "model.safetensors", port=99999))


def test_without_gradio(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install solq\[demo\]"):
        demo.build_page(page.predictor)
