"""The job files that the project ships: each can be read, trained or launched as it says, and fits where it says."""

import os
import re

import pytest
from shipped import CLUSTER, CONFIGS, DIES, LAYOUTS, ROOT, layouts

from mindspeed_nsa.doctor import FAULT, examine
from mindspeed_nsa.launch import hosts
from mindspeed_nsa.launch.flags import megatron_arguments
from mindspeed_nsa.memory import GB, estimate, parameter_count
from mindspeed_nsa.pretrain.job import Job

MOST, MEGATRON = 64 * GB, (0, 12)
HOSTS = bool(os.environ.get("MEGATRON_LM_PATH") and os.environ.get("MINDSPEED_PATH"))
needs_hosts = pytest.mark.skipif(not HOSTS, reason="needs MEGATRON_LM_PATH and MINDSPEED_PATH")


def vocabulary(path):
    return int(re.search(r"vocabulary of (\d+)", path.read_text())[1])


def test_the_files_and_their_layouts_are_found():
    assert {path.stem for path in CLUSTER} == {"nsa_27b", "gqa_8b", "mla_16b"}
    for path in CLUSTER:
        found = {(nodes, length) for nodes, length, *_ in layouts(path)}
        assert {(nodes, length) for nodes in (1, 8, 64) for length in (8, 32)} <= found
        assert max(length for _, length in found) == (64 if path.stem == "nsa_27b" else 128)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_is_translated(path):
    job = Job.read(path)
    assert megatron_arguments(job, path, [])[:2] == ["--num-layers", str(job.model.num_layers)]


@pytest.mark.parametrize(("path", "nodes", "length", "overrides", "size"), LAYOUTS, ids=lambda x: getattr(x, "stem", str(x)))
def test_a_layout_fits(path, nodes, length, overrides, size):
    job = Job.read(path, overrides)
    job.check_layout(nodes * DIES, MEGATRON)
    assert job.model.seq_length == length * 1024
    found = estimate(job, nodes * DIES, vocabulary(path)).total
    assert found < MOST
    assert f"{found / GB:.1f}" == f"{size:.1f}"


def test_what_does_not_fit_is_as_the_file_says():
    path = ROOT / "configs" / "nsa_27b.yaml"
    longest = ["model.seq_length=131072", "training.global_batch_size=128", "parallel.pipeline_model_parallel_size=2"]
    found = estimate(Job.read(path, longest), 64 * DIES, vocabulary(path))
    comment = path.read_text().replace("\n# ", " ")
    said = re.search(r"128k does not fit .*? ([\d.]+) GB on 64 nodes, of which ([\d.]+) GB", comment)
    assert said is not None
    assert (f"{found.total / GB:.1f}", f"{found.logits / GB:.1f}") == said.groups()
    assert found.total > MOST


def test_the_parameters_of_the_paper_s_model_are_as_its_file_says():
    path = ROOT / "configs" / "nsa_27b.yaml"
    said = re.search(r"Parameters: ([\d.]+)B. A token uses ([\d.]+)B", path.read_text())
    assert said is not None
    used = ["model.num_experts=6", "parallel.expert_model_parallel_size=2"]  # as many as each token takes
    found = [parameter_count(Job.read(path, more), vocabulary(path)) for more in ([], used)]
    assert [f"{count / 1e9:.2f}" for count in found] == list(said.groups())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_doctor_has_nothing_against_a_file(path, tmp_path, monkeypatch):
    """But that this machine has no NPU, where the job is for some."""
    for name in ("text.bin", "text.idx", "tokenizer.json"):
        (tmp_path / name).touch()
    text = str(tmp_path / "text")
    overrides = [f"data.data_path={text}", f"data.tokenizer_model={tmp_path / 'tokenizer.json'}"]
    if Job.read(path).data.valid_data_path:
        overrides.append(f"data.valid_data_path={text}")
    trainer = "mindspeed" if path in CLUSTER else "builtin"
    monkeypatch.setattr(hosts, "megatron_version", lambda: MEGATRON)
    monkeypatch.setattr(hosts, "mindspeed", lambda: tmp_path)
    rows = examine(path, overrides, trainer)
    faults = {row.subject: row.finding for row in rows if row.status == FAULT and row.topic == "job"}
    assert faults == {}


@needs_hosts
@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)
def test_the_hosts_have_the_arguments(path):
    hosts.check_options(Job.read(path).megatron)
