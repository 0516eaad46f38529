"""Each file of examples/, run on autoglm-tiny."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from notebooks import run_notebook

from autoglm_gguf.evaluate.screens import held_out_tasks

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
MAX_LINES = 60
Example = Callable[..., "subprocess.CompletedProcess[str]"]
WECHAT = 'do(action="Launch", app="微信")'


def test_examples_are_listed_and_tested() -> None:
    listed = (FOLDER / "README.md").read_text("utf-8")
    tested = Path(__file__).read_text("utf-8")
    for name in (*SCRIPTS, *(path.name for path in FOLDER.glob("*.ipynb"))):
        assert f"[{name}]({name})" in listed
        assert f'"{name}"' in tested


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (FOLDER / name).read_text("utf-8")
    assert len(text.splitlines()) < MAX_LINES
    documentation = ast.get_docstring(ast.parse(text)) or ""
    assert f"examples/{name}" in documentation


@pytest.mark.native
def test_quick_start_answers_and_tells_the_cost(example: Example) -> None:
    said = example("quick_start.py").stdout
    assert WECHAT in said
    assert re.search(r"^\d+ tokens read, \d+ written, \d+ a second\n\d+ MB held$", said, re.M)


@pytest.mark.native
def test_streaming_pays_only_for_what_is_new(example: Example) -> None:
    said = example("streaming.py", typed="打开微信\n\n返回上一页\n").stdout
    costs = re.findall(r"\[(\d+) tokens read, (\d+) known before, first word after \d+ ms\]", said)
    assert said.count("<answer>") == 2 and WECHAT in said
    (first, known), (_, known_then) = [tuple(map(int, cost)) for cost in costs]
    assert known == 0 and known_then > first


@pytest.mark.native
def test_screenshot_to_action_taps_what_is_asked_for(example: Example, tmp_path: Path) -> None:
    task = held_out_tasks(5)[4]
    said = example("screenshot_to_action.py").stdout.splitlines()
    assert said[0].startswith(task.text) and said[1] == task.action.render()
    x, y = map(int, said[2].removeprefix("adb shell input tap ").split())
    left, top, right, bottom = task.target.box
    assert left <= x <= right and top <= y <= bottom
    assert (tmp_path / "action.png").exists()


@pytest.mark.native
def test_phone_agent_launches_goes_back_and_finishes(example: Example) -> None:
    said = example("phone_agent.py").stdout.splitlines()
    assert [line.split(":")[0] for line in said[:3]] == ["Home", "微信", "Home"]
    assert [line.split()[-1] for line in said[1:3]] == [
        'do(action="Back")',
        'finish(message="任务已完成。")',
    ]
    assert said[0].endswith(WECHAT) and said[3:] == ["任务已完成。"]


@pytest.mark.native
def test_voice_command_acts_and_replies(example: Example) -> None:
    done = example("voice_command.py", typed="打开微信\nwhat can you do?\nopen Camera\n")
    assert done.stdout.splitlines() == [
        "Opening 微信.",
        "I am a phone assistant and can use the phone for you.",
        "Opening Camera.",
    ]
    assert done.stderr.splitlines()[0] == WECHAT


@pytest.mark.native
def test_summarise_document_stays_within_its_budget(example: Example) -> None:
    said = example("summarise_document.py", str(FOLDER.parent / "LICENSE"), "--n-tokens", "256")
    counts = re.findall(r"^part (\d+) of (\d+): (\d+) tokens read$", said.stdout, re.M)
    n_parts = int(counts[0][1])
    assert n_parts > 2 and len(counts) > n_parts, "the parts, then their summaries"
    assert max(int(n_tokens) for _, _, n_tokens in counts) <= 256


@pytest.mark.native
def test_code_help_prints_lines_as_a_compiler_does(example: Example) -> None:
    path = FOLDER / "quick_start.py"
    for line in example("code_help.py", str(path)).stdout.splitlines():
        assert re.match(rf"{re.escape(str(path))}:\d{{1,4}}: .", line)


@pytest.mark.native
def test_hybrid_asks_the_cloud_when_it_is_unsure(example: Example) -> None:
    said = example("hybrid.py").stdout.splitlines()
    assert said[0] == f"打开微信: {WECHAT}" and said[1].startswith("  [local: ")
    assert said[2].endswith('do(action="Interact")') and said[3].startswith("  [cloud: ")


@contextlib.contextmanager
def running(
    name: str, port: int, environment: dict[str, str], cwd: Path
) -> Iterator[httpx2.Client]:
    """A client of an example that serves, which ends as at Ctrl-C."""
    command = [sys.executable, FOLDER / name, "--port", str(port)]
    with (
        subprocess.Popen(command, cwd=cwd, env=environment, stderr=subprocess.PIPE) as process,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.1)
            yield client
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


@pytest.mark.native
def test_web_app_streams_and_acts(environment: dict[str, str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    screen = (FOLDER / "screen.png").read_bytes()
    with running("web_app.py", port, environment, tmp_path) as client:
        assert WECHAT in client.get("/ask", params={"q": "打开微信"}).text
        step = client.post("/act", params={"task": "Open Chrome"}, content=screen).json()
        assert step["action"] == 'do(action="Launch", app="Chrome")'
        refused = client.post("/act", params={"task": "Open Chrome"}, content=b"no image")
        assert refused.status_code == 422 and refused.json()["error"]


@pytest.mark.native
def test_tour_gives_the_outputs_it_keeps(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOGLM_GGUF_CACHE", environment["AUTOGLM_GGUF_CACHE"])
    notebook = json.loads((FOLDER / "tour.ipynb").read_text("utf-8"))
    kept = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    fresh = run_notebook(notebook)
    assert [_texts(outputs) for outputs in fresh] == [_texts(outputs) for outputs in kept]
    assert sum("image/png" in output.get("data", {}) for cell in kept for output in cell) == 2


def _texts(outputs: list[dict[str, object]]) -> list[object]:
    """What was printed; pictures are other bytes with another Pillow."""
    return [output["text"] for output in outputs if output["output_type"] == "stream"]


@pytest.mark.native
def test_demo_converts_answers_and_draws(example: Example, tmp_path: Path) -> None:
    said = example("demo.py").stdout
    assert WECHAT in said
    for name in ("autoglm-tiny-Q8_0.gguf", "mmproj-autoglm-tiny-Q8_0.gguf", "tap-1.png"):
        assert (tmp_path / "out" / name).exists()
