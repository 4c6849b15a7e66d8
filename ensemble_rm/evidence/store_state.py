"""Compare a judgment store with the one that earlier runs read: it may only have grown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ensemble_rm.errors import StoreIntegrityError
from ensemble_rm.versions.audit_log import AuditLog

if TYPE_CHECKING:
    from ensemble_rm.judgments.database.chain import Chain


def require_known_head(audit: AuditLog, chain: Chain, store: str, *, accept: bool) -> bool:
    """Refuse a store that was rewound since the last run.

    Parameters
    ----------
    audit : AuditLog
        Of the run folder; each run's line has the head of the chain that it read.
    chain : Chain
        Of the store.
    store : str
        Its name, for the message.
    accept : bool
        Accept a store without the last run's head.

    Returns
    -------
    bool
        Whether the store lacks that head, and was accepted.

    Raises
    ------
    StoreIntegrityError
        If the store lacks it and `accept` is not set.
    """
    last: dict[str, Any] | None = None
    for line in audit.runs():
        if _chain_of(line):
            last = line
    if last is None or chain.has_head(_chain_of(last)["head"]):
        return False
    known = _chain_of(last)
    if not accept:
        raise StoreIntegrityError(
            f"{store} lacks judgments that run {last.get('run')} of {last.get('at')} read: its "
            f"chain had {known['judgments']} judgments and the head {known['head'][:12]}, which is "
            f"not among the {len(chain.links)} batches of {chain.judgments} judgments here. It was "
            "restored from an older backup, or is another store: restore the newest backup, or "
            "accept this one with --accept-rewound-store"
        )
    return True


def chain_json(chain: Chain) -> dict[str, Any]:
    """Return what a run logs about a chain."""
    return {"head": chain.head, "judgments": chain.judgments, "links": len(chain.links)}


def _chain_of(line: dict[str, Any]) -> dict[str, Any]:
    details = line.get("details")
    judgments = details.get("judgments") if isinstance(details, dict) else None
    known = judgments.get("chain") if isinstance(judgments, dict) else None
    return known if isinstance(known, dict) else {}
