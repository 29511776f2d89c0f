"""A small store of true runs, MLflow's server of it, and a headless browser, where `make test-ui` asks for them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from benchmarks.demo_store import QUICK, make
from tests.waiting import HANG_S, free_port, until
from trainer.tracking.pages import server

NO_ASSISTANT = """const settings = {"panelOpen_v1": "false", "fab.autoOpenedOnFirstLoad_v1": "true"};
for (const [name, value] of Object.entries(settings))
    localStorage.setItem("mlflow.assistant." + name, value)"""
"""MLflow opens its chat beside the page at the first visit, which takes a quarter of it."""

DOWN = "for (const e of document.querySelectorAll('*')) if (e.scrollHeight > e.clientHeight + 50) e.scrollTop += 400"


@pytest.fixture(scope="session")
def shots() -> Path:
    """The folder of the screenshots. Where it is named, as in `make test-ui`, what is missing is an error."""
    folder = os.environ.get("AMBIENT_TEST_UI")
    if folder is None:
        pytest.skip("no browser was asked for: `make test-ui` installs one and drives MLflow's pages with it")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


@pytest.fixture(scope="session")
def run_dirs(shots: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Trained, evaluated, and in one store."""
    return make(tmp_path_factory.mktemp("demo"), QUICK, at_once=2)


@pytest.fixture(scope="session")
def base(run_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server, which is started as a user is told to."""
    port = free_port()
    folder = tmp_path_factory.mktemp("server")
    with (folder / "log").open("w") as log:
        command = shlex.split(server(run_dirs[0].parent / "mlflow.db", port))
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: _answers(address, process), "an answer of MLflow's server")
        yield address
    finally:
        process.terminate()
        process.wait(HANG_S)


def _answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "MLflow's server ended"
    try:
        return urlopen(f"{address}/health", timeout=60).status == 200
    except (URLError, OSError):
        return False


@dataclass(frozen=True)
class Browser:
    """driver: selenium's. shots: where screenshots go."""

    driver: Any
    shots: Path

    def open(self, address: str, xpath: str) -> Any:
        """Loads a page anew, and waits for what has to be there."""
        self.driver.get("about:blank")  # another fragment of one address alone would load nothing
        self.driver.get(address)
        return self.find(xpath)

    def find(self, xpath: str) -> Any:
        """The first element that is to be seen, once one is."""
        return until(lambda: [element for element in self.all(xpath) if element.is_displayed()], xpath)[0]

    def all(self, xpath: str) -> list[Any]:
        return self.driver.find_elements("xpath", xpath)

    def show(self, xpath: str) -> Any:
        """Scrolls down until it is there: what is below the window is not drawn."""

        def found() -> list[Any]:
            self.driver.execute_script(DOWN)
            return self.all(xpath)

        element = until(found, xpath)[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        return element

    def shoot(self, name: str) -> None:
        self.driver.save_screenshot(str(self.shots / f"{name}.png"))


@pytest.fixture(scope="session")
def browser(shots: Path, base: str) -> Iterator[Browser]:
    from selenium import webdriver

    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    assert all(programs), "chromium and chromedriver are not here: tests/ui/browser.sh installs them"
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,1100"):
        options.add_argument(flag)
    options.binary_location = str(programs[0])
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(programs[1])))
    try:
        driver.get(f"{base}/health")
        driver.execute_script(NO_ASSISTANT)
        yield Browser(driver, shots)
    finally:
        driver.quit()
