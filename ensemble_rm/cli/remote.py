"""Make a member of a reward model, or of a judge, that another server runs.

A few probes are sent first: scores that went through a sigmoid or a softmax are found out. What is
saved is an ensemble of that one member, in its own unit; `ensemble-rm combine` puts it beside
others, and `ensemble-rm calibrate` calibrates it. The address is saved, the token is not: name the
environment variable that holds it.
"""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING, Any

from ensemble_rm.cli.common import add_dry_run, add_json, add_out_folder, say
from ensemble_rm.errors import OptionError, RemoteActivationError

if TYPE_CHECKING:
    from ensemble_rm.members.judges.scorer import JudgeScorer
    from ensemble_rm.members.remote.scorer import RemoteScorer

HELP = "make a member of a model that another server runs"
EXAMPLE = (
    "  ensemble-rm remote http://gpu7:8000 --protocol vllm-classify --template messages \\\n"
    "      --model Skywork/Skywork-Reward-V2-Llama-3.1-8B --out runs/skywork\n"
    "  ensemble-rm combine --member skywork=runs/skywork --member mine=runs/hh \\\n"
    "      --data pairs.jsonl --out runs/both"
)
PROTOCOLS = ("vllm-classify", "vllm-pooling", "sglang", "tei", "openrlhf", "ensemble-rm", "judge")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("url", metavar="URL", help="the server's address, without a password in it")
    parser.add_argument("--protocol", required=True, choices=PROTOCOLS, help="what it speaks")
    parser.add_argument("--name", help="the member's; that of the model or the protocol by default")
    parser.add_argument("--model", help="by which the server knows the model (vLLM, judge)")
    parser.add_argument(
        "--template",
        choices=["chat", "plain", "pair", "messages", "sample"],
        help="how a sample becomes what the server reads; not of ensemble-rm or judge",
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="of --template chat")
    parser.add_argument(
        "--rubric", default="pointwise", metavar="FILE", help="what a judge is asked; as shipped"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples a request")
    parser.add_argument(
        "--truncate", action="store_true", help="let the server cut what is too long (vLLM, TEI)"
    )
    parser.add_argument(
        "--on-outage", choices=["raise", "nan"], default="raise", help="of the whole server; raise"
    )
    parser.add_argument(
        "--raw-logit-check",
        choices=["error", "warn", "off"],
        default="error",
        help="what scores that are no raw logits bring; an error, by default",
    )
    add_server(parser)
    add_out_folder(parser)
    add_dry_run(parser, "ask and say, write nothing")
    add_json(parser)


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add how a server is asked: token, deadline, concurrency."""
    parser.add_argument(
        "--token-env", metavar="NAME", help="the environment variable that holds the bearer token"
    )
    parser.add_argument(
        "--deadline", type=float, default=300.0, metavar="SECONDS", help="of a request; 300"
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="of one try; 60"
    )
    parser.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests at once; 8"
    )


def read_client(args: argparse.Namespace) -> Any:
    """Return what `add_server` asked for."""
    from ensemble_rm.members.remote.client import ClientOptions

    return ClientOptions(timeout=args.timeout, deadline=args.deadline, concurrency=args.concurrency)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ensemble_rm.aggregation.rules.mean import mean
    from ensemble_rm.calibration.normaliser import Normaliser
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

    scorer = _scorer(args)
    scores, problems = _tested(scorer, args.raw_logit_check)
    if not args.dry_run:
        provenance = {"members": {scorer.names[0]: args.url}}
        alone = RewardEnsemble((scorer,), Normaliser.identity(1), mean(), provenance=provenance)
        alone.save_pretrained(args.out)
    scorer.close()
    found = {"name": scorer.names[0], "url": args.url, "protocol": args.protocol}
    found |= {"probes": scores, "problems": problems, "out": str(args.out)}
    done = "nothing written (--dry-run)" if args.dry_run else f"saved in {args.out}"
    text = f"{scorer.names[0]} at {args.url} by {args.protocol}; {done}\n"
    text += f"  probes score {min(scores):.4g} to {max(scores):.4g}" if scores else "  not tested"
    text += "".join(f"\n  warning: {problem}" for problem in problems)
    say(args, found | {"dry_run": args.dry_run}, text)


def _scorer(args: argparse.Namespace) -> RemoteScorer | JudgeScorer:
    from ensemble_rm.cli.tokens import read_token
    from ensemble_rm.members.judges.scorer import JudgeScorer
    from ensemble_rm.members.remote.scorer import RemoteScorer

    token = read_token(args.token_env)
    name = args.name or args.model or args.protocol
    common = {"name": name, "token": token, "token_variable": args.token_env}
    common |= {"client": read_client(args)}
    if args.protocol == "judge":
        if args.model is None:
            raise OptionError("--protocol judge needs --model, the judge's name at its server")
        return JudgeScorer(args.url, model=args.model, rubric=args.rubric, **common)
    template = args.template or ("sample" if args.protocol == "ensemble-rm" else None)
    if template is None:
        raise OptionError(
            f"--protocol {args.protocol} needs --template: the server cannot say what its model "
            "was trained with"
        )
    return RemoteScorer(
        args.url,
        protocol=args.protocol,
        template=template,
        tokenizer=args.tokenizer,
        model=args.model,
        batch_size=args.batch_size,
        truncate=args.truncate,
        raw_logit_check="warn" if args.raw_logit_check == "error" else args.raw_logit_check,
        on_outage=args.on_outage,
        **common,
    )


def _tested(scorer: RemoteScorer | JudgeScorer, mode: str) -> tuple[list[float], list[str]]:
    """Return the probes' scores, and what is wrong with them.

    Raises
    ------
    RemoteActivationError
        If something is, and is an error.
    """
    from ensemble_rm.members.remote.raw_logit_check import probe

    if mode == "off":
        return [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said here instead
        report = probe(lambda samples: scorer.score(samples)[:, 0])
    if report.problems and mode == "error":
        raise RemoteActivationError(
            f"{scorer.names[0]}: {'; '.join(report.problems)}. Serve the "
            "model's raw logit, or pass --raw-logit-check warn"
        )
    return [score for score in report.scores if score == score], list(report.problems)
