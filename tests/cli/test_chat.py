"""The conversation at the command line: scripted, piped, and at a terminal."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from autoglm_gguf import AutoGLM, Message
from autoglm_gguf.cli.chat import HELP, Conversation
from autoglm_gguf.cli.prompt_line import LineReader
from autoglm_gguf.engine.fake import FakeEngine

Run = Callable[..., subprocess.CompletedProcess[str]]


def scripted(lines: list[str], *, interactive: bool = False) -> LineReader:
    script = iter(lines)

    def read_line(_: str) -> str:
        line = next(script, None)
        if line is None:
            raise EOFError
        return line

    return LineReader(read_line, interactive)


def converse(
    *lines: str, engine: FakeEngine | None = None, as_json: bool = False, interactive: bool = False
) -> list[Message]:
    """Hold a whole conversation; returns what it remembers."""
    model = AutoGLM(engine or FakeEngine(b"yes"))
    session = model.chat(system="S")
    talk = Conversation(model, session, {"max_tokens": 50}, as_json=as_json)
    talk.loop(scripted(list(lines), interactive=interactive))
    return session.messages


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    path = tmp_path / "my screen.png"
    Image.new("RGB", (112, 168), "red").save(path)
    return path


# --- scripted ---


def test_chat_streams_answers_to_stdout_and_costs_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    messages = converse("one?", "two?")
    printed = capsys.readouterr()
    assert printed.out == "yes\nyes\n"
    assert len(printed.err.splitlines()) == 2
    assert "+ 4 tokens" in printed.err
    assert "context left" in printed.err
    assert [m.content for m in messages] == ["S", "one?", "yes", "two?", "yes"]


@pytest.mark.parametrize("word", ["/exit", "/quit", "  /exit  "])
def test_chat_ends_at_exit(word: str) -> None:
    assert [m.content for m in converse("one?", word, "two?")] == ["S", "one?", "yes"]


def test_chat_skips_empty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(converse("", "   ")) == 1
    assert capsys.readouterr().out == ""


def test_chat_takes_several_lines_as_one_message() -> None:
    assert converse("one\\", "two", '"""', "a", "/exit", '"""')[1::2] == [
        Message("user", "one\ntwo"),
        Message("user", "a\n/exit"),
    ]


def test_chat_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    converse("/help")
    assert capsys.readouterr().out == HELP + "\n"
    commands = ("/image", "/clear", "/save", "/load", "/show", "/mem", "/help", "/exit")
    for command in (*commands, "Ctrl-C", "Ctrl-D"):
        assert command in HELP


def test_chat_names_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(converse("/fly me")) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("/fly: no such command")
    assert printed.out == ""


def test_chat_clear_forgets_all_but_the_system_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert converse("one?", "/clear") == [Message("system", "S")]
    assert "cleared" in capsys.readouterr().err


def test_chat_show_prints_the_conversation(
    screen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(f"/image {screen}", "what?", "/show")
    assert capsys.readouterr().out == (
        f"yes\nsystem: S\nuser: [image {screen}] what?\nassistant: yes\n"
    )


def test_chat_show_gives_a_loaded_text_no_power_over_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = AutoGLM(FakeEngine(b"yes")).chat()
    chat.messages.append(Message("user", "\x1b]0;title\x07 微信\n\u3000👍🏽"))
    chat.save(tmp_path / "a")
    converse(f"/load {tmp_path / 'a'}", "/show")
    assert capsys.readouterr().out == "user: \\x1b]0;title\\x07 微信\n\u3000👍🏽\n"


def test_chat_mem_shows_what_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    converse("/mem")
    first, *rest = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert first == ["memory", "planned", "measured"]
    assert [row[0] for row in rest] == ["peak", "anonymous", "mapped", "device"]


def test_chat_image_goes_with_the_next_message_only(
    screen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = converse(f"/image {screen}", "what?", "and now?")
    assert not isinstance(messages[1].content, str)
    assert messages[3] == Message("user", "and now?")
    printed = capsys.readouterr().err
    assert "112x168 px" in printed
    assert "(24 image)" in printed


def test_chat_image_does_not_come_again_when_the_answer_was_empty(screen: Path) -> None:
    messages = converse(f"/image {screen}", "one?", "two?", engine=FakeEngine(b""))
    shown = [isinstance(message.content, tuple) for message in messages]
    assert shown == [False, True, False, False, False]


def test_chat_image_that_has_no_room_can_be_taken_back(
    screen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine(b"yes", n_ctx=60)
    messages = converse(f"/image {screen}", "one?", "/image", "two?", "/image", engine=engine)
    assert [m.content for m in messages] == ["S", "two?", "yes"]
    told = capsys.readouterr().err
    assert "does not fit the context" in told
    assert f"{screen}: taken back" in told
    assert "/image needs a path" in told


def test_chat_goes_on_with_a_saved_conversation(
    screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "monday session"
    converse(f"/image {screen}", "what?", f"/save {path}")
    assert f"{path}: messages 3, images 1, KV cells " in capsys.readouterr().err
    engine = FakeEngine(b"yes")
    converse("forget this", f"/load {path}", "/show", "more?", engine=engine)
    printed = capsys.readouterr()
    n_bytes = screen.stat().st_size
    assert printed.out == (
        f"yes\nsystem: S\nuser: [image, {n_bytes} B] what?\nassistant: yes\nyes\n"
    )
    assert f"{path}: messages 3; /show prints them\n" in printed.err
    assert engine.n_encoded == 0


def test_chat_tells_what_of_a_saved_conversation_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converse("one?", f"/save {tmp_path / 'a'}")
    engine = FakeEngine(b"yes")
    engine.state_facts["text"] = "other"
    converse(f"/load {tmp_path / 'a'}", engine=engine)
    assert "KV state: not restored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/save", "/save needs a file"),
        ("/load", "/load needs a file"),
        ("/load nowhere", "error: nowhere: cannot be read (No such file or directory)"),
        ("/load a\0b", "error: "),
        ("/save ~nobody-of-this-name/a", "error: ~nobody-of-this-name/a: cannot be written"),
    ],
)
def test_chat_goes_on_when_nothing_can_be_saved_or_loaded(
    line: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converse("one?", line, "two?")[1:] == [
        Message("user", "one?"),
        Message("assistant", "yes"),
        Message("user", "two?"),
        Message("assistant", "yes"),
    ]
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "named"),
    [("/image", "needs a path"), ("/image nowhere.png", "nowhere.png: image cannot be read")],
)
def test_chat_goes_on_when_an_image_cannot_be_taken(
    line: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converse(line, "one?")[1:] == [Message("user", "one?"), Message("assistant", "yes")]
    assert named in capsys.readouterr().err


def test_chat_refuses_an_image_when_the_model_takes_none(
    screen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(f"/image {screen}", engine=FakeEngine(vision=False))
    assert "takes no images" in capsys.readouterr().err


def test_chat_goes_on_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    messages = converse("far too long " * 9, "ok?", engine=FakeEngine(b"yes", n_ctx=100))
    assert [m.content for m in messages] == ["S", "ok?", "yes"]
    printed = capsys.readouterr()
    assert printed.out == "yes\n"
    assert "error: prompt: does not fit the context" in printed.err


def test_chat_keeps_the_part_on_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    class InterruptedEngine(FakeEngine):
        def token_bytes(self, token: int) -> bytes:
            if token == ord("!"):
                raise KeyboardInterrupt
            return super().token_bytes(token)

    messages = converse("one?", "/show", engine=InterruptedEngine(b"part! rest"), interactive=True)
    assert [m.content for m in messages] == ["S", "one?", "part"]
    printed = capsys.readouterr()
    assert printed.out.startswith("part")
    assert "stopped" in printed.err


def test_chat_goes_on_after_ctrl_c_during_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class InterruptedEngine(FakeEngine):
        def save_state(self, path: Path) -> None:
            raise KeyboardInterrupt

    path = tmp_path / "a.session"
    lines = ("one?", f"/save {path}", "two?")
    messages = converse(*lines, engine=InterruptedEngine(b"yes"), interactive=True)
    assert [m.content for m in messages] == ["S", "one?", "yes", "two?", "yes"]
    assert "interrupted; the conversation goes on" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        converse(*lines, engine=InterruptedEngine(b"yes"))


def test_chat_prints_a_line_of_json_per_answer(capsys: pytest.CaptureFixture[str]) -> None:
    converse("one?", "two?", as_json=True, engine=FakeEngine("是\n的".encode()))
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["是\n的"] * 2
    last = json.loads(lines[1])
    assert last["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == 8
    assert last["timings"]["predicted_n"] == 8


def test_chat_greets_at_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    converse()
    assert capsys.readouterr().err == ""
    converse(interactive=True)
    assert capsys.readouterr().err == "fake: /help lists the commands, Ctrl-D leaves\n"


# --- piped ---


@pytest.mark.native
def test_chat_works_through_a_pipe(run: Run, acting_model: Path) -> None:
    result = run(
        acting_model, "--n-threads", 1, stdin="打开微信\n/show\n", module="autoglm_gguf.chat"
    )
    assert result.returncode == 0, result.stderr
    answer = '<think>在桌面</think>\n\n<answer>do(action="Launch", app="微信")'
    assert result.stdout == f"{answer}\nuser: 打开微信\nassistant: {answer}</answer>\n"
    assert "tok/s" in result.stderr
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.native
def test_chat_takes_options_and_prints_json_through_a_pipe(
    run: Run, endless_model: Path, screen: Path
) -> None:
    options = ["--image", screen, "--system", "S", "--max-tokens", 3, "--n-threads", 1, "--json"]
    result = run("chat", endless_model, *options, stdin="hi\nho")
    assert result.returncode == 0, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["text"] == second["text"] == "again again again "
    assert (first["finish_reason"], first["usage"]["completion_tokens"]) == ("length", 3)
    assert first["usage"]["image_tokens"] == 24
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]


@pytest.mark.native
def test_chat_evaluates_only_what_is_new_after_a_restart(
    run: Run, endless_model: Path, screen: Path, tmp_path: Path
) -> None:
    options = ["--max-tokens", 3, "--n-threads", 1, "--json"]
    path = tmp_path / "a.session"
    first = run("chat", endless_model, *options, "--image", screen, stdin=f"hi\n/save {path}\nho\n")
    wanted = json.loads(first.stdout.splitlines()[1])
    second = run("chat", endless_model, *options, stdin=f"/load {path}\nho\n")
    assert second.returncode == 0, second.stderr
    found = json.loads(second.stdout)
    assert found["usage"] == wanted["usage"]
    assert found["timings"]["cache_n"] == wanted["timings"]["cache_n"] > 24
    assert found["timings"]["image_ms"] == 0


@pytest.mark.native
def test_chat_tells_the_plan_beside_the_measured_memory(run: Run, acting_model: Path) -> None:
    options = ["--stats", "--memory-budget", "900MB", "--n-gpu-layers", "auto", "--json"]
    result = run("chat", acting_model, *options, "--n-threads", 1, stdin="打开微信\n")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["finish_reason"] == "stop"
    rows = [line.split() for line in result.stderr.splitlines()]
    at = rows.index(["memory", "planned", "measured"])
    assert [row[0] for row in rows[at + 1 :]] == [
        *("load", "encode", "decode", "peak", "anonymous", "mapped", "device", "budget")
    ]
    assert rows[-1] == ["budget", "900.00", "MB"]
    assert len(rows[at + 4]) == 5  # the peak: planned and measured, each with its unit


# --- at a terminal ---

_AT_TERMINAL = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from autoglm_gguf.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """The keyboard and screen of a program at a pseudo-terminal."""

    def __init__(self, process: subprocess.Popen[bytes], handle: int) -> None:
        self.process, self._handle, self._seen = process, handle, b""

    def type(self, keys: bytes) -> None:
        os.write(self._handle, keys)

    def wait_for(self, text: bytes, timeout_s: float = 30.0) -> bytes:
        """Read until ``text`` is shown; returns everything shown since the last wait."""
        end = time.monotonic() + timeout_s
        while text not in self._seen:
            ready, _, _ = select.select([self._handle], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} after {timeout_s} s, but {self._seen[-500:]!r}"
            self._seen += os.read(self._handle, 65536)
        shown, _, self._seen = self._seen.partition(text)
        return shown + text


@contextmanager
def terminal(*arguments: str, cache: Path) -> Iterator[Terminal]:
    import pty

    ours, theirs = pty.openpty()
    environment = {
        **os.environ,
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "PYTHONIOENCODING": "utf-8",
        "AUTOGLM_GGUF_CACHE": str(cache),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _AT_TERMINAL, "chat", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=environment,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(ours)


@pytest.mark.native
@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals of POSIX")
def test_chat_at_a_terminal_stops_on_ctrl_c_and_leaves_on_ctrl_d(
    endless_model: Path, tmp_path: Path
) -> None:
    options = ["--n-ctx", "65536", "--max-tokens", "60000", "--n-threads", "1"]
    with terminal(str(endless_model), *options, cache=tmp_path / "cache") as screen:
        screen.wait_for(b">")
        screen.type(b"hello\r")
        screen.wait_for(b"again again again ")
        screen.type(b"\x03")
        screen.wait_for(b"the part above is kept")
        screen.wait_for(b">")
        screen.type(b"/show\r")
        screen.wait_for(b"user: hello")
        screen.wait_for(b"assistant: again again ")
        screen.wait_for(b">")
        screen.type(b"\x03")
        screen.wait_for(b"(Ctrl-D or /exit leaves)")
        screen.wait_for(b">")
        screen.type(b"\x04")
        assert screen.process.wait(timeout=30) == 0
    assert "hello" in (tmp_path / "cache" / "chat_history").read_text("utf-8")


@pytest.mark.native
@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals of POSIX")
@pytest.mark.parametrize("has_toolkit", [True, False])
def test_chat_at_a_terminal_takes_whatever_is_typed(
    endless_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_toolkit: bool
) -> None:
    """Bytes that are no text end nothing; long lines are not cut where there is no toolkit."""
    n_long = 0 if has_toolkit else 9
    if not has_toolkit:
        (tmp_path / "prompt_toolkit").mkdir()
        (tmp_path / "prompt_toolkit" / "__init__.py").write_text("raise ImportError")
        path = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{path}")
    options = ["--n-ctx", "512", "--max-tokens", "1", "--n-threads", "1"]
    with terminal(str(endless_model), *options, cache=tmp_path / "cache") as screen:
        screen.wait_for(b">")
        for _ in range(n_long):
            screen.type(b"long " * 100)
        if n_long:
            screen.type(b"end\r")
            screen.wait_for(b"does not fit the context (45")  # 4,503 bytes, and the template's
            screen.wait_for(b">")
        screen.type(b"no \xff\xfe text\r")
        screen.wait_for(b"context left")
        screen.wait_for(b">")
        screen.type(b"\x04")
        assert screen.process.wait(timeout=30) == 0


def test_chat_piped_tells_the_exit_code_when_a_message_was_refused() -> None:
    model = AutoGLM(FakeEngine(b"yes", n_ctx=100))
    talk = Conversation(model, model.chat(), {})
    talk.loop(scripted(["far too long " * 9, "ok?"]))
    assert talk.failed


def test_chat_piped_is_interrupted_as_a_whole() -> None:
    class InterruptedEngine(FakeEngine):
        def token_bytes(self, token: int) -> bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converse("one?", engine=InterruptedEngine(b"part"))


def test_chat_says_that_nothing_was_kept_when_stopped_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class InterruptedEngine(FakeEngine):
        def token_bytes(self, token: int) -> bytes:
            raise KeyboardInterrupt

    converse("one?", engine=InterruptedEngine(b"part"), interactive=True)
    assert "nothing was said yet" in capsys.readouterr().err


def test_chat_takes_bytes_that_are_no_text(random_pair: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "autoglm_gguf", "chat", str(random_pair[0])]
    done = subprocess.run(
        [*command, "--max-tokens", "2"],
        input=b"\xff\xfe\nhello\n",
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"context left") == 2


@pytest.mark.native
def test_chat_answers_in_a_schemas_json(
    acting_model: Path, tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"ok": {"type": "boolean"}}}')
    options = ["--n-threads", 1, "--temperature", 1, "--seed", 3, "--json-schema", schema]
    result = run("chat", acting_model, *options, stdin="go\n")
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)) <= {"ok"}
    for content, named in (("{", "not JSON"), ("[]", "no object")):
        schema.write_text(content)
        assert named in run("chat", acting_model, "--json-schema", schema).stderr
