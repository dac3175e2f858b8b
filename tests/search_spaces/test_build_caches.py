"""A model's cache in its search space: when it is searched, when it only counts, what names it."""

import itertools
import logging

import pytest
from tiny_models import tiny

from search_spaces.build import SpaceRequest, build_space
from search_spaces.models.kv_layers import KV_MENU
from search_spaces.operators import Keep, KVQuantize
from search_spaces.space import SearchSpace

CONTEXT = 128
CACHES = [f"model.layers.{i}.self_attn.cache" for i in (0, 1)]
DENSE = 2 * 2 * CONTEXT * 16 * 2  # keys and values, layers, tokens, channels, bytes
EIGHT = KVQuantize(8, 8)


@pytest.fixture
def searched(tmp_path):
    """Writes a space file that searches caches too; extra lines are added to it."""

    def write(*lines):
        path = tmp_path / "space.yaml"
        menu = "menu: [{name: round_to_nearest, bits: 4, group_size: 16}]"
        path.write_text("\n".join(["name: both", menu, "kv: true", *lines]))
        return str(path)

    return write


def space_of(space="bits", **request):
    return build_space(tiny("llama"), SpaceRequest(space, **{"context": CONTEXT, **request}))


def menus_of_caches(space):
    return {
        unit.name: [option.operator for option in menu]
        for unit, menu in zip(space.units, space.menus, strict=True)
        if unit.is_cache
    }


def test_a_context_only_counts_where_the_space_does_not_search_caches(caplog):
    with caplog.at_level(logging.WARNING):
        space, without = space_of(bar_keep=True), space_of(context=0, bar_keep=True)
    assert not [record for record in caplog.records if record.name.startswith("search_spaces")]
    assert menus_of_caches(space) == {name: [Keep()] for name in CACHES}
    assert space.units[:-2] == without.units
    assert space.overhead_bytes == without.overhead_bytes
    assert space.least_bytes - without.least_bytes == DENSE
    dearest = tuple(len(menu) - 1 for menu in space.menus)
    assert space.cache_bytes(dearest) == DENSE
    assert space.stored_bytes(dearest) - without.stored_bytes(dearest[:-2]) == DENSE
    assert SearchSpace.from_json(space.to_json()) == space


def test_a_batch_multiplies_and_the_space_searches_where_it_is_asked_to(searched):
    space = space_of(searched(), batch=3)
    assert set(menus_of_caches(space)) == set(CACHES)
    assert set(menus_of_caches(space)[CACHES[0]]) == set(KV_MENU)
    assert space.cache_bytes(tuple(len(menu) - 1 for menu in space.menus)) == 3 * DENSE


def test_a_space_can_bar_dense_caches(searched):
    space = space_of(searched("keep: false"))
    assert Keep() not in menus_of_caches(space)[CACHES[0]]


def test_keys_and_values_apart(searched):
    found = menus_of_caches(space_of(searched(), apart=True))
    assert list(found)[:2] == [
        "model.layers.0.self_attn.keys.cache",
        "model.layers.0.self_attn.values.cache",
    ]
    assert len(found) == 4


def test_pins_and_menus_go_to_the_sort_that_their_operators_are_for(searched):
    path = searched(
        "menus:",
        '  - {units: "*.layers.1.*", menu: [{name: kv_quantize, key_bits: 4, value_bits: 2}]}',
        "pins:",
        '  "*.layers.0.*": int4-g16',
    )
    space = space_of(path, pins=(("*.0.*.cache", "kv8-g64"), ("*.o_proj", "keep")))
    labels = {
        unit.name: [option.operator.label for option in menu]
        for unit, menu in zip(space.units, space.menus, strict=True)
    }
    assert labels[CACHES[0]] == ["kv8-g64"]
    assert labels[CACHES[1]] == ["k4v2-g64", "keep"]
    assert labels["model.layers.0.self_attn.q_proj"] == ["int4-g16"]
    assert labels["model.layers.1.self_attn.q_proj"] == ["int4-g16", "keep"]


def test_a_cache_that_is_not_searched_can_be_pinned_to_bits():
    space = space_of(pins=(("*.cache", "kv8-g64"),))
    assert menus_of_caches(space) == {name: [EIGHT] for name in CACHES}


def test_excluded_caches_stay_dense_but_in_the_budget(searched):
    space = space_of(searched(), exclude=("*.layers.1.*",))
    assert menus_of_caches(space)[CACHES[1]] == [Keep()]
    assert len(menus_of_caches(space)[CACHES[0]]) == len(KV_MENU)
    assert not any(tensor.name.endswith((".keys", ".values")) for tensor in space.fixed)


def test_uniform_treats_weights_alike_and_caches_alike(searched):
    space = space_of(searched())
    budget = (space.least_bytes + space.most_bytes) // 2
    chosen = space.operators(space.uniform(budget))
    for is_cache in (False, True):
        kinds = zip(space.units, chosen, strict=True)
        assert len({o for unit, o in kinds if unit.is_cache == is_cache}) == 1


def test_uniform_starves_neither_weights_nor_caches(searched):
    """Of all pairs that fit, the half that is compressed harder keeps the largest share."""
    space = space_of(searched())
    caches = [unit.is_cache for unit in space.units]
    dearest = [max(option.bytes for option in menu) for menu in space.menus]
    budget = (space.least_bytes + space.most_bytes) // 2
    found = set()
    for weight, cache in itertools.product(range(len(space.menus[0])), range(len(KV_MENU))):
        found.add(tuple(cache if is_cache else weight for is_cache in caches))

    def shares(assignment):
        spent = [menu[i].bytes for menu, i in zip(space.menus, assignment, strict=True)]
        halves = [[i for i, found in enumerate(caches) if found == half] for half in (True, False)]
        return [sum(spent[i] for i in half) / sum(dearest[i] for i in half) for half in halves]

    chosen = space.uniform(budget)
    fitting = [assignment for assignment in found if space.bytes(assignment) <= budget]
    assert chosen in fitting
    assert min(shares(chosen)) == max(min(shares(assignment)) for assignment in fitting)


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"batch": 2, "context": 0}, "give its context too"),
        ({"apart": True, "context": 0}, "give its context too"),
        ({"pins": (("*.cache", "int4-g64"),)}, r"int4-g64 is for weights, '\*.cache' means caches"),
        ({"pins": (("*.q_proj", "kv4-g64"),)}, r"kv4-g64 is for caches, .* means weights"),
        ({"pins": (("*.cach", "keep"),)}, r"did you mean '\*.cache'"),
        ({"exclude": ("*.cache",), "pins": ((CACHES[0], "keep"),)}, "both pinned and excluded"),
    ],
)
def test_refuses(request_fields, message):
    with pytest.raises(ValueError, match=message):
        space_of(**request_fields)


def test_a_space_that_searches_caches_needs_a_context(searched):
    with pytest.raises(ValueError, match="'both' searches the model's cache: say for how many"):
        space_of(searched(), context=0)
