"The page of a study in a real browser: what it shows is what was given, and nothing leaves it."

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pandas as pd
import pytest

from ich_fastai.dicom import WINDOWS, window
from ich_fastai.labels import LABELS, LOGITS
from ich_fastai.predict import CALLS, SETS
from ich_fastai.viewer import pick_studies, write_viewer

EVIL = "</script><script>document.title='harmed'</script><img src=x onerror=\"document.title='harmed'\">{{pixels}}"
CARD = {"corrections": {}, "thresholds": {"slice": {"any": {"threshold": 0.3}}, "study": {"any": {"threshold": 0.2}}}}


class Browser:
    "Chromium driven by chromedriver, over plain HTTP (WebDriver)."

    def __init__(self, width, height, touch):
        quiet = {"stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen([shutil.which("chromedriver"), "--port=0"], stdout=subprocess.PIPE, **quiet)
        said = (re.search(r"started successfully on port (\d+)", line) for line in self.process.stdout)
        self.url = f"http://127.0.0.1:{next(filter(None, said))[1]}"
        screen = {"width": width, "height": height, "pixelRatio": 1, "touch": touch}
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]}
        options |= {"mobileEmulation": {"deviceMetrics": screen}}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        try:
            begun = self.call("/session", {"capabilities": {"alwaysMatch": wanted}})
        except Exception:
            self.process.kill()
            raise
        self.session = f"/session/{begun['sessionId']}"

    def call(self, path, data):
        request = urllib.request.Request(self.url + path, json.dumps(data).encode(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as e:
            raise RuntimeError(e.read().decode()) from None

    def run(self, script):
        return self.call(f"{self.session}/execute/sync", {"script": script, "args": []})

    def open(self, page):
        self.call(f"{self.session}/url", {"url": page.resolve().as_uri()})
        self.wait("return !!document.documentElement.dataset.ready")

    def wait(self, script):
        "Until the script gives true."
        for _ in range(300):
            if self.run(script):
                return
            time.sleep(0.03)
        raise AssertionError(f"never came: {script}; the page says {self.run('return document.body.innerText')!r}")

    def act(self, kind, *steps, **how):
        source = {"type": kind, "id": kind, "actions": list(steps)} | ({"parameters": how} if how else {})
        self.call(f"{self.session}/actions", {"actions": [source]})

    def press(self, key):
        self.act("key", {"type": "keyDown", "value": key}, {"type": "keyUp", "value": key})

    def shows(self, text):
        self.wait(f"return document.getElementById('view').innerText.includes({json.dumps(text)})")

    def close(self):
        with contextlib.suppress(Exception):
            request = urllib.request.Request(self.url + self.session, method="DELETE")
            urllib.request.urlopen(request, timeout=10).close()
        self.process.kill()
        self.process.wait()


def start(*arguments):
    if not shutil.which("chromedriver"):
        pytest.skip("no chromedriver: install chromium and chromium-driver to test the viewer in a browser")
    return Browser(*arguments)


@pytest.fixture(scope="module")
def browser():
    b = start(1280, 800, False)
    yield b
    b.close()


@pytest.fixture(scope="module")
def phone():
    b = start(375, 800, True)
    yield b
    b.close()


def make_study(n=9, size=48):
    "A study as `predict_study` gives it, and its pixels, over all of int16."
    rng = np.random.default_rng(n)
    hu = rng.integers(-1100, 2000, (n, size, size)).astype(np.int16)
    hu[0, 0, :2] = -32768, 32767
    p = rng.uniform(0, 0.5, (n, 6))
    slices = pd.DataFrame(p, columns=list(LABELS)).assign(**dict.fromkeys(SETS, "undecided"))
    slices[CALLS] = pd.DataFrame(np.where([label == "any" for label in LABELS], p > 0.3, np.nan)).astype("Int8")
    slices[LOGITS] = np.log(p / (1 - p))
    ids = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4", "z_mm": 5.0 * np.arange(n) - 20, "error": None}
    return slices.assign(
        **ids, file=[f"Doe^Jane/{i}" for i in range(n)], SOPInstanceUID=[f"ID_{i}" for i in range(n)]
    ), hu


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    slices, hu = make_study()
    truth = pd.DataFrame(0, slices["SOPInstanceUID"], list(LABELS)).assign(any=1)
    maps = {"heat": np.ones((9, 8, 8))}
    about = {"card": CARD, "truth": truth, "maps": maps, "orientation": (1, 0, 0, 0, 1, 0), "note": "synthetic data"}
    return write_viewer(slices, hu, tmp_path_factory.mktemp("viewer") / "study.html", **about), slices, hu


def gray(browser, y, x):
    "What the canvas shows at a pixel's center."
    return browser.run(
        "const c = document.getElementById('image'), z = c.width / study.size[1], at = v => z * v + (z - 1) / 2;"
        f"return c.getContext('2d').getImageData(at({x}), at({y}), 1, 1).data[0]"
    )


def test_keys_wheel_and_strip_go_through_the_slices(browser, page):
    file, slices, _ = page
    browser.open(file)
    browser.shows(f"{slices['any'].argmax() + 1} / 9")
    for key, where in (
        ("\ue011", "1 / 9\nz -20.0 mm"),
        ("\ue015", "2 / 9"),
        ("\ue010", "9 / 9\nz 20.0 mm"),
        ("\ue013", "8 / 9"),
    ):
        browser.press(key)
        browser.shows(where)
    browser.act("wheel", {"type": "scroll", "x": 300, "y": 400, "deltaX": 0, "deltaY": -120})
    browser.shows("7 / 9")
    box = browser.run("const b = document.getElementById('strip').getBoundingClientRect(); return [b.x, b.y, b.width]")
    to = {"type": "pointerMove", "x": int(box[0] + box[2] * 2.5 / 9), "y": int(box[1] + 20)}
    browser.act("pointer", to, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0})
    browser.shows("3 / 9")


def test_pixels_arrive_exactly_and_pass_through_the_windows(browser, page):
    file, _, hu = page
    browser.open(file)
    assert browser.run("return Array.from(hu)") == hu.ravel().tolist()
    for key, (name, (center, width)) in enumerate(WINDOWS.items(), 1):
        browser.press("\ue011")
        browser.press(str(key))
        browser.shows("1 / 9")
        browser.shows(f"C {center}  W {width}")
        for y, x in ((0, 0), (0, 1), (20, 31), (47, 47)):
            assert abs(gray(browser, y, x) - 255 * float(window(hu[0, y, x], name))) <= 0.6


def test_dragging_changes_the_window_and_the_pointer_reads_hu(browser, page):
    file, _, hu = page
    browser.open(file)
    browser.press("\ue011")
    browser.press("2")
    left, top, wide = browser.run("const b = view.getBoundingClientRect(); return [b.x, b.y, b.width]")
    x, y = int(left + wide * 20.5 / 48), int(top + wide * 10.5 / 48)
    browser.act("pointer", {"type": "pointerMove", "x": x, "y": y})
    browser.shows(f"{hu[0, 10, 20]} HU")
    move = {"type": "pointerMove", "duration": 50, "x": x + 40, "y": y}
    browser.act("pointer", {"type": "pointerDown", "button": 0}, move, {"type": "pointerUp", "button": 0})
    browser.shows("C 80  W 232")  # 0.8 HU a pixel at a width of 200
    browser.press("m")
    browser.wait("return !overlay.hidden")
    assert browser.run("return document.querySelector('[data-map]').getAttribute('aria-pressed')") == "true"


def test_marks_words_and_thresholds(browser, page):
    browser.open(page[0])
    shown = browser.run("return document.body.innerText")
    for text in (
        "Not a medical device: for research and teaching only.",
        "labels known",
        "synthetic data",
        "threshold",
    ):
        assert text in shown
    assert browser.run("return [...document.querySelectorAll('.edge')].map(e => e.textContent).join('')") == "RLAP"
    assert browser.run("return document.querySelectorAll('#strip path').length") == 1, "one label has a threshold"
    assert "1.2.3" not in page[0].read_text() and "Doe^Jane" not in page[0].read_text()


def test_no_request_leaves_the_page(browser, page):
    browser.open(page[0])
    browser.run("fetch('https://example.org/').catch(() => 0); new Image().src = 'https://example.org/a.png'")
    log = [
        json.loads(entry["message"])["message"]
        for entry in browser.call(f"{browser.session}/se/log", {"type": "performance"})
    ]
    stopped = {m["params"]["requestId"] for m in log if m["params"].get("blockedReason") == "csp"}
    sent = [m["params"] for m in log if m["method"] == "Network.requestWillBeSent"]
    urls = [m["request"]["url"] for m in sent if m["requestId"] not in stopped]
    assert urls and not [url for url in urls if not url.startswith(("file:", "data:"))], urls
    assert any("example.org" in m["request"]["url"] for m in sent), "the page's policy is what stopped it"


def test_a_hostile_header_is_only_text(browser, tmp_path):
    slices, hu = make_study(3)
    slices = slices.assign(StudyInstanceUID=EVIL, SeriesInstanceUID=EVIL, file=[EVIL + str(i) for i in range(3)])
    slices.loc[1, "error"] = EVIL
    table = pd.DataFrame({"SeriesInstanceUID": [EVIL], "why": [EVIL], EVIL: [1]})
    about = {"series_table": table, "warnings": [EVIL], "note": EVIL, "maps": {EVIL: np.zeros((3, 4, 4))}}
    browser.open(write_viewer(slices, hu, tmp_path / "evil.html", show_uids=True, **about))
    browser.shows(EVIL)
    assert EVIL in browser.run("return document.title")
    assert browser.run("return document.querySelectorAll('script, img').length") <= 4, "two texts, maps, the program"
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
    )
    assert browser.run("return document.title") != "1", "the policy runs no other script"


