import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from mindspeed_nsa import autoload, doctor
from mindspeed_nsa.cli import main
from mindspeed_nsa.doctor import FAULT, NOTE, OK
from mindspeed_nsa.launch import hosts
from mindspeed_nsa.ops import schemas
from mindspeed_nsa.pretrain import job as job_module

CHIP_JOB = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 2, "seq_length": 4096}
    | {"kv_channels": 192, "v_head_dim": 128},
    "nsa": {},
    "parallel": {"tensor_model_parallel_size": 2},
    "training": {"train_iters": 1, "global_batch_size": 8, "lr": 1e-3, "bf16": True},
}
FIND, KERNELS = doctor._torch_npu, doctor._cpu_kernels


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without accelerator, and with CPU kernels and a Megatron-core."""
    monkeypatch.setattr(doctor, "_torch_npu", lambda: "absent")
    monkeypatch.setattr(doctor, "_cpu_kernels", lambda: doctor.Row("machine", "CPU kernels", OK, "generic"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(job_module, "megatron_version", lambda: (0, 16))
    monkeypatch.delenv("NSA_ASCEND_PLAN", raising=False)


@pytest.fixture
def job(tmp_path):
    """Write a job file that suits the chip, but for what is given: `job("nsa.backend", "ascend", ...)`."""

    def write(*changes):
        for suffix in (".bin", ".idx"):
            (tmp_path / f"text{suffix}").touch()
        content = {name: dict(section) for name, section in CHIP_JOB.items()} | {"data": {"data_path": str(tmp_path / "text")}}
        for name, value in zip(changes[::2], changes[1::2], strict=True):
            section, key = name.split(".")
            content[section][key] = value
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "job.yaml"

    return write


@pytest.fixture
def npu(monkeypatch):
    """A machine with NPUs, whose probe finds what is given: `npu(plan, *checks)`."""

    def pretend(plan, *checks):
        plans = {name: SimpleNamespace(name=name) for name in "AB"}
        report = SimpleNamespace(checks=checks, plan=plans.get(plan), reason="for a reason")
        asked = []
        probing = SimpleNamespace(PLANS=plans, probe=lambda device, group: asked.append((device, group)) or report)
        for name, module in (("ascend", SimpleNamespace(probe=probing)), ("ascend.probe", probing)):
            monkeypatch.setitem(sys.modules, f"mindspeed_nsa.ops.{name}", module)
        core = SimpleNamespace(_get_cann_version=lambda module: "8.5.0")
        of_npu = SimpleNamespace(device_count=lambda: 2, get_device_name=lambda i: "Ascend910")
        monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(__version__="2.6.0.post1", _C=core, npu=of_npu))
        of_torch = SimpleNamespace(__version__="2.13.0+cpu", device=lambda kind, index: f"{kind}:{index}")
        monkeypatch.setattr(doctor, "torch", of_torch)
        monkeypatch.setattr(doctor, "_torch_npu", lambda: "loaded")
        monkeypatch.setattr(schemas, "installed", schemas.SCHEMAS.get)
        monkeypatch.delenv("EMULATED_CANN", raising=False)
        return asked

    return pretend


def check(operator, passed, error=None, limit=None):
    return SimpleNamespace(operator=operator, passed=passed, error=error, limit=limit, finding="seen")


def statuses(rows):
    return {row.subject: row.status for row in rows}


def row_of(rows, subject):
    (row,) = (row for row in rows if row.subject == subject)
    return row


def test_a_machine_without_torch_npu_is_sound(capsys):
    rows = doctor.examine()
    assert statuses(rows) == {"torch": OK, "CPU kernels": OK, "torch_npu": NOTE, "this machine": OK}
    assert rows[-1].finding == "runs on the CPU"
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "not installed" in out and "\x1b" not in out


def test_the_native_kernels_are_named_or_missed(monkeypatch):
    monkeypatch.delenv("NSA_CPU_ISA", raising=False)
    native = SimpleNamespace(isa=lambda: "avx2", isas=lambda: ["generic", "avx2"])
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: native)
    assert KERNELS()[2:4] == (OK, "avx2, of generic, avx2 here")

    def refuse(error):
        def load(name):
            raise error

        monkeypatch.setattr(doctor.importlib, "import_module", load)
        return KERNELS()

    row = refuse(ImportError("there was no C++ compiler"))
    assert (row.status, row.finding) == (NOTE, "there was no C++ compiler")
    assert "g++" in row.advice
    row = refuse(ValueError("NSA_CPU_ISA is 'amx'; this processor allows: generic"))
    assert (row.status, row.advice) == (FAULT, "unset NSA_CPU_ISA")


def test_a_torch_npu_that_does_not_load_is_a_fault_unless_a_job_does_without(monkeypatch, job):
    monkeypatch.setattr(doctor, "_torch_npu", FIND)
    monkeypatch.setitem(autoload.failures, "torch_npu", "libhccl.so is missing")
    found = row_of(doctor.examine(), "torch_npu")
    assert (found.status, found.finding) == (FAULT, "installed, does not load: libhccl.so is missing")
    assert "set_env.sh" in found.advice and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in found.advice
    rows = doctor.examine(job())
    assert (row_of(rows, "torch_npu").status, rows[-1].finding) == (NOTE, "runs on the CPU")
    rows = doctor.examine(job("nsa.backend", "ascend"))
    assert (rows[-1].status, rows[-1].finding) == (FAULT, "cannot run as it is; see torch_npu")


def test_a_job_for_the_chip_on_a_machine_without_one(job):
    rows = doctor.examine(job("nsa.backend", "ascend"))
    assert [row.subject for row in rows if row.status == FAULT] == ["torch_npu", "this job"]
    rows = doctor.examine(job("nsa.backend", "ascend", "nsa.enabled", False))
    assert (row_of(rows, "nsa").status, rows[-1].status) == (NOTE, OK)


def test_a_machine_with_npus(npu, job):
    asked = npu("A", check("npu_nsa_compress", True, 0.001, 0.02))
    rows = doctor.examine()
    assert {row.status for row in rows if row.subject != "torch_npu"} == {OK}
    assert row_of(rows, "torch_npu") == (
        "machine",
        "torch_npu",
        NOTE,
        "2.6.0.post1, made for torch 2.6.0",
        "install a matching pair",
    )
    assert (row_of(rows, "CANN").finding, row_of(rows, "devices").finding) == ("8.5.0", "2 x Ascend910")
    assert [row.finding for row in rows if row.topic == "probe"] == [
        "seen (error 1.0e-03, allowed 2.0e-02)",
        "plan A: for a reason",
    ]
    assert rows[-1].finding == "runs on the NPU"
    assert doctor.examine(job())[-1].finding == "runs on the NPU"
    assert asked == [("npu:0", 1), ("npu:0", 4)]
    rows = doctor.examine(job("nsa.backend", "reference"))
    assert (row_of(rows, "backend").status, rows[-1].status, len(asked)) == (NOTE, OK, 2)


def test_a_failed_check_matters_where_no_plan_is_left(npu, monkeypatch, job):
    npu("B", check("select", False))
    assert {row.subject: row.status for row in doctor.examine() if row.topic == "probe"} == {"select": NOTE, "plan": OK}
    assert row_of(doctor.examine(job("nsa.select_own_block", True)), "select_own_block").status == FAULT
    npu(None, check("select", False))
    rows = doctor.examine(job())
    assert {row.subject: row.status for row in rows if row.topic == "probe"} == {"select": FAULT, "plan": FAULT}
    assert rows[-1].finding == "cannot run as it is; see probe"
    for plan, status in (("A", NOTE), ("C", FAULT)):
        monkeypatch.setenv("NSA_ASCEND_PLAN", plan)
        assert row_of(doctor.examine(), "plan").status == status


def test_operators_that_changed_or_are_gone_are_named(npu, monkeypatch):
    npu("A")
    changed = {**schemas.SCHEMAS, "npu_nsa_compress_grad": None}
    changed["npu_nsa_compress"] = changed["npu_nsa_compress"].replace("Tensor weight, ", "")
    monkeypatch.setattr(schemas, "installed", changed.get)
    rows = doctor.examine()
    assert {row.subject: row.finding for row in rows if row.topic == "operators" and row.status == FAULT} == {
        "npu_nsa_compress": "weight is gone",
        "npu_nsa_compress_grad": "this torch_npu does not have it",
    }
    assert rows[-1].finding == "cannot run as it is; see operators"


@pytest.mark.parametrize(
    ("changes", "subject", "status", "finding"),
    [
        ((), "launch", OK, "2 ranks, or a multiple of that"),
        (("training.micro_batch_size", 3), "launch", FAULT, "training.global_batch_size: 8 is not a multiple of"),
        ((), "backend", OK, "auto"),
        (("nsa.backend", "cpu"), "backend", FAULT, "cpu, and the job would be on an NPU"),
        ((), "type", OK, "bfloat16"),
        (("training.bf16", False), "type", FAULT, "float32"),
        ((), "head dims", OK, "192 (query, key) and 128 (value)"),
        (("model.kv_channels", 48, "model.v_head_dim", 32), "head dims", NOTE, "4.0 times the work"),
        (("model.kv_channels", 208), "head dims", FAULT, "up to 192 and 128"),
        ((), "heads", OK, "4 query heads on 1 key/value heads a rank, 4 to each"),
        (("model.num_attention_heads", 12), "heads", FAULT, "6 to each: the Ascend operators take up to 128, and 1, 2, 4"),
        (("model.num_attention_heads", 12, "nsa.strict", False), "heads", NOTE, "chosen in PyTorch, slower"),
        (("model.num_attention_heads", 64), "heads", NOTE, "its slower one above 16"),
        (("model.num_attention_heads", 512, "model.num_query_groups", 128), "heads", FAULT, "256 query heads on 64"),
        (("nsa.select_block_count", 8, "nsa.strict", False), "select_block_count", FAULT, "8: the Ascend operators take 16"),
        (("nsa.importance", "paper", "nsa.strict", False), "importance", NOTE, "paper: on the chip blocks are chosen in"),
        (("model.seq_length", 131136), "tokens", FAULT, "samples of up to 131,072"),
        (("model.seq_length", 131072), "tokens", OK, "1 x 131,072 tokens a micro-batch"),
        (("training.micro_batch_size", 512, "training.global_batch_size", 512), "tokens", FAULT, "1,048,576 tokens in all"),
        (("model.seq_length", 4100), "samples", NOTE, "4,100 is no multiple of 64"),
        (("model.seq_length", 512), "samples", NOTE, "attends densely"),
        (("data.reset_attention_mask", True, "data.reset_position_ids", True), "samples", NOTE, "documents of any length"),
        # 4096 queries, 255 windows and 64 blocks
        ((), "masks", OK, f"{4096 * (255 + 64) / 2**20:.1f} MiB"),
    ],
)  # fmt: skip
def test_what_a_job_meets_on_the_chip(npu, monkeypatch, job, changes, subject, status, finding):
    npu("A")
    monkeypatch.setattr(doctor.backends, "load", lambda name, device_type: None)
    rows = doctor.examine(job(*changes))
    assert row_of(rows, subject).status == status
    assert finding in row_of(rows, subject).finding
    assert (rows[-1].status == FAULT) == (status == FAULT)


def test_limits_of_the_chip_alone_do_not_stop_a_job_on_the_cpu(job):
    rows = doctor.examine(job("training.bf16", False, "model.seq_length", 131136))
    assert {"type": NOTE, "tokens": NOTE, "this job": OK}.items() <= statuses(rows).items()
    # Without a chip too, the attention refuses these.
    assert statuses(doctor.examine(job("model.kv_channels", 256)))["head dims"] == FAULT


def test_data_that_is_not_there_stops_the_job_and_nothing_else(job):
    rows = doctor.examine(job("data.valid_data_path", "nowhere"))
    assert row_of(rows, "data").finding.startswith("data.valid_data_path: nowhere.bin: no such file")
    assert [row.subject for row in rows if row.status == FAULT] == ["data", "this job"]


def test_overrides_take_the_place_of_the_file(job):
    assert statuses(doctor.examine(job(), ["data.data_path=nowhere"]))["data"] == FAULT
    assert (
        statuses(doctor.examine(job("data.data_path", "nowhere"), [f"data.data_path={job().with_name('text')}"]))["data"] == OK
    )


def test_experts_need_ranks_of_a_stage(job, monkeypatch, tmp_path):
    experts = ["model.num_experts=4", "parallel.expert_model_parallel_size=4", "parallel.pipeline_model_parallel_size=2"]
    assert row_of(doctor.examine(job(), experts), "launch").finding == "16 ranks, or a multiple of that"
    monkeypatch.setattr(hosts, "mindspeed", lambda: tmp_path)
    monkeypatch.setattr(hosts, "megatron_version", lambda: (0, 12))
    rows = doctor.examine(job(), experts, "mindspeed")
    assert row_of(rows, "launch").finding == "16 ranks, or a multiple of that", "2 stages of 4 * 2"
    assert row_of(rows, "torch_npu").status == FAULT, "MindSpeed needs it"


@pytest.mark.parametrize("name", ["MEGATRON_LM_PATH", "MINDSPEED_PATH"])
def test_hosts_that_are_not_there_stop_a_mindspeed_job(job, monkeypatch, name):
    for each in ("MEGATRON_LM_PATH", "MINDSPEED_PATH"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setattr(hosts, "mindspeed" if name == "MEGATRON_LM_PATH" else "megatron_version", lambda: (0, 12))
    found = row_of(doctor.examine(job(), (), "mindspeed"), "launch")
    assert found.status == FAULT and name in found.finding


def test_a_broken_job_file_is_one_line(job, capsys, tmp_path):
    for config, message in ((job("model.num_lyers", 3), "model.num_lyers: unknown key"), (tmp_path / "absent", "no such file")):
        with pytest.raises(SystemExit) as stopped:
            main(["doctor", "--config", str(config)])
        out, err = capsys.readouterr()
        assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"mindspeed-nsa: {config}: ") and message in err
