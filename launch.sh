#!/usr/bin/env bash
# Sets up .venv once and runs ham_jax in it.
#
#   ./launch.sh                            the demonstration: synthetic lesions, minutes on a laptop
#   ./launch.sh --config=FILE [flags]      python -m ham_jax.main with these flags
#   ./launch.sh --processes N [flags]      the same as one job of N processes on this machine
#   srun ./launch.sh [flags]               the same as one job of Slurm's tasks
#   ./launch.sh test [pytest arguments]    lint and tests
#   ./launch.sh --help                     this text; once all is installed, modes, flags and keys
#   ./launch.sh --mode=MODE --help         what a mode does, its flags and keys
#
# Modes that train get requirements.txt installed; the others requirements-predict.txt, which is
# all but TensorFlow and TFDS. What is there already stays.
#
# A run that ends with 75 (it was preempted, and saved itself) is started again, unless it is one of
# several that were started elsewhere (Slurm, mpirun, Kubernetes, a TPU pod): whoever started them
# must start all of them again. SIGTERM and Ctrl-C are passed on, and so is a closed terminal; then
# nothing is started again, and 75 says that the same command goes on.
# Variables: PYTHON, the interpreter that makes .venv (>= 3.11); HAM_JAX_VENV, another such folder.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=${HAM_JAX_VENV:-$root/.venv}
PREEMPTED=75
TERMINATED=143   # by SIGTERM, before there was anything to save
ABORTED=134      # by JAX, when it misses another process
MAX_RESTARTS=100
GRACE_S=60   # for the other processes of a job, once one has failed
PORTS=(61440 65535)  # for processes to meet; Linux gives none of them to whoever asks for any

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
  local found pyenv home=~  # which needs no $HOME
  for found in python3.12 python3.13 python3.11 python3; do
    if runs "$found"; then echo "$found"; return; fi
    # pyenv's shims fail for versions that are installed but not chosen.
    for pyenv in "${PYENV_ROOT:-$home/.pyenv}"/versions/*/bin/"$found"; do
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
    xargs grep -qsxE "$ids" /dev/null || [ -n "${TPU_WORKER_HOSTNAMES:-}${TPU_PROCESS_ADDRESSES:-}" ]
}

is_installed() { [ "$(cat "$venv/.installed-$1" 2>/dev/null)" = "$wanted" ]; }

install() {  # install NAME: with pip, once, again when requirements change or pip failed
  local file holds name
  case $1 in
    predict) file=requirements-predict.txt holds=predict ;;
    ham_jax) file=requirements.txt holds="predict ham_jax" ;;
    tests) file=requirements-test.txt holds="predict ham_jax tests" ;;
  esac
  if is_installed "$1"; then return; fi
  say "installing $1 into $venv${extra:+ for $extra} (once; some minutes)"
  as_child "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    ${extra:+"jax[$extra]>=0.10.2,<0.13"} -r "$root/$file" || fail "the installation failed; see above."
  for name in $holds; do echo "$wanted" > "$venv/.installed-$name"; done
}

needs() {  # needs FLAGS: what they need, predict or ham_jax
  local word before='' mode=train
  case ${1:-} in [a-z]*) mode=$1 ;; esac
  for word in "$@"; do
    case $before in --mode | -mode) mode=$word ;; esac
    case $word in --mode=* | -mode=*) mode=${word#*=} ;; esac
    before=$word
  done
  case $mode in train | crossval | prepare) echo ham_jax ;; *) echo predict ;; esac
}

lock() {  # for one installation at a time: Slurm tasks share the folder
  local told=
  exec 9> "$venv/.lock"
  if command -v flock >/dev/null && flock 9 2>/dev/null; then return; fi
  # macOS has no flock, and some network file systems refuse it: there a folder is the lock, as
  # long as its owner keeps it fresh.
  until mkdir "$venv/.locked" 2>/dev/null; do
    if [ -z "$told" ]; then say "waiting for another installation into $venv"; fi
    told=1
    if [ -n "$(find "$venv/.locked" -maxdepth 0 -mmin +2 2>/dev/null)" ]; then
      rmdir "$venv/.locked" 2>/dev/null || true
    fi
    sleep 1
  done
  while kill -0 $$ 2>/dev/null && touch -c "$venv/.locked"; do sleep 15; done &
  keeper=$!
}

unlock() {
  exec 9>&-
  if [ -z "$keeper" ]; then return; fi
  kill -KILL -- "-$keeper" 2>/dev/null || true
  rmdir "$venv/.locked" 2>/dev/null || true
  keeper=
}

set_up() {  # set_up NAME: predict, ham_jax, which adds training, or tests, which add tests
  local python
  extra=$(accelerator)
  wanted=$({ cat "$root"/requirements*.txt; echo "$extra"; } | cksum)
  if runs "$venv/bin/python" && is_installed "$1"; then return; fi
  case $venv in *:*) fail "Python makes no environment in $venv, because of the colon." ;; esac
  if ! mkdir -p "$venv" || ! [ -w "$venv" ]; then
    fail "$venv cannot be written; HAM_JAX_VENV may name another folder."
  fi
  trap 'stop_setting_up 75' TERM HUP
  trap 'stop_setting_up 130' INT
  trap unlock EXIT
  lock
  if ! runs "$venv/bin/python" ||
      { ! [ -f "$venv/.installed-predict" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; }
  then  # there is none, its Python is gone, or making it was broken off
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    rm -f "$venv"/.installed-*
    as_child "$python" -m venv "$venv" ||
      fail "this Python cannot make environments (Debian: apt install python3-venv)."
  fi
  install "$1"
  unlock
  trap - TERM HUP INT EXIT
}

stop_setting_up() {  # nothing is lost: what is not finished is done again
  leave_none
  say "stopped while setting up $venv; the same command goes on"
  exit "$1"
}

# ---- processes

# With job control each child has a process group of its own, and Ctrl-C reaches only this script,
# which passes it on; without, bash starts children deaf to Ctrl-C.
set -m
children=   # process ids
signals=0   # that this script was sent
keeper=     # the process that keeps the lock of an installation fresh

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

as_child() {  # so that a signal is answered at once
  local code=0
  "$@" & children=$!
  wait "$children" || code=$?
  leave_none
  return "$code"
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
  "$venv/bin/python" - "${PORTS[@]}" <<'END'
import random, socket, sys
first, last = map(int, sys.argv[1:])
for port in random.sample(range(first, last + 1), 100):
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError:
            continue
        print(port)
        break
END
}

count_gpus() {
  local visible=${CUDA_VISIBLE_DEVICES-unset}
  case ${JAX_PLATFORMS:-},$visible in
    cpu,* | *, | *,-1* | *,NoDevFiles) echo 0 ;;
    *,unset) nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true ;;
    *) echo "$visible" | tr , '\n' | grep -c . || true ;;
  esac
}

make_folder() {  # for the logs of a job
  local where
  for where in "${TMPDIR:-/tmp}" /tmp "$PWD"; do
    if mktemp -d "$where/ham_jax.XXXXXX" 2>/dev/null; then return; fi
  done
  fail "there is no folder for temporary files; set TMPDIR to one that can be written."
}

run_many() {  # run_many N FLAGS: process 0 prints here, the others into files
  local count=$1 port gpus number code first=0 logs pid name=$$.$RANDOM; shift
  gpus=$(count_gpus)
  ((gpus == 0 || gpus >= count)) || fail "$count processes need as many GPUs; here are $gpus."
  port=$(free_port)
  [ -n "$port" ] || fail "no port from ${PORTS[0]} to ${PORTS[1]} is free for the processes to meet."
  logs=$(make_folder)
  say "$count processes; what those after the first print is in $logs"
  for ((number = 0; number < count; number++)); do
    (
      export HAM_JAX_NUM_PROCESSES=$count HAM_JAX_PROCESS_ID=$number
      export HAM_JAX_COORDINATOR=127.0.0.1:$port HAM_JAX_GPUS_PER_PROCESS=$((gpus / count))
      export HAM_JAX_JOB=$name  # tells it from another job that meets at the same port
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

is_alone() {  # and no part of a job that only whoever started it can start again
  PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" as_child "$venv/bin/python" -c \
    'import sys; from ham_jax import parallel; sys.exit(parallel.find_job() is not None)' 2>/dev/null
}

keep_running() {  # again after each preemption
  local code restarts
  trap 'signals=$((signals + 1)); pass_on TERM' TERM HUP
  trap 'signals=$((signals + 1)); pass_on INT' INT
  trap leave_none EXIT
  for ((restarts = 0; ; restarts++)); do
    code=0; "$@" || code=$?
    leave_none
    if ((code == TERMINATED && signals)); then code=$PREEMPTED; fi
    if ((code == ABORTED)); then
      say "JAX ended this process. If it is one of several, another is gone: see what that one said."
    fi
    if ((code != PREEMPTED || signals || restarts == MAX_RESTARTS)); then return "$code"; fi
    if ! is_alone || ((signals)); then
      say "preempted; whoever started this job of several processes must start all of them again"
      return "$code"
    fi
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
    if [ -f "$venv/.installed-predict" ]; then echo; main --help; fi
    ;;
  test)
    shift
    set_up tests
    cd "$root"
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    # It would ask PyPI for a newer version of itself.
    PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$venv/bin/pyright" --pythonpath "$venv/bin/python"
    # By file: tests of a file share what they trained. `-n 0` runs them in one process.
    JAX_PLATFORMS=cpu exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
    ;;
  "")
    set_up ham_jax
    cd "$root"
    demonstrate
    ;;
  --processes | --processes=*)
    if [ "$1" = --processes ]; then count=${2:-}; shift 2 || true; else count=${1#*=}; shift; fi
    [[ "$count" =~ ^[1-9][0-9]*$ ]] || fail "--processes needs a number, such as --processes 2."
    set_up "$(needs "$@")"
    keep_running run_many "$count" "$@"
    ;;
  *)
    set_up "$(needs "$@")"
    keep_running run_one "$@"
    ;;
esac
