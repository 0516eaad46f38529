"""The cloud options of ``act`` and ``chat``, on a real pair and a scripted cloud."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
from cloud_server import Cloud, refuse, say
from PIL import Image

from autoglm_gguf.cli import cloud_options
from autoglm_gguf.cli.main import main

TAP = '<think>there</think><answer>do(action="Tap", element=[500,300])'
KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("CLOUD_KEY", KEY)


def options_of(cloud: Cloud, *more: str) -> list[str]:
    named = ["--cloud-base-url", cloud.base_url, "--cloud-model", "big"]
    return [*named, "--cloud-api-key-env", "CLOUD_KEY", "--n-threads", "1", *more]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cloud_options.add_cloud_options(parser)
    return parser.parse_args(arguments)


# --- reading them ---


def test_without_options_there_is_no_cloud() -> None:
    assert cloud_options.read_cloud(parse()) is None


def test_options_become_a_cloud_and_a_policy() -> None:
    given = ["--cloud-base-url", "https://c/v1", "--cloud-model", "m"]
    read = cloud_options.read_cloud(parse(*given))
    assert read is not None
    cloud, policy = read
    assert (cloud.name, cloud.model) == ("https://c", "m")
    assert not policy.send_images and policy.escalate_below == 0.9
    read = cloud_options.read_cloud(parse(*given, "--cloud-images", "--escalate-below", "0.2"))
    assert read is not None
    assert read[1].send_images and read[1].escalate_below == 0.2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--cloud-base-url", "https://c/v1"], "--cloud-base-url: needs --cloud-model"),
        (["--cloud-model", "m"], "--cloud-model: needs --cloud-base-url"),
        (["--cloud-images"], "--cloud-images: needs --cloud-base-url"),
        (["--escalate-below", "0"], "--escalate-below: needs --cloud-base-url"),
        (["--cloud-base-url", "c", "--cloud-model", "m"], "base URL"),
        (
            ["--cloud-base-url", "https://c", "--cloud-model", "m", "--cloud-api-key-env", "NONE_"],
            "NONE_ is not set",
        ),
        (
            ["--cloud-base-url", "https://c", "--cloud-model", "m", "--escalate-below", "7"],
            "escalate_below 7.0: not in 0..1",
        ),
    ],
)
def test_options_that_cannot_be_used_are_told_before_loading(
    given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["act", "nowhere.gguf", "--task", "t", *given]) == 2
    assert told in capsys.readouterr().err


# --- act ---


@pytest.mark.native
def test_act_is_answered_here_when_the_action_is_sure(
    acting_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Cloud(say(TAP)) as cloud:
        task = ["act", str(acting_model), "--task", "打开微信", *options_of(cloud)]
        assert main([*task, "--json"]) == 0
        printed = capsys.readouterr()
        step = json.loads(printed.out)
        assert step["rendered"] == 'do(action="Launch", app="微信")'
        assert step["route"]["source"] == "local"
        assert step["route"]["confidence"]["mean"] > 0.9
        assert "note: cloud: big at http://127.0.0.1:" in printed.err
        assert "not encrypted" in printed.err
        assert main(task) == 0
    printed = capsys.readouterr()
    assert printed.out == 'do(action="Launch", app="微信")\n'
    assert "[local: a sure action, token probability " in printed.err
    assert cloud.n_connections == 0


@pytest.mark.native
def test_act_is_answered_by_the_cloud_when_the_device_thinks_too_long(
    endless_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Cloud(say(TAP)) as cloud:
        task = ["act", str(endless_model), "--task", "t", *options_of(cloud)]
        assert main([*task, "--max-tokens", "60"]) == 0
    printed = capsys.readouterr()
    assert printed.out == 'do(action="Tap", element=[500,300])\n'
    assert "[cloud: the thinking was cut off at max_tokens]" in printed.err
    assert cloud.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in printed.err + printed.out


@pytest.mark.native
def test_act_sends_a_screenshot_only_when_told(
    endless_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (112, 168), "red").save(tmp_path / "screen.png")
    with Cloud(say(TAP)) as cloud:
        task = ["act", str(endless_model), "--task", "t", *options_of(cloud)]
        task += ["--screenshot", str(tmp_path / "screen.png"), "--max-tokens", "60"]
        assert main(task) == 0
        assert cloud.n_connections == 0
        assert "[local: its images may not leave the device" in capsys.readouterr().err
        assert main([*task, "--cloud-images"]) == 0
    assert capsys.readouterr().out == 'do(action="Tap", element=[500,300])\n'
    assert b"image_url" in cloud.requests[0].raw


@pytest.mark.native
def test_act_of_a_model_that_does_not_fit_is_answered_by_the_cloud(
    acting_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["act", str(acting_model), "--task", "t", "--memory-budget", "1MB"]
    with Cloud(say(TAP), refuse(500)) as cloud:
        assert main([*small, *options_of(cloud)]) == 0
        printed = capsys.readouterr()
        assert printed.out == 'do(action="Tap", element=[500,300])\n'
        assert "note: model: not loaded" in printed.err
        assert main([*small, *options_of(cloud)]) == 1
    assert "the cloud was asked in vain" in capsys.readouterr().err


# --- chat ---


@pytest.mark.native
def test_chat_is_answered_by_the_cloud_when_it_does_not_fit(
    acting_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chat(said: str, *more: str) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO(said + "\n"))
        assert main(["chat", str(acting_model), *options_of(cloud, "--n-ctx", "256"), *more]) == 0
        return capsys.readouterr()

    with Cloud(say("so long")) as cloud:
        printed = chat("long " * 300)
        assert printed.out == "so long\n"
        assert "[cloud: prompt: does not fit the context" in printed.err
        assert "context left" not in printed.err
        (line,) = chat("hi", "--json").out.splitlines()
        assert json.loads(line)["route"]["source"] == "local"
