"""Options and progress of the commands that run a model over a text or over transcripts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from autoglm_gguf.cli import options, output
from autoglm_gguf.cli.plan import draw_usage
from autoglm_gguf.config import CONTENT_FORMATS
from autoglm_gguf.engine.base import EngineInfo
from autoglm_gguf.evaluate.measuring import PassageProgress
from autoglm_gguf.evaluate.passages import N_CTX, Corpus
from autoglm_gguf.memory.measure import measure_memory
from autoglm_gguf.memory.plan import MemoryPlan
from autoglm_gguf.units import format_seconds


def add_options(parser: argparse.ArgumentParser, *, is_needed: bool = True) -> None:
    """MODEL, what it is run over, and how it is held."""
    options.add_pair_options(parser)
    source = parser.add_mutually_exclusive_group(required=is_needed)
    source.add_argument("--text", metavar="FILE", help="a text, UTF-8")
    source.add_argument(
        "--transcripts",
        metavar="FILE",
        help='JSON lines, {"messages": […]} each: one request and its answer; images as paths',
    )
    parser.add_argument(
        "--n-ctx",
        type=int,
        metavar="N",
        help=f"tokens of a chunk (default: {N_CTX['text']}), or room for a transcript "
        f"({N_CTX['transcripts']})",
    )
    parser.add_argument(
        "--chunks", type=int, metavar="N", help="only the first chunks, or transcripts"
    )
    parser.add_argument(
        "--parse-special",
        action="store_true",
        help="special tokens written in the text are tokens (in transcripts they are)",
    )
    parser.add_argument(
        "--content-format",
        choices=CONTENT_FORMATS,
        default="openai",
        help="of transcripts' images; openai: as transformers renders; string: as the official "
        "server does",
    )
    options.add_place_options(parser)
    parser.add_argument("--n-threads", type=int, metavar="N", help="default: usable cores")
    options.add_self_test_option(parser)
    parser.add_argument(
        "--stats", action="store_true", help="tell the memory that was planned and measured"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def read_options(arguments: argparse.Namespace) -> tuple[Corpus | None, dict[str, Any]]:
    """What it is run over, if that is given, and the other arguments of the library's functions."""
    corpus = None
    if arguments.text is not None or arguments.transcripts is not None:
        corpus = Corpus(
            arguments.text or arguments.transcripts,
            kind="transcripts" if arguments.text is None else "text",
            n_ctx=arguments.n_ctx,
            n_chunks=arguments.chunks,
            parse_special=arguments.parse_special,
            content_format=arguments.content_format,
        )
    given = options.place_arguments(arguments)
    if arguments.n_threads is not None:
        given["n_threads"] = arguments.n_threads
    return corpus, {
        "memory_budget": arguments.memory_budget,
        "self_test": arguments.self_test,
        **given,
    }


class Watcher:
    """Tells what was loaded and how far the work is; ``on_load`` and ``on_passage``."""

    def __init__(self) -> None:
        self._live, self._told = sys.stderr.isatty(), -1
        self._plan: MemoryPlan | None = None

    def on_load(self, info: EngineInfo) -> None:
        """Show the remarks."""
        self._plan, self._told = info.plan, -1
        for remark in info.notes:
            output.note(f"note: {remark}")

    def on_passage(self, progress: PassageProgress) -> None:
        """A line drawn over, or one per tenth when piped."""
        tenth = 10 * progress.done // progress.total
        if self._told < 0 < progress.resumed:
            output.note(f"goes on after {progress.resumed} of {progress.total}")
        if not self._live and tenth == self._told:
            return
        self._told = tenth
        left = f", {format_seconds(progress.seconds_left)} left"
        line = f"{progress.done} of {progress.total}"
        if progress.value is not None:
            line += f", {progress.what} {progress.value:.4g}"
        line += left if progress.done < progress.total else ""
        ends = progress.done == progress.total or not self._live
        output.note(f"\r\x1b[K{line}" if self._live else line, end="\n" if ends else "")

    def tell_memory(self) -> None:
        """The plan beside what was held at most."""
        for line in draw_usage(self._plan, measure_memory()):
            output.note(line)
