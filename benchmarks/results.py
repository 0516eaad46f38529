"""The results page: docs/benchmarks/README.md and its pictures, made of benchmarks/results/*.json.

    python benchmarks/results.py            # write the page, its pictures and the READMEs' figures
    python benchmarks/results.py --check    # exit status 1 if they are not what this would write

No figure is typed: the prose, page.md beside this script, says what is compared and why one is
ahead of the other; tables, ratios and claims are counted from the records. Knows no runtime.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import frame
import plot
from frame import ROOT, Record

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks" / "README.md"
READMES = {ROOT / "README.md": 0, ROOT / "README.zh.md": 1}
"""Pages that carry the claims, and in which language."""
TEMPLATE = ROOT / "benchmarks" / "page.md"
GENERATED = "<!-- made by benchmarks/results.py of benchmarks/page.md and results/; do not edit -->"
UNPUBLISHED = (
    "*No figures are published yet:* `make bench BENCH=--publish` *measures and adds them.*"
)
_PLACE = re.compile(r"^<!-- ([\w.-]+) -->$", re.M)
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a page says in words, and the figure that stands behind it."""

    words: tuple[str, str]
    """English and Chinese."""
    record: str
    row: str
    measure: str
    base: str = frame.OURS

    def ratio(self, records: Mapping[str, Record]) -> list[float]:
        """By turn, how many times better ours was; empty if it was not measured."""
        record = records.get(self.record)
        if (
            record is None
            or self.row not in {row.name for row in record.rows}
            or self.measure not in {measure.key for measure in record.measures}
        ):
            return []
        return record.times(self.row, self.measure, self.base)


CLAIMS = (
    Claim(
        ("conversion to q4_0, time, against upstream's steps",
         "转换为 q4_0 的用时，对比上游的步骤"),
        "convert-1.7b", "upstream", "seconds",
    ),
    Claim(
        ("conversion, memory, against upstream's steps", "转换的内存，对比上游的步骤"),
        "convert-1.7b", "upstream", "anonymous_bytes",
    ),
    Claim(
        ("conversion of the 9B's shapes, time, against the disk alone",
         "9B 形状的转换用时，对比仅读写磁盘"),
        "convert-9b", "disk", "seconds",
    ),
    Claim(("decode, against llama-bench", "解码速度，对比 llama-bench"),
          "speed-1.7b", "llama-bench", "decode"),
    Claim(("prefill, against llama-bench", "预填充速度，对比 llama-bench"),
          "speed-1.7b", "llama-bench", "prefill"),
    Claim(("decode, against llama-cpp-python", "解码速度，对比 llama-cpp-python"),
          "speed-1.7b", "handler", "decode"),
    Claim(("decode, against ONNX Runtime", "解码速度，对比 ONNX Runtime"),
          "speed-1.7b", "onnx", "decode"),
    Claim(("decode, against transformers in bf16", "解码速度，对比 transformers bf16"),
          "speed-0.4b", "bf16", "decode"),
    Claim(
        ("answers held to actions, decode, against free ones",
         "约束为操作的回答，解码速度，对比不约束"),
        "speed-1.7b", "ours", "decode", "held",
    ),
    Claim(
        ("a phone agent's step, first token, against llama-server",
         "手机智能体一步的首个 token，对比 llama-server"),
        "agent-steps-1.7b", "server", "ttft_s",
    ),
    Claim(
        ("a phone agent's step, first token, against llama-cpp-python",
         "手机智能体一步的首个 token，对比 llama-cpp-python"),
        "agent-steps-1.7b", "handler", "ttft_s",
    ),
    Claim(
        ("a phone agent's step, peak memory, against llama-server",
         "手机智能体一步的内存峰值，对比 llama-server"),
        "agent-steps-1.7b", "server", "peak_bytes",
    ),
    Claim(("from nothing to the first token, against llama-cpp-python",
           "从启动到首个 token，对比 llama-cpp-python"),
          "load-1.7b", "handler", "first_s"),
    Claim(("`import`, against `import llama_cpp`", "`import` 用时，对比 `import llama_cpp`"),
          "imports", "llama_cpp", "import_ms"),
    Claim(("first text over HTTP, against the library", "经 HTTP 的首个文本，对比直接调用库"),
          "server-1.7b-short", "library", "text_first_ms"),
    Claim(
        ("a model larger than the 4 GB budget, cold, decode, against plain mmap",
         "超出 4 GB 预算的模型，冷缓存解码速度，对比普通 mmap"),
        "memory-streaming", "plain", "cold",
    ),
)  # fmt: skip


# ---- the page


