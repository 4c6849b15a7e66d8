"""Triggers that keep the tables append-only: installed after migrations, checked at each opening.

Only the texts of erased judgments may be emptied; see `ensemble_rm.judgments.erasure`.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

from ensemble_rm.errors import StoreIntegrityError

# Rows that an INSERT OR REPLACE would replace, by table.
_KEYS = {
    "judgments": (
        "id = NEW.id OR (source = NEW.source AND external_id = NEW.external_id) "
        "OR corrects = NEW.corrects"
    ),
    "judgment_texts": "digest = NEW.digest",
    "judgment_chain": "number = NEW.number",
    "judgment_erasures": "judgment = NEW.judgment",
}
_IS_ERASURE = (
    "NEW.digest = OLD.digest AND NEW.body = '' AND EXISTS (SELECT 1 FROM judgment_erasures "
    "JOIN judgments ON judgments.id = judgment_erasures.judgment "
    "WHERE OLD.digest IN (judgments.prompt, judgments.first, judgments.second))"
)
_REFUSE = "RAISE EXCEPTION '% is append-only: no %', TG_TABLE_NAME, TG_OP"
# Bits of pg_trigger.tgtype: 1 row, 2 before, 8 delete, 16 update, 32 truncate.
_STATEMENT = {"UPDATE OR DELETE OR TRUNCATE": 58, "DELETE OR TRUNCATE": 42}


def install_guards(connection: Connection) -> None:
    """Create the triggers that are missing, in the connection's transaction."""
    if connection.dialect.name == "sqlite":
        there = _sqlite_triggers(connection)
        for name, statement in _sqlite_guards().items():
            if there.get(name) != statement:
                connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name}")
                connection.exec_driver_sql(statement)
        return
    for name, source in _postgresql_functions().items():
        body = source.replace("%", "%%")  # the driver reads % as a placeholder
        connection.exec_driver_sql(
            f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $${body}$$"
        )
    for name, (table, when, function, _) in _postgresql_guards().items():
        connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name} ON {table}")
        connection.exec_driver_sql(
            f"CREATE TRIGGER {name} BEFORE {when} EXECUTE FUNCTION {function}()"
        )


def check_guards(connection: Connection, store: str) -> None:
    """Raise `StoreIntegrityError` if a trigger is missing, disabled or changed."""
    if connection.dialect.name == "sqlite":
        there = _sqlite_triggers(connection)
        bad = [name for name, sql in _sqlite_guards().items() if there.get(name) != sql]
    else:
        enabled = {row.tgname: row for row in connection.execute(text(_POSTGRESQL_TRIGGERS))}
        functions, bad = _postgresql_functions(), []
        for name, (table, _, function, kind) in _postgresql_guards().items():
            row = enabled.get(name)
            expected = (table, kind, function, functions[function])
            if row is None or row.tgenabled not in ("O", "A") or tuple(row[2:]) != expected:
                bad.append(name)
    if bad:
        raise StoreIntegrityError(
            f"{store}: the triggers that keep judgments from being changed are missing, disabled "
            f"or altered: {', '.join(sorted(bad))}; restore the store from a backup, or check its "
            "judgments and restore the triggers with ensemble-rm judgments repair"
        )


# SQLite ------------------------------------------------------------------------------------------


def _sqlite_guards() -> dict[str, str]:
    guards = {}
    for table, key in _KEYS.items():
        for action in ("UPDATE", "DELETE"):
            name = f"{table}_no_{action.lower()}"
            when = ""
            if (table, action) == ("judgment_texts", "UPDATE"):
                when = f"WHEN NOT ({_IS_ERASURE}) "
            guards[name] = (
                f"CREATE TRIGGER {name} BEFORE {action} ON {table} {when}"
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only: no {action}'); END"
            )
        # INSERT OR REPLACE deletes rows without firing the triggers on DELETE.
        name = f"{table}_no_replace"
        guards[name] = (
            f"CREATE TRIGGER {name} BEFORE INSERT ON {table} "
            f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {key}) BEGIN SELECT RAISE(IGNORE); END"
        )
    return guards


def _sqlite_triggers(connection: Connection) -> dict[str, str]:
    rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
    return {row.name: row.sql for row in rows}


# PostgreSQL --------------------------------------------------------------------------------------

_POSTGRESQL_TRIGGERS = """\
SELECT t.tgname, t.tgenabled::text, c.relname, t.tgtype::int, p.proname, p.prosrc
FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_proc p ON p.oid = t.tgfoid
WHERE c.relnamespace = current_schema()::regnamespace AND NOT t.tgisinternal"""


def _postgresql_functions() -> dict[str, str]:
    erasure = f" BEGIN IF NOT ({_IS_ERASURE}) THEN {_REFUSE}; END IF; RETURN NEW; END "
    return {
        "judgments_append_only": f" BEGIN {_REFUSE}; END ",
        "judgment_texts_only_erased": erasure,
    }


def _postgresql_guards() -> dict[str, tuple[str, str, str, int]]:
    """Return table, event, function and type of each trigger, by name."""
    guards = {}
    for table in _KEYS:
        events = "UPDATE OR DELETE OR TRUNCATE"
        if table == "judgment_texts":
            events = "DELETE OR TRUNCATE"
            row = ("UPDATE ON judgment_texts FOR EACH ROW", "judgment_texts_only_erased", 19)
            guards["judgment_texts_only_erased"] = (table, *row)
        when = f"{events} ON {table} FOR EACH STATEMENT"
        guards[f"{table}_append_only"] = (
            table,
            when,
            "judgments_append_only",
            _STATEMENT[events],
        )
    return guards
