"""The page in a real browser: headless Chromium writes, stops, moves sliders, makes mistakes, in both themes.

Screenshots go to the folder that CHARRNN_SCREENSHOTS names, else to a temporary one.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tiny_models import CHARS, write_model

from charrnn.vocab import Vocab
from infer.engine import Engine

pytest.importorskip("gradio", reason="the extra ui is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("chromium or chromedriver is not on the path", allow_module_level=True)

from selenium.common.exceptions import TimeoutException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from infer.page_models import Models  # noqa: E402
from infer.ui import build_page, launch_options  # noqa: E402

PATIENCE_S = 10
PARTS = (
    "#go",
    "#prompt textarea",
    "#seed textarea, #seed input",
    "#model input",
    "#length input[type=number]",
    "#paper p",
)
LOOPBACK = {"127.0.0.1", "localhost", "::1", None}
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
HOSTILE = '<img src=x onerror="document.title=1">${1+1}{{value}}&amp;"\''

# Every place that the parts of the first tab take while frames go by, as one string a place.
WATCH = """
window.places = new Set();
(function look() {
  const ids = ['model', 'prompt', 'go', 'stop', 'paper', 'length', 'seed'];
  window.places.add(JSON.stringify(ids.map((id) => {
    const box = document.getElementById(id).getBoundingClientRect();
    return [id, box.x, box.y + scrollY, box.width, box.height].map((v) => v.toFixed ? Math.round(v) : v);
  })));
  requestAnimationFrame(look);
})();
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, one that takes half a minute for the longest text, one of bytes, and a damaged file."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "small.onnx")
    write_model(folder / "slow.onnx", CHARS, hidden_dim=768, num_layers=3)
    (folder / "run").mkdir()
    write_model(folder / "run" / "bytes.onnx", Vocab.of_bytes())
    (folder / "broken.onnx").write_bytes(b"not a model")
    return folder


@pytest.fixture(scope="module")
def asked() -> Iterator[list[str]]:
    """The hosts that this process looked up or connected to."""
    hosts: list[str] = []
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def noted_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        hosts.append(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *args, **kwargs)

    def noted_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            hosts.append(address[0])
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", noted_look_up)
        patch.setattr(socket.socket, "connect", noted_connect)
        yield hosts


