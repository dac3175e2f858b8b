"""The methods of the table: which tables they need, where they start, what they move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from allocator.ratio_plans import cut_assignment, published_plan
from allocator.searches.base import Search, SearchSetting
from allocator.searches.evolution import Evolution
from allocator.searches.evolution_options import EvolutionOptions
from allocator.searches.model_guided import ModelGuided
from allocator.searches.random_search import RandomSearch
from allocator.searches.surrogate_nsga2 import SurrogateNSGA2
from allocator.searches.tpe import TPE
from allocator.solvers.dynamic import DynamicProgram
from objectives.sensitivity import SCORERS, ScoringContext
from objectives.sensitivity.importance import ImportanceScorer
from search_spaces.space import Assignment


@dataclass(frozen=True)
class OneShot:
    """A plan from one scorer: by the exact solver, by its published ratios, or by its cut."""

    scorer: str
    rule: str = "solver"

    def plan(self, context: ScoringContext, setting: SearchSetting) -> Assignment:
        """The plan within the setting's budget."""
        scorer = SCORERS[self.scorer]()
        budget = setting.problem.budget_bytes
        if self.rule == "published":
            assert isinstance(scorer, ImportanceScorer)
            return published_plan(scorer, scorer.importances(context), context.space, budget)
        problem = replace(setting.problem, losses=table(context, self.scorer))
        if self.rule == "cut":
            return cut_assignment(problem)
        return DynamicProgram().solve(problem).choice


@dataclass(frozen=True)
class Searched:
    """A search: its prior table, empty where it starts from uniform; sequences it measures on.

    ``multiple`` is how many times the tokens of the others it may read.
    """

    make: Callable[[SearchSetting, int], Search]
    prior: str = ""
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


def evolution(
    kind: str, length: int, *, same_size_only: bool
) -> Callable[[SearchSetting, int], Search]:
    """EvoPress, its published schedule rescaled to so many batches of sequences of a length."""

    def make(setting: SearchSetting, num_batches: int) -> Search:
        batch_tokens = setting.batch_sequences * length
        published = EvolutionOptions.published(kind, tokens_per_batch=batch_tokens)
        options = replace(published.rescaled(num_batches), same_size_only=same_size_only)
        return Evolution(setting, replace(options, num_generations=None))

    return make


DEAR = (
    "one at a time + solver",
    "noise injection (HIGGS) + solver",
    "marginal perplexity cut (ASVD)",
)
"""One-shots that read many times the tokens of a small budget."""

ON_REQUEST = ("evolution B, 10 x tokens", "model_guided, no slopes")


def searches(kind: str, length: int) -> dict[str, Searched]:
    """The searches of the table; ``kind`` is ``bits`` or ``sparsity``.

    Those ``ON_REQUEST`` answer questions of their own: what ten times the tokens buy EvoPress, and
    what ``model_guided`` is without slopes.
    """
    free = evolution(kind, length, same_size_only=False)
    guided = Searched(
        lambda setting, batches: ModelGuided(setting),
        prior="blend",
        sequences=ModelGuided.preferred_sequences,
    )
    blind = replace(guided, make=lambda s, batches: ModelGuided(replace(s, slopes=False)))
    return {
        "random": Searched(lambda setting, batches: RandomSearch(setting)),
        "tpe": Searched(lambda setting, batches: TPE(setting), prior="relative_error"),
        "amq": Searched(lambda setting, batches: SurrogateNSGA2(setting)),
        "evolution A": Searched(evolution(kind, length, same_size_only=True), feasible="A"),
        "evolution B": Searched(free),
        "evolution B, 10 x tokens": Searched(free, multiple=10),
        "model_guided": guided,
        "model_guided, no slopes": blind,
    }


def one_shots(kind: str) -> dict[str, OneShot]:
    """The one-shot heuristics of the table."""
    common = {
        "relative error + solver": OneShot("relative_error"),
        "fisher + solver": OneShot("fisher"),
        "blend + solver": OneShot("blend"),
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
