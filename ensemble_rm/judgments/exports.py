"""Export judgments as JSONL rows or as a `datasets` data set; `Judgment.from_json` reads both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ensemble_rm.data.samples import Message, prompt_json
from ensemble_rm.errors import MissingExtraError
from ensemble_rm.judgments.filter import ALL_JUDGMENTS, JudgmentFilter
from ensemble_rm.judgments.judgment import FIELDS, Judgment
from ensemble_rm.judgments.store import BATCH, JudgmentStore, in_batches
from ensemble_rm.progress import Progress, silent


def export_judgments(
    store: JudgmentStore, where: JudgmentFilter = ALL_JUDGMENTS, *, progress: Progress = silent
) -> Iterator[dict[str, Any]]:
    """Stream judgments as JSONL rows.

    Parameters
    ----------
    store : JudgmentStore
    where : JudgmentFilter
        Selection; with ``with_corrected`` the rows restore the whole store.
    progress : callable
        Called with (stage, done, total).

    Yields
    ------
    dict
        See `Judgment.to_json`.
    """
    total = store.count(where)
    for done, one in enumerate(store.read(where), start=1):
        yield one.to_json()
        if done % BATCH == 0 or done == total:
            progress("exporting", done, total)


def judgment_dataset(
    store: JudgmentStore, where: JudgmentFilter = ALL_JUDGMENTS, *, progress: Progress = silent
) -> Any:
    """Return judgments as a data set in memory.

    Parameters
    ----------
    store : JudgmentStore
    where : JudgmentFilter
        Selection.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    datasets.Dataset
        One row per judgment, by time and id; columns as in `Judgment`, plus `id`. Prompts are
        text; if one of them is a conversation, all are lists of messages.

    Raises
    ------
    MissingExtraError
        If `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            "a data set needs the package `datasets`: pip install 'ensemble-rm[data]'"
        ) from error
    chat = store.has_conversations(where)
    text = datasets.Value("string")
    features = datasets.Features(
        dict.fromkeys(("id", *FIELDS), text)
        | {"judged_at": datasets.Value("timestamp[us, tz=UTC]")}
        | {"inclusion": datasets.Value("float64")}
        | ({"prompt": datasets.List({"role": text, "content": text})} if chat else {})
    )
    parts, done, total = [], 0, store.count(where)
    for batch, _ in in_batches(store.read(where), BATCH):
        columns = {name: [_cell(one, name, chat=chat) for one in batch] for name in features}
        parts.append(datasets.Dataset.from_dict(columns, features=features))
        done += len(batch)
        progress("exporting", done, total)
    return datasets.concatenate_datasets(parts)


def _cell(one: Judgment, name: str, *, chat: bool) -> Any:
    if name != "prompt":
        return getattr(one, name)
    prompt = (Message("user", one.prompt),) if chat and isinstance(one.prompt, str) else one.prompt
    return prompt_json(prompt)
