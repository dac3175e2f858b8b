"""The cap of tokens: every pass counts, and a resumed or replayed run meets the same one."""

import pytest
import torch
from memory_records import Records
from torch import nn

from allocator.accounts import recorded_tokens, undisturbed_tokens
from allocator.bench import Bench
from allocator.budget import resolve_budget
from allocator.config import CapsConfig, SearchConfig
from allocator.executors import InProcess
from allocator.pipeline import run_pipeline
from allocator.reporter import Silent
from allocator.stage import Stage
from allocator.tables import TableStore
from objectives.function_task import FunctionTask
from search_spaces.build import SpaceRequest, build_space

measured = []
SIZES = {"statistics": 20, "search": 20, "guard": 10, "heldout": 14}


def run(records, tokens=None, *, space="sparsity", store=None, fails="", failing=None, **search):
    """A run on a small network, one token per sequence; the split ``fails`` cannot be read.

    Of that split only the assignment ``failing``, if given.
    """
    measured.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).half().float().eval()
    data = {name: [torch.randn(8, 64) for _ in range(size)] for name, size in SIZES.items()}
    task = FunctionTask(lambda network, batch: network(batch).square().mean(), data)
    units = build_space(model, SpaceRequest(space=space))
    bench = Bench.build(model, task, units)

    def measure(assignment, fidelity):
        measured.append(fidelity.split)
        if fidelity.split == fails and (failing is None or assignment == failing):
            raise MemoryError("another process held the memory")
        return bench.evaluator(assignment, fidelity)

    stage = Stage(
        space=units,
        budget=resolve_budget("50%", units),
        search=SearchConfig(
            **{"scorer": "relative_error", "slopes": False, "scorers": ()} | search
        ),
        caps=CapsConfig(tokens=tokens, trials=None if tokens else 10),
        records=records,
        bench=lambda: bench,
        executor=lambda: InProcess(lambda: measure),
        num_sequences={name: size for name, size in SIZES.items() if name != "statistics"},
        tokens_per_sequence=1,
        has_slopes=True,
        store=store,
        reporter=Silent(),
    )
    return run_pipeline(stage)


def capped(outcome):
    """Tokens that the cap is for."""
    spent = outcome.spent.tokens
    return sum(count for kind, count in spent.items() if kind not in ("guard", "heldout"))


def test_statistics_that_only_operators_need_count(tmp_path):
    store = TableStore(tmp_path, "model")
    run(Records(), 200, store=store)
    records = Records()
    outcome = run(records, 150, store=store)  # its tables come from the store
    assert 100 < capped(outcome) <= 150
    assert outcome.spent.tokens["statistics"] == SIZES["statistics"]
    replayed = run(Records(records.records), 150, store=store)
    assert replayed.history.sha256 == outcome.history.sha256
    evaluations = [i for i, r in enumerate(records.records) if r["type"] == "evaluation"]
    resumed = run(Records(records.records[: evaluations[30]]), 150, store=store)
    assert resumed.history.sha256 == outcome.history.sha256
    assert resumed.candidates == outcome.candidates


def test_a_cap_that_leaves_nothing_after_the_statistics_is_refused_each_time(tmp_path):
    store, records = TableStore(tmp_path, "model"), Records()
    run(Records(), 200, store=store)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cap of 64 tokens leaves 0 for the search after 64"):
            run(records, 64, store=store, batch=1)


def test_passes_of_several_scorers_all_count():
    scorers = ("fisher", "output_gradient", "hessian_trace")
    outcome = run(Records(), 400, space="bits-g32", scorer="fisher", scorers=scorers)
    assert outcome.history.evaluations
    assert 350 < capped(outcome) <= 400


def test_a_pass_that_a_crash_repeated_counts_once_for_the_cap():
    records = Records()
    for purpose, counts in (
        ("scorers", {"statistics": 20}),
        ("scorers", {"statistics": 20, "statistics_backward": 40}),
        ("hessian_trace", {"statistics": 5}),
    ):
        records.append({"type": "tokens", "purpose": purpose, "counts": counts})
    assert undisturbed_tokens(records) == {"statistics": 25, "statistics_backward": 40}
    assert recorded_tokens(records) == {"statistics": 45, "statistics_backward": 40}


def test_a_batch_larger_than_the_search_text_asks_for_no_more_than_that_text():
    assert run(Records(), 90, batch=64).history.evaluations


@pytest.mark.parametrize("split", ["guard", "heldout", "search"])
def test_what_failed_for_want_of_memory_is_tried_again_by_a_resumed_run(split):
    records = Records()
    if split == "heldout":
        outcome = run(records, fails=split)
        assert not any(e.ok for e in outcome.evaluations["heldout"].values())
    else:
        with pytest.raises(ValueError, match="no candidate could be measured"):
            run(records, fails=split)
    healthy = run(records)
    assert all(e.ok for found in healthy.evaluations.values() for e in found.values())
    assert healthy.history.sha256 == run(Records()).history.sha256


def test_one_failure_among_successes_stays_what_it_was():
    records = Records()
    failing = run(Records()).candidates["uniform"]
    outcome = run(records, fails="heldout", failing=failing)
    assert not outcome.evaluations["heldout"]["uniform"].ok
    again = run(records)
    assert not measured
    assert again.evaluations == outcome.evaluations
