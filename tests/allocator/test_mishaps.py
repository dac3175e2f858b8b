"""What goes wrong around a run leaves it usable: refused changes, damaged caches, wrong models."""

import json
import shutil
import signal
import time
from importlib.metadata import version

import numpy as np
import pytest
from cli_runs import MODEL, TEXT, allocator, records, search_arguments, start, succeed

from allocator.config import load_config
from allocator.plan import load_plan
from allocator.run_folder import RunFolder
from allocator.session import default_name
from allocator.study_storage import without_password


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run in a runs folder of its own."""
    runs = tmp_path_factory.mktemp("runs")
    succeed(*search_arguments(runs=runs, name="run"))
    return runs / "run"


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it."""
    copied = tmp_path / "runs" / "run"
    shutil.copytree(finished.parent, copied.parent)
    return copied


def refused(*words):
    """The one sentence of a refusal."""
    found = allocator(*words)
    assert found.code == 2, found
    assert "Traceback" not in found.err
    return found.err


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--trials", 2, "12 trials already: expected --trials of at least that, got 2"),
        ("--tokens", 10, "the cap of 10 tokens leaves 0 for the search"),
        ("--tokens", 6000, "for the search, which has read"),
    ],
)
def test_a_refused_resume_changes_nothing(folder, option, value, sentence):
    config, plan = load_config(folder / "config.yaml"), (folder / "plan.json").read_bytes()
    before = len(records(folder))
    assert sentence in refused("resume", folder, option, value)
    assert load_config(folder / "config.yaml") == config
    assert len(records(folder)) == before
    succeed("report", folder)
    assert (folder / "plan.json").read_bytes() == plan
    succeed("resume", folder, "--trials", 14)


def test_a_longer_search_returns_nothing_worse_on_the_guards_text(folder):
    """What an earlier session ended with stays a candidate, whatever the search thinks later."""

    def guard():
        return load_plan(folder / "plan.json").guard_nats

    before, seen = guard(), []
    for trials in (13, 14, 16, 18, 20):
        succeed("resume", folder, "--trials", trials)
        now = guard()
        seen.append(now["search"].nats)
        assert now["search"].nats <= before["search"].nats
        assert now["returned"].nats <= before["returned"].nats
        before = now
    plan = (folder / "plan.json").read_bytes()
    succeed("report", folder)
    assert (folder / "plan.json").read_bytes() == plan


@pytest.mark.parametrize("empty", [True, False])
def test_a_run_that_lost_its_journal_is_not_started_over(folder, empty):
    (folder / "journal.jsonl").unlink()
    if empty:
        (folder / "journal.jsonl").touch()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "its journal journal.jsonl" in refused("resume", folder, "--trials", 14)
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_run_without_a_plan_says_what_to_do(folder, tmp_path):
    (folder / "plan.json").unlink()
    for words in (
        ("show", folder),
        ("solve", folder, "--budget", "3bpw"),
        ("pick", folder, "--budget", "3bpw"),
        ("export", folder, "--to", "torchao", "-o", tmp_path / "out"),
    ):
        assert f"'allocator resume {folder}' continues" in refused(*words)
    succeed("report", folder)
    succeed("show", folder)


def test_a_second_profile_adds_to_the_first(tmp_path):
    words = ("--text", TEXT, "--sequence-length", 64, "--num-statistics", 2, "--name", "p")
    where = (*words, "--device", "cpu", "--dtype", "float32", "--threads", 1, "--runs", tmp_path)
    for scorer in ("fisher,blend", "magnitude"):
        succeed("profile", MODEL, "--scorer", scorer, *where)
    with np.load(tmp_path / "p" / "losses.npz") as file:
        found = {name.partition(":")[0] for name in file.files}
    assert found == {"fisher", "blend", "magnitude"}


def test_a_refused_budget_leaves_no_folder(folder, tmp_path):
    new = tmp_path / "new"
    assert "cannot be met" in refused("solve", folder, "--budget", "3bpw,1bpw", "-o", new)
    assert not new.exists()


