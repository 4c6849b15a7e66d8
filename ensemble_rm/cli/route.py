"""Compare pairs, and ask a judge about those of which the ensemble is not sure.

A pair is a row with `prompt` (text or messages), `first` and `second`, and optionally `id`,
`subset` and `reference`. Pairs whose uncertainty reaches the threshold go to the judge; those that
it cannot answer, or that --budget leaves over, to the human pool, with a random share of the others
(--audit-share). `ensemble-rm judgments import` reads back what humans answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.cli.common import (
    Bars,
    add_dry_run,
    add_ensemble,
    add_json,
    add_out_file,
    add_rows,
    check_can_write,
    open_ensemble,
    say,
    write_jsonl,
)
from ensemble_rm.cli.remote import add_server, read_client
from ensemble_rm.errors import OptionError

if TYPE_CHECKING:
    from ensemble_rm.active_learning.routing import Routed
    from ensemble_rm.members.judges.comparator import JudgeComparator

HELP = "compare pairs, and ask a judge about the uncertain ones"
EXAMPLE = (
    "  ensemble-rm route runs/hh --data pairs.jsonl --share 0.2 \\\n"
    "      --judge-url http://gpu8:8000/v1 --model Qwen/Qwen3-32B --out verdicts.jsonl \\\n"
    "      --pool humans.jsonl"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_ensemble(parser)
    add_rows(parser, "pairs")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--threshold", type=float, metavar="NATS", help="the least that is routed")
    how.add_argument("--share", type=float, help="of these pairs, at most so many are routed")
    parser.add_argument(
        "--uncertainty",
        choices=["epistemic", "total", "aleatoric", "predictive"],
        default="epistemic",
        help="epistemic; one member has only predictive",
    )
    parser.add_argument("--budget", type=int, metavar="N", help="pairs the judge is asked about")
    parser.add_argument(
        "--final", choices=["judge", "pooled"], default="judge", help="whose probability; judge"
    )
    judge = parser.add_argument_group("judge")
    judge.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible server's, …/v1")
    judge.add_argument("--model", help="the judge's name there")
    judge.add_argument("--rubric", default="pairwise", metavar="FILE", help="as shipped: pairwise")
    judge.add_argument(
        "--price",
        type=float,
        nargs=2,
        metavar=("PROMPT", "COMPLETION"),
        help="of a million tokens each",
    )
    add_server(parser)
    pool = parser.add_argument_group("human pool")
    pool.add_argument("--pool", type=Path, metavar="FILE", help="of the pairs for humans")
    pool.add_argument("--format", choices=["label-studio", "argilla", "jsonl"], default="jsonl")
    pool.add_argument("--batch", metavar="NAME", help="the batch of annotation, kept with each")
    pool.add_argument("--policy", metavar="NAME", help="what wrote the completions, kept, too")
    pool.add_argument("--audit-share", type=float, default=0.1, metavar="SHARE", help="0.1")
    pool.add_argument("--seed", type=int, default=0, help="of the audit and the sides; 0")
    add_out_file(parser, "verdicts")
    add_dry_run(parser, "say how many would be asked about; ask nobody, write nothing")
    add_json(parser, rows=True)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    judge = _judge(args)
    _check_files(args)
    from ensemble_rm.active_learning.routing import route
    from ensemble_rm.data.loading import read_comparisons

    pairs = read_comparisons(args.data)
    ensemble = open_ensemble(args)
    with Bars(quiet=args.json) as bars:
        routed = route(
            ensemble,
            pairs,
            threshold=args.threshold,
            share=args.share,
            judge=None if args.dry_run else judge,
            uncertainty=args.uncertainty,
            budget=args.budget,
            final=args.final,
            audit_share=args.audit_share,
            seed=args.seed,
            progress=bars,
        )
    if not args.dry_run:
        _write(args, routed)
    if args.out is not None or args.dry_run:
        say(args, _found(args, routed, judge), _text(args, routed, judge))


def _check_files(args: argparse.Namespace) -> None:
    """Refuse files that cannot be written before a judge is paid for what would stand in them."""
    if args.dry_run:
        return
    if args.json and args.out is None:
        raise OptionError("--json prints one object, and --out is where the verdicts go: name it")
    if args.pool is not None and args.pool == args.out:
        raise OptionError(f"--out and --pool name one file, {args.out}; name two")
    check_can_write(args.out)
    check_can_write(args.pool)


def _judge(args: argparse.Namespace) -> JudgeComparator | None:
    if args.judge_url is None:
        if args.model is not None or args.price is not None:
            raise OptionError("--model and --price belong to a judge: name its --judge-url")
        return None
    if args.model is None:
        raise OptionError("--judge-url needs --model, the judge's name at its server")
    from ensemble_rm.cli.tokens import read_token
    from ensemble_rm.members.judges.comparator import JudgeComparator
    from ensemble_rm.members.judges.usage import Price

    return JudgeComparator(
        args.judge_url,
        model=args.model,
        rubric=args.rubric,
        token=None if args.dry_run else read_token(args.token_env),
        price=None if args.price is None else Price(*args.price),
        client=read_client(args),
    )


def _write(args: argparse.Namespace, routed: Routed) -> None:
    from ensemble_rm.active_learning.tasks import to_tasks
    from ensemble_rm.cli.select import write_tasks

    write_jsonl(args.out, _rows(routed))
    if args.pool is not None:
        tasks = to_tasks(routed.pool, args.format, batch=args.batch, policy=args.policy)
        write_tasks(args.pool, args.format, tasks)


def _rows(routed: Routed) -> Iterator[dict[str, Any]]:
    for i, whose in enumerate(routed.routes):
        row: dict[str, Any] = {
            "probability": float(routed.probability[i]),
            "route": whose,
            "uncertainty": float(routed.uncertainty[i]),
            "ensemble_probability": float(routed.comparison.probability[i]),
        }
        if whose == "judge":
            row["judge_probability"] = float(routed.judge_probability[i])
        if routed.failures[i] is not None:
            row["failure"] = routed.failures[i]
        yield row


def _unsure(routed: Routed) -> int:
    return int((routed.uncertainty >= routed.threshold).sum())


def _found(
    args: argparse.Namespace, routed: Routed, judge: JudgeComparator | None
) -> dict[str, Any]:
    return routed.saving.to_json() | {
        "uncertain": _unsure(routed),
        "would_ask": _would_ask(args, routed, judge),
        "threshold": routed.threshold,
        "uncertainty": args.uncertainty,
        "failed": sum(reason is not None for reason in routed.failures),
        "pool": len(routed.pool),
        "out": None if args.out is None else str(args.out),
        "dry_run": args.dry_run,
    }


def _would_ask(args: argparse.Namespace, routed: Routed, judge: JudgeComparator | None) -> int:
    if judge is None:
        return 0
    return _unsure(routed) if args.budget is None else min(_unsure(routed), args.budget)


def _text(args: argparse.Namespace, routed: Routed, judge: JudgeComparator | None) -> str:
    saving, n = routed.saving, routed.saving.pairs
    head = (
        f"{_unsure(routed)} of {n} pairs reach {routed.threshold:.4g} nats ({args.uncertainty}); "
    )
    if args.dry_run:
        asked = _would_ask(args, routed, judge)
        return head + f"the judge would be asked about {asked}; nothing written (--dry-run)"
    lines = [head + f"the judge was asked about {saving.judged} ({saving.share:.1%})"]
    without, usage = saving.without, saving.usage
    if without is not None:
        tokens = usage.prompt_tokens + usage.completion_tokens
        all_tokens = without.prompt_tokens + without.completion_tokens
        cost = "" if usage.cost is None else f", {usage.cost:.4g} of {without.cost:.4g} in money"
        lines.append(
            f"  {usage.calls + usage.failed} of {without.calls} calls, {tokens} of {all_tokens} "
            f"tokens{cost}; {usage.latency:.3g} s a call"
        )
    failed = sum(reason is not None for reason in routed.failures)
    lines.append(f"  {failed} judgments failed; {len(routed.pool)} pairs for humans")
    return "\n".join(lines)
