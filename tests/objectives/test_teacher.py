"""The lumped KL: exact with the whole vocabulary, a tight lower bound with less of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language import trained
from torch.nn.functional import kl_div, log_softmax

from objectives.teacher import TeacherCache, keep_top, kl_per_token
from search_spaces.operators import RoundToNearest

# Below this a tail, which is one minus a float32 sum, is not known.
RESOLUTION = 2e-6


def full_kl(teacher, student):
    """KL over the whole vocabulary in double precision."""
    ours, theirs = (log_softmax(logits.double(), -1) for logits in (student, teacher))
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def lumped_kl(teacher, student, k):
    return kl_per_token(*keep_top(teacher, k), student).double()


def uncertainty(teacher, student, k):
    """Most by which rounding can move the lumped KL of each position."""
    kept = teacher.topk(k, -1).indices
    theirs, ours = (
        logits.double().softmax(-1).scatter(-1, kept, 0.0).sum(-1) for logits in (teacher, student)
    )
    tail = theirs * torch.log1p(RESOLUTION / ours.clamp_min(1e-30))
    return 1e-5 * (1 + full_kl(teacher, student)) + tail


@st.composite
def pairs(draw):
    """(1, 4, vocabulary) logits of a teacher and a student, alike or not, flat or peaked."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (1, 4, draw(st.integers(2, 40)))
    scale, noise = (draw(st.sampled_from((0.1, 1.0, 4.0, 12.0))) for _ in range(2))
    teacher = scale * torch.randn(shape, generator=generator)
    return teacher, teacher + noise * torch.randn(shape, generator=generator)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(pair=pairs(), beyond=st.integers(0, 3))
def test_whole_vocabulary_is_the_full_kl(pair, beyond):
    teacher, student = pair
    expected = full_kl(teacher, student)
    for k in (0, teacher.shape[-1] + beyond):
        error = (lumped_kl(teacher, student, k) - expected).abs().max()
        assert error <= 1e-6 * max(1.0, student.abs().max())


@settings(derandomize=True, deadline=None, max_examples=200)
@given(pair=pairs())
def test_kl_grows_with_k_up_to_the_full_one_and_is_never_negative(pair):
    teacher, student = pair
    full = full_kl(teacher, student)
    before, before_uncertain = torch.zeros_like(full), torch.zeros_like(full)
    for k in range(1, teacher.shape[-1] + 1):
        now, uncertain = lumped_kl(teacher, student, k), uncertainty(teacher, student, k)
        assert (now >= before - before_uncertain - uncertain).all()
        assert (now <= full + uncertain).all()
        before, before_uncertain = now, uncertain


@settings(derandomize=True, deadline=None, max_examples=100)
@given(pair=pairs(), k=st.integers(0, 45))
def test_identical_logits_have_no_kl(pair, k):
    teacher, _ = pair
    shifted = teacher + 3.0  # logits are defined up to a constant
    assert lumped_kl(teacher, teacher, k).abs().max() < 3e-6
    assert lumped_kl(teacher, shifted, k).abs().max() < 3e-6


def test_student_who_is_sure_of_what_the_teacher_doubts():
    """The student's tail is far below float32's resolution of 1; the bound must hold all the same.

    Kept: two outcomes with 0.35 of the teacher's mass each; the student leaves e-18 to the tail.
    """
    teacher = torch.tensor([[[0.35, 0.35, 0.1, 0.1, 0.1]]]).log()
    for lead in (14.0, 16.0, 18.0, 20.0):
        student = torch.tensor([[[lead, lead, 0.0, 0.0, 0.0]]])
        full = full_kl(teacher, student)
        assert lumped_kl(teacher, student, 2) <= full * (1 + 1e-3)


def test_outcome_that_the_student_rules_out_is_infinitely_bad():
    teacher = torch.zeros(1, 1, 3)
    student = torch.tensor([[[0.0, 0.0, -torch.inf]]])
    assert lumped_kl(teacher, student, 0).item() == torch.inf


def test_outcome_that_both_rule_out_costs_nothing():
    """Some models mask unused vocabulary with minus infinity."""
    teacher = torch.tensor([[[1.0, 0.0, -torch.inf]]])
    student = torch.tensor([[[0.0, 1.0, -torch.inf]]]).requires_grad_()
    expected = full_kl(teacher[..., :2], student[..., :2])
    for k in (0, 2):
        assert torch.allclose(lumped_kl(teacher, student, k), expected, atol=1e-6)
    kl_per_token(*keep_top(teacher, 0), student).sum().backward()
    assert torch.isfinite(student.grad).all()


def test_half_precision_logits_are_compared_in_float32():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 1, 8, 50, generator=generator).bfloat16()
    exact = full_kl(teacher, student)
    assert torch.allclose(lumped_kl(teacher, student, 0), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [0, 5])
def test_cache_survives_saving(k):
    indices, log_probs = keep_top(torch.randn(2, 3, 20), k)
    cache = TeacherCache(indices, log_probs)
    again = TeacherCache.from_tensors(cache.tensors("search"), "search")
    assert again.full is (k == 0)
    assert torch.equal(again.indices, indices)
    assert torch.equal(again.log_probs, log_probs)


@pytest.mark.parametrize(("k", "most"), [(256, 0.03), (64, 0.15)])
def test_top_k_loses_little_of_a_trained_models_kl(k, most):
    """Share of the full KL that lumping hides, at 3 bits; 64 of 1,024 outcomes must lose some."""
    model, calibration = trained()
    tokens = calibration.splits["search"][:4]
    with torch.no_grad():
        teacher = model(input_ids=tokens).logits
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(RoundToNearest(3, 32).apply(parameter, None))
        student = model(input_ids=tokens).logits
    full = full_kl(teacher, student).mean().item()
    hidden = 1 - lumped_kl(teacher, student, k).mean().item() / full
    assert full > 0.03
    assert 0 < hidden < most
    if k == 64:
        assert hidden > 0.001, "the bound on what is hidden says nothing"
