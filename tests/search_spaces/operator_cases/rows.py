"""Pruning with rows of different lengths."""

from operator_cases import Ladder, fisher_error, squared_error
from operator_cases.sparsity import INT4, SPARSITIES, moment_error
from search_spaces.operators import RowPrune

LADDERS = (
    Ladder(tuple(RowPrune(s, score="magnitude") for s in SPARSITIES), squared_error),
    Ladder(tuple(RowPrune(s) for s in SPARSITIES[1:]), moment_error),
    Ladder(tuple(RowPrune(s, score="fisher", floor=0.2) for s in (0.9, 0.5, 0.2)), fisher_error),
    Ladder(tuple(RowPrune(s, "trim") for s in (0.9, 0.7, 0.5, 0.1)), moment_error),
    Ladder((RowPrune(0.5, "trim", "fisher", INT4), RowPrune(0.2, "trim", "d_pruner", INT4))),
    Ladder((RowPrune(0.7, score="factored_fisher"),)),
    Ladder((RowPrune(0.9, keep_exactly=5, floor=0.0),)),
    Ladder((RowPrune(0.5, values=INT4),)),
)
