import json
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from jobs import command, environment

pytest.importorskip("megatron.core")

from megatron.core.packed_seq_params import PackedSeqParams

from mindspeed_nsa.pretrain.model import CausalAttention, padded_vocabulary
from mindspeed_nsa.pretrain.trainer import _packed

# Fields in which two fp32 layouts of one model differ by rounding alone.
TOLERANCE = 5e-5
PACKED = ("data.reset_attention_mask=true", "data.reset_position_ids=true")
LATENT = (
    "model.multi_latent_attention=true",
    "model.num_query_groups=8",
    "model.kv_channels=",
    "model.q_lora_rank=32",
    "model.kv_lora_rank=32",
    "model.qk_head_dim=16",
    "model.qk_pos_emb_head_dim=8",
    "model.v_head_dim=16",
)
OTHER = (
    "model.normalization=LayerNorm",
    "model.swiglu=false",
    "model.add_bias_linear=true",
    "model.qk_layernorm=true",
    "model.position_embedding_type=learned_absolute",
    "model.untie_embeddings_and_output_weights=true",
)
TP2 = "parallel.tensor_model_parallel_size=2"


@pytest.fixture(scope="module")
def alone(run_job):
    return run_job()


@pytest.mark.parametrize(
    "layout",
    [
        (TP2,),
        (TP2, "parallel.sequence_parallel=true"),
        ("parallel.pipeline_model_parallel_size=2",),
        ("parallel.use_distributed_optimizer=true",),
        (TP2, "parallel.recompute_granularity=full", "parallel.recompute_method=uniform", "parallel.recompute_num_layers=1"),
    ],
    ids=["tp", "tp-sp", "pp", "dp-distributed", "tp-recompute"],
)
def test_every_layout_trains_the_same_model(alone, run_job, layout):
    run = run_job(*layout, ranks=2)
    assert run.values("iteration") == [1, 2, 3, 4]
    assert run.values("loss") == pytest.approx(alone.values("loss"), abs=TOLERANCE)
    assert run.values("grad_norm") == pytest.approx(alone.values("grad_norm"), rel=1e-3)


@pytest.mark.parametrize("model", [LATENT, OTHER, PACKED], ids=["latent", "biases", "packed"])
def test_other_models_train_the_same_on_two_ranks(run_job, model):
    alone = run_job(*model)
    tensor = run_job(*model, TP2, "parallel.sequence_parallel=true", ranks=2)
    assert tensor.values("loss") == pytest.approx(alone.values("loss"), abs=TOLERANCE)
    # Latent attention without its gradient of the shared rotary key summed over the ranks is off by 1e-3 and more.
    assert tensor.values("grad_norm") == pytest.approx(alone.values("grad_norm"), rel=2e-4)


def test_the_comparison_of_layouts_feels_a_small_mistake(alone, run_job):
    run = run_job("model.rotary_base=9500")
    assert max(abs(a - b) for a, b in zip(run.values("loss"), alone.values("loss"), strict=True)) > 10 * TOLERANCE


def test_packed_documents_train_differently_from_one_long_sequence(alone, run_job):
    run = run_job(*PACKED)
    assert abs(run.rows[0]["loss"] - alone.rows[0]["loss"]) > 1e-2


