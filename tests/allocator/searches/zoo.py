"""Problems with a known truth, on which searches can be judged in seconds.

The measured loss is additive with pairwise interactions of neighbours, plus an effect of each
sequence and noise; the loss table that searches start from is wrong in common (kinds, depths) and
in single cells, as real tables are.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from allocator.problem import Problem
from allocator.searches.base import Proposal, Search, SearchSetting
from allocator.solvers.dynamic import DynamicProgram
from objectives.evaluation import Evaluation, Fidelity, Slopes, round_significant
from search_spaces.space import Assignment

BITS = (2, 3, 4, 5, 8)
KIND_WEIGHTS = {"q": 64, "k": 16, "o": 64, "gate": 176, "down": 176}


@dataclass(frozen=True)
class Animal:
    """One synthetic problem: what a search may know, and the truth it may not.

    Attributes:
        setting: With seed 0; starts are the DP plan and the dearest uniform that fits.
        truth: For each unit the true loss of each option, nats.
        pairs: (num_units - 1,) interaction of each unit with the next.
        effects: (num_sequences,) how much harder each sequence is, nats.
        noise: Standard deviation of one sequence's remaining noise, nats.
        broken: (unit, option) that cannot be measured, or ``None``.
    """

    setting: SearchSetting
    truth: tuple[np.ndarray, ...]
    pairs: np.ndarray
    effects: np.ndarray
    noise: float
    broken: tuple[int, int] | None = None

    @property
    def dp(self) -> Assignment:
        return self.setting.starts[0]

    def seeded(self, seed: int) -> SearchSetting:
        return replace(self.setting, seed=seed)

    def true_loss(self, assignment: Assignment) -> float:
        parts = np.array([t[i] for t, i in zip(self.truth, assignment, strict=True)])
        return float(parts.sum() + (self.pairs * np.sqrt(parts[:-1] * parts[1:])).sum())

    def is_broken(self, assignment: Assignment) -> bool:
        return self.broken is not None and assignment[self.broken[0]] == self.broken[1]

    def measure(self, assignment: Assignment, fidelity: Fidelity) -> Evaluation:
        if self.is_broken(assignment):
            return Evaluation(assignment, fidelity, error="non-finite loss")
        digest = hashlib.sha256(repr(assignment).encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        noise = self.noise * rng.normal(size=len(self.effects))
        values = self.true_loss(assignment) + self.effects + noise
        chosen = values[list(fidelity.indices(len(self.effects)))]
        nats = tuple(round_significant(float(value)) for value in chosen)
        slopes = self.slopes(assignment, noise[fidelity.first]) if fidelity.slopes else None
        tokens = 128 * fidelity.num_passes
        return Evaluation(assignment, fidelity, nats, num_tokens=tokens, slopes=slopes)

    def slopes(self, assignment: Assignment, noise: float) -> Slopes:
        """A unit's error is the root of its true loss, along one direction for all options."""
        errors = [np.sqrt(row) for row in self.truth]
        own = np.array([row[i] for row, i in zip(errors, assignment, strict=True)])
        from_pairs = np.zeros(len(own))
        from_pairs[:-1] += self.pairs * own[1:]
        from_pairs[1:] += self.pairs * own[:-1]
        gradient = (2 * own + from_pairs) * (1 + noise)
        rows = [g * (row - e) for g, row, e in zip(gradient, errors, own, strict=True)]
        moves = [
            (row - e) ** 2 / np.maximum(row, e) ** 2 for row, e in zip(errors, own, strict=True)
        ]
        return Slopes(*(tuple(tuple(map(float, row)) for row in table) for table in (rows, moves)))


