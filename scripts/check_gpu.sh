#!/usr/bin/env bash
# The checks that only a GPU can make, on a machine that has one, with SGLang and this project's requirements installed.
#
#   scripts/check_gpu.sh OUT PART...
#
#   tests     losslessness, strategies that switch, publication and tap: the test suite's own, its engines on the GPU with
#             captured graphs; five at a time
#   probe     the NVML probe against processes that compute, hold memory, or are our own
#   yield     a spot worker that trains on the GPU, pre-empted at random: time, memory that is given back, lost steps
#   warmup    a drafter of the quickstart's model from nothing (`tlt-verl warmup`), engine and trainer on the GPU
#   rollout   bench_rollout.py on the GPU, with the warm-up's drafter, or DRAFTER
#
# Writes a log a part into OUT and a line a part on the screen; a part that fails does not stop the others. Environment:
# PYTHON (python3), ENGINE (arguments of every engine as JSON), MODEL, PROMPTS, DRAFTER, MINUTES (of the warm-up).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?"check_gpu: takes a folder, and parts: tests probe yield warmup rollout"}
shift
python=${PYTHON:-python3}
engine=${ENGINE:-'{"attention_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none"}'}
model=${MODEL:-models/smollm2-135m-reasoner}
mkdir -p "$out"
out=$(realpath "$out")
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

part() { # name, seconds, command...
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  timeout --kill-after 10 "$limit" "$@" >"$out/$name.log" 2>&1
  echo "check_gpu: $name ended with $? after $((SECONDS - begin)) s: $(grep -v '^[[:space:]]*[]}]*$' "$out/$name.log" | tail -n 1 | cut -c1-200)"
}

of_all_engines() { # --engine NAME=VALUE for each
  "$python" -c 'import json, sys
for name, value in json.loads(sys.argv[1]).items(): print("--engine", f"{name}={json.dumps(value) if not isinstance(value, str) else value}", sep="\n")' "$engine"
}

run_tests() {
  # float16: SGLang's CUDA kernels take no float32. What the tests compare, and how closely, follows the type
  local more='{"device": "cuda", "dtype": "float16", "disable_overlap_schedule": '${OVERLAP_OFF:-false}', "sleep_on_idle": false,
    "mem_fraction_static": 0.5, "cuda_graph_max_bs_decode": 16, "cuda_graph_max_bs_prefill": 256}'
  TLT_TEST_ENGINE=$("$python" -c 'import json, sys; print(json.dumps(json.loads(sys.argv[1]) | json.loads(sys.argv[2])))' "$engine" "$more")
  export TLT_TEST_ENGINE OMP_NUM_THREADS=2
  local name only
  while read -r name only; do
    part "${name#*/}" "${TESTS_S:-240}" "$python" -m pytest -p no:cacheprovider -q --tb=short "tests/$name.py" -k "$only" &
  done <<END
integration/test_greedy_lossless test
integration/test_switching test
integration/test_publication not greedy_text
integration/test_tap test
statistical/test_lossless_sampling switching and not stock
END
  wait
}

for name in "$@"; do
  case "$name" in
    tests) run_tests ;;
    probe) part probe 90 "$python" scripts/check_probe.py ;;
    yield) part yield 120 "$python" scripts/check_yield.py --device cuda --hidden 2048 --vocab 32768 --preemptions 100 ;;
    warmup)
      mapfile -t arguments < <(of_all_engines)
      part warmup $((${MINUTES:-1} * 60 + 90)) "$python" -m tlt_verl.cli warmup --device cuda --target "$model" \
        --prompts "${PROMPTS:-data/arithmetic/train.parquet}" --out "$out/drafter" --minutes "${MINUTES:-1}" "${arguments[@]}"
      ;;
    rollout)
      mapfile -t arguments < <(of_all_engines)
      part rollout 300 "$python" scripts/bench_rollout.py --device cuda --model "$model" --drafter "${DRAFTER:-$out/drafter/latest}" \
        --data "${TEST_PROMPTS:-data/arithmetic/test.parquet}" --out "$out/rollout" --contenders sglang eagle tlt off \
        --batches ${BATCHES:-1 8 32} --turns "${TURNS:-3}" "${arguments[@]}"
      ;;
    *) echo "check_gpu: got '$name', takes tests, probe, yield, warmup, rollout" >&2; exit 2 ;;
  esac
done
