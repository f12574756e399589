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
from models import ENGINE, GQA, LOCAL, MODEL, arguments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[3]
ON = {"experimental-attention-variant": "nsa"}
REFERENCE = ON | {"nsa-backend": "reference"}  # float32
ASCEND = ON | {"bf16": True, "use-flash-attn": True}
FLASH = {"use-flash-attn": True}
TP2 = {"tensor-model-parallel-size": 2}
SP = TP2 | {"sequence-parallel": True}
OF_QUERY = {"nsa-gate": "query", "nsa-separate-kv": "false"}
MLA = {
    **{"multi-latent-attention": True, "kv-lora-rank": 32, "qk-head-dim": 16, "qk-pos-emb-head-dim": 16, "v-head-dim": 16},
    **{"qk-layernorm": True} | OF_QUERY,
}
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
    """One process, local spec, float32, on the reference operators; its TensorBoard is in `board`."""
    folder = tmp_path_factory.mktemp("expected")
    return run_job(LOCAL, GQA, REFERENCE, {"tensorboard-dir": folder / "board"}, folder=folder)


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        pytest.param(ENGINE, 1, id="transformer engine"),
        pytest.param(LOCAL | FLASH | {"recompute-granularity": "selective"}, 1, id="selective recompute, flash"),
        pytest.param(
            ENGINE | {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}, 1, id="full"
        ),
        pytest.param(LOCAL | TP2, 2, id="tp2"),
        pytest.param(ENGINE | SP, 2, id="tp2 sp"),
        pytest.param(LOCAL | {"use-distributed-optimizer": True}, 2, id="dp2"),
        pytest.param(LOCAL | {"spec": ("user_spec", "layer")}, 1, id="the user's spec"),
        pytest.param(LOCAL | {"pipeline-model-parallel-size": 2}, 2, id="pp2"),
    ],
)
def test_layouts_train_the_same_model(run_job, expected, flags, ranks):
    job = run_job(GQA, REFERENCE, flags, ranks=ranks)
    assert set(job.cores.values()) == {"NSACore"}
    close(job.losses, expected.losses)


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        pytest.param(GQA | LOCAL, 1, id="local"),
        pytest.param(
            GQA | ENGINE | SP | {"use-fused-rotary-pos-emb": True, "swiglu": True, "use-fused-swiglu": True}, 2, id="tp2"
        ),
    ],
)
def test_the_four_operators_run_in_every_layer(run_job, flags, ranks):
    job = run_job(ASCEND, flags, ranks=ranks)
    assert job.cores == ALL_NSA
    probed = run_job(ASCEND, flags, {"train-iters": 1}, ranks=ranks)
    further = 2 * 2 * 2  # layers, micro-batches, steps
    found = {name: job.calls[name] - probed.calls[name] for name in OPERATORS}
    assert found == {name: calls * further for name, calls in OPERATORS.items()}


def test_ascend_agrees_with_the_reference(run_job):
    """bfloat16 on both sides."""
    found = run_job(ASCEND, LOCAL, GQA)
    close(found.losses, run_job(ASCEND, LOCAL, GQA, {"nsa-backend": "reference"}).losses, 2e-2)


@pytest.mark.parametrize("spec", [LOCAL | FLASH, ENGINE], ids=["local", "engine"])
def test_latent_attention(run_job, spec):
    job = run_job(spec, REFERENCE, MLA)
    assert job.cores == ALL_NSA
    recomputed = run_job(spec, REFERENCE, MLA, {"recompute-granularity": "selective"})
    close(recomputed.losses, job.losses)


@pytest.mark.parametrize("spec", [LOCAL | FLASH, ENGINE], ids=["local", "engine"])
def test_experts(run_job, spec):
    assert run_job(spec, REFERENCE, GQA, MOE).cores == ALL_NSA


def test_packed_samples(run_job):
    job = run_job(LOCAL, FLASH, REFERENCE, GQA, {"reset-attention-mask": True, "reset-position-ids": True})
    engine = run_job(ENGINE, REFERENCE, GQA, {"reset-attention-mask": True, "reset-position-ids": True})
    close(engine.losses, job.losses)


def test_some_layers_stay_dense(run_job):
    job = run_job(ENGINE, ASCEND, GQA, {"nsa-layers": "1::2", "num-layers": 3, "noop-layers": "2"})
    assert job.cores == {0: "MindSpeedTEDotProductAttention", 1: "NSACore"}


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
    off = run_job(LOCAL, FLASH, GQA, {"bf16": True}, ON, {"nsa-enabled": "false"})
    assert off.losses == plain.losses


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (GQA | {"context-parallel-size": 2}, "--context-parallel-size 2 does not go with NSA: each rank would attend"),
        (GQA | {"attention-dropout": 0.1}, "--attention-dropout 0.1 does not go with NSA"),
        (GQA | {"bf16": None, "nsa-backend": "auto"}, "float32 does not go with NSA on an NPU"),
        (GQA | {"nsa-layers": "[5]"}, "layers: [5] names none, or too many, of the layers 0 to 1"),
        (GQA | {"nsa-window-size": "wide"}, "nsa.window_size: input should be a valid integer, given 'wide'"),
        (GQA | {"nsa-config": "absent.yaml"}, "absent.yaml: no such file or directory"),
        (GQA | {"experimental-attention-variant": None, "nsa-window-size": 64}, "--nsa-window-size: NSA is not turned on"),
        (
            {k: v for k, v in MLA.items() if k not in OF_QUERY},
            "multi-latent attention hands its core query, key and value only",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_in_words(run_job, flags, said):
    job = run_job(LOCAL, FLASH, REFERENCE, flags, ranks=flags.get("context-parallel-size", 1), ok=False)
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


@pytest.mark.parametrize("layers", ["all", "[1]"])
def test_a_run_goes_on_from_its_checkpoint(run_job, tmp_path, layers):
    model = GQA | REFERENCE | {"nsa-layers": layers}
    saving = {"ckpt-format": "torch_dist", "save": tmp_path / "saved", "save-interval": 2}
    whole = run_job(LOCAL, model, saving)
    loading = {"ckpt-format": "torch_dist", "load": tmp_path / "saved", "ckpt-step": 2}
    close(run_job(ENGINE, model, loading).losses, whole.losses[2:])
    anew = {"no-load-optim": True, "no-load-rng": True}
    close(run_job(LOCAL, model, loading, TP2, anew, ranks=2).losses, whole.losses[2:])


@pytest.fixture
def trainer(real_text, tmp_path):
    """Run the project's own trainer on the model of these jobs, with a dense layer and one with NSA: to its losses."""
    sizes = ("num_layers=2", "hidden_size=64", "num_attention_heads=4", "kv_channels=16", "seq_length=1280", "swiglu=false")
    model = [f"model.{size}" for size in (*sizes, "untie_embeddings_and_output_weights=true")]
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}

    def run(folder, *overrides):
        places = [f"data.data_path={real_text}", f"logging.run_dir={folder}", "logging.tensorboard=false"]
        command = [sys.executable, "-m", "mindspeed_nsa.pretrain", "--config", str(ROOT / "configs" / "tiny.yaml")]
        command += [*model, *places, "nsa.layers=[1]", "nsa.backend=reference", *overrides]
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
