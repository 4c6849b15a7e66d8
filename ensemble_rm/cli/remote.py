"""``ensemble-rm remote``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.options import argument, nested, option
from ensemble_rm.cli.signatures import default_of
from ensemble_rm.errors import OptionError, RemoteActivationError
from ensemble_rm.members.remote.address import check_url, origin_of
from ensemble_rm.members.remote.client import ClientOptions

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console
    from ensemble_rm.members.judges.scorer import JudgeScorer
    from ensemble_rm.members.remote.scorer import RemoteScorer

_INIT = ("ensemble_rm.members.remote.scorer", "RemoteScorer.__init__")


@dataclass(frozen=True, kw_only=True)
class Remote(Command):
    """Save a reward model or a judge on another server as a member.

    A few probes are sent first, to detect scores that went through a sigmoid or a softmax. The
    result is an ensemble of that one member, in its own units; `ensemble-rm combine` joins it with
    others, and `ensemble-rm calibrate` calibrates it. The address is saved, the token is not. A
    command that loads the ensemble needs --allow-remote HOST, and the token again.
    """

    url: str = argument("address of the server, without a password in it")
    protocol: Literal[
        "vllm-classify", "vllm-pooling", "sglang", "tei", "openrlhf", "ensemble-rm", "judge"
    ] = option("protocol of the server")
    name: str | None = option(
        "name of the member", default=None, metavar="NAME", shown="that of the model or protocol"
    )
    model: str | None = option(
        "name of the model at its server (vLLM, judge)", default=None, metavar="NAME"
    )
    template: Literal["chat", "plain", "pair", "messages", "sample"] | None = option(
        "how a sample is rendered for the server; not for ensemble-rm or judge", default=None
    )
    tokenizer: str | None = option(
        "tokenizer of --template chat", default=default_of(*_INIT, "tokenizer"), metavar="NAME"
    )
    rubric: str = option(
        "rubric of a judge: a file, or the name of a built-in rubric",
        default="pointwise",
        metavar="FILE",
    )
    batch_size: int | None = option(
        "number of samples per request",
        default=default_of(*_INIT, "batch_size"),
        metavar="N",
        shown="the protocol's",
    )
    truncate: bool = option(
        "allow the server to truncate long samples (vLLM, TEI)",
        default=default_of(*_INIT, "truncate"),
    )
    on_outage: Literal["raise", "nan"] = option(
        "behaviour while the server is unreachable: an error, or NaN scores of the member",
        default=default_of(*_INIT, "on_outage"),
    )
    raw_logit_check: Literal["error", "warn", "off"] = option(
        "reaction to scores that are not raw logits", default="error"
    )
    token: Mapping[str, str] | None = option(
        "environment variable with the bearer token of the server",
        default=None,
        metavar="HOST=ENV",
        shown="ENSEMBLE_RM_TOKEN_<HOST>",
    )
    client: ClientOptions = nested(ClientOptions, panel="Requests", seed=None)
    out: Path = option("folder of the new ensemble", metavar="FOLDER")
    dry_run: bool = option("send the probes and report, write nothing", default=False)

    example: ClassVar[str] = (
        "  ensemble-rm remote http://gpu7:8000 --protocol vllm-classify --template messages \\\n"
        "      --model Skywork/Skywork-Reward-V2-Llama-3.1-8B --out runs/skywork\n"
        "  ensemble-rm combine --member skywork=runs/skywork --member mine=runs/hh \\\n"
        "      --data pairs.jsonl --out runs/both"
    )

    def run(self, console: Console) -> None:
        """Probe the server, and save the member."""
        from ensemble_rm.aggregation.rules.mean import mean
        from ensemble_rm.calibration.normaliser import Normaliser
        from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

        scorer = self._scorer()
        scores, problems = _probe(scorer, self.raw_logit_check)
        name = scorer.names[0]
        if not self.dry_run:
            provenance = {"members": {name: self.url}}
            alone = RewardEnsemble((scorer,), Normaliser.identity(1), mean(), provenance=provenance)
            alone.save_pretrained(self.out)
        scorer.close()
        data: dict[str, Any] = {
            "name": name,
            "url": self.url,
            "protocol": self.protocol,
            "probes": scores,
        }
        data |= {"problems": problems, "out": str(self.out), "dry_run": self.dry_run}
        text = f"{name} at {self.url} by {self.protocol}"
        text += "; nothing written (--dry-run)\n" if self.dry_run else "\n"
        text += (
            f"  probes score {min(scores):.4g} to {max(scores):.4g}" if scores else "  not probed"
        )
        text += "".join(f"\n  warning: {problem}" for problem in problems)
        console.result(data, text)
        if not self.dry_run:
            console.save(self.out)
            console.next(
                f"ensemble-rm combine --member {self.out} --member ANOTHER --data PAIRS.jsonl "
                f"--out FOLDER --allow-remote {origin_of(scorer.address or self.url)}"
            )

    def _scorer(self) -> RemoteScorer | JudgeScorer:
        from ensemble_rm.cli.tokens import read_token
        from ensemble_rm.members.judges.scorer import JudgeScorer
        from ensemble_rm.members.remote.scorer import RemoteScorer

        common: dict[str, Any] = {
            "name": self.name or self.model or self.protocol,
            "token": read_token(check_url(self.url), self.token or {}),
            "client": self.client,
        }
        if self.protocol == "judge":
            if self.model is None:
                raise OptionError("--protocol judge needs --model, the judge's name at its server")
            return JudgeScorer(self.url, model=self.model, rubric=self.rubric, **common)
        template = self.template or ("sample" if self.protocol == "ensemble-rm" else None)
        if template is None:
            raise OptionError(
                f"--protocol {self.protocol} needs --template: the server does not report what its "
                "model was trained with"
            )
        return RemoteScorer(
            self.url,
            protocol=self.protocol,
            template=template,
            tokenizer=self.tokenizer,
            model=self.model,
            batch_size=self.batch_size,
            truncate=self.truncate,
            raw_logit_check="warn" if self.raw_logit_check == "error" else self.raw_logit_check,
            on_outage=self.on_outage,
            **common,
        )


def _probe(scorer: RemoteScorer | JudgeScorer, mode: str) -> tuple[list[float], list[str]]:
    """Return the probes' scores, and what is wrong with them.

    Raises
    ------
    RemoteActivationError
        If something is, and `mode` is ``"error"``.
    """
    from ensemble_rm.members.remote.raw_logit_check import probe

    if mode == "off":
        return [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warnings are part of the result instead
        report = probe(lambda samples: scorer.score(samples)[:, 0])
    if report.problems and mode == "error":
        raise RemoteActivationError(
            f"{scorer.names[0]}: {'; '.join(report.problems)}. Serve the "
            "model's raw logit, or pass --raw-logit-check warn"
        )
    return [score for score in report.scores if score == score], list(report.problems)