def make_animal(
    seed: int,
    num_depths: int,
    *,
    ragged: bool = False,
    broken: bool = False,
    num_sequences: int = 32,
    batch_sequences: int = 8,
) -> Animal:
    """Blocks of five kinds; ragged ones get an embedding, short menus and a pinned unit."""
    rng = np.random.default_rng(seed)
    units = [(depth, kind) for depth in range(num_depths) for kind in KIND_WEIGHTS]
    weights = [KIND_WEIGHTS[kind] * 1024 for _, kind in units]
    menus = [list(BITS) for _ in units]
    if ragged:
        units.append((-1, "embed"))
        weights.append(1024 * 1024)
        menus = [sorted(rng.choice(BITS, rng.integers(3, 6), replace=False)) for _ in units]
        menus[3] = [4]
    kinds = [kind for _, kind in units]
    sensitivity = {kind: rng.normal(0, 0.7) for kind in dict.fromkeys(kinds)}
    mistake = {kind: rng.normal(0, 0.7) for kind in sensitivity}
    drift = rng.normal(0, 0.5)  # the table's error grows or falls with depth
    truth, table = [], []
    for (depth, kind), size, menu in zip(units, weights, menus, strict=True):
        bits = np.array(menu, float)
        scale = size**0.7 * np.exp(sensitivity[kind] + rng.normal(0, 0.4))
        losses = scale * 3.2**-bits * np.exp(rng.normal(0, 0.15, len(bits)))
        losses = np.sort(losses)[::-1]
        common = mistake[kind] + drift * (2 * depth / num_depths - 1)
        wrong = np.exp(common + rng.normal(0, 0.3) + rng.normal(0, 0.15, len(bits)))
        truth.append(losses)
        table.append(losses * wrong)
    costs = tuple(
        np.array([size * b // 8 + size // 32 for b in menu], np.int64)
        for size, menu in zip(weights, menus, strict=True)
    )
    least, most = (sum(int(cost[i]) for cost in costs) for i in (0, -1))
    problem = Problem(costs, tuple(table), least + (most - least) * 3 // 10)
    dp = DynamicProgram().solve(problem).choice
    pairs = rng.uniform(-0.1, 0.4, len(units) - 1)
    animal = Animal(
        SearchSetting(
            problem,
            (dp, _uniform(problem)),
            tuple(depth for depth, _ in units),
            tuple(kinds),
            num_sequences,
            batch_sequences,
            0,
            _importances(np.random.default_rng(1000 + seed), truth, weights),
            tuple(1 - np.array(menu) / 16 for menu in menus),
        ),
        tuple(truth),
        pairs,
        rng.normal(0, 0.15, num_sequences),
        0.03,
    )
    scale = 1 / animal.true_loss(dp)  # the DP plan's true loss is 1 nat
    animal = replace(animal, truth=tuple(losses * scale for losses in truth))
    table = tuple(losses * scale for losses in table)
    problem = replace(problem, losses=table)
    animal = replace(animal, setting=replace(animal.setting, problem=problem))
    if not broken:
        return animal
    # Near the DP plan and of a large kind, so that every search runs into it.
    unit = next(u for u, level in enumerate(dp) if level and kinds[u] == "down")
    return replace(animal, broken=(unit, dp[unit] - 1))


def sloped(animal: Animal) -> Animal:
    """The same problem, where searches may ask for slopes."""
    return replace(animal, setting=replace(animal.setting, slopes=True))


def _importances(rng, truth, weights) -> tuple[np.ndarray, ...]:
    """Samples whose typical value tells how sensitive each weight of a unit is, but for noise."""
    spread = np.sort(rng.normal(size=64))
    pairs = zip(truth, weights, strict=True)
    scales = [losses[0] / size * np.exp(rng.normal(0, 0.2)) for losses, size in pairs]
    return tuple(np.exp(np.log(scale) / 2 + 0.7 * spread) for scale in scales)


def _uniform(problem: Problem) -> Assignment:
    """The highest level that all units can take within the budget, capped by their menus."""
    levels = range(max(len(cost) for cost in problem.bytes))
    tops = [len(cost) - 1 for cost in problem.bytes]
    plans = [tuple(min(level, top) for top in tops) for level in levels]
    return [plan for plan in plans if problem.total_bytes(plan) <= problem.budget_bytes][-1]


# Seeds whose table is wrong enough that at least 15 % can be gained (see test_zoo.py).
_MAKERS: dict[str, Callable[[], Animal]] = {
    "plain": lambda: make_animal(4, 8),
    "ragged": lambda: make_animal(6, 11, ragged=True),
    "broken": lambda: make_animal(2, 6, broken=True),
    "whole": lambda: make_animal(2, 8, num_sequences=8),
    "sloped": lambda: sloped(make_animal(4, 8)),
}
ZOO = sorted(_MAKERS)


@cache
def get_animal(name: str) -> Animal:
    return _MAKERS[name]()


def drive(
    search: Search,
    measure: Callable[[Assignment, Fidelity], Evaluation],
    num_evaluations: int,
    window: int = 1,
) -> list[Evaluation]:
    """The sliding window: proposal i is asked once result i - window is told."""
    open_: deque[Proposal] = deque()
    history: list[Evaluation] = []
    while len(history) < num_evaluations:
        while len(open_) < min(window, num_evaluations - len(history)):
            proposals = search.ask(1, [proposal.assignment for proposal in open_])
            if not proposals:
                break
            open_.extend(proposals)
        if not open_:
            break
        proposal = open_.popleft()
        history.append(measure(proposal.assignment, proposal.fidelity))
        search.tell([history[-1]])
    return history
