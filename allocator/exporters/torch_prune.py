"""torch.nn.utils.prune: how many weights of each parameter go, and the masks that say which.

The problem: which weights a plan drops depends on the weights and on the calibration text, so a
plan alone can only say how many. ``write`` gives these counts in ``torch_prune.json``;
``write_model`` adds ``torch_prune.safetensors`` with a ``NAME_mask`` of booleans for each pruned
parameter and, where the operator changed the weights that stay, their ``NAME_orig``::

    found = load_file("torch_prune.safetensors")
    for key in [key for key in found if key.endswith("_mask")]:
        module, _, name = key.removesuffix("_mask").rpartition(".")
        prune.custom_from_mask(model.get_submodule(module), name, found[key])
    model.load_state_dict(found, strict=False)  # the changed weights

The counts are integers on purpose: a float amount is rounded there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from allocator.exporters.base import (
    DENSE,
    Mismatch,
    Receipt,
    folder_of,
    read_mapping,
    write_text,
)
from allocator.plan import Plan, PlanUnit
from search_spaces.operators import Keep, Statistics
from search_spaces.operators.sparse_storage import SparseOperator
from search_spaces.space import Member

if TYPE_CHECKING:
    from torch import Tensor

    from objectives.loading import LoadedModel

FILE_NAME = "torch_prune.json"
MASKS_NAME = "torch_prune.safetensors"
_MASK, _ORIGINAL = "_mask", "_orig"


class TorchPruneExporter:
    """Writes counts, and with the model masks, for ``torch.nn.utils.prune``."""

    name: ClassVar[str] = "torch-prune"

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write ``torch_prune.json`` into a folder.

        Raises:
            ValueError: An operator that does more than prune, or a folder that cannot be written.
        """
        counts = {
            member.name: {
                "num_pruned": _num_pruned(member, operator),
                "num_weights": member.num_weights,
                "operator": operator.label,
            }
            for _, member, operator in _pruned(plan)
        }
        path = write_text(destination, FILE_NAME, json.dumps(counts, indent=1) + "\n")
        note = (
            "The file says how many weights of each parameter go; export with --model to write "
            f"{MASKS_NAME}, which says which."
        )
        return Receipt((path,), len(plan.units), (note,))

    def write_model(
        self,
        plan: Plan,
        loaded: LoadedModel,
        destination: Path,
        statistics: Mapping[str, Statistics],
    ) -> Receipt:
        """Write the counts, the masks, and the weights where the operator changed them.

        Everything is in the model's own layout, the weights in its dtype; the model is unchanged.

        Raises:
            ValueError: The plan is for another model or does more than prune, statistics are
                missing, or the folder cannot be written.
        """
        from allocator.apply import check_loaded
        from objectives.tensor_file import write_tensors

        check_loaded(plan, loaded)
        receipt = self.write(plan, destination)
        tensors: dict[str, Tensor] = {}
        for _, member, operator in _pruned(plan):
            parameter = loaded.model.get_parameter(member.name).detach()
            stats = statistics.get(member.name, Statistics())
            mask, made = _prune(parameter, member, operator, stats)
            tensors[member.name + _MASK] = mask.cpu()
            if not bool((made == parameter * mask).all()):
                tensors[member.name + _ORIGINAL] = made.cpu()
        path = destination / MASKS_NAME
        write_tensors(tensors, path)
        changed = sum(name.endswith(_ORIGINAL) for name in tensors)
        notes = (f"Load the {changed} changed parameters after the masks.",) if changed else ()
        return Receipt((*receipt.files, path), receipt.num_units, notes)

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Compare the counts with the plan, and count the masks where they lie beside them.

        Raises:
            ValueError: No such file, or it cannot be read.
        """
        written = read_mapping(artefact, FILE_NAME)
        masks = folder_of(artefact) / MASKS_NAME
        counted = _count(masks) if masks.is_file() else None
        mismatches = []
        expected = {member.name: (entry, member, o) for entry, member, o in _pruned(plan)}
        for name, (entry, member, operator) in expected.items():
            place = entry.name if name == f"{entry.name}.weight" else f"{entry.name} ({name})"
            says = _says(_num_pruned(member, operator), member.num_weights, operator.label)
            got = _written(written.get(name))
            if got != says:
                mismatches.append(Mismatch(place, says, got))
            elif counted is not None:
                zeros, shape = counted.get(name, (0, ()))
                if (zeros, shape) != (_num_pruned(member, operator), _own_shape(member)):
                    mismatches.append(Mismatch(place, says, f"a mask {list(shape)} of {zeros}"))
        kept = {m.name: entry.name for entry in plan.units for m in entry.unit.members}
        kept |= {t.name: t.name.removesuffix(".weight") for t in plan.fixed}
        for name in sorted({*written, *(counted or ())} - expected.keys()):
            says = DENSE if name in kept else "not in the plan"
            mismatches.append(Mismatch(kept.get(name, name), says, _written(written.get(name))))
        return mismatches


def _pruned(plan: Plan) -> Iterator[tuple[PlanUnit, Member, SparseOperator]]:
    """Every parameter that loses weights; those that are kept dense need no mask."""
    for entry in plan.units:
        operator = entry.choice
        if isinstance(operator, SparseOperator):
            for member in entry.unit.members:
                yield entry, member, operator
        elif not isinstance(operator, Keep):
            raise ValueError(
                f"torch-prune cannot say {operator.label!r} (unit {entry.name!r}): it takes keep "
                "and operators that drop single weights; `allocator apply` writes any plan as a "
                "dense checkpoint"
            )


def _num_pruned(member: Member, operator: SparseOperator) -> int:
    return member.num_weights - member.num_matrices * operator.num_kept(member.matrix_shape)


def _prune(
    parameter: Tensor, member: Member, operator: SparseOperator, stats: Statistics
) -> tuple[Tensor, Tensor]:
    """The mask of a parameter and what applying the operator makes of it, in its own layout."""
    import torch

    from search_spaces.operators.members import logical, physical

    masks, made = [], []
    storage = operator.storage(member.matrix_shape)
    for matrix in logical(parameter, member):
        mask, kept = operator.select(matrix.float(), stats)
        masks.append(mask)
        packed = storage.encode(kept, mask, stats.fisher)
        made.append(storage.decode(packed).to(parameter))
    return physical(torch.stack(masks), member), physical(torch.stack(made), member)


def _own_shape(member: Member) -> tuple[int, ...]:
    """The parameter's shape as the model holds it."""
    *stack, rows, columns = member.shape
    return (*stack, columns, rows) if member.transposed else (*stack, rows, columns)


def _count(path: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Zeros and shape of every mask, by parameter; the weights beside them are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            masks = {
                name.removesuffix(_MASK): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 (no mapping)
                if name.endswith(_MASK)
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return {name: (int((mask == 0).sum()), mask.shape) for name, mask in masks.items()}


def _written(entry: object) -> str:
    if not isinstance(entry, dict):
        return DENSE if entry is None else f"unreadable: {entry!r}"
    return _says(entry.get("num_pruned"), entry.get("num_weights"), entry.get("operator"))


def _says(num_pruned: object, num_weights: object, operator: object) -> str:
    return f"{num_pruned} of {num_weights} pruned by {operator}"
