"""`mindspeed-nsa doctor`: what this machine has, whether a job can run on it, and what to do where it cannot."""

import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from . import autoload
from .heads import HeadSplit, split_heads
from .launch import hosts
from .memory import mask_bytes
from .ops import backends, schemas
from .ops.contract import SELECT_DIMS
from .pretrain.job import Job

OK, NOTE, FAULT = "ok", "note", "FAULT"

# What the ascend backend takes, beside SELECT_DIMS (contract, sections 2 to 4).
_SIZES = {"compress_block_size": 32, "compress_stride": 16, "select_block_size": 64, "select_block_count": 16}
_MOST_GROUP = 32
_MOST_HEADS = 128
_MOST_TOKENS = 128 * 1024
_MOST_PACKED_TOKENS = 1 << 20
_MOST_SAMPLES = 1024


class Row(NamedTuple):
    """One finding.

    Attributes:
        topic: `machine`, `operators`, `probe`, `job` or `verdict`.
        subject: what was looked at.
        status: `ok`; `note`: costs something, or would matter elsewhere; `FAULT`: stops the job.
        finding: what was seen.
        advice: what to do about it, if anything.
    """

    topic: str
    subject: str
    status: str
    finding: str
    advice: str = ""


def examine(config: Path | None = None, overrides: Iterable[str] = (), trainer: str = "builtin") -> list[Row]:
    """Look at the machine, and at a job on it.

    Args:
        config: a job file. None judges the machine: one that has a torch_npu is meant to use a chip.
        overrides: `section.key=value` each, in place of the file's.
        trainer: what is to run the job: `builtin`, this project's, or `mindspeed`, Megatron-LM under MindSpeed.

    Returns:
        The findings. The last is the verdict, a `FAULT` if there is any other.

    Raises:
        ValueError: the job file is wrong; one line that names it.
    """
    job = None if config is None else Job.read(config, overrides)
    npu = _torch_npu()
    devices = _devices() if npu == "loaded" else []
    if job is None:
        needed, used = npu in ("broken", "loaded"), bool(devices)
    else:
        needed = trainer == "mindspeed" or (job.nsa.enabled and job.nsa.backend == "ascend")
        used = job.nsa.enabled and job.nsa.backend in ("auto", "ascend") and bool(devices)
    severity = FAULT if needed or used else NOTE
    rows = _machine(npu, devices, severity)
    if npu == "loaded":
        rows += _operators(severity)
    if used:
        rows += _probe(job)
    if job is not None:
        rows += _job(job, trainer, bool(devices), severity)
    return [*rows, _verdict(rows, job, bool(devices))]


# ---- the machine


def _torch_npu() -> str:
    """What became of torch_npu: `absent`, `off` (installed and not asked for), `broken` or `loaded`."""
    if "torch_npu" in autoload.failures:
        return "broken"
    if "torch_npu" in sys.modules:
        return "loaded"
    return "off" if importlib.util.find_spec("torch_npu") else "absent"


def _devices() -> list[str]:
    """The names of the chips that this process sees."""
    from torch_npu import npu

    return [npu.get_device_name(i) for i in range(npu.device_count())]


def _machine(npu: str, devices: list[str], severity: str) -> list[Row]:
    rows = [Row("machine", "torch", OK, torch.__version__), _cpu_kernels()]
    if npu == "absent":
        advice = "install the torch_npu of this torch's release, and CANN" if severity == FAULT else ""
        return [*rows, Row("machine", "torch_npu", severity, "not installed", advice)]
    if npu == "off":
        advice = f"unset {autoload.VARIABLE} to use the chip"
        return [*rows, Row("machine", "torch_npu", severity, f"installed, not loaded: {autoload.VARIABLE} is off", advice)]
    if npu == "broken":
        advice = (
            "on an Ascend host source the set_env.sh of CANN and the driver first; to stay on the CPU "
            f"export {autoload.VARIABLE}=0, which torchrun needs because it imports torch before this project"
        )
        reason = autoload.failures["torch_npu"]
        return [*rows, Row("machine", "torch_npu", severity, f"installed, does not load: {reason}", advice)]
    rows += [_release(), _cann()]
    if not devices:
        advice = "see that the driver runs, ASCEND_RT_VISIBLE_DEVICES hides none, and /dev/davinci* is in the container"
        return [*rows, Row("machine", "devices", severity, "none", advice)]
    kinds = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))
    return [*rows, Row("machine", "devices", OK, kinds)]