@pytest.fixture(scope="module")
def url(folder: Path, asked: list[str]) -> Iterator[str]:
    page = build_page(Models(folder / "small.onnx", folder))
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
    yield url
    page.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("CHARRNN_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as its reader sees it."""

    def __init__(self, browser: Any, url: str, shots: Path) -> None:
        self.browser, self.url, self.shots = browser, url, shots

    def open(self, theme: str = "light", size: dict[str, Any] = DESK) -> "Page":
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.get(f"{self.url}?__theme={theme}")
        self.until(lambda: all(self.all(css) for css in PARTS))
        return self

    def until(self, holds: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, PATIENCE_S, poll_frequency=0.05).until(lambda _: holds())

    def js(self, script: str, *values: Any) -> Any:
        return self.browser.execute_script(script, *values)

    def all(self, css: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return self.js("return document.querySelector(arguments[0])?.innerText ?? ''", css)

    def click(self, css: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, css).click()

    def tab(self, name: str) -> None:
        self.js("scrollTo(0, 0)")
        next(tab for tab in self.all("button[role=tab]") if tab.text == name).click()

    def put(self, css: str, text: str) -> None:
        field = self.browser.find_element(By.CSS_SELECTOR, css)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.DELETE, Keys.TAB)

    def choose(self, model: str) -> None:
        """Once more if a choice is lost: one that meets the list's renewal after a page's load can be."""
        before = self.text("#about")
        for _ in range(3):
            self.click("#model input")
            options = self.until(lambda: self.all("[role=option]"))
            wanted = [option for option in options if option.text.endswith(model)]
            (wanted or options)[0].click()
            if wanted and self.holds_within(2, lambda: self.text("#about") != before):
                return
        raise AssertionError(f"{model} could not be chosen")

    def holds_within(self, seconds: float, holds: Callable[[], Any]) -> bool:
        try:
            WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(lambda _: holds())
        except TimeoutException:
            return False
        return True

    def write(self, length: int, seed: str = "1") -> None:
        self.put("#length input[type=number]", str(length))
        self.put("#seed textarea, #seed input", seed)
        self.click("#go")

    def chars(self) -> int:
        count = self.text("#figures .figures span")
        return int(count.split()[0].replace(",", "")) if count else 0

    def paper(self) -> str:
        return self.js("return document.querySelector('#paper .prompt')?.parentElement.textContent ?? ''").strip()

    def shot(self, name: str) -> None:
        self.browser.save_screenshot(str(self.shots / f"{name}.png"))


@pytest.fixture
def page(browser: Any, url: str, shots: Path) -> Page:
    return Page(browser, url, shots).open()


def luminance(colour: str) -> float:
    """The relative luminance of `rgb(...)` by WCAG 2."""
    channels = [int(float(part)) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_it_writes_the_text_of_its_seed_and_says_how_fast(page, folder):
    page.put("#prompt textarea", "ROMEO: a")
    page.write(300, seed="7")
    page.until(lambda: page.chars() == 300)
    written = "".join(Engine(folder / "small.onnx").generate("ROMEO: a", length=300, temperature=0.8, seed=7))
    assert page.paper() == f"ROMEO: a{written}".strip()
    assert "chars/s" in page.text("#figures")
    assert "seed 7" in page.text("#figures")
    page.shot("write-light")


def test_without_a_seed_two_texts_differ_and_each_names_its_seed(page):
    texts = []
    for _ in range(2):
        page.write(100, seed="")
        page.until(lambda: page.text("#figures") and page.paper() not in ["", *texts] and page.chars() == 100)
        texts.append(page.paper())
    assert "seed" in page.text("#figures")


def test_stop_ends_the_text_at_once_and_it_can_write_again(page):
    page.choose("slow.onnx")
    page.until(lambda: "3 × 768" in page.text("#about"))
    page.write(5000)
    page.until(lambda: page.chars() > 20)
    page.click("#stop")
    page.until(lambda: page.js("return document.querySelector('#stop').disabled"))
    stopped = page.chars()
    page.tab("Next character")  # another model call, which is answered after what still ran
    page.put("#after textarea", "a")
    page.until(lambda: f"of {len(CHARS)}" in page.text("#odds .mean"))
    page.tab("Write")
    assert 20 < stopped <= page.chars() < stopped + 200
    assert page.chars() == len(page.js("return document.querySelector('#paper .prompt').nextSibling.data"))
    page.shot("stopped")
    page.write(30)
    page.until(lambda: page.chars() == 30)


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_nothing_moves_while_text_streams(browser, url, shots, size):
    page = Page(browser, url, shots).open(size=size)
    page.choose("slow.onnx")
    page.until(lambda: "3 × 768" in page.text("#about"))
    length = 900 if size is PHONE else 2500
    page.put("#length input[type=number]", str(length))
    page.put("#seed textarea, #seed input", "1")
    page.js("scrollTo(0, 0)")
    page.js(WATCH)
    page.click("#go")
    page.until(lambda: 0 < page.chars() < length)
    page.shot(f"streaming-{'phone' if size is PHONE else 'desk'}")
    page.until(lambda: page.chars() == length)
    assert page.js("return [...window.places]") == [page.js("return [...window.places].at(-1)")]
    scrolled = page.js(
        "const p = document.querySelector('#paper'); return [p.scrollHeight - p.clientHeight, p.scrollTop]"
    )
    assert scrolled[0] > 0, "the text should be longer than its box"
    assert abs(scrolled[1]) < 2, "the end of the text should be in sight"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("#prompt textarea", "caf\u00e9", "does not know 'é'"),
        ("#seed textarea, #seed input", "-3", "seed must be a whole number"),
        ("#seed textarea, #seed input", "two", "seed must be a whole number"),
    ],
)
def test_a_wrong_input_is_refused_in_plain_words_on_the_page(page, field, value, said):
    page.put(field, value)
    page.click("#go")
    page.until(lambda: said in page.text("#figures .problem"))
    page.shot(f"refused-{value.strip('-').encode('ascii', 'ignore').decode()}")
    page.until(lambda: page.js("return !document.querySelector('#go').disabled"))


def test_a_length_beyond_the_limit_is_not_written(page):
    page.write(9999)
    page.until(lambda: page.chars() == 5000 and not page.js("return document.querySelector('#go').disabled"))
    assert page.js("return document.querySelector('#length input[type=number]').value") == "5000"
    page.shot("too-long")


def test_a_damaged_model_is_refused_and_the_one_before_goes_on(page):
    page.choose("broken.onnx")
    page.until(lambda: "broken.onnx" in page.text("#about .problem"))
    assert "still using small.onnx" in page.text("#about")
    assert page.js("return document.querySelector('#model input').value") == "small.onnx"
    page.shot("damaged-model")
    page.write(50)
    page.until(lambda: page.chars() == 50)


