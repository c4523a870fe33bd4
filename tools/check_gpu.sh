#!/usr/bin/env bash
# What to run first on a machine with GPUs: does everything work there, and how fast is it?
#
#   bash tools/check_gpu.sh OUT [step ...]
#
# Each step has a time limit and leaves OUT/STEP.txt; OUT/steps.txt and OUT/machine.txt sum up. At most 19
# minutes in all. Steps, in the order of their worth:
#   nccl       a job on all GPUs, one rank each
#   tests      pytest -m gpu
#   round      a round against local steps, FedAvg, and torch's SyncBatchNorm with DistributedDataParallel
#   shared     clients on two ranks each, gradients summed during and after the backward pass; one GPU: over gloo
#   cohort     many clients on one GPU, stacked, against one after another
#   allreduce  latency and bandwidth of the collectives
#   fashion    Fashion-MNIST with ResNet-20; FASHION_ROOT is the folder of its files (default: data/, or a download)
set -u
[ $# -ge 1 ] || { sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1" || exit 1
out=$(realpath "$1"); shift
[ -z "${FASHION_ROOT:-}" ] || FASHION_ROOT=$(realpath "$FASHION_ROOT")
cd "$(dirname "$0")/.." || exit 1
steps=${*:-nccl tests round shared cohort allreduce fashion}
python=${PYTHON:-python}
scratch=$(mktemp -d); trap 'rm -r "$scratch"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "${gpus:-0}" -eq 0 ]; then
    echo "check_gpu: torch sees no GPU: check nvidia-smi, and that torch is a build with CUDA"; exit 1
fi
failed=0
run() { # STEP SECONDS COMMAND...
    local step=$1 limit=$2 began=$SECONDS code; shift 2
    [[ " $steps " == *" $step "* ]] || return 0
    echo "== $step: $*"
    timeout -k 5 "$limit" "$@" >"$out/$step.txt" 2>&1; code=$?
    [ $code -eq 0 ] || failed=1
    tail -n 4 "$out/$step.txt"
    echo "$step: exit code $code, $((SECONDS - began)) s of at most $limit s" | tee -a "$out/steps.txt"
}
ranks=("$python" -m torch.distributed.run --nproc-per-node)
rm -f "$out/steps.txt"
{
    date -u +%F
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "NCCL", torch.cuda.nccl.version())'
    git rev-parse --short HEAD 2>/dev/null
} | tee "$out/machine.txt"
run nccl 90 "${ranks[@]}" "$gpus" -m fedtan_hpc clients=$((4 * gpus)) partition=iid rounds=20 device=cuda run_dir="$scratch/nccl"
run tests 300 "$python" -m pytest -n 1 -m gpu -rs
run round 180 "${ranks[@]}" "$gpus" tools/bench_round.py device=cuda local_steps=1 'compile=[false,true]' repeats=15
run shared 150 "${ranks[@]}" $((gpus > 1 ? gpus / 2 * 2 : 2)) tools/bench_round.py device=cuda 'shared=[2]' repeats=5 local_steps=3 \
    model=torchvision model.name=resnet18 model.small_input=true 'data.shape=[3,32,32]' batch_size=128
run cohort 150 "$python" tools/bench_cohort.py --device cuda --clients 1 4 16 64 --repeats 3
run allreduce 60 "${ranks[@]}" "$gpus" tools/bench_allreduce.py device=cuda
run fashion 180 "${ranks[@]}" "$gpus" -m fedtan_hpc experiment=fashion_shards model=resnet20 batch_size=128 rounds=60 eval_every=20 \
    ${FASHION_ROOT:+data.root="$FASHION_ROOT"} run_dir="$scratch/fashion"
cat "$out/steps.txt"
exit $failed
