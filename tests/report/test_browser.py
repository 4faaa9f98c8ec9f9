"""The page in a real browser: no complaint, no request, values on hover, and hostile names never run."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from test_report_page import hostile_run

from batchnorm.report import write_report

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.browser,
    # in CI a missing browser is a failure
    pytest.mark.skipif(
        CHROMIUM is None and "CI" not in os.environ, reason="no Chromium on this machine: apt-get install chromium"
    ),
]
READOUTS = (
    "[...document.querySelectorAll('.readout')].map(list => [...list.querySelectorAll('dd')].map(d => d.textContent))"
)
LINES = "[...document.querySelectorAll('.cursor')].map(g => g.getAttribute('visibility'))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def panel_data(path: Path) -> list[dict]:
    return json.loads(re.search(r'id="figure-data">(.*?)</script>', path.read_text()).group(1))


def point_at(browser: Browser, panel: dict, i: int) -> None:
    """Move the mouse over the i-th evaluation of a panel, in the middle of its height."""
    selector = json.dumps(f"#{panel['id']} .plot svg")
    browser.evaluate(f"document.querySelector({selector}).scrollIntoView({{block: 'center'}})")
    left, top, width, height, units = browser.evaluate(
        f"(() => {{ const svg = document.querySelector({selector}), r = svg.getBoundingClientRect();"
        " return [r.x, r.y, r.width, r.height, svg.viewBox.baseVal.width] })()"
    )
    browser.move(left + panel["x"][i] * width / units, top + height / 2)


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (400, False)])
@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_page_opens_quietly(
    browser: Browser, run_folder: Path, sweep_folder: Path, kind: str, width: int, dark: bool
) -> None:
    path = write_report(run_folder if kind == "run" else sweep_folder)[-1]
    browser.open(path, width, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate("document.documentElement.classList.contains('scripted')")
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


@pytest.mark.parametrize("width", [1100, 400])
def test_hover_shows_the_values_of_every_panel(browser: Browser, run_folder: Path, width: int) -> None:
    path = write_report(run_folder)[-1]
    panels = panel_data(path)
    browser.open(path, width)
    final = browser.evaluate(READOUTS)
    assert final[0][0] == "50,000"
    assert browser.evaluate(LINES) == ["hidden"] * 3
    for i in (len(panels[1]["x"]) // 2, 30):
        point_at(browser, panels[1], i)
        expected = [[panel["labels"][i], *(curve["text"][i] for curve in panel["curves"])] for panel in panels]
        assert browser.evaluate(READOUTS) == expected
        assert browser.evaluate(LINES) == ["visible"] * 3
        assert browser.evaluate("document.querySelector('#panel-b .cursor line').getAttribute('x1')") == str(
            panels[1]["x"][i]
        )
    browser.move(1, 1)
    assert browser.evaluate(READOUTS) == final
    assert browser.evaluate(LINES) == ["hidden"] * 3
    assert browser.complaints() == []


def test_arrow_keys_show_values(browser: Browser, run_folder: Path) -> None:
    path = write_report(run_folder)[-1]
    browser.open(path)
    browser.evaluate("document.getElementById('panel-a').focus()")
    for key, step in (
        ("ArrowLeft", "48,000"),
        ("Home", "0"),
        ("ArrowLeft", "0"),
        ("ArrowRight", "100"),
        ("End", "50,000"),
    ):
        browser.press(key)
        assert browser.evaluate(READOUTS)[0][0] == step


def test_hover_on_a_sweep(browser: Browser, sweep_folder: Path) -> None:
    path = write_report(sweep_folder)[-1]
    panels = panel_data(path)
    browser.open(path)
    point_at(browser, panels[0], 0)
    assert browser.evaluate(READOUTS)[0] == ["0.01", "97.41 % (97.16 to 97.66)", "23.76 % (23.51 to 24.01)"]


def test_page_without_script_shows_the_final_values(browser: Browser, run_folder: Path) -> None:
    path = write_report(run_folder)[-1]
    browser.open(path, script=False)
    text = browser.call("DOM.getOuterHTML", nodeId=browser.call("DOM.getDocument", depth=-1)["root"]["nodeId"])[
        "outerHTML"
    ]
    assert 'class="scripted"' not in text
    assert "<dd>50,000</dd>" in text
    assert browser.complaints() == []


def test_hostile_names_never_run(browser: Browser, tmp_path: Path) -> None:
    path = write_report(hostile_run(tmp_path / "run"))[-1]
    browser.open(path)
    assert browser.evaluate("document.title") == "MNIST with and without batch normalization: not reproduced"
    assert browser.evaluate("document.images.length") == 0
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]


def test_policy_blocks_a_script_that_is_not_ours(browser: Browser, run_folder: Path) -> None:
    path = write_report(run_folder)[-1]
    page = path.read_text().replace("</main>", "<script>document.title = 'owned'</script></main>")
    path.write_text(page.replace("</footer>", '<img src="https://example.com/x.png"></footer>'))
    browser.open(path)
    assert browser.evaluate("document.title") != "owned"
    assert len(browser.complaints()) >= 2
