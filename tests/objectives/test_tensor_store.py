"""Tiers of compressed parameters: caps are kept, nothing that is dear is lost, numbers stay."""

import pytest
import torch
from language import MENU, offering, random_model

from objectives.bank import Bank
from objectives.tensor_store import MemoryPlan, TensorStore, plan_memory
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, NormalFloat, RoundToNearest


def tensors(value):
    return (torch.full((4, 8), float(value)),)


SIZE = 4 * 8 * 4


def store(tmp_path, *, device=2, host=0, files=0):
    plan = MemoryPlan(0, 0, device * SIZE, host * SIZE, files * SIZE)
    return TensorStore(plan, tmp_path)


def test_the_last_used_stay_and_the_dear_ones_move_down(tmp_path):
    kept = store(tmp_path, device=2, host=2, files=8)
    for value in range(8):
        kept.put((value, 0), tensors(value), cheap=False)
    assert len(list(tmp_path.glob("bank-*/*"))) == 4
    for value in range(8):
        found = kept.get((value, 0))
        assert found is not None
        assert torch.equal(found[0], tensors(value)[0])


def test_what_falls_off_the_last_tier_has_to_be_made_again(tmp_path):
    kept = store(tmp_path, device=1, files=2)
    for value in range(5):
        kept.put((value, 0), tensors(value), cheap=False)
    assert [kept.get((value, 0)) is not None for value in (0, 1, 4)] == [False, False, True]
    assert sum(path.stat().st_size > 0 for path in tmp_path.glob("bank-*/*")) == 2


def test_cheap_ones_are_dropped_instead(tmp_path):
    kept = store(tmp_path, device=1, host=4, files=4)
    kept.put((0, 0), tensors(0), cheap=True)
    kept.put((1, 0), tensors(1), cheap=True)
    assert kept.get((0, 0)) is None
    assert not list(tmp_path.glob("bank-*"))


def test_larger_than_the_device_goes_down_at_once(tmp_path):
    kept = store(tmp_path, device=0, files=1)
    kept.put((0, 0), tensors(7), cheap=False)
    assert torch.equal(kept.get((0, 0))[0], tensors(7)[0])


def test_clearing_deletes_the_files(tmp_path):
    kept = store(tmp_path, device=0, files=3)
    kept.put((0, 0), tensors(7), cheap=False)
    kept.clear()
    assert kept.get((0, 0)) is None
    assert not list(tmp_path.iterdir())


def test_plan_counts_what_is_dear_and_needs_no_files_where_memory_will_do(tmp_path):
    model = random_model("llama")
    space = offering(
        build_space(model, SpaceRequest()), RoundToNearest(2, 16), NormalFloat(3), Keep()
    )
    weights = sum(unit.num_weights for unit in space.units)
    plan = plan_memory(model, space, most_bytes=2**30, folder=tmp_path)
    assert plan == MemoryPlan(3 * 4 * weights, 4 * weights, 3 * 4 * weights)
    small = plan_memory(model, space, most_bytes=4 * weights // 2, folder=tmp_path)
    assert small.device_bytes == 4 * weights // 2
    assert small.file_bytes == 4 * weights  # a file stays when what it holds is used
    assert plan_memory(model, space, most_bytes=1, folder=None).file_bytes == 0
    assert "in mapped files" in str(small)
    assert "in mapped files" not in str(plan)


@pytest.mark.parametrize("most_bytes", [0, 10_000])
def test_a_bank_in_files_compresses_nothing_twice(tmp_path, monkeypatch, most_bytes):
    model = random_model("llama")
    space = offering(build_space(model, SpaceRequest()), *(NormalFloat(b) for b in (2, 3)), Keep())
    expected = Bank(model, space)
    bank = Bank(model, space, most_bytes=most_bytes, folder=tmp_path)
    made = []
    make = Bank.make
    monkeypatch.setattr(Bank, "make", lambda self, *about: made.append(about) or make(self, *about))
    units = [(unit, option) for unit in range(len(space.units)) for option in (0, 1)]
    for _ in range(2):
        for unit, option in units:
            ours, theirs = bank.compressed(unit, option), expected.compressed(unit, option)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(made) == 2 * len(units)  # once each for both banks
    bank.close()
    assert not list(tmp_path.iterdir())


def test_menus_of_the_language_tests_are_cheap_but_for_none():
    model = random_model("gpt2")
    space = offering(build_space(model, SpaceRequest()), *MENU)
    assert plan_memory(model, space, most_bytes=2**30, folder=None).dear_bytes == 0
