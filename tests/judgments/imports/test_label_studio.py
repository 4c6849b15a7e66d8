"""Label Studio's exports: both formats say the same, bad annotations are named, verdicts change.

Tasks are written as Label Studio writes them, and made JSON_MIN as its converter does: the task's
data are spread out, the type is taken off a region and the list off a single choice.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ensemble_rm.errors import BadRowsError, OptionError
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.imports.formats import Imported, ImportOptions
from ensemble_rm.judgments.imports.importing import import_judgments
from ensemble_rm.judgments.store import JudgmentStore
from tests.support.judgment_rows import write

CREATED, UPDATED = "2026-03-09T22:16:08.728353Z", "2026-03-09T22:20:00.000000Z"
STUDIO = ImportOptions(source="project-83")


@pytest.fixture
def store(store_place: str) -> JudgmentStore:
    return JudgmentStore.create(store_place)


def annotation(i: int, value: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    kind = "choices" if value and "choices" in value else "pairwise"
    region = {"id": f"r{i}", "from_name": "comparison", "to_name": "answer1,answer2", "type": kind}
    said = {
        "id": i,
        "completed_by": {"id": 10 + i, "email": f"rater{i}@example.com"},
        "result": [region | {"value": value}] if value is not None else [],
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": CREATED,
        "updated_at": UPDATED,
        "lead_time": 4.288,
    }
    return said | changes


def task(i: int, *annotations: dict[str, Any], **data: Any) -> dict[str, Any]:
    fields = {"prompt": f"p{i}", "answer1": f"left {i}", "answer2": f"right {i}", **data}
    said = {"id": i, "data": fields, "annotations": list(annotations), "predictions": []}
    return said | {"project": 83, "meta": {}, "created_at": CREATED, "updated_at": UPDATED}


def minimal(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Label Studio's converter makes of tasks as JSON_MIN."""
    rows = []
    for one in tasks:
        for said in one["annotations"] or [{}]:
            if said.get("was_cancelled"):
                continue
            row = {**one["data"], "id": one["id"]}
            for region in said.get("result", []):
                single = region["type"] == "choices" and len(region["value"]["choices"]) == 1
                value = region["value"]["choices"][0] if single else [region["value"]]
                row[region["from_name"]] = value
            who = said.get("completed_by", "unknown")
            row["annotator"] = who.get("email") if isinstance(who, dict) else who
            row |= {"annotation_id": said.get("id"), "lead_time": said.get("lead_time")}
            row |= {name: said.get(name) for name in ("created_at", "updated_at")}
            rows.append(row)
    return rows


TASKS = [
    task(1, annotation(1, {"selected": "left"}), annotation(2, {"selected": "right"})),
    task(2, annotation(3, {"choices": ["tie"]}, completed_by=7), batch="b", inclusion=0.5),
    task(3, annotation(4, {"selected": "left"}, was_cancelled=True)),
    task(4),
    task(5, annotation(5, {"selected": "right"}), prompt=[{"role": "user", "content": "Hi"}]),
]


@pytest.mark.parametrize("array", [True, False])
def test_label_studio_says_the_same_in_both_formats(
    store: JudgmentStore, tmp_path: Path, *, array: bool
) -> None:
    path = write(tmp_path / "full.json", TASKS, array=array)
    found = import_judgments(store, path, format="label-studio", options=STUDIO)
    assert (found.added, found.left_out) == (4, {"skipped by the annotator": 1, "unlabelled": 1})
    by_name = {one.external_id: one for one in store.read()}
    assert [by_name[f"annotation:{i}"].outcome for i in (1, 2, 3, 5)] == [
        *("first", "second", "tie", "second")
    ]
    assert by_name["annotation:1"].annotator == "rater1@example.com"
    assert by_name["annotation:3"].annotator == "7"
    assert by_name["annotation:1"].first == "left 1"
    assert by_name["annotation:1"].judged_at == datetime.fromisoformat(CREATED)
    assert (by_name["annotation:3"].batch, by_name["annotation:3"].inclusion) == ("b", 0.5)
    assert by_name["annotation:5"].prompt[0].role == "user"  # type: ignore[union-attr]

    rows = minimal(TASKS)
    path = write(tmp_path / "min.json", rows, array=array)
    found = import_judgments(store, path, format="label-studio-min", options=STUDIO)
    assert (found.added, found.already, found.left_out) == (0, 4, {"unlabelled": 1})
    alone = JudgmentStore.create(tmp_path / "alone.db")
    import_judgments(alone, path, format="label-studio-min", options=STUDIO)
    assert alone.digest() == store.digest()