def test_packed_weights_are_not_overwritten(folder, tmp_path):
    succeed("apply", MODEL, folder, "-o", tmp_path / "out", "--packed")
    path = tmp_path / "out" / "model.packed.safetensors"
    before = path.stat()
    assert before.st_mode & 0o777 == (folder / "plan.json").stat().st_mode & 0o777
    assert "exists already" in refused("apply", MODEL, folder, "-o", tmp_path / "out", "--packed")
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_the_version_is_printed():
    assert succeed("--version").strip() == version("model-allocator")


def test_a_run_is_resumed_from_another_folder(tmp_path, monkeypatch):
    model = tmp_path / "here" / "model"
    shutil.copytree(MODEL, model)
    monkeypatch.chdir(model.parent)
    succeed(*search_arguments("model", runs=tmp_path / "runs", name="run"))
    folder = tmp_path / "runs" / "run"
    shutil.rmtree(folder / "cache")  # so that the model is read again
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    before = len(records(folder))
    succeed("resume", folder, "--trials", 14)
    assert len(records(folder)) > before


def test_a_model_whose_configuration_changed_is_refused(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    succeed(*search_arguments(model, runs=tmp_path, name="run"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert "has changed since the run was started" in refused(
        "resume", tmp_path / "run", "--trials", 14
    )


def test_a_streamed_profile_keeps_off_a_run(folder):
    words = ["profile", MODEL, "--stream", "--text", TEXT, "--sequence-length", 128]
    before = (folder / "space.json").read_bytes()
    sentence = refused(*words, "--runs", folder.parent, "--name", "run", "--space", "sparsity")
    assert "holds a run: choose another folder with --name" in sentence
    assert (folder / "space.json").read_bytes() == before


@pytest.mark.parametrize("option", [{"warm_start": "nowhere"}, {"search": "tpe,tpe"}])
def test_a_mistake_does_not_use_up_the_name(tmp_path, option):
    wrong = search_arguments(runs=tmp_path, name="run", **option)
    refused(*wrong)
    assert not RunFolder(tmp_path / "run").begun
    succeed(*search_arguments(runs=tmp_path, name="run"))


def test_a_run_that_ended_before_its_warm_start_was_recorded_takes_it_up(folder):
    options = search_arguments(runs=folder.parent, name="warm", warm_start="run", seed=1)
    succeed(*options)
    warm = folder.parent / "warm"
    lines = (warm / "journal.jsonl").read_bytes().splitlines(keepends=True)
    whole = [record["type"] for record in records(warm)]
    assert whole[0] == "warm_start"
    (warm / "journal.jsonl").write_bytes(lines[0])
    succeed("resume", warm)
    assert records(warm)[0]["type"] == "warm_start"


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", None])
def test_damaged_caches_are_made_again(folder, damage):
    for path in [*folder.parent.glob("losses/*.npz"), *folder.glob("cache/teacher-*.safetensors")]:
        path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    succeed(*search_arguments(runs=folder.parent, name="other", budget="3bpw"))
    succeed("resume", folder, "--trials", 14)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"garbage", None])
def test_damaged_loss_tables_are_written_again_by_report(folder, damage):
    path = folder / "losses.npz"
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    sentence = refused("solve", folder, "--budget", "3bpw")
    assert "losses.npz" in sentence
    assert "'allocator report' of the run writes them again" in sentence
    succeed("report", folder)
    succeed("solve", folder, "--budget", "3bpw")


def test_statistics_that_are_gone_are_made_again_by_resume(tmp_path):
    succeed(*search_arguments(runs=tmp_path, name="run", space="sparsity", budget="9bpw"))
    run = tmp_path / "run"
    before = np.frombuffer((run / "plan.json").read_bytes(), np.uint8)
    shutil.rmtree(run / "cache")
    assert "'allocator resume' of the run makes them again" in refused(
        "apply", MODEL, run, "-o", tmp_path / "out"
    )
    succeed("resume", run)
    assert np.array_equal(before, np.frombuffer((run / "plan.json").read_bytes(), np.uint8))
    succeed("apply", MODEL, run, "-o", tmp_path / "out")


def test_weights_of_another_model_are_not_exported(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    sentence = refused("export", folder, "--to", "evopress", "-o", tmp_path / "o", "--model", other)
    assert "config" in sentence


def test_sequences_longer_than_the_model_reads_are_refused(finished, tmp_path):
    config = json.loads((MODEL / "config.json").read_text())
    length = config["max_position_embeddings"] + 1
    expected = f"expected a --sequence-length of at most that, got {length}"
    assert expected in refused(*search_arguments(runs=tmp_path, name="run", sequence_length=length))
    assert not RunFolder(tmp_path / "run").begun
    assert expected in refused("evaluate", MODEL, finished, "--sequence-length", length)
    words = ("profile", MODEL, "--text", TEXT, "--sequence-length", length, "--runs", tmp_path)
    assert expected in refused(*words)
    assert expected in refused(*words, "--stream")


def test_names_of_runs_are_made_to_fit(tmp_path):
    assert default_name("a/model", "200 kB") == "model-200kB"
    long = default_name("m" * 80, "40%")
    assert len(long) == 64
    assert long.endswith("-40pct")
    succeed(*search_arguments(runs=tmp_path, budget="3 bpw"))
    assert (tmp_path / "tiny_llama-3bpw" / "plan.json").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["profile", MODEL, "--compare", "--text", TEXT], "--compare needs a --budget below"),
        (search_arguments(also="text.txt=0"), "--also: Input should be greater than 0"),
        (search_arguments(gpus_per_worker=2), "--gpus-per-worker is for Ray: add --executor ray"),
        (search_arguments(address="foo:1"), "--address is for Ray: add --executor ray"),
        (["show", MODEL], "is a model, not a plan: give --space"),
        (search_arguments(name="losses"), "'losses' holds the loss tables that runs share"),
        (search_arguments(budget="700,000"), "write bytes without commas"),
        (search_arguments(space="kv"), "say for how many tokens (--context)"),
    ],
)
def test_sentences_name_what_was_wrong(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(*words)


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    words = search_arguments(runs=tmp_path, name="run", trials=4000, search="random")
    with start(*words) as process:
        try:
            while not (tmp_path / "run" / "journal.jsonl").exists():
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "a run loses nothing, 'allocator resume RUN' continues it" in errors
    assert "Traceback" not in errors


def test_a_command_of_several_budgets_goes_on_where_it_was_killed(tmp_path):
    words = {"runs": tmp_path, "budget": "2.6bpw,3bpw,3.5bpw", "trials": 4, "name": "all"}
    succeed(*search_arguments(**words))
    folders = [tmp_path / f"all-{budget}" for budget in ("2.6bpw", "3bpw", "3.5bpw")]
    plans = [load_plan(folder / "plan.json") for folder in folders]
    journal = folders[1] / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-3]))
    (folders[1] / "plan.json").unlink()
    shutil.rmtree(folders[2])
    succeed(*search_arguments(**words))
    for folder, before in zip(folders, plans, strict=True):
        after = load_plan(folder / "plan.json")
        assert (after.units, after.search) == (before.units, before.search)
        assert after.heldout_nats == before.heldout_nats
    for change in ({"trials": 5}, {"dtype": "bfloat16"}, {"threads": 2}):
        assert "already holds a run" in refused(*search_arguments(**words | change))


def test_a_source_that_cannot_be_read_leaves_nothing_and_no_password(tmp_path):
    source = "postgresql://user:secret@localhost:1/none#study"
    said = refused(*search_arguments(runs=tmp_path, name="run", warm_start=source))
    assert "postgresql" in said
    assert "secret" not in said
    assert not (tmp_path / "run").exists()
    assert without_password(source) == "postgresql://user@localhost:1/none#study"
    assert without_password("runs/first") == "runs/first"
