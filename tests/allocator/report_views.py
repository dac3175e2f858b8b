"""Run views for the report's tests: synthetic numbers, exact bytes."""

import dataclasses
import math

import numpy as np

from allocator.plan import (
    CONTAINER_METADATA,
    CalibrationRecord,
    FixedTensor,
    Measured,
    ModelIdentity,
    Paired,
    Plan,
    PlanMember,
    PlanUnit,
    SearchRecord,
    SplitRecord,
)
from allocator.report.view import FrontierPoint, Measurement, RunView
from search_spaces.operators import Keep, RoundToNearest, operator_to_json
from search_spaces.space import Member, SearchSpace, Unit, build_menu
from search_spaces.storage import StoredTensor, safetensors_bytes

SHAPES = {
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}
OPERATORS = [RoundToNearest(bits) for bits in (2, 3, 4, 5, 6, 8)]
RETURNED = {"uniform": 1.2209, "dp": 1.4147, "search": 0.9062}


def make_space(num_layers, shapes, *, head=True):
    units = [
        Unit(
            f"model.layers.{d}.{kind}",
            (Member(f"model.layers.{d}.{kind}", "weight", shape),),
            d,
            kind,
        )
        for d in range(num_layers)
        for kind, shape in shapes.items()
    ]
    if head:
        units.append(Unit("lm_head", (Member("lm_head", "weight", (4096, 576)),), None, "head"))
    menus = tuple(build_menu(unit, [*OPERATORS, Keep()]) for unit in units)
    norms = [f"model.layers.{d}.input_layernorm.weight" for d in range(num_layers)]
    fixed = (
        StoredTensor("model.embed_tokens.weight", "BF16", (8192, 576)),
        *(StoredTensor(name, "BF16", (576,)) for name in norms),
    )
    return SearchSpace("bits", tuple(units), menus, fixed)


