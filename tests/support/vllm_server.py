"""vLLM servers in processes of their own, over real backbones; the same models in transformers.

A reward model over MiniLM has a token whose embedding is NaN, so that a text which holds it has no
score.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support import CHECKOUT

SPOILED = "volcano"  # the token
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"  # the double's


MADE = CHECKOUT / ".venv-vllm" / "bin" / "vllm"  # by `make vllm`


def find_command() -> str:
    """What ENSEMBLE_RM_VLLM names, what `make vllm` made, or vllm; skips where there is none."""
    named = os.environ.get("ENSEMBLE_RM_VLLM")
    found = shutil.which(named or (str(MADE) if MADE.exists() else "vllm"))
    if found is None:
        pytest.skip("no vLLM: `make vllm` installs it, and ENSEMBLE_RM_VLLM may name another")
    return found


@dataclass
class Reference:
    """The served model in transformers."""

    folder: Path
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)

    longest: int = 512

    def logits(self, texts: Sequence[str], *, special: bool = True) -> NDArray[np.float64]:
        """The raw logit of each text alone, cut at the model's own limit."""
        import torch

        found = []
        for text in texts:
            inputs = self.tokenizer(
                text,
                return_tensors="pt",
                truncation=True,
                max_length=self.longest,
                add_special_tokens=special,
            )
            with torch.no_grad():
                found.append(self.model(**inputs).logits[0, 0].item())
        return np.array(found)

    @property
    def options(self) -> list[str]:
        """What vLLM serves it with."""
        return ["--runner", "pooling", "--served-model-name", "reward"]


def make_reference(backbone: Path, folder: Path) -> Reference:
    """Save the model with a head drawn from a seed; its logits leave [0, 1]."""
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(backbone, model_max_length=512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification.from_pretrained(
            backbone, num_labels=1, dtype=torch.float32
        )
        torch.nn.init.normal_(model.classifier.weight, std=10.0)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[tokenizer.vocab[SPOILED]] = torch.nan
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat.jinja").write_text(CHAT)
    return Reference(folder, model, tokenizer)


def make_decoder(backbone: Path, folder: Path) -> Reference:
    """Save a decoder with a head drawn from a seed."""
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(backbone)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification.from_pretrained(
            backbone, num_labels=1, dtype=torch.float32
        )
        torch.nn.init.normal_(model.score.weight, std=0.5)
    model.config.pad_token_id = tokenizer.eos_token_id
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Reference(folder, model, tokenizer)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: str, folder: Path, port: int, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, which is not there yet, in a session of its own; end all of it."""
    arguments = [command, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--enforce-eager", *more]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}  # a GiB
    log = folder / f"server-{port}.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            arguments,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | settings,
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the server and the engine that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_engine(process: subprocess.Popen[bytes]) -> None:
    """Kill what computes and leave what answers."""
    psutil = pytest.importorskip("psutil")
    children = psutil.Process(process.pid).children()
    (engine,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
    engine.send_signal(signal.SIGKILL)


def wait_for(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended: {log.read_text(errors='replace')[-3000:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(1)
    raise RuntimeError(f"vLLM did not start: {log.read_text(errors='replace')[-3000:]}")


@contextlib.contextmanager
def ready(command: str, folder: Path, *more: str) -> Iterator[str]:
    port = free_port()
    with running(command, folder, port, *more) as process:
        address = f"http://127.0.0.1:{port}"
        wait_for(process, address, folder / f"server-{port}.log")
        yield address
