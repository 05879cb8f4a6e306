#!/bin/sh
# Tests and measures exl on this machine's GPU. docs/gpu-testing.md of the repository explains the steps.
#
#   ./run.sh RESULTS              all steps but the sanitizer's
#   ./run.sh RESULTS --sanitize   with compute-sanitizer, which must be on PATH (minutes more)
#
# RESULTS gets two files per step, .out and .err, and summary.json. The exit code is 0 when every step passed.
set -u
here=$(cd "$(dirname "$0")" && pwd)
results=${1:-}
case "$results" in
'' | -*) echo "usage: ./run.sh RESULTS [--sanitize]" >&2; exit 2 ;;
esac
case "${2:-}" in
'' | --sanitize) ;;
*) echo "run.sh: unknown option $2; there is --sanitize" >&2; exit 2 ;;
esac
mkdir -p "$results" || exit 1
results=$(cd "$results" && pwd)
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
exl="$here/exl"
export EXL_TEST_ROOT="$here" TMPDIR="$work" EXL_CUDA_TABLE="$results/cuda.json"
export EXL_KERNEL_PACK="$here/kernels.pack"
model="$here/testdata/demo-4m"
failed=0
summary=

# step NAME SECONDS COMMAND...: runs it, standard output to NAME.out, standard error to NAME.err.
step() {
    name=$1 limit=$2
    shift 2
    from=$(date +%s)
    timeout "$limit" "$@" >"$results/$name.out" 2>"$results/$name.err"
    code=$?
    seconds=$(($(date +%s) - from))
    case $code in
    0) said=ok ;;
    124) said="ran past $limit s" ;;
    *) said="failed with $code" ;;
    esac
    [ $code -eq 0 ] || failed=$((failed + 1))
    printf '%-28s %-20s %5s s\n' "$name" "$said" "$seconds"
    summary="$summary${summary:+,}{\"step\":\"$name\",\"code\":$code,\"seconds\":$seconds}"
    return $code
}

finish() {
    printf '{"failed":%s,"steps":[%s]}\n' "$failed" "$summary" >"$results/summary.json"
    [ $failed -eq 0 ] && echo "all passed" || echo "$failed failed; see $results"
    [ $failed -eq 0 ]
    exit
}

# The number that a key has in a line of JSON.
number() {
    sed -n "s/.*\"$1\":\([-0-9.eE+]*\).*/\1/p" "$2"
}

step doctor 60 "$exl" doctor --json
if ! grep -q '"usable":true' "$results/doctor.out"; then
    cat "$results/doctor.out" >&2
    echo "no GPU that exl can use: nothing to test" >&2
    failed=$((failed + 1))
    finish
fi
step selftest 300 "$exl" doctor --selftest --json
# tests NAME SECONDS FILTER...: tests of the one program that holds them all; none at all is a failure.
tests() {
    name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$here/gpu_tests" --test-threads 1 --nocapture "$@" || return
    if ! grep -q '^test result: ok. [1-9]' "$results/$name.out"; then
        echo "$name: no test ran" >&2
        failed=$((failed + 1))
    fi
}

tests conformance 900 conformance::
tests models 300 models::
tests draws 300 draws::
tests engine 600 engine::
step convert-cpu 300 "$exl" convert "$model" --out "$work/quantized" --bits 4.0 --rows 16 \
    --length 512 --device cpu -q
step convert-cuda 300 "$exl" convert "$model" --out "$work/on-gpu" --bits 4.0 --rows 16 \
    --length 512 --device cuda -q
for device in cpu cuda; do
    step "speak-$device" 120 "$exl" generate -q -m "$work/quantized" -p "It was a dark night" \
        --greedy -n 200 --device $device
done
step same-text 10 cmp "$results/speak-cpu.out" "$results/speak-cuda.out"
for device in cpu cuda; do
    step "eval-$device" 300 "$exl" eval -q -m "$work/quantized" --reference "$model" \
        --text "$here/testdata/demo-eval.txt" --rows 8 --length 512 --device $device --json
done
a=$(number kl "$results/eval-cpu.out") b=$(number kl "$results/eval-cuda.out")
step same-kl 10 awk -v a="$a" -v b="$b" \
    'BEGIN { print a, b; d = a - b; exit !(a > 0 && d < 0.01 * a && -d < 0.01 * a) }'
for shape in tinyllama-1.1b llama2-7b; do
    step "bench-$shape" 300 "$exl" bench -q --synthetic $shape --recipe 4.0 --prefill 512,2048 \
        --batch 1,8,32 --device cuda --json
done
if [ "${2:-}" = --sanitize ]; then
    export EXL_GPU_QUICK=1
    while read -r family ops; do
        for tool in memcheck racecheck initcheck; do
            export EXL_GPU_OPS="$ops"
            step "$tool-$family" 300 compute-sanitizer --tool $tool --error-exitcode 1 \
                --launch-timeout 100 "$here/gpu_tests" --test-threads 1 --nocapture \
                --exact conformance::gpu_conformance </dev/null
            # The kernels that it looked at.
            sed -n 's/^\([0-9]* kernels ran\)/  \1/p' "$results/$tool-$family.err" | cut -c 1-100
        done
    done <<FAMILIES
rows embed,rms_norm,layer_norm,gather_rows,scale_logits,clamp,scale_rows,gated
linear linear,gate_up,dequant
moe moe_route,moe_gate_up,moe_down
attention rope_append,paged_attn
sample sample
quantizer hessian_syrk,transposed_product,hessian_factor,hessian_loss,gptq,refine
FAMILIES
    # Launches that stand for several ops, which no case of an op reaches.
    unset EXL_GPU_OPS
    for tool in memcheck racecheck initcheck; do
        step "$tool-fused" 300 compute-sanitizer --tool $tool --error-exitcode 1 \
            --launch-timeout 100 "$here/gpu_tests" --test-threads 1 conformance::fused \
            conformance::rotated </dev/null
    done
fi
finish
