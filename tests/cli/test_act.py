"""``act`` on a real pair whose answer is known."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import Shape, build_checkpoint
from PIL import Image

from autoglm_gguf import convert
from autoglm_gguf.cli.main import main

pytestmark = pytest.mark.native
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    Image.new("RGB", (112, 168), "red").save(tmp_path / "screen.png")
    return tmp_path / "screen.png"


def test_act_prints_the_action_to_stdout_and_the_thinking_to_stderr(
    acting_model: Path, screen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "打开微信", "--screenshot", str(screen), "--n-threads", "1"]
    assert main(["act", str(acting_model), *options]) == 0
    printed = capsys.readouterr()
    assert printed.out == 'do(action="Launch", app="微信")\n'
    assert "thinking: 在桌面" in printed.err


def test_act_prints_json(run: Run, acting_model: Path, screen: Path) -> None:
    options = ["--screenshot", screen, "--no-system", "--n-threads", 1, "--json"]
    result = run("act", acting_model, "--task", "打开微信", *options)
    assert result.returncode == 0, result.stderr
    step = json.loads(result.stdout)
    assert step["thinking"] == "在桌面"
    assert step["action"] == {"name": "Launch", "app": "微信"}
    assert step["rendered"] == 'do(action="Launch", app="微信")'
    assert step["usage"]["image_tokens"] == 24
    assert step["usage"]["completion_tokens"] == 7


def test_act_puts_memory_into_its_json_when_asked(
    run: Run, acting_model: Path, screen: Path
) -> None:
    options = ["--screenshot", screen, "--json", "--stats", "--n-ctx", 1024, "--n-threads", 1]
    result = run("act", acting_model, "--task", "打开微信", "--no-system", *options)
    assert result.returncode == 0, result.stderr
    memory = json.loads(result.stdout)["memory"]
    assert memory["planned"]["budget_bytes"] == 4_000_000_000
    assert memory["planned"]["context"]["n_ctx"] == 1024
    assert set(memory["planned"]["phase_bytes"]) == {"load", "encode", "decode"}
    measured = memory["measured"]
    assert measured["peak_bytes"] >= measured["anonymous_bytes"] > 10**6
    assert measured["device_bytes"] == 0


def test_act_tells_memory_on_stderr_when_asked(
    acting_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["act", str(acting_model), "--task", "打开微信", "--stats"]) == 0
    printed = capsys.readouterr()
    assert printed.out == 'do(action="Launch", app="微信")\n'
    assert printed.err.splitlines()[-1].split() == ["budget", "4.00", "GB"]


def test_act_draws_what_it_would_touch(
    acting_model: Path, screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = [
        "act",
        str(acting_model),
        "--task",
        "t",
        "--n-threads",
        "1",
        "--screenshot",
        str(screen),
    ]
    assert main([*task, "--annotate", str(tmp_path / "out.png")]) == 0
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == (112, 168)
    assert main([*task, "--annotate", "out.gguf"]) == 2
    assert main([*task, "--annotate", str(tmp_path / "nowhere" / "out.png")]) == 2
    told = capsys.readouterr()
    assert "nowhere/out.png: no such directory" in told.err
    assert told.out.count("do(") == 1, "refused before anything is asked"
    assert main(["act", str(acting_model), "--task", "t", "--annotate", "out.png"]) == 2
    assert "needs --screenshot" in capsys.readouterr().err


def test_act_opens_listed_apps_only(
    acting_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apps = tmp_path / "apps.txt"
    apps.write_text("Chrome\n\n微博\n", "utf-8")
    task = ["act", str(acting_model), "--task", "t", "--n-threads", "1"]
    assert main([*task, "--apps", str(apps)]) == 0
    out = capsys.readouterr().out  # it says 微信 in one token, for which there is no like
    assert out.startswith(("do(", "finish(")) and "微信" not in out
    assert main([*task, "--apps", str(tmp_path / "none.txt")]) == 1
    apps.write_text("微信\n", "utf-8-sig")  # as Windows' Notepad saves it
    assert main([*task, "--apps", str(apps)]) == 0
    assert capsys.readouterr().out == 'do(action="Launch", app="微信")\n'
    apps.write_text("\n")
    assert main([*task, "--apps", str(apps)]) == 2
    assert "holds no names" in capsys.readouterr().err
    apps.write_text("Chrome\n")
    assert main([*task, "--apps", str(apps), "--no-constrain"]) == 2


def test_act_without_an_action_exits_with_1(
    endless_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["act", str(endless_model), "--task", "t", "--n-threads", "1"]
    assert main([*task, "--max-tokens", "60"]) == 0  # it is made to choose
    printed = capsys.readouterr()
    assert printed.out.startswith(("do(", "finish("))
    assert "tokens ran out" in printed.err
    assert main([*task, "--max-tokens", "5", "--no-constrain"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: answer: no do(...) or finish(...)" in printed.err
    assert "hint: " in printed.err


@pytest.mark.parametrize(
    ("screenshot", "options", "named"),
    [
        ("nowhere.png", [], "nowhere.png"),
        ("text.png", [], "text.png: not an image"),
        ("screen.png", ["--n-ctx", "64"], "does not fit the context"),
    ],
)
def test_act_names_what_is_wrong_with_the_request(
    acting_model: Path,
    screen: Path,
    screenshot: str,
    options: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (screen.parent / "text.png").write_text("no image")
    path = str(screen.parent / screenshot)
    assert main(["act", str(acting_model), "--task", "t", "--screenshot", path, *options]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert named in printed.err
    assert "hint: " in printed.err


def test_act_refuses_a_screenshot_when_the_model_takes_none(
    acting_model: Path, screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / acting_model.name).write_bytes(acting_model.read_bytes())
    assert main(["act", str(alone), "--task", "t", "--screenshot", str(screen)]) == 1
    assert "takes no images" in capsys.readouterr().err


def test_act_refuses_the_mmproj_of_another_model(
    acting_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = convert(build_checkpoint(tmp_path / "other", Shape(seed=2)), tmp_path).mmproj
    assert main(["act", str(acting_model), "--task", "t", "--mmproj", str(other)]) == 1
    assert f"{other.name}: mmproj of another checkpoint" in capsys.readouterr().err
