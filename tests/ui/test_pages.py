"""MLflow's pages as a user of a lab sees them: which run is better, and what it draws."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.ui.conftest import Browser, until
from trainer.reports.record import NAME
from trainer.tracking.pages import SHOWN, compare_page, run_page, run_table

pytestmark = pytest.mark.ui


def evaluation_of(run_dir: Path) -> dict[str, Any]:
    """As the evaluation wrote it, apart from MLflow."""
    (path,) = run_dir.glob(f"evaluation/*/{NAME}")
    return json.loads(path.read_text())


def value(run_dir: Path, metric: str) -> float:
    return evaluation_of(run_dir)["metrics"][metric]


@pytest.mark.parametrize("metric", ["quality/kid", "memorization/noise_auc"])
def test_the_table_sorts_runs_by_what_was_measured(
    browser: Browser, base: str, run_dirs: list[Path], metric: str
) -> None:
    address = run_table(run_dirs[0], base)
    browser.open(address, f"//*[@role='columnheader']//*[text()='{metric}']")
    best = sorted(run_dirs, key=lambda run_dir: value(run_dir, metric))

    def column(name: str) -> list[str]:
        cells = browser.all(f"//*[@role='gridcell'][contains(@col-id, '{name}')]")
        return [cell.text for cell in sorted(cells, key=lambda cell: cell.location["y"])]

    def ordered() -> bool:
        shown = [float(text) for text in column(metric) if text]
        return len(shown) == len(best) and all(
            abs(a - value(b, metric)) < 1e-4 for a, b in zip(shown, best, strict=True)
        )

    for _ in range(2):  # the view itself is by quality; a click on a heading sorts, and one more turns it round
        if metric != SHOWN[0]:
            browser.find(f"//*[@role='columnheader']//*[text()='{metric}']").click()
        with suppress(AssertionError):
            until(ordered, "order", 60)
            break
    until(ordered, f"order by {metric}, smallest first", 60)
    browser.shoot(f"runs by {metric.replace('/', ' ')}")
    names = [text.splitlines()[-1] for text in column("Run Name") if text]
    assert [value(run_dirs[0].parent / name, metric) for name in names] == [value(run_dir, metric) for run_dir in best]


def test_the_compare_page_has_a_chart_every_run_and_the_metrics(
    browser: Browser, base: str, run_dirs: list[Path]
) -> None:
    browser.open(compare_page(run_dirs, base), f"//*[contains(text(), 'Comparing {len(run_dirs)} Runs')]")
    browser.find("//*[contains(@class, 'js-plotly-plot')]//*[name()='svg']")
    browser.shoot("compare")
    for run_dir in run_dirs:
        browser.find(f"//*[text()='{run_dir.name}']")
    browser.show("//*[text()='denoiser_error_by_sigma/0.25']")
    browser.shoot("compare figures")


def test_a_run_s_samples_can_be_leafed_through(browser: Browser, base: str, run_dirs: list[Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    ours = run_dirs[-1]
    browser.open(run_page(ours, "model-metrics", base), "//*[text()='Auto-refresh']")
    card = "//*[@data-testid='experiment-view-compare-runs-card'][.//*[text()='samples']]"
    browser.show(card)
    steps = sorted(int(path.stem.removeprefix("step-")) for path in (ours / "samples").glob("*.png"))
    assert len(steps) == 3
    for step in steps:  # the slider begins at 0, where there is none
        browser.find(f"{card}//*[@role='slider']").send_keys(Keys.ARROW_RIGHT)
        image = browser.find(f"{card}//img[contains(@src, 'step%2B{step}%2B')]")
        until(lambda image=image: browser.driver.execute_script("return arguments[0].naturalWidth", image), "pixels")
        browser.driver.execute_script("arguments[0].scrollIntoView()", image)
    browser.shoot("samples")


def test_the_report_opens_beside_a_run_s_files(browser: Browser, base: str, run_dirs: list[Path]) -> None:
    ours = run_dirs[-1]
    browser.open(run_page(ours, "artifacts", base), "//*[text()='evaluation']").click()
    browser.find("//*[starts-with(text(), 'step-')]").click()
    browser.find("//*[text()='report.html']").click()
    browser.driver.switch_to.frame(browser.find("//iframe"))
    try:
        browser.find(f"//table//th[text()='{ours.name}']")
        assert f"{value(ours, 'quality/kid'):.4g}" in browser.find("//table//tr[td='KID']").text
        widths = browser.driver.execute_script("return [...document.images].map(image => image.naturalWidth)")
        assert len(widths) > 5
        assert all(width > 0 for width in widths)
    finally:
        browser.driver.switch_to.default_content()
    browser.shoot("report")
