"""Exporters: one file per toolkit, and the table that names them. None imports its toolkit."""

from __future__ import annotations

from allocator.exporters.base import Exporter, Mismatch, Receipt
from allocator.exporters.evopress import EvoPressExporter
from allocator.exporters.gptqmodel import GPTQModelExporter
from allocator.exporters.torchao import TorchaoExporter
from search_spaces.registry import Registry

__all__ = ["EXPORTERS", "Exporter", "Mismatch", "Receipt"]

EXPORTERS: Registry[type[Exporter]] = Registry(
    "exporter",
    {
        "evopress": EvoPressExporter,
        "gptqmodel": GPTQModelExporter,
        "torchao": TorchaoExporter,
    },
    entry_point_group="model_allocator.exporters",
)
