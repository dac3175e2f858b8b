"""Hidden states and embeddings as tasks: decoders and encoders, padding, curvature, caches."""

import pytest
import torch
from language import assert_same_weights, random_model, random_tokens, snapshot
from transformers import BertConfig, BertModel

from allocator.api import AllocateOptions, allocate_task
from allocator.config import CapsConfig, SearchConfig
from objectives.bank import Bank
from objectives.calibration import SPLITS
from objectives.evaluation import Fidelity
from objectives.evaluator import Evaluator
from objectives.representation_task import RepresentationTask, last_hidden_states
from objectives.statistics import collect_statistics
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, RoundToNearest

EVERY = (0, 1, 2, 3)
OBJECTIVES = pytest.mark.parametrize("objective", ["hidden_state", "embedding"])
MODELS = pytest.mark.parametrize("kind", ["llama", "bert"])


def make_model(kind):
    if kind == "llama":
        return random_model("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=61, intermediate_size=48, **sizes)
    model = BertModel(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.25 * torch.randn(parameter.shape))
    return model


def matrices(model):
    """Weights of the blocks' linear layers."""
    linear = [m for name, m in model.named_modules() if "layer" in name]
    return [m.weight for m in linear if isinstance(m, torch.nn.Linear)]


def damage(model, bits=3):
    with torch.no_grad():
        for weight in matrices(model):
            weight.data = RoundToNearest(bits, 16).apply(weight, None)


def prepared(model, calibration, **options):
    task = RepresentationTask(calibration, **options)
    assert task.prepare(model, "search") == calibration.splits["search"].numel()
    assert task.prepare(model, "search") == 0
    return task


def padding(calibration, seed=0):
    """A mask that leaves the first few tokens of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, tokens in calibration.splits.items():
        ends = torch.randint(3, tokens.shape[1], (len(tokens), 1), generator=generator)
        masks[name] = (torch.arange(tokens.shape[1]) < ends).long()
    return masks


def states_of(model, tokens, mask=None):
    """What transformers itself gives."""
    body = model if isinstance(model, BertModel) else model.model
    extra = {} if mask is None else {"attention_mask": mask}
    with torch.no_grad():
        return body(input_ids=tokens, **extra).last_hidden_state.double()


def expected_losses(objective, dense, now, mask):
    weights = mask[..., None].double()
    if objective == "hidden_state":
        errors = ((now - dense) * weights).square().sum((1, 2))
        return (errors / (dense * weights).square().sum((1, 2))).tolist()
    pooled = [(states * weights).sum(1) / weights.sum(1) for states in (dense, now)]
    return (1 - torch.nn.functional.cosine_similarity(*pooled)).tolist()


@MODELS
@OBJECTIVES
@pytest.mark.parametrize("padded", [False, True])
def test_losses_are_their_definitions(kind, objective, padded):
    model, calibration = make_model(kind), random_tokens()
    tokens = calibration.splits["search"]
    masks = padding(calibration) if padded else None
    mask = masks["search"] if padded else torch.ones_like(tokens)
    task = prepared(model, calibration, masks=masks, objective=objective, batch_size=3)
    assert task.name == objective
    assert task.sequence_losses(model, "search", EVERY).nats == pytest.approx([0] * 4, abs=1e-9)
    dense = states_of(model, tokens, mask if padded else None)
    damage(model)
    now = states_of(model, tokens, mask if padded else None)
    found = task.sequence_losses(model, "search", EVERY)
    assert found.nats == pytest.approx(expected_losses(objective, dense, now, mask), rel=1e-4)
    assert min(found.nats) > 1e-4
    assert found.cross_entropy_nats == ()
    part = task.sequence_losses(model, "search", (3, 1)).nats
    assert part == pytest.approx([found.nats[3], found.nats[1]], rel=1e-5)


def test_padding_does_not_matter():
    """Other tokens under the padding give the same losses; other text does not."""
    model, calibration = make_model("bert"), random_tokens()
    masks = padding(calibration)
    splits = {name: tokens.clone() for name, tokens in calibration.splits.items()}
    for name, tokens in splits.items():
        tokens[masks[name] == 0] = 7
    other = type(calibration)("other", splits)
    losses = []
    for text in (calibration, other):
        model = make_model("bert")
        task = prepared(model, text, masks=masks)
        damage(model)
        losses.append(task.sequence_losses(model, "search", EVERY).nats)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@MODELS
@OBJECTIVES
def test_loss_with_a_graph_is_the_measured_one(kind, objective):
    model = make_model(kind)
    task = prepared(model, random_tokens(), objective=objective)
    damage(model)
    measured = task.sequence_losses(model, "search", EVERY).nats
    model.requires_grad_(True)
    for index in EVERY:
        model.zero_grad()
        loss = task.loss(model, "search", index)
        assert loss.item() == pytest.approx(measured[index], rel=1e-4)
        loss.backward()
        assert max(weight.grad.abs().max().item() for weight in matrices(model)) > 0


@MODELS
@OBJECTIVES
def test_fisher_estimates_the_distance(kind, objective):
    """Half the Fisher-weighted square of a small change of weights is the loss it causes."""
    model = make_model(kind)
    calibration = random_tokens(statistics=64, search=64, guard=1, heldout=1)
    task = RepresentationTask(calibration, objective=objective)
    space = build_space(model, SpaceRequest())
    found = collect_statistics(model, task, space, needs={"fisher"}, meter=TokenMeter())
    task.prepare(model, "search")
    generator = torch.Generator().manual_seed(3)
    ratios = []
    for name in [unit.members[0].name for unit in space.units][1:6]:
        weight = model.get_parameter(name)
        before = weight.data.clone()
        estimate = measured = 0.0
        for _ in range(8):
            change = 2e-3 * torch.randn(weight.shape, generator=generator)
            estimate += 0.5 * float((found[name].fisher * change.square()).sum()) / 8
            weight.data = before + change
            losses = task.sequence_losses(model, "search", range(64)).nats
            measured += sum(losses) / 64 / 8
        weight.data = before
        ratios.append(estimate / measured)
    assert 0.6 < min(ratios) <= max(ratios) < 1.7, ratios
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.2)


def test_projection_is_the_same_each_time():
    model = make_model("llama")
    task = RepresentationTask(random_tokens())
    values = [task.likelihood_loss(model, "statistics", i).item() for i in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_heads_are_not_run_where_they_can_be_left_out():
    model = make_model("llama")
    rows = []
    model.lm_head.register_forward_hook(lambda m, args, output: rows.append(output.shape[1]))
    last_hidden_states(model, random_tokens().splits["search"])
    assert rows == [1]


def test_measures_the_caches_that_are_swapped_in():
    """A quantized cache is hooked to the whole model, not to its body."""
    model = make_model("llama")
    space = build_space(model, SpaceRequest(space="kv", context=16))
    task = RepresentationTask(random_tokens())
    evaluator = Evaluator(model, task, Bank(model, space), TokenMeter())
    dense = tuple([o.operator for o in menu].index(Keep()) for menu in space.menus)
    caches = tuple(0 if unit.is_cache else dense[i] for i, unit in enumerate(space.units))
    fidelity = Fidelity("search", 0, 4)
    rounded = evaluator(dense, fidelity).loss_nats  # weights to 16 bits
    assert evaluator(caches, fidelity).loss_nats > 100 * rounded


@OBJECTIVES
def test_states_on_disk_serve_later_tasks(objective, tmp_path):
    model, calibration = make_model("llama"), random_tokens()
    masks = padding(calibration)
    first = prepared(model, calibration, objective=objective, cache_folder=tmp_path)
    prepared(model, calibration, objective=objective, cache_folder=tmp_path, masks=masks)
    assert len(list(tmp_path.iterdir())) == 2
    damage(model)  # a second task that ran the model now would take it for the dense one
    second = RepresentationTask(calibration, objective=objective, cache_folder=tmp_path)
    assert second.prepare(model, "search") == 0
    losses = [task.sequence_losses(model, "search", EVERY).nats for task in (first, second)]
    assert losses[0] == losses[1]
    assert min(losses[0]) > 1e-4


def test_states_are_kept_in_the_models_type():
    model = make_model("llama").bfloat16()
    task = prepared(model, random_tokens())
    assert task._dense["search"].dtype == torch.bfloat16
    assert task.sequence_losses(model, "search", EVERY).nats == [0.0] * 4


def test_allocates_an_encoder():
    """Bits of a BERT by the embeddings it makes, padding and all."""
    model, calibration = make_model("bert"), random_tokens(search=6)
    before = snapshot(model)
    task = RepresentationTask(calibration, masks=padding(calibration), objective="embedding")
    options = AllocateOptions(
        search=SearchConfig(scorer="fisher", scorers=("fisher",), batch=3),
        caps=CapsConfig(trials=4),
        space=SpaceRequest(space="bits"),
    )
    plan = allocate_task(model, "4bpw", task=task, options=options).plan
    assert plan.objective == "embedding"
    assert plan.loss_unit == "1 - cosine"
    assert 0 < plan.heldout_nats["returned"].nats < 0.1
    assert plan.heldout_nats["returned"].perplexity is None
    fixed = {tensor.name for tensor in build_space(model, SpaceRequest()).fixed}
    searched = {name: value for name, value in before.items() if name not in fixed}
    assert_same_weights(model, model.state_dict() | searched)


def test_mistakes_are_told():
    calibration = random_tokens()
    with pytest.raises(ValueError, match="hidden_state or embedding, got 'kl'"):
        RepresentationTask(calibration, objective="kl")
    masks = {name: torch.ones_like(tokens) for name, tokens in calibration.splits.items()}
    with pytest.raises(ValueError, match="expected masks of"):
        RepresentationTask(calibration, masks={"search": masks["search"]})
    with pytest.raises(ValueError, match="expected the tokens' shape"):
        RepresentationTask(calibration, masks=masks | {"guard": torch.ones(2, 5)})
    with pytest.raises(ValueError, match="nothing but padding"):
        RepresentationTask(calibration, masks=masks | {"guard": torch.zeros(2, 12)})
    assert set(masks) == set(SPLITS)
    plain = torch.nn.Sequential(torch.nn.Embedding(61, 4))
    plain.forward = lambda input_ids: input_ids
    task = RepresentationTask(calibration)
    with pytest.raises(ValueError, match="gives no last_hidden_state"):
        task.prepare(plain, "search")
