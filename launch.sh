#!/usr/bin/env bash
# Sets up .venv once and runs ham_jax in it.
#
#   ./launch.sh                            the demonstration: synthetic lesions, minutes on a laptop
#   ./launch.sh --config=FILE [flags]      python -m ham_jax.main with these flags
#   ./launch.sh --processes N [flags]      the same as one job of N processes on this machine
#   srun ./launch.sh [flags]               the same as one job of Slurm's tasks
#   ./launch.sh test [pytest arguments]    lint and tests
#   ./launch.sh --help                     this text, and the flags once all is installed
#
# A run that ends with 75 (it was preempted, and saved itself) is started again. SIGTERM and Ctrl-C
# are passed on, and so is a closed terminal; then nothing is started again.
# Variables: PYTHON, the interpreter that makes .venv (>= 3.11); HAM_JAX_VENV, another such folder.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${HAM_JAX_VENV:-$root/.venv}
PREEMPTED=75
MAX_RESTARTS=100
GRACE_S=60   # for the other processes of a job, once one has failed

# Huge pages for large arrays, where the kernel gives them on request: on CPU each step allocates
# them anew, and touching small pages for the first time took a sixth of its time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

say() { printf 'launch.sh: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }

# ---- set-up

runs() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

find_python() {  # newer JAX, which needs 3.12, is faster on CPU
  if [ -n "${PYTHON:-}" ]; then
    runs "$PYTHON" || fail "PYTHON=$PYTHON does not run as Python 3.11 to 3.13."
    echo "$PYTHON"; return
  fi
  local found pyenv
  for found in python3.12 python3.13 python3.11 python3; do
    if runs "$found"; then echo "$found"; return; fi
    # pyenv's shims fail for versions that are installed but not chosen.
    for pyenv in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"$found"; do
      if runs "$pyenv"; then echo "$pyenv"; return; fi
    done
  done
  fail "no Python 3.11, 3.12 or 3.13 found. Install one, or set PYTHON to it."
}

accelerator() {  # the extra of jax that fits this machine, empty for CPU
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) ||
    driver=$(grep -oE '[0-9]+\.[0-9.]+' /proc/driver/nvidia/version 2>/dev/null) || driver=
  if [[ "$driver" =~ ^[0-9]+ ]]; then
    if ((BASH_REMATCH[0] >= 580)); then echo cuda13; else echo cuda12; fi
  elif has_tpu; then
    echo tpu
  fi
}

