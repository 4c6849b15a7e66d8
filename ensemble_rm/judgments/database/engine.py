"""Open a database of judgments, in SQLite or PostgreSQL: URLs, locking, migrations."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from ensemble_rm.errors import MissingExtraError, OptionError, StorageError
from ensemble_rm.judgments.database.guards import check_guards, install_guards
from ensemble_rm.judgments.database.tables import HEAD, REVISIONS, VERSION_TABLE
from ensemble_rm.sqlite import BUSY_SECONDS, set_wal

CACHE_KIB = 65536
MIGRATION_LOCK = 0x6A75646765  # of PostgreSQL's advisory locks
MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """An open database with the library's schema.

    Attributes
    ----------
    name : str
        Path or URL, for messages; without a password.
    engine : Engine
        Connections with the execution option ``writer=True`` lock the database for writing.
    read_only : bool
        Whether writing is impossible.

    Raises
    ------
    StoreIntegrityError
        If triggers are missing that keep judgments from being changed, unless `repair` is set.
    """

    def __init__(
        self, place: str | Path, *, create: bool, read_only: bool, repair: bool = False
    ) -> None:
        url = _url(place)
        if url is None:
            path = Path(place).expanduser()
            self.name = str(path)
            self.read_only = read_only or (path.exists() and not os.access(path, os.W_OK))
            if not path.exists():
                if not create:
                    raise StorageError(
                        f"no judgment store at {path}; create it, or use another path"
                    )
                _make_folder(path.parent)
            self.engine = _sqlite(path, read_only=self.read_only)
        else:
            self.name = url.render_as_string(hide_password=True)
            self.read_only = read_only
            self.engine = _postgresql(url, read_only=read_only)
        with self.errors():
            self._migrate_to_head(create=create)
            if not repair:
                with self.engine.connect() as connection:
                    check_guards(connection, self.name)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection whose transaction sees one state of the store."""
        engine = self.engine
        if engine.dialect.name == "postgresql":
            # Its default isolation shows each statement another state: the chain, and then
            # judgments that were appended in between.
            engine = engine.execution_options(isolation_level="REPEATABLE READ")
        with self.errors(), engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the database's errors into a StorageError that names the store."""
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as error:
            cause = getattr(error, "orig", None) or error
            message = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause)
            raise StorageError(f"{self.name}: {message}") from error

    def require_writable(self) -> None:
        """Raise `StorageError` where the store is read-only."""
        if self.read_only:
            raise StorageError(f"{self.name} was opened read-only; open it for writing")

    # Schema ------------------------------------------------------------------------------------

    def _migrate_to_head(self, *, create: bool) -> None:
        revision = self._revision()
        if revision == HEAD:
            return
        if revision is None and not create:
            raise StorageError(f"{self.name} contains no judgment store; create it, or use another")
        self.require_known(revision)
        if self.read_only:
            raise StorageError(
                f"{self.name} has the schema {revision}, this library {HEAD}, and it is read-only; "
                f"run ensemble-rm judgments repair {self.name}, which migrates it"
            )
        if self.engine.dialect.name == "sqlite":
            self._set_wal()
        migrate(self)

    def _revision(self) -> str | None:
        with self.engine.connect() as connection:
            if not inspect(connection).has_table(VERSION_TABLE):
                return None
            number = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
            return None if number is None else str(number)

    def require_known(self, revision: str | None) -> None:
        """Raise `StorageError` where a newer library wrote the schema."""
        if revision is not None and revision not in REVISIONS:
            raise StorageError(
                f"{self.name} has the schema {revision}, which this library does not know (its "
                f"newest is {HEAD}); install a newer ensemble-rm"
            )

    def _set_wal(self) -> None:
        try:
            with self.engine.connect() as connection:
                raw: Any = connection.connection.dbapi_connection
                set_wal(raw)
        except sqlite3.Error as error:
            raise StorageError(f"{self.name}: {error}") from error


def migrate(database: Database) -> None:
    """Run the missing migrations in one transaction, one process at a time.

    Raises
    ------
    StorageError
        If the store's schema is newer than the library.
    """
    # Imported here, because a store with the current schema needs no Alembic.
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(MIGRATIONS)

    def steps(found: Any, context: Any) -> Any:
        del context
        return script._upgrade_revs("head", found)

    engine = database.engine.execution_options(writer=True, store=database.name)
    with engine.connect() as connection, connection.begin():
        # SQLite is locked by BEGIN IMMEDIATE already.
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        with EnvironmentContext(Config(), script) as environment:
            environment.configure(
                connection=connection,
                fn=steps,
                version_table=VERSION_TABLE,
                transactional_ddl=True,
            )
            # Again, under the lock: another process may have migrated the store in between.
            revision = environment.get_context().get_current_revision()
            database.require_known(revision)
            environment.run_migrations()
        # Not where another process did it: replacing triggers would wait for writers to end.
        if revision != HEAD:
            install_guards(connection)


# Engines -------------------------------------------------------------------------------------


def _url(place: str | Path) -> URL | None:
    """Return a PostgreSQL URL; None where a file is named."""
    if isinstance(place, Path) or not re.match(r"^\w+(\+\w+)?://", place):
        return None
    try:
        url = make_url(place)
    except ArgumentError:
        raise OptionError("the store's URL is not valid; use postgresql://user@host/name") from None
    if url.get_backend_name() != "postgresql":
        raise OptionError(
            f"a store is a file's path or a postgresql:// URL, not {url.drivername}://…"
        )
    return url.set(drivername="postgresql+psycopg")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {folder} for a judgment store: {error}") from error


def _sqlite(path: Path, *, read_only: bool) -> Engine:
    mode = "mode=ro" if read_only else "mode=rwc"
    if read_only and not os.access(path.parent, os.W_OK) and not _log(path).exists():
        mode = "immutable=1"  # the log's index cannot be created there, and no process writes
    uri = f"file:{quote(str(path.absolute()))}?{mode}"

    def connect() -> sqlite3.Connection:
        # No isolation level: `begin` below starts the transactions, not the driver.
        opened = sqlite3.connect(
            uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        # Off by default in SQLite, and set per connection.
        opened.execute("PRAGMA foreign_keys=ON")
        # Negative: in KiB instead of pages.
        opened.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        return opened

    # No pool: a connection must not be inherited by a forked process.
    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        """Lock at the start of a writer's transaction: an upgrade in its middle could fail."""
        writer = connection.get_execution_options().get("writer", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")

    return engine


def _log(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _postgresql(url: URL, *, read_only: bool) -> Engine:
    options = f"{url.query.get('options', '')} -c timezone=UTC"
    if read_only:
        options += " -c default_transaction_read_only=on"
    try:
        return create_engine(
            url.update_query_dict({"options": options.strip()}), poolclass=NullPool
        )
    except ImportError as error:
        raise MissingExtraError(
            "a store in PostgreSQL needs the package `psycopg`: "
            "pip install 'ensemble-rm[postgresql]'"
        ) from error
