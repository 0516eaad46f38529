"""The page at ``/`` in headless Chromium: what a person does with it, by mouse and by keyboard."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from browser import KEY, PLACES, ROOM, TAP, saying, visiting
from PIL import Image
from serving import PacedEngine, fake_app, listening, png, service_of, wait_until
from starlette.applications import Starlette
from starlette.routing import Mount

from autoglm_gguf import AutoGLM
from autoglm_gguf.actions import parse_action
from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.server.app import create_app
from autoglm_gguf.server.params import ServerParams

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

SCREEN = Path(__file__).parents[2] / "examples" / "screen.png"
ENDLESS = b"again " * 2000


# --- the whole way, with a model ---


@pytest.mark.native
@pytest.mark.parametrize(
    ("width", "theme", "language", "task"),
    [(1280, "light", "en-US", "Tap Bluetooth"), (390, "dark", "zh-CN", "点击蓝牙")],
)
def test_page_shows_where_a_model_taps(
    chromium: Browser,
    tiny_pair: Callable[[str], tuple[Path, Path]],
    width: int,
    theme: str,
    language: str,
    task: str,
) -> None:
    text, mmproj = tiny_pair("q8_0")
    app = create_app(lambda: AutoGLM.load(text, mmproj=mmproj, n_ctx=4096, content_format="string"))
    look = {"width": width, "theme": theme, "language": language}
    with listening(app) as url, visiting(chromium, url, **look) as visit:
        visit.page.evaluate(
            """() => {
              window.lengths = new Set();
              const turns = document.querySelector("#turns");
              const note = () => window.lengths.add(turns.textContent.length);
              new MutationObserver(note).observe(turns, {subtree: true, childList: true});
            }"""
        )
        visit.carry("drop", SCREEN.read_bytes())
        assert visit.wait("#tray img").evaluate("i => [i.naturalWidth, i.naturalHeight]") == [
            1080,
            2400,
        ]
        visit.say(task)
        answer = visit.answer()
        assert visit.page.evaluate("window.lengths.size") > 4, "it came in pieces"
        action = parse_action(answer.locator("code").inner_text())
        (x, y) = action.points["element"]
        for across in (width, width - 24):  # and after the window has become narrower
            visit.page.set_viewport_size({"width": across, "height": 800})
            assert (
                visit.page.evaluate(PLACES)
                == [
                    pytest.approx(
                        (x + 0.5, y + 0.5), abs=1.5
                    )  # thousandths: about half a pixel here
                ]
                * 2
            )
        assert answer.locator(".thinking").get_attribute("open") is None, "it is folded"
        assert re.search(r"\d", answer.locator(".statistics").inner_text())
        visit.page.reload()
        visit.wait("#state[data-state=ready]")
        assert parse_action(visit.answer().locator("code").inner_text()) == action


@pytest.mark.native
def test_generation_of_a_model_is_stopped(
    chromium: Browser, tiny_pair: Callable[[str], tuple[Path, Path]]
) -> None:
    text, mmproj = tiny_pair("q8_0")
    app = create_app(lambda: AutoGLM.load(text, mmproj=mmproj, n_ctx=4096, content_format="string"))
    with listening(app) as url, visiting(chromium, url) as visit:
        visit.carry("drop", SCREEN.read_bytes())
        visit.wait("#tray img")
        visit.say("Tap Bluetooth")
        visit.page.click("#stop")
        visit.answer()
        wait_until(lambda: service_of(app).queue.is_idle)
        visit.say("Open Chrome")
        assert "Chrome" in visit.answer(2).inner_text()


# --- asking, stopping, asking again ---


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_generation_is_stopped_and_what_came_stays(chromium: Browser, way: str) -> None:
    app = fake_app(PacedEngine(ENDLESS, token_s=0.003, n_ctx=ROOM))
    with listening(app) as url, visiting(chromium, url) as visit:
        visit.page.uncheck("#agent")
        visit.say("hi")
        visit.until("() => document.querySelector('.answer .said').textContent.length > 20")
        if way == "button":
            visit.page.click("#stop")
        else:
            visit.page.keyboard.press(way)
        text = visit.answer().inner_text()
        assert text.startswith("again again") and "Stopped." in text
        wait_until(lambda: service_of(app).queue.is_idle)
        visit.say("again")  # the connection goes on
        visit.until("() => document.querySelectorAll('.answer .said')[1]?.textContent.length > 5")
        visit.page.click("#stop")


def test_question_asked_right_after_a_stop_waits_for_its_turn(chromium: Browser) -> None:
    engine = PacedEngine(b"ok", n_ctx=ROOM)
    engine.gate = threading.Event()
    app = fake_app(engine)
    with listening(app) as url, visiting(chromium, url) as visit:
        visit.page.uncheck("#agent")
        visit.say("one")
        visit.page.click("#stop")
        visit.say("two")
        engine.gate.set()
        assert visit.answer(2).locator(".said").inner_text() == "ok"


def test_another_answer_is_asked_for_with_a_seed(chromium: Browser) -> None:
    with saying(TAP) as url, visiting(chromium, url) as visit:
        sent: list[dict[str, Any]] = []
        visit.page.on(
            "websocket", lambda s: s.on("framesent", lambda data: sent.append(json.loads(data)))
        )
        visit.open()
        visit.say("hi")
        visit.answer()
        visit.page.get_by_role("button", name="Try another answer").click()
        visit.until("() => document.querySelector('.answer[aria-busy=false]')")
        first, second = [frame for frame in sent if frame["type"] == "generate"]
        assert first["messages"] == second["messages"]
        assert "temperature" not in first and second["temperature"] > 0
        assert isinstance(second["seed"], int)
        assert visit.page.locator(".turn").count() == 2


def test_new_chat_is_empty_and_the_last_one_can_be_brought_back(chromium: Browser) -> None:
    with saying("fine") as url, visiting(chromium, url) as visit:
        visit.page.uncheck("#agent")
        visit.say("hello")
        visit.answer()
        visit.page.click("#new-chat")
        visit.wait("#welcome")
        assert visit.page.locator(".turn").count() == 0
        visit.page.click("#undo-new")
        assert "fine" in visit.answer().inner_text()
        assert visit.page.locator(".turn").count() == 2


def test_waiting_for_others_is_told(chromium: Browser) -> None:
    engine = PacedEngine(b"ok", n_ctx=ROOM)
    engine.gate = threading.Event()
    with (
        listening(fake_app(engine)) as url,
        visiting(chromium, url) as one,
        visiting(chromium, url) as two,
    ):
        one.say("hi")
        one.until("() => /Reading/.test(document.querySelector('.status').textContent)")
        two.say("hi")
        two.until("() => /Waiting for 1 /.test(document.querySelector('.status').textContent)")
        engine.gate.set()
        one.answer()
        two.answer()


# --- what goes wrong ---


def test_text_of_a_model_is_never_read_as_html(chromium: Browser) -> None:
    evil = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><b>bold</b>"

    def echo(prompt: str) -> bytes:
        return evil.encode() if prompt else b""

    with saying(echo) as url, visiting(chromium, url, excuse="TrustedHTML") as visit:
        visit.page.uncheck("#agent")
        visit.say(evil)
        assert visit.answer().locator(".said").inner_text() == evil
        assert visit.page.locator(".user .said").inner_text() == evil
        assert visit.page.locator(".turn b, .turn script, .turn img").count() == 0
        assert visit.page.evaluate("window.hacked") is None
        with pytest.raises(Exception, match="TrustedHTML"):
            visit.page.evaluate("document.body.innerHTML = '<p>'")


@pytest.mark.parametrize(
    ("name", "kind", "data", "told"),
    [
        ("notes.txt", "text/plain", b"hello", "“notes.txt” is no image"),
        ("torn.png", "image/png", png()[:20], "“torn.png” cannot be opened"),
        ("vast.png", "image/png", png(60, 60), "60 × 60 pixels"),
        ("heavy.png", "image/png", png(300, 100), "at most"),
    ],
)
def test_file_that_cannot_be_sent_is_refused_in_words(
    chromium: Browser, name: str, kind: str, data: bytes, told: str
) -> None:
    params = ServerParams(max_image_pixels=3000, max_body_bytes=180_000)
    with saying("ok", params=params) as url, visiting(chromium, url) as visit:
        visit.carry("drop", data, name, kind)
        assert told in visit.wait("#note").inner_text()
        assert visit.page.locator("#tray img").count() == 0
        visit.carry("paste", png(40, 60), "fine.png")
        assert "40 × 60" in visit.wait("#tray").inner_text()
        assert visit.page.locator("#note").is_hidden()


def test_screenshot_is_chosen_and_removed(chromium: Browser, tmp_path: Path) -> None:
    path = tmp_path / "shot.jpg"
    Image.open(io.BytesIO(png())).save(path)
    with saying("ok") as url, visiting(chromium, url) as visit:
        with visit.page.expect_file_chooser() as chooser:
            visit.page.click("#attach")
        chooser.value.set_files(path)
        assert "shot.jpg" in visit.wait("#tray").inner_text()
        visit.page.get_by_role("button", name="Remove the screenshot").click()
        assert visit.page.locator("#tray").is_hidden()


def test_error_is_told_with_what_to_do_and_nothing_is_lost(chromium: Browser) -> None:
    answers = iter([RuntimeError("secret"), b"fine"])

    def answer(_: str) -> bytes:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    with saying(answer) as url, visiting(chromium, url) as visit:
        visit.page.uncheck("#agent")
        visit.say("a long message")
        failed = visit.answer()
        assert "The server failed. Try again" in failed.locator("[role=alert]").inner_text()
        assert "secret" not in failed.inner_text()
        visit.page.get_by_role("button", name="Try again").click()
        visit.until("() => document.querySelector('.answer .said')?.textContent === 'fine'")
        assert visit.page.locator(".user").inner_text() == "a long message"


def test_prompt_that_does_not_fit_is_told(chromium: Browser) -> None:
    app = fake_app(FakeEngine(b"ok", n_ctx=200))
    with listening(app) as url, visiting(chromium, url) as visit:
        visit.page.uncheck("#agent")
        visit.say("x" * 500)
        told = visit.answer().locator("[role=alert]").inner_text()
        assert "does not fit into the model's context" in told
        assert "The server says:" in told


def test_page_comes_back_when_the_server_does(chromium: Browser) -> None:
    lost = "WebSocket connection|ERR_CONNECTION_REFUSED"
    app = fake_app(PacedEngine(ENDLESS, token_s=0.003, n_ctx=ROOM))
    with listening(app) as url:
        port = urlsplit(url).port or 0
        visit_now = visiting(chromium, url, excuse=lost)
        visit = visit_now.__enter__()
        visit.page.uncheck("#agent")
        visit.say("hi")
        visit.until("() => document.querySelector('.answer .said').textContent.length > 20")
    failed = visit.answer()
    assert failed.inner_text().startswith("again again"), "what came is kept"
    assert failed.locator("[role=alert]").count() == 1
    visit.wait("#state[data-state=bad]")
    assert "Is autoglm-gguf serve running?" in visit.page.locator("#banner").inner_text()
    visit.say("the next")
    assert "Your message is still here" in visit.wait("#note").inner_text()
    assert visit.page.input_value("#input") == "the next"
    with listening(fake_app(PacedEngine(b"back", n_ctx=ROOM)), port=port):
        visit.wait("#state[data-state=ready]")
        assert visit.page.locator("#banner").is_hidden()
        visit.page.press("#input", "Enter")
        assert visit.answer(2).locator(".said").inner_text() == "back"
        visit_now.__exit__(None, None, None)


def test_loading_is_told_until_it_is_done(chromium: Browser) -> None:
    gate = threading.Event()

    def load() -> AutoGLM:
        assert gate.wait(60)
        return AutoGLM(FakeEngine(b"ok"), content_format="string")

    with (
        listening(fake_app(load=load), ready=False) as url,
        visiting(chromium, url, ready=False) as visit,
    ):
        visit.page.goto(url)
        visit.until("() => /being loaded/.test(document.querySelector('#banner').textContent)")
        gate.set()
        visit.wait("#state[data-state=ready]")
        assert visit.page.locator("#banner").is_hidden()


# --- the key ---


def test_page_answers_wherever_it_is_mounted(chromium: Browser) -> None:
    app = fake_app(FakeEngine(b"ok", n_ctx=ROOM))
    whole = Starlette(
        routes=[Mount("/llm", app)], lifespan=lambda _: app.router.lifespan_context(app)
    )
    whole.state.service = service_of(app)
    with listening(whole) as url, visiting(chromium, url + "/llm") as visit:
        visit.say("hi")
        assert "ok" in visit.answer().inner_text()


def test_key_is_asked_for_and_kept_in_memory_only(chromium: Browser) -> None:
    with (
        saying("ok", params=ServerParams(api_key=KEY)) as url,
        visiting(chromium, url, ready=False) as visit,
    ):
        headers: list[str | None] = []
        visit.page.on(
            "request",
            lambda r: headers.append(r.headers.get("authorization")) if "status" in r.url else None,
        )
        visit.page.goto(url)
        for wrong, told in (
            ("", "Enter the key"),
            ("two words", "without spaces"),
            ("not-the-key", "not this server's key"),
        ):
            visit.page.locator("#key-dialog").wait_for()
            visit.page.fill("#key", wrong)
            visit.page.keyboard.press("Enter")
            assert told in visit.wait("#key-fault").inner_text()
        visit.page.fill("#key", KEY)
        visit.page.keyboard.press("Enter")
        visit.wait("#state[data-state=ready]")
        visit.page.uncheck("#agent")
        visit.say("hi")
        assert visit.answer().locator(".said").inner_text() == "ok"
        assert headers and set(headers) == {f"Bearer {KEY}"}
        kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        assert KEY not in visit.page.evaluate(kept)
        assert KEY not in visit.page.content()
        visit.page.reload()
        visit.page.locator("#key-dialog").wait_for()
        visit.page.keyboard.press("Escape")
        visit.page.click("#enter-key")
        visit.page.fill("#key", KEY)
        visit.page.keyboard.press("Enter")
        assert "ok" in visit.answer().inner_text(), "the conversation is still there"
        visit.wait("#state[data-state=ready]")
