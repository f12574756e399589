# shellcheck shell=bash
# Sourced by the scripts beside it: a Python environment of their own, with the project and its tools in it.
#
#   PYTHON     the interpreter to make it with; python3 if unset
#   NSA_TORCH  what to ask pip for where torch is missing; torch==2.13.0 if unset. Several words are several arguments.

# The ranks of a job are processes of one machine here: they talk over the loopback, and share its cores.
if [[ -e /sys/class/net/lo ]]; then
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# make_environment FOLDER [REQUIREMENT...]: install the project and the requirements in a virtual environment, unless
# it is there, whole, and of these sources of what is built: pyproject.toml, setup.py and the CPU kernels.
make_environment() {
  local folder=$1 python="${PYTHON:-python3}" wanted
  shift
  local -a torch
  read -ra torch <<< "${NSA_TORCH:-torch==2.13.0}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "$python: Python 3.10 or newer is needed; PYTHON=... chooses one" >&2; return 2; }
  wanted="$(cat pyproject.toml setup.py mindspeed_nsa/ops/cpu/csrc/* | cksum) $*"
  if [[ -x $folder/bin/python && "$(cat "$folder/complete" 2> /dev/null)" == "$wanted" ]]; then
    echo "$folder is there"
    return
  fi
  rm -f "$folder/complete"
  # An Ascend host brings a torch and a torch_npu that fit each other: they are used, not replaced.
  if "$python" -c 'import torch_npu' 2> /dev/null; then
    "$python" -m venv --system-site-packages "$folder"
  else
    "$python" -m venv "$folder"
  fi
  local -a pip=("$folder/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile)
  if ! "$folder/bin/python" -c 'import torch' 2> /dev/null; then
    echo "installing ${torch[*]}"
    "${pip[@]}" "${torch[@]}"
  fi
  echo "installing the project and its tools"
  "${pip[@]}" --editable '.[train,dev]' "$@"
  echo "$wanted" > "$folder/complete"
}

# make_torch_npu FOLDER: put the torch_npu of .venv's torch alone in a folder, for the tests over an emulated CANN: in the
# environment it would break `import torch`, as there is no CANN. Nothing is done on an Ascend host, which has its own, nor
# where TORCH_NPU_PATH names a folder that has it.
make_torch_npu() {
  local folder=$1 release
  if [[ -n ${TORCH_NPU_PATH:-} ]] || .venv/bin/python -c 'import torch_npu' 2> /dev/null; then
    return
  fi
  release=$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])') || return
  if [[ -d $folder/torch_npu-$release.dist-info ]]; then
    echo "$folder is there"
    return
  fi
  echo "downloading torch_npu $release into $folder"
  rm -rf "$folder" "$folder.partial"
  .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps \
    --target "$folder.partial" "torch_npu==$release" || return
  mv "$folder.partial" "$folder"
}
