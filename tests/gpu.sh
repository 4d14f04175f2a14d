#!/usr/bin/env bash
# The tests of the kernels on the GPU that is here, side by side. Needs no more than what trains:
# PyTorch with Triton, jaxtyping, pytest.
#
#   tests/gpu.sh [FOLDER FOR LOGS]
set -u
cd "$(dirname "$0")/.."
logs=${1:-$(mktemp -d)}
mkdir -p "$logs"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0
declare -A jobs
run() { # NAME FILE [PYTEST'S ARGUMENTS]
    local name=$1 file=$2
    shift 2
    timeout 230 "${PYTHON:-python3}" -m pytest -q -ra --noconftest -p no:cacheprovider -o addopts= \
        -W ignore "tests/unit/$file" "$@" >"$logs/$name.log" 2>&1 &
    jobs[$name]=$!
}
run hopper test_kernels.py -k "hopper or reference"
run one-width test_kernels.py -k one_width
run triton-fp32 test_kernels.py -k "triton and fp32"
run triton-bf16 test_kernels.py -k "triton and bf16"
run encoding test_kernels.py -k encoding
run volume test_volume_kernels.py
run rounded test_rounded_kernels.py
run fused test_fused.py
for name in "${!jobs[@]}"; do
    wait "${jobs[$name]}" || failed=1
    echo "== $name: $(tail -n 1 "$logs/$name.log")"
    grep -E "^(FAILED|ERROR)|^E  " "$logs/$name.log" | head -12
done
exit $failed