@pytest.mark.parametrize("what", ["one slice", "no card", "no z", "unreadable", "not square"])
def test_a_poor_study_is_shown_as_it_is(browser, tmp_path, what):
    slices, hu = make_study(1 if what == "one slice" else 5)
    card = None if what == "no card" else CARD
    if what == "no card":
        slices[CALLS] = pd.NA
    if what == "no z":
        slices["z_mm"] = np.nan
    if what == "unreadable":
        slices.loc[1, ["error", *LABELS, *CALLS, *LOGITS, *SETS]] = "duplicate: same as Doe^Jane/0", *[None] * 24
    if what == "not square":
        hu = hu[:, :, :30]
    page = write_viewer(slices, hu, tmp_path / "page.html", card=card)
    browser.open(page)
    browser.press("\ue010")
    n = {"one slice": 1, "unreadable": 4}.get(what, 5)
    browser.shows(f"{n} / {n}")
    shown = browser.run("return document.body.innerText")
    assert ("z 0.0 mm" in shown) == (what not in ("no z", "one slice")) and "NaN" not in shown
    assert ("no thresholds" in shown) == (what == "no card")
    assert ("not usable, not shown: 1 of 5 files, duplicate (1)" in shown) == (what == "unreadable")
    good = hu[slices["error"].isna()]
    assert browser.run("return Array.from(hu)") == good.ravel().tolist()