def test_left_is_the_first_name_of_to_name(store: JudgmentStore, tmp_path: Path) -> None:
    said = annotation(1, {"selected": "left"})
    said["result"][0]["to_name"] = "answer2,answer1"
    path = write(tmp_path / "turned.json", [task(1, said)], array=True)
    import_judgments(store, path, format="label-studio", options=STUDIO)
    (one,) = store.read()
    assert (one.first, one.second, one.outcome) == ("right 1", "left 1", "first")


def test_label_studios_names_and_labels_can_be_others(store: JudgmentStore, tmp_path: Path) -> None:
    said = annotation(1, {"choices": ["B is better"]})
    other = annotation(2, {"choices": ["a"]})["result"][0] | {"from_name": "tone"}
    said["result"].append(other)
    data = task(1, said)
    data["data"] = {"question": "q", "a": "one", "b": "two"}
    path = write(tmp_path / "other.json", [data], array=True)
    options = ImportOptions(source="s", prompt="question", first="a", second="b")
    with pytest.raises(BadRowsError, match=r"\['comparison', 'tone'\]; choose one"):
        import_judgments(store, path, format="label-studio", options=options)
    options = ImportOptions(
        source="s", prompt="question", first="a", second="b", question="comparison",
        labels={"B is better": "second"},
    )  # fmt: skip
    import_judgments(store, path, format="label-studio", options=options)
    assert [one.outcome for one in store.read()] == ["second"]
    tone = ImportOptions(source="tone", prompt="question", first="a", second="b", question="tone")
    import_judgments(store, path, format="label-studio", options=tone)
    assert [one.outcome for one in store.read(JudgmentFilter(source="tone"))] == ["first"]


@pytest.mark.parametrize("format_", ["label-studio", "label-studio-min"])
def test_an_empty_annotation_is_a_tie_only_when_asked(
    store: JudgmentStore, tmp_path: Path, format_: str
) -> None:
    tasks = [task(1, annotation(1, None))]
    rows = tasks if format_ == "label-studio" else minimal(tasks)
    path = write(tmp_path / "empty.json", rows, array=True)
    with pytest.raises(BadRowsError, match="without a selection"):
        import_judgments(store, path, format=format_, options=STUDIO)
    options = ImportOptions(source="project-83", empty_is_tie=True)
    import_judgments(store, path, format=format_, options=options)
    assert [one.outcome for one in store.read()] == ["tie"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (task(1, annotation(1, {"selected": "both"})), "unknown verdict 'both'"),
        (task(1, annotation(1, {"choices": ["first", "tie"]})), "must be one selection"),
        (task(1, annotation(1, {"selected": "left"}, result="x")), "list of objects, not 'x'"),
        (task(1, annotation(1, {"selected": "left"}, id=None)), "has no `id`"),
        (task(1, annotation(1, {"selected": "left"}, completed_by=None)), "names no annotator"),
        (task(1, annotation(1, {"selected": "left"}, created_at=None)), "has no `created_at`"),
        (task(1, annotation(1, {"selected": "left"}), answer2=None), "needs the field 'answer2'"),
        (task(1, annotation(1, {"selected": "left"}), answer1=5), "`first` must be text, not int"),
        (task(1, annotation(1, {"selected": "left"}), strategy="bald"), "needs `inclusion`"),
        ({"id": 1, "data": {}}, "needs `data` and `annotations`"),
        ({"data": {}, "annotations": ["x"]}, "must be an object, not 'x'"),
    ],
)
def test_bad_annotations_are_named_and_the_others_kept(
    store: JudgmentStore, tmp_path: Path, bad: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / "bad.json", [*TASKS[:2], bad, TASKS[4]], array=True)
    with pytest.raises(BadRowsError, match="nothing was written") as caught:
        import_judgments(store, path, format="label-studio", options=STUDIO)
    (problem,) = caught.value.problems
    assert problem.line == 3 and said in problem.reason
    found = import_judgments(store, path, format="label-studio", options=STUDIO, skip_bad=True)
    assert (found.added, found.problems) == (3 + (len(TASKS[4]["annotations"])), [problem])


