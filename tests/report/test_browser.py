"""The page in a real browser: no complaint, no request, values on hover, and hostile names never run."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from synthetic_training import SHAPES, write_ensemble, write_inception
from test_report_page import hostile_run
from test_training_page import hostile_ensemble, hostile_inception

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


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (700, False), (390, False)])
@pytest.mark.parametrize("kind", ["one seed", "nine arms", "ensemble"])
def test_training_page_opens_quietly(browser: Browser, tmp_path: Path, kind: str, width: int, dark: bool) -> None:
    folder = tmp_path / "run"
    if kind == "ensemble":
        write_ensemble(folder)
    else:
        write_inception(folder) if kind == "one seed" else write_inception(folder, tuple(SHAPES), (0, 1, 2))
    path = write_report(folder)[-1]
    browser.open(path, width, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # the list of values stands beside the figure, or below it where there is no room
    plot, readout = browser.evaluate(
        "['.plot', '.readout'].map(name => { const r = document.querySelector(name).getBoundingClientRect();"
        " return [r.left, r.right, r.bottom, r.top] })"
    )
    assert readout[0] >= plot[1] if width > 832 else readout[3] >= plot[2]
    assert plot[1] - plot[0] > (500 if width > 832 else 300)


@pytest.mark.parametrize("width", [1100, 390])
def test_hover_shows_every_arm(browser: Browser, tmp_path: Path, width: int) -> None:
    path = write_report(write_inception(tmp_path / "run", tuple(SHAPES), diverged={"Inception-x5": 4000}))[-1]
    (panel,) = panel_data(path)
    browser.open(path, width)
    final = browser.evaluate(READOUTS)
    assert final[0][0] == "8,000"
    for i in (3, 20):
        point_at(browser, panel, i)
        shown = browser.evaluate(READOUTS)
        assert shown == [[panel["labels"][i], *(curve["text"][i] for curve in panel["curves"])]]
        assert shown[0][-1] == ("diverged" if i == 20 else panel["curves"][-1]["text"][i])
        dots = (
            "[...document.querySelectorAll('.cursor circle')].filter(dot => dot.getAttribute('visibility') != 'hidden')"
        )
        assert browser.evaluate(f"{dots}.length") == (8 if i == 20 else 9)
    browser.move(1, 1)
    assert browser.evaluate(READOUTS) == final
    browser.evaluate("document.getElementById('panel-accuracy').focus()")
    browser.press("Home")
    assert browser.evaluate(READOUTS)[0][0] == "250"
    assert browser.complaints() == []


def test_phone_shows_the_axes_in_full(browser: Browser, tmp_path: Path) -> None:
    path = write_report(write_inception(tmp_path / "run", tuple(SHAPES)))[-1]
    (panel,) = panel_data(path)
    browser.open(path, 390)
    plot, svg = browser.evaluate(
        "['.plot', '.plot svg'].map(name => { const r = document.querySelector(name).getBoundingClientRect();"
        " return [r.left, r.width] })"
    )
    units = browser.evaluate("document.querySelector('.plot svg').viewBox.baseVal.width")
    assert 0.9 < panel["box"][2] / units * svg[1] / plot[1] < 1


@pytest.mark.parametrize("write_folder", [hostile_inception, hostile_ensemble])
def test_hostile_arms_never_run(browser: Browser, tmp_path: Path, write_folder) -> None:
    path = write_report(write_folder(tmp_path / "run"))[-1]
    for width in (1100, 390):
        browser.open(path, width)
        assert "owned" not in browser.evaluate("document.title")
        assert browser.evaluate("document.images.length") == 0
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert browser.complaints() == []
        assert browser.requests() == [path.as_uri()]
