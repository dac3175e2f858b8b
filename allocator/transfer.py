"""Apply a formula that a search found on one model to another one, without a search.

The problem: a formula is worth finding because it serves other models, and all that it asks of one
are the importances of its weights: one forward pass over a little text. The ratios that it gives
the model's blocks or units become an assignment within the byte budget as they do in the search
that found it. Nothing is measured, so nothing says how good the plan is: that takes ``allocator
evaluate``, or a search.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.bench import Bench, load_model_for, resolve_threads
from allocator.config import RunConfig
from allocator.plan import Plan
from allocator.plan_build import PlanFacts, unmeasured_plan
from allocator.problem import Problem
from allocator.ratio_plans import nearest_assignment, removed_ratios
from allocator.reporter import Reporter, Silent
from allocator.run_texts import build_texts, text_record
from allocator.search_build import NUM_SAMPLES
from allocator.searches.base import SearchSetting
from allocator.searches.expression import Formula
from allocator.searches.formula import Layers
from allocator.session import identify, price
from objectives.importance_samples import importance_samples
from objectives.language_objectives import TaskOptions, language_tasks
from objectives.statistics_file import FILE_NAME, StatisticsFile, statistics_identity
from search_spaces.space import Assignment, SearchSpace


def load_formula(path: Path) -> Formula:
    """Read the ``formula.json`` of a run, or of the run in a folder.

    Raises:
        ValueError: It cannot be read, or is not a formula.
    """
    file = path / "formula.json" if path.is_dir() else path
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
        return Formula.from_json(data)
    except OSError as error:
        raise ValueError(f"cannot read the formula {file}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the formula {file} is not valid JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file} holds no formula: expected pre, reduction, post, sign, spread and group"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def transfer(
    formula: Formula,
    config: RunConfig,
    folder: Path | None = None,
    reporter: Reporter | None = None,
) -> Plan:
    """The plan that a formula gives a model, from the importances of its weights alone.

    Args:
        formula: Found on any model.
        config: The model, its budget and space. Of its texts the sequences for statistics are read,
            nothing of its search and caps.
        folder: Of the plan; gets the statistics that operators compress with, where any does.
        reporter: Shown the progress.

    Raises:
        ValueError: No such model, a budget that cannot be met, caches in the space, inputs that
            cannot be observed, a text that is too short, or a formula that is infinite on these
            weights.
    """
    shown = reporter or Silent()
    space, budget = price(config)
    if space.has_caches:
        raise ValueError("a formula looks at weights: choose a space without caches")
    measure, data = config.measure, config.data
    advance = shown.stage("loading model and text", 2)
    loaded = load_model_for(config.model, measure, resolve_threads(measure.threads, 1))
    advance(1, "")
    texts = build_texts(data, loaded)
    advance(2, "")
    identity = identify(loaded)
    record = text_record(data, texts)
    kept = None
    if folder is not None and space.needs:
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        about = statistics_identity(
            identity.weights_sha256, record.statistics_identity(measure.objective)
        )
        kept = StatisticsFile(folder / "cache" / FILE_NAME, about)
    options = TaskOptions(measure.top_k, measure.batch_size)
    task = language_tasks(measure.objective, texts, data.weights, options)
    bench = Bench.build(loaded.model, task, space, kept=kept)
    advance = shown.stage("importances of the weights", data.statistics)
    observed = bench.observe({"second_moment"}, lambda done, _: advance(done, ""))
    samples = importance_samples(space, bench.bank, observed, num_samples=NUM_SAMPLES)
    chosen = formula_assignment(formula, space, budget.searched_bytes, samples)
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    facts = PlanFacts(identity, record, measure.objective, dtype)
    return unmeasured_plan(space, budget, chosen, facts, maker=f"formula {formula}")


def formula_assignment(
    formula: Formula,
    space: SearchSpace,
    budget_bytes: int,
    importances: Sequence[NDArray[np.float64]],
) -> Assignment:
    """What a formula makes of a space within the bytes of its units.

    The mean of its ratios is what equal ratios for all units would remove. Only ratios decide:
    where options of one unit remove the same by different means, as in joint spaces, the formula
    has nothing to say on which is better.

    Args:
        formula: What maps importances to ratios.
        space: Units and menus.
        budget_bytes: Most bytes of the searched units; never exceeded.
        importances: For each unit a sorted sample of its weights' importance, as many for all.

    Raises:
        ValueError: Nothing fits the bytes, or the formula is infinite on these importances.
    """
    costs = tuple(np.array([option.bytes for option in menu], np.int64) for menu in space.menus)
    removed = tuple(removed_ratios(space))
    even = nearest_assignment(costs, removed, np.zeros(len(costs)), budget_bytes)
    setting = SearchSetting(
        problem=Problem(costs, tuple(np.zeros(len(cost)) for cost in costs), budget_bytes),
        starts=(even,),
        depths=tuple(-1 if unit.depth is None else unit.depth for unit in space.units),
        kinds=tuple(unit.kind for unit in space.units),
        num_sequences=1,
        batch_sequences=1,
        seed=0,
        importances=tuple(importances),
        removed=removed,
    )
    return Layers(setting).assignment(formula)