def test_an_export_needs_the_name_of_its_source(store: JudgmentStore, tmp_path: Path) -> None:
    path = write(tmp_path / "full.json", TASKS, array=True)
    with pytest.raises(OptionError, match="does not name its source"):
        import_judgments(store, path, format="label-studio")


# Verdicts that change ---------------------------------------------------------------------------


def revised(selected: str, when: str) -> list[dict[str, Any]]:
    return [task(1, annotation(1, {"selected": selected}, updated_at=when))]


def test_a_changed_verdict_is_refused_or_becomes_a_correction(
    store: JudgmentStore, tmp_path: Path
) -> None:
    path, kind = tmp_path / "export.json", "label-studio"

    def come(selected: str, when: str, **options: Any) -> Imported:
        write(path, revised(selected, when), array=True)
        return import_judgments(store, path, format=kind, options=STUDIO, **options)

    def holds() -> list[tuple[str, datetime]]:
        return [(one.outcome, one.judged_at) for one in store.read()]

    times = [f"2026-04-0{day}T12:00:00Z" for day in range(1, 6)]
    come("left", times[0])
    assert come("left", times[1], correct=True).already == 1  # touched, not changed
    with pytest.raises(BadRowsError, match="'annotation:1' of source 'project-83' is stored with"):
        come("right", times[2])
    found = come("right", times[2], correct=True)
    assert (found.added, found.corrections) == (1, 1)
    assert holds() == [("second", datetime(2026, 4, 3, 12, tzinfo=UTC))]
    for again in (times[2], times[3]):
        assert come("right", again, correct=True) == Imported(verdicts=1, already=1)
    assert come("left", times[0], correct=True).already == 1  # an older export changes nothing
    assert come("left", times[0]).already == 1
    assert holds()[0][0] == "second"
    assert come("left", times[4], correct=True).corrections == 1  # and back again
    assert holds() == [("first", datetime(2026, 4, 5, 12, tzinfo=UTC))]
    assert store.count(JudgmentFilter(with_corrected=True)) == 3


def test_a_dry_run_sees_corrections_too(store: JudgmentStore, tmp_path: Path) -> None:
    path = write(tmp_path / "one.json", revised("left", UPDATED), array=True)
    import_judgments(store, path, format="label-studio", options=STUDIO)
    twice = revised("right", "2026-05-01T00:00:00Z") + revised("left", "2026-06-01T00:00:00Z")
    write(path, twice, array=True)
    options: dict[str, Any] = {"format": "label-studio", "options": STUDIO, "correct": True}
    dry = import_judgments(store, path, dry_run=True, **options)
    assert (dry.added, dry.corrections) == (2, 2)
    assert import_judgments(store, path, **options) == dry
    assert [one.outcome for one in store.read()] == ["first"]


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_changed_text_is_no_changed_verdict(
    store: JudgmentStore, tmp_path: Path, *, dry_run: bool
) -> None:
    """A task whose answer was edited is another pair: its verdict does not replace the old one."""
    path = write(tmp_path / "one.json", revised("left", UPDATED), array=True)
    import_judgments(store, path, format="label-studio", options=STUDIO)
    edited = revised("right", "2026-05-01T00:00:00Z")
    edited[0]["data"]["answer1"] = "an edited answer"
    write(path, edited, array=True)
    with pytest.raises(BadRowsError, match="the correction has another pair of completions"):
        import_judgments(
            store, path, format="label-studio", options=STUDIO, correct=True, dry_run=dry_run
        )
    assert [one.outcome for one in store.read()] == ["first"]


def test_a_changed_probability_is_no_repeat(store: JudgmentStore, tmp_path: Path) -> None:
    """The same verdict with another weight would count otherwise: it is refused, or corrected."""
    path = tmp_path / "export.json"
    for inclusion in (0.5, 0.25):
        one = task(1, annotation(1, {"selected": "left"}), strategy="bald", inclusion=inclusion)
        write(path, [one], array=True)
        options: dict[str, Any] = {"format": "label-studio", "options": STUDIO}
        if inclusion == 0.25:
            with pytest.raises(BadRowsError, match="is stored with other content"):
                import_judgments(store, path, **options)
            options["correct"] = True
        import_judgments(store, path, **options)
    assert [one.inclusion for one in store.read()] == [0.25]
