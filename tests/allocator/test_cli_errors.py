"""Users' mistakes and bad luck: one sentence, exit code 2, no traceback, nothing lost."""

import json
import os
import shutil

import pytest
from cli_runs import MODEL, TEXT, allocator, load, records, search, search_arguments
from safetensors.torch import load_file, save_file

from allocator.plan import load_plan


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, which no mistake may change."""
    return search(tmp_path_factory.mktemp("runs"), trials=4)


def content(folder):
    """Every file of a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(*words):
    """The one sentence with which a command is refused."""
    result = allocator(*words)
    return sentence(result.code, result.err)


def sentence(code, err):
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len([line for line in lines if line.startswith("error: ")]) == 1, err
    assert lines[-1].startswith("error: ")
    return lines[-1].removeprefix("error: ")


SEARCHES = {
    "no model": ({"model": "no/such/folder"}, "no model 'no/such/folder'"),
    "a file as model": ({"model": TEXT}, "expected the folder of a model"),
    "an empty folder as model": ({"model": TEXT.parent}, "config.json"),
    "a typo in the preset": ({"space": "bist"}, "did you mean 'bits'?"),
    "no space file": ({"space": "mine.yaml"}, "cannot read the space file mine.yaml"),
    "no budget word": ({"budget": "small"}, "'small' is not a budget; write 90MB"),
    "a zero budget": ({"budget": "0bpw"}, "is zero"),
    "an empty budget": ({"budget": ","}, "expected a budget"),
    "a budget below the floor": ({"budget": "2bpw"}, "cannot be met"),
    "a second budget below the floor": ({"budget": "3bpw,2bpw"}, "cannot be met"),
    "fewer bytes than the header": ({"budget": "10"}, "cannot be met"),
    "a typo in the search": ({"search": "tep"}, "did you mean 'tpe'?"),
    "a typo in the scorer": ({"scorer": "fischer"}, "did you mean 'fisher'?"),
    "a typo in the executor": ({"executor": "rya"}, "did you mean 'ray'?"),
    "a typo in the ties": ({"ties": "vlm"}, "did you mean 'vllm'?"),
    "a typo in what is opened": ({"open": ["haed"]}, "head"),
    "a device map beside a device": ({"device_map": "auto"}, "or the device 'cpu', not both"),
    "a device map of no kind": ({"device_map": "evenly", "device": None}, "got 'evenly'"),
    "a device map that is no JSON": ({"device_map": '{"model"'}, "--device-map: expected devices"),
    "workers without ray": ({"workers": 2}, "add --executor ray"),
    "more workers than the window": (
        {"executor": "ray", "workers": 4, "window": 4},
        "need --window 8",
    ),
    "a pin without a label": ({"pin": ["*.o_proj"]}, "--pin expects GLOB=LABEL"),
    "a pin with an unknown label": ({"pin": ["*.o_proj=int7-g64"]}, "int7-g64"),
    "a pin that matches nothing": ({"pin": ["*.o_prj=int8-g64"]}, "*.o_prj"),
    "an exclusion that matches nothing": ({"exclude": ["*.o_prj"]}, "*.o_prj"),
    "everything excluded": ({"exclude": ["*"]}, "no units"),
    "a bad duration": ({"time": "soon"}, "'soon' is not a duration"),
    "a zero duration": ({"time": "0s"}, "not a duration"),
    "no trials": ({"trials": 0}, "--trials"),
    "negative tokens": ({"tokens": -5}, "--tokens"),
    "too few tokens": ({"tokens": 3000}, "the cap of 3,000 tokens leaves"),
    "a bad objective": ({"objective": "mse"}, "--objective"),
    "a bad dtype": ({"dtype": "float8"}, "--dtype"),
    "a bad device": ({"device": "gpu"}, "expected the device auto, cpu, cuda or cuda:N"),
    "a device that is not there": ({"device": "cuda:99"}, "no device 'cuda:99'"),
    "a negative seed": ({"data_seed": -1}, "--data-seed"),
    "a negative search seed": ({"seed": -1}, "--seed"),
    "one token": ({"sequence_length": 1}, "--sequence-length"),
    "no text": ({"text": "nowhere.txt"}, "no such text file or folder: 'nowhere.txt'"),
    "text of a strange kind": ({"text": MODEL / "config.json"}, "config.json"),
    "too much asked of the text": ({"num_search": 100_000}, "too short"),
    "no statistics": ({"num_statistics": 0}, "--num-statistics"),
    "a name that leads elsewhere": ({"name": "../run"}, "is not a run name"),
}


@pytest.mark.parametrize("mistake", SEARCHES)
def test_a_search_that_cannot_be_is_refused_before_it_leaves_anything(mistake, tmp_path):
    options, expected = SEARCHES[mistake]
    said = refusal(*search_arguments(**{"runs": tmp_path / "runs", "name": "run"} | options))
    assert expected in said
    if mistake != "too few tokens":  # which shows once the statistics are known
        assert not (tmp_path / "runs").exists()


def test_budget_below_the_floor_says_what_can_be_had():
    said = refusal(*search_arguments(budget="100kB"))
    least, most = 583_000, 2_500_000
    numbers = [
        int(word.replace(",", "")) for word in said.split() if word.replace(",", "").isdigit()
    ]
    assert any(abs(number - least) < 20_000 for number in numbers), said
    assert any(abs(number - most) < 30_000 for number in numbers), said
    assert "2.2" in said
    assert "16 bits per searched weight" in said


