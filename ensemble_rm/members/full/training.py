"""`full` members: k fine-tuned sequence-classification models, each on transformers' Trainer.

accelerate, FSDP, DeepSpeed, trackers and callbacks are the Trainer's. Its seeding of global
generators happens inside a context that restores them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ensemble_rm.data.samples import Preferences
from ensemble_rm.errors import CustomCodeError, OptionError, TrainingError
from ensemble_rm.file_modes import follow_umask
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.encoding import Encoded, TextEncoder, count_truncation
from ensemble_rm.members.forward.batching import Batch, collate
from ensemble_rm.members.full.recipe import FullRecipe
from ensemble_rm.members.full.scorer import (
    ClassifierPooling,
    FullScorer,
    classifier_scores,
    set_pad_token,
    trained_pooling,
)
from ensemble_rm.members.learning.dropout import set_dropout
from ensemble_rm.members.learning.job import Job, Trained
from ensemble_rm.members.learning.loss import preference_loss
from ensemble_rm.members.learning.seeds import global_seed, resample_counts
from ensemble_rm.progress import Progress
from ensemble_rm.saved_json import as_object, read_json

_MODEL, _DONE = "model", "member.json"
# Arguments that the recipe, the seeds or early stopping decide.
_OURS_TEXT = (
    "output_dir seed data_seed num_train_epochs learning_rate weight_decay max_grad_norm "
    "warmup_ratio warmup_steps lr_scheduler_type per_device_train_batch_size "
    "per_device_eval_batch_size eval_strategy save_strategy load_best_model_at_end "
    "metric_for_best_model greater_is_better remove_unused_columns label_names"
)
_OURS = frozenset(_OURS_TEXT.split())


@dataclass(frozen=True)
class _Row:
    """One encoded pair, with the weight that it has for one member."""

    chosen: Encoded
    rejected: Encoded
    target: float
    weight: float
    margin: float


class _Rows(torch.utils.data.Dataset[_Row]):
    def __init__(
        self, encoded: Sequence[Encoded], pairs: Preferences, counts: np.ndarray[Any, Any]
    ) -> None:
        self.encoded, self.pairs = encoded, pairs
        self.targets, self.margins = pairs.targets, pairs.margins
        # Weights of mean 1, so that the loss keeps its size.
        self.weights = counts * pairs.weights / pairs.weights.mean()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> _Row:
        return _Row(
            self.encoded[i],
            self.encoded[len(self) + i],
            float(self.targets[i]),
            float(self.weights[i]),
            float(self.margins[i]),
        )


def _collate(rows: list[_Row]) -> dict[str, torch.Tensor]:
    """Return a batch of 2·n samples, all chosen ones first, and n verdicts."""
    encoded = [row.chosen for row in rows] + [row.rejected for row in rows]
    batch = collate(encoded, list(range(len(encoded))), device=torch.device("cpu"))
    tensors = {
        name: torch.tensor([getattr(row, name) for row in rows])
        for name in ("target", "weight", "margin")
    }
    tensors |= {name: getattr(batch, name) for name in ("ids", "mask", "starts", "lengths")}
    return tensors if batch.types is None else tensors | {"types": batch.types}


def _score_by_forward(model: Any, pooling: ClassifierPooling) -> None:
    """Make the model's forward pass return scores, so that every wrapper of it trains them."""
    # Instance attribute: the class stays as it is for other models.
    published = model.forward

    def forward(
        ids: torch.Tensor,
        mask: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch = Batch(list(range(len(ids))), ids, mask, types, starts, lengths)
        return classifier_scores(model, batch, pooling, forward=published)

    model.forward = forward


class _PairTrainer(Trainer):
    """The Trainer on pairs: Bradley–Terry loss, and validation NLL as its metric."""

    recipe: FullRecipe

    def _losses(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: Any
    ) -> torch.Tensor:
        samples = {k: v for k, v in inputs.items() if k not in ("target", "weight", "margin")}
        # Both sides in one pass, 2n rows.
        scores = model(**samples)
        n = len(inputs["target"])
        losses = preference_loss(scores[:n], scores[n:], inputs["target"], **options)
        return (losses * inputs["weight"]).mean()

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *_args: Any, **_kwargs: Any
    ) -> Any:
        loss = self._losses(
            model,
            inputs,
            margins=inputs["margin"],
            smoothing=self.recipe.smoothing,
            centring=self.recipe.centring,
        )
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became NaN or infinite at step {self.state.global_step}; lower "
                f"learning_rate={self.args.learning_rate}, or take dtype='float32'"
            )
        return loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self._losses(model, self._prepare_inputs(inputs)), None, None


