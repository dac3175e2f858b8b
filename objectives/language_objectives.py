"""The objectives of a run on a language model by name, on one text or on several.

Perplexity is the exponential of the cross-entropy, so both rank plans alike. A run that minimises
``perplexity`` is measured by the increase of its logarithm, which is that of the cross-entropy and
adds up over tokens as losses must; perplexities are reported whatever is minimised, wherever the
objective looks at next tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from objectives.calibration import Calibration
from objectives.language_task import DEFAULT_TOP_K, LanguageTask
from objectives.multi_task import MultiTask
from objectives.representation_task import REPRESENTATIONS, RepresentationTask
from objectives.task import Task

OBJECTIVES = {
    "kl": "KL to the dense model's predictions, nats per token",
    "cross_entropy": "increase of the next token's cross-entropy, nats per token",
    "perplexity": "increase of its logarithm: cross_entropy by another name",
    "hidden_state": "relative squared error of the last hidden states",
    "embedding": "one minus the cosine of the mean-pooled last hidden states",
}
"""What a run on a language model may minimise."""


@dataclass(frozen=True)
class TaskOptions:
    """How an objective is measured.

    Attributes:
        top_k: Outcomes per position that the teacher cache keeps; 0 keeps the vocabulary. Of
            ``kl`` only.
        batch_size: Sequences per forward pass.
        cache_folder: Where dense references are kept between processes; ``None``: in memory only.
    """

    top_k: int = DEFAULT_TOP_K
    batch_size: int = 4
    cache_folder: Path | None = None


def language_task(
    objective: str, calibration: Calibration, options: TaskOptions | None = None
) -> Task:
    """One objective on one text.

    Raises:
        ValueError: An unknown objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    chosen = options or TaskOptions()
    if objective in REPRESENTATIONS:
        return RepresentationTask(
            calibration,
            objective=objective,
            batch_size=chosen.batch_size,
            cache_folder=chosen.cache_folder,
        )
    return LanguageTask(
        calibration,
        top_k=chosen.top_k,
        batch_size=chosen.batch_size,
        objective="kl" if objective == "kl" else "cross_entropy",
        cache_folder=chosen.cache_folder,
    )


def language_tasks(
    objective: str,
    texts: Sequence[Calibration],
    weights: Sequence[float],
    options: TaskOptions | None = None,
) -> Task:
    """One objective on one text, or its weighted mean over several.

    Raises:
        ValueError: An unknown objective, texts that do not line up, or faulty weights.
    """
    tasks = [language_task(objective, text, options) for text in texts]
    return tasks[0] if len(tasks) == 1 else MultiTask(tasks, weights)


def refuse_shared_text(texts: Sequence[Calibration]) -> None:
    """Raise ``ValueError`` where one text's sequence is another text's in another split.

    A search would see what its plan is chosen or reported on.
    """
    owner: dict[bytes, tuple[str, int]] = {}
    for number, text in enumerate(texts):
        for split, tokens in text.splits.items():
            for row in tokens.numpy():
                first, other = owner.setdefault(row.tobytes(), (split, number))
                if first != split:
                    raise ValueError(
                        f"{texts[other].source} has a sequence of {text.source} in its {first} "
                        f"split, which is in the {split} split there: give texts that share none"
                    )
