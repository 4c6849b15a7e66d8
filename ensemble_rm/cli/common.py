"""What subcommands share: groups of options, files read and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ensemble_rm.aggregation.aggregator import Aggregator, make_aggregator
from ensemble_rm.aggregation.rule import RULES
from ensemble_rm.cli.options import nested, option
from ensemble_rm.cli.signatures import default_of
from ensemble_rm.errors import BadRowsError, OptionError

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console
    from ensemble_rm.data.samples import Preferences
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

ENSEMBLE = "folder of a saved ensemble"
RUN = "folder of a saved ensemble and its versions"
STORE = "judgment store: a file (SQLite) or postgresql://user@host/name"
JSON_ROWS = "JSON lines (.gz too)"
_MAKE = ("ensemble_rm.aggregation.aggregator", "make_aggregator")


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a saved ensemble may do: run custom code, send samples and tokens to servers."""

    allow_remote: tuple[str, ...] = option(
        "server that members may be on; repeated",
        default=(),
        metavar="[SCHEME://]HOST[:PORT]",
        shown="none",
    )
    token: Mapping[str, str] | None = option(
        "environment variable with the bearer token of a server; repeated",
        default=None,
        metavar="HOST=ENV",
        shown="ENSEMBLE_RM_TOKEN_<HOST>",
    )
    # A file of options may come with a stranger's ensemble.
    trust_remote_code: tuple[str, ...] = option(
        "model whose custom code may run, with the digest of that code; repeated",
        default=(),
        metavar="MODEL@DIGEST",
        shown="none",
        from_file=False,
    )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `RewardEnsemble.from_pretrained`, tokens included."""
        from ensemble_rm.cli.tokens import read_tokens

        return {
            "allow_remote": self.allow_remote,
            "tokens": read_tokens(self.token or {}, self.allow_remote),
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass(frozen=True, kw_only=True)
class Loading(Trust):
    """Options that load a saved ensemble: backbone, device, models in memory, trust."""

    backbone: str | None = option(
        "current location of the backbone", default=None, metavar="NAME", shown="as saved"
    )
    device: str | None = option(
        "device of the members: cpu, cuda or mps", default=None, metavar="NAME", shown="the best"
    )
    max_loaded_models: int | None = option(
        "maximum number of models in memory at once",
        default=None,
        metavar="N",
        shown="all",
    )
    verify: Literal["full", "stat"] = option(
        "how saved files are compared with their digests: every file is hashed, or small ones "
        "only, and the others by their size",
        default="full",
    )

    def open(self, folder: Path, *, version: int | None = None) -> RewardEnsemble:
        """Load a saved ensemble; members on other servers get their tokens."""
        from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

        return RewardEnsemble.from_pretrained(
            folder,
            version=version,
            backbone=self.backbone,
            device=self.device,
            max_loaded_models=self.max_loaded_models,
            verify=self.verify,
            **self.arguments(),
        )


@dataclass(frozen=True, kw_only=True)
class AggregatorOptions:
    """An aggregator by name. `WithCoefficients` adds the coefficients of all of them."""

    name: str | None = option(
        "aggregator",
        default=None,
        flag="aggregator",
        choices=tuple(RULES),
        shown="the ensemble's own",
    )
    weights: Mapping[str, float] | None = option(
        "weight of a member, ≥ 0, scaled to sum 1; repeated for every member",
        default=default_of(*_MAKE, "weights"),
        flag="weight",
        metavar="MEMBER=WEIGHT",
        shown="equal",
    )
    nan: Literal["raise", "omit"] | None = option(
        "handling of a member without a score, such as one whose server failed: an error, or "
        "leave it out of that sample",
        default=None,
        shown=default_of(*_MAKE, "nan"),
    )
    min_members: int | None = option(
        "minimum number of members with a score",
        default=None,
        metavar="N",
        shown=str(default_of(*_MAKE, "min_members")),
    )

    def make(self) -> Aggregator | None:
        """Return the aggregator; None where none is named.

        Raises
        ------
        OptionError
            If a coefficient is given without a name, or does not fit it.
        """
        given = {
            leaf.name: value
            for leaf in fields(self)
            if leaf.name != "name" and (value := getattr(self, leaf.name)) is not None
        }
        if self.name is None:
            if given:
                flag = "weight" if "weights" in given else next(iter(given)).replace("_", "-")
                raise OptionError(f"--{flag} needs --aggregator")
            return None
        return make_aggregator(self.name, **given)


WithCoefficients = make_dataclass(
    "WithCoefficients",
    [
        (coefficient.name, float | None, option(coefficient.help, default=None, metavar="X"))
        for rule in RULES.values()
        for coefficient in rule.coefficients
    ],
    bases=(AggregatorOptions,),
    frozen=True,
    kw_only=True,
)


def aggregator_options() -> Any:
    """Return a command's field for an aggregator and its coefficients."""
    return nested(WithCoefficients, panel="Aggregator")


def use_aggregator(ensemble: RewardEnsemble, aggregator: Aggregator | None) -> RewardEnsemble:
    """Return the ensemble with an aggregator, or as it is where that is None."""
    return ensemble if aggregator is None else ensemble.with_aggregator(aggregator)


def read_pairs(console: Console, source: str, *, skip_bad: bool) -> Preferences:
    """Read preference pairs; report bad, repeated and undecidable rows on standard error."""
    from ensemble_rm.data.loading import read_preferences

    pairs, report = read_preferences(source)
    for problem in report.problems:
        console.note(f"bad row: {problem}")
    # These rows are used all the same; twenty are enough to see the kind.
    for problem in (*report.duplicates, *report.equal_sides)[:20]:
        console.note(f"note: {problem}")
    if report.problems or report.duplicates or report.equal_sides:
        console.note(report.summary())
    # After every problem is listed, so that a file is corrected in one go.
    if report.problems and not skip_bad:
        raise BadRowsError(
            f"{len(report.problems)} of {report.rows} rows are bad; correct them, or leave them "
            "out with --skip-bad",
            report.problems,
        )
    console.read(f"{len(pairs)} pairs from {source}")
    if report.problems:
        console.left_out(f"{len(report.problems)} bad rows of {source}")
    return pairs


def write_jsonl(path: Path | None, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as they arrive to FILE.partial, and rename it FILE at the end.

    Without a path, write to standard output.
    """
    if path is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_file(path)
    with partial.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    # A rename within one folder: the file is complete or absent, whenever the run is killed.
    partial.replace(path)


def partial_file(path: Path) -> Path:
    """Return where a file is written before it is complete."""
    return path.with_name(f"{path.name}.partial")


def check_can_write(path: Path | None) -> None:
    """Make a file's folder, and check that the file can be written, before any expensive work.

    Raises
    ------
    OptionError
        If the path is a folder's.
    OSError
        If it cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise OptionError(f"{path} is a folder; name a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_file(path)
    # A killed run's partial file stays; only the one that this check makes is removed.
    left_over = partial.exists()
    partial.open("a", encoding="utf-8").close()
    if not left_over:
        partial.unlink()
