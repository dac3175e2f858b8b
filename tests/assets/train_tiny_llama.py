"""Train the tiny Llama model and its tokenizer that the tests use as an asset.

The folder given as ``--text-folder`` holds one raw text file per novel. The novel named
``persuasion.txt`` is never trained on: its cleaned text is written beside the output folder,
and the perplexity of the saved checkpoint is measured on it.
"""

import argparse
import itertools
import logging
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

logger = logging.getLogger("train_tiny_llama")

HELD_OUT = "persuasion.txt"
EOS = "<eos>"
VOCABULARY_SIZE = 1024
SEQUENCE_LENGTH = 128
HEADING = re.compile(r"(chapter|volume) ([0-9]+|[ivxl]+)|finis|the end", re.IGNORECASE)
EDITOR_NOTE = "A NOTE ON THE TEXT"


def clean_text(raw: str) -> str:
    """Reduce the raw text of a novel to its paragraphs.

    The title page, headings, end mark, underscores that mark emphasis, and whatever follows an
    editor's note are dropped. Every paragraph becomes one line; blank lines separate them.

    Args:
        raw: Text of the novel, with wrapped lines.

    Returns:
        The cleaned text, ending in a line feed.
    """
    plain = raw.replace("_", "")
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", plain)]
    first = next((i for i, block in enumerate(blocks) if HEADING.fullmatch(block)), 0)
    body = itertools.takewhile(lambda block: block != EDITOR_NOTE, blocks[first:])
    kept = [block for block in body if block and not HEADING.fullmatch(block)]
    return "\n\n".join(kept) + "\n"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: Cleaned training texts.

    Returns:
        The tokenizer, whose single special token opens, closes and pads sequences.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    """Create the untrained model.

    Returns:
        A six-layer Llama model in float32.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(model: nn.Module, tokens: torch.Tensor, steps: int, batch: int, rate: float) -> None:
    """Train the model on random windows of a token stream, in place.

    Args:
        model: Model to train.
        tokens: One-dimensional stream of token ids.
        steps: Number of optimizer steps.
        batch: Sequences per step.
        rate: Peak learning rate of the warmup-cosine schedule.
    """
    matrices = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}
    vectors = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=rate, betas=(0.9, 0.95), fused=True)

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, 20 * (step + 1) / steps) * (0.02 + 0.98 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    windows = tokens.unfold(0, SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH // 4)
    epochs = math.ceil(steps * batch / len(windows))
    order = torch.cat([torch.randperm(len(windows)) for _ in range(epochs)])
    start = time.perf_counter()
    for step in range(steps):
        chosen = windows[order[step * batch : (step + 1) * batch]]
        logits = model(input_ids=chosen[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            logger.info("step %d loss %.3f %.0f s", step, loss, time.perf_counter() - start)


@torch.inference_mode()
def evaluate(folder: Path, text: str) -> tuple[float, int]:
    """Measure the perplexity of a saved checkpoint in windows that do not overlap.

    Args:
        folder: Folder of the checkpoint and its tokenizer.
        text: Text to predict.

    Returns:
        The perplexity, and the number of predicted tokens.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(tokenizer.encode(text, verbose=False))
    windows = tokens.unfold(0, SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)
    total = 0.0
    for chunk in windows.split(32):
        logits = model(input_ids=chunk[:, :-1], use_cache=False).logits.flatten(0, 1)
        total += functional.cross_entropy(logits, chunk[:, 1:].flatten(), reduction="sum").item()
    count = len(windows) * SEQUENCE_LENGTH
    return math.exp(total / count), count


def main() -> None:
    """Train, save and evaluate the model."""
    parser = argparse.ArgumentParser(description="Train the tiny Llama model of the tests.")
    parser.add_argument("--text-folder", type=Path, required=True, help="raw novels, *.txt")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--steps", type=int, default=3600, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(0)

    novels = sorted(arguments.text_folder.glob("*.txt"))
    texts = {path.name: clean_text(path.read_text(encoding="utf-8")) for path in novels}
    held_out = texts.pop(HELD_OUT)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output.parent / HELD_OUT).write_text(held_out, encoding="utf-8", newline="\n")

    tokenizer = train_tokenizer(list(texts.values()))
    tokenizer.save_pretrained(arguments.output)
    stream = [i for text in texts.values() for i in [*tokenizer.encode(text, verbose=False), 0]]
    model = build_model()
    logger.info("%d parameters, %d training tokens", model.num_parameters(), len(stream))
    train(model, torch.tensor(stream), arguments.steps, arguments.batch, arguments.rate)
    model.half().save_pretrained(arguments.output)
    perplexity, count = evaluate(arguments.output, held_out)
    logger.info("held-out perplexity %.2f over %d tokens", perplexity, count)


if __name__ == "__main__":
    main()
