"""The page in a real browser: frames arrive, keys and touches steer, connections come back, recordings play."""

from __future__ import annotations

import os
import time

import pytest
import toy
from chromium import NAMES, Chromium, find_chromium

from sanawm_runtime.serve.limits import Limits
from sanawm_runtime.video import probe_video

BROWSER = find_chromium()
# Where no browser is, these tests do not exist; CI must have one.
if not BROWSER and os.environ.get("CI"):
    raise RuntimeError(f"the page's tests need Chromium and none of {', '.join(NAMES)} was found; run `apt-get install -y chromium`")


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests, each of which gets servers of its own."""
    with Chromium(BROWSER) as opened:
        yield opened


@pytest.fixture
def blank(browser):
    """The browser as it was when it started."""
    browser.go("about:blank")
    browser.call("Emulation.setTouchEmulationEnabled", enabled=False)
    browser.resize(1440, 900)
    browser.problems.clear()
    for path in browser.downloads.glob("*"):
        path.unlink()
    return browser


@pytest.fixture
def page(world, serving, blank):
    """The browser on the page of a server around the toy world."""
    toy.slow(world.engine, "commit", 0.05)
    with serving(world, Limits(linger_s=20)) as server:
        blank.server = server
        blank.go(server.url)
        blank.until("document.body.dataset.state === 'open'")
        yield blank
        assert blank.problems == []


def begin(page):
    page.click("#go")
    page.until("window.sanawm.state.session && document.getElementById('begin').hidden && window.sanawm.player.total > 5")


def where(page):
    return page.eval("window.sanawm.path.position")


def test_frames_arrive_and_keys_change_the_path(page):
    begin(page)
    assert where(page) == [0, 0, 0]
    page.key("w", True)
    page.until("window.sanawm.path.position[1] > 0.3")
    assert page.eval("document.querySelector('[data-key=w]').getAttribute('aria-pressed')") == "true"
    page.key("d", True)
    page.until("window.sanawm.path.heading > 0.3")
    page.key("w", False)
    page.key("d", False)
    assert page.eval("document.querySelectorAll('.key[aria-pressed=true]').length") == 0
    # What is drawn changes, and the instruments know of it.
    drawn = "window.sanawm.player.context.getImageData(0, 0, 64, 64).data.reduce((sum, value) => sum + value, 0)"
    first = page.eval(drawn)
    page.until(f"{drawn} !== {first}")
    page.until("parseFloat(document.getElementById('fps').textContent) > 8")
    assert page.eval("document.getElementById('latency').textContent").endswith("s")
    page.until("document.getElementById('place').textContent.includes('heading')")
    assert "z 0.0 " not in page.eval("document.getElementById('place').textContent")
    page.until("document.getElementById('reaction').textContent.endsWith('s')")


def test_arrows_buttons_mouse_and_wheel_steer_too(page):
    begin(page)
    page.key("ArrowUp", True)
    page.until("window.sanawm.path.position[1] > 0.1")
    page.key("ArrowUp", False)
    heading = page.eval("window.sanawm.path.heading")
    box = page.eval("(() => { const b = document.getElementById('screen').getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()")
    page.drag((box[0], box[1]), (box[0] - 80, box[1]), 1.0)
    page.until(f"window.sanawm.path.heading < {heading} - 0.05")
    assert page.eval("document.getElementById('ring').hidden") is True
    before = page.eval("window.sanawm.path.position")
    key = page.eval("(() => { const b = document.querySelector('[data-key=s]').getBoundingClientRect(); return [b.x + 9, b.y + 9]; })()")
    page.mouse("mousePressed", *key, button="left", clickCount=1)
    page.until("window.sanawm.state.session && window.sanawm.controls.held === 's'")
    page.until(f"Math.hypot(window.sanawm.path.position[0] - {before[0]}, window.sanawm.path.position[1] - {before[1]}) > 0.05")
    page.mouse("mouseReleased", *key, button="left", clickCount=1)
    page.until("window.sanawm.controls.held === ''")
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=box[0], y=box[1], deltaX=0, deltaY=-120)
    page.until("window.sanawm.controls.held === 'w'")
    page.until("window.sanawm.controls.held === ''")


def test_touch_steers(page):
    page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    page.resize(390, 844, 2, mobile=True)
    begin(page)
    page.eval("document.querySelector('[data-key=w]').scrollIntoView()")
    x, y = page.eval("(() => { const b = document.querySelector('[data-key=w]').getBoundingClientRect(); return [b.x + 20, b.y + 20]; })()")
    page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    page.until("window.sanawm.path.position[1] > 0.2")
    page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    page.until("window.sanawm.controls.held === ''")
    # Nothing sticks out of a narrow screen.
    assert page.eval("document.documentElement.scrollWidth") <= 390


STICKING_OUT = """[...document.querySelectorAll('main *, header *')].filter((element) => {
    const box = element.getBoundingClientRect();
    return box.width && element.id !== 'backdrop' && (box.left < -1 || box.right > document.documentElement.clientWidth + 1);
}).map((element) => element.outerHTML.slice(0, 80))"""
# Nodes whose text is wider than they are.
CUT_OFF = """[...document.querySelectorAll('button *, dt, dd, label, p')].filter((element) => !element.childElementCount && element.clientWidth
    && element.scrollWidth > element.clientWidth + 1).map((element) => element.textContent)"""


@pytest.mark.parametrize(("width", "height", "mobile"), [(1440, 900, False), (1440, 832, False), (1024, 768, False), (390, 844, True), (844, 390, True), (320, 568, True)])
def test_it_fits_the_screen(page, width, height, mobile):
    page.resize(width, height, 1, mobile=mobile)

    def check():
        assert page.eval(STICKING_OUT) == [] and page.eval(CUT_OFF) == []
        assert page.eval("document.documentElement.scrollWidth") <= width
        if not mobile:  # nothing needs scrolling on a desk
            assert page.eval("document.documentElement.scrollHeight") <= height

    check()
    begin(page)
    check()
    # The picture and the keys that steer it are seen together.
    bottom = page.eval("Math.max(...[...document.querySelectorAll('#screen, .key')].map((element) => element.getBoundingClientRect().bottom))")
    assert bottom <= height


def test_a_lost_connection_comes_back_to_the_same_world(page, eventually):
    begin(page)
    page.key("w", True)
    page.until("window.sanawm.path.position[1] > 0.2")
    session = page.eval("window.sanawm.state.session.id")
    page.eval("window.sanawm.link.socket.close()")
    page.until("document.body.dataset.state === 'lost'")
    page.until("document.body.dataset.state === 'open'")
    far = where(page)[1]
    page.until(f"window.sanawm.path.position[1] > {far} + 0.3")
    assert page.eval("window.sanawm.state.session.id") == session and len(page.server.sessions) == 1
    page.key("w", False)


def test_a_world_that_is_gone_is_said_and_another_begins(page, eventually):
    begin(page)
    (session,) = page.server.sessions._sessions.values()
    page.eval("window.sanawm.link.socket.close()")
    page.server.loop.call_soon_threadsafe(page.server.sessions.end, session, "lost")
    page.until("!document.getElementById('begin').hidden")
    assert "session is over" in page.eval("document.getElementById('fault').textContent")
    begin(page)
    page.until("window.sanawm.state.session.id !== '" + session.id + "'")


def test_a_server_that_stops_and_starts_again_is_found_again(world, serving, blank):
    with serving(world) as server:
        port = int(server.url.rpartition(":")[2])
        blank.go(server.url)
        blank.until("document.body.dataset.state === 'open'")
    blank.until("document.body.dataset.state === 'lost'")
    with serving(world, port=port):
        blank.until("document.body.dataset.state === 'open'", 40)


def test_a_recording_is_saved_as_a_video(page, eventually):
    begin(page)
    page.press("r")
    page.until("window.sanawm.recorder.pieces.length >= 2")
    assert page.eval("document.getElementById('record').getAttribute('aria-pressed')") == "true"
    page.press("r")
    (video,) = eventually(lambda: list(page.downloads.glob("sanawm-toy-*.mp4")), 20)
    facts = probe_video(video)
    assert facts["frames"] >= 48 and (facts["width"], facts["height"], facts["fps"]) == (64, 64, 16.0)


def test_pausing_and_starting_over(page):
    begin(page)
    page.key("w", True)
    page.until("window.sanawm.path.position[1] > 0.2")
    page.key("w", False)
    page.press(" ")
    page.until("window.sanawm.player.buffered === 0")
    shown = page.eval("window.sanawm.player.total")
    time.sleep(0.5)
    assert page.eval("window.sanawm.player.total") == shown
    assert page.eval("document.getElementById('pause').textContent").startswith("Go on")
    page.press(" ")
    page.until(f"window.sanawm.player.total > {shown}")
    page.press("0")
    page.until("window.sanawm.path.points.length > 3 && window.sanawm.path.position[1] < 0.1")


def test_an_uploaded_picture_begins_a_world_and_a_bad_one_is_a_sentence(page, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "good.png").write_bytes(toy.png(200, 100))
    page.choose_file("#upload", tmp_path / "bad.png")
    page.until("document.getElementById('upload-text').textContent === 'bad.png'")
    page.click("#go")
    page.until("document.getElementById('fault').textContent.includes('not an image')")
    page.choose_file("#upload", tmp_path / "good.png")
    page.until("document.getElementById('upload-text').textContent === 'good.png'")
    page.eval("document.getElementById('prompt').value = 'x'.repeat(5000)")
    page.click("#go")
    page.until("document.getElementById('fault').textContent.includes('4,000 are allowed')")
    page.eval("document.getElementById('prompt').value = ''")
    begin(page)
    assert page.eval("window.sanawm.state.request.image") == "upload"


def test_the_keyboard_alone_is_enough(page):
    page.eval("document.getElementById('prompt').focus()")
    for letter in "wasd":  # typing is not steering
        page.press(letter, 0)
    assert page.eval("document.getElementById('prompt').value") == "wasd" and page.eval("window.sanawm.controls.held") == ""
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=2)
    page.until("window.sanawm.player.total > 5")
    assert page.eval("document.activeElement.id") == "screen"
    page.press("?")
    page.until("document.getElementById('help').open")
    assert "turn left" in page.eval("document.getElementById('help-keys').textContent")
    page.press("Escape")
    page.until("!document.getElementById('help').open")
    page.press("n")
    page.until("!document.getElementById('begin').hidden")
    page.press("Escape")
    page.until("document.getElementById('begin').hidden")
    # Every control is reached with Tab, and each shows where it is.
    names = set()
    for _ in range(40):
        page.press("Tab", 0)
        names.add(page.eval("document.activeElement.id || document.activeElement.dataset.key || ''"))
        assert page.eval("document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle !== 'none'")
    assert {"w", "a", "s", "d", "i", "j", "k", "l", "pause", "record", "reset", "new", "full", "help-open"} <= names


def test_everything_has_a_name_and_comes_from_here(page):
    begin(page)
    nameless = """[...document.querySelectorAll('button:not([hidden]), input, select, textarea, canvas')].filter((element) =>
        !(element.getAttribute('aria-label') || element.labels?.length || element.textContent.trim())).map((element) => element.outerHTML)"""
    assert page.eval(nameless) == []
    assert page.eval("document.documentElement.lang") == "en"
    assert page.eval("document.getElementById('status').getAttribute('role')") == "status"
    origins = page.eval("[...new Set(performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin))]")
    assert origins == [page.server.url]


def test_a_token_in_the_address_is_taken_and_hidden(world, serving, blank):
    token = "0123456789abcdef"
    with serving(world, token=token) as server:
        blank.go(server.url)
        blank.until("document.body.dataset.state === 'refused'")
        assert "wrong token" in blank.eval("document.getElementById('note-text').textContent").lower()
        blank.go("about:blank")
        blank.go(f"{server.url}/#token={token}")
        blank.until("document.body.dataset.state === 'open'")
        assert token not in blank.eval("location.href")
        begin(blank)


def test_a_full_server_says_so(page):
    with Chromium(BROWSER) as other:
        page.server.sessions._starting += 10  # as if others had them all
        other.go(page.server.url)
        other.until("document.body.dataset.state === 'open'")
        other.click("#go")
        other.until("document.body.dataset.state === 'refused'")
        assert "in use; try again later" in other.eval("document.getElementById('note-text').textContent")
        page.server.sessions._starting -= 10
        other.click("#note-act")
        other.until("document.body.dataset.state === 'open'")
        begin(other)


# Collected only where a browser is.
if not BROWSER:
    for name in [name for name in globals() if name.startswith("test_")]:
        del globals()[name]