def _cpu_kernels() -> Row:
    try:
        native = importlib.import_module("mindspeed_nsa.ops.cpu.native")
    except ImportError as error:
        advice = "install a C++ compiler, g++ or clang++, then the project again; until then the CPU runs the reference, slowly"
        return Row("machine", "CPU kernels", NOTE, str(error), advice)
    except ValueError as error:
        return Row("machine", "CPU kernels", FAULT, str(error), "unset NSA_CPU_ISA")
    forced = ", because NSA_CPU_ISA says so" if "NSA_CPU_ISA" in os.environ else ""
    return Row("machine", "CPU kernels", OK, f"{native.isa()}{forced}, of {', '.join(native.isas())} here")


def _release() -> Row:
    import torch_npu

    theirs, ours = (re.match(r"[\d.]*\d", version) for version in (torch_npu.__version__, torch.__version__))
    assert theirs and ours
    if theirs[0] == ours[0]:
        return Row("machine", "torch_npu", OK, torch_npu.__version__)
    return Row("machine", "torch_npu", NOTE, f"{torch_npu.__version__}, made for torch {theirs[0]}", "install a matching pair")


def _cann() -> Row:
    import torch_npu

    if "EMULATED_CANN" in os.environ:
        return Row("machine", "CANN", NOTE, "emulated: nothing here was run on a chip")
    version = torch_npu._C._get_cann_version("CANN")
    return Row("machine", "CANN", OK, version) if version else Row("machine", "CANN", NOTE, "of unknown version")


# ---- the operators


def _operators(severity: str) -> list[Row]:
    rows = []
    for name in schemas.SCHEMAS:
        schema = schemas.installed(name)
        found = ["this torch_npu does not have it"] if schema is None else schemas.differences(name, schema)
        if found:
            advice = f"the project is written for torch_npu {schemas.RELEASE}: install it or one nearer to it"
            rows.append(Row("operators", name, severity, "; ".join(found), advice))
        else:
            rows.append(Row("operators", name, OK, f"schema as in torch_npu {schemas.RELEASE}"))
    return rows


def _probe(job: Job | None) -> list[Row]:
    from .ops.ascend.probe import PLANS, probe

    report = probe(torch.device("npu", 0), 1 if job is None else _group(_heads(job)))
    asked = os.environ.get("NSA_ASCEND_PLAN")
    plan = report.plan if asked is None else PLANS.get(asked)
    rows = []
    for check in report.checks:
        status = OK if check.passed else NOTE if plan else FAULT
        measured = "" if check.error is None else f" (error {check.error:.1e}, allowed {check.limit:.1e})"
        rows.append(Row("probe", check.operator, status, check.finding + measured))
    found = f"plan {report.plan.name}: {report.reason}" if report.plan else f"no plan holds: {report.reason}"
    if asked is not None:
        status, advice = NOTE if plan else FAULT, f"unset NSA_ASCEND_PLAN to follow the probe, or set {' or '.join(PLANS)}"
        rows.append(Row("probe", "plan", status, f"NSA_ASCEND_PLAN is {asked}; probed: {found}", advice))
    elif plan is None:
        advice = "try another CANN; `nsa.backend: reference` does without these operators, slowly"
        rows.append(Row("probe", "plan", FAULT, found, advice))
    else:
        rows.append(Row("probe", "plan", OK, found))
    if job is not None and job.nsa.select_own_block is True and plan is not None and plan.name == "B":
        found = "true, which plan B cannot do"
        rows.append(Row("job", "select_own_block", FAULT, found, "nsa.select_own_block: auto"))
    return rows


# ---- the job