def make_plan(space, choice, returned="search", **changes):
    tensors = space.stored_tensors(choice)
    achieved = safetensors_bytes(tensors, CONTAINER_METADATA)
    slack = achieved // 700
    units = tuple(
        PlanUnit(
            name=unit.name,
            kind=unit.kind,
            depth=unit.depth,
            members=tuple(
                PlanMember(module=m.module, parameter=m.parameter, shape=m.shape)
                for m in unit.members
            ),
            operator=operator_to_json(operator),
            bytes=unit.bytes(operator),
        )
        for unit, operator in zip(space.units, space.operators(choice), strict=True)
    )
    heldout = {key: measured(nats, 0.021) for key, nats in RETURNED.items()}
    heldout["dp:reconstruction"] = measured(1.83, 0.04)
    heldout["returned"] = heldout[returned]
    facts = {
        "model": ModelIdentity(
            name="HuggingFaceTB/SmolLM2-135M",
            architecture="LlamaForCausalLM",
            config_sha256="c" * 64,
            weights_sha256="0123456789abcdef" * 4,
        ),
        "space": space.name,
        "ties": "none",
        "budget_text": f"{space.bits_per_weight(space.bytes(choice)) + 0.01:.2f}bpw",
        "budget_bytes": achieved + slack,
        "achieved_bytes": achieved,
        "slack_bytes": slack,
        "searched_budget_bytes": space.bytes(choice) + slack,
        "searched_bytes": space.bytes(choice),
        "bits_per_weight": space.bits_per_weight(space.bytes(choice)),
        "dense_bytes": 2 * space.num_weights + space.overhead_bytes,
        "units": units,
        "fixed": tuple(FixedTensor(name=t.name, dtype=t.dtype, shape=t.shape) for t in space.fixed),
        "returned": returned,
        "scorer": "fisher",
        "predicted_nats": 0.871,
        "lower_bound_nats": 0.793,
        "gap_nats": 0.0,
        "solver_status": "proved optimal for the additive model",
        "search_nats": {key: measured(nats - 0.07, 0.024) for key, nats in RETURNED.items()},
        "guard_nats": {key: measured(nats + 0.02, 0.03) for key, nats in RETURNED.items()},
        "heldout_nats": heldout,
        "heldout_differences_nats": {
            f"returned - {key}": Paired(
                nats=heldout[returned].nats - entry.nats, standard_error_nats=0.011
            )
            for key, entry in heldout.items()
            if key != "returned"
        },
        "calibration": CalibrationRecord(
            source="wiki-summaries",
            splits={
                name: SplitRecord(num_sequences=64, sequence_length=256, sha256=digit * 64)
                for name, digit in zip(
                    ("statistics", "search", "guard", "heldout"), "1234", strict=True
                )
            },
        ),
        "search": SearchRecord(
            name="model_guided",
            seed=0,
            window=4,
            num_evaluations=150,
            num_failed=4,
            history_sha256="feed" * 16,
            stopped="all 150 trials are done",
        ),
        "tokens": {"statistics": 49152, "search": 307200, "guard": 24576, "heldout": 65536},
        "versions": {"model-allocator": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }
    return Plan(**{**facts, **changes})


def measured(nats, error):
    return Measured(
        nats=nats,
        standard_error_nats=error,
        num_tokens=16384,
        cross_entropy_nats=2.9 + nats,
        perplexity=math.exp(2.9 + nats),
    )


def make_measurements(count, seed=0):
    random = np.random.default_rng(seed)
    found = []
    for index in range(count):
        tokens = 2048 * (index + 1)
        falling = 0.85 + 0.55 * math.exp(-index / 40)
        loss = falling * math.exp(abs(random.normal(0, 0.12)))
        predicted = 0.8 * loss * math.exp(random.normal(0, 0.2))
        origin = "search"
        if index == 0:
            loss, predicted, origin = 1.38, 0.79, "dp"
        elif index == 1:
            loss, predicted, origin = 1.19, 1.24, "uniform"
        elif index == 2:
            loss, predicted, origin = 1.83, 1.31, "start"
        failed = index % 37 == 30
        found.append(Measurement(tokens, None if failed else loss, 0.03 * loss, predicted, origin))
    return tuple(found)


def make_view(num_layers=30, shapes=SHAPES, *, head=True, returned="search", seed=0, **changes):
    """A finished run of a Llama-like model; ``changes`` replace fields of the view."""
    space = make_space(num_layers, shapes, head=head)
    random = np.random.default_rng(seed)
    kinds = list(shapes)
    choice, dp = [], []
    for unit in space.units:
        if unit.depth is None:
            likely = 5.0
        else:
            ends = 2.5 * math.exp(-unit.depth / 2) + math.exp((unit.depth - num_layers) / 2)
            likely = 0.9 + ends + (1.2 if unit.kind == kinds[-1] else 0.0)
        pick = round(likely + random.normal(0, 0.45))
        choice.append(min(6, max(0, pick)))
        dp.append(min(6, max(0, pick + int(random.integers(-3, 4) / 3))))
    plan = make_plan(space, tuple(choice), returned)
    sizes = np.linspace(0.7, 3, 60) * plan.searched_bytes
    losses = 0.8 * np.exp(-2.6 * (sizes / plan.searched_bytes - 1))
    uniform = tuple([1] * len(choice))
    view = RunView(
        name="smollm2-135m",
        plan=plan,
        dp_plan_labels=tuple(o.label for o in space.operators(tuple(dp))),
        num_weights=space.num_weights,
        dense_searched_bytes=2 * space.num_weights,
        container_bytes=plan.achieved_bytes - plan.searched_bytes - space.fixed_bytes,
        frontier=tuple(
            FrontierPoint(int(size), float(loss)) for size, loss in zip(sizes, losses, strict=True)
        ),
        measurements=make_measurements(150),
        rank_correlation=0.734,
        predicted_unit="nats",
        method_bytes={
            "uniform": space.bytes(uniform),
            "dp": plan.searched_budget_bytes,
            "search": plan.searched_bytes,
        },
        settings={
            "Model": "HuggingFaceTB/SmolLM2-135M",
            "Budget": plan.budget_text,
            "Space": "bits, ties: none",
            "Text": "wiki-summaries",
            "Search": "model_guided, seed 0, window 4, 8 sequences per evaluation",
            "Limits": "150 trials",
        },
        notes=("4 evaluations failed; the first with: the loss is NaN.",),
    )
    return dataclasses.replace(view, **changes)


def with_plan(view, **changes):
    """The view with fields of its plan replaced."""
    return dataclasses.replace(view, plan=view.plan.model_copy(update=changes))
