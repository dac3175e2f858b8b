"""Runs as Optuna studies: what is in them, that they grow and never double, and what is refused."""

import json
import shutil
import warnings

import optuna
import pytest
from cli_runs import allocator, load, records, search, succeed
from postgres_server import PASSWORD, missing, postgres_server

from allocator.journal import Journal
from allocator.plan import load_plan
from allocator.run_folder import RunFolder, load_space
from allocator.study import export_study, read_study
from allocator.study_trials import BYTES, unit_groups
from objectives.evaluation import Evaluation, Fidelity
from search_spaces.operators.keep import Keep
from search_spaces.operators.kv_cache import KVQuantize
from search_spaces.operators.round_to_nearest import RoundToNearest
from search_spaces.space import Member, SearchSpace, Unit, build_menu


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, which no export may change."""
    return search(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def study(run, tmp_path_factory):
    """The run as a study in a file; to be read only."""
    storage = f"sqlite:///{tmp_path_factory.mktemp('studies')}/study.db"
    export_study(RunFolder(run), storage)
    with opened(storage, "run") as found:
        yield found


class opened:  # noqa: N801
    """A study of a storage, read with Optuna alone; a database is let go of at the end."""

    def __init__(self, storage, name):
        self.storage, self.name, self.database = storage, name, None

    def __enter__(self):
        if "://" in self.storage:
            address = self.storage.replace("postgresql:", "postgresql+psycopg:")
            self.database = kept = optuna.storages.RDBStorage(address)
        else:
            file = self.storage.removeprefix("journal:")
            backend = optuna.storages.journal.JournalFileBackend(file)
            kept = optuna.storages.JournalStorage(backend)
        return optuna.load_study(study_name=self.name, storage=kept)

    def __exit__(self, *_):
        if self.database is not None:
            self.database.remove_session()
            self.database.engine.dispose()


def evaluations(folder, split="search"):
    found = [Evaluation.from_json(r["evaluation"]) for r in records(folder, "evaluation")]
    return [e for e in found if e.fidelity.split == split]


def copy(run, path, num_records=None):
    """The run as it was after so many records."""
    shutil.copytree(run, path)
    if num_records is not None:
        (path / "plan.json").unlink()
        lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
        (path / "journal.jsonl").write_bytes(b"".join(lines[: num_records + 1]))
    return path


def refusal(*words):
    """The one sentence with which an export is refused."""
    result = allocator("export-study", *words)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    return line


# What a study holds


def test_a_trial_for_each_measured_assignment(run, study):
    distinct = dict.fromkeys(e.assignment for e in evaluations(run))
    assert len(distinct) > 5
    found = [tuple(json.loads(t.user_attrs["assignment"])) for t in study.trials]
    assert found == list(distinct)
    assert {t.state for t in study.trials} == {optuna.trial.TrialState.COMPLETE}
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    space = load_space(run / "space.json")
    for trial, assignment in zip(study.trials, distinct, strict=True):
        assert trial.user_attrs["bytes"] == space.stored_bytes(assignment)
        assert trial.user_attrs["bits_per_weight"] == space.weight_bits(assignment)
        assert trial.user_attrs["space"] == space.sha256
        assert trial.user_attrs["run"] == "run"
        (over,) = trial.constraints.values()
        most = load_plan(run / "plan.json").budget_bytes
        assert over == trial.user_attrs["bytes"] - most <= 0


def test_losses_are_those_of_the_plan(run, study):
    plan = load_plan(run / "plan.json")
    assert {"dp", "uniform", "search", "returned", "dp:fisher"} <= study.user_attrs[
        "candidates"
    ].keys()
    for name, number in study.user_attrs["candidates"].items():
        trial = study.trials[number]
        assert name in trial.user_attrs["candidate"].split(", ")
        assert trial.user_attrs["heldout_nats"] == plan.heldout_nats[name].nats
        if name in plan.search_nats:
            entry = plan.search_nats[name]
            assert trial.value == pytest.approx(entry.nats, rel=1e-9)
            assert trial.user_attrs["standard_error_nats"] == pytest.approx(
                entry.standard_error_nats, rel=1e-9
            )
        if name in plan.guard_nats:
            assert trial.user_attrs["guard_nats"] == plan.guard_nats[name].nats
    returned = study.trials[study.user_attrs["candidates"]["returned"]]
    space = load_space(run / "space.json")
    labels = [
        menu[i].operator.label
        for menu, i in zip(space.menus, json.loads(returned.user_attrs["assignment"]), strict=True)
    ]
    assert labels == [unit.choice.label for unit in plan.units]
    assert returned.params[BYTES] == plan.achieved_bytes


def test_parameters_are_few_and_add_up(run, study):
    space = load_space(run / "space.json")
    groups = unit_groups(space)
    assert len(groups) == 7 + 4
    ranges = study.trials[0].distributions
    assert 5 < len(ranges) <= 12
    weights = {
        name: sum(space.units[i].num_weights for i in units) for name, units in groups.items()
    }
    kinds = [name for name in groups if name.endswith("_proj")]
    bands = [name for name in groups if name not in kinds]
    for trial in study.trials:
        assert trial.distributions == ranges
        assignment = tuple(json.loads(trial.user_attrs["assignment"]))
        for names in (kinds, bands):
            if all(name in trial.params for name in names):
                total = sum(trial.params[name] * weights[name] for name in names)
                assert total == pytest.approx(8 * space.bytes(assignment))
    assert any(all(name in ranges for name in names) for names in (kinds, bands))


def test_study_says_what_it_is_about(run, study):
    config = load_plan(run / "plan.json")
    about = study.user_attrs
    assert about["budget"] == "2.6bpw"
    assert about["budget_bytes"] == config.budget_bytes
    assert (about["space"], about["scorer"], about["search"]) == (
        "bits",
        "correlated_blend",
        "model_guided",
    )
    assert about["model"] == config.model.name
    assert load(about["plan"]) == load(run / "plan.json")
    assert about["returned"] == config.returned
    assert study.metric_names == ["loss (nats per token)"]


def test_exporting_leaves_the_run_as_it_was(run, tmp_path):
    before = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    succeed("export-study", run, "--storage", f"journal:{tmp_path / 'study.log'}")
    assert {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_many_kinds_and_caches_still_make_few_parameters():
    operators = [RoundToNearest(bits=4, group_size=32), Keep()]
    caches = [KVQuantize(4, 4, 32), Keep()]
    units = [
        Unit(
            f"{depth}.{kind}",
            (Member(f"{depth}.{kind}", "weight", (32, 32 * (kind + 1))),),
            depth,
            f"kind{kind}",
        )
        for depth in range(6)
        for kind in range(9)
    ] + [Unit("head", (Member("head", "weight", (64, 32)),), None, "head")]
    menus = [build_menu(unit, operators) for unit in units]
    cache = Unit("0.cache", (Member("0", "keys", (1, 32, 32), cache=True),), 0, "keys_cache")
    space = SearchSpace("many", (*units, cache), (*menus, build_menu(cache, caches)), fixed=())
    groups = unit_groups(space)
    kinds = {name: found for name, found in groups.items() if "block" not in name}
    bands = {name: found for name, found in groups.items() if "block" in name}
    assert list(kinds) == [f"bits kind{k}" for k in range(3, 9)] + ["bits others"]
    assert list(bands) == ["bits block 0", "bits blocks 1-2", "bits block 3", "bits blocks 4-5"]
    assert sorted(i for found in kinds.values() for i in found) == list(range(len(space.units)))
    assert sorted(i for found in bands.values() for i in found) == list(range(6 * 9))


# Growing


@pytest.mark.parametrize("address", ["sqlite:///{}/study.db", "journal:{}/study", "{}/study.log"])
def test_exporting_again_adds_nothing(address, run, tmp_path):
    storage = address.format(tmp_path)
    first = json.loads(succeed("export-study", run, "--storage", storage, "--json"))
    distinct = len({e.assignment for e in evaluations(run)})
    assert first["num_added"] == distinct
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    again = json.loads(succeed("export-study", run, "--storage", storage, "--json"))
    assert (again["num_added"], again["num_present"]) == (0, distinct)
    assert (again["num_outdated"], again["num_failed"]) == (0, 0)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == size
    with opened(storage, "run") as study:
        assert len(study.trials) == distinct
    assert f"{distinct} were there" in succeed("export-study", run, "--storage", storage)


def test_a_half_finished_run_can_be_exported_and_later_the_rest(run, tmp_path):
    kinds = [r["type"] for r in records(run)]
    early = copy(run, tmp_path / "run", kinds.index("evaluation") + 6)
    storage = f"sqlite:///{tmp_path}/study.db"
    first = export_study(RunFolder(early), storage)
    with opened(storage, "run") as study:
        assert study.user_attrs["candidates"] == {}
        assert "plan" not in study.user_attrs
        losses = [trial.value for trial in study.trials]
    shutil.rmtree(early)
    second = export_study(RunFolder(copy(run, early)), storage)
    distinct = len({e.assignment for e in evaluations(run)})
    assert second.num_present == first.num_added < distinct
    assert second.num_added == distinct - first.num_added
    assert second.num_outdated > 0
    with opened(storage, "run") as study:
        assert [trial.value for trial in study.trials][: len(losses)] == losses
        assert len(study.trials) == distinct
        assert "returned" in study.user_attrs["candidates"]
    said = succeed("export-study", early, "--storage", storage)
    assert f"note: {second.num_outdated} of them keep the loss" in said


def test_failed_assignments_are_failed_trials(run, tmp_path):
    folder = copy(run, tmp_path / "run")
    space = load_space(run / "space.json")
    dense = tuple(len(menu) - 1 for menu in space.menus)
    failed = Evaluation(dense, Fidelity("search", 0, 4), error="ValueError: bad layer")
    with Journal.open(folder / "journal.jsonl") as journal:
        journal.append({"type": "evaluation", "evaluation": failed.to_json()})
    storage = f"journal:{tmp_path}/study"
    receipt = export_study(RunFolder(folder), storage)
    assert receipt.num_failed == 1
    with opened(storage, "run") as study:
        (trial,) = study.get_trials(states=[optuna.trial.TrialState.FAIL])
        assert trial.user_attrs["error"] == "ValueError: bad layer"
        assert trial.user_attrs["num_sequences"] == 0
        assert "1 of them failed" in succeed("export-study", folder, "--storage", storage)
    assert failed in read_study(storage).evaluations


def test_two_objectives(run, tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    succeed("export-study", run, "--storage", storage, "--name", "front", "--multi")
    with opened(storage, "front") as study:
        assert study.metric_names == ["loss (nats per token)", "bytes"]
        front = study.best_trials
        assert 0 < len(front) < len(study.trials)
        for trial in study.trials:
            assert trial.values[1] == trial.user_attrs["bytes"]
            assert BYTES not in trial.params
    said = refusal(run, "--storage", storage, "--name", "front")
    assert "'front' was exported with --multi" in said


# Optuna's own tools on it

PLOTS = ("plot_optimization_history", "plot_param_importances", "plot_slice", "plot_contour")


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("library", ["matplotlib", "plotly"])
def test_optunas_plots(library, plot, study):
    pytest.importorskip(library, reason=f"{library} is not installed")
    some = {"params": list(study.trials[0].params)[:3]} if plot == "plot_contour" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if library == "plotly":
            figure = getattr(optuna.visualization, plot)(study, **some)
            assert all(len(trace.to_plotly_json()) > 1 for trace in figure.data)
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        getattr(optuna.visualization.matplotlib, plot)(study, **some)
        figure = plt.gcf()
        drawn = [axes for axes in figure.axes if axes.has_data()]
        plt.close("all")
    assert drawn


def test_importances_tell_parameters_apart(study):
    found = optuna.importance.get_param_importances(study)
    assert found.keys() == study.trials[0].params.keys()
    assert sum(found.values()) == pytest.approx(1)
    assert len(set(found.values())) > 2


def test_pareto_front(run, tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    storage = f"journal:{tmp_path}/study"
    export_study(RunFolder(run), storage, multi=True)
    with opened(storage, "run") as study:
        figure = optuna.visualization.plot_pareto_front(study)
        assert sum(len(trace.x) for trace in figure.data) == len(study.trials)


# What is refused

ADDRESSES = {
    "a plain file": ("{}/study.db", "is not a storage: expected sqlite:///FILE"),
    "an unknown scheme": ("nosql://{}/study", "nosql:// leads to no storage"),
    "half a URL": ("://{}", ":// leads to no storage"),
    "memory": ("sqlite://", "sqlite:// keeps nothing"),
    "a folder that is not there": ("sqlite:///{}/none/study.db", "unable to open database file"),
    "the same of a journal": ("journal:{}/none/study", "No such file or directory"),
    "a folder": ("journal:{}", "Is a directory"),
    "no server": ("postgresql+pg8000://u:hidden@127.0.0.1:1/x", "the driver of postgresql+pg8000"),
}


@pytest.mark.parametrize("mistake", ADDRESSES)
def test_addresses_that_lead_nowhere(mistake, run, tmp_path):
    address, expected = ADDRESSES[mistake]
    said = refusal(run, "--storage", address.format(tmp_path))
    assert expected in said
    assert "hidden" not in said
    assert not list(tmp_path.iterdir())


def test_files_of_something_else_are_refused_and_left_alone(run, tmp_path):
    other = tmp_path / "other.log"
    for content, expected in (
        (b"hello\nworld\n", "is not a journal of Optuna's"),
        (b'{"a": 1}\n{"b": 2}\n', "is not a journal of Optuna's"),
        (b"\xff\xfe\n\xff\n", "is not a journal of Optuna's"),
        (b'{"op_code": 0, "worker', "ends in half a line"),
    ):
        other.write_bytes(content)
        assert expected in refusal(run, "--storage", other)
        assert other.read_bytes() == content
        assert "file is not a database" in refusal(run, "--storage", f"sqlite:///{other}")
        assert other.read_bytes() == content


def test_a_torn_study_is_not_written_to(run, tmp_path):
    file = tmp_path / "study.log"
    export_study(RunFolder(run), str(file))
    whole = file.read_bytes()
    for cut in (1, 7, 200):
        file.write_bytes(whole[:-cut])
        assert "ends in half a line" in refusal(run, "--storage", file)
        assert file.read_bytes() == whole[:-cut]


def test_a_study_of_another_run_is_refused(run, tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    export_study(RunFolder(run), storage, "mine")
    other = copy(run, tmp_path / "other")
    lines = (other / "journal.jsonl").read_bytes().splitlines(keepends=True)
    header = json.loads(lines[0][9:])
    header["config"]["search"]["seed"] = 1
    (other / "journal.jsonl").unlink()
    with Journal.create(other / "journal.jsonl", header) as journal:
        journal.append_many(records(run))
    said = refusal(other, "--storage", storage, "--name", "mine")
    assert "the study 'mine' holds something else: choose another with --name" in said
    with opened(storage, "mine") as study:
        assert len(study.trials) == len({e.assignment for e in evaluations(run)})


def test_a_study_of_somebody_else_is_refused(run, tmp_path):
    file = tmp_path / "study.log"
    kept = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    theirs = optuna.create_study(storage=kept, study_name="run")
    theirs.add_trial(optuna.trial.create_trial(value=1.0))
    assert "'run' holds something else" in refusal(run, "--storage", file)
    assert len(theirs.trials) == 1


def test_runs_that_have_nothing_to_export(run, tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    assert "no run 'none'" in refusal("none", "--runs", tmp_path, "--storage", storage)
    kinds = [r["type"] for r in records(run)]
    early = copy(run, tmp_path / "run", kinds.index("evaluation"))
    assert "has measured no assignment yet" in refusal(early, "--storage", storage)
    (early / "journal.jsonl").write_bytes(b"")
    assert "holds no whole header" in refusal(early, "--storage", storage)


# A server


@pytest.mark.slow
@pytest.mark.skipif(missing() != "", reason=missing() or "-")
def test_postgresql(run):
    with postgres_server() as storage:
        first = json.loads(succeed("export-study", run, "--storage", storage, "--json"))
        again = json.loads(succeed("export-study", run, "--storage", storage, "--json"))
        distinct = dict.fromkeys(e.assignment for e in evaluations(run))
        assert (first["num_added"], first["num_present"]) == (len(distinct), 0)
        assert (again["num_added"], again["num_present"]) == (0, len(distinct))
        assert again["num_outdated"] == 0
        assert PASSWORD not in json.dumps(first)
        assert "***" in first["storage"]
        with opened(storage.replace("{", "{{").replace("}", "}}"), "run") as study:
            found = [tuple(json.loads(t.user_attrs["assignment"])) for t in study.trials]
            assert found == list(distinct)
            assert study.trials[0].params[BYTES] == study.trials[0].user_attrs["bytes"]
        assert read_study(storage).evaluations == read_study(f"{storage}#run").evaluations
        assert set(read_study(storage).evaluations) == set(evaluations(run))
        wrong = storage.replace("tester:", "tester:wrong")
        said = refusal(run, "--storage", wrong)
        assert "password authentication failed" in said
        assert "wrong" not in said
        missing_table = storage.replace("/postgres", "/template1")
        with pytest.raises(ValueError, match="cannot use the storage"):
            read_study(missing_table)
