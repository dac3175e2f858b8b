"""Language models, tokens and spaces for tests: the trained tiny Llama and random ones."""

from functools import cache
from pathlib import Path

import torch
from tiny_models import tiny

from objectives.calibration import Calibration, CalibrationRequest, build_calibration
from objectives.loading import load_model
from search_spaces.operators import Keep, RoundToNearest
from search_spaces.space import SearchSpace, build_menu

ASSETS = Path(__file__).parents[1] / "assets"
MENU = (RoundToNearest(2, 16), RoundToNearest(3, 16), RoundToNearest(6, 16), Keep())
VOCABULARY = 61


@cache
def _trained_files():
    loaded = load_model(str(ASSETS / "tiny_llama"), dtype="float32", device="cpu")
    request = CalibrationRequest(
        str(ASSETS / "persuasion.txt"),
        sequence_length=64,
        num_statistics=24,
        num_search=8,
        num_guard=2,
        num_heldout=2,
    )
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    return loaded.model, weights, build_calibration(request, loaded.tokenizer)


def trained():
    """The trained tiny Llama with its own weights (loaded once), and text it never saw."""
    model, weights, calibration = _trained_files()
    model.load_state_dict(weights)
    return model, calibration


def random_model(model_type, **overrides):
    """A random model of two blocks in evaluation mode, with parameters far from their start."""
    model = tiny(model_type, device="cpu", **overrides).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model


def random_tokens(*, statistics=3, search=4, guard=2, heldout=2, length=12):
    """Tokens for models of :func:`random_model`."""
    generator = torch.Generator().manual_seed(2)
    counts = {"statistics": statistics, "search": search, "guard": guard, "heldout": heldout}
    return Calibration.from_tensors(
        {
            name: torch.randint(0, VOCABULARY, (count, length), generator=generator)
            for name, count in counts.items()
        }
    )


def offering(space, *operators):
    """The same units with another menu."""
    menus = tuple(build_menu(unit, operators) for unit in space.units)
    return SearchSpace(space.name, space.units, menus, space.fixed, space.ties)


def snapshot(model):
    """A copy of every tensor of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model, before):
    """Bit by bit."""
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
