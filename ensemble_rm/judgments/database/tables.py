"""The store's tables after the newest migration.

Each text is stored once, under its digest, which judgments refer to; an erased text is empty.
Digests are 16 bytes, so that every database sorts them in the same way. Each transaction that adds
judgments or erasures adds one link to the chain; see `chain.py`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator, TypeEngine

REVISIONS = ("0001", "0002")
HEAD = REVISIONS[-1]
VERSION_TABLE = "judgments_version"


class UtcTime(TypeDecorator[datetime]):
    """A time in UTC: PostgreSQL's own type; in SQLite, ISO 8601 of fixed width, which sorts."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the dialect's own type."""
        if dialect.name == "sqlite":
            return dialect.type_descriptor(String(32))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        """Return the value to store."""
        if value is not None and dialect.name == "sqlite":
            return value.astimezone(UTC).isoformat(timespec="microseconds")
        return value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Return the stored value as a datetime in UTC."""
        if value is not None and dialect.name == "sqlite":
            return datetime.fromisoformat(value)
        return None if value is None else value.astimezone(UTC)


metadata = MetaData()

texts = Table(
    "judgment_texts",
    metadata,
    Column("digest", LargeBinary(16), primary_key=True),
    Column("body", Text, nullable=False),
)

chain = Table(
    "judgment_chain",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("judgments", Integer, nullable=False),
    Column("erasures", Integer, nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("head", LargeBinary(32), nullable=False),
    Column("appended_at", UtcTime),
)

judgments = Table(
    "judgments",
    metadata,
    Column("id", LargeBinary(16), primary_key=True),
    Column("prompt", LargeBinary(16), ForeignKey(texts.c.digest), nullable=False),
    Column("first", LargeBinary(16), ForeignKey(texts.c.digest), nullable=False),
    Column("second", LargeBinary(16), ForeignKey(texts.c.digest), nullable=False),
    Column("prompt_key", LargeBinary(16), nullable=False),
    Column("pair_key", LargeBinary(16), nullable=False),
    Column("outcome", String(9), nullable=False),
    Column("annotator", Text, nullable=False),
    Column("judged_at", UtcTime, nullable=False),
    Column("source", Text, nullable=False),
    Column("external_id", Text, nullable=False),
    Column("batch", Text),
    Column("policy", Text),
    Column("subset", Text),
    Column("strategy", Text),
    Column("inclusion", Double),
    Column("corrects", LargeBinary(16), ForeignKey("judgments.id"), unique=True),
    Column("link", Integer, nullable=False),
    UniqueConstraint("source", "external_id"),
    CheckConstraint("outcome IN ('first', 'second', 'tie', 'retracted')", name="judgments_outcome"),
    Index("judgments_by_time", "judged_at", "id"),
    # Covers the check of the chain, which then reads no whole rows.
    Index("judgments_by_link", "link", "id", "judged_at", "corrects"),
)

erasures = Table(
    "judgment_erasures",
    metadata,
    Column("judgment", LargeBinary(16), ForeignKey(judgments.c.id), primary_key=True),
    Column("erased_at", UtcTime, nullable=False),
    Column("link", Integer, nullable=False),
)
