"""``ensemble-rm route``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import ENSEMBLE, JSON_ROWS, Loading, check_can_write, write_jsonl
from ensemble_rm.cli.options import argument, nested, option
from ensemble_rm.cli.select import BATCH, POLICY, TASK_FORMATS, write_tasks
from ensemble_rm.cli.signatures import default_of
from ensemble_rm.errors import OptionError
from ensemble_rm.members.remote.client import ClientOptions

if TYPE_CHECKING:
    from ensemble_rm.active_learning.routing import Routed
    from ensemble_rm.cli.console import Console
    from ensemble_rm.members.judges.comparator import JudgeComparator
    from ensemble_rm.members.remote.address import Token

_ROUTE = ("ensemble_rm.active_learning.routing", "route")


@dataclass(frozen=True, kw_only=True)
class Route(Command):
    """Compare pairs, and ask a judge about the uncertain ones.

    A pair is a row with `prompt` (text or messages), `first` and `second`, and optionally `id`,
    `subset` and `reference`. Pairs whose uncertainty reaches the threshold go to the judge; those
    that it cannot answer, or that exceed --budget, go to the human pool, with a random share of the
    others (--audit-share). `ensemble-rm judgments import` reads the humans' verdicts.
    """

    ensemble: Path = argument(ENSEMBLE)
    data: str = option(f"pairs as {JSON_ROWS}", metavar="FILE")
    threshold: float | None = option(
        "minimum uncertainty of a routed pair; this or --share is needed",
        default=default_of(*_ROUTE, "threshold"),
        metavar="NATS",
    )
    share: float | None = option(
        "maximum share of routed pairs; this or --threshold is needed",
        default=default_of(*_ROUTE, "share"),
        metavar="SHARE",
    )
    uncertainty: Literal["epistemic", "total", "aleatoric", "predictive"] = option(
        "kind of uncertainty; an ensemble of one member has only predictive",
        default=default_of(*_ROUTE, "uncertainty"),
    )
    budget: int | None = option(
        "maximum number of pairs for the judge",
        default=default_of(*_ROUTE, "budget"),
        metavar="N",
        shown="all that are routed",
    )
    final: Literal["judge", "pooled"] = option(
        "final probability of a routed pair: the judge's, or pooled with the ensemble's",
        default=default_of(*_ROUTE, "final"),
    )
    out: Path | None = option(
        "file of the verdicts", default=None, metavar="FILE", shown="standard output"
    )
    dry_run: bool = option("count what would be routed; ask and write nothing", default=False)
    judge_url: str | None = option(
        "address of an OpenAI-compatible server, …/v1", default=None, metavar="URL", panel="Judge"
    )
    model: str | None = option(
        "name of the judge at its server", default=None, metavar="NAME", panel="Judge"
    )
    rubric: str = option(
        "rubric of the judge: a file, or the name of a built-in rubric",
        default="pairwise",
        metavar="FILE",
        panel="Judge",
    )
    price: tuple[float, float] | None = option(
        "price of a million prompt tokens, and of a million completion tokens",
        default=None,
        metavar="PROMPT COMPLETION",
        panel="Judge",
    )
    client: ClientOptions = nested(ClientOptions, panel="Requests", seed=None)
    pool: Path | None = option(
        "file of the pairs for humans", default=None, metavar="FILE", panel="Human pool"
    )
    format: str = option(
        "format of the tasks", default="jsonl", choices=TASK_FORMATS, panel="Human pool"
    )
    batch: str | None = option(BATCH, default=None, metavar="NAME", panel="Human pool")
    policy: str | None = option(POLICY, default=None, metavar="NAME", panel="Human pool")
    audit_share: float = option(
        "share of the confident pairs that humans audit",
        default=default_of(*_ROUTE, "audit_share"),
        metavar="SHARE",
        panel="Human pool",
    )
    seed: int = option(
        "seed of the audit and of the order of sides",
        default=default_of(*_ROUTE, "seed"),
        panel="Human pool",
    )
    loading: Loading = nested(Loading, panel="Loading")

    example: ClassVar[str] = (
        "  ensemble-rm route runs/hh --data pairs.jsonl --share 0.2 \\\n"
        "      --judge-url http://gpu8:8000/v1 --model Qwen/Qwen3-32B --out verdicts.jsonl \\\n"
        "      --pool humans.jsonl"
    )

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.share is None):
            raise OptionError("give one of --threshold and --share")

    def run(self, console: Console) -> None:
        """Route the pairs."""
        judge = self._judge()
        self._check_files(console)
        from ensemble_rm.active_learning.routing import route
        from ensemble_rm.data.loading import read_comparisons

        pairs = read_comparisons(self.data)
        ensemble = self.loading.open(self.ensemble)
        with console.progress() as progress:
            routed = route(
                ensemble,
                pairs,
                threshold=self.threshold,
                share=self.share,
                judge=None if self.dry_run else judge,
                uncertainty=self.uncertainty,
                budget=self.budget,
                final=self.final,
                audit_share=self.audit_share,
                seed=self.seed,
                progress=progress,
            )
        if not self.dry_run:
            self._write(routed)
        if self.out is not None or self.dry_run:
            console.result(self._data(routed, judge), self._text(routed, judge))
        console.read(f"{len(pairs)} pairs from {self.data}")
        if self.dry_run:
            return
        if self.out is not None:
            console.save(self.out)
        if self.pool is not None:
            console.note(f"pairs for humans: {self.pool}")
            console.next("ensemble-rm judgments import judgments.db ANSWERS")

    def _check_files(self, console: Console) -> None:
        """Refuse files that cannot be written, before any paid call to a judge."""
        if self.dry_run:
            return
        if console.json and self.out is None:
            raise OptionError("--json prints one object, so the verdicts need --out")
        if self.pool is not None and self.pool == self.out:
            raise OptionError(f"--out and --pool are one file, {self.out}; name two")
        check_can_write(self.out)
        check_can_write(self.pool)

    def _judge(self) -> JudgeComparator | None:
        if self.judge_url is None:
            if self.model is not None or self.price is not None:
                raise OptionError("--model and --price need --judge-url")
            return None
        if self.model is None:
            raise OptionError("--judge-url needs --model, the judge's name at its server")
        from ensemble_rm.members.judges.comparator import JudgeComparator
        from ensemble_rm.members.judges.usage import Price

        return JudgeComparator(
            self.judge_url,
            model=self.model,
            rubric=self.rubric,
            token=None if self.dry_run else self._token(),
            price=None if self.price is None else Price(*self.price),
            client=self.client,
        )

    def _token(self) -> Token | None:
        """Return the judge's token; --token may also name servers of members."""
        from ensemble_rm.cli.tokens import read_tokens
        from ensemble_rm.members.remote.address import check_url, origin_of, token_for

        url = check_url(self.judge_url or "")
        return token_for(url, read_tokens(self.loading.token or {}, [origin_of(url)]))

    def _write(self, routed: Routed) -> None:
        from ensemble_rm.active_learning.tasks import to_tasks

        write_jsonl(self.out, _rows(routed))
        if self.pool is not None:
            tasks = to_tasks(routed.pool, self.format, batch=self.batch, policy=self.policy)
            write_tasks(self.pool, self.format, tasks)

    def _data(self, routed: Routed, judge: JudgeComparator | None) -> dict[str, Any]:
        return routed.saving.to_json() | {
            "uncertain": _uncertain(routed),
            "would_ask": self._would_ask(routed, judge),
            "threshold": routed.threshold,
            "uncertainty": self.uncertainty,
            "failed": sum(reason is not None for reason in routed.failures),
            "pool": len(routed.pool),
            "out": None if self.out is None else str(self.out),
            "dry_run": self.dry_run,
        }

    def _would_ask(self, routed: Routed, judge: JudgeComparator | None) -> int:
        if judge is None:
            return 0
        uncertain = _uncertain(routed)
        return uncertain if self.budget is None else min(uncertain, self.budget)

    def _text(self, routed: Routed, judge: JudgeComparator | None) -> str:
        saving, n = routed.saving, routed.saving.pairs
        head = (
            f"{_uncertain(routed)} of {n} pairs reach {routed.threshold:.4g} nats "
            f"({self.uncertainty}); "
        )
        if self.dry_run:
            count = self._would_ask(routed, judge)
            return head + f"the judge would be asked about {count}; nothing written (--dry-run)"
        lines = [head + f"the judge was asked about {saving.judged} ({saving.share:.1%})"]
        without, usage = saving.without, saving.usage
        if without is not None:
            tokens = usage.prompt_tokens + usage.completion_tokens
            all_tokens = without.prompt_tokens + without.completion_tokens
            cost = "" if usage.cost is None else f", cost {usage.cost:.4g} of {without.cost:.4g}"
            lines.append(
                f"  {usage.calls + usage.failed} of {without.calls} calls, {tokens} of "
                f"{all_tokens} tokens{cost}; {usage.latency:.3g} s per call"
            )
        failed = sum(reason is not None for reason in routed.failures)
        lines.append(f"  {failed} judgments failed; {len(routed.pool)} pairs for humans")
        return "\n".join(lines)


def _rows(routed: Routed) -> Iterator[dict[str, Any]]:
    for i, source in enumerate(routed.routes):
        row: dict[str, Any] = {
            "probability": float(routed.probability[i]),
            "route": source,
            "uncertainty": float(routed.uncertainty[i]),
            "ensemble_probability": float(routed.comparison.probability[i]),
        }
        if source == "judge":
            row["judge_probability"] = float(routed.judge_probability[i])
        if routed.failures[i] is not None:
            row["failure"] = routed.failures[i]
        yield row


def _uncertain(routed: Routed) -> int:
    return int((routed.uncertainty >= routed.threshold).sum())
