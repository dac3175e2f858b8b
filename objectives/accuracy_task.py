"""Task accuracy as a task: what EleutherAI's ``lm-eval`` measures of the model as it stands.

The problem: a model is compressed to answer questions, and nats per token of running text say
little about that. Here every document of an ``lm-eval`` task is a sequence whose loss is one minus
the task's own metric. That is coarse: a few dozen documents cannot tell good plans apart, so give
it many, or set it beside a smoother loss in a multi-task. Scorers, which need gradients, get the
likelihood of the right answer instead.

``lm-eval`` is an optional extra. Its tasks may be given as YAML files over local data.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from objectives.evaluation import mean
from objectives.function_task import split_batches
from objectives.task import SequenceLosses
from search_spaces.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST_DOCUMENTS = 8
_MOST_GENERATED = 256  # tokens that lm-eval lets a model write unless the task says otherwise


class AccuracyTask:
    """One minus a metric of an ``lm-eval`` task, per document.

    Losses are absolute: the dense model's is not 0. A metric where less is better is itself the
    loss. The few-shot examples of every document are drawn once.

    Args:
        task: A YAML file's path, a configuration as in such a file, or the name of a task that
            ``lm-eval`` brings along; one task and no group.
        tokenizer: The model's.
        metric: One of the task's metrics, whose value is the mean over documents; the task's first
            if not given.
        num_documents: Most documents to use, drawn at random; ``None`` for all.
        batch_size: Requests per forward pass.
        seed: Draws documents and few-shot examples and decides which split a document lands in.

    Raises:
        ValueError: ``lm-eval`` is not installed, no such task or metric, a metric that is no mean
            over documents, or too few documents for four splits.
    """

    def __init__(
        self,
        task: str | Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        metric: str | None = None,
        num_documents: int | None = None,
        batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        self._task = _load_task(task)
        self._metric = _find_metric(self._task, metric)
        self.name = f"{self._task.task_name}:{self._metric}"
        self.has_slopes = False
        self._higher_is_better = bool(self._task.higher_is_better()[self._metric])
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._documents = _draw(self._task, num_documents, seed)
        self._requests = _build_requests(self._task, self._documents, seed)
        order = np.random.default_rng(seed).permutation(len(self._documents))
        self._splits = split_batches(order.tolist())
        self._harness: Any = None

    @property
    def tokens_per_sequence(self) -> int:
        """Mean tokens of a document's requests, rounded up; written ones at their most."""
        counts = [sum(map(self._num_tokens, requests)) for requests in self._requests]
        return math.ceil(mean(counts))

    def num_sequences(self, split: str) -> int:
        """Documents in a split."""
        return len(self._splits[split])

    def prepare(self, model: nn.Module, split: str) -> int:
        """Nothing: the loss is absolute."""
        del model, split
        return 0

    def sequence_losses(
        self, model: nn.Module, split: str, indices: Sequence[int]
    ) -> SequenceLosses:
        """One minus the metric of each document."""
        chosen = [self._splits[split][index] for index in indices]
        asked = [[_fresh(request) for request in self._requests[place]] for place in chosen]
        flat = [request for requests in asked for request in requests]
        harness = self._harness_of(model)
        with torch.inference_mode():
            for kind in dict.fromkeys(request.request_type for request in flat):
                repeated = [
                    request
                    for request in flat
                    if request.request_type == kind
                    for _ in range(request.repeats or 1)
                ]
                answers = getattr(harness, kind)(repeated, disable_tqdm=True)
                for request, answer in zip(repeated, answers, strict=True):
                    request.resps.append(answer)
        self._task._instances = flat  # where its filters look
        self._task.apply_filters()
        return SequenceLosses(
            [self._loss(place, requests) for place, requests in zip(chosen, asked, strict=True)]
        )

    def likelihood_loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """Surprise at the right answer, scaled so that Fisher's estimate is per document."""
        surprise = self.loss(model, split, index)
        return surprise / math.sqrt(self.tokens_per_sequence)

    def loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """Surprise at the right answer in nats, with a graph: an accuracy has no gradient.

        Where there are choices it is the cross-entropy among them.

        Raises:
            ValueError: The document has not one right answer.
        """
        place = self._splits[split][index]
        pairs, right = _answers(self._task, self._documents[place], self._requests[place])
        harness = self._harness_of(model)
        found = torch.stack([_log_likelihood(harness, *pair) for pair in pairs])
        return -(found if len(pairs) == 1 else found.log_softmax(0))[right]

    def _loss(self, place: int, requests: Sequence[Any]) -> float:
        """Of one document whose requests are answered and filtered."""
        first = next(iter(requests[0].filtered_resps))
        answers = [request.filtered_resps[first] for request in requests]
        value = self._task.process_results(self._documents[place], answers)[self._metric]
        if not isinstance(value, int | float | np.number):
            raise ValueError(
                f"{self.name} has no value for a single document, got {type(value).__name__}: "
                "choose a metric that is a mean over documents, such as acc or exact_match"
            )
        return 1.0 - float(value) if self._higher_is_better else float(value)

    def _harness_of(self, model: nn.Module) -> Any:
        """The model as ``lm-eval`` runs it."""
        if self._harness is None or self._harness.model is not model:
            self._harness = _wrap(model, self._tokenizer, self._batch_size)
        return self._harness

    def _num_tokens(self, request: Any) -> int:
        """Tokens that one request sends through the model."""
        text = "".join(part for part in request.args if isinstance(part, str))
        options = [part for part in request.args if isinstance(part, Mapping)]
        written = sum(int(part.get("max_gen_toks", _MOST_GENERATED)) for part in options)
        return len(self._tokenizer(text, verbose=False)["input_ids"]) + written