def test_a_model_that_appears_later_can_be_chosen_after_a_reload(page, folder):
    write_model(folder / "later.onnx", hidden_dim=12)
    page.open()
    page.choose("later.onnx")
    page.until(lambda: "2 × 12" in page.text("#about"))
    page.write(20)
    page.until(lambda: page.chars() == 20)


def test_every_character_shows_its_surprise_and_its_candidates(page):
    page.tab("What it expects")
    page.put("#text textarea", "the romeo\nthe")
    page.until(lambda: page.text(".mean b").endswith("bits/char") and len(page.all(".reading i")) == 13)
    page.all(".reading i")[4].click()
    rows = page.text("#tip").split("\n")
    assert rows[0] == "r"
    assert "bits" in rows[1]
    assert len(page.all("#tip div")) == 6
    page.shot("surprise-light")
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.text("#tip").startswith("o"))


def test_text_from_outside_is_never_markup(page):
    page.choose("run/bytes.onnx")
    page.until(lambda: "all bytes" in page.text("#about"))
    page.tab("What it expects")
    page.put("#text textarea", HOSTILE + "é世")
    page.until(lambda: len(page.all(".reading i")) == len(HOSTILE) + 2)
    assert page.js("return document.querySelector('.reading').textContent") == HOSTILE + "é世"
    assert page.all(".reading i")[-1].text == "世"
    page.shot("hostile-text")
    page.tab("Write")
    page.put("#prompt textarea", HOSTILE)
    page.write(10)
    page.until(lambda: page.chars() > 0)
    assert page.text("#paper .prompt") == HOSTILE
    assert page.browser.title == "charrnn"


def test_the_sliders_cut_the_distribution(page):
    page.tab("Next character")
    page.until(lambda: len(page.all(".bars li")) == 26)
    assert page.all(".bars li.cut") == []
    page.put("#next-top-k input[type=number]", "3")
    page.until(lambda: page.text("#odds .mean b").startswith("3 of"))
    assert len(page.all(".bars li.cut")) == 23
    page.shot("odds-light")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_colour_of_surprise_is_readable_in_both_themes(browser, url, shots, theme):
    page = Page(browser, url, shots).open(theme)
    page.tab("What it expects")
    page.put("#text textarea", "the king of romeo\nEEE moor")
    page.until(lambda: page.text("#surprise .mean"))
    page.shot(f"read-{theme}")
    colours = page.js(
        "return [...document.querySelectorAll('.legend i')].map((swatch) => {"
        " const style = getComputedStyle(swatch); return [style.color, style.backgroundColor]; })"
    )
    assert len(colours) == 9
    assert min(contrast(*pair) for pair in colours[1:]) >= 4.5
    body = page.js("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(body) < 0.1) == (theme == "dark")


def test_the_theme_button_changes_the_theme_and_the_choice_stays(page):
    def dark() -> bool:
        return page.js("return document.body.classList.contains('dark')")

    assert not dark()
    page.click("#theme")
    page.until(dark)
    page.write(200)
    page.until(lambda: page.chars() == 200)
    page.shot("write-dark")
    page.browser.get(page.url)
    page.until(lambda: page.all("#go") and dark())
    page.js("localStorage.clear()")


def test_a_phone_scrolls_in_one_direction_only(browser, url, shots):
    page = Page(browser, url, shots).open(size=PHONE)
    for name in ("Write", "What it expects", "Next character"):
        page.tab(name)
        page.until(lambda: page.text("#odds .mean") or page.text("#surprise .mean") or page.text("#paper"))
        assert page.js("return document.documentElement.scrollWidth") == PHONE["width"], name
        page.shot(f"phone-{name.split()[0].lower()}")


def test_the_console_stays_without_errors(page):
    # What Gradio says of requests that ended because their page was left, in the tests before.
    page.browser.get_log("browser")
    page.write(5000)
    page.until(lambda: page.chars() > 0)
    page.js("document.querySelector('#stop').click()")
    for name in ("What it expects", "Next character", "Write"):
        page.tab(name)
    page.write(20)
    page.until(lambda: page.chars() == 20)
    assert [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_nothing_comes_from_elsewhere_and_nothing_goes_there(page, asked):
    """Last: it looks at all that the tests before asked for, in the browser and in the server."""
    page.write(20)
    page.until(lambda: page.chars() == 20)
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 5
    assert {urlsplit(url).hostname for url in urls if not url.startswith(("data:", "blob:"))} <= LOOPBACK
    assert set(asked) <= LOOPBACK
