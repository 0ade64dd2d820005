#!/usr/bin/env bash
# The checks that only a GPU can make, on a machine that has one, with SGLang and this project's requirements installed.
#
#   scripts/check_gpu.sh OUT PART...
#
#   small     a model for the parts below where the machine has none, trained from nothing; the parts that need it wait
#   start     one engine with every kind of strategy, its graphs captured. Where it does not start nothing else is run
#   tests     losslessness, strategies that switch, publication and tap: the test suite's own, its engines on the GPU with
#             captured graphs; all at a time
#   probe     the NVML probe against processes that compute, hold memory, or are our own
#   yield     a spot worker that trains on the GPU, pre-empted at random: time, memory that is given back, lost steps
#   warmup    a drafter of MODEL from nothing (`tlt-verl warmup`), engine and trainer on the GPU
#   engine    graphs against their plan, steps by strategy, waits and rollouts, beside stock (check_engine.py), with the
#             warm-up's drafter, or DRAFTER
#   sizes     the same without rollouts at the sizes of an 8 B model, whose weights are made up
#   rollout   bench_rollout.py on the GPU, with the same drafter
#
# Writes a log a part into OUT and a line a part on the screen; a part that fails does not stop the others. Environment:
# PYTHON (python3), ENGINE (arguments of every engine as JSON), MODEL, TOKENIZER (for small and sizes), PROMPTS, DRAFTER,
# MINUTES (of the warm-up, its engine's start in it), TESTS_S (of a test), ENGINE_S (of engine and sizes). On an H200 with
# 16 cores an engine started in 60 s, three beside each other in 90 s; small took 60 s, start 90 s, tests but for
# sampling 150 s.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?"check_gpu: takes a folder, and parts: small start tests probe yield warmup engine sizes rollout"}
shift
python=${PYTHON:-python3}
engine=${ENGINE:-'{"attention_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none"}'}
model=${MODEL:-models/smollm2-135m-reasoner}
tokenizer=${TOKENIZER:-$model}
small=
mkdir -p "$out"
out=$(realpath "$out")
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

part() { # name, seconds, command...
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  # by an interrupt, which a background job would ignore: Python then ends the engines, which are no children of the shell
  timeout --signal INT --kill-after 30 "$limit" env --default-signal=INT "$@" >"$out/$name.log" 2>&1
  code=$?
  echo "check_gpu: $name ended with $code after $((SECONDS - begin)) s: $(grep -v '^[[:space:]]*[]}]*$' "$out/$name.log" | tail -n 1 | cut -c1-200)"
  return $code
}

# --engine NAME=VALUE for each argument of ENGINE and of the JSON objects behind it
of_all_engines() {
  "$python" -c 'import json, sys
merged = {}
for each in sys.argv[1:]: merged |= json.loads(each)
for name, value in merged.items(): print("--engine", f"{name}={json.dumps(value) if not isinstance(value, str) else value}", sep="\n")' "$engine" "$@"
}

# float16: SGLang's CUDA kernels take no float32. What the tests compare, and how closely, follows the type. Most of the
# memory is no engine's own: others start beside it, and SGLang counts what they hold as taken
for_tests() {
  local more='{"device": "cuda", "dtype": "float16", "disable_overlap_schedule": '${OVERLAP_OFF:-false}', "sleep_on_idle": false,
    "mem_fraction_static": 0.85, "cuda_graph_bs_decode": [1, 2, 4, 8, 16, 64, 256, 512], "cuda_graph_bs_prefill": [64, 256]}'
  TLT_TEST_ENGINE=$("$python" -c 'import json, sys; print(json.dumps(json.loads(sys.argv[2]) | json.loads(sys.argv[1])))' "$engine" "$more")
  export TLT_TEST_ENGINE OMP_NUM_THREADS=2
}

run_start() {
  for_tests
  part "$1" 150 "$python" -m pytest -p no:cacheprovider -q -s --tb=short --log-level=INFO tests/integration/test_switching.py -k every_strategy
}

