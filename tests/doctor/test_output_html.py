"""``html``: one offline page, in which nothing from the file is more than text."""

import base64
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser, find_chromium

from batchnorm.doctor.examine import Examination
from batchnorm.doctor.output import html
from batchnorm.report.text import NOTHING
from examinations import HOSTILE, healthy, hostile, layer, numbers, usual, whole_file

CHROMIUM = find_chromium()
in_a_browser = [
    pytest.mark.browser,
    # in CI a missing browser is a failure
    pytest.mark.skipif(
        CHROMIUM is None and "CI" not in os.environ, reason="no Chromium on this machine: apt-get install chromium"
    ),
]


class Elements(HTMLParser):
    """Names of all elements, and their text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def words(page: str) -> str:
    return " ".join(Elements(page).text.split())


def test_the_page_says_what_follows_and_what_to_do():
    text = words(html.render(usual()))
    assert "12 errors, 1 warning, 1 info. 13 BN layers examined." in text
    assert "error BN100 missing-statistics layer*.*.bn* (12) Evaluation is wrong. To do: Measure them again." in text
    assert "weight and bias are there, but the running statistics that evaluation needs are not" in text
    assert "BN207 gap needs --model and --data" in text
    assert "nothing found" in words(html.render(healthy())).lower()


def test_numbers_have_few_digits_and_their_thresholds():
    text = words(html.render(numbers()))
    assert (
        f"share {NOTHING} (threshold 0.5); limits {NOTHING}, 1e+300, 3; trained yes; none {NOTHING}; count 12,345"
        in text
    )


def test_what_a_rule_did_not_call_certain_says_so():
    assert "bn1 likely" in words(html.render(usual()))


def test_long_tables_are_cut_and_the_rest_counted():
    examination = Examination("net.pt", [layer(f"bn{i}") for i in range(1234)], [], [])
    page = html.render(examination)
    assert page.count('<th scope="row">') == html.MOST_ROWS
    assert "and 234 more" in words(page)


@pytest.mark.parametrize("make", [usual, healthy, numbers, hostile])
def test_the_same_input_gives_the_same_bytes(make):
    assert html.render(make()) == html.render(make())


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name: str):
    ours, theirs = (Elements(html.render(whole_file(each))) for each in ("net.pt", name))
    assert theirs.names == ours.names
    assert theirs.attributes == ours.attributes
    assert not {"script", "img", "svg", "a"} & theirs.names
    assert "49" not in theirs.text


def test_a_page_of_hostile_names_has_no_unprintable_character_and_no_flood():
    page = html.render(hostile())
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", page)
    assert len(page) < 200_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def written(folder: Path, page: str) -> Path:
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    return path


class TestInABrowser:
    pytestmark = in_a_browser

    @pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (400, False)])
    @pytest.mark.parametrize("make", [usual, numbers, hostile])
    def test_it_opens_quietly_and_fits(self, browser: Browser, tmp_path: Path, make, width: int, dark: bool):
        path = written(tmp_path, html.render(make()))
        browser.open(path, width, dark=dark)
        browser.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert browser.complaints() == []
        assert browser.requests() == [path.as_uri()]
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")

    def test_no_script_of_a_hostile_file_runs(self, browser: Browser, tmp_path: Path):
        path = written(tmp_path, html.render(hostile()))
        browser.call("Debugger.enable")
        browser.open(path)
        assert [script for script in browser.seen("Debugger.scriptParsed") if script["url"] == path.as_uri()] == []
        browser.call("Debugger.disable")
        assert browser.evaluate("document.title") == f"batchnorm doctor: {len(HOSTILE)} errors"
        assert browser.evaluate("document.scripts.length + document.images.length + document.links.length") == 0
        assert browser.complaints() == []

    def test_the_policy_blocks_a_script_that_got_in(self, browser: Browser, tmp_path: Path):
        image = "data:image/png;base64," + base64.b64encode(b"no image").decode()
        attack = f"<script>document.title = 'owned'</script><img src='{image}' onerror=\"document.title = 'owned'\">"
        path = written(tmp_path, html.render(usual()).replace("</main>", f"{attack}</main>"))
        browser.open(path)
        assert browser.evaluate("document.title") != "owned"
        assert browser.complaints()

    def test_what_is_folded_is_printed(self, browser: Browser, tmp_path: Path):
        browser.open(written(tmp_path, html.render(usual())))
        height = "document.querySelector('details').getBoundingClientRect().height"
        folded = browser.evaluate(height)
        browser.call("Emulation.setEmulatedMedia", media="print")
        assert browser.evaluate(height) > 2 * folded
        browser.call("Emulation.setEmulatedMedia", media="")
