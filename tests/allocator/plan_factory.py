"""Plans for tests, made from a model and a rule, without a search."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import count
from types import SimpleNamespace

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from allocator.plan import (
    CONTAINER_METADATA,
    FixedTensor,
    ModelIdentity,
    Plan,
    PlanMember,
    PlanUnit,
)
from search_spaces.models.discover import discover
from search_spaces.operators import Keep, Operator, RoundToNearest, operator_to_json
from search_spaces.space import Unit
from search_spaces.storage import StoredTensor, safetensors_bytes
from search_spaces.ties import tie_units

IDENTITY = ModelIdentity(
    name="tiny", architecture="TinyForCausalLM", config_sha256="c" * 64, weights_sha256="w" * 64
)
SLACK_BYTES = 1000


def as_loaded(model, **more):
    """A model as loading gives it, of the identity that plans of this file are made for."""
    return SimpleNamespace(
        model=model,
        config_sha256=IDENTITY.config_sha256,
        weights_sha256=IDENTITY.weights_sha256,
        **more,
    )


def tiny_mixtral(*, intermediate_size: int = 32) -> MixtralForCausalLM:
    """One block of three experts that are stored as stacks, with random weights."""
    config = MixtralConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    return MixtralForCausalLM(config)


def make_plan(
    model: torch.nn.Module,
    choose: Callable[[Unit], Operator],
    *,
    ties: str = "none",
    open_units: Collection[str] = (),
    dense_dtype: str = "BF16",
    identity: ModelIdentity = IDENTITY,
    exclude: Collection[str] = (),
) -> Plan:
    """A plan that gives each unit of a model the operator that ``choose`` says.

    Units named in ``exclude`` are fixed, as are all tensors that are no unit.
    """
    found = discover(model, open_units=open_units, dense_dtype=dense_dtype)
    units = tuple(u for u in tie_units(found.units, ties) if u.name not in exclude)
    parameters = dict(model.named_parameters())
    fixed = found.fixed + tuple(
        StoredTensor(member.name, dense_dtype, tuple(parameters[member.name].shape))
        for unit in tie_units(found.units, ties)
        if unit.name in exclude
        for member in unit.members
    )
    operators = [choose(unit) for unit in units]
    searched_bytes = sum(u.bytes(o) for u, o in zip(units, operators, strict=True))
    stored = [*fixed]
    for unit, operator in zip(units, operators, strict=True):
        stored += unit.layout(operator)
    achieved_bytes = safetensors_bytes(stored, CONTAINER_METADATA)
    num_weights = sum(unit.num_weights for unit in units)
    return Plan(
        model=identity,
        space="test",
        ties=ties,
        budget_text=str(achieved_bytes + SLACK_BYTES),
        budget_bytes=achieved_bytes + SLACK_BYTES,
        achieved_bytes=achieved_bytes,
        slack_bytes=SLACK_BYTES,
        searched_budget_bytes=searched_bytes + SLACK_BYTES,
        searched_bytes=searched_bytes,
        bits_per_weight=8 * searched_bytes / num_weights,
        dense_bytes=2 * num_weights + sum(tensor.bytes for tensor in fixed),
        units=tuple(
            PlanUnit(
                name=unit.name,
                kind=unit.kind,
                depth=unit.depth,
                members=tuple(
                    PlanMember(
                        module=m.module,
                        parameter=m.parameter,
                        shape=m.shape,
                        transposed=m.transposed,
                    )
                    for m in unit.members
                ),
                operator=operator_to_json(operator),
                bytes=unit.bytes(operator),
            )
            for unit, operator in zip(units, operators, strict=True)
        ),
        fixed=tuple(FixedTensor(name=t.name, dtype=t.dtype, shape=t.shape) for t in fixed),
        returned="dp",
        scorer="test",
        predicted_nats=0.5,
        lower_bound_nats=0.25,
        gap_nats=0.25,
        solver_status="proved optimal for the additive model",
    )


def in_turn(*operators: Operator) -> Callable[[Unit], Operator]:
    """A rule that deals the operators out one after the other, from the first again."""
    turn = count()
    return lambda unit: operators[next(turn) % len(operators)]


MIXED = (
    RoundToNearest(4, 32),
    RoundToNearest(2, 16),
    Keep(),
    RoundToNearest(3, 32, symmetric=False),
    RoundToNearest(8, 0),
)


def tiny_llama(*, layers: int = 2, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama with 64 columns in its matrices (96 in down_proj), in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=80,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(*, seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2, whose matrices are stored transposed."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=80, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config).eval()
