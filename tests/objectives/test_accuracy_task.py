"""Task accuracy through lm-eval, on a multiple-choice task over local data."""

import json
import math
import random
import re
from importlib.util import find_spec

import pytest
import torch
from language import ASSETS, assert_same_weights, snapshot, trained

from allocator.api import AllocateOptions, allocate_task
from allocator.config import CapsConfig, SearchConfig
from objectives.accuracy_task import AccuracyTask
from objectives.calibration import SPLITS
from objectives.loading import load_model
from objectives.multi_task import MultiTask
from search_spaces.build import SpaceRequest
from search_spaces.operators import RoundToNearest

with_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: it is an optional extra"
)
# What lm-eval and the packages under it warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

NUM_DOCUMENTS = 24
CONFIG = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
num_fewshot: {shots}
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}}
"""


def documents():
    """Which of four phrases goes on from the beginning of a sentence?"""
    text = " ".join((ASSETS / "persuasion.txt").read_text().split())
    sentences = [s.split() for s in re.split(r"(?<=[.;]) ", text)]
    long = [words for words in sentences if len(words) > 18][:NUM_DOCUMENTS]
    rng = random.Random(0)
    found = []
    for words in long:
        others = rng.sample([other for other in long if other is not words], 3)
        choices = [" ".join(w[12:17]) for w in (words, *others)]
        order = rng.sample(range(4), 4)
        found.append(
            {
                "question": " ".join(words[:12]),
                "choices": [choices[place] for place in order],
                "answer": order.index(0),
            }
        )
    return found


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Writes a task and gives its path."""
    folder = tmp_path_factory.mktemp("harness")
    data = folder / "data.json"
    data.write_text("\n".join(map(json.dumps, documents())))

    def write(name="phrases", shots=0, edit=lambda text: text):
        path = folder / f"{name}.yaml"
        text = CONFIG.format(name=name, data=data, cache=folder / "cache", shots=shots)
        path.write_text(edit(text))
        return str(path)

    return write


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(str(ASSETS / "tiny_llama"), dtype="float32", device="cpu").tokenizer


@pytest.fixture
def model():
    return trained()[0]


@pytest.fixture
def task(make, tokenizer):
    return AccuracyTask(make(), tokenizer)


def harness_samples(path, model, tokenizer):
    """What lm-eval's own command finds, document by document."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=[path],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    return next(iter(found["samples"].values()))


def all_losses(task, model):
    """Loss by document, in the task's own order."""
    found = {}
    for split in SPLITS:
        count = task.num_sequences(split)
        losses = task.sequence_losses(model, split, range(count)).nats
        found |= dict(zip(task._splits[split], losses, strict=True))
    return [found[place] for place in range(len(found))]


@with_harness
@pytest.mark.parametrize("metric", [None, "acc_norm"])
def test_losses_are_what_the_harness_itself_finds(make, tokenizer, model, metric):
    task = AccuracyTask(make(), tokenizer, metric=metric)
    name = metric or "acc"
    assert task.name == f"phrases:{name}"
    samples = harness_samples(make(), model, tokenizer)
    expected = [1.0 - sample[name] for sample in sorted(samples, key=lambda s: s["doc_id"])]
    assert all_losses(task, model) == expected
    assert 0 < sum(expected) < NUM_DOCUMENTS * 0.7, "better than guessing, not perfect"


@with_harness
def test_loss_with_a_graph_is_the_cross_entropy_among_the_choices(make, task, tokenizer, model):
    samples = {s["doc_id"]: s for s in harness_samples(make(), model, tokenizer)}
    for split, index in (("statistics", 0), ("heldout", 2)):
        sample = samples[task._splits[split][index]]
        likelihoods = torch.tensor([float(answer[0][0]) for answer in sample["resps"]])
        expected = -likelihoods.log_softmax(0)[sample["target"]].item()
        model.requires_grad_(True)
        loss = task.loss(model, split, index)
        assert loss.item() == pytest.approx(expected, rel=1e-3)
        loss.backward()
        gradient = model.model.layers[0].mlp.down_proj.weight.grad
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0
        scaled = task.likelihood_loss(model, split, index).item()
        assert scaled == pytest.approx(loss.item() / math.sqrt(task.tokens_per_sequence))
        model.zero_grad()
        model.requires_grad_(False)


@with_harness
def test_splits_share_no_document_and_measuring_changes_nothing(task, model):
    places = [place for split in SPLITS for place in task._splits[split]]
    assert sorted(places) == list(range(NUM_DOCUMENTS))
    assert task.prepare(model, "search") == 0
    before = snapshot(model)
    some = task.sequence_losses(model, "search", (3, 1)).nats
    assert some == [task.sequence_losses(model, "search", [i]).nats[0] for i in (3, 1)]
    assert_same_weights(model, before)


@with_harness
def test_follows_the_weights_that_are_swapped_in(task, model):
    dense = all_losses(task, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.data = RoundToNearest(2, 64).apply(parameter, None)
    assert sum(all_losses(task, model)) > sum(dense)


@with_harness
def test_few_shot_examples_are_drawn_once(make, tokenizer):
    path = make("shots", shots=2)
    tasks = [AccuracyTask(path, tokenizer, seed=seed) for seed in (0, 0, 1)]
    prompts = [[requests[0].args[0] for requests in task._requests] for task in tasks]
    assert prompts[0] == prompts[1] != prompts[2]
    assert tasks[0].tokens_per_sequence > 2 * AccuracyTask(make(), tokenizer).tokens_per_sequence


@with_harness
def test_a_run_on_accuracy_beside_text(task, model):
    """Whole documents as sequences, through tables, search, guard and report."""
    options = AllocateOptions(
        space=SpaceRequest(space="bits"),
        search=SearchConfig(batch=4, scorer="fisher", scorers=("fisher",)),
        caps=CapsConfig(trials=3),
    )
    plan = allocate_task(model, "3bpw", task=MultiTask([task]), options=options).plan
    assert plan.objective == "phrases:acc"
    assert 0 <= plan.heldout_nats["returned"].nats <= 1
    assert plan.heldout_nats["returned"].perplexity is None
    used = task.num_sequences("heldout") * task.tokens_per_sequence
    assert plan.heldout_nats["returned"].num_tokens == used


@with_harness
def test_mistakes_are_told(make, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"mcc.*no mean over documents"):
        AccuracyTask(make(), tokenizer, metric="mcc")
    with pytest.raises(ValueError, match="no metric 'bleu'; it has acc, acc_norm, mcc"):
        AccuracyTask(make(), tokenizer, metric="bleu")
    with pytest.raises(ValueError, match=r"at least 8 documents.*got 5 of 24"):
        AccuracyTask(make(), tokenizer, num_documents=5)
    with pytest.raises(ValueError, match="lm-eval cannot load the task"):
        AccuracyTask(str(tmp_path / "nothing.yaml"), tokenizer)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_says_what_to_install(tokenizer):
    with pytest.raises(ValueError, match=r"pip install 'model-allocator\[lm-eval\]'"):
        AccuracyTask("hellaswag", tokenizer)
