"""Reading preferences: TRL's shapes, bad rows, duplicates, real files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ensemble_rm import load_preferences
from ensemble_rm.data.loading import read_comparisons, read_preferences, read_samples
from ensemble_rm.data.samples import prompt_key
from ensemble_rm.errors import BadRowsError, DataError

GOOD = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SHAPES: dict[str, dict[str, Any]] = {
    "explicit": GOOD,
    "implicit conversational": {
        "chosen": [turn("user", "Hi"), turn("assistant", "Hello!")],
        "rejected": [turn("user", "Hi"), turn("assistant", "Go away.")],
    },
    "conversational": {
        "prompt": [turn("user", "Hi")],
        "chosen": [turn("assistant", "Hello!")],
        "rejected": [turn("assistant", "Go away.")],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_trls_shapes_are_the_same_pair(shape: str) -> None:
    (pair,) = load_preferences([SHAPES[shape]])
    assert prompt_key(pair.prompt) == prompt_key("Hi")
    assert (pair.chosen, pair.rejected) == ("Hello!", "Go away.")


def test_the_prompt_of_two_texts_is_what_they_share() -> None:
    dialogue = "\n\nHuman: Hi\n\nAssistant:"
    (pair,) = load_preferences([{"chosen": f"{dialogue} Hello", "rejected": f"{dialogue} Hell"}])
    assert (pair.prompt, pair.chosen, pair.rejected) == (dialogue, " Hello", " Hell")
    (pair,) = load_preferences([{"chosen": "Say foxes", "rejected": "Say foxy"}])
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Say ", "foxes", "foxy")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "one", "rejected": "two"}, "share no beginning"),
        ({"chosen": "one", "rejected": "one"}, "share no beginning"),
        ({"chosen": "one", "rejected": [turn("user", "Hi")]}, "of one shape"),
        (
            {
                "chosen": [turn("user", "Hi"), turn("assistant", "a")],
                "rejected": [turn("user", "Ho"), turn("assistant", "b")],
            },
            "every turn but the last",
        ),
        (
            {
                "chosen": [turn("user", "Hi"), turn("user", "a")],
                "rejected": [turn("user", "Hi"), turn("assistant", "b")],
            },
            "end in an assistant message",
        ),
        ({**GOOD, "chosen": [turn("user", "a")]}, "assistant message, not 'user'"),
        ({**GOOD, "chosen": [turn("assistant", "a")] * 2}, "not 2 turns"),
        ({**GOOD, "votes": {"first": 1}}, "not \\['first'\\]"),
        ({**GOOD, "votes": 3}, "an object or two numbers"),
        ({**GOOD, "weight": True}, "finite number"),
        ({**GOOD, "tie": "yes"}, "true or false"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRowsError, match=message):
        load_preferences([GOOD, row])


@pytest.mark.parametrize("name", ["no.jsonl", "./nothing", "a/b/c", "plain"])
def test_what_is_neither_a_file_nor_a_hub_id_is_not_looked_for(name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_preferences(name)


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


BAD = [
    "not json",
    json.dumps({"prompt": "Hi", "chosen": "x"}),
    json.dumps(["a list"]),
    json.dumps({**GOOD, "weight": -1}),
    json.dumps({**GOOD, "votes": [0, 0]}),
    json.dumps({**GOOD, "prompt": ""}),
    json.dumps({**GOOD, "margin": "wide"}),
]


def test_every_bad_row_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [json.dumps(GOOD), *BAD])
    with pytest.raises(BadRowsError, match=f"{len(BAD)} of {len(BAD) + 1}") as caught:
        load_preferences(path)
    assert [problem.line for problem in caught.value.problems] == list(range(2, len(BAD) + 2))
    assert len(load_preferences(path, skip_bad=True)) == 1


def test_nothing_good_is_an_error_even_with_skip_bad(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_preferences(write(tmp_path / "bad.jsonl", BAD), skip_bad=True)
    with pytest.raises(DataError):
        load_preferences([])
    with pytest.raises(DataError, match="no such file"):
        load_preferences(tmp_path / "none.jsonl")


def test_duplicates_and_equal_sides_are_reported_and_kept(tmp_path: Path) -> None:
    same = {**GOOD, "rejected": GOOD["chosen"]}
    rows = [json.dumps(GOOD), json.dumps(GOOD), json.dumps(same)]
    pairs, report = read_preferences(write(tmp_path / "p.jsonl", rows))
    assert len(pairs) == 3
    assert [p.line for p in report.duplicates] == [2]
    assert [p.line for p in report.equal_sides] == [3]


def test_gzip_and_plain_are_the_same(tmp_path: Path) -> None:
    plain = write(tmp_path / "p.jsonl", [json.dumps(GOOD)] * 3)
    zipped = tmp_path / "p.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_preferences(plain).digest == load_preferences(zipped).digest


def test_votes_ties_weights() -> None:
    votes, tie = load_preferences([{**GOOD, "votes": [3, 1], "weight": 2}, {**GOOD, "tie": True}])
    assert (votes.target, votes.weight, tie.target) == (0.75, 2.0, 0.5)


def test_a_datasets_data_set() -> None:
    from datasets import Dataset

    pairs = load_preferences(Dataset.from_list([GOOD, SHAPES["explicit"]]))
    assert len(pairs) == 2


def test_samples_and_comparisons_keep_step_with_their_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": str(i)} for i in range(5)]
    path = write(tmp_path / "s.jsonl", [json.dumps(row) for row in rows])
    assert [sample.completion for sample in read_samples(path)] == list("01234")
    with pytest.raises(BadRowsError, match="completion"):
        list(read_samples([GOOD]))
    (pair,) = read_comparisons([{"prompt": "Hi", "first": "a", "second": "b"}])
    assert (pair.chosen, pair.rejected) == ("a", "b")
    with pytest.raises(BadRowsError, match=":2:"):
        read_comparisons([GOOD, {"prompt": "Hi"}])


@pytest.mark.parametrize(
    ("file", "pairs"),
    [("hh_rlhf.jsonl", 6301), ("tldr.jsonl", 8864), ("mtbench_votes.jsonl", 910)],
)
def test_real_files(shared_data: Path, file: str, pairs: int) -> None:
    found, report = read_preferences(shared_data / file)
    assert (len(found), report.rows) == (pairs, pairs)
    assert not report.problems
    if "votes" in file:
        assert ((found.targets > 0) & (found.targets < 1)).any()


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected", "reference"])
def test_half_a_character_is_an_error_of_its_row(tmp_path: Path, field: str) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [GOOD, GOOD | {field: "x\ud800"}, GOOD | {"prompt": "Who?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadRowsError, match=f"`{field}` is not valid Unicode") as caught:
        load_preferences(path)
    assert [problem.line for problem in caught.value.problems] == [2]


def test_half_a_character_in_a_sample_names_its_line() -> None:
    rows = [{"prompt": "Hi", "completion": "a"}, {"prompt": "Hi", "completion": "\udc00"}]
    with pytest.raises(BadRowsError, match="2: `completion` is not valid Unicode"):
        list(read_samples(rows))
