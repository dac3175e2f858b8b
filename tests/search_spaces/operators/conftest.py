"""What several operators are tested on."""

from pathlib import Path

import pytest
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def trained():
    """A matrix of the tiny language model."""
    path = Path(__file__).parents[2] / "assets" / "tiny_llama" / "model.safetensors"
    return load_file(path)["model.layers.2.mlp.down_proj.weight"].float()