def test_what_a_run_leaves_behind(run_job, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ("training.eval_iters=2", "training.eval_interval=2", "training.lr_warmup_iters=2", "training.lr=4.0e-3")
    run = run_job(*settings, "logging.tensorboard=true", "logging.sample_tokens=3", folder=tmp_path)
    untrained, *rows = run.rows
    assert set(untrained) == {"iteration", "valid_loss", "unigram_loss"} and untrained["iteration"] == 0
    assert 1 < untrained["unigram_loss"] < 5 < untrained["valid_loss"]
    for row in rows:
        assert row.keys() >= {"iteration", "loss", "grad_norm", "learning_rate", "tokens_per_second"}
    assert [row["iteration"] for row in rows if "valid_loss" in row] == [2, 4]
    assert rows[-1]["valid_loss"] < untrained["valid_loss"]
    # Megatron's warm-up: the first step is taken at 0, the second half way.
    assert [row["learning_rate"] for row in rows[:3]] == pytest.approx([0.0, 2e-3, 4e-3])
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [point.value for point in board.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    assert {"grad_norm", "learning_rate", "valid_loss"} <= set(board.Tags()["scalars"])
    assert "iteration 4/4  loss" in run.stdout and "held-out loss before training" in run.stdout
    assert "continued by the model:" in (tmp_path / "sample.txt").read_text()


def test_bfloat16_stays_near_float32(alone, run_job):
    run = run_job("training.bf16=true")
    assert run.values("loss") == pytest.approx(alone.values("loss"), abs=0.05)
    assert run.values("loss") != alone.values("loss")


def test_a_signal_saves_and_ends_the_run_well(run_job, text, tmp_path):
    save = tmp_path / "checkpoints"
    long = ("training.train_iters=1000", f"checkpoint.save={save}", "training.lr_decay_style=constant")
    with subprocess.Popen(
        command(text, tmp_path / "run", long, 0), env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("iteration 2/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    done = rows[-1]["iteration"]
    assert process.returncode == 0
    assert f"stopped by a signal after iteration {done}\n" in rest and 2 <= done < 1000
    assert (save / "latest_checkpointed_iteration.txt").read_text() == f"{done}\n"
    assert (save / f"iter_{done:07d}" / "metadata.json").is_file()


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_wrong_job_is_one_line_and_exit_code_2(run_job, tmp_path, ranks):
    run = run_job("training.sead=1", ranks=ranks, folder=tmp_path / "run", ok=False)
    lines = [line for line in run.stderr.splitlines() if "sead" in line]
    assert len(lines) == 1 and lines[0].endswith("training.sead: unknown key; did you mean seed?")
    assert run.code == 2 and run.stderr.splitlines() == lines
    assert not (tmp_path / "run").exists()


def test_truncated_data_is_refused_before_anything_is_written(run_job, text, tmp_path):
    for suffix in (".idx", ".bin"):
        (tmp_path / f"cut{suffix}").write_bytes(text.with_name(f"python_train{suffix}").read_bytes())
    whole = (tmp_path / "cut.bin").stat().st_size
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-7])
    run = run_job(f"data.data_path={tmp_path / 'cut'}", folder=tmp_path / "run", ok=False)
    expected = f"error: {tmp_path / 'cut.bin'}: truncated: expected {whole} bytes, found {whole - 7}\n"
    assert (run.code, run.stderr) == (2, expected)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def core():
    return CausalAttention(SimpleNamespace(), softmax_scale=0.3)


def plain_attention(query, key, value):
    """Attention of one sequence over every earlier token, head by head."""
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype)
    for sequence in range(query.shape[1]):
        for head in range(query.shape[2]):
            group = head * key.shape[2] // query.shape[2]
            for token in range(query.shape[0]):
                scores = key[: token + 1, sequence, group] @ query[token, sequence, head] * 0.3
                out[token, sequence, head] = scores.softmax(0) @ value[: token + 1, sequence, group]
    return out.flatten(2)


def test_dense_core_is_causal_attention_with_shared_and_narrower_values(core):
    query, key = torch.randn(9, 2, 6, 5, dtype=torch.float64), torch.randn(9, 2, 3, 5, dtype=torch.float64)
    value = torch.randn(9, 2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(core(query, key, value, None), plain_attention(query, key, value))


def test_dense_core_keeps_packed_documents_apart(core):
    query, key, value = (torch.randn(10, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 1, 4, 10], dtype=torch.int32)
    out = core(query, key, value, None, packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds))
    for first, last in ((0, 1), (1, 4), (4, 10)):
        alone = plain_attention(*(tensor[first:last, None] for tensor in (query, key, value)))
        torch.testing.assert_close(out[first:last], alone.squeeze(1))


def test_documents_are_found_by_their_positions():
    packed = _packed(torch.tensor([[0, 1, 2, 0, 0, 1]]), 1)
    assert packed.cu_seqlens_q.tolist() == [0, 3, 4, 6] and packed.cu_seqlens_q.dtype == torch.int32
    assert (packed.max_seqlen_q, packed.qkv_format) == (3, "thd")


@pytest.mark.parametrize(("size", "ranks", "rows"), [(257, 1, 384), (257, 4, 384), (384, 2, 384), (257, 3, 384), (1, 5, 640)])
def test_the_vocabulary_is_padded_alike_for_every_usual_layout(size, ranks, rows):
    assert padded_vocabulary(size, ranks) == rows