def _load_task(spec: str | Mapping[str, Any]) -> Any:
    """The one task of a specification."""
    try:
        with quiet_transformers():
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            "task accuracy needs lm-eval: pip install 'model-allocator[lm-eval]'"
        ) from error
    given = dict(spec) if isinstance(spec, Mapping) else spec
    local = not isinstance(given, str) or given.endswith((".yaml", ".yml"))
    try:
        loaded = TaskManager(include_defaults=not local).load([given])["tasks"]
    except (KeyError, TypeError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"lm-eval cannot load the task {spec!r}: {reason}") from error
    if len(loaded) != 1:
        names = ", ".join(loaded) or "none"
        raise ValueError(
            f"expected one task, {spec!r} has {len(loaded)}: {names}; give one of them"
        )
    return next(iter(loaded.values()))


def _find_metric(task: Any, metric: str | None) -> str:
    """The metric asked for, or the task's first, if it is a mean over documents."""
    from lm_eval.api.registry import get_aggregation

    known = dict(task.aggregation())
    name = next(iter(known)) if metric is None else metric
    if name not in known:
        raise ValueError(f"{task.task_name} has no metric {name!r}; it has {', '.join(known)}")
    if known[name] is not get_aggregation("mean"):
        raise ValueError(
            f"the metric {name!r} of {task.task_name} is no mean over documents, so a document has "
            "no loss of its own; choose another with metric="
        )
    return name


def _draw(task: Any, num_documents: int | None, seed: int) -> list[dict[str, Any]]:
    """The documents to use, in the task's order."""
    documents = list(task.eval_docs)
    kept = len(documents) if num_documents is None else min(num_documents, len(documents))
    if kept < _LEAST_DOCUMENTS:
        raise ValueError(
            f"{task.task_name}: expected at least {_LEAST_DOCUMENTS} documents to make four splits "
            f"of, got {kept} of {len(documents)}"
        )
    drawn = np.random.default_rng([seed, 1]).permutation(len(documents))[:kept]
    return [documents[place] for place in sorted(drawn.tolist())]


def _build_requests(
    task: Any, documents: Sequence[Mapping[str, Any]], seed: int
) -> list[list[Any]]:
    """For each document its requests in order, with its few-shot examples."""
    task.set_fewshot_seed(seed)
    found = []
    for place, document in enumerate(documents):
        context = task.fewshot_context(
            document,
            num_fewshot=task.config.num_fewshot or 0,
            gen_prefix=task.doc_to_prefix(document),
        )
        metadata = (task.task_name, place, task.config.repeats)
        made = task.construct_requests(doc=document, ctx=context, metadata=metadata)
        found.append(made if isinstance(made, list) else [made])
    return found


def _fresh(request: Any) -> Any:
    """The same request with no answers yet."""
    made = copy(request)
    made.resps, made.filtered_resps = [], {}
    return made


def _wrap(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    level = logging.getLogger("lm_eval").level
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is loaded
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        logging.getLogger("lm_eval").setLevel(level)


def _answers(
    task: Any, document: Mapping[str, Any], requests: Sequence[Any]
) -> tuple[list[tuple[str, str]], int]:
    """(context, continuation) of each possible answer, and which is right."""
    if task.OUTPUT_TYPE == "multiple_choice":
        pairs = [request.args[:2] for request in requests if request.args[0]]
        right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        if isinstance(right, str):
            right = task.doc_to_choice(document).index(right)
        if not isinstance(right, int) or not 0 <= right < len(pairs):
            raise ValueError(f"{task.task_name}: expected one right choice, got {right!r}")
        return pairs, right
    context = requests[0].args[0]
    answer = task.doc_to_target(document)
    if task.OUTPUT_TYPE == "loglikelihood_rolling" or not isinstance(answer, str | int | float):
        raise ValueError(f"{task.task_name}: expected one right answer, got {answer!r}")
    gap = task.config.target_delimiter if task.OUTPUT_TYPE == "generate_until" else ""
    return [(context, f"{gap}{answer}")], 0


def _log_likelihood(harness: Any, context: str, continuation: str) -> Tensor:
    """Scalar with a graph: log-probability of a continuation, on the tokens ``lm-eval`` takes."""
    before, after = harness._encode_pair(context, continuation)
    tokens = (before + after)[-(harness.max_length + 1) :]
    inputs = torch.tensor([tokens[:-1]], device=harness.device)
    logits = harness.model(input_ids=inputs, use_cache=False).logits[0, -len(after) :]
    targets = torch.tensor(after, device=harness.device)[:, None]
    found: Tensor = logits.float().log_softmax(-1).gather(-1, targets).sum()
    return found
