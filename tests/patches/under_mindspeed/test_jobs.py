"""Whole jobs with NSA under MindSpeed, on the emulated device: what a user starts, in many layouts."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ENGINE, GQA, LATENT, LOCAL, MODEL, arguments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[3]
ON = {"experimental-attention-variant": "nsa"}
# In float32, on the reference operators: a sequence so short takes a tenth of the time, with as many blocks to choose from.
SHORT = {"seq-length": 512, "max-position-embeddings": 512, "nsa-select-block-count": 4, "nsa-window-size": 64}
REFERENCE = ON | SHORT | {"nsa-backend": "reference", "nsa-strict": "false"}
ASCEND = ON | {"bf16": True, "use-flash-attn": True}
FLASH = {"use-flash-attn": True}
TP2 = {"tensor-model-parallel-size": 2}
SP = TP2 | {"sequence-parallel": True}
PP2 = {"pipeline-model-parallel-size": 2}
PACKED = {"reset-attention-mask": True, "reset-position-ids": True}
SAVED = {"ckpt-format": "torch_dist", "save-interval": 2}
SELECTIVE = {"recompute-granularity": "selective"}
MOE = {"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 64, "moe-token-dispatcher-type": "alltoall"}
# Each layer, micro-batch and step: pooling of keys and of values, compressed, selected, window.
OPERATORS = {"aclnnNsaCompress": 2, "aclnnNsaCompressAttention": 1, "aclnnNsaSelectedAttention": 1}
OPERATORS |= {"aclnnFlashAttentionVarLenScore": 1, "aclnnNsaSelectedAttentionGrad": 1}
ALL_NSA = {0: "NSACore", 1: "NSACore"}


def close(found, expected, tolerance=5e-5):
    assert len(found) == len(expected) > 0
    assert found == pytest.approx(expected, abs=tolerance, rel=0)


@pytest.fixture(scope="module")
def expected(run_job, tmp_path_factory):
    """One process, local spec, float32, on the reference operators; it leaves TensorBoard's files and checkpoints."""
    folder = tmp_path_factory.mktemp("expected")
    leaves = SAVED | {"tensorboard-dir": folder / "board", "save": folder / "saved"}
    return run_job(LOCAL, GQA, REFERENCE, leaves, folder=folder)


@pytest.fixture(scope="module")
def ascend(run_job):
    """The same in bfloat16 on the emulated operators, by plan A unasked, so that no call of an operator is the probe's."""
    return run_job(ASCEND, LOCAL, GQA, NSA_ASCEND_PLAN="A")


@pytest.fixture(scope="module")
def latent(run_job):
    """As `expected`, of a model with multi-latent attention."""
    return run_job(LOCAL, FLASH, REFERENCE, LATENT)


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        pytest.param(ENGINE, 1, id="transformer engine"),
        pytest.param(LOCAL | FLASH | SELECTIVE, 1, id="selective recompute, flash"),
        pytest.param(
            ENGINE | {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}, 1, id="full"
        ),
        pytest.param(LOCAL | TP2, 2, id="tp2"),
        pytest.param(ENGINE | SP, 2, id="tp2 sp"),
        pytest.param(LOCAL | {"use-distributed-optimizer": True}, 2, id="dp2"),
        pytest.param(LOCAL | {"spec": ("user_spec", "layer")}, 1, id="the user's spec"),
    ],
)
def test_layouts_train_the_same_model(run_job, expected, flags, ranks):
    job = run_job(GQA, REFERENCE, flags, ranks=ranks)
    assert set(job.cores.values()) == {"NSACore"}
    close(job.losses, expected.losses)


def test_a_noop_layer_is_none(run_job):
    """The first of three or the last: what remains is one model."""
    first = run_job(ENGINE, GQA, REFERENCE, {"num-layers": 3, "noop-layers": "0"})
    assert first.cores == {1: "NSACore", 2: "NSACore"}
    last = run_job(LOCAL, GQA, REFERENCE, {"num-layers": 3, "noop-layers": "2"})
    assert last.cores == {0: "NSACore", 1: "NSACore"}
    close(last.losses, first.losses)


def calls(job):
    return {name: job.calls.get(name, 0) for name in OPERATORS}


def test_the_four_operators_run_in_every_layer(run_job, ascend):
    fused = {"use-fused-rotary-pos-emb": True, "swiglu": True, "use-fused-swiglu": True}
    split = run_job(ASCEND, GQA, ENGINE, SP, fused, ranks=2, NSA_ASCEND_PLAN="A")
    for job in (ascend, split):
        assert job.cores == ALL_NSA
        # Two layers, two micro-batches, three steps.
        assert calls(job) == {name: 2 * 2 * 3 * count for name, count in OPERATORS.items()}


