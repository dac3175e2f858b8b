"""Optuna's storages by their address, opened and closed so that a mistake costs one sentence.

The problem this file solves: behind an address are a file or a server, a driver that may be
missing, a database of something else, or an Optuna journal that a crash tore: Optuna would append
to its half line and never open it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna
    import sqlalchemy

_FORMS = (
    "sqlite:///FILE, postgresql://USER@HOST/DATABASE, or journal:FILE (a FILE that ends in .log "
    "needs no journal:)"
)


@dataclass(frozen=True)
class OpenStorage:
    """A storage and how to speak of it: ``address`` has no password in it."""

    storage: optuna.storages.BaseStorage
    address: str


def is_storage(text: str) -> bool:
    """Whether a word is the address of a storage, with or without ``#STUDY``."""
    address = text.partition("#")[0]
    return "://" in address or address.startswith("journal:") or address.endswith(".log")


def without_password(text: str) -> str:
    """An address as it may be written down; the driver then asks its own file or environment."""
    address, mark, study = text.partition("#")
    if "://" not in address:
        return text
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(address)
    except (ArgumentError, ValueError):  # refused where it is read
        return text
    without = url._replace(password=None)  # set() takes None for no change
    return without.render_as_string(hide_password=False) + mark + study


@contextmanager
def open_storage(text: str, *, create: bool) -> Iterator[OpenStorage]:
    """Any storage of Optuna's by its address, closed at the end and Optuna's notes kept quiet.

    Args:
        text: ``journal:FILE``, ``FILE.log`` or a URL of SQLAlchemy's.
        create: Make the file, or the tables of an empty database. Otherwise they must be there.

    Raises:
        ValueError: Not an address, a missing driver, nothing there, or the database refused.
    """
    import optuna

    if not is_storage(text):
        raise ValueError(f"{text!r} is not a storage: expected {_FORMS}")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if "://" in text:
            with _database(text, create=create) as opened:
                yield opened
        else:
            path = Path(text.removeprefix("journal:"))
            yield OpenStorage(_journal(path, create=create), str(path))
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextmanager
def _database(text: str, *, create: bool) -> Iterator[OpenStorage]:
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    url = _checked_url(text, create=create)
    address = repr(url)  # which hides the password
    try:
        storage = _connect(url, create=create)
        try:
            yield OpenStorage(storage, address)
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except (SQLAlchemyError, StorageInternalError) as error:
        said = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = str(getattr(said, "orig", None) or said).strip().partition("\n")[0]
        raise ValueError(f"cannot use the storage {address}: {reason}") from error


def _checked_url(text: str, *, create: bool) -> sqlalchemy.URL:
    """The URL, its dialect known; messages never quote a password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    scheme = text.partition("://")[0]
    try:
        url = make_url(text)
        if url.drivername == "postgresql":  # SQLAlchemy's own choice depends on its version
            url = url.set(drivername="postgresql+psycopg")
        url.get_dialect()
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{scheme}:// leads to no storage: expected {_FORMS}") from error
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise ValueError(f"{url!r} keeps nothing: expected sqlite:///FILE")
        if not create and not Path(str(url.database)).is_file():
            raise ValueError(f"no storage {url!r}: there is no file {url.database}")
    return url


def _connect(url: sqlalchemy.URL, *, create: bool) -> optuna.storages.RDBStorage:
    import optuna
    from sqlalchemy.pool import NullPool

    # Optuna takes the text for a template.
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    try:
        # Without a pool nothing stays open where the constructor fails half way.
        engine = {"poolclass": NullPool}
        return optuna.storages.RDBStorage(text, engine, skip_table_creation=not create)
    except ImportError as error:
        extra = "postgresql" if url.get_backend_name() == "postgresql" else ""
        hint = f": pip install 'model-allocator[{extra}]'" if extra else ""
        raise ValueError(f"the driver of {url!r} is not installed{hint}") from error
    except RuntimeError as error:  # tables of another version of Optuna
        raise ValueError(f"cannot use the storage {url!r}: {error}") from error


def _journal(path: Path, *, create: bool) -> optuna.storages.BaseStorage:
    """Optuna's journal file, unless its last line is torn."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if not create and not path.is_file():
            raise ValueError(f"no storage {path}: there is no such file")
        if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
            raise ValueError(
                f"{path} ends in half a line and Optuna would damage it for good: remove that line "
                "or use another file"
            )
        backend = JournalFileBackend(str(path))
    except OSError as error:
        raise ValueError(f"cannot use the storage {path}: {error.strerror}") from error
    try:
        return JournalStorage(backend)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a journal of Optuna's, or is damaged") from error