run_tests() {
  for_tests
  local name only log limit pids=()
  while read -r log name only; do
    [ "$log" = sampling ] && limit=$((2 * ${TESTS_S:-240})) || limit=${TESTS_S:-240} # 128,000 requests
    part "$log" "$limit" "$python" -m pytest -p no:cacheprovider -q -s --tb=short "tests/$name.py" -k "$only" &
    pids+=($!)
  done <<END
greedy_chain integration/test_greedy_lossless near_ties or chain
greedy_tree integration/test_greedy_lossless tree
greedy_switching integration/test_greedy_lossless switching
skipped integration/test_switching skipped
publication integration/test_publication not greedy_text
tap_chain integration/test_tap chain
tap_tree integration/test_tap tree
sampling statistical/test_lossless_sampling switching and not stock
END
  wait "${pids[@]}"
}

for name in "$@"; do
  case "$name" in
    yield | probe | warmup | engine | sizes | rollout) [ -z "$small" ] || wait "$small" ;;
  esac
  case "$name" in
    small)
      part small 200 "$python" scripts/train_small.py --out "$model" --tokenizer "$tokenizer" --steps "${STEPS:-300}" &
      small=$!
      ;;
    start)
      if ! run_start start; then
        # the prefill's graphs are SGLang's alone; whether the rest starts without them is worth knowing
        if grep -q 'ImportError\|ModuleNotFoundError' "$out/start.log"; then exit 3; fi
        engine=$("$python" -c 'import json, sys; print(json.dumps(json.loads(sys.argv[1]) | {"disable_prefill_cuda_graph": True}))' "$engine")
        echo "check_gpu: again without the prefill's graphs, and all that follows"
        run_start start_without_prefill_graphs || exit 3
      fi
      ;;
    tests) run_tests ;;
    probe) part probe 90 "$python" scripts/check_probe.py ;;
    yield) part yield 120 "$python" scripts/check_yield.py --device cuda --hidden 2048 --vocab 32768 --preemptions "${PREEMPTIONS:-100}" ;;
    warmup)
      mapfile -t arguments < <(of_all_engines)
      part warmup "$("$python" -c 'import sys; print(int(60 * float(sys.argv[1])) + 60)' "${MINUTES:-3}")" \
        "$python" -m tlt_verl.cli warmup --device cuda --target "$model" \
        --prompts "${PROMPTS:-data/arithmetic/train.parquet}" --out "$out/drafter" --minutes "${MINUTES:-3}" "${arguments[@]}"
      ;;
    engine)
      mapfile -t arguments < <(of_all_engines '{"mem_fraction_static": 0.7}')
      if [ -e "${DRAFTER:-$out/drafter/latest}" ]; then arguments+=(--drafter "${DRAFTER:-$out/drafter/latest}"); else arguments+=(--untrained); fi
      part engine "${ENGINE_S:-420}" "$python" scripts/check_engine.py --model "$model" --rollout \
        --data "${TEST_PROMPTS:-data/arithmetic/test.parquet}" --out "$out/engine" --turns "${TURNS:-3}" "${arguments[@]}"
      ;;
    sizes)
      mapfile -t arguments < <(of_all_engines '{"mem_fraction_static": 0.7, "load_format": "dummy"}')
      "$python" scripts/train_small.py --out "$out/sizes_model" --tokenizer "$tokenizer" --sizes-alone \
        --hidden 4096 --intermediate 14336 --layers 32 --heads 32 --kv-heads 8 >"$out/sizes_model.log" 2>&1
      part sizes "${ENGINE_S:-420}" "$python" scripts/check_engine.py --model "$out/sizes_model" --untrained \
        --data "${TEST_PROMPTS:-data/arithmetic/test.parquet}" --out "$out/sizes" --turns "${TURNS:-3}" --tokens 128 "${arguments[@]}"
      ;;
    rollout)
      mapfile -t arguments < <(of_all_engines)
      part rollout 300 "$python" scripts/bench_rollout.py --device cuda --model "$model" --drafter "${DRAFTER:-$out/drafter/latest}" \
        --data "${TEST_PROMPTS:-data/arithmetic/test.parquet}" --out "$out/rollout" --contenders sglang eagle tlt off \
        --batches ${BATCHES:-1 8 32} --turns "${TURNS:-3}" "${arguments[@]}"
      ;;
    *) echo "check_gpu: got '$name', takes small, start, tests, probe, yield, warmup, engine, sizes, rollout" >&2; exit 2 ;;
  esac
done
[ -z "$small" ] || wait "$small"
