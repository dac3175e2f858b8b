"""Numbers and claims as a reader sees them.

The problem: a report that rounds kindly or claims too much is worse than none. Every figure shown
carries the digits its standard error supports, and the verdict says "better" only where the
held-out text does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from allocator.plan import Measured, Plan
from allocator.report.view import RunView

METHOD_NAMES = {"uniform": "Uniform", "dp": "DP", "search": "Search"}
"""What is always compared, in display order."""

_CLEAR_ERRORS = 2.0
"""Standard errors that a difference must exceed before it is called better or worse."""

_RETURNED = {
    "uniform": "The uniform assignment was returned",
    "dp": "The exact plan of the additive model (DP) was returned",
    "search": "The plan found by the search was returned",
}


@dataclass(frozen=True)
class Method:
    """One of the compared assignments, measured on held-out text."""

    key: str
    measured: Measured
    is_returned: bool

    @property
    def family(self) -> str:
        """Which of :data:`METHOD_NAMES` it looks like: another table's DP plan is ``dp``."""
        return self.key.partition(":")[0]

    @property
    def name(self) -> str:
        """For tables and figures."""
        return method_name(self.key) + (" (returned)" if self.is_returned else "")


def method_name(key: str) -> str:
    """A measured assignment's name: ``dp:fisher`` is the DP plan of another scorer's table."""
    if scorer := _scorer_of(key):
        return f"DP by {scorer}"
    return METHOD_NAMES.get(key, key)


def methods(plan: Plan) -> tuple[Method, ...]:
    """Uniform, DP, search and the returned plan, as far as measured on held-out text."""
    found = []
    for key in dict.fromkeys([*METHOD_NAMES, plan.returned]):
        is_returned = plan.returned == key
        measured = plan.heldout_nats.get("returned" if is_returned else key)
        if measured is not None:
            found.append(Method(key, measured, is_returned))
    return tuple(found)


def verdict(view: RunView) -> str:
    """One sentence: what was returned, and how it compares with uniform on held-out text."""
    plan = view.plan
    opening = _opening(plan.returned)
    returned = plan.heldout_nats.get("returned")
    if returned is None:
        return f"{opening}; nothing was measured on held-out text, so nothing is claimed about it."
    loses = f"loses {with_error(returned.nats, returned.standard_error_nats)} {plan.loss_unit_text}"
    if plan.returned == "uniform":
        return (
            f"{opening}, since nothing else did better on the guard's text; "
            f"on held-out text it {loses}."
        )
    if "uniform" in plan.heldout_nats:
        return f"{opening}: on held-out text it {loses}, {_comparison(plan, 'uniform')}."
    reason = (
        "the uniform assignment could not be measured on held-out text"
        if _has_uniform(view)
        else "no uniform assignment fits the budget"
    )
    sentence = f"{opening}; {reason}, and on held-out text it {loses}"
    if plan.returned != "dp" and "dp" in plan.heldout_nats:
        sentence += f", {_comparison(plan, 'dp')}"
    return sentence + "."


def _opening(returned: str) -> str:
    if scorer := _scorer_of(returned):
        return f"The exact plan of the {scorer} table was returned"
    return _RETURNED[returned]


def _scorer_of(key: str) -> str:
    """Whose table a plan is the optimum of; empty where its key names none."""
    return key.partition(":")[2]


def _has_uniform(view: RunView) -> bool:
    """Whether a uniform assignment was tried at all."""
    plan = view.plan
    return any("uniform" in known for known in (plan.guard_nats, plan.search_nats)) or any(
        measurement.origin == "uniform" for measurement in view.measurements
    )


def _comparison(plan: Plan, key: str) -> str:
    """How the returned plan compares with a baseline, as the end of a sentence."""
    name = {"uniform": "uniform", "dp": "the DP plan"}[key]
    returned, baseline = plan.heldout_nats["returned"].nats, plan.heldout_nats[key].nats
    share = f"{number(returned / baseline, 3)} of its loss" if baseline > 0 else "its loss is zero"
    paired = plan.heldout_differences_nats.get(f"returned - {key}")
    if paired is None:
        return f"against {number(baseline)} for {name} ({share}; no paired difference is recorded)"
    error = paired.standard_error_nats
    if paired.nats == 0:
        return f"exactly as much as {name}"
    if error == 0 or abs(paired.nats) <= _CLEAR_ERRORS * error:
        return (
            f"which cannot be told from {name}: the difference is "
            f"{with_error(paired.nats, error)} nats ({share})"
        )
    amount = with_error(abs(paired.nats), error)
    if paired.nats < 0:
        return f"{amount} less than {name} ({share})"
    return f"{amount} more than {name} ({share}), although the guard's text had preferred it"


def number(value: float, digits: int = 4) -> str:
    """A plain number with so many significant digits, never in scientific notation from 1e-6 up."""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if decimals > digits + 6:
        return _signed(f"{value:.{digits - 1}e}")
    return _signed(f"{value:,.{max(0, decimals)}f}")


def with_error(value: float, error: float) -> str:
    """``0.902 ± 0.021``: two digits of the error decide; without an error it says so."""
    if error == 0:
        return f"{number(value)} (no standard error)"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    text = f"{_signed(f'{value:,.{decimals}f}')} ± {error:,.{decimals}f}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def size(num_bytes: int) -> str:
    """Bytes for people, in decimal units: ``98.3 MB``."""
    amount = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{number(amount, 3)} {unit}" if unit != "bytes" else f"{num_bytes} bytes"
        amount /= 1000
    return f"{number(amount, 3)} TB"


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text