has_tpu() {  # by PCI device number, as JAX looks; Google's network cards have others
  local ids='0x(0027|0056|005e|0062|0063|006f|0076)'
  grep -lsx 0x1ae0 /sys/bus/pci/devices/*/vendor | sed 's/vendor$/device/' |
    xargs grep -qsxE "$ids" /dev/null || [ -n "${TPU_WORKER_HOSTNAMES:-}" ]
}

install() {  # install NAME REQUIREMENTS...: with pip, once, again when they change or pip failed
  local name=$1; shift
  local extra stamp=$venv/.installed-$name wanted
  extra=$(accelerator)
  wanted=$({ cat "$root"/requirements*.txt; echo "$extra"; } | cksum)
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
  say "installing $name into $venv${extra:+ for $extra} (once; some minutes)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    ${extra:+"jax[$extra]>=0.10.2,<0.13"} -r "$root/$1" || fail "the installation failed; see above."
  echo "$wanted" > "$stamp"
}

set_up() {
  mkdir -p "$venv"
  exec 9> "$venv/.lock"
  if command -v flock >/dev/null; then flock 9; fi  # Slurm tasks share the folder
  if ! runs "$venv/bin/python" ||
      { ! [ -f "$venv/.installed-ham_jax" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; }
  then  # there is none, its Python is gone, or making it was broken off
    local python; python=$(find_python)
    say "making $venv with $("$python" --version)"
    rm -f "$venv"/.installed-*
    "$python" -m venv "$venv" ||
      fail "this Python cannot make environments (Debian: apt install python3-venv)."
  fi
  install ham_jax requirements.txt
  if [ "${1:-}" = test ]; then install tests requirements-test.txt; fi
  exec 9>&-
}

# ---- processes

# With job control each child has a process group of its own, and Ctrl-C reaches only this script,
# which passes it on; without, bash starts children deaf to Ctrl-C.
set -m
children=   # process ids
signals=0   # that this script was sent

pass_on() {
  local pid; for pid in $children; do kill -s "$1" "$pid" 2>/dev/null || true; done
}

leave_none() {  # of the children, nor of what they started
  local pid; for pid in $children; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  children=
}

main() {  # as a child, so that signals can be passed on
  PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$venv/bin/python" -m ham_jax.main "$@"
}

run_one() {
  local code before=-1 lives=
  main "$@" & children=$!
  # A signal ends `wait` early, and so does a child that is stopped, not ended.
  while ((before != signals)) || [ -n "$lives" ]; do
    before=$signals lives=
    code=0; wait "$children" || code=$?
    if kill -0 "$children" 2>/dev/null; then lives=1; pause; fi
  done
  return "$code"
}

pause() {  # in the foreground it would be the one that a Ctrl-C reaches
  sleep 0.2 & wait $! || true
}

free_port() {
  "$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

count_gpus() {
  if [ "${JAX_PLATFORMS:-}" = cpu ]; then echo 0
  elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then echo "$CUDA_VISIBLE_DEVICES" | tr , '\n' | grep -c .
  else nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  fi
}

run_many() {  # run_many N FLAGS: process 0 prints here, the others into files
  local count=$1 port gpus number code first=0 logs pid; shift
  gpus=$(count_gpus)
  ((gpus == 0 || gpus >= count)) || fail "$count processes need as many GPUs; here are $gpus."
  port=$(free_port)
  logs=$(mktemp -d "${TMPDIR:-/tmp}/ham_jax.XXXXXX")
  say "$count processes; what those after the first print is in $logs"
  for ((number = 0; number < count; number++)); do
    (
      export HAM_JAX_NUM_PROCESSES=$count HAM_JAX_PROCESS_ID=$number
      export HAM_JAX_COORDINATOR=127.0.0.1:$port HAM_JAX_GPUS_PER_PROCESS=$((gpus / count))
      if ((number)); then exec > "$logs/$number" 2>&1; fi
      main "$@"
    ) &
    children="$children $!"
  done
  local left=$children still deadline=
  while [ -n "$left" ]; do
    still=
    for pid in $left; do
      if kill -0 "$pid" 2>/dev/null; then still="$still $pid"; continue; fi
      code=0; wait "$pid" || code=$?
      if ((code && !first)); then
        first=$code
        deadline=$((SECONDS + GRACE_S))
        # One that was preempted stops together with the others; one that failed takes them along.
        if ((code != PREEMPTED)); then pass_on TERM; fi
      fi
    done
    left=$still
    if [ -n "$deadline" ] && ((SECONDS >= deadline)); then leave_none; fi
    if [ -n "$left" ]; then pause; fi
  done
  if ((first && first != PREEMPTED)); then
    for number in "$logs"/*; do
      if [ -s "$number" ]; then say "the end of $number:"; tail -n 5 "$number" >&2; fi
    done
  fi
  return "$first"
}

keep_running() {  # again after each preemption
  local code restarts
  trap 'signals=$((signals + 1)); pass_on TERM' TERM HUP
  trap 'signals=$((signals + 1)); pass_on INT' INT
  trap leave_none EXIT
  for ((restarts = 0; ; restarts++)); do
    code=0; "$@" || code=$?
    leave_none
    if ((code != PREEMPTED || signals || restarts == MAX_RESTARTS)); then return "$code"; fi
    say "preempted; starting again ($((restarts + 1)))"
  done
}

demonstrate() {
  local run=(run_one --config="$root/configs/demo.py" --workdir=runs/demo)
  say "python -m ham_jax.main ${run[*]:1}"
  keep_running "${run[@]}"
  run=(run_one --mode=predict --workdir=runs/demo --images="data/demo/**/ISIC_002430?.jpg")
  say "python -m ham_jax.main ${run[*]:1}"
  keep_running "${run[@]}"
}

# ---- what was asked for

case "${1:-}" in
  --help | -h)
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
    if [ -f "$venv/.installed-ham_jax" ]; then echo; main --help; fi
    ;;
  test)
    shift
    set_up test
    cd "$root"
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    # By file: tests of a file share what they trained. `-n 0` runs them in one process.
    JAX_PLATFORMS=cpu exec "$venv/bin/python" -m pytest -n 2 --dist loadfile "$@"
    ;;
  "")
    set_up
    cd "$root"
    demonstrate
    ;;
  --processes | --processes=*)
    if [ "$1" = --processes ]; then count=${2:-}; shift 2 || true; else count=${1#*=}; shift; fi
    [[ "$count" =~ ^[1-9][0-9]*$ ]] || fail "--processes needs a number, such as --processes 2."
    set_up
    keep_running run_many "$count" "$@"
    ;;
  *)
    set_up
    keep_running run_one "$@"
    ;;
esac
