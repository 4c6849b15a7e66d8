"""A hash chain of appended batches, retractions, and erasures of texts.

The judgments that are stored already are checked first, and chained in batches of 5,000 by time,
without a time of arrival, which was not recorded.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from ensemble_rm.judgments.database.chain import append_link
from ensemble_rm.judgments.database.checking import RowChecker

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BATCH = 5000
COLUMNS = (
    "id, prompt, first, second, prompt_key, pair_key, outcome, annotator, judged_at, source, "
    "external_id, batch, policy, subset, strategy, inclusion, corrects"
)
NUMBERED = f"1 + (row_number() OVER (ORDER BY judged_at, id) - 1) / {BATCH}"
OUTCOMES = "outcome IN ('first', 'second', 'tie', 'retracted')"


def upgrade() -> None:
    """Check the rows, rebuild their table with the number of their batch, and chain them."""
    connection = op.get_bind()
    _check(connection)
    _make_tables()
    if connection.dialect.name == "sqlite":
        _rebuild_sqlite()
    else:
        _alter_postgresql()
    op.create_index("judgments_by_time", "judgments", ["judged_at", "id"], if_not_exists=True)
    op.create_index("judgments_by_link", "judgments", ["link", "id", "judged_at", "corrects"])
    last = connection.execute(sa.text("SELECT max(link) FROM judgments")).scalar() or 0
    for number in range(1, last + 1):
        append_link(connection, number, at=None)


def _check(connection: sa.Connection) -> None:
    """Refuse to chain judgments that were changed: the chain would vouch for them."""
    store = connection.get_execution_options().get("store", "the store")
    checker = RowChecker(connection, store)
    rows = connection.execute(sa.text(f"SELECT {COLUMNS}, 0 FROM judgments"))
    for part in rows.partitions(BATCH):
        checker.check(part)


def _make_tables() -> None:
    digest = sa.LargeBinary(16)
    time = sa.DateTime(timezone=True).with_variant(sa.String(32), "sqlite")
    op.create_table(
        "judgment_chain",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("judgments", sa.Integer, nullable=False),
        sa.Column("erasures", sa.Integer, nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("head", sa.LargeBinary(32), nullable=False),
        sa.Column("appended_at", time),
    )
    op.create_table(
        "judgment_erasures",
        sa.Column("judgment", digest, sa.ForeignKey("judgments.id"), primary_key=True),
        sa.Column("erased_at", time, nullable=False),
        sa.Column("link", sa.Integer, nullable=False),
    )


def _rebuild_sqlite() -> None:
    """SQLite can neither change a CHECK nor add a column that is NOT NULL: copy the table."""
    digest = sa.LargeBinary(16)
    op.create_table(
        "judgments_new",
        sa.Column("id", digest, primary_key=True),
        sa.Column("prompt", digest, sa.ForeignKey("judgment_texts.digest"), nullable=False),
        sa.Column("first", digest, sa.ForeignKey("judgment_texts.digest"), nullable=False),
        sa.Column("second", digest, sa.ForeignKey("judgment_texts.digest"), nullable=False),
        sa.Column("prompt_key", digest, nullable=False),
        sa.Column("pair_key", digest, nullable=False),
        sa.Column("outcome", sa.String(9), nullable=False),
        sa.Column("annotator", sa.Text, nullable=False),
        sa.Column("judged_at", sa.String(32), nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("external_id", sa.Text, nullable=False),
        sa.Column("batch", sa.Text),
        sa.Column("policy", sa.Text),
        sa.Column("subset", sa.Text),
        sa.Column("strategy", sa.Text),
        sa.Column("inclusion", sa.Double),
        sa.Column("corrects", digest, sa.ForeignKey("judgments_new.id"), unique=True),
        sa.Column("link", sa.Integer, nullable=False),
        sa.UniqueConstraint("source", "external_id"),
        sa.CheckConstraint(OUTCOMES, name="judgments_outcome"),
    )
    op.execute(f"INSERT INTO judgments_new SELECT {COLUMNS}, {NUMBERED} FROM judgments")
    # The triggers of version 1 are dropped with the table.
    op.drop_table("judgments")
    op.rename_table("judgments_new", "judgments")


def _alter_postgresql() -> None:
    op.execute("DROP TRIGGER judgments_append_only ON judgments")
    op.execute("DROP TRIGGER judgment_texts_append_only ON judgment_texts")
    op.add_column("judgments", sa.Column("link", sa.Integer))
    op.execute(
        f"UPDATE judgments SET link = numbered.link FROM (SELECT id, {NUMBERED} AS link "
        "FROM judgments) AS numbered WHERE numbered.id = judgments.id"
    )
    op.alter_column("judgments", "link", nullable=False)
    op.alter_column("judgments", "outcome", type_=sa.String(9))
    op.drop_constraint("judgments_outcome", "judgments")
    op.create_check_constraint("judgments_outcome", "judgments", OUTCOMES)


def downgrade() -> None:
    """Refuse to downgrade, which would drop erasures and retractions."""
    raise NotImplementedError("a store is never downgraded")