def _job(job: Job, trainer: str, has_npu: bool, severity: str) -> list[Row]:
    rows = [_launch(job, trainer), _data(job)]
    if not job.nsa.enabled:
        return [*rows, Row("job", "nsa", NOTE, "off: attention is dense, and no operator of this project runs")]
    rows.append(_backend(job, has_npu))
    rows += [_type(job, severity), _dims(job, severity), _query_groups(job, severity), *_sizes(job, severity)]
    return [*rows, _tokens(job, severity), *_ragged(job), _masks(job)]


def _launch(job: Job, trainer: str) -> Row:
    parallel = job.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if job.model.num_experts is not None:
        expert_tensor = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
        experts = parallel.pipeline_model_parallel_size * parallel.expert_model_parallel_size * expert_tensor
        ranks = math.lcm(ranks, experts)
    try:
        if trainer == "mindspeed":
            hosts.mindspeed()
            job.check_layout(ranks, hosts.megatron_version())
        else:
            job.check_trainer()
            job.check_layout(ranks)
    except ValueError as error:
        return Row("job", "launch", FAULT, str(error))
    return Row("job", "launch", OK, "any number of ranks" if ranks == 1 else f"{ranks} ranks, or a multiple of that")


def _data(job: Job) -> Row:
    try:
        job.data.check_files()
    except ValueError as error:
        return Row("job", "data", FAULT, str(error))
    return Row("job", "data", OK, job.data.data_path)


def _backend(job: Job, has_npu: bool) -> Row:
    name = job.nsa.backend
    if name in ("auto", "ascend"):
        return Row("job", "backend", OK, name)
    try:
        backends.load(name, "cpu")
    except ValueError as error:
        return Row("job", "backend", FAULT, str(error), "choose one of these")
    if not has_npu:
        return Row("job", "backend", OK, name)
    if name == "cpu":
        return Row("job", "backend", FAULT, "cpu, and the job would be on an NPU", "choose auto")
    return Row("job", "backend", NOTE, f"{name}, though there is an NPU", "choose auto, which is faster")


def _type(job: Job, severity: str) -> Row:
    if job.training.bf16:
        return Row("job", "type", OK, "bfloat16")
    return Row("job", "type", severity, "float32, which the Ascend operators do not take", "training.bf16: true")


def _dims(job: Job, severity: str) -> Row:
    key, value = job.model.head_width, job.model.value_width
    found, most = f"{key} (query, key) and {value} (value)", f"{SELECT_DIMS[0]} and {SELECT_DIMS[1]}"
    if key > SELECT_DIMS[0] or value > SELECT_DIMS[1]:
        return Row(
            "job", "head dims", FAULT if job.nsa.strict else severity, f"{found}: the Ascend operators take up to {most}"
        )
    if (key, value) == SELECT_DIMS:
        return Row("job", "head dims", OK, found)
    waste = sum(SELECT_DIMS) / (key + value)
    return Row("job", "head dims", NOTE, f"{found}: widened with zeros to {most} on the chip, {waste:.1f} times the work")


def _heads(job: Job) -> HeadSplit:
    """The heads of a rank."""
    size = job.parallel.tensor_model_parallel_size
    return split_heads(job.model.num_attention_heads, job.model.query_groups, size, 0)


def _group(heads: HeadSplit) -> int:
    return heads.head_num // heads.kv_head_num


def _query_groups(job: Job, severity: str) -> Row:
    heads = _heads(job)
    group = _group(heads)
    found = f"{heads.head_num} query heads on {heads.kv_head_num} key/value heads a rank, {group} to each"
    allowed = f"the Ascend operators take up to {_MOST_HEADS}, and 1, 2, 4, 8, 16 or {_MOST_GROUP} to each"
    advice = "change num_attention_heads, num_query_groups or tensor_model_parallel_size"
    if job.nsa.strict and (group > _MOST_GROUP or 128 % group):
        return Row("job", "heads", FAULT, f"{found}: {allowed}", f"{advice}; `nsa.strict: false` runs it on other backends")
    if heads.head_num > _MOST_HEADS:
        return Row("job", "heads", severity, f"{found}: {allowed}", advice)
    if group > _MOST_GROUP:
        return Row("job", "heads", NOTE, f"{found}: on the chip their heads are split, and keys repeated; {allowed}", advice)
    if 128 % group:
        return Row("job", "heads", NOTE, f"{found}: on the chip blocks are chosen in PyTorch, slower; {allowed}", advice)
    if group > 16:
        return Row("job", "heads", NOTE, f"{found}: the select operator's gradient is its slower one above 16")
    return Row("job", "heads", OK, found)


