"""Named menus: what a unit may become. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.operators import Keep, Operator, RoundToNearest
from search_spaces.registry import Registry

_BITS = (2, 3, 4, 5, 6, 8)
_TYPICAL_MATRIX = (4096, 4096)


@dataclass(frozen=True)
class Preset:
    """A menu under a name.

    Attributes:
        name: What ``--space`` takes.
        summary: One line for lists.
        operators: Offered for every unit; every menu has ``Keep``, which a user may bar.
    """

    name: str
    summary: str
    operators: tuple[Operator, ...]

    @property
    def bits_per_weight(self) -> tuple[float, float]:
        """Least and most bits per weight of a 4096 x 4096 matrix, all metadata included."""
        rows, columns = _TYPICAL_MATRIX
        sizes = [
            8 * operator.bytes((rows, columns)) / (rows * columns) for operator in self.operators
        ]
        return min(sizes), max(sizes)


def _bits(group_size: int, *, symmetric: bool) -> tuple[Operator, ...]:
    widths = (RoundToNearest(bits, group_size, symmetric) for bits in _BITS)
    return (*widths, Keep())


PRESETS: Registry[Preset] = Registry(
    "space",
    {
        preset.name: preset
        for preset in (
            Preset(
                "bits",
                "round to nearest at 2, 3, 4, 5, 6 or 8 bits in groups of 64",
                _bits(64, symmetric=True),
            ),
            Preset(
                "bits-asymmetric",
                "the same with zero points",
                _bits(64, symmetric=False),
            ),
            Preset(
                "bits-g32",
                "round to nearest at 2, 3, 4, 5, 6 or 8 bits in groups of 32",
                _bits(32, symmetric=True),
            ),
            Preset(
                "bits-g128",
                "round to nearest at 2, 3, 4, 5, 6 or 8 bits in groups of 128",
                _bits(128, symmetric=True),
            ),
        )
    },
    entry_point_group="model_allocator.spaces",
)