def page(records: Mapping[str, Record], pictures: Iterable[str]) -> str:
    """The whole Markdown: page.md with claims and records in their places."""
    drawn = set(pictures)

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name == "claims":
            return claims(records)
        if name not in records:
            return ""
        record = records[name]
        text = frame.markdown(record, heading="###")
        if f"{name}.svg" in drawn:
            head, _, rest = text.partition("\n\n")
            text = f"{head}\n\n![{record.title}]({name}.svg)\n\n{rest}"
        return text

    title, _, rest = TEMPLATE.read_text("utf-8").partition("\n")
    parts = []
    for part in re.split(r"^(?=## )", f"{title}\n\n{GENERATED}\n{rest}", flags=re.M):
        text = _PLACE.sub(fill, part)
        wanted = set(_PLACE.findall(part)) - {"claims"}
        if wanted and not wanted & set(records):
            text = f"{text.rstrip()}\n\n{UNPUBLISHED}\n\n"
        parts.append(text)
    return re.sub(r"\n{3,}", "\n\n", "".join(parts))


def claims(records: Mapping[str, Record], language: int = 0, page_link: str = "") -> str:
    """Each claim's ratio, and where it comes from."""
    heads = (("", "ours is ×", "its table"), ("", "本项目是对方的 × 倍", "表格"))
    rows = []
    for claim in CLAIMS:
        found = claim.ratio(records)
        if not found:
            continue
        title = records[claim.record].title
        link = f"[{title}]({page_link}#{anchor(title)})"
        rows.append((claim.words[language], frame.show(found), link))
    return frame.table(heads[language], rows)


def anchor(title: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def pictures(records: Iterable[Record]) -> dict[str, str]:
    """SVG files by name."""
    shown = set(_PLACE.findall(TEMPLATE.read_text("utf-8")))
    drawn = {f"{r.name}.svg": plot.draw(r) for r in records if r.name in shown}
    return {name: text for name, text in drawn.items() if text}


def write_page(records: Iterable[Record], folder: Path) -> None:
    """The page and its pictures into a folder."""
    for path, text in files(records, folder).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def files(records: Iterable[Record], folder: Path) -> dict[Path, str]:
    """What is written, by path."""
    known = {record.name: record for record in records}
    drawn = pictures(known.values())
    made = {folder / name: text for name, text in drawn.items()}
    return made | {folder / "README.md": page(known, drawn)}


def readmes(records: Iterable[Record]) -> dict[Path, str]:
    """The READMEs that have a place for the claims, with them in it."""
    known = {record.name: record for record in records}
    made = {}
    for path, language in READMES.items():
        text = path.read_text("utf-8") if path.is_file() else ""
        if BEGIN in text and END in text:
            head, _, rest = text.partition(BEGIN)
            tail = rest.partition(END)[2]
            link = PAGE.relative_to(ROOT).as_posix()
            made[path] = f"{head}{BEGIN}\n{claims(known, language, link)}\n{END}{tail}"
    return made


# ---- here and there


def comparison(here: Iterable[Record], published: Iterable[Record]) -> str:
    """Each claim's ratio as published and as found here, also of the smaller set's sizes."""
    ours, theirs = ({r.name: r for r in records} for records in (here, published))
    rows = []
    for claim in CLAIMS:
        small = Claim(claim.words, claim.record.replace("1.7b", "0.4b"), claim.row, claim.measure,
                      claim.base)  # fmt: skip
        for one in dict.fromkeys((claim, small)):
            found, told = one.ratio(ours), one.ratio(theirs)
            if found:
                rows.append((claim.words[0], one.record, frame.show(told), frame.show(found)))
    if not rows:
        return "no claim was measured"
    return frame.table(("ours is ×", "benchmark", "published", "here"), rows)


def publish(found: Iterable[Record]) -> None:
    """Keep what came to its end, and make the page of all there is."""
    for record in found:
        if record.complete:
            frame.save(record, RESULTS / f"{record.name}.json")
    write_all()


def write_all() -> None:
    """The page, its pictures and the READMEs."""
    records = [*frame.records(RESULTS)]
    write_page(records, PAGE.parent)
    for path, text in readmes(records).items():
        path.write_text(text, "utf-8")


def stale() -> list[Path]:
    """Files that are not what would be written."""
    records = [*frame.records(RESULTS)]
    wanted = files(records, PAGE.parent) | readmes(records)
    return [
        path
        for path, text in wanted.items()
        if not path.is_file() or path.read_text("utf-8") != text
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        write_all()
        return
    found = stale()
    for path in found:
        print(f"{path.relative_to(ROOT)}: stale", file=sys.stderr)
    if found:
        sys.exit("hint: python benchmarks/results.py")


if __name__ == "__main__":
    main()
