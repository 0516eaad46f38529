"""The results page is what the generator makes of the published records."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import frame
import plot
import pytest
import results
from frame import Measure, Record, Row

ROOT = Path(__file__).parents[2]
RECORDS = sorted(results.RESULTS.glob("*.json"))


def make_record(name: str = "convert-1.7b") -> Record:
    measures = [Measure("seconds", "time", "s", more=False), Measure("n", "cells")]
    ours = Row("ours", "autoglm-gguf", [{"seconds": 2.0, "n": 1}, {"seconds": 4.0, "n": 1}])
    other = Row("upstream", "up & <stream>", [{"seconds": 6.0}, {"seconds": 20.0}])
    gone = Row("disk", "the disk", failed="not here")
    return Record(name, "Conversion, 1.7b", "python x", measures, [ours, other, gone])


def test_page_is_what_the_records_say() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in results.stale()]
    assert names == [], "run: python benchmarks/results.py"


def test_no_picture_is_left_over() -> None:
    wanted = results.files(frame.records(results.RESULTS), results.PAGE.parent)
    assert set(results.PAGE.parent.glob("*.svg")) <= set(wanted)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_published_record_is_whole_and_names_no_machine_path(path: Path) -> None:
    record = frame.read(path)
    assert record.name == path.stem
    assert record.complete
    assert record.command.startswith("python benchmarks/")
    script = ROOT / record.command.split()[1]
    assert script.is_file()
    assert not re.search(r"/(tmp|home|root|work)/", path.read_text("utf-8"))
    assert f"<!-- {record.name} -->" in results.TEMPLATE.read_text("utf-8"), "the page shows it"


def test_claims_are_of_rows_and_measures_that_there_are() -> None:
    records = {record.name: record for record in frame.records(results.RESULTS)}
    for claim in results.CLAIMS:
        if claim.record in records:
            assert claim.ratio(records), claim.words[0]


def test_claim_is_the_median_of_the_turns_ratios() -> None:
    record = make_record()
    claim = results.Claim(("faster", "更快"), record.name, "upstream", "seconds")
    assert claim.ratio({record.name: record}) == [3.0, 5.0]
    assert claim.ratio({}) == []


def test_section_without_any_figures_says_so() -> None:
    record = make_record()
    page = results.page({record.name: record}, [])
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert results.UNPUBLISHED in sections["Import time"]
    assert results.UNPUBLISHED not in sections["Conversion"]
    assert "### Conversion, 1.7b" in sections["Conversion"]
    assert "<!-- imports -->" not in page


def test_claims_link_to_a_heading_of_the_page() -> None:
    page = results.PAGE.read_text("utf-8")
    anchors = {results.anchor(line.lstrip("# ")) for line in page.splitlines() if line[:1] == "#"}
    for target in re.findall(r"\]\(#([^)]*)\)", page):
        assert target in anchors


def test_comparison_puts_here_beside_published() -> None:
    here, published = make_record(), make_record()
    here.rows[1].turns = [{"seconds": 2.0}, {"seconds": 4.0}]
    row = results.comparison([here], [published]).splitlines()[2]
    assert row.endswith("| convert-1.7b | 4.00 (3.00 to 5.00) | 1.00 |")
    assert results.comparison([], [published]) == "no claim was measured"


def test_only_what_came_to_its_end_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "PAGE", tmp_path / "docs" / "README.md")
    monkeypatch.setattr(results, "READMES", {})
    whole, broken = make_record(), make_record("convert-9b")
    whole.complete = True
    results.publish([whole, broken])
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["convert-1.7b.json"]
    assert "up & <stream>" in (tmp_path / "docs" / "README.md").read_text("utf-8")


def test_readme_gets_the_claims_in_its_language(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "README.zh.md"
    page.write_text(f"# 标题\n\n{results.BEGIN}\nold\n{results.END}\n\n后文\n", "utf-8")
    monkeypatch.setattr(results, "READMES", {page: 1, tmp_path / "missing.md": 0})
    made = results.readmes([make_record()])
    assert list(made) == [page]
    text = made[page]
    assert text.startswith("# 标题") and text.endswith("后文\n") and "old" not in text
    assert "(docs/benchmarks/README.md#conversion-17b)" in text


def test_picture_shows_each_row_that_has_figures() -> None:
    drawn = plot.draw(make_record())
    root = ElementTree.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{space}text")]
    assert "autoglm-gguf" in texts and "up & <stream>" in texts and "the disk" not in texts
    bars = [float(bar.attrib["width"]) for bar in root.iter(f"{space}rect")][1:]
    assert bars[1] / bars[0] == pytest.approx(13 / 3, rel=0.01)  # medians 3 and 13 seconds


def test_picture_is_left_out_where_nothing_is_compared() -> None:
    record = make_record()
    record.measures = record.measures[1:]
    assert plot.draw(record) == ""
