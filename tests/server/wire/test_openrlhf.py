"""OpenRLHF's own client code against a running server.

The released package pins another transformers than ours, so that it is installed beside it without
its dependencies (`pip install --no-deps openrlhf`), and of it one file is loaded, as its own tests
load it. Skipped by name where it, or aiohttp, is not there; `test_server_wire.py` sends the same
payload in any case.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support.server_runs import server

CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
TOKEN = "a-token-of-some-length"

pytestmark = pytest.mark.slow  # starts a process


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`openrlhf/utils/agent.py` of the installed package."""
    pytest.importorskip("aiohttp")
    package = importlib.util.find_spec("openrlhf")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package openrlhf is not installed")
    file = Path(package.submodule_search_locations[0]) / "utils" / "agent.py"
    log = SimpleNamespace(init_logger=logging.getLogger)
    monkeypatch.setitem(sys.modules, "openrlhf.utils.logging_utils", log)  # type: ignore[arg-type]
    spec = importlib.util.spec_from_file_location("openrlhf_agent", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Characters:
    """A tokenizer of characters."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [SimpleNamespace(tolist=lambda: [ord(c) for c in text])]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


class Engine:
    """Generates what it was told to."""

    def __init__(self, completion: str) -> None:
        self.completion = completion

    async def generate(self, *_: Any, **__: Any) -> Any:
        ids = [ord(c) for c in self.completion]
        output = SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


async def rollout(executor: Any, completion: str, label: str) -> dict[str, Any]:
    sampling = SimpleNamespace(max_tokens=64, logprobs=None)
    found: dict[str, Any] = await executor.execute(
        CHAT, label, sampling, 4096, Characters(), Engine(completion)
    )
    return found


def test_its_agent_gets_rewards(agent: ModuleType, tmp_path: Path) -> None:
    with server(tmp_path, "--policy-template", "chatml", "--token", TOKEN) as running:
        running.headers["Authorization"] = f"Bearer {TOKEN}"
        # The client sends no headers; a URL carries the token, as the password.
        url = f"http://any:{TOKEN}@127.0.0.1:{running.port}/get_reward"
        executor = agent.SingleTurnAgentExecutor(url)

        async def rollouts() -> list[dict[str, Any]]:
            texts = ["x" * n + "<|im_end|>" for n in range(1, 17)]
            labels = ["42", json.dumps([{"role": "user", "content": "Hi"}])]
            return await asyncio.gather(
                *(rollout(executor, text, labels[i % 2]) for i, text in enumerate(texts))
            )

        found = asyncio.run(rollouts())
        assert [row["reward"] for row in found] == [[1.5 * n] for n in range(1, 17)]
        assert [row["scores"] for row in found] == [row["reward"] for row in found]
        assert found[3]["extra_logs"]["member_mean"] == [6.0]
        assert running.metric("samples_total") == 16
        assert running.metric("batches_total") < 16  # they came together


def test_its_shards_keep_their_order(agent: ModuleType, tmp_path: Path) -> None:
    with server(tmp_path, "--policy-template", "chatml") as running:
        url = f"http://127.0.0.1:{running.port}/get_reward"
        executor = agent.SingleTurnAgentExecutor([url, url])
        queries = [f"{CHAT}{'x' * n}" for n in range(1, 6)]
        shards = asyncio.run(executor._fetch_rewards_via_http(queries, [CHAT] * 5, ["1"] * 5))
        assert [r for shard in shards for r in shard["rewards"]] == [1.5 * n for n in range(1, 6)]