def test_text_that_is_empty_or_too_short_is_refused_with_the_numbers(tmp_path):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("\n \n")
    short.write_text("She was clever.\n\nHe was not.\n")
    assert "holds no text" in refusal(*search_arguments(text=empty, runs=tmp_path))
    said = refusal(*search_arguments(text=short, runs=tmp_path))
    assert "too short" in said
    assert str((4 + 8 + 4 + 4) * 128) in said
    assert "statistics 0 of 512" in said


def test_unknown_words_of_the_other_verbs(run, tmp_path):
    before = content(run)
    assert "did you mean 'torchao'?" in refusal(
        "export", run, "--to", "torcha", "-o", tmp_path / "x"
    )
    assert "did you mean 'solvers'?" in refusal("list", "solver")
    assert "did you mean 'dynamic'?" in refusal(
        "solve", run, "--budget", "3bpw", "--solver", "dynamc"
    )
    assert "it has correlated_blend" in refusal(
        "solve", run, "--budget", "3bpw", "--scorer", "hessian"
    )
    assert "cannot be met" in refusal("solve", run, "--budget", "1bpw")
    assert "runs there: run" in refusal("resume", "rnu", "--runs", run.parent)
    assert "no run 'nothing'" in refusal("report", "nothing", "--runs", tmp_path)
    assert "did you mean 'ray'?" in refusal("resume", run, "--executor", "rya")
    assert "not a duration" in refusal("resume", run, "--time", "x")
    assert "--schema" in refusal("show")
    assert "nothing.json" in refusal("show", tmp_path / "nothing.json")
    assert "--dtype" in refusal("apply", MODEL, run, "-o", tmp_path / "x", "--dtype", "int8")
    assert content(run) == before
    assert not (tmp_path / "x").exists()


def test_a_second_run_of_the_same_name_is_refused(run):
    before = content(run)
    said = refusal(*search_arguments(runs=run.parent, name="run", budget="3bpw"))
    assert "already holds a run" in said
    assert f"allocator resume {run}" in said
    assert content(run) == before


def test_plans_that_are_wrong_are_refused(run, tmp_path):
    good = load(run / "plan.json")
    cases = {
        "field": ({**good, "colour": "blue"}, "colour"),
        "version": ({**good, "schema_version": 99}, "schema_version"),
        "operator": (
            {**good, "units": [{**good["units"][0], "operator": {"name": "magic"}}]},
            "magic",
        ),
    }
    for name, (data, expected) in cases.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        assert expected in refusal("show", path)
    (tmp_path / "text.json").write_text("no plan")
    refusal("show", tmp_path / "text.json")


@pytest.mark.parametrize(
    ("words", "wrong", "help_of"),
    [
        (["search"], "Missing argument", "allocator search"),
        (["search", MODEL], "--budget", "allocator search"),
        (["search", MODEL, "--bugdet", "3bpw"], "--budget", "allocator search"),
        (["search", MODEL, "--budget", "3bpw", "--trials", "x"], "--trials", "allocator search"),
        (["serch"], "serch", "allocator"),
    ],
)
def test_words_that_cannot_be_parsed_take_one_sentence_too(words, wrong, help_of):
    said = refusal(*words)
    assert wrong in said
    assert said.endswith(f"see '{help_of} --help'")


def test_a_command_without_words_shows_its_help():
    result = allocator()
    assert result.code == 2
    assert "Usage: " in result.out + result.err
    assert "error" not in result.err


def test_plans_are_found_by_the_names_of_their_runs(run, tmp_path):
    place = ["--runs", run.parent]
    assert json.loads(allocator("show", run.name, "--json", *place).out) == load(run / "plan.json")
    export = allocator("export", run.name, "--to", "evopress", "-o", tmp_path / "x", *place)
    assert export.code == 0, export.err
    assert "nothing" in refusal("show", "nothing", *place)


# Bad luck


def test_a_read_only_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    said = refusal(*search_arguments(runs=tmp_path / "file", name="run"))
    assert "cannot create the run folder" in said
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        refusal(*search_arguments(runs=tmp_path / "locked", name="run"))


@pytest.mark.parametrize("limit", [20_000, 60_000, 100_000])
def test_a_full_disk_ends_the_run_and_loses_nothing(spawn, limit, tmp_path):
    """Files may not grow beyond a limit, as on a full disk: in the first file, in the journal."""
    log = tmp_path / "log.txt"
    words = search_arguments(runs=tmp_path, name="run", top_k=1)
    process = spawn(*words, log=log, largest_file=limit)
    process.join(120)
    said = sentence(process.exitcode, log.read_text())
    assert "File too large" in said or "cannot write" in said
    folder = tmp_path / "run"
    if limit == 20_000:  # not even the tokens fit
        assert not (folder / "config.yaml").exists()
        return
    kept = len(records(folder))
    assert kept > 100
    done = allocator("resume", folder)
    assert done.code == 0, done.err
    plan = load_plan(folder / "plan.json")
    assert plan.search.num_evaluations == 12
    cells = [(r["scorer"], r["unit"], r["option"]) for r in records(folder, "cell")]
    assert len(set(cells)) == len(cells)


def test_a_model_with_nan_weights_is_refused(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    said = refusal(*search_arguments(model=tmp_path / "model", runs=tmp_path, name="run"))
    assert "not finite" in said
