"""Exporters: one file per toolkit, and the table that names them. None imports its toolkit."""

from __future__ import annotations

from allocator.exporters.base import Exporter, Mismatch, Receipt
from allocator.exporters.bitstack import BitStackExporter
from allocator.exporters.evopress import EvoPressExporter
from allocator.exporters.factorised import FactorisedExporter
from allocator.exporters.gptqmodel import GPTQModelExporter
from allocator.exporters.llama_cpp import LlamaCppExporter
from allocator.exporters.llm_compressor import LLMCompressorExporter
from allocator.exporters.peft import PeftExporter
from allocator.exporters.torch_prune import TorchPruneExporter
from allocator.exporters.torchao import TorchaoExporter
from allocator.exporters.transformers_cache import TransformersCacheExporter
from search_spaces.registry import Registry

__all__ = ["EXPORTERS", "Exporter", "Mismatch", "Receipt"]

EXPORTERS: Registry[type[Exporter]] = Registry(
    "exporter",
    {
        "bitstack": BitStackExporter,
        "evopress": EvoPressExporter,
        "factorised": FactorisedExporter,
        "gptqmodel": GPTQModelExporter,
        "llama-cpp": LlamaCppExporter,
        "llm-compressor": LLMCompressorExporter,
        "peft": PeftExporter,
        "torch-prune": TorchPruneExporter,
        "torchao": TorchaoExporter,
        "transformers-cache": TransformersCacheExporter,
    },
    entry_point_group="model_allocator.exporters",
)