def test_ascend_agrees_with_the_reference(run_job, ascend):
    """Both in bfloat16, and both in float16."""
    close(ascend.losses, run_job(ASCEND, LOCAL, GQA, {"nsa-backend": "reference"}).losses, 2e-2)
    half = {"bf16": None, "fp16": True, "loss-scale": 128}
    found = run_job(ASCEND, LOCAL, GQA, half)
    assert set(OPERATORS) <= set(found.calls)
    close(found.losses, run_job(ASCEND, LOCAL, GQA, half, {"nsa-backend": "reference"}).losses, 2e-2)


@pytest.mark.parametrize("flags", [ENGINE, LOCAL | FLASH | SELECTIVE], ids=["engine", "local, selective recompute"])
def test_latent_attention(run_job, latent, flags):
    job = run_job(REFERENCE, LATENT, flags)
    assert job.cores == ALL_NSA
    close(job.losses, latent.losses)


@pytest.mark.parametrize("flags", [LOCAL | FLASH | TP2, ENGINE | SP | SELECTIVE], ids=["tp2", "tp2 sp"])
def test_latent_attention_on_two_ranks(run_job, latent, flags):
    """Megatron-core 0.12.1 gives a rank the rotary key's gradient from its own heads alone: after a step, losses differ."""
    job = run_job(REFERENCE, LATENT, flags, ranks=2)
    assert job.cores == ALL_NSA
    close(job.losses[:1], latent.losses[:1])
    close(job.losses, latent.losses, 5e-3)


@pytest.mark.parametrize("spec", [LOCAL | FLASH, ENGINE], ids=["local", "engine"])
def test_experts(run_job, spec):
    assert run_job(spec, REFERENCE, GQA, MOE).cores == ALL_NSA


@pytest.mark.parametrize("kind", ["gqa", "latent"])
def test_packed_samples(run_job, expected, latent, kind):
    model, unpacked = (GQA, expected) if kind == "gqa" else (LATENT, latent)
    job = run_job(LOCAL, FLASH, REFERENCE, model, PACKED)
    close(run_job(ENGINE, REFERENCE, model, PACKED).losses, job.losses)
    assert abs(job.losses[0] - unpacked.losses[0]) > 1e-3


def test_some_layers_stay_dense(run_job):
    """As the host makes them; its operators are probed here."""
    job = run_job(ENGINE, ASCEND, GQA, {"nsa-layers": "1::2", "num-layers": 3, "noop-layers": "2"})
    assert job.cores == {0: "MindSpeedTEDotProductAttention", 1: "NSACore"}
    assert "NSA on Ascend: plan A" in job.text


def test_statistics_and_real_flops_are_reported(run_job, expected):
    board = EventAccumulator(str(expected.folder / "board")).Reload()
    names = board.Tags()["scalars"]
    for layer in (0, 1):
        shares = [board.Scalars(f"nsa/layer_{layer}/{name}_share")[-1].value for name in ("forced", "scored")]
        assert sum(shares) == pytest.approx(1)
        assert [event.step for event in board.Scalars(f"nsa/layer_{layer}/gate_window")] == [1, 2, 3]
    assert sum(name.startswith("nsa/") for name in names) == 12
    assert re.search(r"throughput per GPU", expected.text)


def test_without_the_flag_nothing_changes(run_job):
    job, plain = run_job(LOCAL, FLASH, GQA, {"bf16": True}), run_job(LOCAL, FLASH, GQA, {"bf16": True}, script="dense")
    assert job.losses == plain.losses
    assert job.cores == plain.cores == {0: "DotProductAttention", 1: "DotProductAttention"}


@pytest.mark.parametrize(
    ("flags", "ranks", "said"),
    [
        ({"context-parallel-size": 2}, 2, "--context-parallel-size 2 does not go with NSA: each rank would attend"),
        ({"nsa-config": "absent.yaml"}, 1, "absent.yaml: no such file or directory"),
        ({"nsa-backend": "auto"}, 1, "float32 does not go with NSA on an NPU"),
        ({"nsa-layers": "[5]"}, 1, "layers: [5] names none, or too many, of the layers 0 to 1"),
    ],
    ids=["context parallel", "no file", "float32", "layers"],
)
def test_a_job_that_is_refused_trains_nothing(run_job, flags, ranks, said):
    """The other refusals are in test_feature.py, where settings are those of one job."""
    job = run_job(LOCAL, FLASH, REFERENCE, GQA, flags, ranks=ranks, ok=False)
    assert set(job.codes) != {0}
    assert said in job.text
    assert not job.losses