def _sizes(job: Job, severity: str) -> list[Row]:
    rows = [
        Row("job", name, severity, f"{getattr(job.nsa, name)}: the Ascend operators take {size}", f"nsa.{name}: {size}")
        for name, size in _SIZES.items()
        if getattr(job.nsa, name) != size
    ]
    if job.nsa.importance != "ascend":
        found = f"{job.nsa.importance}: on the chip blocks are chosen in PyTorch, slower"
        rows.append(Row("job", "importance", NOTE, found, "nsa.importance: ascend"))
    return rows


def _tokens(job: Job, severity: str) -> Row:
    length, batch = job.model.seq_length, job.training.micro_batch_size
    found = f"{batch} x {length:,} tokens a micro-batch"
    if length > _MOST_TOKENS:
        advice = f"model.seq_length: {_MOST_TOKENS} or less"
        return Row("job", "tokens", severity, f"{found}: the Ascend operators take samples of up to {_MOST_TOKENS:,}", advice)
    if batch > _MOST_SAMPLES or batch * length > _MOST_PACKED_TOKENS:
        limit = f"{_MOST_SAMPLES:,} samples and {_MOST_PACKED_TOKENS:,} tokens in all"
        return Row("job", "tokens", severity, f"{found}: the Ascend operators take {limit}", "a smaller micro_batch_size")
    return Row("job", "tokens", OK, found)


def _ragged(job: Job) -> list[Row]:
    length, least, block = (
        job.model.seq_length,
        job.nsa.select_block_size * job.nsa.select_block_count,
        job.nsa.select_block_size,
    )
    if job.data.reset_attention_mask:
        found = f"documents of any length: on the chip one below {least:,} tokens attends densely, others are padded to blocks"
    elif length < least:
        found = f"all {length:,} tokens are seen: below {least:,} a query has no choice of blocks, and the chip attends densely"
    elif length % block:
        found = f"{length:,} is no multiple of {block}: padded on the chip"
    else:
        return []
    return [Row("job", "samples", NOTE, found)]


def _masks(job: Job) -> Row:
    size = mask_bytes(job.nsa, job.model.seq_length)
    return Row("job", "masks", OK, f"{size / 2**20:,.1f} MiB on the chip a rank, one set for all layers")


# ---- the end


def _verdict(rows: list[Row], job: Job | None, has_npu: bool) -> Row:
    subject = "this machine" if job is None else "this job"
    many = ("operators", "probe")
    faults = list(dict.fromkeys(row.topic if row.topic in many else row.subject for row in rows if row.status == FAULT))
    if faults:
        return Row("verdict", subject, FAULT, f"cannot run as it is; see {', '.join(faults)}")
    emulated = ", emulated" if "EMULATED_CANN" in os.environ else ""
    place = f"NPU{emulated}" if has_npu else "GPU" if torch.cuda.is_available() else "CPU"
    return Row("verdict", subject, OK, f"runs on the {place}")


def draw(rows: list[Row]) -> None:
    """Print findings as a table: with colours on a terminal, else as plain text of 120 columns."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    styles = {OK: "green", NOTE: "yellow", FAULT: "bold red"}
    table = Table("", "", "", Column(overflow="fold"), box=None, show_header=False, padding=(0, 2, 0, 0))
    topic = ""
    for row in rows:
        if topic and row.topic != topic:
            table.add_row()
        finding = f"{row.finding}\n> {row.advice}" if row.advice else row.finding
        first = "" if row.topic == topic else row.topic
        table.add_row(Text(first), Text(row.subject), Text(row.status, styles[row.status]), Text(finding))
        topic = row.topic
    Console(width=None if sys.stdout.isatty() else 120).print(table)
