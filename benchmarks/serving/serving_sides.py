"""The servers of `serving.py`, each in a process of its own, and their request formats.

`ours` is the ensemble of five branches behind this package's server; `tagged` adds a member that
says which completion it read, for the soak. `one` and `loop` are a plain FastAPI endpoint after
OpenRLHF's `cli/serve_rm.py`: the handler tokenises and scores its own request, with one Hugging
Face model, or with five in turn.
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.preference_runs import package_folder
from benchmarks.shared.scoring_sides import HuggingFace, K, branches
from ensemble_rm import FunctionScorer, RewardEnsemble, Sample, TrunkOptions
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.members.backbone.checkpoint import locate


def tag(completion: str) -> float:
    """Return a number that tells completions apart."""
    return float(zlib.crc32(completion.encode()) % 1_000_003)


def make_ensemble(args: argparse.Namespace, options: TrunkOptions) -> RewardEnsemble:
    backbone = locate(package_folder("smollm2"), cache_dir=args.cache_dir)
    scorers: list[Any] = [branches(backbone, options, 2)]
    if args.side == "tagged":
        scorers.append(FunctionScorer("tag", lambda s: tag(s.completion)))
    k = sum(len(scorer.names) for scorer in scorers)
    return RewardEnsemble(tuple(scorers), Normaliser.identity(k), mean())


def write_port(file: Path, port: int) -> None:
    scratch = file.with_suffix(".partial")
    scratch.write_text(str(port))
    scratch.replace(file)


def serve_ours(args: argparse.Namespace, options: TrunkOptions) -> None:
    from ensemble_rm.server.lifecycle import serve
    from ensemble_rm.server.options import NetworkOptions

    serve(
        lambda: make_ensemble(args, options),
        network=NetworkOptions(port=args.port),
        listening=lambda _, port: write_port(args.port_file, port),
    )


def serve_plain(args: argparse.Namespace, options: TrunkOptions) -> None:
    from ensemble_rm.server.lifecycle import bind

    models = HuggingFace(args.folder, options, 1 if args.side == "one" else K)
    app = FastAPI()

    @torch.inference_mode()
    def rewards(queries: list[str]) -> list[float]:
        batch = models.tokenizer(
            queries,
            return_tensors="pt",
            add_special_tokens=False,
            max_length=options.max_length,
            padding=True,
            truncation=True,
        )
        scores = [model(**batch).logits[:, 0].float() for model in models.models()]
        return torch.stack(scores).mean(dim=0).tolist()  # type: ignore[no-any-return]

    @app.post("/get_reward")
    async def get_reward(request: Request) -> JSONResponse:
        found = rewards((await request.json())["query"])
        return JSONResponse({"rewards": found, "scores": found, "extra_logs": {}})

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    rewards(["warm"])
    bound = bind("127.0.0.1", 0)
    write_port(args.port_file, bound.getsockname()[1])
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])


def body(side: str, sample: Sample, text: str) -> tuple[str, dict[str, Any]]:
    """Return path and request of one sample; `text` is it in the model's template."""
    if side in ("ours", "tagged"):
        prompt: Any = sample.prompt
        if not isinstance(prompt, str):
            prompt = [{"role": turn.role, "content": turn.content} for turn in prompt]
        return "/v1/score", {"samples": [{"prompt": prompt, "completion": sample.completion}]}
    return "/get_reward", {"query": [text], "prompts": None, "labels": None}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("ours", "tagged", "one", "loop"), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the Hugging Face model")
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    options = TrunkOptions(max_length=512, dtype="bfloat16", device="cpu")
    (serve_ours if args.side in ("ours", "tagged") else serve_plain)(args, options)


if __name__ == "__main__":
    main()
