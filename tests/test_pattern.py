"""Patterns of zeros: names, and which weights go, against definitions in plain Python; exact counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte.sparse.pattern import NAMES, PRUNED, ZERO, Pattern, count_of, lowest, shares

MORE = ("3:5", "7:16", "block1x1", "block3x5", "block2x128")


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_a_name_parses_to_what_prints_as_it(name):
    pattern = Pattern.parse(name)
    assert str(pattern) == name and Pattern.parse(pattern) is pattern and hash(pattern)


def test_names_say_their_sizes():
    assert (Pattern.parse("2:4").n, Pattern.parse("2:4").m) == (2, 4)
    assert (Pattern.parse("block16x4").rows, Pattern.parse("block16x4").columns) == (16, 4)
    assert [Pattern.parse(name).kind for name in NAMES] == ["unstructured", *["nm"] * 3, *["block"] * 2]


WRONG = ["4:2", "2:2", "0:4", "02:4", "2:4 ", "2-4", "block16", "block0x4", "block16x4x2", "", "neuron"]


@pytest.mark.parametrize("name", [*WRONG, None, 4])
def test_another_name_is_an_error_with_the_nearest(name):
    with pytest.raises(hb.SchemeError, match=r"no pattern of zeros is called .* the nearest are "):
        Pattern.parse(name)


def test_the_nearest_names_come_first():
    with pytest.raises(hb.SchemeError, match="the nearest are block16x4"):
        Pattern.parse("16x4")


@pytest.mark.parametrize(
    "sizes",
    [("nm", 4, 2), ("nm", 2, 4, 16, 4), ("nm", 2.0, 4), ("block", 1, 0), ("block", 0, 0, 0, 4), ("free",)],
)
def test_sizes_that_make_no_pattern_are_an_error(sizes):
    with pytest.raises(hb.SchemeError):
        Pattern(*sizes)


def members(pattern: Pattern, n: int, k: int) -> list[list[tuple[int, int]]]:
    """The positions of each unit (of N:M: of each group), in the order of rows and columns."""
    rows, columns = pattern.rows, pattern.m or pattern.columns
    return [
        [(r, c) for r in range(top, min(top + rows, n)) for c in range(left, min(left + columns, k))]
        for top in range(0, n, rows)
        for left in range(0, k, columns)
    ]


def expected(pattern: Pattern, scores: list[list[float]], amount: float | None) -> list[list[bool]]:
    """select by its definition, on lists."""
    n, k = len(scores), len(scores[0])
    keep = [[True] * k for _ in range(n)]
    units = members(pattern, n, k)
    if pattern.kind == "nm":
        for group in units:
            ranked = sorted(group, key=lambda at: scores[at[0]][at[1]])
            for r, c in ranked[: max(len(group) - pattern.n, 0)]:
                keep[r][c] = False
        return keep

    def score(unit: list[tuple[int, int]]) -> float:
        values = [scores[r][c] for r, c in unit]
        return sum(v for v in values if v >= 0) if max(values) >= 0 else max(values)

    for unit in sorted(units, key=score)[: math.floor(round(amount * len(units), 6))]:
        for r, c in unit:
            keep[r][c] = False
    return keep


@st.composite
def matrices(draw):
    """Integers, so that sums are exact; few of them, so that there are ties."""
    n, k = draw(st.integers(1, 9)), draw(st.integers(1, 13))
    values = st.sampled_from([PRUNED, ZERO, 0.0, 1.0, 2.0, 3.0, 7.0])
    return draw(st.lists(st.lists(values, min_size=k, max_size=k), min_size=n, max_size=n))


AMOUNTS = st.one_of(st.sampled_from([0, 1, 0.5, 0.29, 0.8, 1 / 3]), st.floats(0, 1))


@pytest.mark.usefixtures("one_thread_of_torch")
@given(matrices(), AMOUNTS, st.sampled_from([*NAMES[:4], "2:3", "block2x3", "block4x1"]))
def test_select_is_its_definition(scores, amount, name):
    pattern = Pattern.parse(name)
    amount = None if pattern.kind == "nm" else amount
    keep = pattern.select(torch.tensor(scores), amount)
    assert keep.dtype == torch.bool
    assert keep.tolist() == expected(pattern, scores, amount)
    assert pattern.fits(keep)


@pytest.mark.parametrize("name", ["unstructured", "block16x4", "block16x1", "block6x3"])
@pytest.mark.parametrize("amount", [0, 0.1, 0.5, 0.77, 0.8, 1])
def test_exactly_the_share_goes(name, amount):
    pattern = Pattern.parse(name)
    scores = torch.rand(48, 60)
    gone = ~pattern.select(scores, amount)
    unit = pattern.rows * pattern.columns
    assert int(gone.sum()) == math.floor(round(amount * 48 * 60 / unit, 6)) * unit
    if pattern.kind == "unstructured" and 0 < amount < 1:
        assert scores[gone].max() <= scores[~gone].min()


@pytest.mark.parametrize("name", ["1:4", "2:4", "4:8", "3:5"])
def test_a_group_keeps_exactly_n(name):
    pattern = Pattern.parse(name)
    keep = pattern.select(torch.rand(7, 8 * pattern.m + 1))
    counts = keep[:, :-1].reshape(7, -1, pattern.m).sum(-1)
    assert (counts == pattern.n).all() and keep[:, -1].all()  # a last group of one weight


def test_ties_go_in_order():
    keep = Pattern.parse("unstructured").select(torch.ones(3, 4), 0.5)
    assert keep.flatten().tolist() == [False] * 6 + [True] * 6
    assert Pattern.parse("2:4").select(torch.ones(1, 8)).tolist() == [[False, False, True, True] * 2]


SCORES = st.sampled_from([PRUNED, ZERO, 0.0, 1.0, 2.0])


@pytest.mark.usefixtures("one_thread_of_torch")
@given(st.lists(st.lists(SCORES, min_size=6, max_size=6), min_size=1, max_size=9), AMOUNTS)
def test_per_row_the_share_of_each_row_goes(scores, amount):
    scores = torch.tensor(scores)
    keep = Pattern.parse("unstructured").select(scores, amount, per_row=True)
    counts, before = (~keep).sum(1), (scores == PRUNED).sum(1)
    total = max(count_of(amount, scores.numel()), int(before.sum()))
    assert int(counts.sum()) == total and bool((counts >= before).all())
    free = counts[counts > before]  # rows that lose more than they had lost share what goes evenly
    if len(free):
        assert int(free.max() - counts.min()) <= 1
    for row, kept in zip(scores, keep, strict=True):
        if kept.any() and not kept.all():
            assert row[~kept].max() <= row[kept].min()


PARTS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=8)


@pytest.mark.usefixtures("one_thread_of_torch")
@given(PARTS, st.integers(0, 400))
def test_shares_add_up(parts, total):
    sizes = torch.tensor([size for size, _ in parts])
    gone = torch.tensor([min(size, before) for size, before in parts])
    counts = shares(total, sizes, gone)
    assert bool((counts >= gone).all()) and bool((counts <= sizes).all())
    assert int(counts.sum()) == min(max(total, int(gone.sum())), int(sizes.sum()))
    grown = counts > gone  # one share fits all, +-1: above what was gone, as far as each part has as much
    if grown.any():
        assert ((counts[grown] - 1) / sizes[grown]).max() <= ((counts + 1) / sizes).min()


def test_a_part_that_lost_more_than_its_share_loses_no_more():
    sizes = torch.tensor([6, 6, 6])
    assert shares(8, sizes, torch.tensor([5, 0, 0])).tolist() == [5, 2, 1]
    assert shares(9, sizes, torch.tensor([0, 0, 0])).tolist() == [3, 3, 3]
    assert shares(4, sizes, torch.tensor([5, 0, 2])).tolist() == [5, 0, 2]


def test_counts_are_floors_of_what_was_meant():
    assert [count_of(0.29, 100), count_of(0.57, 100), count_of(0.5, 7), count_of(0.999, 3)] == [29, 57, 3, 2]
    assert count_of(0.3, 10**9) == 3 * 10**8 and count_of(1, 7) == 7 and count_of(0, 7) == 0


def test_lowest_counts_exactly_among_equals():
    scores = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert lowest(scores, 2).tolist() == [[False, True], [True, False]]
    assert not lowest(scores, 0).any() and lowest(scores, 4).all()


@pytest.mark.parametrize(
    ("name", "amount", "error"),
    [
        ("unstructured", -0.1, hb.SchemeError),
        ("unstructured", 1.0001, hb.SchemeError),
        ("unstructured", math.nan, hb.SchemeError),
        ("unstructured", math.inf, hb.SchemeError),
        ("unstructured", None, hb.DTypeError),
        ("block16x4", None, hb.DTypeError),
        ("unstructured", True, hb.DTypeError),
        ("unstructured", "0.5", hb.DTypeError),
        ("unstructured", torch.tensor(0.5), hb.DTypeError),
        ("2:4", 0.6, hb.SchemeError),
        ("2:4", 0, hb.SchemeError),
        ("1:4", 0.5, hb.SchemeError),
        ("2:4", False, hb.DTypeError),
    ],
)
def test_an_amount_that_cannot_be_is_an_error(name, amount, error):
    with pytest.raises(error, match="amount"):
        Pattern.parse(name).select(torch.rand(4, 8), amount)


def test_the_one_amount_of_n_of_m():
    amounts = [Pattern.parse(name).amount for name in ("1:4", "2:4", "4:8", "unstructured")]
    assert amounts == [0.75, 0.5, 0.5, None]
    assert Pattern.parse("1:3").check_amount(2 / 3) == Pattern.parse("1:3").check_amount(None)


@pytest.mark.parametrize("scores", [torch.rand(4), torch.rand(2, 2, 2), torch.rand(0, 4), [[1.0]]])
def test_what_is_no_matrix_is_an_error(scores):
    with pytest.raises((hb.ShapeError, hb.DTypeError), match="scores"):
        Pattern.parse("unstructured").select(scores, 0.5)


@given(
    st.integers(1, 7).flatmap(
        lambda k: st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=1, max_size=6)
    ),
    st.sampled_from(["unstructured", "1:4", "2:4", "2:3", "block2x3", "block3x1"]),
)
@pytest.mark.usefixtures("one_thread_of_torch")
def test_violations_are_found_where_they_are(mask, name):
    pattern = Pattern.parse(name)
    wrong = []
    for unit in members(pattern, len(mask), len(mask[0])):
        kept = sum(mask[r][c] for r, c in unit)
        if kept > pattern.n if pattern.kind == "nm" else 0 < kept < len(unit):
            wrong.append(unit[0])
    if pattern.kind == "unstructured":
        wrong = []
    mask = torch.tensor(mask)
    assert pattern.violations(mask) == (wrong[0] if wrong else None)
    assert pattern.fits(mask) == (not wrong)
    weight = mask.float()  # zeros within a kept block are no violation by a weight
    assert pattern.fits(weight) == (pattern.kind == "block" or not wrong)


def test_a_layer_smaller_than_a_unit_is_none_for_the_pattern():
    fit = [Pattern.parse("block16x4").applies(shape) for shape in [(16, 4), (15, 4), (16, 3), (17, 9)]]
    assert fit == [True, False, False, True]
    assert [Pattern.parse("2:4").applies(shape) for shape in [(1, 4), (9, 3)]] == [True, False]
    assert Pattern.parse("unstructured").applies((1, 1))


def test_blocks_at_the_edge_are_smaller_and_count_as_one():
    pattern = Pattern.parse("block4x4")
    scores = torch.ones(5, 6)
    units = pattern.units(scores)
    assert units.tolist() == [[16, 8], [4, 2]]
    assert pattern.expand(units, (5, 6))[:, [0, 5]].tolist() == [[16, 8]] * 4 + [[4, 2]]
    assert pattern.select(scores, 0.25).sum() == 28  # the corner goes first
