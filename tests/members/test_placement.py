"""Placement: ranks that each score a share say what one process says; weights load when needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import (
    RewardEnsemble,
    TrunkOptions,
    combine,
    load_preferences as load,
    train,
)
from ensemble_rm.demo.data import FILE
from ensemble_rm.members import HeadScorer, make_recipe
from ensemble_rm.members.backbone import checkpoint as bb

# What a rank of a training run does: its own copy from disk, its share of the group, one gather.
RANK = """
import json, os, socket, sys
import numpy as np, torch, torch.distributed as dist
from ensemble_rm import RewardEnsemble
from ensemble_rm.data.loading import read_samples
run, data, store, rank, world, out = sys.argv[1:]
rank, world = int(rank), int(world)
if "lo" in [name for _, name in socket.if_nameindex()]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
ensemble = RewardEnsemble.from_pretrained(run, device="cpu")
samples = list(read_samples(data))
share = -(-len(samples) // world)
mine = samples[rank * share : (rank + 1) * share]
own = torch.full((share,), float("nan"), dtype=torch.float64)
own[: len(mine)] = torch.from_numpy(ensemble.score(mine).reward)
gathered = [torch.empty_like(own) for _ in range(world)]
dist.all_gather(gathered, own)
dist.destroy_process_group()
with open(f"{out}.{rank}", "w") as stream:
    json.dump(torch.cat(gathered)[: len(samples)].tolist(), stream)
"""


@pytest.mark.slow
@pytest.mark.parametrize("small_folder", ["llama"], indirect=True)
def test_a_group_split_over_ranks_scores_as_in_one_process(
    two_heads: Callable[..., HeadScorer], tmp_path: Path
) -> None:
    ensemble = combine({"a": two_heads()}, load(FILE)[:60])
    run = ensemble.save_pretrained(tmp_path / "run")
    samples = load(FILE)[:27].samples()[:53]  # the shares differ in size
    data = tmp_path / "samples.jsonl"
    rows = [{"prompt": s.prompt, "completion": s.completion} for s in samples]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    world, out = 2, tmp_path / "rewards.json"
    arguments = [str(path) for path in (run, data, tmp_path / "store")]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *arguments, str(rank), str(world), str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in started:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    alone = ensemble.score(samples).reward
    found = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(world)]
    assert found[0] == found[1]
    assert np.abs(np.array(found[0]) - alone).max() < 1e-4 * alone.std()


@pytest.mark.parametrize("kind", ["head", "branch", "full"])
def test_weights_are_loaded_at_the_first_score_and_once(
    kind: str, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"kind": kind, "members": 2, "cache_dir": tmp_path / "cache"}
    pairs = load(FILE)[:120].split(0.6, 0.3, seed=0)
    options = TrunkOptions(max_length=32, device="cpu")
    recipe = make_recipe(kind, **({} if kind == "head" else {"epochs": 1}))
    train(
        *pairs, backbone=small_folder, options=options, recipe=recipe, out=tmp_path / "run", **given
    )
    loaded: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        real: Callable[..., Any] = getattr(bb, name)

        def load_and_count(*args: Any, **options: Any) -> Any:
            loaded.append(name)
            return real(*args, **options)

        return load_and_count

    for name in ("load_trunk", "load_classifier"):
        monkeypatch.setattr(bb, name, counting(name))
    ensemble = RewardEnsemble.from_pretrained(tmp_path / "run", device="cpu")
    assert loaded == []
    samples = pairs[1].samples()
    first = ensemble.score(samples).reward
    wanted = ["load_classifier"] * 2 if kind == "full" else ["load_trunk"]
    assert loaded == wanted
    np.testing.assert_array_equal(ensemble.score(samples).reward, first)
    assert loaded == wanted
