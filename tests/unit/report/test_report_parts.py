"""The small pieces under the page: pictures, ticks, bars, owners of a plane, texts with units."""

from __future__ import annotations

import base64
import math
import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.plan.plan import Plan
from meshwright.report.axes import Frame, ticks
from meshwright.report.chart import Series, curves, smooth, stacked
from meshwright.report.meshbox import mesh_box
from meshwright.report.planes import Plane, Slices
from meshwright.report.png import encode_png
from meshwright.report.records import RankRecord
from meshwright.report.tables import Column, Html, bar, folded, table
from meshwright.report.timing import percentile
from meshwright.report.units import bytes_text, percent_text, ratio_text, seconds_text
from meshwright.report.volume import Region, coloured, errors, gallery, grey, regions


def decode_png(data: bytes) -> np.ndarray:
    """An independent reader of our PNGs: checks every checksum, undoes the filter row by row."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + size
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    columns, rows, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, rest) == (8, [0, 0, 0])
    channels = {0: 1, 2: 3}[colour]
    lines = np.frombuffer(zlib.decompress(chunks[1][1]), np.uint8).reshape(rows, 1 + columns * channels)
    assert (lines[:, 0] == 2).all()
    return np.cumsum(lines[:, 1:], axis=0, dtype=np.uint8).reshape(rows, columns, channels)


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 1), (33, 20, 3)])
def test_png_keeps_every_pixel(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert (decode_png(encode_png(pixels if shape[2] == 3 else pixels[..., 0])) == pixels).all()


def test_png_refuses_what_it_cannot_write():
    with pytest.raises(ValueError, match="got float64"):
        encode_png(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        encode_png(np.zeros((2, 2, 2), np.uint8))


@given(st.floats(-1e4, 1e4), st.floats(1e-6, 1e6), st.booleans())
def test_ticks_are_round_few_and_inside(lo, width, whole):
    found = list(ticks(lo, lo + width, 5, whole=whole))
    assert len(found) <= 7
    assert whole or len(found) >= 2
    assert len({text for _, text in found}) == len(found)
    slack = 1e-8 * max(width, float(whole))
    for value, text in found:
        assert lo - slack <= value <= lo + width + slack
        assert not whole or value == int(value)
        assert math.isclose(float(text.replace(",", "")), value, rel_tol=1e-6, abs_tol=1e-9)


def test_frame_puts_larger_values_higher_and_holds_outliers():
    frame = Frame((0, 10), (0, 1), 280)
    assert frame.px(0) < frame.px(5) < frame.px(10)
    assert frame.py(1) < frame.py(0.5) < frame.py(0)
    assert frame.py(99) == frame.py(1)


def test_smoothing_keeps_lines_ends_and_skips_nan():
    line = [2.0 * i for i in range(100)]
    assert smooth(line) == pytest.approx(line)
    line[50] = math.nan
    assert smooth(line)[50] == pytest.approx(100.0)


def test_a_curve_is_broken_where_it_is_not_finite():
    y = [1.0, 2.0, math.nan, 4.0, math.inf] + [1.0] * 20
    drawn = curves("x", [Series("loss", "loss", list(range(25)), y)], y_label="loss")
    raw = re.search(r'class="raw[^"]*" d="([^"]*)"', drawn)
    assert raw
    assert raw.group(1).count("M") == 3
    assert "nan" not in drawn.replace("&quot;", "").lower()
    assert "inf" not in drawn.lower()


def test_one_tall_bar_does_not_flatten_the_others():
    steps = list(range(1, 51))
    parts = [Series("compute", "compute", steps, [40.0] + [1.0] * 49), Series("data", "data", steps, [0.5] * 50)]
    drawn = stacked("time", steps, parts, y_label="s per step", unit="s")
    assert drawn.count('class="cutoff"') == 1
    compute = re.findall(r"M[\d.]+ ([\d.]+)H[\d.]+V([\d.]+)", drawn.split('class="bar c-compute"')[1].split("/>")[0])
    heights = [float(bottom) - float(top) for bottom, top in compute]
    assert heights[1] > 0.4 * heights[0]


def test_no_steps_is_said():
    assert "No step was logged" in stacked("time", [], [], y_label="s", unit="s")
    assert "No step was logged" in curves("loss", [Series("loss", "loss", [], [])], y_label="loss")


def test_many_steps_are_averaged_to_a_bounded_drawing():
    steps = list(range(1, 100_001))
    series = Series("loss", "loss", steps, [1.0] * len(steps))
    assert len(curves("loss", [series], y_label="loss")) < 100_000
    assert len(stacked("time", steps, [series], y_label="s", unit="s")) < 40_000


def test_regions_follow_the_plan_and_the_plane():
    plan = Plan.uniform(data=2, depth=2, width=2)
    assert regions(plan, (10, 6, 7), across=0, at=4) == (
        Region((0, 4), (0, 6), (0, 4)),
        Region((1, 5), (0, 6), (4, 7)),
    )
    assert [part.ranks for part in regions(plan, (10, 6, 7), across=0, at=5)] == [(2, 6), (3, 7)]
    assert [part.ranks for part in regions(plan, (10, 6, 7), across=1, at=0)] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [part.rows for part in regions(plan, (10, 6, 7), across=2, at=6)] == [(0, 5), (5, 10)]


def test_a_rank_without_voxels_owns_no_region():
    assert [part.ranks for part in regions(Plan.uniform(depth=4), (5, 2, 2), across=1, at=0)] == [(0,), (1,), (2,)]


def test_pictures_show_classes_and_exactly_the_errors():
    truth, prediction = np.array([[0, 1], [2, 1]], np.uint8), np.array([[0, 1], [2, 2]], np.uint8)
    plane = Plane(np.array([[0.0, 0.5], [1.0, np.nan]]), truth, prediction)
    wrong = errors(plane)
    assert (wrong[1, 1] == (232, 52, 96)).all()
    assert all(len(set(wrong[at])) == 1 for at in ((0, 0), (0, 1), (1, 0)))  # grey everywhere else
    colour = coloured(plane.image, truth)
    assert len(set(colour[0, 0])) == 1
    assert colour[0, 1, 1] > colour[0, 1, 0]  # class 1 is teal
    assert colour[1, 0, 0] > colour[1, 0, 2]  # class 2 is gold
    assert grey(np.full((3, 3), 7)).max() == 0


def test_cuts_and_labels_lie_on_the_picture_where_the_ranks_meet():
    counts = (7, 4, 4)
    image, nothing = np.zeros((7, 4), np.uint8), np.zeros((7, 4), np.uint8)
    image[:3] = 200  # the part of rank 0, drawn at the bottom
    across_d = Plane(np.zeros((4, 4)), nothing[:4], nothing[:4])
    side = Plane(image, nothing, nothing)
    drawn = gallery(Slices((across_d, side, side), counts, (1.0, 1.0, 1.0), (0, 0, 0)), Plan.uniform(depth=3))
    assert re.findall(r'class="cut across" style="top:([\d.]+)%"', drawn) == ["57.143", "14.286"] * 8  # 3 and 6 of 7
    labels = re.findall(r'class="owner" style="top:([\d.]+)%[^>]*>([^<]+)<', drawn)
    assert labels[1:4] == [("57.143", "rank 0"), ("14.286", "rank 1"), ("0.000", "rank 2")]
    first = decode_png(base64.b64decode(re.findall(r"base64,([^\"]+)", drawn)[4]))
    assert (first[:4, :, 0].max(), first[4:, :, 0].min()) == (0, 255)


def records(intervals: list) -> list[RankRecord]:
    return [RankRecord(rank, interval, 0, 0, 0, 0, 0, 0) for rank, interval in enumerate(intervals)]


def test_the_box_draws_each_part_once_and_names_its_ranks():
    halves = [((0, 5), (0, 6), (0, 7)), ((5, 10), (0, 6), (0, 7))]
    drawn = mesh_box(records(halves * 2))
    assert drawn.count("<polygon") == 6
    assert re.findall(r'class="part"[^>]*>([^<]+)<', drawn) == ["0, 2", "1, 3"]
    assert "10 × 6 × 7 voxels" in drawn
    assert re.findall(r">([DHW] \d+)<", drawn) == ["D 10", "W 7", "H 6"]


def test_tables_escape_and_fold():
    assert "&lt;b&gt;" in table("c", [Column("a", "text")], [["<b>"]])
    assert "<b>" in table("c", [Column("a", "text")], [[Html("<b></b>")]])
    long = folded("c", [Column("a")], [[str(n)] for n in range(30)])
    assert "6 more" in long
    assert "<details>" not in folded("c", [Column("a")], [["1"]])


def test_a_bar_is_to_scale():
    drawn = bar([(25.0, "state"), (50.0, "peak")], 100.0, tick=50.0).markup
    assert 'x="0.00" y="2" width="25.00"' in drawn
    assert 'x="25.00" y="2" width="50.00"' in drawn
    assert 'x="49.70"' in drawn


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(1023), "1023 B"),
        (bytes_text(1536), "1.50 KiB"),
        (bytes_text(14_680_064), "14.0 MiB"),
        (bytes_text(3 * 2**40), "3.00 TiB"),
        (seconds_text(0), "0 s"),
        (seconds_text(2.5e-5), "25.0 µs"),
        (seconds_text(0.0123), "12.3 ms"),
        (seconds_text(59.96), "60.0 s"),
        (seconds_text(161), "2 min 41 s"),
        (seconds_text(3599.7), "1 h 00 min"),
        (seconds_text(math.nan), "—"),
        (ratio_text(104, 100), "1.04 ×"),
        (ratio_text(5, 0), "—"),
        (percent_text(88, 100), "88 %"),
        (percent_text(4, 1000), "0.4 %"),
        (percent_text(1, 9999), "< 0.1 %"),
        (percent_text(0, 0), "0 %"),
    ],
)
def test_texts_carry_their_unit(text, expected):
    assert text == expected


def test_percentile_is_a_value_of_the_list():
    assert percentile(range(1, 11), 0.9) == 9
    assert percentile([3.0], 0.9) == 3.0
    assert percentile([1.0, 2.0], 0.0) == 1.0
