"""``serve``: options, the key from the environment, and a whole run with the embedded model."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Self

import pytest
from cloud_server import Cloud, say
from serving import image_part, png

from autoglm_gguf.cli import serve
from autoglm_gguf.cli.main import main
from autoglm_gguf.server.params import KEY_VARIABLE
from autoglm_gguf.server.sizes import REQUEST_BYTES


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", *words])


def test_defaults_are_loopback_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    arguments = parsed()
    params = serve._params(arguments)
    assert (params.host, params.port, params.api_key) == ("127.0.0.1", 8000, None)
    assert arguments.content_format == "string"
    assert params.constrain_actions == "auto"


def test_key_comes_from_option_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "from-env")
    assert serve._params(parsed("--host", "0.0.0.0")).api_key == "from-env"
    assert serve._params(parsed("--api-key", "given")).api_key == "given"


def test_options_become_parameters() -> None:
    params = serve._params(
        parsed(
            *("--allow-host", "phone.lan", "--allow-origin", "https://a.example"),
            *("--constrain-actions", "off", "--max-queue", "5", "--max-tokens", "100"),
            *("--max-body", "4MB", "--max-images", "2", "--max-image-pixels", "1000000"),
            *("--fetch-images", "--shutdown-seconds", "3", "--port", "0"),
        )
    )
    assert params.allowed_hosts == ("phone.lan",)
    assert params.allowed_origins == ("https://a.example",)
    assert params.constrain_actions == "off"
    assert (params.max_queue, params.max_tokens, params.max_images) == (5, 100, 2)
    assert (params.max_body_bytes, params.max_image_pixels) == (4_000_000, 1_000_000)
    assert params.fetch_images
    assert (params.shutdown_s, params.port) == (3.0, 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--host", "0.0.0.0"), "no API key is set"),
        (("--port", "99999"), "port 99999"),
        (("--api-key", "two words"), "api_key"),
        (("--api-key", ""), "api_key"),
        (("--max-body", "huge"), "not a size"),
    ],
)
def test_wrong_option_is_usage(
    words: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    try:
        code: Any = main(["serve", *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert says in capsys.readouterr().err


def test_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.startswith("autoglm_gguf.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 1
    assert "pip install 'autoglm-gguf[server]'" in capsys.readouterr().err


def test_missing_model_ends_with_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nowhere.gguf", "--port", "0"]) == 1
    assert "nowhere.gguf: no such file" in capsys.readouterr().err


class Served:
    """``serve`` in a process of its own, until it is told to end."""

    def __init__(self, cache: Path, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "autoglm_gguf", "serve", *words, "--port", "0"],
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "AUTOGLM_GGUF_CACHE": str(cache), "PYTHONIOENCODING": "utf-8"},
        )
        self._lines: list[str] = []

    @property
    def told(self) -> str:
        return "".join(self._lines)

    def __enter__(self) -> Self:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            if line.startswith("ready:"):
                break
        self.url = next(w for w in self.told.split() if w.startswith("http")).rstrip(";")
        return self

    def ask(self, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def memory(self) -> Any:
        with urllib.request.urlopen(f"{self.url}/status", timeout=60) as answer:
            return json.load(answer)["memory"]

    def end(self) -> int:
        assert self._process.stderr is not None
        self._process.send_signal(signal.SIGTERM)
        self._lines += self._process.stderr
        return self._process.wait(60)

    def __exit__(self, *_: object) -> None:
        assert self._process.stderr is not None
        self._process.kill()
        self._process.wait()
        self._process.stderr.close()


OPEN_WECHAT = [{"role": "user", "content": "打开微信"}]


@pytest.mark.native
def test_serve_answers_over_http_until_it_is_told_to_end(
    acting_model: Path, tmp_path: Path
) -> None:
    with Served(tmp_path, str(acting_model)) as served:
        told = served.ask(messages=OPEN_WECHAT)
        assert told["choices"][0]["message"]["content"].endswith('do(action="Launch", app="微信")')
        assert "route" not in told
        assert served.end() == 0
    assert "n_ctx" in served.told
    assert "POST /v1/chat/completions 200" in served.told
    assert "微信" not in served.told


@pytest.mark.native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measured on Linux")
def test_serve_holds_no_more_than_planned_after_a_screenshot_that_does_not_compress(
    random_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    screen = [image_part(png(1080, 2400)), {"type": "text", "text": "hi"}]
    with Served(tmp_path, str(random_pair[0])) as served:
        before = served.memory()
        assert before["planned_phase_bytes"]["decode"] > REQUEST_BYTES
        for _ in range(2):
            served.ask(messages=[{"role": "user", "content": screen}], max_tokens=4)
        memory = served.memory()
        assert served.end() == 0
    assert memory["planned_bytes"] == before["planned_bytes"]
    assert memory["measured"]["total_bytes"] <= memory["planned_bytes"]


@pytest.mark.native
@pytest.mark.parametrize(
    ("words", "body", "reason"),
    [
        ((), {"max_tokens": 2}, "no valid action, cut off at max_tokens"),
        (("--memory-budget", "1MB"), {}, "does not fit"),
    ],
)
def test_serve_asks_its_cloud_where_the_device_is_not_enough(
    acting_model: Path, tmp_path: Path, words: tuple[str, ...], body: dict[str, Any], reason: str
) -> None:
    said = 'do(action="Home")'
    with Cloud(say(said)) as cloud:
        behind = ("--cloud-base-url", cloud.base_url, "--cloud-model", "big")
        with Served(tmp_path, str(acting_model), *behind, *words) as served:
            told = served.ask(messages=OPEN_WECHAT, constrain="action", **body)
            assert served.end() == 0
    assert told["choices"][0]["message"]["content"] == said
    assert told["route"]["source"] == "cloud"
    assert reason in told["route"]["reason"]
    assert f"note: cloud: big at {cloud.address}" in served.told


def test_cloud_options_are_checked_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--cloud-images", "--port", "0"]) == 2
    assert "--cloud-images: needs --cloud-base-url" in capsys.readouterr().err
