"""What scorers are tested on: contexts around tiny models, and whole tables of one scorer."""

from language import offering

from objectives.bank import Bank
from objectives.evaluator import Evaluator
from objectives.kv_cache import CacheLosses
from objectives.language_task import LanguageTask
from objectives.sensitivity import SCORERS, ScoringContext
from objectives.statistics import KINDS, collect_statistics
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space


def context_of(model, space, task, *, needs=KINDS, num_sequences=None, seed=0):
    """A context of a priced space, with the statistics that ``needs`` names."""
    meter = TokenMeter()
    statistics = collect_statistics(model, task, space, needs=needs, meter=meter)
    bank = Bank(model, space)
    return ScoringContext(
        space=space,
        bank=bank,
        statistics=statistics,
        model=model,
        task=task,
        meter=meter,
        evaluator=Evaluator(model, task, bank, meter),
        caches=CacheLosses(model, task, space, bank=bank, meter=meter),
        incumbent=tuple(len(menu) - 1 for menu in space.menus),
        seed=seed,
        num_sequences=num_sequences,
    )


def make_context(model, calibration, operators, needs=KINDS, num_sequences=None, **request):
    """A context of a model's matrices with one menu for all."""
    space = offering(build_space(model, SpaceRequest(**request)), *operators)
    task = LanguageTask(calibration)
    return context_of(model, space, task, needs=needs, num_sequences=num_sequences)


def cells_of(context):
    """Every cell of a context's space, in order."""
    return [(u, o) for u, menu in enumerate(context.space.menus) for o in range(len(menu))]


def table(name, context):
    """The whole table of a scorer, one list per unit."""
    losses = SCORERS[name]().losses(context, cells_of(context))
    return [[next(losses) for _ in menu] for menu in context.space.menus]
