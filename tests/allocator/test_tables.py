"""Loss tables: nothing is computed twice, within a run, after a crash, or for another budget."""

import numpy as np
import pytest
import torch
from memory_records import Records
from plan_factory import tiny_llama

from allocator.bench import Bench
from allocator.reporter import Silent
from allocator.tables import TableStore, Wanted, build_tables
from objectives.calibration import Calibration
from objectives.language_task import LanguageTask
from objectives.sensitivity import SCORERS
from search_spaces.build import SpaceRequest, build_space
from search_spaces.space import SearchSpace

NAMES = ("fisher", "relative_error")
ALL_NAMES = ("blend", "fisher", "reconstruction", "relative_error")


class Notes(Silent):
    """Remembers what users would read."""

    def __init__(self):
        self.notes, self.stages = [], []

    def stage(self, label, total):
        self.stages.append((label, total))
        return super().stage(label, total)

    def note(self, text):
        self.notes.append(text)


def no_bench():
    raise AssertionError("nothing should have to be computed")


def make_bench(model=None, request=None):
    model = model or tiny_llama()
    generator = torch.Generator().manual_seed(2)
    names = ("statistics", "search", "guard", "heldout")
    calibration = Calibration.from_tensors(
        {name: torch.randint(0, 80, (2, 10), generator=generator) for name in names}
    )
    space = build_space(model, request or SpaceRequest())
    return Bench.build(model, LanguageTask(calibration), space)


@pytest.fixture(scope="module")
def bench():
    return make_bench()


def tables(bench_of, space, names=NAMES, records=None, store=None, reporter=None):
    return build_tables(
        bench_of,
        Wanted(space, names),
        records=Records() if records is None else records,
        store=store,
        reporter=reporter or Silent(),
    )


def assert_equal_tables(ours, theirs):
    assert list(ours) == list(theirs)
    for name, table in ours.items():
        other = theirs[name]
        assert (table.scorer, table.unit) == (other.scorer, other.unit)
        for row, same in zip(table.losses, other.losses, strict=True):
            assert np.array_equal(row, same)
            assert row.dtype == np.float64


def num_cells(space):
    return sum(len(menu) for menu in space.menus)


def test_tables_have_the_spaces_shape_and_every_cell_is_recorded(bench):
    records, reporter = Records(), Notes()
    found = tables(lambda: bench, bench.space, ALL_NAMES, records, reporter=reporter)
    assert list(found) == list(ALL_NAMES)
    for name, table in found.items():
        assert table.unit == SCORERS[name].unit
        assert [len(row) for row in table.losses] == [len(menu) for menu in bench.space.menus]
    assert len(records.of("cell")) == len(ALL_NAMES) * num_cells(bench.space)
    (tokens,) = records.of("tokens")
    assert tokens["counts"] == {"statistics": 20, "statistics_backward": 40}
    assert tokens["block_counts"] == {"statistics": 2 * 20, "statistics_backward": 2 * 40}
    assert reporter.stages[0] == ("statistics", 2)
    assert ("scoring: fisher", num_cells(bench.space)) in reporter.stages


def test_second_call_on_the_same_journal_computes_nothing(bench):
    records = Records()
    first = tables(lambda: bench, bench.space, records=records)
    num_records = len(records.records)
    assert_equal_tables(tables(no_bench, bench.space, records=records), first)
    assert len(records.records) == num_records


def test_scorer_without_statistics_spends_no_tokens(bench):
    records = Records()
    tables(lambda: bench, bench.space, ("relative_error",), records)
    assert {record["type"] for record in records.records} == {"cell"}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_dead_run_goes_on_at_the_cell_where_it_died(bench, share):
    whole = Records()
    expected = tables(lambda: bench, bench.space, records=whole)
    dying = Records(most=int(share * len(whole.records)))
    with pytest.raises(KeyboardInterrupt):
        tables(lambda: bench, bench.space, records=dying)
    resumed = Records(dying.records)
    assert_equal_tables(tables(lambda: bench, bench.space, records=resumed), expected)
    cells = [(r["scorer"], r["unit"], r["option"]) for r in resumed.of("cell")]
    assert len(cells) == len(set(cells)) == len(NAMES) * num_cells(bench.space)


def test_only_the_missing_scorer_is_computed(bench):
    records, reporter = Records(), Notes()
    tables(lambda: bench, bench.space, ("fisher",), records)
    found = tables(lambda: bench, bench.space, NAMES, records, reporter=reporter)
    assert list(found) == list(NAMES)
    assert [label for label, _ in reporter.stages if "scoring" in label] == [
        "scoring: relative_error"
    ]
    assert sum(r["counts"].get("statistics_backward", 0) for r in records.of("tokens")) == 40


def test_finished_tables_serve_later_runs(bench, tmp_path):
    """At another budget, under another name of the same space: no bench, no statistics."""
    store = TableStore(tmp_path / "new" / "losses", "model and text")
    first = tables(lambda: bench, bench.space, store=store)
    space = bench.space
    renamed = SearchSpace("other", space.units, space.menus, space.fixed, space.ties)
    records = Records()
    assert_equal_tables(tables(no_bench, renamed, records=records, store=store), first)
    assert len(records.of("table")) == len(NAMES)
    # The journal alone suffices from now on.
    assert_equal_tables(tables(no_bench, space, records=records), first)
    assert {path.suffix for path in store.folder.iterdir()} == {".npz"}


def test_stored_table_overrules_a_torn_start(bench, tmp_path):
    store = TableStore(tmp_path, "model and text")
    expected = tables(lambda: bench, bench.space, store=store)
    dying = Records(most=7)
    with pytest.raises(KeyboardInterrupt):
        tables(lambda: bench, bench.space, records=dying)
    resumed = Records(dying.records)
    assert_equal_tables(tables(no_bench, bench.space, records=resumed, store=store), expected)


def test_store_is_for_its_model_text_and_space_only(bench, tmp_path):
    store = TableStore(tmp_path, "model and text")
    tables(lambda: bench, bench.space, ("relative_error",), store=store)
    other = SearchSpace(
        "bits",
        bench.space.units,
        (bench.space.menus[0][:-1], *bench.space.menus[1:]),
        bench.space.fixed,
    )
    assert store.load("relative_error", bench.space) is not None
    assert store.load("relative_error", other) is None
    assert store.load("fisher", bench.space) is None
    assert TableStore(tmp_path, "other text").load("relative_error", bench.space) is None


def test_scorer_that_cannot_serve_the_space_is_left_out_unless_the_run_depends_on_it():
    bench = make_bench(request=SpaceRequest(open_units=("embeddings",)))
    reporter = Notes()
    found = tables(lambda: bench, bench.space, ("fisher", "reconstruction"), reporter=reporter)
    assert list(found) == ["fisher"]
    (note,) = reporter.notes
    assert note.startswith("the reconstruction scorer is left out: ")
    assert "embed_tokens" in note
    with pytest.raises(ValueError, match=r"embed_tokens.* cannot be observed"):
        tables(lambda: bench, bench.space, ("reconstruction", "fisher"))


def test_weights_that_are_not_finite_are_refused_with_the_unit():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    bench = make_bench(model)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight under .* is not finite"
    ):
        tables(lambda: bench, bench.space, ("relative_error",))


def test_unknown_scorer_is_refused():
    bench = make_bench()
    with pytest.raises(ValueError, match=r"unknown scorer 'fischer'.*did you mean 'fisher'"):
        tables(lambda: bench, bench.space, ("fischer",))
