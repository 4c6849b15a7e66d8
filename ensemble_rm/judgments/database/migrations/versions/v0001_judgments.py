"""Judgments and their texts, with triggers that refuse to change or delete them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = ("judgments", "judgment_texts")
KEYS = {
    "judgments": (
        "id = NEW.id OR (source = NEW.source AND external_id = NEW.external_id) "
        "OR corrects = NEW.corrects"
    ),
    "judgment_texts": "digest = NEW.digest",
}


def upgrade() -> None:
    """Make the tables and their guards."""
    _make_tables()
    if op.get_bind().dialect.name == "sqlite":
        _guard_sqlite()
    else:
        _guard_postgresql()


def _make_tables() -> None:
    digest = sa.LargeBinary(16)
    time = sa.DateTime(timezone=True).with_variant(sa.String(32), "sqlite")
    op.create_table(
        "judgment_texts",
        sa.Column("digest", digest, primary_key=True),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "judgments",
        sa.Column("id", digest, primary_key=True),
        sa.Column("prompt", digest, sa.ForeignKey("judgment_texts.digest"), nullable=False),
        sa.Column("first", digest, sa.ForeignKey("judgment_texts.digest"), nullable=False),
        sa.Column("second", digest, sa.ForeignKey("judgment_texts.digest"), nullable=False),
        sa.Column("prompt_key", digest, nullable=False),
        sa.Column("pair_key", digest, nullable=False),
        sa.Column("outcome", sa.String(6), nullable=False),
        sa.Column("annotator", sa.Text, nullable=False),
        sa.Column("judged_at", time, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("external_id", sa.Text, nullable=False),
        sa.Column("batch", sa.Text),
        sa.Column("policy", sa.Text),
        sa.Column("subset", sa.Text),
        sa.Column("strategy", sa.Text),
        sa.Column("inclusion", sa.Double),
        sa.Column("corrects", digest, sa.ForeignKey("judgments.id"), unique=True),
        sa.UniqueConstraint("source", "external_id"),
        sa.CheckConstraint("outcome IN ('first', 'second', 'tie')", name="judgments_outcome"),
    )
    op.create_index("judgments_by_time", "judgments", ["judged_at", "id"])


def _guard_sqlite() -> None:
    """Refuse UPDATE and DELETE, and ignore INSERT OR REPLACE of an existing row."""
    for table in TABLES:
        for deed in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{deed.lower()} BEFORE {deed} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only: no {deed}'); END"
            )
        op.execute(
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} "
            f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {KEYS[table]}) "
            "BEGIN SELECT RAISE(IGNORE); END"
        )


def _guard_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION judgments_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION '% is append-only: no %', TG_TABLE_NAME, TG_OP; END $$"
    )
    for table in TABLES:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION judgments_append_only()"
        )


def downgrade() -> None:
    """Refuse to downgrade, which would drop judgments."""
    raise NotImplementedError("judgments are never dropped")
