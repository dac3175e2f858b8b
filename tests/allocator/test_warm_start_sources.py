"""What carries over from an earlier run or study: losses where they mean the same, else starts."""

import shutil
from pathlib import Path

import optuna
import pytest
from cli_runs import MODEL, records, search

from allocator.config import SpaceConfig
from allocator.journal import Journal, read_journal
from allocator.run_folder import RunFolder, load_space
from allocator.session import price_space
from allocator.study import export_study
from allocator.warm_start import read_warm_start
from objectives.evaluation import Evaluation, Fidelity


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, which nobody changes."""
    return search(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def space(run):
    return load_space(run / "space.json")


@pytest.fixture(scope="module")
def header(run):
    return read_journal(run / "journal.jsonl").header


@pytest.fixture(scope="module")
def study(run, tmp_path_factory):
    """The address of the run as a study, to be read only."""
    address = f"journal:{tmp_path_factory.mktemp('studies')}/study"
    export_study(RunFolder(run), address)
    return address


def evaluations(folder, split):
    found = [Evaluation.from_json(r["evaluation"]) for r in records(folder, "evaluation")]
    return [e for e in found if e.fidelity.split == split]


def changed(header, *path, value="another"):
    """The header of another run, with one field different."""
    *outer, last = path
    copy = new = dict(header)
    for name in outer:
        new[name] = dict(new[name])
        new = new[name]
    new[last] = value
    return copy


def read(source, space, header, runs="nowhere"):
    return read_warm_start(str(source), space, header, runs=Path(runs))


# Losses


def test_the_same_model_text_and_space_take_over_every_loss(run, space, header):
    found = read(run, space, header)
    assert found.differs == ()
    assert found.evaluations == tuple(evaluations(run, "search"))
    assert read(run.name, space, header, run.parent) == found
    assert sorted(found.starts) == sorted({e.assignment for e in found.evaluations})


def test_starts_come_best_first(run, space, header, study):
    found = read(run, space, header)
    with_optuna = optuna.load_study(
        study_name="run",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(study.removeprefix("journal:"))
        ),
    )
    assert (
        str(list(found.starts[0])).replace(" ", "")
        == (with_optuna.best_trial.user_attrs["assignment"])
    )
    dense_like = [space.bytes(start) for start in found.starts]
    assert found.starts[-1] != found.starts[0]
    assert min(dense_like) == space.bytes(found.starts[-1])  # the cheapest, uniform, is the worst


def test_a_study_tells_what_its_run_tells(run, space, header, study):
    ours, theirs = read(run, space, header), read(study, space, header)
    assert (theirs.starts, theirs.differs) == (ours.starts, ())
    assert set(theirs.evaluations) == set(ours.evaluations)
    assert len(theirs.evaluations) == len(ours.evaluations)
    assert read(f"{study}#run", space, header) == theirs


def test_guard_and_heldout_losses_stay_behind(run, space, header, study):
    assert evaluations(run, "guard")
    assert evaluations(run, "heldout")
    for source in (run, study):
        found = read(source, space, header).evaluations
        assert {e.fidelity.split for e in found} == {"search"}


CONDITIONS = {
    "weights": ("model", "weights_sha256"),
    "search text": ("calibration", "search"),
    "objective": ("config", "measure", "objective"),
    "dtype": ("config", "measure", "dtype"),
    "top_k": ("config", "measure", "top_k"),
    "a setting of tomorrow": ("config", "measure", "a setting of tomorrow"),
}


@pytest.mark.parametrize("from_study", [False, True])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_under_other_conditions_only_starts_carry_over(
    condition, from_study, run, space, header, study
):
    other = changed(header, *CONDITIONS[condition])
    found = read(study if from_study else run, space, other)
    assert found.differs == (condition,)
    assert found.evaluations == ()
    assert found.starts == read(run, space, header).starts


@pytest.mark.parametrize("setting", ["batch_size", "device", "threads"])
def test_settings_of_speed_do_not_matter(setting, run, space, header):
    assert read(run, space, changed(header, "config", "measure", setting)).differs == ()


def test_text_of_the_statistics_matters_where_options_are_made_from_it(run, space, header):
    other = changed(header, "calibration", "statistics")
    assert read(run, space, other).differs == ()
    needy = price_space(str(MODEL), SpaceConfig(space="sparsity"))
    assert needy.needs
    with pytest.raises(ValueError, match="nothing in"):
        read(run, needy, other)


def test_failed_measurements_stay_behind(run, space, header, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    dense = tuple(len(menu) - 1 for menu in space.menus)
    failed = Evaluation(dense, Fidelity("search", 0, 4), error="MemoryError: too small")
    with Journal.open(folder / "journal.jsonl") as journal:
        journal.append({"type": "evaluation", "evaluation": failed.to_json()})
    address = f"sqlite:///{tmp_path}/study.db"
    export_study(RunFolder(folder), address)
    for source in (folder, address):
        assert dense not in read(source, space, header).starts
        assert dense not in {e.assignment for e in read(source, space, header).evaluations}


# Starts in another space


@pytest.mark.parametrize("from_study", [False, True])
def test_assignments_are_told_in_options_of_the_new_space(from_study, run, space, header, study):
    pinned = price_space(
        str(MODEL),
        SpaceConfig(
            bar_keep=True, exclude=("*.layers.0.*",), pins=(("*.layers.1.*o_proj", "int2-g64"),)
        ),
    )
    found = read(study if from_study else run, pinned, {**header, "space": pinned.sha256})
    assert found.differs == ("space",)
    assert found.evaluations == ()
    old = {unit.name: index for index, unit in enumerate(space.units)}
    labels = {
        tuple(
            space.menus[old[unit.name]][assignment[old[unit.name]]].operator.label
            for unit in pinned.units
        )
        for assignment in read(run, space, header).starts
    }
    told = {
        tuple(menu[i].operator.label for menu, i in zip(pinned.menus, start, strict=True))
        for start in found.starts
    }
    assert told < labels
    offered = [{option.operator.label for option in menu} for menu in pinned.menus]
    fitting = {
        row for row in labels if all(word in menu for word, menu in zip(row, offered, strict=True))
    }
    assert told == fitting
    for start in found.starts:
        pinned.check(start)


def test_a_space_that_shares_nothing_is_refused(run, space, header):
    wide = price_space(str(MODEL), SpaceConfig(open_units=("embeddings",)))
    with pytest.raises(ValueError, match=r"no choice for .*embed_tokens and 0 more of the new run"):
        read(run, wide, header)
    pinned = price_space(str(MODEL), SpaceConfig(pins=(("*", "int8-g64"),)))
    with pytest.raises(ValueError, match="an option that the new space does not offer"):
        read(run, pinned, header)


# Sources that are none


def test_sources_that_are_not_there(run, space, header, study, tmp_path):
    for source, expected in {
        "none": "no run 'none' here or in nowhere; a study is given as STORAGE#STUDY",
        f"journal:{tmp_path}/none": "there is no such file",
        f"sqlite:///{tmp_path}/none.db": "there is no file",
        f"{study}#other": "no study 'other' in .*; studies there: run",
    }.items():
        with pytest.raises(ValueError, match=expected):
            read(source, space, header)
    assert not list(tmp_path.iterdir())


def test_several_studies_must_be_told_apart(run, space, header, tmp_path):
    address = f"sqlite:///{tmp_path}/study.db"
    for name in ("one", "two"):
        export_study(RunFolder(run), address, name, multi=name == "two")
    with pytest.raises(ValueError, match=r"holds 2 studies: .* out of one, two"):
        read(address, space, header)
    assert read(f"{address}#one", space, header) == read(f"{address}#two", space, header)


def test_studies_of_other_programs(run, space, header, tmp_path):
    file = tmp_path / "study.log"
    kept = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    optuna.create_study(storage=kept, study_name="theirs").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    with pytest.raises(ValueError, match="is no whole export of a run"):
        read(file, space, header)
    export_study(RunFolder(run), str(file))
    mixed = optuna.load_study(storage=kept, study_name="run")
    mixed.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"assignment": "mine"}))
    expected = set(read(run, space, header).evaluations)
    assert set(read(f"{file}#run", space, header).evaluations) == expected
