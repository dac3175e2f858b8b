"""Runs as Optuna studies, for its plots and its dashboard; and back, for warm starts.

The problem this file solves: people have tools for Optuna's storages, but those are no place for a
running search: they cost up to a second per trial and one of them never opens again after a torn
write. So a study is a copy, made on demand from the journal, and can never harm the run. Exporting
again adds what is new. Finished trials cannot change in Optuna, so what was exported from a half
finished run keeps the loss of that time; the receipt counts such trials.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import TYPE_CHECKING, Any

from allocator.budget import resolve_budget
from allocator.journal import read_journal
from allocator.measured_run import MeasuredRun, gather_measured_run
from allocator.plan import Plan, load_plan
from allocator.reporter import Reporter, Silent
from allocator.run_folder import RunFolder, load_space
from allocator.study_storage import open_storage
from allocator.study_trials import BYTES, OVER_BUDGET, TrialRow, trial_rows
from objectives.evaluation import Evaluation
from search_spaces.space import SearchSpace

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

_SILENT = Silent()
_RUN = "run_sha256"
_KEY = "key"
_METRICS = ("loss (nats per token)", "bytes")


@dataclass(frozen=True)
class ExportReceipt:
    """What an export did.

    Attributes:
        study: Its name.
        storage: Its address without the password.
        num_added: Trials written now.
        num_present: Trials that were there already.
        num_outdated: Of those, the ones whose loss is another by now.
        num_failed: Trials of both without a loss.
    """

    study: str
    storage: str
    num_added: int
    num_present: int
    num_outdated: int
    num_failed: int


def export_study(
    folder: RunFolder,
    storage: str,
    name: str | None = None,
    *,
    multi: bool = False,
    reporter: Reporter = _SILENT,
) -> ExportReceipt:
    """Copy a run's measurements into a study, one trial per assignment of the search split.

    Args:
        folder: Of a run that has begun; its journal is read, never touched.
        storage: ``sqlite:///FILE``, ``postgresql://...`` or ``journal:FILE``.
        name: Of the study; else the run's.
        multi: Two objectives, loss and bytes, instead of the loss alone.
        reporter: Shown the progress: a database takes up to a second for each trial.

    Raises:
        ValueError: Not a run, nothing measured yet, no such storage, or the study holds something
            else.
    """
    journal, space = read_journal(folder.journal), load_space(folder.space)
    run = gather_measured_run(journal, space)
    plan = load_plan(folder.plan) if folder.plan.is_file() else None
    rows = trial_rows(run, space, plan, name=folder.name)
    most_bytes = resolve_budget(journal.header["config"]["budget"], space).stored_bytes
    if not rows:
        raise ValueError(f"the run {folder.path} has measured no assignment yet: let it go on")
    about = {**_about(folder, journal.header, space, plan), **_conditions(run)}
    with open_storage(storage, create=True) as opened:
        study = _open_study(opened.storage, name or folder.name, about[_RUN], multi=multi)
        present = _by_key(study)
        ranges = _ranges(rows, list(present.values()), skip=(BYTES,) if multi else ())
        fresh = [row for row in rows if row.key not in present]
        advance = reporter.stage("writing trials", len(fresh))
        for done, row in enumerate(fresh, start=1):
            study.add_trial(_frozen(row, ranges, most_bytes, multi=multi))
            advance(done, "")
        numbers = {key: trial.number for key, trial in _by_key(study).items()}
        about["candidates"] = {
            name: numbers[row.key]
            for row in rows
            for name in row.attributes.get("candidate", "").split(", ")
            if name
        }
        known = study.user_attrs
        for key, value in about.items():
            if key not in known or known[key] != value:
                study.set_user_attr(key, value)
        address = opened.address
    old = [(present[row.key], row) for row in rows if row.key in present]
    return ExportReceipt(
        study=study.study_name,
        storage=address,
        num_added=len(fresh),
        num_present=len(old),
        num_outdated=sum(_is_outdated(trial, row) for trial, row in old),
        num_failed=sum(row.loss_nats is None for row in rows),
    )


def read_study(source: str) -> MeasuredRun:
    """The measurements of a study that :func:`export_study` wrote, and the trials it wrote only.

    Args:
        source: ``STORAGE#STUDY``, or the storage alone where it holds one study.

    Raises:
        ValueError: No such storage or study, or none of ours.
    """
    import optuna

    storage, _, wanted = source.partition("#")
    with open_storage(storage, create=False) as opened:
        names = optuna.get_all_study_names(opened.storage)
        if not wanted and len(names) > 1:
            raise ValueError(
                f"{opened.address} holds {len(names)} studies: name one as STORAGE#STUDY out of "
                f"{', '.join(sorted(names)[:8])}"
            )
        name = wanted or next(iter(names), "")
        if name not in names:
            listing = ", ".join(sorted(names)[:8]) or "none"
            raise ValueError(f"no study {name!r} in {opened.address}; studies there: {listing}")
        study = optuna.load_study(study_name=name, storage=opened.storage)
        about, trials = study.user_attrs, list(_by_key(study).values())
        address = opened.address
    try:
        return MeasuredRun(
            conditions=dict(about["conditions"]),
            options=_unfold(about["options"]),
            num_sequences=about["num_search_sequences"],
            evaluations=tuple(e for trial in trials for e in _evaluations(trial.user_attrs)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the study {name!r} in {address} is no whole export of a run ({error!r}): make one "
            "with 'allocator export-study'"
        ) from error


def _open_study(
    storage: optuna.storages.BaseStorage, name: str, run: str, *, multi: bool
) -> optuna.Study:
    """The study of a run: a new one, or the one of an earlier export of the same run."""
    import optuna

    count = 2 if multi else 1
    if name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
    else:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["minimize"] * count
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(_METRICS[:count]))
        study.set_user_attr(_RUN, run)
    if study.user_attrs.get(_RUN) != run:
        raise ValueError(f"the study {name!r} holds something else: choose another with --name")
    if len(study.directions) != count:
        other = "without" if multi else "with"
        raise ValueError(
            f"the study {name!r} was exported {other} --multi: choose another with --name"
        )
    return study


def _by_key(study: optuna.Study) -> dict[str, optuna.trial.FrozenTrial]:
    """Our trials; what people or other programs added is left alone."""
    trials = study.get_trials(deepcopy=False)
    return {trial.user_attrs[_KEY]: trial for trial in trials if _KEY in trial.user_attrs}


def _ranges(
    rows: Sequence[TrialRow],
    present: Sequence[optuna.trial.FrozenTrial],
    skip: Sequence[str],
) -> dict[str, BaseDistribution]:
    """For each parameter the range the run looked at; what never varied is no parameter.

    Importances divide a range into 50 steps, so that of the whole menu, up to 16 bits, would hide
    what happens around three. What is in the study already is kept where it is wide enough.
    """
    from optuna.distributions import FloatDistribution, IntDistribution

    old: dict[str, Any] = {}
    for trial in present:
        old |= trial.distributions
    ranges: dict[str, BaseDistribution] = {}
    for name in rows[0].parameters:
        values = [row.parameters[name] for row in rows]
        if name in old:
            values += [old[name].low, old[name].high]
        low, high = min(values), max(values)
        if name in skip or low == high:
            continue
        whole = name == BYTES
        ranges[name] = (
            IntDistribution(int(low), int(high)) if whole else FloatDistribution(low, high)
        )
    return ranges


def _frozen(
    row: TrialRow, ranges: Mapping[str, BaseDistribution], most_bytes: int, *, multi: bool
) -> optuna.trial.FrozenTrial:
    """A finished trial; feasible by Optuna's word where it is within the run's budget."""
    from optuna.trial import TrialState, create_trial

    failed = row.loss_nats is None
    values = None if failed else [row.loss_nats, row.bytes] if multi else [row.loss_nats]
    return create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        values=values,  # type: ignore[arg-type]
        params={name: row.parameters[name] for name in ranges},
        distributions=dict(ranges),
        user_attrs={_KEY: row.key, **row.attributes},
        constraints={OVER_BUDGET: row.bytes - most_bytes},
    )


def _is_outdated(trial: optuna.trial.FrozenTrial, row: TrialRow) -> bool:
    """Whether more was measured since; the last digits depend on the machine."""
    if not trial.values or row.loss_nats is None:
        return bool(trial.values) != (row.loss_nats is not None)
    return not isclose(trial.values[0], row.loss_nats, rel_tol=1e-6)


def _about(
    folder: RunFolder, header: Mapping[str, Any], space: SearchSpace, plan: Plan | None
) -> dict[str, Any]:
    """What the study says of itself."""
    config = header["config"]
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    about = {
        _RUN: hashlib.sha256(text.encode()).hexdigest(),
        "run": folder.name,
        "model": header["model"]["name"],
        "budget": config["budget"],
        "space": space.name,
        "scorer": config["search"]["scorer"],
        "search": config["search"]["name"],
        "seed": config["search"]["seed"],
        "objective": config["measure"]["objective"],
    }
    if plan is not None:
        about |= {"plan": str(folder.plan.resolve()), "returned": plan.returned}
        about["budget_bytes"] = plan.budget_bytes
    return about


def _conditions(run: MeasuredRun) -> dict[str, Any]:
    """What a warm start from the study has to know. Most menus are equal: each is kept once."""
    menus = list(dict.fromkeys(run.options.values()))
    units = [[name, menus.index(menu)] for name, menu in run.options.items()]
    return {
        "conditions": run.conditions,
        "options": {"menus": [list(menu) for menu in menus], "units": units},
        "num_search_sequences": run.num_sequences,
    }


def _unfold(options: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Undo what :func:`_conditions` folded."""
    return {name: tuple(options["menus"][index]) for name, index in options["units"]}


def _evaluations(attributes: Mapping[str, Any]) -> list[Evaluation]:
    assignment = json.loads(attributes["assignment"])
    found = json.loads(attributes["evaluations"])
    return [Evaluation.from_json({"assignment": assignment, **plain}) for plain in found]
