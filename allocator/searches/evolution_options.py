"""The shape of an evolution: ours for runs of a few hundred evaluations, EvoPress's as published.

The problem: a published search is a yardstick only with its published schedule, which reads 26 to
184 million tokens, and it has to be compared at a fraction of that. Two schedules serve a fraction:
the published one, cut off where the tokens end (give the run a token limit and change nothing), and
:meth:`EvolutionOptions.rescaled`, which fits a whole smaller evolution into them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["bits", "sparsity", "drop"]


@dataclass(frozen=True)
class EvolutionOptions:
    """Shape of a generation and of the whole.

    Attributes:
        num_offspring: Mutants of the parent in each generation.
        survivors: How many go on after each stage; the last is 1.
        batches: Minibatch of each stage, in multiples of the setting's ``batch_sequences``; never
            more than the whole split.
        same_size_only: Trade levels only between units with the same bytes, as published; else
            between any units (EvoPress's group rules ``size`` and ``none``).
        num_generations: Stop after so many; ``None`` goes on until the run ends.
        num_initial: Random assignments measured with the starts before the first generation, on
            ``initial_batches``; EvoPress draws its first parent so where uniform is no choice.
        initial_batches: Minibatch of the starts, in the unit of ``batches``; 0 for that of the last
            stage.
        rounds: Coarse-to-fine rounds. In the first a step is ``2^(rounds - 1)`` levels, in each
            later one half of that, around what the round before found.
        round_generations: Generations of every round but the last.
    """

    num_offspring: int = 16
    survivors: tuple[int, ...] = (2, 1)
    batches: tuple[int, ...] = (1, 2)
    same_size_only: bool = False
    num_generations: int | None = None
    num_initial: int = 0
    initial_batches: int = 0
    rounds: int = 1
    round_generations: int = 50

    def __post_init__(self) -> None:
        if self.num_offspring < 1:
            raise ValueError(f"expected at least one offspring, got {self.num_offspring}")
        if len(self.survivors) != len(self.batches) or not self.survivors:
            raise ValueError(
                f"expected survivors and a batch for each stage, got {self.survivors} survivors "
                f"and batches {self.batches}"
            )
        if self.survivors[-1] != 1 or min(self.survivors) < 1 or min(self.batches) < 1:
            raise ValueError(
                f"expected positive survivors ending in 1 and positive batches, got "
                f"{self.survivors} and {self.batches}"
            )
        if min(self.rounds, self.round_generations) < 1 or self.num_generations == 0:
            raise ValueError(
                f"expected at least one round and generation, got {self.rounds} rounds of "
                f"{self.round_generations} and {self.num_generations} generations"
            )
        if min(self.num_initial, self.initial_batches, self.num_generations or 0) < 0:
            raise ValueError("numbers of generations, initial assignments and batches: 0 or more")

    @property
    def generation_batches(self) -> int:
        """Batches that a full generation reads: every stage's candidates, then the parent."""
        entering = (self.num_offspring, *self.survivors[:-1])
        stages = zip(entering, self.batches, strict=True)
        return sum(count * batches for count, batches in stages) + self.batches[-1]

    @classmethod
    def published(
        cls, kind: Kind, *, tokens_per_batch: int = 2048, num_batches: int | None = None
    ) -> EvolutionOptions:
        """EvoPress's schedule, of its paper's appendix and example scripts.

        Args:
            kind: ``bits`` (176.9 million tokens), ``sparsity`` (183.5 million) or ``drop``, whole
                blocks or their attention and feed-forward halves, here 12 of 32 (26.3 million): a
                space with ties by module and a menu of everything pruned and everything kept.
            tokens_per_batch: Tokens of the setting's ``batch_sequences``. Stages get as many
                batches as are nearest to the published 2048 and more tokens, at least one; in a
                split shorter than a stage it reads all of it.
            num_batches: Rescale the whole to so many batches, see :meth:`rescaled`; ``None`` leaves
                it as long as it was.

        Raises:
            ValueError: Not a positive number of tokens, or batches that hold no generation.
        """
        if tokens_per_batch < 1:
            raise ValueError(f"expected a positive number of tokens, got {tokens_per_batch}")
        generations, offspring, survivors, tokens, initial = {
            "bits": (150, 128, (16, 4, 1), (2048, 16384, 131072), 0),
            "sparsity": (400, 64, (8, 2, 1), (2048, 16384, 65536), 0),
            "drop": (160, 32, (2, 1), (2048, 32768), 64),
        }[kind]
        batches = tuple(max(1, round(count / tokens_per_batch)) for count in tokens)
        whole = cls(
            num_offspring=offspring,
            survivors=survivors,
            batches=batches,
            same_size_only=True,
            num_generations=generations,
            num_initial=initial,
            initial_batches=batches[0] if initial else 0,
        )
        return whole if num_batches is None else whole.rescaled(num_batches)

    def rescaled(self, num_batches: int) -> EvolutionOptions:
        """The same evolution in fewer batches: less of everything, in equal parts.

        Offspring, survivors and minibatches are multiplied by the cube root of the fraction that
        is left (whole numbers, at least one of each); generations fill what remains, rounds in
        proportion. Never larger than the original.

        Args:
            num_batches: Batches that the whole may read; tokens over tokens in a batch.

        Raises:
            ValueError: The original has no end, or not one generation fits.
        """
        if self.num_generations is None:
            raise ValueError("only an evolution of so many generations can be rescaled")
        if num_batches < 1:
            raise ValueError(f"num_batches: expected at least 1, got {num_batches}")
        whole = self.num_initial * self.initial_batches
        whole += self.num_generations * self.generation_batches
        if num_batches >= whole:
            return self
        share = float((num_batches / whole) ** (1 / 3))

        def shrink(count: int) -> int:
            return max(1, round(count * share))

        smaller = replace(
            self,
            num_offspring=shrink(self.num_offspring),
            survivors=tuple(map(shrink, self.survivors)),
            batches=tuple(map(shrink, self.batches)),
            num_initial=round(self.num_initial * share),
            initial_batches=shrink(self.initial_batches) if self.initial_batches else 0,
        )
        left = num_batches - smaller.num_initial * smaller.initial_batches
        generations = min(left // smaller.generation_batches, self.num_generations)
        if generations < 1:
            raise ValueError(
                f"{num_batches} batches do not hold one generation of "
                f"{smaller.generation_batches}: allow more tokens"
            )
        per_round = round(self.round_generations * generations / self.num_generations)
        return replace(smaller, num_generations=generations, round_generations=max(1, per_round))
