"""Check stored rows against their ids, which are digests of their contents.

Texts are covered by their digests, which are compared where a text is read. The check of a row
computes the id as `Judgment` does, from the columns as the database returns them: building a
`Judgment` needs the texts, and takes ten times as long.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from json.encoder import encode_basestring
from typing import Any

from sqlalchemy import Connection, Select, select, type_coerce
from sqlalchemy.types import NullType

from ensemble_rm.data.samples import as_prompt, prompt_key
from ensemble_rm.errors import StoreIntegrityError
from ensemble_rm.judgments.database.chain import RESTORE
from ensemble_rm.judgments.database.tables import judgments, texts

KEYS = ("id", "prompt", "first", "second", "prompt_key", "pair_key", "outcome", "annotator")
LABELS = ("source", "external_id", "batch", "policy", "subset", "strategy")
ROW = (*KEYS, "judged_at", *LABELS, "inclusion", "corrects", "link")
LABELS_KEPT = 100_000  # quoted labels in memory


def raw_rows() -> Select[Any]:
    """Select the columns `ROW` of judgments, as the driver returns them."""
    # NullType: SQLAlchemy's conversions of each value would double the time of reading.
    columns: list[Any] = [type_coerce(judgments.c[name], NullType()).label(name) for name in ROW]
    return select(*columns)


class RowChecker:
    """Checks rows of `raw_rows`, in chunks.

    Parameters
    ----------
    connection : Connection
        The transaction that reads the rows.
    store : str
        Name of the store, for messages.
    """

    def __init__(self, connection: Connection, store: str) -> None:
        self._connection, self._store = connection, store
        self._quoted: dict[str | None, str] = {None: "null"}
        self._prompt_keys: dict[bytes, bytes] = {}

    def check(self, rows: Sequence[Any]) -> None:
        """Raise `StoreIntegrityError` if a row does not have the content that its id states."""
        chats: dict[bytes, tuple[bytes, bytes]] = {}
        try:
            self._check_rows(rows, chats)
        except (TypeError, AttributeError) as error:  # SQLite stores any type in any column
            raise StoreIntegrityError(
                f"{self._store}: a judgment was changed by hand ({error}); {RESTORE}"
            ) from error
        if chats:
            self._check_chats(chats)

    def _check_rows(self, rows: Sequence[Any], chats: dict[bytes, tuple[bytes, bytes]]) -> None:
        quoted = self._quoted
        if len(quoted) > LABELS_KEPT:
            quoted = self._quoted = {None: "null"}
        for row in rows:
            id_, prompt, first, second, key, pair, outcome, annotator, time, *rest = row
            source, external, batch, policy, subset, strategy, inclusion, corrects, _ = rest
            try:
                by, at = quoted[annotator], quoted[source]
                labels = f"{quoted[batch]}, {quoted[policy]}, {quoted[subset]}, {quoted[strategy]}"
            except KeyError:
                for label in (annotator, source, batch, policy, subset, strategy):
                    quoted.setdefault(label, _quote(label))
                by, at = quoted[annotator], quoted[source]
                labels = f"{quoted[batch]}, {quoted[policy]}, {quoted[subset]}, {quoted[strategy]}"
            if type(time) is not str:  # PostgreSQL's driver returns a datetime
                time = time.isoformat()
            elif time[19:26] == ".000000":  # the id has no microseconds where they are 0
                time = time[:19] + time[26:]
            content = (
                f'[["{prompt.hex()}", "{first.hex()}", "{second.hex()}"], ["{outcome}", {by}, '
                f'"{time}", {at}, {_quote(external)}, {"null" if inclusion is None else inclusion}'
                f"], [{labels}, {'null' if corrects is None else _hex(corrects)}]]"
            )
            sides = first + second if first <= second else second + first
            if sha256(content.encode()).digest()[:16] != id_:
                raise self.changed(id_)
            if sha256(key + sides).digest()[:16] != pair:
                raise self.changed(id_, "its pair's digest")
            if key != prompt:
                chats[prompt] = (key, id_)

    def _check_chats(self, chats: dict[bytes, tuple[bytes, bytes]]) -> None:
        """Check prompts of one user message, whose key is that of its text."""
        unknown = [prompt for prompt in chats if prompt not in self._prompt_keys]
        if unknown:
            if len(self._prompt_keys) > LABELS_KEPT:
                self._prompt_keys = {}
            query = select(texts.c.digest, texts.c.body).where(texts.c.digest.in_(unknown))
            for digest, body in self._connection.execute(query):
                # An erased prompt has no text to compare; its pairs are not read.
                if body:
                    key = bytes.fromhex(prompt_key(as_prompt(json.loads(body))))
                    self._prompt_keys[digest] = key
        for prompt, (key, id_) in chats.items():
            if self._prompt_keys.get(prompt, key) != key:
                raise self.changed(id_, "its prompt's digest")

    def changed(self, id_: bytes, what: str = "its content") -> StoreIntegrityError:
        """Return the error of a changed row."""
        return StoreIntegrityError(
            f"{self._store}: judgment {id_.hex()} was changed by hand: {what} does not fit its id; "
            f"{RESTORE}"
        )


def _quote(label: str | None) -> str:
    return "null" if label is None else encode_basestring(label)


def _hex(digest: bytes) -> str:
    return f'"{digest.hex()}"'
