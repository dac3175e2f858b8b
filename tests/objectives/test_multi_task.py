"""Several tasks as one: what is summed, how weights are found, what must line up."""

import numpy as np
import pytest
import torch
from language import assert_same_weights, offering, random_model, random_tokens, snapshot, trained

from objectives.bank import Bank
from objectives.calibration import SPLITS, Calibration
from objectives.evaluation import Fidelity
from objectives.evaluator import Evaluator
from objectives.function_task import FunctionTask
from objectives.language_objectives import (
    OBJECTIVES,
    language_task,
    language_tasks,
    refuse_shared_text,
)
from objectives.language_task import LanguageTask
from objectives.multi_task import (
    NUM_PROBES,
    MultiTask,
    adaptive_weights,
    probe_assignments,
    probe_weights,
)
from objectives.representation_task import RepresentationTask
from objectives.statistics import collect_statistics
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, RoundToNearest

EVERY = (0, 1, 2, 3)


def other_tokens(length=9, **counts):
    """A second text, cut shorter."""
    tokens = random_tokens(length=length + 1, **counts)
    return Calibration.from_tensors(
        {name: rows[:, 1:] for name, rows in tokens.splits.items()}, "second"
    )


def damage(model, bits=3):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.data = RoundToNearest(bits, 16).apply(parameter, None)


@pytest.fixture
def model():
    return random_model("llama")


@pytest.fixture
def space(model):
    space = build_space(model, SpaceRequest())
    return offering(space, RoundToNearest(2, 16), RoundToNearest(4, 16), Keep())


def test_the_loss_is_the_weighted_mean(model):
    first = LanguageTask(random_tokens(), top_k=0)
    second = RepresentationTask(other_tokens())
    both = MultiTask([first, second], [1.0, 3.0])
    assert both.weights == (0.5, 1.5)
    assert both.name == "kl + hidden_state"
    assert both.tokens_per_sequence == 12 + 9
    assert [both.num_sequences(split) for split in SPLITS] == [3, 4, 2, 2]
    assert both.prepare(model, "search") == 4 * (12 + 9)
    assert both.prepare(model, "search") == 0
    damage(model)
    found = both.sequence_losses(model, "search", (3, 1))
    apart = [task.sequence_losses(model, "search", (3, 1)) for task in (first, second)]
    expected = [(a + 3 * b) / 4 for a, b in zip(apart[0].nats, apart[1].nats, strict=True)]
    assert found.nats == pytest.approx(expected, rel=1e-9)
    assert found.cross_entropy_nats == apart[0].cross_entropy_nats
    losses = [both.loss(model, "search", index).item() for index in (3, 1)]
    assert losses == pytest.approx(expected, rel=1e-4)


