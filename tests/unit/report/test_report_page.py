"""The page needs nothing but itself, trusts no text of the run, and carries the run's own numbers."""

from __future__ import annotations

import io
import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from rich.console import Console

from meshwright.errors import DataError
from meshwright.plan.plan import Plan
from meshwright.report import console
from meshwright.report.page import page, write_report
from meshwright.report.run import load_run

HOSTILE = "</script><script>document.title='hacked'</script><b onclick=\"x\">&amp;'"
_VOID = {"meta", "img"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects them with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    assert parser.open == []
    return parser


@pytest.mark.parametrize("finished", [True, False])
def test_the_page_is_well_formed_and_self_contained(make_run, finished):
    text = write_report(make_run(finished=finished)).read_text()
    found = outline(text)
    for tag, attributes in found.tags:
        assert tag not in {"link", "iframe", "object", "base"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#"))
        assert tag != "img" or attributes["alt"]
        assert "data-hover" not in attributes or (attributes["role"] == "img" and attributes["aria-label"])
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", text)
    assert [tag for tag, _ in found.tags].count("h1") == 1
    ids = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in found.tags if tag == "a"}
    assert links == ids


def test_hostile_texts_stay_texts(make_run):
    path = make_run()
    for name, change in (("summary.json", {"classes": ["a", HOSTILE, "c"], "precision": HOSTILE, "fold": HOSTILE}),):
        (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | change))
    (path / "machine.json").write_text(
        json.dumps({HOSTILE: HOSTILE, "deep": {HOSTILE: [HOSTILE]}, "rows": [{"a": HOSTILE}]})
    )
    (path / "config.yaml").write_text(f"# {HOSTILE}\n")
    with (path / "plan.yaml").open("a") as plan:
        plan.write(f"# {HOSTILE}\n")
    text = write_report(path).read_text()
    found = outline(text)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert HOSTILE not in text
    assert "onclick" not in {name for _, attributes in found.tags for name in attributes}
    assert unescape(text).count(HOSTILE) >= 10


def test_the_page_carries_the_numbers_of_the_run(make_run):
    path = make_run(Plan.uniform(depth=2, width=2))
    rows = json.loads((path / "ranks.json").read_text())
    rows[3] |= {"peak_bytes": 3 * 2**30, "part_bytes": 10 * 2**20, "ideal_bytes": 8 * 2**20}
    (path / "ranks.json").write_text(json.dumps(rows))
    text = page(load_run(path))
    plain = re.sub(r"<[^>]+>", " ", text)
    for expected in (
        "grey 0.938",
        "0.945",
        "3.00 GiB, of rank 3",
        "10.0 MiB",
        "1.25 ×",
        "1 of 7 operations",
        "6.25 MiB",
    ):
        assert expected in plain
    assert "20 – 40" in plain  # rank 3 along D
    assert len(re.findall(r'class="cut across"', text)) == 8  # D is cut in the planes across H and across W
    assert len(re.findall(r'class="cut along"', text)) == 8  # W in those across D and across H
    assert "rank 2, " not in plain


def test_one_rank_shows_no_cut(make_run):
    text = write_report(make_run(Plan.uniform())).read_text()
    assert 'class="cut ' not in text
    assert "One rank held the whole volume" in text


def test_an_unfinished_run_says_so(make_run):
    path = make_run(finished=False)
    text = write_report(path).read_text()
    assert "no summary: it is still going, or it was killed. The last logged is step 60" in text
    for name in ("steps.jsonl", "validation.jsonl", "machine.json"):
        (path / name).unlink()
    text = write_report(path).read_text()
    assert "The last logged is no step" in text
    assert "Not validated yet" in text


def test_the_machine_reads_as_people_write_it(make_run):
    path = make_run()
    machine = {
        "threads": 1,
        "avx": True,
        "memory_bytes": 2**30,
        "room_bytes": None,
        "gpus": [{"name": "A"}, {"name": "B"}],
    }
    (path / "machine.json").write_text(json.dumps(machine | {"link": {"speed_mbit": 10}, "backends": ["gloo", "mpi"]}))
    pairs = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", write_report(path).read_text())
    assert dict(pairs) == {
        "threads": "1",
        "avx": "yes",
        "memory": "1.00 GiB",
        "room bytes": "unknown",
        "gpus 0 · name": "A",
        "gpus 1 · name": "B",
        "link · speed mbit": "10",
        "backends": "gloo, mpi",
    }


def test_nothing_sent_is_said(make_run):
    path = make_run(Plan.uniform())
    log = (path / "steps.jsonl").read_text()
    lines = [json.loads(line) | {"sent_bytes": 0, "reduced_bytes": 0} for line in log.splitlines()]
    (path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "layers.json").write_text("[]")
    text = write_report(path).read_text()
    assert "Rank 0 sent nothing" in text
    assert "No layer sent anything" in text


def test_nothing_gathered_is_said(make_run):
    path = make_run()
    rows = [row for row in json.loads((path / "layers.json").read_text()) if not row["gathered_bytes"]]
    (path / "layers.json").write_text(json.dumps(rows))
    assert "Nothing was gathered" in write_report(path).read_text()


def test_the_same_run_gives_the_same_bytes_and_leaves_no_other_file(make_run):
    path = make_run()
    before = {entry.name for entry in path.iterdir()}
    first = write_report(path).read_bytes()
    assert write_report(path).read_bytes() == first
    assert {entry.name for entry in path.iterdir()} == before | {"report.html"}


def test_a_folder_that_is_no_run_gets_no_page(tmp_path):
    with pytest.raises(DataError, match="not a run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def printed(path) -> str:
    out = io.StringIO()
    console.summary(path, Console(file=out, width=110))
    return out.getvalue()


def test_console_shows_dice_time_memory_and_the_page(make_run):
    path = make_run()
    assert "Page:" not in printed(path)
    page_path = write_report(path)
    text = printed(path)
    for expected in ("grey", "0.938", "gradient reduction", "30.0 ms", "1.15 GiB", "1.00 ×", f"Page: {page_path}"):
        assert expected in text
    assert "killed" in printed(make_run(finished=False))


def test_waiting_for_threads_that_read_ahead_is_shown_where_there_are_any(make_run):
    run = make_run()
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {"wait_s": 0.003, "loaders": 1 + number % 3}
    before = page(load_run(run)) + printed(run)
    assert "waiting for data" not in before
    (run / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "waiting for data, 3 threads at most" in page(load_run(run))
    assert "waiting for data, 3 threads at most" in printed(run)
    assert "3.00 ms" in printed(run)


def test_console_does_not_read_markup_from_the_run(make_run):
    path = make_run()
    end = json.loads((path / "summary.json").read_text()) | {"classes": ["a", "[red]b[/red]", "[/c]"]}
    (path / "summary.json").write_text(json.dumps(end))
    assert "[red]b[/red]" in printed(path)
