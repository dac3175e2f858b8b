"""Budgets as users write them, to the byte."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.budget import Budget, dense_bytes, parse_budgets, resolve_budget
from search_spaces.operators import Keep, RoundToNearest
from search_spaces.space import Member, SearchSpace, Unit, build_menu
from search_spaces.storage import StoredTensor

MENU = (RoundToNearest(2, 64), RoundToNearest(4, 64), RoundToNearest(8, 64), Keep())


def make_space():
    """Two matrices of odd and even sides, and an embedding that is not searched."""
    shapes = ((96, 128), (7, 65))
    units = tuple(
        Unit(f"u{i}", (Member(f"layers.{i}", "weight", shape),), i, "w")
        for i, shape in enumerate(shapes)
    )
    menus = tuple(build_menu(unit, MENU) for unit in units)
    return SearchSpace("odd", units, menus, (StoredTensor("embed.weight", "BF16", (50, 16)),))


SPACE = make_space()
NUM_WEIGHTS = 96 * 128 + 7 * 65
# By hand: 4-bit codes and one float16 scale a group of 64, whose last one is short.
INT4_BYTES = (96 * 128 // 2 + 96 * 2 * 2) + (228 + 7 * 2 * 2)


def test_space_weighs_what_this_file_computes_with():
    assert SPACE.num_weights == NUM_WEIGHTS
    assert SPACE.bytes((1, 1)) == INT4_BYTES
    assert SPACE.overhead_bytes == SPACE.container_bytes + 50 * 16 * 2
    assert dense_bytes(SPACE) == 2 * NUM_WEIGHTS + SPACE.overhead_bytes


@pytest.mark.parametrize(
    ("text", "stored_bytes"),
    [
        ("20000", 20_000),
        ("20000B", 20_000),
        ("20000b", 20_000),
        ("20KB", 20_000),
        ("20.5kb", 20_500),
        ("20KiB", 20_480),
        (" 20 kib ", 20_480),
        ("1MB", 1_000_000),
        ("2MiB", 2 * 2**20),
        ("2.5GiB", 5 * 2**29),
        ("1gb", 10**9),
        ("1TB", 10**12),
        ("0.5TiB", 2**39),
        ("9007199254740993", 2**53 + 1),
        ("20000.9", 20_000),
        ("20.0009KB", 20_000),
        ("100%", 2 * NUM_WEIGHTS + SPACE.overhead_bytes),
        ("45%", (2 * NUM_WEIGHTS + SPACE.overhead_bytes) * 45 // 100),
        ("150 %", (2 * NUM_WEIGHTS + SPACE.overhead_bytes) * 3 // 2),
    ],
)
def test_bytes_and_percentages_are_of_the_whole_stored_model(text, stored_bytes):
    budget = resolve_budget(text, SPACE)
    assert budget == Budget(text, stored_bytes, stored_bytes - SPACE.overhead_bytes)


@pytest.mark.parametrize(
    ("text", "searched_bytes"),
    [
        ("4bpw", NUM_WEIGHTS * 4 // 8),
        ("3.25BPW", NUM_WEIGHTS * 13 // 32),
        ("16 bpw", NUM_WEIGHTS * 2),
    ],
)
def test_bits_per_weight_are_of_the_searched_units(text, searched_bytes):
    budget = resolve_budget(text, SPACE)
    assert budget == Budget(text, searched_bytes + SPACE.overhead_bytes, searched_bytes)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.decimals("2.5", "20", places=4))
def test_fractions_of_a_byte_are_rounded_down_and_never_in_floating_point(amount):
    exact = Fraction(str(amount)) * NUM_WEIGHTS / 8
    searched = resolve_budget(f"{amount}bpw", SPACE).searched_bytes
    assert searched <= exact < searched + 1


def test_exactly_the_least_is_accepted_and_one_byte_less_is_not():
    least = SPACE.least_bytes + SPACE.overhead_bytes
    assert resolve_budget(str(least), SPACE).searched_bytes == SPACE.least_bytes
    with pytest.raises(ValueError, match="cannot be met"):
        resolve_budget(str(least - 1), SPACE)


def test_bits_of_the_cheapest_assignment_are_enough():
    """Written with all its digits; any fewer could round below it."""
    exact = 8 * SPACE.least_bytes / NUM_WEIGHTS
    assert resolve_budget(f"{exact + 1e-9:.9f}bpw", SPACE).searched_bytes == SPACE.least_bytes
    with pytest.raises(ValueError, match="cannot be met"):
        resolve_budget(f"{exact - 1e-3:.9f}bpw", SPACE)


@pytest.mark.parametrize("text", ["1bpw", "10", "1%", "0.001KB"])
def test_infeasible_budget_says_the_least_and_the_most(text):
    with pytest.raises(ValueError, match="cannot be met") as error:
        resolve_budget(text, SPACE)
    message, overhead = str(error.value), SPACE.overhead_bytes
    assert f"the budget {text} " in message
    numbers = [int(n.replace(",", "")) for n in re.findall(r"(\d[\d,]*) (?:and|bytes)", message)]
    least, most = SPACE.least_bytes + overhead, SPACE.most_bytes + overhead
    assert numbers[1:] == [least, most, overhead]
    assert f"{8 * SPACE.least_bytes / NUM_WEIGHTS:.4g} to 16 bits per" in message
    assert "raise the budget or offer cheaper options" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "0",
        "0.0MB",
        "0%",
        "-5MB",
        "-5",
        "+5MB",
        "MB",
        "ib",
        "5ib",
        "5PB",
        "5 bits",
        "1e6",
        ".5MB",
        "5.MB",
        "1.2.3",
        "5 M B",
        "nan",
        "inf",
        "3,25bpw",
        "5MB 3",
    ],
)
def test_what_is_no_budget_is_refused_with_examples(text):
    with pytest.raises(ValueError, match=r"write 90MB, 2\.5GiB, 123456789, 3\.25bpw or 40%"):
        resolve_budget(text, SPACE)


def test_several_budgets():
    assert parse_budgets("3bpw, 4bpw ,90MB") == ("3bpw", "4bpw", "90MB")
    assert parse_budgets("40%,") == ("40%",)
    assert parse_budgets("4bpw,3bpw,4bpw") == ("4bpw", "3bpw")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a budget"),
        (" , ", "expected a budget"),
        ("3bpw,much", "'much' is not a budget"),
        ("3bpw,0MB", "'0MB' is zero"),
    ],
)
def test_every_word_of_several_is_checked(text, says):
    with pytest.raises(ValueError, match=says):
        parse_budgets(text)
