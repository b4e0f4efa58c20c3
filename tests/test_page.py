"""The page in a real browser: headless Chromium writes, stops, moves sliders, makes mistakes, in both themes.

Screenshots go to the folder that CHARRNN_SCREENSHOTS names, else to a temporary one.
"""

import json
import os
import shutil
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest
from page_server import page_server
from tiny_models import CHARS, write_model

from charrnn.sampling import SamplingOptions
from charrnn.vocab import Vocab
from infer.engine import Engine

pytest.importorskip("gradio", reason="the extra ui is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("chromium or chromedriver is not on the path", allow_module_level=True)

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from infer.ui.guard import MAX_WAITING_PER_CLIENT  # noqa: E402
from infer.ui.models import Models  # noqa: E402

pytestmark = pytest.mark.slow
PATIENCE_S = 60
SEED = "#seed textarea, #seed input"
PARTS = ("#generate", "#prompt textarea", SEED, "#model input", "#length input[type=number]", "#paper p")
LOOPBACK = {"127.0.0.1", "localhost", "::1", None}
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
HOSTILE = '<img src=x onerror="document.title=1">${1+1}{{value}}&amp;"\''

# How far the Layout Instability API finds that things have moved by themselves (0: not at all).
SHIFTS = """
window.shifted = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) {
    if (entry.hadRecentInput) continue;
    window.shifted += entry.value;
    window.shifts = [window.shifts, entry.sources.map((s) => `${s.node?.nodeName} ${s.node?.id} ${s.node?.className}`)];
  }
}).observe({ type: 'layout-shift' });
"""

# Every text that can be seen and used, whose contrast with what lies behind it is below WCAG 2's AA.
PALE = """
const linear = (x) => x <= 10.31475 ? x / 255 / 12.92 : ((x / 255 + .055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
const parts = (colour) => { const p = colour.match(/[\\d.]+/g).map(Number); return p.length < 4 ? [...p, 1] : p; };
const over = (top, below) => below.map((x, i) => top[i] * top[3] + x * (1 - top[3]));
const line = (element) => element ? [...line(element.parentElement), element] : [];
return [...document.querySelectorAll('body *')].flatMap((element) => {
  const says = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const box = element.getBoundingClientRect(), styles = line(element).map((e) => getComputedStyle(e));
  const opacity = styles.reduce((product, style) => product * style.opacity, 1);
  if (!(says || element.matches('input, textarea')) || element.closest(':disabled')) return [];
  if (!opacity || box.width < 2 || box.height < 2) return [];
  if (!element.checkVisibility({ visibilityProperty: true })) return [];
  const ground = styles.reduce((colour, style) => over(parts(style.backgroundColor), colour), [255, 255, 255]);
  const own = parts(styles.at(-1).color), size = parseFloat(styles.at(-1).fontSize);
  own[3] *= opacity;
  const [dark, light] = [luminance(ground), luminance(over(own, ground))].sort((a, b) => a - b);
  const large = size >= 24 || (size >= 18.66 && styles.at(-1).fontWeight >= 700);
  const ratio = (light + .05) / (dark + .05);
  return ratio < (large ? 3 : 4.5) ? [`${element.className} ${element.innerText} ${ratio.toFixed(2)}`] : [];
});
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
    with page_server(Models(folder / "small.onnx", folder)) as served:
        yield served.url


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

    def choose(self, model: str, about: str) -> None:
        """By the option's label: WebDriver finds no text in an option while the list fades in."""
        self.click("#model input")
        self.until(lambda: self.all(f"[role=option][aria-label='{model}']"))[0].click()
        self.until(lambda: about in self.text("#about"))

    def write(self, length: int, seed: str = "1") -> None:
        self.put("#length input[type=number]", str(length))
        self.put(SEED, seed)
        self.click("#generate")

    def chars(self) -> int:
        count = self.text("#metrics .metrics span")
        return int(count.split()[0].replace(",", "")) if count else 0

    def paper(self) -> str:
        return self.js("return document.querySelector('#paper .prompt')?.parentElement.textContent ?? ''").strip()

    def shot(self, name: str) -> None:
        self.browser.save_screenshot(str(self.shots / f"{name}.png"))


@pytest.fixture
def page(browser: Any, url: str, shots: Path) -> Page:
    return Page(browser, url, shots).open()


def test_it_generates_the_text_of_its_seed_with_its_speed(page, folder):
    page.put("#prompt textarea", "ROMEO: a")
    page.write(300, seed="7")
    page.until(lambda: page.chars() == 300)
    written = "".join(Engine(folder / "small.onnx").generate("ROMEO: a", 300, SamplingOptions(0.8), seed=7))
    assert page.paper() == f"ROMEO: a{written}".strip()
    assert "chars/s" in page.text("#metrics")
    assert "seed 7" in page.text("#metrics")
    page.shot("write-light")


def test_stop_ends_the_text_at_once_and_it_can_write_again(page):
    page.choose("slow.onnx", "3 × 768")
    page.write(5000)
    page.until(lambda: page.chars() > 20)
    page.click("#stop")
    page.until(lambda: page.js("return document.querySelector('#stop').disabled"))
    stopped = page.chars()
    page.tab("Next character")  # another model call, which is answered after what still ran
    page.put("#after textarea", "a")
    page.until(lambda: f"of {len(CHARS)}" in page.text("#distribution .summary"))
    page.tab("Generate")
    assert 20 < stopped <= page.chars() < stopped + 200
    assert page.chars() == len(page.js("return document.querySelector('#paper .prompt').nextSibling.data"))
    page.shot("stopped")
    page.write(30)
    page.until(lambda: page.chars() == 30)


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_nothing_moves_while_text_streams(browser, url, shots, size):
    page = Page(browser, url, shots).open(size=size)
    page.choose("slow.onnx", "3 × 768")
    length = 900 if size is PHONE else 2500
    page.put("#length input[type=number]", str(length))
    page.put(SEED, "1")
    page.js("scrollTo(0, 0)")
    page.js(SHIFTS)
    page.click("#generate")
    page.until(lambda: 0 < page.chars() < length)
    page.shot(f"streaming-{'phone' if size is PHONE else 'desk'}")
    page.until(lambda: page.chars() == length)
    assert page.js("return window.shifted") < 0.001, page.js("return window.shifts")
    scrolled = page.js(
        "const p = document.querySelector('#paper'); return [p.scrollHeight - p.clientHeight, p.scrollTop]"
    )
    assert scrolled[0] > 0, "the text should be longer than its box"
    assert abs(scrolled[1]) < 2, "the end of the text should be in sight"


def test_a_wrong_input_is_refused_in_plain_words_on_the_page(page):
    page.put("#prompt textarea", "caf\u00e9")
    page.click("#generate")
    page.until(lambda: "not in this model's vocabulary: 'é'" in page.text("#metrics .problem"))
    page.shot("refused")
    page.until(lambda: page.js("return !document.querySelector('#generate').disabled"))
    # The field itself keeps numbers in range.
    page.put("#prompt textarea", "a")
    page.write(9999)
    page.until(lambda: page.chars() == 5000 and not page.js("return document.querySelector('#generate').disabled"))
    assert page.js("return document.querySelector('#length input[type=number]').value") == "5000"


def test_a_text_beyond_the_limit_is_refused_whole_and_not_cut(page):
    for tab, field, answer in (("Generate", "prompt", "metrics"), ("Surprisal", "text", "surprisal")):
        page.tab(tab)
        page.browser.find_element(By.CSS_SELECTOR, f"#{field} textarea").send_keys(Keys.CONTROL, "a")
        page.browser.execute_cdp_cmd("Input.insertText", {"text": "a" * 2001})  # pasted, as nobody types it
        if tab == "Generate":
            page.click("#generate")
        refusal = "2,001 characters; this page reads 2,000 at most"
        page.until(lambda answer=answer, refusal=refusal: refusal in page.text(f"#{answer} .problem"))
        assert page.js(f"return document.querySelector('#{field} textarea').value.length") == 2001


def test_an_empty_number_field_changes_nothing(page):
    page.tab("Next character")
    page.until(lambda: len(page.all(".bars li")) == 26)
    page.browser.get_log("browser")
    shown = page.text("#distribution")
    field = page.browser.find_element(By.CSS_SELECTOR, "#next-top-k input[type=number]")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(Keys.DELETE)
    page.tab("Generate")  # the field keeps no number, and its request has been answered when this text is there
    page.tab("Next character")
    page.put("#after textarea", "a")
    page.put("#next-top-k input[type=number]", "1")
    page.until(lambda: page.text("#distribution") != shown)
    assert page.all("#distribution .problem") == page.all(".toast-body") == []
    assert "Error" not in page.text("#distribution")
    assert severe(page) == []


@pytest.mark.parametrize("clipboard", ["navigator.clipboard", "none, as without TLS", "forbidden"])
def test_copy_takes_the_prompt_and_the_text_and_says_so(page, clipboard):
    page.browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    page.js("window.clips = navigator.clipboard")
    page.browser.execute_async_script("clips.writeText('before').then(arguments[0])")
    if clipboard.startswith("none"):
        page.js("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    elif clipboard == "forbidden":
        page.js("Object.defineProperty(navigator, 'clipboard', { value: { writeText: () => Promise.reject() } })")

    def copied() -> str:
        return page.browser.execute_async_script("clips.readText().then(arguments[0])")

    page.click("#copy")
    page.until(lambda: page.text("#copy") == "No text yet")
    assert copied() == "before"
    page.until(lambda: page.text("#copy") == "Copy")
    page.put("#prompt textarea", "EEE ")
    page.write(200, seed="3")
    page.until(lambda: page.chars() == 200)
    page.click("#copy")
    page.until(lambda: page.text("#copy") == "Copied")
    lines = page.js("return document.querySelector('#paper .prompt').nextSibling.data")
    assert "\n" in lines
    assert copied() == f"EEE {lines}"
    page.until(lambda: page.text("#copy") == "Copy")


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{url}gradio_api/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return json.load(response)


def test_a_full_queue_is_reported_and_waiting_can_be_stopped(browser, shots, folder):
    """On a page of its own, kept busy by requests from the same address."""
    with page_server(Models(folder / "slow.onnx", folder)) as served:
        page = Page(browser, served.url, shots).open()
        number = next(number for number, function in served.blocks.fns.items() if function.name == "generate")
        asked: list[dict[str, Any]] = []

        def ask() -> None:
            call = {"fn_index": number, "session_hash": f"client{len(asked)}"}
            event = post(served.url, "queue/join", call | {"data": ["slow.onnx", "a", 5000, 0.8, 0, 1, "1"]})
            asked.append(call | event)

        ask()
        page.write(40)
        page.until(lambda: page.text("#metrics .hint") == "waiting in the queue")
        page.shot("waiting")
        page.click("#stop")
        page.until(lambda: page.text("#metrics .hint") == "stopped before it started")
        with pytest.raises(HTTPError, match="429"):  # noqa: PT012
            while len(asked) < 2 * MAX_WAITING_PER_CLIENT:
                ask()
        # The first one runs, and does not wait.
        assert len(asked) in (MAX_WAITING_PER_CLIENT, MAX_WAITING_PER_CLIENT + 1)
        page.click("#generate")
        page.until(lambda: "too many requests are waiting" in page.text("#metrics .problem"))
        page.until(lambda: page.js("return !document.querySelector('#generate').disabled"))
        assert page.js("return document.querySelector('#stop').disabled")
        page.shot("queue-full")
        for call in reversed(asked):
            post(served.url, "cancel", call)
        page.js("document.querySelector('.toast-close')?.click()")
        page.click("#generate")
        page.until(lambda: page.chars() == 40)


def test_the_keyboard_alone_writes_and_stops(page):
    page.choose("slow.onnx", "3 × 768")
    page.put("#length input[type=number]", "5000")

    def press(key: str) -> None:
        ActionChains(page.browser).send_keys(key).perform()

    def focused() -> str:
        return page.js("return document.activeElement.id || document.activeElement.parentElement.closest('[id]').id")

    page.browser.find_element(By.CSS_SELECTOR, "#prompt textarea").click()
    press(Keys.TAB)
    assert focused() == "generate"
    press(Keys.ENTER)
    page.until(lambda: focused() == "stop" and page.chars() > 20)
    press(Keys.ENTER)
    page.until(lambda: focused() == "generate")
    assert page.chars() < 5000


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_has_the_focus_has_an_outline(browser, url, shots, theme):
    page = Page(browser, url, shots).open(theme)
    outlined, without = set(), []
    for _ in range(40):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        name, width = page.js(
            "const e = document.activeElement; const holder = e.closest('#model') ?? e;"
            "const style = getComputedStyle(holder);"
            "const shown = style.outlineStyle !== 'none' ? parseFloat(style.outlineWidth) : 0;"
            "return [e.tagName + (e.closest('[id]')?.id ?? ''), shown];"
        )
        if not name.startswith("BODY"):
            outlined.add(name)
            without += [name] if width < 2 else []
    assert len(outlined) >= 10
    assert without == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_every_text_is_readable_in_both_themes(browser, url, shots, theme, size):
    page = Page(browser, url, shots).open(theme, size)
    # Colours that fade in are not the ones to judge.
    page.js("document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important; }</style>')")
    where = f"{theme}-{'phone' if size is PHONE else 'desk'}"
    ground = page.js("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert (max(ground) < 60) == (theme == "dark")
    assert page.js(PALE) == []
    page.put(SEED, "wrong")
    page.click("#generate")
    page.until(lambda: page.text("#metrics .problem"))
    assert page.js(PALE) == []
    page.write(100)
    page.until(lambda: page.chars() == 100)
    assert page.js(PALE) == []
    page.tab("Surprisal")
    page.until(lambda: page.text(".reading .hint"))
    page.shot(f"empty-{where}")
    assert page.js(PALE) == []
    page.put("#text textarea", "the king\nEEE moor" * 9)
    page.until(lambda: page.text("#surprisal b"))
    assert len(page.all(".legend i")) == 9
    assert len({mark.get_attribute("class") for mark in page.all(".reading i")}) >= 4
    page.shot(f"read-{where}")
    assert page.js(PALE) == []
    page.tab("Next character")
    page.until(lambda: len(page.all(".bars li")) == 26)
    assert page.all(".bars li.cut") == []
    page.put("#next-top-k input[type=number]", "3")
    page.until(lambda: page.text("#distribution .summary b").startswith("3 of"))
    assert len(page.all(".bars li.cut")) == 23
    page.js("scrollTo(0, 0)")
    page.shot(f"next-{where}")
    assert page.js(PALE) == []


def test_a_damaged_model_is_refused_and_the_one_before_goes_on(page):
    page.choose("broken.onnx", "still using small.onnx")
    assert "broken.onnx" in page.text("#about .problem")
    assert page.js("return document.querySelector('#model input').value") == "small.onnx"
    page.shot("damaged-model")
    page.write(50)
    page.until(lambda: page.chars() == 50)


def test_a_later_model_can_be_chosen_after_a_reload(page, folder):
    write_model(folder / "later.onnx", hidden_dim=12)
    page.open()
    page.choose("later.onnx", "2 × 12")
    page.write(20)
    page.until(lambda: page.chars() == 20)


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_mouse_and_keys_show_the_candidates_of_a_character(browser, url, shots, size):
    page = Page(browser, url, shots).open(size=size)
    page.tab("Surprisal")
    page.put("#text textarea", "the romeo " * 12 + "\nthe x")
    page.until(lambda: len(page.all(".reading i")) == 126)
    page.js("document.querySelector('.reading').scrollIntoView({ block: 'end' })")

    def shown() -> bool:
        return page.js("return getComputedStyle(document.querySelector('#tip') ?? document.head).display") == "block"

    assert not shown()
    for i in (0, 20, 125):
        mark = page.all(".reading i")[i]
        ActionChains(page.browser).move_to_element(mark).perform()
        page.until(lambda mark=mark: page.text("#tip").split("\n")[0] == mark.text.strip())
        assert shown()
        tip, over, width, height = page.js(
            "const box = (e) => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };"
            "return [box(document.querySelector('#tip')), box(arguments[0]), innerWidth, innerHeight]",
            mark,
        )
        assert tip[0] >= 0
        assert tip[1] >= 0
        assert tip[2] <= width
        assert tip[3] <= height
        assert tip[3] <= over[1] + 1 or tip[1] >= over[3] - 1, "the candidates should not lie over their character"
    page.shot(f"hover-{'phone' if size is PHONE else 'desk'}")
    ActionChains(page.browser).move_to_element(page.all(".legend span")[0]).perform()
    page.until(lambda: not shown())
    page.all(".reading i")[4].click()  # and then by the keys
    page.until(lambda: page.text("#tip").startswith("r\n"))
    assert "bits" in page.text("#tip").split("\n")[1]
    assert len(page.all("#tip div")) == 6
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.text("#tip").startswith("o"))
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.until(lambda: not shown())


def test_text_from_outside_is_never_markup(page):
    page.choose("run/bytes.onnx", "all bytes")
    page.tab("Surprisal")
    page.put("#text textarea", HOSTILE + "é世")
    page.until(lambda: len(page.all(".reading i")) == len(HOSTILE) + 2)
    assert page.js("return document.querySelector('.reading').textContent") == HOSTILE + "é世"
    assert page.all(".reading i")[-1].text == "世"
    page.shot("hostile-text")
    page.tab("Generate")
    page.put("#prompt textarea", HOSTILE)
    page.write(10)
    page.until(lambda: page.chars() > 0)
    assert page.text("#paper .prompt") == HOSTILE
    assert page.browser.title == "charrnn"


def test_the_chosen_theme_is_kept(page):
    def dark() -> bool:
        return page.js("return document.body.classList.contains('dark')")

    assert not dark()
    page.click("#theme")
    page.until(dark)
    page.write(200)
    page.until(lambda: page.chars() == 200)
    page.shot("write-dark")
    page.browser.get(page.url)
    page.until(lambda: page.all("#generate") and dark())
    page.js("localStorage.clear()")


def test_a_phone_scrolls_in_one_direction_and_shows_bars_below_the_sliders(browser, url, shots):
    page = Page(browser, url, shots).open(size=PHONE)
    shown = {"Generate": "#paper .hint", "Surprisal": "#surprisal .summary", "Next character": ".bars li:nth-child(26)"}
    for name, css in shown.items():
        page.tab(name)
        page.until(lambda css=css: page.all(css))
        assert page.js("return document.documentElement.scrollWidth") == PHONE["width"], name
        page.shot(f"phone-{name.split()[0].lower()}")
    bottom, top = page.js(
        "return [document.querySelector('#next-top-p').getBoundingClientRect().bottom,"
        " document.querySelectorAll('.bars li')[4].getBoundingClientRect().bottom]"
    )
    assert bottom < top < PHONE["height"]


def severe(page: Page) -> list[str]:
    return [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_console_stays_without_errors(page):
    # What Gradio says of requests that ended because their page was left, in the tests before.
    page.browser.get_log("browser")
    page.write(5000)
    page.until(lambda: page.chars() > 0)
    page.js("document.querySelector('#stop').click()")
    for name in ("Surprisal", "Next character", "Generate"):
        page.tab(name)
    page.write(20)
    page.until(lambda: page.chars() == 20)
    assert severe(page) == []


def test_nothing_comes_from_elsewhere_and_nothing_goes_there(page, asked):
    """Last: it looks at all that the tests before asked for, in the browser and in the server."""
    page.write(20)
    page.until(lambda: page.chars() == 20)
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 5
    assert {urlsplit(url).hostname for url in urls if not url.startswith(("data:", "blob:"))} <= LOOPBACK
    assert set(asked) <= LOOPBACK
