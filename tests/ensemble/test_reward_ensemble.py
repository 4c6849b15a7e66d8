"""The whole way: train, calibrate, score, compare, rank, evaluate, save, load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ensemble_rm import (
    FunctionScorer,
    Preferences,
    RewardEnsemble,
    Sample,
    TrunkOptions,
    evaluate,
    load_preferences,
    train,
)
from ensemble_rm.aggregation import lcb, mean, minimum
from ensemble_rm.calibration import Normaliser
from ensemble_rm.demo.data import FILE, truth_of
from ensemble_rm.errors import (
    AggregatorMismatchError,
    BaselineError,
    DataError,
    DigestMismatchError,
    ModelError,
    NotCalibratedError,
    OneMemberError,
    OptionError,
    StorageError,
    TooFewJudgmentsError,
)
from ensemble_rm.evaluation.report import draw_evaluation, evaluation_text
from ensemble_rm.members import HeadRecipe
from tests.support.saved_files import record_digests, rewrite_json

RECIPE = HeadRecipe()
OPTIONS = TrunkOptions(max_length=128, device="cpu")


@pytest.fixture(scope="module")
def parts() -> tuple[Preferences, ...]:
    pairs = load_preferences(FILE)[:1200]
    return pairs.split(0.5, 0.1, 0.2, 0.2, seed=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(parts: tuple[Preferences, ...], minilm_folder: Path, cache: Path) -> RewardEnsemble:
    return train(
        parts[0],
        parts[1],
        backbone=minilm_folder,
        members=3,
        options=OPTIONS,
        recipe=RECIPE,
        cache_dir=cache,
    )


@pytest.fixture(scope="module")
def ensemble(trained: RewardEnsemble, parts: tuple[Preferences, ...]) -> RewardEnsemble:
    return trained.calibrate(parts[2].shuffled_sides(seed=0))


def test_scores_come_in_the_order_of_the_samples(
    ensemble: RewardEnsemble, parts: tuple[Preferences, ...]
) -> None:
    samples = parts[3].samples()[:40]
    scores = ensemble.score(samples)
    assert scores.members.shape == (40, 3)
    np.testing.assert_array_equal(scores.reward, ensemble.aggregator(scores.members))
    np.testing.assert_allclose(scores.std, scores.members.std(axis=1, ddof=1))
    backwards = ensemble.score(samples[::-1])
    np.testing.assert_allclose(backwards.members[::-1], scores.members, atol=1e-4)
    assert scores.truncation.samples == 40
    assert ensemble.score([]).reward.shape == (0,)


def test_normalised_scores_have_a_mean_of_0_and_a_scale_of_1(
    ensemble: RewardEnsemble, parts: tuple[Preferences, ...]
) -> None:
    members = ensemble.score(parts[1].samples()).members
    np.testing.assert_allclose(members.mean(axis=0), 0, atol=1e-6)
    assert (members.std(axis=0) > 0.8).all()


def test_training_repeats_and_the_cache_changes_nothing(
    trained: RewardEnsemble, parts: tuple[Preferences, ...], minilm_folder: Path
) -> None:
    again = train(
        parts[0],
        parts[1],
        backbone=minilm_folder,
        members=3,
        options=OPTIONS,
        recipe=RECIPE,
        cache_dir=None,
    )
    samples = parts[3].samples()[:20]
    np.testing.assert_array_equal(again.score(samples).raw, trained.score(samples).raw)


def test_a_comparison_is_a_calibrated_probability(
    ensemble: RewardEnsemble, parts: tuple[Preferences, ...]
) -> None:
    test = parts[3][:30]
    prompts = [pair.prompt for pair in test]
    chosen, rejected = [p.chosen for p in test], [p.rejected for p in test]
    one = ensemble.compare(prompts, chosen, rejected)
    two = ensemble.compare(prompts, rejected, chosen)
    np.testing.assert_allclose(one.probability + two.probability, 1, atol=1e-6)
    assert ensemble.calibration is not None
    t = ensemble.calibration.temperature
    np.testing.assert_allclose(one.probability, 1 / (1 + np.exp(-one.margin / t)))
    np.testing.assert_allclose(one.total, one.aleatoric + one.epistemic)
    np.testing.assert_allclose(one.epistemic, two.epistemic, atol=1e-6)
    with pytest.raises(OptionError, match="29 second"):
        ensemble.compare(prompts, chosen, rejected[1:])


def test_a_temperature_belongs_to_its_aggregator(
    trained: RewardEnsemble, ensemble: RewardEnsemble, parts: tuple[Preferences, ...]
) -> None:
    ask = (["Hi"], ["Hello"], ["Bye"])
    with pytest.raises(NotCalibratedError, match="calibrate"):
        trained.compare(*ask)
    with pytest.raises(AggregatorMismatchError, match="lcb"):
        ensemble.compare(*ask, aggregator=lcb(1.0))
    with pytest.raises(AggregatorMismatchError):
        ensemble.with_aggregator(minimum()).compare(*ask)
    with pytest.raises(NotCalibratedError):
        trained.recalibrate(minimum())
    same = ensemble.recalibrate(lcb(1.0))
    anew = trained.calibrate(parts[2].shuffled_sides(seed=0), aggregator=lcb(1.0))
    assert same.calibration is not None and anew.calibration is not None
    assert same.calibration.fit == anew.calibration.fit
    with pytest.raises(TooFewJudgmentsError):
        trained.calibrate(parts[2][:10])
    with pytest.raises(DataError):
        trained.calibrate(Preferences(()))


def test_a_rank_is_the_order_of_the_rewards(ensemble: RewardEnsemble) -> None:
    prompts, lists = ["Hi", "Bye"], [["a", "Hello, friend!", "b"], ["See you", "x"]]
    rankings = ensemble.rank(prompts, lists)
    for prompt, texts, ranking in zip(prompts, lists, rankings, strict=True):
        reward = ensemble.score([Sample(prompt, text) for text in texts]).reward
        assert list(ranking.order) == list(np.argsort(-reward, kind="stable"))
    assert ensemble.rank([], []) == []


def test_comparisons_and_ranks_say_which_completions_were_cut(ensemble: RewardEnsemble) -> None:
    long = "a long answer " * 2000
    first, second = ["a", long, "b"], ["c", "d", long]
    prompts = ["Hi", "Bye", "Hi"]
    pairs = zip(prompts, first, second, strict=True)
    samples = [Sample(prompt, text) for prompt, *texts in pairs for text in texts]
    cut = ensemble.score(samples).truncation
    assert cut.completions.tolist() == [False, False, True, False, False, True]
    compared = ensemble.compare(prompts, first, second).truncation
    assert compared.completions.tolist() == cut.completions.tolist()
    assert compared.prompts.tolist() == cut.prompts.tolist()
    ranked = ensemble.rank(["Hi", "Bye"], [["a", long, "b"], ["c", "d"]])
    by_prompt = [ranking.truncation.completions.tolist() for ranking in ranked]
    assert by_prompt == [[False, True, False], [False, False]]


def test_a_round_trip_gives_identical_scores(
    ensemble: RewardEnsemble, parts: tuple[Preferences, ...], tmp_path: Path, minilm_folder: Path
) -> None:
    folder = ensemble.save_pretrained(tmp_path / "run")
    names = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors"}
    again = RewardEnsemble.from_pretrained(folder, device="cpu")
    samples = parts[3].samples()[:20]
    np.testing.assert_array_equal(again.score(samples).raw, ensemble.score(samples).raw)
    assert again.calibration == ensemble.calibration
    assert (again.aggregator, again.normaliser) == (ensemble.aggregator, ensemble.normaliser)
    assert again.recalibrate(minimum()).calibration is not None
    said = json.loads((folder / "ensemble.json").read_text())["provenance"]
    assert said["data"]["fit"]["digest"] == parts[0].digest
    assert said["versions"]["torch"]
    again.save_pretrained(folder)  # replaced as a whole
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("method", ["power", "isotonic", "bbq", "slices"])
def test_a_curve_and_slices_go_through_a_folder(
    trained: RewardEnsemble, parts: tuple[Preferences, ...], tmp_path: Path, method: str
) -> None:
    held = Preferences(
        tuple(replace(p, subset=(None, "a", "b")[i % 3]) for i, p in enumerate(parts[2]))
    ).shuffled_sides(seed=0)
    options = {"slices": True} if method == "slices" else {"method": method}
    fitted = trained.calibrate(held, **options)  # type: ignore[arg-type]
    again = RewardEnsemble.from_pretrained(fitted.save_pretrained(tmp_path / "run"), device="cpu")
    one, two = fitted.calibration, again.calibration
    assert one is not None and two is not None and one.evidence is not None
    assert one == two
    assert two.evidence is not None and two.evidence.subsets == held.subsets
    margins = one.evidence.margins(mean())
    np.testing.assert_array_equal(
        one.probability(margins, subsets=held.subsets),
        two.probability(margins, subsets=held.subsets),
    )
    new, same = fitted.recalibrate(minimum()).calibration, again.recalibrate(minimum()).calibration
    assert new is not None and same is not None
    assert (new.method, new.curve, new.slices) == (same.method, same.curve, same.slices)
    assert new.method == one.method and len(new.slices) == len(one.slices)


def test_a_baseline_is_trained_saved_and_asked_for(
    trained: RewardEnsemble,
    parts: tuple[Preferences, ...],
    minilm_folder: Path,
    cache: Path,
    tmp_path: Path,
) -> None:
    def run(validation: Preferences) -> RewardEnsemble:
        return train(
            parts[0],
            validation,
            backbone=minilm_folder,
            members=3,
            options=OPTIONS,
            recipe=RECIPE,
            baseline=True,
            cache_dir=cache,
        )

    with pytest.raises(BaselineError, match="row 0"):
        run(parts[1])
    references = Preferences(tuple(replace(p, reference="I see.") for p in parts[1]))
    based = run(references)
    assert based.normaliser.baseline
    np.testing.assert_allclose(based.normaliser.scale, trained.normaliser.scale, rtol=1e-4)
    samples = references.samples()
    np.testing.assert_allclose(based.score(samples).members.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(
        based.judge(references).margins(mean()), trained.judge(parts[1]).margins(mean()), atol=1e-3
    )
    again = RewardEnsemble.from_pretrained(based.save_pretrained(tmp_path / "run"), device="cpu")
    assert again.normaliser == based.normaliser
    np.testing.assert_array_equal(again.score(samples).reward, based.score(samples).reward)
    with pytest.raises(BaselineError):
        again.score([Sample("Hi", "Hello")])


def test_damage_is_named(ensemble: RewardEnsemble, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no ensemble"):
        RewardEnsemble.from_pretrained(tmp_path / "nowhere")
    folder = ensemble.save_pretrained(tmp_path / "run")
    member = folder / "members" / "0" / "member.json"
    other = {"config.json": {"sha256": "0" * 64, "bytes": 1}}
    rewrite_json(member, {"files": other})
    record_digests(folder)
    with pytest.raises(DigestMismatchError, match="--backbone"):
        RewardEnsemble.from_pretrained(folder)
    rewrite_json(member, {"files": None, "digest": "0" * 64})  # as older versions saved it
    record_digests(folder)
    with pytest.raises(ModelError, match="--backbone"):
        RewardEnsemble.from_pretrained(folder)
    (folder / "members" / "0" / "heads.safetensors").write_bytes(b"")
    record_digests(folder)
    with pytest.raises(StorageError, match="no saved head"):
        RewardEnsemble.from_pretrained(folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(StorageError, match="contains no ensemble"):
        ensemble.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "diary.txt").exists()


def test_an_ensemble_has_members_and_a_normaliser_of_them() -> None:
    length = FunctionScorer("length", lambda s: float(len(s.completion)))
    with pytest.raises(OptionError, match="at least one member"):
        RewardEnsemble((), Normaliser.identity(1), mean())
    with pytest.raises(OptionError, match="normaliser of 2 for 1"):
        RewardEnsemble((length,), Normaliser.identity(2), mean())


def test_one_member_has_no_disagreement(
    parts: tuple[Preferences, ...], minilm_folder: Path, cache: Path
) -> None:
    single = train(
        parts[0],
        parts[1],
        backbone=minilm_folder,
        members=1,
        options=OPTIONS,
        recipe=RECIPE,
        cache_dir=cache,
    ).calibrate(parts[2])
    verdict = single.compare(["Hi"], ["Hello"], ["Bye"])
    assert 0 < verdict.probability[0] < 1
    with pytest.raises(OneMemberError):
        _ = verdict.epistemic
    with pytest.raises(OneMemberError):
        _ = single.score([Sample("Hi", "Hello")]).std
    evaluation = evaluate(single, parts[3], draws=20)
    assert [row.kind for row in evaluation.rows] == ["member", "aggregator"]


def test_leaks_and_bad_options_are_refused(
    parts: tuple[Preferences, ...], minilm_folder: Path, cache: Path
) -> None:
    for options, message in (
        ({"members": 0}, "members"),
        ({"kind": "tree"}, "kind"),
        ({"recipe": HeadRecipe(views=("9:mean",))}, "layers 1 to 6"),
        ({"recipe": HeadRecipe(views=("1:mean", "2:mean"))}, "2 views for 3"),
    ):
        with pytest.raises(OptionError, match=message):
            train(
                parts[0],
                parts[1],
                backbone=minilm_folder,
                cache_dir=cache,
                **{"members": 3, **options},  # type: ignore[arg-type]
            )
    with pytest.raises(OptionError, match="prompts are in both"):
        train(parts[0], parts[0][:5], backbone=minilm_folder, cache_dir=cache)


def test_members_of_any_kind_stand_side_by_side(ensemble: RewardEnsemble) -> None:
    length = FunctionScorer("length", lambda s: float(len(s.completion)))
    both = RewardEnsemble(
        (*ensemble.scorers, length),
        Normaliser((*ensemble.normaliser.offset, 20.0), (*ensemble.normaliser.scale, 10.0)),
        mean(),
    )
    scores = both.score([Sample("Hi", "Hello, you there")])
    assert scores.raw[0, -1] == 16
    assert scores.members[0, -1] == pytest.approx(-0.4)
    with pytest.raises(StorageError, match="cannot be saved"):
        both.save_pretrained("unused-folder-of-a-test")
    assert not Path("unused-folder-of-a-test").exists()
    with pytest.raises(OptionError, match="differ"):
        RewardEnsemble((length, length), Normaliser.identity(2), mean())


def test_an_evaluation_says_what_it_measured(
    ensemble: RewardEnsemble, parts: tuple[Preferences, ...], tmp_path: Path
) -> None:
    evaluation = evaluate(ensemble, parts[3], draws=50)
    names = [row.name for row in evaluation.rows]
    assert names[:3] == list(ensemble.names)
    assert {"mean()", "minimum()", "lcb(kappa=1.0)"} <= set(names)
    own = evaluation.row("mean()")
    assert own.temperature is not None and ensemble.calibration is not None
    assert own.temperature.temperature == pytest.approx(ensemble.calibration.temperature)
    assert own.before["accuracy"] == own.after["accuracy"]
    assert own.after["nll"].low <= own.after["nll"].estimate <= own.after["nll"].high
    assert own.after["accuracy"].estimate > 0.5
    json.dumps(evaluation.to_json())
    text = evaluation_text(evaluation)
    assert "▸ mean()" in text and "lcb(kappa=1.0)" in text
    for picture in draw_evaluation(evaluation, tmp_path):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_a_calibration_the_rest_is_measured(
    trained: RewardEnsemble, parts: tuple[Preferences, ...]
) -> None:
    evaluation = evaluate(trained, parts[3], draws=20)
    row = evaluation.row("mean()")
    assert not row.after and "no calibration" in row.refusal
    assert "not calibrated" in evaluation_text(evaluation)


def test_the_demos_truth_knows_the_sides(parts: tuple[Preferences, ...]) -> None:
    test = parts[3]
    turned = Preferences(tuple(pair.swap() for pair in test))
    ids = [pair.id for pair in test]
    np.testing.assert_allclose(truth_of(ids, test.targets), 1 - truth_of(ids, turned.targets))
    whole = load_preferences(FILE)
    truth = truth_of([pair.id for pair in whole], whole.targets)
    # The verdicts were drawn from it: the winners' mean probability is E[p² + (1 − p)²].
    expected = (truth**2 + (1 - truth) ** 2).mean()
    assert truth.mean() == pytest.approx(expected, abs=0.02)