@pytest.mark.slow
def test_torchrun_starts_it(environment, hosts, expected, real_text):
    """As a user does, two ranks; everything else here forks its ranks from a process that has the hosts imported."""
    flags = MODEL | LOCAL | GQA | REFERENCE | TP2 | {"data-path": real_text, "make-vocab-size-divisible-by": 256}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "emulated_cann", "-m", "pretrain_nsa", *arguments(flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    close([float(loss) for loss in re.findall(r"lm loss: (\S+)", done.stdout)], expected.losses)


ANEW = {"no-load-optim": True, "no-load-rng": True}


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        pytest.param(ENGINE, 1, id="engine"),
        pytest.param(LOCAL | TP2 | ANEW, 2, id="tp2"),
        # Megatron draws the first weights of each stage from a seed of its own: only a checkpoint makes them one model.
        pytest.param(LOCAL | PP2 | ANEW, 2, id="pp2"),
    ],
)
def test_a_run_goes_on_from_its_checkpoint(run_job, expected, flags, ranks):
    """On another spec, and on other layouts."""
    loading = {"ckpt-format": "torch_dist", "load": expected.folder / "saved", "ckpt-step": 2}
    close(run_job(GQA, REFERENCE, loading, flags, ranks=ranks).losses, expected.losses[2:])


@pytest.mark.parametrize(
    ("layers", "saving", "loading", "ranks"),
    [
        pytest.param("[1]", {"ckpt-format": "torch_dist"}, TP2 | ANEW, 2, id="layers that differ"),
        pytest.param("all", {"ckpt-format": "torch"}, {}, 1, id="torch"),
    ],
)
def test_other_checkpoints(run_job, tmp_path, layers, saving, loading, ranks):
    model = LOCAL | GQA | REFERENCE | {"nsa-layers": layers} | saving
    whole = run_job(model, {"save": tmp_path / "saved", "save-interval": 2})
    found = run_job(model, {"load": tmp_path / "saved", "ckpt-step": 2}, loading, ranks=ranks)
    close(found.losses, whole.losses[2:])


def test_interleaved_stages_have_nsa_in_the_right_layers(run_job, tmp_path):
    """Two stages of two chunks of a layer: 0 and 2, 1 and 3."""
    model = LOCAL | GQA | REFERENCE | SAVED | {"num-layers": 4, "nsa-layers": "1::2"}
    whole = run_job(model, {"save": tmp_path / "saved"})
    assert whole.cores == {0: "DotProductAttention", 1: "NSACore", 2: "DotProductAttention", 3: "NSACore"}
    stages = PP2 | ANEW | {"num-layers-per-virtual-pipeline-stage": 1, "load": tmp_path / "saved", "ckpt-step": 2}
    found = run_job(model, stages, ranks=2)
    assert found.cores == {0: "DotProductAttention", 2: "DotProductAttention"}
    close(found.losses, whole.losses[2:])


@pytest.fixture
def trainer(real_text, tmp_path):
    """Run the project's own trainer on the model of these jobs, with a dense layer and one with NSA: to its losses."""
    sizes = ("num_layers=2", "hidden_size=64", "num_attention_heads=4", "kv_channels=16", "seq_length=512", "swiglu=false")
    model = [f"model.{size}" for size in (*sizes, "untie_embeddings_and_output_weights=true")]
    settings = ["nsa.backend=reference", "nsa.strict=false", "nsa.select_block_count=4", "nsa.window_size=64"]
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}

    def run(folder, *overrides):
        places = [f"data.data_path={real_text}", f"logging.run_dir={folder}", "logging.tensorboard=false"]
        command = [sys.executable, "-m", "mindspeed_nsa.pretrain", "--config", str(ROOT / "configs" / "tiny.yaml")]
        command += [*model, *places, "nsa.layers=[1]", *settings, *overrides]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


def test_the_project_s_trainer_trains_the_same_model(run_job, trainer, real_text, tmp_path):
    """From its untrained weights, saved after a step of no length, on the same samples."""
    saved = tmp_path / "saved"
    trainer(tmp_path / "a", "training.lr=1e-30", "training.train_iters=1", f"checkpoint.save={saved}")
    expected = trainer(tmp_path / "b", "training.train_iters=3")
    common = torch.load(saved / "iter_0000001" / "common.pt", weights_only=False)
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    torch.save(common | {"args": argparse.Namespace(**layout), "checkpoint_version": 3.0}, saved / "iter_0000001" / "common.pt")
    loading = {"load": saved, "ckpt-format": "torch_dist", "finetune": True, "no-load-optim": True, "no-load-rng": True}
    data = {"data-path": None, "split": None, "train-data-path": real_text, "make-vocab-size-divisible-by": 128}
    found = run_job(LOCAL, GQA, REFERENCE, {"nsa-layers": "[1]"}, loading, data)
    close(found.losses, expected)
