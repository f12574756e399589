"""The training loop: Megatron-core's schedules, optimizers and data parallelism, driven by a job."""

import contextlib
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import (
    get_num_microbatches,
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from mindspeed_nsa.context_parallel import own_pieces
from mindspeed_nsa.heap import prepare_heap
from mindspeed_nsa.patches import cpu_host, npu_host
from mindspeed_nsa.pretrain import checkpoint, npu
from mindspeed_nsa.pretrain.agreement import agree_on_data, agree_on_job, agree_on_order
from mindspeed_nsa.pretrain.data import batches, build_datasets, check_dataset, summary_of
from mindspeed_nsa.pretrain.evaluate import unigram_loss
from mindspeed_nsa.pretrain.job import Job
from mindspeed_nsa.pretrain.model import build_models
from mindspeed_nsa.pretrain.optimizer import build_optimizer, wrap
from mindspeed_nsa.pretrain.report import Report
from mindspeed_nsa.pretrain.sample import generate
from mindspeed_nsa.pretrain.tokenizer import build_tokenizer, padded_vocabulary

# Tokens of held-out text that a sample continues.
_PROMPT_TOKENS = 256


@dataclass(frozen=True)
class Result:
    """How a run ended, the same on every rank.

    Args:
        iteration: the last one done.
        loss: of the last iteration, nats per token; nan if none was done.
        valid_loss: of the last evaluation, None without one.
        stopped: whether a signal ended the run early.
    """

    iteration: int
    loss: float
    valid_loss: float | None
    stopped: bool


def run(job: Job) -> Result:
    """Train as a job says, on the ranks that torchrun started, or in this process alone.

    On a host with NPUs `npu_host.install` comes before this module is imported.

    Raises:
        ValueError: one line about what a user can get wrong. Nothing is written before it is raised.
    """
    npu.check(job)
    check_dataset(job.data.data_path)
    if job.data.valid_data_path:
        check_dataset(job.data.valid_data_path)
    checkpoint.check(job)
    with ranks(job):
        npu.agree_on_plan(job)
        trainer = Trainer(job)
        try:
            return trainer.train()
        finally:
            trainer.report.close()


@contextlib.contextmanager
def ranks(job: Job) -> Iterator[None]:
    """Join the ranks, and leave them in the end."""
    if npu_host.has_npu():
        npu_host.install()  # has to be done before this module is imported: raises if it is not
        backend = "hccl"
    elif cpu_host.has_accelerator():
        backend = "nccl"
    else:
        cpu_host.install()
        prepare_heap()
        backend = "gloo"
    if backend != "gloo":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend)
    else:
        torch.distributed.init_process_group(backend, rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        agree_on_job(job)
        parallel_state.initialize_model_parallel(
            job.parallel.tensor_model_parallel_size,
            job.parallel.pipeline_model_parallel_size,
            job.pipeline_runs if job.pipeline_runs > 1 else None,
            context_parallel_size=job.parallel.context_parallel_size,
            expert_model_parallel_size=job.parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=job.parallel.expert_tensor_parallel_size,
        )
        init_num_microbatches_calculator(
            torch.distributed.get_rank(),
            None,
            job.training.global_batch_size,
            job.training.micro_batch_size,
            parallel_state.get_data_parallel_world_size(),
        )
        yield
    finally:
        unset_num_microbatches_calculator()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


class Trainer:
    """One rank of a run: model, optimizer, data and report, built from a job and ready to train.

    Args:
        job: what to train and how.

    Raises:
        ValueError: the checkpoint to load is of another model.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer = build_tokenizer(job.data.tokenizer_type, job.data.tokenizer_model)
        agree_on_data(job.data)
        self.train_data, self.valid_data = build_datasets(
            job,
            self.tokenizer,
            job.training.train_iters * job.training.global_batch_size,
            job.training.eval_iters * job.training.global_batch_size,
        )
        agree_on_order({"data.data_path": self.train_data, "data.valid_data_path": self.valid_data})
        # Dropout draws from a generator that differs by rank; the weights do not.
        tensor_parallel.model_parallel_cuda_manual_seed(job.training.seed)
        runs = build_models(job, self.tokenizer.vocab_size)
        torch.manual_seed(job.training.seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
        self.models = wrap(job, [run.to(_device()) for run in runs])
        self.optimizer, self.scheduler = build_optimizer(job, self.models)
        self.state = checkpoint.State(runs, self.optimizer, self.scheduler, checkpoint.Progress())
        loaded = checkpoint.load(job, self.state) if job.checkpoint.load else None
        self.statistics = _Statistics(runs, job)
        self._connect_schedule(runs[0].config)
        self.report = Report(job, self.progress.iteration, active=torch.distributed.get_rank() == 0)
        for line in [*self._introduction(runs), *filter(None, [loaded])]:
            self.report.say(line)

    @property
    def progress(self) -> checkpoint.Progress:
        """How far the run has come."""
        return self.state.progress

    def train(self) -> Result:
        """Train to the last iteration, or until SIGINT or SIGTERM asks all ranks to save and stop."""
        training, saving = self.job.training, self.job.checkpoint
        data = self._batches(self.train_data, self.progress.consumed_samples)
        loss, valid_loss, stopped = math.nan, None, False
        if training.eval_iters and self.progress.iteration == 0:
            valid_loss = self._report_start()
        saved_at = self.progress.iteration
        if self.progress.iteration >= training.train_iters:
            self.report.say(f"nothing to do: {self.progress.iteration} of {training.train_iters} iterations are done")
        with _stop_requested() as requested:
            while self.progress.iteration < training.train_iters and not stopped:
                row, statistics = self._iterate(data)
                loss = row["loss"]
                if training.eval_iters and self._is_due(training.eval_interval):
                    row["valid_loss"] = valid_loss = self.evaluate()
                self.report.iteration(row, statistics)
                stopped = _any_rank(requested())
                if saving.save and saving.save_interval and self.progress.iteration % saving.save_interval == 0:
                    self._save()
                    saved_at = self.progress.iteration
            if saving.save and saved_at < self.progress.iteration:
                self._save()
        if stopped:
            self.report.say(f"stopped by a signal after iteration {self.progress.iteration}")
        elif self.job.logging.sample_tokens:
            self._write_sample()
        return Result(self.progress.iteration, loss, valid_loss, stopped)

    def evaluate(self) -> float:
        """The mean loss over the first `eval_iters` global batches of held-out text, nats per token."""
        assert self.valid_data is not None
        data = self._batches(self.valid_data, 0)
        for model in self.models:
            model.eval()
        with torch.no_grad():
            losses = [self._forward_backward(data, forward_only=True) for _ in range(self.job.training.eval_iters)]
        for model in self.models:
            model.train()
        return sum(losses) / len(losses)

    def _iterate(self, data: list[Iterator[dict[str, Tensor]]]) -> tuple[dict[str, Any], dict[int, dict[str, float]]]:
        """One optimizer step: the row of metrics, and the statistics where they are due."""
        started = time.perf_counter()
        logs = self.report.wants(self.progress.iteration + 1)
        self.statistics.collect(logs)
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        loss = self._forward_backward(data, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        samples = self.job.training.global_batch_size
        self.scheduler.step(increment=samples)
        self.progress.iteration += 1
        self.progress.consumed_samples += samples
        statistics = self.statistics.gather() if logs else {}
        self.statistics.collect(False)
        seconds = time.perf_counter() - started
        row = {
            "iteration": self.progress.iteration,
            "loss": loss,
            "grad_norm": float(grad_norm),
            "learning_rate": learning_rate,
            "tokens_per_second": samples * self.job.model.seq_length / seconds,
        }
        return row, statistics

    def _forward_backward(self, data: list[Iterator[dict[str, Tensor]]], *, forward_only: bool) -> float:
        """Run a global batch through Megatron's schedule: its mean loss, the same on every rank."""
        losses = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=data if len(data) > 1 else data[0],
            model=self.models,
            num_microbatches=get_num_microbatches(),
            seq_length=self.job.model.seq_length,
            micro_batch_size=self.job.training.micro_batch_size,
            forward_only=forward_only,
        )
        # Only the last pipeline stage knows the loss; its tensor-parallel ranks agree on it, its context-parallel ranks have
        # parts of it.
        total = torch.zeros(1, dtype=torch.float64)
        if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
            total += torch.stack([loss["loss"] for loss in losses]).double().cpu().sum() / len(losses)
        total = total.to(_device())
        torch.distributed.all_reduce(total)
        return total.item() / parallel_state.get_data_parallel_world_size()

    def _forward(self, data: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        batch = {name: tensor.to(_device()) for name, tensor in next(data).items()}
        context = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        packed = _packed(batch["position_ids"], context[0]) if self.job.data.reset_attention_mask else None
        counted = batch["loss_mask"].sum().clamp(min=1)
        if context[0] > 1:
            batch = {name: own_pieces(tensor, 1, *context) for name, tensor in batch.items()}
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
        return output, functools.partial(_mean_loss, batch["loss_mask"], counted)

    def _batches(self, dataset: Any, consumed_samples: int) -> list[Iterator[dict[str, Tensor]]]:
        """This rank's micro batches, once for each of its runs of layers."""
        ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        size, workers = self.job.training.micro_batch_size, self.job.data.num_workers
        return [batches(dataset, consumed_samples, size, *ranks, workers) for _ in self.models]

    def _is_due(self, interval: int) -> bool:
        return self.progress.iteration % interval == 0 or self.progress.iteration == self.job.training.train_iters

    def _report_start(self) -> float:
        """Evaluate before the first iteration, beside the unigram model if the training text is known."""
        assert self.valid_data is not None
        row = {"iteration": 0, "valid_loss": self.evaluate()}
        line = f"held-out loss before training {row['valid_loss']:.4f}"
        if summary := summary_of(self.job.data.data_path):
            samples = self.job.training.eval_iters * self.job.training.global_batch_size
            row["unigram_loss"] = unigram_loss(summary, self.valid_data, samples)
            line += f", of a unigram model {row['unigram_loss']:.4f}"
        self.report.iteration(row, {})
        self.report.say(line)
        return row["valid_loss"]

    def _save(self) -> None:
        self.report.say(f"saved {checkpoint.save(self.job, self.state)}")

    def _write_sample(self) -> None:
        """Let the model continue held-out text, into `<run_dir>/sample.txt`."""
        assert self.valid_data is not None
        prompt = self.valid_data[0]["tokens"][:_PROMPT_TOKENS].tolist()
        generator = torch.Generator().manual_seed(self.job.training.seed)
        new = generate(self.models[0], self.tokenizer, prompt, self.job.logging.sample_tokens, 0.8, generator)
        if torch.distributed.get_rank() == 0:
            before, after = self.tokenizer.detokenize(prompt), self.tokenizer.detokenize(new)
            text = f"held-out text:\n{before}\n\ncontinued by the model:\n{after}\n"
            (Path(self.job.logging.run_dir) / "sample.txt").write_text(text, encoding="utf-8")

    def _connect_schedule(self, config: Any) -> None:
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = [model.no_sync for model in self.models] if len(self.models) > 1 else self.models[0].no_sync

    def _introduction(self, runs: list[torch.nn.Module]) -> Iterator[str]:
        job, parallel = self.job, self.job.parallel
        parameters = sum(parameter.numel() for run in runs for parameter in run.parameters())
        rows = padded_vocabulary(self.tokenizer.vocab_size, parallel.tensor_model_parallel_size)
        layers = job.nsa.nsa_layers(job.model.num_layers) if job.nsa.enabled else []
        yield (
            f"{parameters:,} parameters on this rank, vocabulary {self.tokenizer.vocab_size} padded to {rows}, "
            f"NSA in {len(layers)} of {job.model.num_layers} layers; tensor parallel "
            f"{parallel.tensor_model_parallel_size}{' with sequence parallel' * parallel.sequence_parallel}, context "
            f"{parallel.context_parallel_size}, pipeline {parallel.pipeline_model_parallel_size}"
            f"{f' in {job.pipeline_runs} runs' * (job.pipeline_runs > 1)}, data parallel "
            f"{parallel_state.get_data_parallel_world_size()}"
        )
        if job.megatron:
            yield f"not read here, for Megatron-LM alone: megatron.{', megatron.'.join(job.megatron)}"
        dense = len(layers) < job.model.num_layers and not job.model.multi_latent_attention
        if dense and job.model.v_head_dim not in (None, job.model.head_width):
            yield (
                f"model.v_head_dim {job.model.v_head_dim} does not hold in dense layers: Megatron's attention has one "
                f"width for a head, {job.model.head_width}"
            )


class _Statistics:
    """What the NSA layers say of themselves; nothing where there are none."""

    def __init__(self, runs: list[torch.nn.Module], job: Job) -> None:
        self._models = runs if job.nsa.enabled else None

    def collect(self, wanted: bool) -> None:
        if self._models is not None:
            from mindspeed_nsa.patches.megatron_core import collect_statistics

            collect_statistics(self._models, wanted)

    def gather(self) -> dict[int, dict[str, float]]:
        """The statistics of every layer, averaged over the ranks that hold it."""
        if self._models is None:
            return {}
        from mindspeed_nsa.patches.megatron_core import gather_statistics

        return gather_statistics(self._models)


def _mean_loss(loss_mask: Tensor, counted: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's part of the mean over the `counted` tokens of a micro batch, for Megatron's schedules."""
    loss = (losses.float() * loss_mask).sum() / counted
    # The schedule divides the first in place.
    return loss, {"loss": loss.detach().clone()}


def _packed(position_ids: Tensor, context_parallel_size: int) -> PackedSeqParams:
    """The documents of one sequence, each of which starts at position 0.

    Over context-parallel ranks Megatron would cut each document: there the format says that the sequence is one, and the bounds
    reach the attention alone.

    Args:
        position_ids: `[1, s]`, of the whole sequence.
        context_parallel_size: ranks that share it.
    """
    starts = (position_ids[0] == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).int()
    shared = context_parallel_size > 1
    longest = position_ids.shape[1] if shared else int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="sbhd" if shared else "thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


@contextlib.contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Note the first SIGINT or SIGTERM instead of dying of it; a second one ends the process."""
    signals = (signal.SIGINT, signal.SIGTERM)
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        noted.append(number)
        for each in signals:
            signal.signal(each, before[each])

    before = {each: signal.signal(each, note) for each in signals}
    try:
        yield lambda: bool(noted)
    finally:
        for each in signals:
            signal.signal(each, before[each])


def _any_rank(flag: bool) -> bool:
    """Whether any rank says so."""
    flags = torch.tensor([int(flag)], device=_device())
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


def _device() -> torch.device:
    """Where this rank computes."""
    return torch.device(torch.cuda.current_device())
