"""Explicit computations that streamed scorers are held to, one dense tensor at a time."""

import torch
from language import random_model
from scoring import context_of

from objectives.language_task import LanguageTask
from search_spaces.build import SpaceRequest, build_space
from search_spaces.models.kv_layers import cache_units
from search_spaces.operators import Keep, KVQuantize
from search_spaces.space import SearchSpace, build_menu


def storable_model(family):
    """A random model whose weights are 16-bit numbers, so that ``Keep`` is lossless."""
    model = random_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def gradients_at(context, assignment, loss_of):
    """For each sequence a gradient per parameter name, with all options of an assignment in."""
    model, bank = context.model, context.bank
    names = [member.name for unit in context.space.units for member in unit.members]
    bank.swap(assignment)
    found = []
    for index in context.sequences:
        parameters = [model.get_parameter(name) for name in names]
        loss = loss_of(model, "statistics", index)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(dict(zip(names, gradients, strict=True)))
    bank.restore()
    return found


def change(context, unit, option, base=None):
    """By parameter name the option's weights less those of another option, or the dense ones."""
    bank = context.bank
    other = bank.dense(unit) if base is None else bank.compressed(unit, base)
    pairs = zip(bank.compressed(unit, option), other, strict=True)
    members = context.space.units[unit].members
    return {m.name: (a - b).double() for m, (a, b) in zip(members, pairs, strict=True)}


def swapped(context, unit, option):
    """The dense assignment (every unit in its dearest option) with one unit in another."""
    assignment = [len(menu) - 1 for menu in context.space.menus]
    assignment[unit] = option
    return tuple(assignment)


def differing(model, calibration, menu_of, *, caches=False, **request):
    """A context whose menus are ``menu_of(unit)``; with caches, those of 16 tokens at the end."""
    space = build_space(model, SpaceRequest(**request))
    units = (*space.units, *cache_units(model, 16)) if caches else space.units
    menus = tuple(build_menu(unit, menu_of(unit)) for unit in units)
    space = SearchSpace(space.name, units, menus, space.fixed, space.ties)
    return context_of(model, space, LanguageTask(calibration), needs=())


def with_caches(model, calibration, *operators):
    """A context of weights with this menu and of caches at 2 bits or dense."""
    quantized = (KVQuantize(2, 2, 8), Keep())
    return differing(
        model, calibration, lambda unit: quantized if unit.is_cache else operators, caches=True
    )
