"""Presets are well formed and say truly what they span."""

import subprocess
import sys

import pytest

from search_spaces.operators import Keep
from search_spaces.presets import PRESETS, TYPICAL_UNIT
from search_spaces.space import build_menu


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_menu(name):
    preset = PRESETS[name]
    labels = [operator.label for operator in preset.operators]
    assert preset.name == name
    assert len(set(labels)) == len(labels), "pins address operators by label"
    assert Keep() in preset.operators
    fitting = [operator for operator in preset.operators if not TYPICAL_UNIT.unfit(operator)]
    assert len(fitting) == len(preset.operators)
    sizes = [8 * o.bytes / TYPICAL_UNIT.num_weights for o in build_menu(TYPICAL_UNIT, fitting)]
    assert preset.bits_per_weight == (sizes[0], sizes[-1])
    assert sizes[-1] == 16.0, "no option is larger than the dense matrix"
    assert len(preset.operators) <= 16


@pytest.mark.parametrize(
    ("name", "least"),
    [("bits", 2.25), ("bits-asymmetric", 2.28125), ("bits-g32", 2.5), ("bits-g128", 2.125)],
)
def test_span_includes_scales_and_zero_points(name, least):
    assert PRESETS[name].bits_per_weight == (least, 16.0)


def test_presets_ties_and_space_files_load_without_torch():
    code = (
        "import sys, search_spaces.presets, search_spaces.ties, search_spaces.yaml_space;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
