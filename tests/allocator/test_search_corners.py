"""Searches at the corners of what a user may ask: nothing to lose, everything known, odd menus."""

import pytest
from cli_runs import MODEL, allocator, load, measured_keys, records, search, search_arguments

SMALL = {"sequence_length": 32, "num_search": 4}


@pytest.mark.parametrize(
    ("objective", "pin"), [("hidden_state", None), ("hidden_state", "*=keep"), ("kl", "*=keep")]
)
def test_a_budget_at_which_nothing_is_lost(objective, pin, tmp_path):
    """The reference then loses exactly nothing, and no ratio to it means anything."""
    options = {"objective": objective, "dtype": "bfloat16", "budget": "100%", "pin": pin}
    run = search(tmp_path, **SMALL, sequences=None, trials=30, **options)
    plan = load(run / "plan.json")
    assert plan["achieved_bytes"] <= plan["budget_bytes"]
    assert plan["search_nats"]["returned"]["nats"] == pytest.approx(0, abs=1e-6)


def test_measurements_all_but_exact(tmp_path):
    option = "sampling.spreads.noise=0.001"
    options = {"no_slopes": True, "search_option": option, "trials": 60, "budget": "3bpw"}
    search(tmp_path, **SMALL, sequences=1, **options)
    words = search_arguments(runs=tmp_path, name="x", search_option=option.replace("0.001", "1e-9"))
    refused = allocator(*words)
    assert refused.code == 2
    assert "noise must be at least 0.001" in refused.err


@pytest.mark.parametrize("method", ["evolution", "evolution,random", "random,evolution,tpe"])
def test_what_is_known_does_not_end_a_warm_start(method, tmp_path):
    """All that the searches would ask first was measured by the run they start from."""
    for name, kind in (("first", "evolution"), ("second", "random")):
        search(tmp_path, name, search=kind, trials=40, **SMALL)
    for source in ("first", "second"):
        run = search(
            tmp_path, f"from-{source}", search=method, trials=20, warm_start=source, **SMALL
        )
        (ended,) = records(run, "searched")
        assert ended["told"] == 20
        assert any('"search"' in key for key in measured_keys(run))


def test_caches_of_one_group_with_menus_of_different_length(tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text(
        "name: kvmix\nmenu: kv\nkv: true\nmenus:\n"
        "  - units: '*.layers.0.*'\n"
        "    menu: [{name: kv_quantize, key_bits: 4, value_bits: 4},"
        " {name: kv_quantize, key_bits: 8, value_bits: 8}]\n"
    )
    options = {"budget": "2.9MB", "context": 512, "search_option": "num_groups=1"}
    run = search(tmp_path, space=space, search="optspa", trials=12, **SMALL, **options)
    plan = load(run / "plan.json")
    assert plan["achieved_bytes"] <= plan["budget_bytes"]


def test_the_importances_of_a_formula_are_in_the_accounts(tmp_path):
    for name in ("first", "second"):  # the second finds the loss tables in the store
        run = search(tmp_path, name, search="formula", trials=6, **SMALL)
        spent = [r for r in records(run, "tokens") if r["purpose"] == "importances"]
        assert [r["counts"] for r in spent] == [{"statistics": 4 * 32}]
        assert load(run / "plan.json")["tokens"]["statistics"] >= 4 * 32


def test_optspa_speaks_of_the_same_ratios_alone_and_in_company(tmp_path, monkeypatch):
    from allocator.searches.optspa import GroupSpace

    seen, original = [], GroupSpace.from_setting

    def spy(setting, options):
        found = original(setting, options)
        seen.append([row.tolist() for row in found.removed])
        return found

    monkeypatch.setattr(GroupSpace, "from_setting", spy)
    for method in ("optspa", "formula,optspa"):
        search(
            tmp_path, name=method.replace(",", "-"), search=method, space="sparsity", budget="50%",
            trials=4, **SMALL,
        )  # fmt: skip
    assert seen[0] == seen[-1]
    assert any(0.5 in row for row in seen[0])


def test_the_default_cap_reads_six_hundred_sequences(tmp_path):
    run = search(tmp_path, trials=None, sequences=1000, search="random", **SMALL)
    (ended,) = records(run, "searched")
    assert ended["told"] == 600 // 4
    words = ("--search", "evolution", "--search-option", "schedule=published")
    batches = ("--search-option", "kind=bits", "--search-option", "num_batches=-5")
    refused = allocator("search", MODEL, "--budget", "3bpw", *words, *batches, "--runs", tmp_path)
    assert refused.code == 2
    assert "num_batches: expected at least 1, got -5" in refused.err
