"""Selected pairs as tasks for annotation tools: Label Studio, Argilla, JSONL.

Field names are those that the store's importers look for, so that annotations return with each
pair's strategy and inclusion probability.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from ensemble_rm.active_learning.selection import SelectedPair, SelectedPairs
from ensemble_rm.data.samples import prompt_json
from ensemble_rm.errors import OptionError

Format: TypeAlias = Literal["label-studio", "argilla", "jsonl"]
FORMATS: tuple[str, ...] = get_args(Format)
Row: TypeAlias = dict[str, Any]

_CONFIG = """\
<View>
  {prompt}
  <Pairwise name="comparison" toName="answer1,answer2"/>
  <Style>.pair {{display: grid; grid-template-columns: 1fr 1fr; gap: 1em}}</Style>
  <View className="pair">
    <Text name="answer1" value="$answer1"/>
    <Text name="answer2" value="$answer2"/>
  </View>
</View>
"""
_TEXT = '<Text name="prompt" value="$prompt"/>'
_TURNS = (
    '<Paragraphs name="prompt" value="$prompt" layout="dialogue" nameKey="role" textKey="content"/>'
)


def label_studio_config(*, messages: bool) -> str:
    """Return the labelling configuration of a Label Studio project.

    Parameters
    ----------
    messages : bool
        Whether prompts are messages or text; a project has one of the two.
    """
    return _CONFIG.format(prompt=_TURNS if messages else _TEXT)


def to_tasks(
    selected: SelectedPairs, form: str, *, batch: str | None = None, policy: str | None = None
) -> list[Row]:
    """Return one JSON object per pair.

    Parameters
    ----------
    selected : SelectedPairs
    form : {"label-studio", "argilla", "jsonl"}
        Tasks with ``prompt``, ``answer1`` and ``answer2`` in ``data``; records with the fields
        ``prompt``, ``first`` and ``second``; or judgment rows without ``outcome``,
        ``annotator``, ``judged_at`` and ``source``.
    batch, policy : str, optional
        Names of the annotation batch and of the policy that wrote the completions.

    Returns
    -------
    list of dict

    Raises
    ------
    OptionError
        If the form is unknown.
    """
    if form not in FORMATS:
        raise OptionError(f"format must be one of {FORMATS}, not {form!r}")
    make = _FORMS[form]
    return [make(pair, _metadata(pair, batch, policy)) for pair in selected.pairs]


def _metadata(pair: SelectedPair, batch: str | None, policy: str | None) -> Row:
    """Return the fields that a judgment of the pair keeps next to its texts."""
    metadata = {
        "strategy": pair.strategy,
        "inclusion": pair.inclusion,
        "batch": batch,
        "policy": policy,
        "subset": pair.subset,
    }
    return {name: value for name, value in metadata.items() if value is not None}


def _task(pair: SelectedPair, metadata: Mapping[str, Any]) -> Row:
    texts = {"prompt": prompt_json(pair.prompt), "answer1": pair.first, "answer2": pair.second}
    return {"data": texts | {"external_id": pair.external_id} | dict(metadata)}


def _record(pair: SelectedPair, metadata: Mapping[str, Any]) -> Row:
    fields = {"prompt": prompt_json(pair.prompt), "first": pair.first, "second": pair.second}
    return {"id": pair.external_id, "fields": fields, "metadata": dict(metadata)}


def _row(pair: SelectedPair, metadata: Mapping[str, Any]) -> Row:
    texts = {"prompt": prompt_json(pair.prompt), "first": pair.first, "second": pair.second}
    # No external id: several annotators may judge a row, and each judgment needs its own id.
    return texts | dict(metadata)


_FORMS: dict[str, Callable[[SelectedPair, Mapping[str, Any]], Row]] = {
    "label-studio": _task,
    "argilla": _record,
    "jsonl": _row,
}
