"""The methods of the table: which tables they need, where they start, what they move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from allocator.config import DEFAULT_SCORER, SearchConfig
from allocator.ratio_plans import cut_assignment, published_plan
from allocator.searches.base import Search, SearchSetting
from allocator.searches.evolution import Evolution
from allocator.searches.evolution_options import EvolutionOptions
from allocator.searches.model_guided import ModelGuided
from allocator.searches.random_search import RandomSearch
from allocator.searches.surrogate_nsga2 import SurrogateNSGA2, SurrogateNSGA2Options
from allocator.searches.tpe import TPE
from allocator.solvers.dynamic import DynamicProgram
from objectives.sensitivity import SCORERS, ScoringContext
from objectives.sensitivity.importance import ImportanceScorer
from search_spaces.space import Assignment, SearchSpace


@dataclass(frozen=True)
class OneShot:
    """A plan from one scorer: by the exact solver, by its published ratios, or by its cut."""

    scorer: str
    rule: str = "solver"

    @property
    def reads(self) -> Callable:
        """What the plan is made of: the scorer's importances where its ratios rule, or losses."""
        return importances if self.rule == "published" else table

    def plan(self, scores, setting: SearchSetting, space: SearchSpace) -> Assignment:
        """The plan within the setting's budget, from what was read."""
        if self.rule == "published":
            scorer = SCORERS[self.scorer]()
            assert isinstance(scorer, ImportanceScorer)
            return published_plan(scorer, scores, space, setting.problem.budget_bytes)
        problem = replace(setting.problem, losses=scores)
        if self.rule == "cut":
            return cut_assignment(problem)
        return DynamicProgram().solve(problem).choice


@dataclass(frozen=True)
class Searched:
    """A search: its prior table, empty where it starts from uniform; sequences it measures on.

    ``others`` are tables of the same statistics, which cost nothing more, whose plans it may start
    from, as from those of a run's other tables. ``multiple`` is how many times the tokens of the
    other searches it may read.
    """

    make: Callable[[SearchSetting, int], Search]
    prior: str = ""
    others: tuple[str, ...] = ()
    feasible: str = "B"
    sequences: int = 4
    multiple: int = 1


def table(context: ScoringContext, scorer: str):
    """Losses of a scorer, one array per unit."""
    import numpy as np

    menus = context.space.menus
    cells = [(unit, option) for unit, menu in enumerate(menus) for option in range(len(menu))]
    losses = SCORERS[scorer]().losses(context, cells)
    return tuple(np.array([next(losses) for _ in menu]) for menu in menus)


def importances(context: ScoringContext, scorer: str):
    """(num_units,) importances of a scorer."""
    found = SCORERS[scorer]()
    assert isinstance(found, ImportanceScorer)
    return found.importances(context)


def evolution(
    kind: str, length: int, *, same_size_only: bool, rescaled: bool = True
) -> Callable[[SearchSetting, int], Search]:
    """EvoPress, its published schedule rescaled to so many batches of sequences, or cut off."""

    def make(setting: SearchSetting, num_batches: int) -> Search:
        batch_tokens = setting.batch_sequences * length
        options = EvolutionOptions.published(kind, tokens_per_batch=batch_tokens)
        options = options.rescaled(num_batches) if rescaled else options
        options = replace(options, same_size_only=same_size_only, num_generations=None)
        return Evolution(setting, options)

    return make


def whole_front(setting: SearchSetting, num_candidates: int) -> Search:
    """AMQ as published, its 10,250 candidates rescaled to so many.

    A fifth of them is drawn before anything is predicted, since a fortieth, as published, would be
    a handful; the rest is measured in four times as many rounds as a round has candidates.
    """
    published = SurrogateNSGA2Options.published()
    num_initial = min(published.num_initial, num_candidates // 5)
    each = max(1, round(((num_candidates - num_initial) / 4) ** 0.5))
    options = replace(
        published,
        num_initial=num_initial,
        num_candidates=min(published.num_candidates, each),
    )
    return SurrogateNSGA2(setting, options)


DEAR = (
    "one at a time + solver",
    "noise injection (HIGGS) + solver",
    "marginal perplexity cut (ASVD)",
)
"""One-shots that read many times the tokens of a small budget."""

ON_REQUEST = (
    "amq, whole front",
    "evolution B, truncated",
    "evolution B, 10 x tokens",
    "model_guided, blend",
    "model_guided, no slopes",
)
"""Searches that answer questions of their own."""


def searches(kind: str, length: int) -> dict[str, Searched]:
    """The searches of the table; ``kind`` is ``bits`` or ``sparsity``.

    Those ``ON_REQUEST`` tell what AMQ is with its published options, what EvoPress is with its
    published schedule cut off and with ten times the tokens, and ``model_guided`` from the blend's
    table and without slopes.
    """
    free = evolution(kind, length, same_size_only=False)
    cut = evolution(kind, length, same_size_only=False, rescaled=False)
    tpe = Searched(lambda setting, batches: TPE(setting), prior="relative_error")
    guided = Searched(
        lambda setting, batches: ModelGuided(setting),
        prior=DEFAULT_SCORER,
        others=tuple(name for name in SearchConfig().scorers if name != DEFAULT_SCORER),
        sequences=ModelGuided.preferred_sequences,
    )
    blind = replace(guided, make=lambda s, batches: ModelGuided(replace(s, slopes=False)))
    return {
        "random": Searched(lambda setting, batches: RandomSearch(setting)),
        "tpe": tpe,
        "tpe, blend": replace(tpe, prior="blend"),
        "amq": Searched(lambda setting, batches: SurrogateNSGA2(setting)),
        "amq, whole front": Searched(whole_front),
        "evolution A": Searched(evolution(kind, length, same_size_only=True), feasible="A"),
        "evolution B": Searched(free),
        "evolution B, truncated": Searched(cut),
        "evolution B, 10 x tokens": Searched(free, multiple=10),
        "model_guided": guided,
        "model_guided, blend": replace(guided, prior="blend", others=()),
        "model_guided, no slopes": blind,
    }


def one_shots(kind: str) -> dict[str, OneShot]:
    """The one-shot heuristics of the table."""
    common = {
        "relative error + solver": OneShot("relative_error"),
        "fisher + solver": OneShot("fisher"),
        "blend + solver": OneShot("blend"),
        "correlated blend + solver": OneShot("correlated_blend"),
        "correlated fisher + solver": OneShot("correlated_fisher"),
        "one at a time + solver": OneShot("one_at_a_time"),
        "noise injection (HIGGS) + solver": OneShot("noise_injection"),
        "marginal perplexity cut (ASVD)": OneShot("marginal_perplexity", "cut"),
    }
    if kind == "bits":
        return common
    return common | {
        "arithmetic progression (ATP)": OneShot("arithmetic_progression", "published"),
        "outlier ratio (OWL)": OneShot("outlier_ratio", "published"),
        "spectral tail (AlphaPruning)": OneShot("spectral_tail", "published"),
        "influence (LayerIF)": OneShot("influence", "published"),
    }
