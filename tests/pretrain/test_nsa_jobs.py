"""NSA in whole jobs: layouts that split it, packed documents, recompute, checkpoints, statistics."""

import pytest
from packaging.version import Version

megatron = pytest.importorskip("megatron.core")

NEW = Version(megatron.__version__) >= Version("0.16")
NSA = ("nsa.enabled=true", "model.seq_length=1088", "training.train_iters=3")  # past 1024 tokens blocks are chosen
TP2, TP4 = (f"parallel.tensor_model_parallel_size={size}" for size in (2, 4))
SP = "parallel.sequence_parallel=true"
FULL = ("parallel.recompute_granularity=full", "parallel.recompute_method=uniform", "parallel.recompute_num_layers=1")
LATENT = (
    "model.multi_latent_attention=true",
    "model.num_attention_heads=2",
    "model.num_query_groups=",
    "model.kv_channels=",
    "model.qk_head_dim=128",
    "model.qk_pos_emb_head_dim=64",
    "model.v_head_dim=128",
    "model.q_lora_rank=32",
    "model.kv_lora_rank=32",
    "nsa.gate=query",
    "nsa.separate_kv=false",
    "model.init_method_std=0.1",
)
PACKED = ("data.reset_attention_mask=true", "data.reset_position_ids=true")
TOLERANCE = 5e-5
KEYS = ("iteration", "loss", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def alone(run_job):
    return run_job(*NSA)


@pytest.fixture(scope="module")
def saved(run_job, tmp_path_factory):
    """An NSA run on two tensor-parallel ranks that saved after each iteration, and its folder of checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run = run_job(*NSA, "nsa.compression=mlp", TP2, SP, f"checkpoint.save={folder}", "checkpoint.save_interval=1", ranks=2)
    return run, folder


@pytest.mark.parametrize(
    "layout",
    [("parallel.pipeline_model_parallel_size=2",), ("parallel.use_distributed_optimizer=true",), (TP2, SP, *FULL)],
    ids=["pp", "dp-distributed", "tp-sp-recompute"],
)
def test_layouts_beside_tensor_parallel_train_the_same_model(alone, run_job, layout):
    run = run_job(*NSA, *layout, ranks=2)
    assert run.values("loss") == pytest.approx(alone.values("loss"), abs=TOLERANCE)
    assert run.values("grad_norm") == pytest.approx(alone.values("grad_norm"), rel=1e-3)


def test_full_recompute_changes_no_bit(alone, run_job):
    run = run_job(*NSA, *FULL)
    assert [[row[key] for key in KEYS] for row in run.rows] == [[row[key] for key in KEYS] for row in alone.rows]


@pytest.mark.parametrize(
    "model",
    [LATENT, PACKED, ("nsa.compression=mlp", "model.v_head_dim=16", "model.qk_layernorm=true")],
    ids=["latent-192-128", "packed", "mlp-norm-values"],
)
def test_other_models_train_the_same_on_two_ranks(run_job, model):
    one = run_job(*NSA, *model)
    two = run_job(*NSA, *model, TP2, SP, ranks=2)
    assert two.values("loss") == pytest.approx(one.values("loss"), abs=TOLERANCE)
    assert two.values("grad_norm") == pytest.approx(one.values("grad_norm"), rel=1e-3)


def test_nsa_is_not_dense_attention(alone, run_job):
    dense = run_job(*NSA, "nsa.enabled=false")
    some = run_job(*NSA, "nsa.layers=1::2")
    first = [run.rows[0]["loss"] for run in (alone, dense, some)]
    assert min(abs(a - b) for i, a in enumerate(first) for b in first[:i]) > 10 * TOLERANCE
    assert "NSA in 1 of 2 layers" in some.stdout


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(run_job, saved):
    whole, folder = saved
    resumed = run_job(*NSA, "nsa.compression=mlp", TP2, SP, f"checkpoint.load={folder / 'iter_0000001'}", ranks=2)
    assert [[row[key] for key in KEYS] for row in resumed.rows] == [[row[key] for key in KEYS] for row in whole.rows[1:]]


@pytest.mark.parametrize("ranks", [0, pytest.param(4, marks=pytest.mark.skipif(not NEW, reason="needs megatron-core 0.16"))])
def test_a_checkpoint_of_two_ranks_goes_on_with_other_numbers(run_job, saved, ranks):
    whole, folder = saved
    layout = (TP4,) if ranks else ()
    load = f"checkpoint.load={folder / 'iter_0000001'}"
    run = run_job(*NSA, "nsa.compression=mlp", *layout, load, ranks=ranks)
    assert run.values("loss") == pytest.approx(whole.values("loss")[1:], abs=TOLERANCE)


@pytest.mark.skipif(not NEW, reason="megatron-core below 0.16 splits no KV group over ranks")
def test_a_checkpoint_of_split_groups_loads_whole(run_job, tmp_path):
    split = run_job(*NSA, TP4, f"checkpoint.save={tmp_path / 'ckpt'}", "checkpoint.save_interval=1", ranks=4)
    run = run_job(*NSA, f"checkpoint.load={tmp_path / 'ckpt' / 'iter_0000001'}")
    assert run.values("loss") == pytest.approx(split.values("loss")[1:], abs=TOLERANCE)


def test_a_dense_checkpoint_is_refused_by_name(run_job, saved):
    _, folder = saved
    run = run_job(*NSA, "nsa.enabled=false", f"checkpoint.load={folder}", ok=False)
    assert run.code == 2
    assert "is of another model" in run.stderr and len(run.stderr.splitlines()) == 1


def test_tensorboard_shows_every_nsa_layer(run_job, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_job(*NSA, "training.train_iters=2", "logging.tensorboard=true", TP2, ranks=2, folder=tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()["scalars"]
    for layer in range(2):
        gates = [events.Scalars(f"layer_{layer}/gate_{branch}")[-1].value for branch in ("compress", "select", "window")]
        assert all(0.2 < gate < 0.8 for gate in gates)
        shares = [events.Scalars(f"layer_{layer}/{kind}_share")[-1].value for kind in ("forced", "scored")]
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert 64 <= events.Scalars(f"layer_{layer}/scored_distance")[-1].value <= 1088
    assert {"loss", "grad_norm", "learning_rate"} <= set(tags)