class _Report(TrainerCallback):
    def __init__(self, progress: Progress, stage: str) -> None:
        self.progress, self.stage = progress, stage

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the Trainer's signature
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Report a step."""
        self.progress(self.stage, state.global_step, state.max_steps)


def train_full(job: Job[FullRecipe]) -> Trained:
    """Train one model after another; a member that is finished is not trained again.

    Raises
    ------
    OptionError
        If there is no folder for the models, or `trainer_args` cannot be used.
    TrainingError
        If the folder holds members of another run.
    """
    folder = job.checkpoint or (job.cache_folder and job.cache_folder / "full" / job.digest[:32])
    if folder is None:
        raise OptionError("kind 'full' keeps its models on disk: give out=… or cache_dir=…")
    if job.backbone.code is not None:
        # Each member saves its model as a folder of its own, which would need a permission each.
        raise CustomCodeError(
            f"kind 'full' does not train {job.backbone.name}, which needs custom code; use kind "
            "'head', 'branch' or 'lora'"
        )
    # Before the first weight is loaded: hours of another run's work lie there.
    _claim(folder, job.digest)
    check_trainer_args(job.recipe.trainer_args)
    tokenizer = bb.load_tokenizer(job.backbone.folder)
    encoder = TextEncoder(
        tokenizer, template=job.options.template, max_length=job.options.max_length
    )
    encoded = [encoder.encode(part.samples()) for part in (job.fit, job.validation)]
    counts = resample_counts(job.fit.groups, job.seeds, bootstrap=job.recipe.bootstrap)
    scorers, records = [], []
    for i in range(len(job.seeds)):
        own = folder / f"member{i}"
        if not (own / _DONE).exists():
            sets = (
                _Rows(encoded[0], job.fit, counts[i]),
                # Validation pairs have the weights of the data, not of the bootstrap.
                _Rows(encoded[1], job.validation, np.ones(len(job.validation))),
            )
            _train_one(job, i, own, sets, tokenizer)
        record = as_object(read_json(own / _DONE))
        records.append(record)
        model = bb.open_folder(own / _MODEL)
        scorers.append(
            FullScorer(
                model,
                job.options,
                name=f"full{i}",
                pooling=record["pooling"],
                own=True,
                start=job.backbone.digest,
            )
        )
    samples = job.validation.samples()
    reference = np.concatenate([scorer.score(samples) for scorer in scorers], axis=1)
    record = {
        "validation_nll": [record["validation_nll"] for record in records],
        "history": [record["history"] for record in records],
    }
    return Trained(
        tuple(scorers), reference, count_truncation(encoded[0]), record, in_checkpoint=True
    )


def _claim(folder: Path, digest: str) -> None:
    """Mark the folder with the run's digest, or check that it has that mark."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "digest.txt"
    # Resuming under another request would mix two runs in one ensemble.
    if mark.exists() and mark.read_text() != digest:
        raise TrainingError(
            f"{folder} holds members of another recipe, data set or backbone; name another output "
            "folder, or delete it"
        )
    mark.write_text(digest)


def check_trainer_args(given: Mapping[str, Any]) -> None:
    """Raise `OptionError` for arguments that do not exist, or that the recipe decides."""
    known = {f.name for f in fields(TrainingArguments)}
    for name in given:
        if name in _OURS:
            raise OptionError(f"trainer_args: {name} is decided by the recipe and the seed")
        if name not in known:
            raise OptionError(f"trainer_args: TrainingArguments has no {name!r}")


def _arguments(job: Job[FullRecipe], member: int, folder: Path) -> TrainingArguments:
    recipe, dtype = job.recipe, job.options.dtype
    own: dict[str, Any] = {
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "epoch",
        "save_total_limit": 2,
        "use_cpu": bb.pick_device(job.options.device).type == "cpu",
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
    }
    return TrainingArguments(
        output_dir=str(folder),
        seed=job.seeds[member]["dropout"] % 2**32,
        data_seed=job.seeds[member]["order"] % 2**32,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        warmup_steps=recipe.warmup,
        lr_scheduler_type="linear",
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        label_names=[],
        **(own | dict(job.recipe.trainer_args)),
    )


def _last_checkpoint(folder: Path) -> str | None:
    """Return the latest checkpoint that the Trainer finished writing; it writes its state last."""
    # The state is written last; a folder without it was cut off.
    done = [f.parent for f in folder.glob("checkpoint-*/trainer_state.json")]
    latest = max(done, key=lambda f: int(f.name.rpartition("-")[2]), default=None)
    return None if latest is None else str(latest)


def _start_folder(job: Job[FullRecipe], member: int) -> Path:
    """Return the folder of the model that a member starts from: its own, or the pretrained."""
    if not job.start:
        return job.backbone.folder
    scorer = job.start[member]
    assert isinstance(scorer, FullScorer)
    return scorer.backbone.folder


def _train_one(
    job: Job[FullRecipe], member: int, folder: Path, sets: tuple[_Rows, _Rows], tokenizer: Any
) -> None:
    seeds = job.seeds[member]
    with global_seed(seeds["init"]):
        source = _start_folder(job, member)
        # float32 masters; mixed precision is the Trainer's own.
        model = bb.load_classifier(source, dtype="float32", new_head=not job.start)
        set_pad_token(model, tokenizer)
        set_dropout(model, job.recipe.dropout)
        pooling = trained_pooling(model)
        _score_by_forward(model, pooling)
        trainer = _PairTrainer(
            model=model,
            args=_arguments(job, member, folder / "trainer"),
            train_dataset=sets[0],
            eval_dataset=sets[1],
            data_collator=_collate,
            callbacks=[
                EarlyStoppingCallback(early_stopping_patience=job.recipe.patience),
                _Report(job.progress, f"training member {member}"),
                *job.recipe.callbacks,
            ],
        )
        trainer.recipe = job.recipe
        trainer.remove_callback(PrinterCallback)  # it writes to standard output
        last = _last_checkpoint(folder / "trainer")
        trainer.train(resume_from_checkpoint=last)
    # Saved aside and renamed: a kill leaves either no model or a whole one.
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    follow_umask(scratch)
    shutil.rmtree(folder / _MODEL, ignore_errors=True)
    scratch.rename(folder / _MODEL)
    record = {
        "pooling": pooling,
        "validation_nll": float(trainer.state.best_metric or float("nan")),
        "history": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
    }
    # Written last: it marks the member as finished.
    (folder / _DONE).write_text(json.dumps(record))
    # Checkpoints hold the optimiser's state, which is larger than the model.
    shutil.rmtree(folder / "trainer", ignore_errors=True)