def test_equal_tasks_are_each_of_them(model):
    tasks = [LanguageTask(random_tokens()) for _ in range(3)]
    alone, together = LanguageTask(random_tokens()), MultiTask(tasks)
    assert together.weights == (1.0, 1.0, 1.0)
    assert together.name == "kl"
    for task in (alone, together):
        task.prepare(model, "search")
    damage(model)
    losses = [task.sequence_losses(model, "search", EVERY).nats for task in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_one_task_is_itself(model):
    alone, wrapped = LanguageTask(random_tokens()), MultiTask([LanguageTask(random_tokens())])
    for task in (alone, wrapped):
        task.prepare(model, "search")
    damage(model)
    assert wrapped.sequence_losses(model, "search", EVERY) == alone.sequence_losses(
        model, "search", EVERY
    )
    for name in ("loss", "likelihood_loss"):
        values = [getattr(task, name)(model, "search", 2).item() for task in (alone, wrapped)]
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_fishers_add_up_by_weight():
    """Of tasks whose gradients are uncorrelated: the sum of weight times each one's own."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    directions = torch.eye(2)
    names = ("statistics", "search", "guard", "heldout")

    def task(column, scale):
        # The batches' gradients have mean zero, as those of a likelihood at its optimum.
        batches = [sign * scale * directions[column] for sign in (1.0, -1.0, 1.0, -1.0)]
        return FunctionTask(lambda m, batch: m(batch).sum(), dict.fromkeys(names, batches))

    space = build_space(model, SpaceRequest(space="bits"))
    one, two = task(0, 2.0), task(1, 5.0)
    fishers = [
        collect_statistics(model, t, space, needs={"fisher"}, meter=TokenMeter())["0.weight"].fisher
        for t in (one, two, MultiTask([one, two], [1.0, 3.0]))
    ]
    assert torch.allclose(fishers[2], 0.25 * fishers[0] + 0.75 * fishers[1])
    assert fishers[2].tolist() == [[pytest.approx(0.25 * 4), pytest.approx(0.75 * 25)]]


def test_evaluations_count_the_tokens_of_every_task(model, space):
    meter = TokenMeter()
    task = MultiTask([LanguageTask(random_tokens()), LanguageTask(other_tokens())])
    evaluator = Evaluator(model, task, Bank(model, space), meter)
    evaluation = evaluator((0,) * len(space.units), Fidelity("search", 1, 2))
    assert evaluation.num_tokens == meter.counts["search"] == 2 * (12 + 9)
    assert meter.counts["teacher"] == 4 * (12 + 9)
    assert evaluation.loss_nats > 0.01


# AdapMTL's weights


def test_adaptive_weights_are_the_published_rule():
    losses = [[1.0, 2.0], [2.0, 2.5], [4.0, 2.0]]
    first = (1 / 2 + 2 / 4) / 2
    second = (0.5 / 2.5 + 0.5 / 2.0) / 2
    scale = 2 / (first + second)
    assert adaptive_weights(losses) == pytest.approx((first * scale, second * scale))
    latest = (2 / 4, 0.5 / 2.0)
    expected = tuple(2 * value / sum(latest) for value in latest)
    assert adaptive_weights(losses, window=1) == pytest.approx(expected)
    assert sum(adaptive_weights(np.random.default_rng(0).random((9, 5)))) == pytest.approx(5)


def test_adaptive_weights_do_not_depend_on_a_losss_unit():
    losses = np.random.default_rng(1).random((5, 3))
    assert adaptive_weights(losses * [1.0, 100.0, 0.01]) == pytest.approx(adaptive_weights(losses))


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([[1.0, 2.0]], "two steps"),
        ([[1.0, 2.0], [float("nan"), 1.0]], "finite"),
        ([[1.0, 2.0], [2.0, 2.0]], "task 1 does not react"),
        ([[1.0, 2.0], [0.0, 1.0]], "exactly zero"),
    ],
)
def test_losses_without_weights_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        adaptive_weights(losses)


def test_a_window_holds_a_change():
    with pytest.raises(ValueError, match="at least one change"):
        adaptive_weights([[1.0], [2.0]], window=0)


def test_probes_go_from_the_dearest_to_the_cheapest(space):
    probes = probe_assignments(space)
    assert len(probes) == NUM_PROBES
    sizes = [space.bytes(probe) for probe in probes]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (space.most_bytes, space.least_bytes)
    assert probes == probe_assignments(space)


def test_probe_weights_are_found_from_measured_losses_and_leave_no_trace(space, model):
    before, meter = snapshot(model), TokenMeter()
    tasks = [RepresentationTask(random_tokens()), LanguageTask(other_tokens(), top_k=0)]
    bank = Bank(model, space)
    weights = probe_weights(model, tasks, bank, meter)
    assert_same_weights(model, before)
    assert sum(weights) == pytest.approx(2, rel=1e-5)
    assert meter.counts == {"probes": (3 + 3 * NUM_PROBES) * (12 + 9)}
    table = []
    for probe in probe_assignments(space):
        bank.swap(probe)
        losses = [task.sequence_losses(model, "statistics", range(3)).nats for task in tasks]
        table.append([sum(values) / 3 for values in losses])
    bank.restore()
    assert weights == pytest.approx(adaptive_weights(table), rel=1e-5)
    assert weights == probe_weights(model, tasks, Bank(model, space), TokenMeter())


def test_a_text_whose_loss_reacts_more_weighs_more():
    """The trained model's cross-entropy on noise moves more for its size than on real text."""
    model, calibration = trained()
    shapes = {name: tokens.shape for name, tokens in calibration.splits.items()}
    generator = torch.Generator().manual_seed(0)
    noise = Calibration.from_tensors(
        {name: torch.randint(0, 1024, shape, generator=generator) for name, shape in shapes.items()}
    )
    space = offering(
        build_space(model, SpaceRequest()),
        *(RoundToNearest(bits, 64) for bits in (2, 3, 4)),
        Keep(),
    )
    tasks = [LanguageTask(text, objective="cross_entropy") for text in (calibration, noise)]
    text, noise = probe_weights(model, tasks, Bank(model, space), TokenMeter())
    assert noise > 1.2 * text


# What must line up


def test_mistakes_are_told():
    one = LanguageTask(random_tokens())
    with pytest.raises(ValueError, match="at least one task"):
        MultiTask([])
    with pytest.raises(ValueError, match="search splits have 4, 5 sequences"):
        MultiTask([one, LanguageTask(random_tokens(search=5))])
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("inf")], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="weights"):
            MultiTask([one, one], weights)


def test_objectives_by_name(model):
    for name in OBJECTIVES:
        task = language_task(name, random_tokens())
        assert task.name == {"perplexity": "cross_entropy"}.get(name, name)
    with pytest.raises(ValueError, match=r"one of kl, .*, got 'accuracy'"):
        language_task("accuracy", random_tokens())
    texts = (random_tokens(), other_tokens())
    assert isinstance(language_tasks("kl", texts[:1], ()), LanguageTask)
    assert language_tasks("kl", texts, (1.0, 4.0)).weights == (0.4, 1.6)


def test_minimising_perplexity_is_minimising_its_logarithm(model):
    task = language_task("perplexity", random_tokens())
    task.prepare(model, "search")
    dense = np.array(task.sequence_losses(model, "search", EVERY).cross_entropy_nats)
    damage(model)
    found = task.sequence_losses(model, "search", EVERY)
    ratio = np.exp(found.cross_entropy_nats) / np.exp(dense)
    assert found.nats == pytest.approx(np.log(ratio).tolist(), abs=1e-6)


def test_texts_may_not_share_what_another_split_sees():
    text = random_tokens()
    refuse_shared_text([text, other_tokens()])
    refuse_shared_text([text, text])
    splits = dict(other_tokens(length=12).splits)
    splits["heldout"] = text.splits["search"][:2]
    with pytest.raises(ValueError, match="in its search split, which is in the heldout split"):
        refuse_shared_text([text, Calibration.from_tensors(splits, "second")])
