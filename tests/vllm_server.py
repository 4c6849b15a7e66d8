"""vLLM servers in processes of their own, over MiniLM with one output; the same in transformers.

A token's embedding is NaN, so that a text which holds it has no score.
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

SPOILED = "volcano"  # the token
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"  # the double's


def find_command() -> str | None:
    """What ENSEMBLE_RM_VLLM names, or vllm."""
    return shutil.which(os.environ.get("ENSEMBLE_RM_VLLM") or "vllm")


@dataclass
class Reference:
    """The served model in transformers."""

    folder: Path
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)

    def logits(self, texts: Sequence[str], *, special: bool = True) -> NDArray[np.float64]:
        """The raw logit of each text alone, cut at the model's own limit."""
        import torch

        found = []
        for text in texts:
            inputs = self.tokenizer(
                text,
                return_tensors="pt",
                truncation=True,
                max_length=512,
                add_special_tokens=special,
            )
            with torch.no_grad():
                found.append(self.model(**inputs).logits[0, 0].item())
        return np.array(found)


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: str, folder: Path, port: int, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, which is not there yet, in a session of its own; end all of it."""
    arguments = [command, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--runner", "pooling", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--served-model-name", "reward", "--chat-template", str(folder / "chat.jinja")]
    arguments += more
    log = folder / f"server-{port}.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            arguments, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
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
