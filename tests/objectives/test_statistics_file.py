"""Statistics on disk: read back exactly, refused when they are about something else."""

import pytest
import torch

from objectives.statistics_file import StatisticsFile, statistics_identity
from search_spaces.operators import Statistics


def some_statistics():
    return {
        "model.layers.0.mlp.up_proj.weight": Statistics(
            second_moment=torch.rand(4), hessian=torch.rand(4, 4), fisher=torch.rand(3, 4)
        ),
        "experts|odd.name": Statistics(hessian=torch.rand(2, 2)),
    }


@pytest.fixture
def file(tmp_path):
    return StatisticsFile(tmp_path / "cache" / "s.safetensors", statistics_identity("w", "t"))


def test_reads_back_the_kinds_that_were_asked_for(file):
    assert file.load() == (frozenset(), {})
    statistics = some_statistics()
    file.save(statistics, {"hessian", "fisher"})
    kinds, loaded = file.load()
    assert kinds == {"hessian", "fisher"}
    assert loaded.keys() == statistics.keys()
    for name, found in loaded.items():
        assert torch.equal(found.hessian, statistics[name].hessian)
        assert found.second_moment is None
    assert loaded["experts|odd.name"].fisher is None


def test_refuses_statistics_of_another_text(file):
    file.save(some_statistics(), {"hessian"})
    with pytest.raises(ValueError, match="other weights or another text"):
        StatisticsFile(file.path, statistics_identity("w", "u")).load()


def test_refuses_a_broken_file(file):
    file.save(some_statistics(), {"hessian"})
    file.path.write_bytes(file.path.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot read the statistics"):
        file.load()
