"""What the page at ``/`` shows, and to whom: marks, languages, themes, memory, accessibility."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from browser import KEY, PLACES, ROOM, TAP, Visit, ask_with_screen, axe_source, saying, visiting
from builders import describe_sizes
from serving import fake_app, listening, png

from autoglm_gguf import ContextParams
from autoglm_gguf.engine.fake import FakeEngine
from autoglm_gguf.memory.plan import plan_pair
from autoglm_gguf.server.params import ServerParams

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


# --- the action on the screenshot ---


@pytest.mark.parametrize(
    ("call", "places"),
    [
        ('do(action="Tap", element=[0,0])', [(0.5, 0.5)] * 2),
        ('do(action="Tap", element=[999,999])', [(999.5, 999.5)] * 2),
        ('do(action="Double Tap", element=[250,600])', [(250.5, 600.5)] * 3),
        ('do(action="Long Press", element=[700,120])', [(700.5, 120.5)] * 2),
    ],
)
def test_mark_lies_on_the_named_point_at_every_width(
    chromium: Browser, call: str, places: list[tuple[float, float]]
) -> None:
    with saying(f"<answer>{call}") as url, visiting(chromium, url) as visit:
        ask_with_screen(visit)
        assert visit.page.locator(".what code").inner_text() == call
        for width in (1280, 720, 360):
            visit.page.set_viewport_size({"width": width, "height": 800})
            found = visit.page.evaluate(PLACES)
            assert found == [pytest.approx(place, abs=1.5) for place in places]
        assert bool(visit.page.locator(".marks .fill").count()) == ("Long" in call)


def test_swipe_is_an_arrow_from_start_to_end(chromium: Browser) -> None:
    call = 'do(action="Swipe", start=[500,800], end=[500,200])'
    with saying(f"<answer>{call}") as url, visiting(chromium, url) as visit:
        ask_with_screen(visit, size=(200, 400))
        assert visit.page.locator(".marks").get_attribute("viewBox") == "0 0 200 400"
        way = visit.page.locator(".marks path.ring").get_attribute("d") or ""
        assert way.startswith("M100.1 320.2L100.1 80.2M"), "and the wings follow"
        assert "From 500, 800 to 500, 200" in visit.page.locator(".what").inner_text()


def test_action_is_told_in_words_and_pixels(chromium: Browser) -> None:
    call = 'do(action="Tap", element=[250,600], message="pay")'
    with saying(f"<answer>{call}") as url, visiting(chromium, url) as visit:
        ask_with_screen(visit, size=(540, 1200))
        told = visit.page.locator(".what").inner_text().split("\n")
        assert [line for line in told if line] == [
            "Tap",
            "At 250, 600",
            "pixel 135, 720 of 540 × 1200",
            "To be confirmed by you first: pay",
            call,
        ]


def test_finish_is_told_as_text(chromium: Browser) -> None:
    answer = '<think>Done.</think><answer>finish(message="All is set.")'
    with saying(answer) as url, visiting(chromium, url) as visit:
        visit.say("hi")
        assert visit.answer().locator(".said").inner_text() == "All is set."
        assert visit.page.locator(".deed").inner_text() == "Finished"


def test_chat_that_mentions_a_call_stays_text(chromium: Browser) -> None:
    answer = 'One writes do(action="Back") for that.'
    params = ServerParams(constrain_actions="off")
    with saying(answer, params=params) as url, visiting(chromium, url) as visit:
        visit.page.uncheck("#agent")
        visit.say("How does one go back?")
        assert visit.answer().locator(".said").inner_text() == answer
        assert visit.page.locator(".action").count() == 0


def test_only_the_newest_screenshot_is_sent_and_an_older_answer_keeps_its_own(
    chromium: Browser,
) -> None:
    with saying(TAP) as url, visiting(chromium, url) as visit:
        sent: list[dict[str, Any]] = []
        visit.page.on(
            "websocket", lambda s: s.on("framesent", lambda data: sent.append(json.loads(data)))
        )
        visit.open()
        for n in (1, 2):
            visit.carry("drop", png(56 * n, 112))
            visit.wait("#tray img")
            visit.say(f"task {n}")
            visit.answer(n)
        visit.say("task 3")
        visit.answer(3)
        asked = [frame["messages"] for frame in sent if frame["type"] == "generate"]
        images = [
            [message["role"] for message in messages if "image_url" in json.dumps(message)]
            for messages in asked
        ]
        assert images == [["user"]] * 3
        assert "do(action=" in asked[0][0]["content"]
        assert [message["role"] for message in asked[2]] == [
            "system",
            *["user", "assistant"] * 2,
            "user",
        ]
        assert asked[2][2]["content"] == TAP + "</answer>"
        widths = visit.page.eval_on_selector_all(".shot img", "all => all.map(i => i.naturalWidth)")
        assert widths == [56, 112, 112]


# --- looks, languages, panel ---


def test_theme_is_the_systems_until_it_is_chosen(chromium: Browser) -> None:
    with saying("ok") as url, visiting(chromium, url, theme="dark") as visit:
        theme = "document.documentElement.dataset.theme"
        assert visit.page.evaluate(theme) == "dark"
        visit.page.emulate_media(color_scheme="light")
        visit.until(f"() => {theme} === 'light'")
        visit.page.get_by_role("button", name="Switch to dark").click()
        visit.page.reload()
        assert visit.page.evaluate(theme) == "dark"


def test_both_languages_have_all_texts_and_both_are_shown(chromium: Browser) -> None:
    with saying(TAP) as url, visiting(chromium, url, language="zh-CN") as visit:
        strings = visit.page.evaluate("import('/strings.js').then((m) => m.STRINGS)")
        assert strings["en"].keys() == strings["zh"].keys()
        for key, english in strings["en"].items():
            names = re.findall(r"\{\w+\}", english)
            assert sorted(names) == sorted(re.findall(r"\{\w+\}", strings["zh"][key])), key
        ask_with_screen(visit, "点击蓝牙")
        visit.page.click("#new-chat")
        visit.page.click("#undo-new")
        assert visit.page.evaluate("document.documentElement.lang") == "zh-CN"
        assert not latin_words(visit), "all of it is Chinese"
        visit.page.click("#language")
        assert visit.page.evaluate("document.documentElement.lang") == "en"
        shown = visit.page.evaluate("document.body.innerText")
        assert "Tap" in shown and "At 250, 600" in shown and "Thinking" in shown
        assert not re.search(r"[\u4e00-\u9fff]", re.sub("点击蓝牙|中文", "", shown))
        visit.page.reload()
        visit.wait("#state[data-state=ready]")
        assert visit.page.evaluate("document.documentElement.lang") == "en", "the choice is kept"


def latin_words(visit: Visit) -> list[str]:
    """Texts and labels of the page that hold English words."""
    texts: list[str] = visit.page.evaluate(
        """() => {
          const names = ["aria-label", "title", "placeholder", "alt", "aria-valuetext"];
          const found = [];
          for (const element of document.querySelectorAll("[data-said]")) {
            if (element.childElementCount === 0) found.push(element.textContent);
            for (const name of names) found.push(element.getAttribute(name) ?? "");
          }
          return found;
        }"""
    )
    known = "AutoGLM|EN|English|API|autoglm-gguf serve|Enter|Shift|Esc|MB|GB|fake|token"
    return [text for text in texts if re.search("[A-Za-z]{2,}", re.sub(known, "", text))]


def test_memory_and_speed_are_those_of_the_server(chromium: Browser) -> None:
    engine = FakeEngine(TAP.encode(), n_ctx=ROOM)
    sizes = describe_sizes(layer_bytes=(10**8,) * 4, tower_bytes=10**8)
    plan = plan_pair(sizes, ContextParams(), 4 * 10**9)
    engine.info = replace(engine.info, plan=plan, notes=("a note with its reason",))
    with listening(fake_app(engine)) as url, visiting(chromium, url) as visit:
        assert visit.page.locator("#budget").inner_text() == "4.00 GB"
        planned = float(visit.page.locator("#planned").inner_text().split()[0])
        assert planned * 10**6 == pytest.approx(plan.peak_bytes, rel=0.01)
        gauge = visit.page.locator("#gauge")
        assert "budget 4.00 GB" in (gauge.get_attribute("aria-valuetext") or "")
        tick = "e => parseFloat(getComputedStyle(e).left) / e.parentElement.clientWidth"
        share = visit.page.locator(".gauge .tick").evaluate(tick)
        assert share == pytest.approx(plan.peak_bytes / (4 * 10**9), abs=0.01)
        assert "a note with its reason" in (visit.page.locator("#notes").text_content() or "")
        ask_with_screen(visit)
        assert visit.page.locator("#speed-completion").inner_text() == str(len(TAP))
        assert re.search(r"\d s$", visit.page.locator("#speed-first").inner_text())
        assert visit.page.locator("#speed-prompt-image").inner_text() == "200"


# --- for everybody ---


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious(chromium: Browser, width: int, theme: str) -> None:
    axe = axe_source()
    answers = iter([TAP.encode(), b"<think>Hm.</think>text", RuntimeError()])

    def answer(_: str) -> bytes:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    with saying(answer) as url, visiting(chromium, url, width=width, theme=theme) as visit:
        assert visit.findings(axe) == []
        visit.carry("drop", b"text", "notes.txt", "text/plain")
        visit.wait("#note")
        if visit.page.locator("#panel-toggle").is_visible():
            visit.page.click("#panel-toggle")
        assert visit.findings(axe) == []
        visit.page.keyboard.press("Escape")
        assert visit.page.locator("#panel").is_visible() == (width == 1280)
        ask_with_screen(visit)
        visit.page.locator(".thinking summary").first.click()
        visit.page.uncheck("#agent")
        visit.say("hi")
        visit.answer(2)
        visit.say("and now")
        visit.answer(3)
        assert visit.page.locator(".failure").count() == 1
        assert visit.findings(axe) == []
        visit.page.evaluate("document.querySelector('#memory-short').textContent = '10.24 GB'")
        for across in (width, 390, 360):
            visit.page.set_viewport_size({"width": across, "height": 800})
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= across
            assert visit.page.locator("#state").is_visible()
    with (
        saying("ok", params=ServerParams(api_key=KEY)) as url,
        visiting(chromium, url, width=width, theme=theme, ready=False) as visit,
    ):
        visit.page.goto(url)
        visit.wait("#key-dialog[open]")
        assert visit.findings(axe) == []


def test_everything_is_done_with_the_keyboard(chromium: Browser) -> None:
    with saying(TAP) as url, visiting(chromium, url) as visit:
        keys = visit.page.keyboard
        keys.press("Tab")
        assert visit.page.evaluate("document.activeElement.className") == "skip"
        keys.press("Enter")
        assert visit.page.evaluate("document.activeElement.id") == "input"
        keys.type("first line")
        keys.press("Shift+Enter")
        keys.type("second")
        assert visit.page.input_value("#input") == "first line\nsecond"
        keys.press("Enter")
        visit.answer()
        assert visit.page.locator(".user .said").inner_text() == "first line\nsecond"
        assert visit.page.evaluate("document.activeElement.id") == "input"
        seen: list[str] = []
        for _ in range(40):
            keys.press("Tab")
            focus = visit.page.evaluate(
                """() => {
                  const element = document.activeElement;
                  const shown = element.closest(".switch") ?? element;
                  const style = getComputedStyle(shown);
                  const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
                  return [element.id || element.textContent.trim(), ring || element.id === "input"];
                }"""
            )
            name, ring = focus
            if name in seen or visit.page.evaluate("document.activeElement === document.body"):
                break
            assert ring, f"{name}: no focus ring"
            seen.append(name)
        assert {"attach", "agent", "send"} <= set(seen)
        keys.press("Tab")
        visit.page.locator(".thinking summary").first.focus()
        keys.press("Enter")
        assert visit.page.locator(".thinking[open]").count() == 1
        visit.page.locator("#theme").focus()
        keys.press("Enter")
        assert visit.page.evaluate("document.documentElement.dataset.theme") == "dark"
        visit.page.get_by_role("button", name="Try another answer").focus()
        keys.press("Space")
        visit.answer()


def test_answer_is_read_out_once_when_it_is_whole(chromium: Browser) -> None:
    with (
        saying(TAP, token_s=0.003) as url,
        visiting(chromium, url) as visit,
    ):
        visit.page.evaluate(
            """() => {
              window.told = [];
              const place = document.querySelector("#announcer");
              const note = () => window.told.push(place.textContent);
              new MutationObserver(note).observe(place, {childList: true});
            }"""
        )
        visit.say("hi")
        visit.answer()
        assert visit.page.evaluate("window.told") == ["Answer: Tap. At 250, 600"]
        live = visit.page.eval_on_selector_all(
            "#turns, #turns *", "all => all.filter(e => e.ariaLive || e.role === 'status').length"
        )
        assert live == 0, "nothing that grows token by token is live"