def test_on_a_phone_it_fits_and_a_swipe_scrolls(phone, page):
    phone.open(page[0])
    assert phone.run("return document.documentElement.scrollWidth") <= 375
    notice = phone.run("const b = document.querySelector('footer').getBoundingClientRect(); return [b.top, b.bottom]")
    assert 0 < notice[0] < notice[1] <= 800
    phone.press("\ue011")
    finger = [{"type": "pointerMove", "x": 180, "y": 150}, {"type": "pointerDown", "button": 0}]
    moves = [{"type": "pointerMove", "duration": 30, "x": 180, "y": y} for y in (180, 210, 240)]
    phone.act("pointer", *finger, *moves, {"type": "pointerUp", "button": 0}, pointerType="touch")
    phone.wait("return state.slice > 2")
    assert phone.run("return [state.center, state.width]") == list(WINDOWS["brain"]), "one finger leaves the window"


def test_studies_are_the_median_of_their_kind():
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    p = np.array([0.9, 0.8, 0.7, 0.1, 0.6, 0.1, 0.05, 0.15])
    rows = pd.DataFrame(dict.fromkeys(LABELS, truth)).assign(StudyInstanceUID=list("abcdefgh"))
    rows[LOGITS] = np.tile(np.log(p / (1 - p))[:, None], 6)
    picked = pick_studies(rows, CARD)
    assert picked["StudyInstanceUID"].to_dict() == {"found": "b", "mistake": "d", "normal": "f"}
    picked = pick_studies(rows[rows["StudyInstanceUID"] != "d"], CARD)
    assert picked.loc["mistake", ["kind", "StudyInstanceUID"]].to_list() == ["no bleeding, false alarm", "e"]
    assert pick_studies(rows.tail(3), CARD).index.to_list() == ["normal"]
