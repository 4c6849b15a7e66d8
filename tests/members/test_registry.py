"""The registry of kinds: names, errors, and a kind from outside the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from ensemble_rm import Preferences, RewardEnsemble, Sample, Scorer, train
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import OptionError, StorageError
from ensemble_rm.members import (
    BranchRecipe,
    FullScorer,
    MemberKind,
    make_recipe,
    member_kind,
    register_kind,
    registry,
    trained_kinds,
)
from ensemble_rm.members.backbone.checkpoint import locate
from tests.support.saved_files import record_digests
from tests.support.small_runs import OPTIONS, SAMPLES, few_pairs


def test_kinds_and_their_former_names() -> None:
    assert trained_kinds() == ("head", "branch", "lora", "full")
    assert member_kind("classifier") is member_kind("full")
    for name in (*trained_kinds(), "implicit", "remote", "judge"):
        assert member_kind(name).scorer_class().kind == name
    for name in trained_kinds():
        assert member_kind(name).recipe_class().kind == name
        assert callable(member_kind(name).trainer())


def test_unknown_kinds_and_fields_are_named() -> None:
    with pytest.raises(OptionError, match="did you mean 'branch'"):
        member_kind("brench")
    with pytest.raises(OptionError, match="kind 'remote' are not trained here"):
        make_recipe("remote")
    with pytest.raises(OptionError, match="blocks does not belong to kind 'head', but to 'branch'"):
        make_recipe("head", blocks=2)
    with pytest.raises(OptionError, match=r"spice does not belong to kind 'lora'$"):
        make_recipe("lora", spice=2)
    assert make_recipe("branch", blocks=1) == BranchRecipe(blocks=1)


class LengthScorer(Scorer):
    """Scores a completion by its length, in units of its own."""

    kind = "length"
    names = ("length",)

    def __init__(self, unit: float) -> None:
        self.unit = unit

    def score(self, samples: Sequence[Sample]) -> np.ndarray:
        return np.array([[len(sample.completion) / self.unit] for sample in samples])

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "unit": self.unit}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "member.json").write_text(json.dumps(self.describe()))

    @classmethod
    def load(cls, folder: Path, **_: Any) -> Self:
        return cls(json.loads((folder / "member.json").read_text())["unit"])


@pytest.fixture
def own_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


@pytest.mark.usefixtures("own_kinds")
def test_a_kind_from_outside_is_saved_and_loaded(tmp_path: Path) -> None:
    ensemble = RewardEnsemble((LengthScorer(7.0),), Normaliser.identity(1), mean())
    ensemble.save_pretrained(tmp_path / "run")
    with pytest.raises(StorageError, match="no kind of member 'length'"):
        RewardEnsemble.from_pretrained(tmp_path / "run")
    row = MemberKind("length", f"{__name__}:LengthScorer")
    register_kind(row)
    register_kind(row)  # the same row again changes nothing
    again = RewardEnsemble.from_pretrained(tmp_path / "run")
    np.testing.assert_array_equal(again.score(SAMPLES).raw, ensemble.score(SAMPLES).raw)
    assert "length" not in trained_kinds()
    with pytest.raises(OptionError, match="'head' already"):
        register_kind(MemberKind("head", f"{__name__}:LengthScorer"))


def _train_length(job: Any) -> Any:
    from ensemble_rm.members.learning.job import Trained
    from ensemble_rm.members.scorer import Truncation

    samples = job.validation.samples()
    scorer = LengthScorer(job.recipe.unit)
    return Trained((scorer,), scorer.score(samples), Truncation.none(len(samples)), {})


@pytest.mark.usefixtures("own_kinds")
def test_a_kind_from_outside_is_trained(small_folder: Path) -> None:
    from dataclasses import dataclass, field

    from ensemble_rm.members import Recipe

    @dataclass(frozen=True, kw_only=True)
    class LengthRecipe(Recipe):
        """How lengths are measured."""

        kind = "length"
        unit: float = field(default=3.0, metadata={"help": "characters per unit"})

        def resolve(self, backbone: Any, members: int) -> Self:
            return self

    sys.modules[__name__].LengthRecipe = LengthRecipe  # type: ignore[attr-defined]
    here = __name__
    register_kind(
        MemberKind(
            "length", f"{here}:LengthScorer", f"{here}:LengthRecipe", f"{here}:_train_length"
        )
    )
    parts: tuple[Preferences, ...] = few_pairs(20)
    ensemble = train(*parts, backbone=small_folder, kind="length", members=1, cache_dir=None)
    assert ensemble.names == ("length",)
    assert ensemble.provenance["recipe"]["unit"] == 3.0


def test_an_ensemble_that_says_classifier_is_loaded(minilm_folder: Path, tmp_path: Path) -> None:
    """The kind's name before it was `full`."""
    from tests.members.full.test_scorer import make_classifier

    model = make_classifier(minilm_folder, tmp_path / "model")
    scorer = FullScorer(locate(model), OPTIONS)
    ensemble = RewardEnsemble((scorer,), Normaliser.identity(1), mean())
    ensemble.save_pretrained(tmp_path / "run")
    for file in ("ensemble.json", "members/0/member.json"):
        text = (tmp_path / "run" / file).read_text()
        assert '"kind": "full"' in text
        (tmp_path / "run" / file).write_text(text.replace('"kind": "full"', '"kind": "classifier"'))
    record_digests(tmp_path / "run")
    again = RewardEnsemble.from_pretrained(tmp_path / "run", device="cpu")
    np.testing.assert_array_equal(again.score(SAMPLES).raw, ensemble.score(SAMPLES).raw)
    assert isinstance(again.scorers[0], FullScorer)
