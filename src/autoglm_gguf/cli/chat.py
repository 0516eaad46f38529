"""``autoglm-gguf chat``: the interactive conversation, also usable through a pipe.

Reading lines, commands and drawing; the conversation itself is `ChatSession`.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autoglm_gguf.cli import cloud_options, options, output
from autoglm_gguf.cli.cloud_options import Model, draw_route
from autoglm_gguf.cli.plan import draw_memory
from autoglm_gguf.cli.prompt_line import EndOfInput, LineReader, open_reader
from autoglm_gguf.config import CONSTRAIN_ACTION
from autoglm_gguf.conversation import ChatSession
from autoglm_gguf.errors import AutoGLMError
from autoglm_gguf.messages import Chunk, ImagePart, ImageSource
from autoglm_gguf.units import format_bytes
from autoglm_gguf.vision import open_image

HELP = """/image PATH   show an image with the next message; /image alone takes it back
/clear        forget the conversation
/save FILE    save the conversation; its next turn costs as little after /load as now
/load FILE    go on with a saved conversation
/show         print the conversation so far
/mem          memory planned and measured
/help         this list
/exit         leave (also Ctrl-D)
A line that ends with \\ goes on in the next one.
\"\"\" alone on a line opens and closes a longer text.
Ctrl-C stops an answer and keeps what was said."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser("chat", help="talk with a model")
    options.add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--image", metavar="PATH", help="image for the first message")
    parser.add_argument("--json", action="store_true", help="print each answer as a line of JSON")
    options.add_sampling_options(parser, max_tokens=512)
    cloud_options.add_cloud_options(parser)
    held = parser.add_mutually_exclusive_group()
    held.add_argument(
        "--constrain",
        choices=[CONSTRAIN_ACTION],
        help="action: every answer is thinking and one valid action",
    )
    held.add_argument(
        "--json-schema",
        dest="constrain",
        type=options.read_schema,
        metavar="FILE",
        help="every answer is a JSON document that this schema describes",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Converse until the input ends."""
    sampling = options.sampling_arguments(arguments)
    with (
        cloud_options.load_model(arguments) as model,
        model.chat(system=arguments.system) as session,
    ):
        talk = Conversation(model, session, sampling, as_json=arguments.json)
        if arguments.image is not None:
            talk.handle(f"/image {arguments.image}")
        reader = open_reader(interactive=sys.stdin.isatty())
        if reader.interactive or not talk.failed:
            talk.loop(reader)
        if arguments.stats:
            for line in draw_memory(model):
                output.note(line)
    if talk.failed and not reader.interactive:
        raise ConversationFailedError("chat: not every message was answered")


class ConversationFailedError(AutoGLMError):
    """A piped conversation in which a message or an image was refused; each was told then."""


@contextlib.contextmanager
def _ctrl_c_cancels(model: Model, interactive: bool) -> Iterator[list[int]]:
    """While an answer runs, Ctrl-C cancels it; a second press interrupts at once.

    An exception raised inside llama.cpp's callbacks would be swallowed there.
    """
    presses: list[int] = []
    if not interactive or threading.current_thread() is not threading.main_thread():
        yield presses
        return

    def on_press(number: int, _: object) -> None:
        if presses:
            raise KeyboardInterrupt
        presses.append(number)
        model.cancel()

    before = signal.signal(signal.SIGINT, on_press)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)


class Conversation:
    """The loop between a reader and a chat session.

    Args:
        model: The loaded model.
        session: Its conversation.
        sampling: Keyword arguments for every answer.
        as_json: Answers as JSON lines instead of streamed text.
    """

    def __init__(
        self,
        model: Model,
        session: ChatSession,
        sampling: dict[str, Any],
        *,
        as_json: bool = False,
    ) -> None:
        self._model, self._session, self._sampling = model, session, sampling
        self._as_json = as_json
        self._image: str | None = None
        self._interactive = True
        self.failed = False
        """Whether a message or an image was refused."""
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._take_image,
            "/clear": self._clear,
            "/save": self._save,
            "/load": self._load,
            "/show": self._show,
            "/mem": self._show_memory,
            "/help": lambda _: output.write(HELP),
        }

    def loop(self, reader: LineReader) -> None:
        """Read and answer until the input ends or ``/exit``."""
        self._interactive = reader.interactive
        if reader.interactive:
            output.note(f"{self._model.info.name}: /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                text = reader.read()
            except EndOfInput:
                return
            try:
                if not self.handle(text):
                    return
            except KeyboardInterrupt:  # during /load, or as an answer ended
                if not reader.interactive:
                    raise
                output.note("interrupted; the conversation goes on")

    def handle(self, text: str) -> bool:
        """Carry out one input; False ends the conversation."""
        stripped = text.strip()
        if not stripped:
            return True
        if not stripped.startswith("/"):
            self._answer(text)
            return True
        name, _, rest = stripped.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        command = self._commands.get(name)
        if command is None:
            output.note(f"{name}: no such command; /help lists them, a message cannot begin with /")
        else:
            command(rest.strip())
        return True

    def _take_image(self, path: str) -> None:
        if not path:
            dropped, self._image = self._image, None
            needs = "/image needs a path: /image screen.png"
            output.note(f"{dropped}: taken back" if dropped else needs)
            return
        try:
            if not self._model.takes_images:
                output.note("error: this model takes no images; load it with its mmproj file")
                self.failed = True
                return
            path = str(_expand(path))
            size = open_image(path).size
        except AutoGLMError as error:
            output.note(f"error: {error}")
            self.failed = True
            return
        self._image = path
        output.note(f"{path}: {size[0]}x{size[1]} px, goes with the next message")

    def _clear(self, _: str) -> None:
        self._session.clear()
        self._image = None
        output.note("conversation cleared")

    def _save(self, path: str) -> None:
        if not path:
            output.note("/save needs a file: /save monday.session")
            return
        try:
            saved = self._session.save(_expand(path))
        except (AutoGLMError, ValueError) as error:
            output.note(f"error: {error}")
            self.failed = True
            return
        output.note(
            f"{path}: messages {saved.n_messages}, images {saved.n_images}, KV cells "
            f"{saved.n_cells}, {format_bytes(saved.file_bytes)}"
        )

    def _load(self, path: str) -> None:
        if not path:
            output.note("/load needs a file: /load monday.session")
            return
        try:
            self._session = self._model.load_chat(_expand(path))
        except (AutoGLMError, ValueError) as error:
            output.note(f"error: {error}")
            self.failed = True
            return
        self._image = None
        output.note(f"{path}: messages {len(self._session.messages)}; /show prints them")
        for note in self._session.notes:
            output.note(note)

    def _show(self, _: str) -> None:
        if not self._session.messages:
            output.note("nothing said yet")
        for message in self._session.messages:
            parts = [message.content] if isinstance(message.content, str) else message.content
            shown = [
                part
                if isinstance(part, str)
                else _name_image(part.source)
                if isinstance(part, ImagePart)
                else part.text
                for part in parts
            ]
            output.write(f"{message.role}: {output.escape_controls(' '.join(shown))}")

    def _show_memory(self, _: str) -> None:
        for line in draw_memory(self._model):
            output.write(line)

    def _answer(self, text: str) -> None:
        """Stream one answer; an error or Ctrl-C ends the answer, never the conversation."""
        last = Chunk("")
        said = ""
        stopped = False
        try:
            with _ctrl_c_cancels(self._model, self._interactive) as presses:
                for last in self._session.stream(text, image=self._image, **self._sampling):
                    said += last.text
                    if not self._as_json:
                        output.write(last.text, end="")
                    if presses and last.finish_reason is None:
                        break  # pressed before the answer began, when there was none to cancel
                stopped = bool(presses)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            stopped = True
        except (AutoGLMError, ValueError) as error:
            output.note(("\n" if said else "") + f"error: {error}")
            self.failed = True
            return
        finally:
            if said or last.finish_reason in ("stop", "length"):
                self._image = None  # it was shown
        if self._as_json:
            output.write_json_line(_as_json(said, last))
            return
        output.write()
        if stopped:
            kept = "the part above is kept" if said.strip() else "nothing was said yet"
            output.note(f"stopped; {kept}")
        if last.usage is not None:
            n_dropped = last.usage.dropped_messages
            if n_dropped:
                output.note(f"note: the {n_dropped} oldest messages had no room and were left out")
            output.note(output.dim(self._summary(last), sys.stderr))
        if last.route is not None:
            output.note(output.dim(draw_route(last.route), sys.stderr))

    def _summary(self, last: Chunk) -> str:
        assert last.usage is not None and last.timings is not None
        usage, timings = last.usage, last.timings
        left = max(0, self._model.info.n_ctx - usage.total_tokens)
        is_ours = last.route is None or last.route.source == "local"  # and so is the context
        parts = {"image": usage.image_tokens, "kept": timings.cache_n}
        of_them = ", ".join(f"{n} {name}" for name, n in parts.items() if n)
        of_them = f" ({of_them})" if of_them else ""
        drafts = f" ({timings.draft_n_accepted} of {timings.draft_n} guessed)"
        drafts = drafts if timings.draft_n else ""
        return (
            f"[{usage.prompt_tokens}{of_them} + {usage.completion_tokens} tokens{drafts} · "
            f"{timings.predicted_per_second:.1f} tok/s · first token {timings.ttft_ms:.0f} ms · "
            f"{f'context left {left} · ' if is_ours else ''}{last.finish_reason}]"
        )


def _expand(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~ of nobody
        return Path(path)


def _name_image(source: ImageSource) -> str:
    if isinstance(source, bytes):  # of a saved conversation
        return f"[image, {format_bytes(len(source))}]"
    return f"[image {source!s}]"


def _as_json(said: str, last: Chunk) -> dict[str, Any]:
    return {
        "text": said,
        "finish_reason": last.finish_reason or "cancelled",
        "usage": asdict(last.usage) if last.usage else None,
        "timings": asdict(last.timings) if last.timings else None,
        **({"route": asdict(last.route)} if last.route else {}),
    }
