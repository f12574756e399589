import pickle
import shutil

import pytest
import torch
from packaging.version import Version
from torch.distributed.checkpoint.planner import WriteItemType

megatron = pytest.importorskip("megatron.core")

from mindspeed_nsa.pretrain.checkpoint import _MetadataUnpickler, find  # noqa: E402

TP2 = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
DISTRIBUTED = "parallel.use_distributed_optimizer=true"
NEW = Version(megatron.__version__) >= Version("0.16")
KEYS = ("iteration", "loss", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def saved(run_job, tmp_path_factory):
    """A run on two tensor-parallel ranks that saved after iterations 2 and 4, and its folder of checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return run_job(TP2, f"checkpoint.save={folder}", "checkpoint.save_interval=2", ranks=2), folder


def second_half(run):
    return [[row[key] for key in KEYS] for row in run.rows if row["iteration"] > 2]


@pytest.mark.parametrize(
    "settings",
    [
        (TP2, SP, "model.hidden_dropout=0.1", "training.lr_warmup_iters=3"),
        (DISTRIBUTED, "training.lr_decay_style=cosine"),
        ("parallel.pipeline_model_parallel_size=2", "training.bf16=true"),
    ],
    ids=["tp-dropout", "distributed", "pp-bf16"],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(run_job, tmp_path, settings):
    save = tmp_path / "checkpoints"
    whole = run_job(*settings, f"checkpoint.save={save}", "checkpoint.save_interval=2", ranks=2)
    resumed = run_job(*settings, f"checkpoint.load={save / 'iter_0000002'}", ranks=2)
    assert [row["iteration"] for row in resumed.rows] == [3, 4]
    assert second_half(resumed) == second_half(whole)
    # A run that did not load the moments of Adam, or the data it has seen, differs.
    assert second_half(whole)[0][1] != whole.rows[0]["loss"]


def test_another_layout_goes_on_with_the_same_losses(run_job, saved):
    whole, folder = saved
    load = f"checkpoint.load={folder / 'iter_0000002'}"
    distributed = (DISTRIBUTED, 2), (DISTRIBUTED, 0)
    for layout, ranks in (
        ("nsa.enabled=false", 0),
        ("parallel.pipeline_model_parallel_size=2", 2),
        *(distributed if NEW else ()),
    ):
        resumed = run_job(load, layout, ranks=ranks)
        assert "saved on another layout or device: random states start anew" in resumed.stdout
        assert resumed.values("loss") == pytest.approx(whole.values("loss")[2:], abs=5e-5)


ONE, STAGES = (0,), (2, "parallel.pipeline_model_parallel_size=2")
INTERLEAVED = (*STAGES, "parallel.num_layers_per_virtual_pipeline_stage=1")
SPLIT_EXPERTS = (2, "parallel.expert_model_parallel_size=2")


@pytest.mark.parametrize(
    ("model", "saving", "loading"),
    [
        ("model.num_layers=4", INTERLEAVED, INTERLEAVED),
        ("model.num_layers=4", INTERLEAVED, ONE),
        ("model.num_layers=4", STAGES, INTERLEAVED),
        ("model.num_experts=4", SPLIT_EXPERTS, ONE),
        ("model.num_experts=4", ONE, SPLIT_EXPERTS),
    ],
)
def test_interleaved_stages_and_split_experts_save_and_load_what_others_do(run_job, tmp_path, model, saving, loading):
    ranks, *layout = saving
    whole = run_job(model, *layout, f"checkpoint.save={tmp_path}", "checkpoint.save_interval=2", ranks=ranks)
    ranks, *layout = loading
    resumed = run_job(model, *layout, f"checkpoint.load={tmp_path / 'iter_0000002'}", ranks=ranks)
    assert resumed.values("loss") == pytest.approx(whole.values("loss")[2:], abs=5e-5)


def test_rows_of_iterations_that_are_done_again_are_replaced(run_job, saved, tmp_path):
    whole, folder = saved
    rows = "".join(f'{{"iteration": {number}, "loss": -1.0}}\n' for number in (1, 2, 3)) + '{"iteration": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(rows)
    run = run_job(TP2, f"checkpoint.load={folder / 'iter_0000002'}", ranks=2, folder=tmp_path)
    assert run.values("iteration") == [1, 2, 3, 4]
    assert run.values("loss") == [-1.0, -1.0, *whole.values("loss")[2:]]


def test_find_takes_the_folder_or_one_checkpoint_in_it(saved, tmp_path):
    _, folder = saved
    assert find(str(folder)) == folder / "iter_0000004"
    assert find(str(folder / "iter_0000002")) == folder / "iter_0000002"
    with pytest.raises(ValueError, match=r"checkpoint\.load: .*: no checkpoint there"):
        find(str(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.hidden_size=32",), "is of another model: it has model.hidden_size 64, not 32"),
        (("model.num_attention_heads=4", "model.kv_channels=16"), "it has model.num_attention_heads 8, not 4"),
        pytest.param(
            (DISTRIBUTED,),
            "it has parallel.use_distributed_optimizer False, not True",
            marks=pytest.mark.skipif(NEW, reason="megatron-core from 0.16 stores both kinds of optimizer alike"),
        ),
        (("nsa.enabled=true",), "it has nsa.enabled False, not True"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(run_job, saved, tmp_path, overrides, message):
    _, folder = saved
    run = run_job(*overrides, f"checkpoint.load={folder}", folder=tmp_path / "run", ok=False)
    assert run.code == 2 and message in run.stderr and len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_are_named(run_job, saved, tmp_path):
    _, folder = saved
    shutil.copytree(folder / "iter_0000004", tmp_path / "iter_0000004")
    job = tmp_path / "iter_0000004" / "job.json"
    job.write_text(job.read_text().replace('"swiglu": true', '"swiglu": false'))
    run = run_job("model.swiglu=false", f"checkpoint.load={tmp_path / 'iter_0000004'}", folder=tmp_path / "run", ok=False)
    assert run.code == 2 and "is of another model: decoder.layers.0.mlp.linear_fc2.weight has shape" in run.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_another_run_is_not_saved_over(run_job, saved, tmp_path):
    _, folder = saved
    run = run_job(f"checkpoint.save={folder}", folder=tmp_path / "run", ok=False)
    assert run.code == 2 and f"checkpoint.save: {folder} holds the checkpoints of a run" in run.stderr
    assert not (tmp_path / "run").exists()


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_nothing_that_a_checkpoint_says_is_executed(run_job, saved, tmp_path, file):
    _, folder = saved
    checkpoint = shutil.copytree(folder / "iter_0000004", tmp_path / "iter_0000004")
    if file == "common.pt":
        torch.save({"iteration": Attack(tmp_path / "executed")}, checkpoint / file)
    else:
        (checkpoint / file).write_bytes(pickle.dumps(Attack(tmp_path / "executed")))
    run = run_job(f"checkpoint.load={checkpoint}", folder=tmp_path / "run", ok=False)
    assert not (tmp_path / "executed").exists()
    assert run.code == 2 and run.stderr.startswith("error: checkpoint.load: ") and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("module", ["builtins", "torch.distributed.checkpoint.filesystem"])
def test_metadata_may_name_nothing_but_records(tmp_path, module):
    name = {"builtins": "eval", "torch.distributed.checkpoint.filesystem": "FileSystemWriter"}[module]
    (tmp_path / "metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    with (tmp_path / "metadata").open("rb") as stream, pytest.raises(pickle.UnpicklingError, match=f"{module}.{name}"):
        _MetadataUnpickler(stream).load()


def taken(tmp_path, kind, name):
    """What the metadata gives that asks for an attribute, as Python 3.11.0 to 3.11.3 write the member of an enum."""
    (tmp_path / "metadata").write_bytes(f"cbuiltins\ngetattr\n(c{kind}\nV{name}\ntR.".encode())
    with (tmp_path / "metadata").open("rb") as stream:
        return _MetadataUnpickler(stream).load()


def test_metadata_of_any_python_is_read(tmp_path):
    planner = "torch.distributed.checkpoint.planner\n"
    assert taken(tmp_path, planner + "WriteItemType", "SHARD") is WriteItemType.SHARD
    for kind, name in [(planner + "WriteItemType", "__class__"), (planner + "SavePlan", "__init__"), ("torch\nSize", "numel")]:
        with pytest.raises(pickle.UnpicklingError, match=f"refused to take '{name}'"):
            taken(tmp_path, kind, name)
