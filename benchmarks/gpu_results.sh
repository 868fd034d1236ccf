#!/usr/bin/env bash
# Measure again what docs/results says of GPUs, on a host with four of them (connector: two are enough).
#   benchmarks/gpu_results.sh OUT SECONDS [GROUP...]
# GROUP: two-gpu or connector (two lanes of two GPUs each, at the same time: about 26 and 10 minutes; on two GPUs connector's lanes come one
# after the other, about 20), tensor-parallel (about 16), tensor-parallel-load (about 22, first-token beside it), dense-lanes (about 5), fleet (about 26),
# fleet-tuned (about 24), fleet-512 (about 16), on two GPUs rivals (about 25; needs nixl and
# mooncake), wire (about 6), connector-checks (about 8; needs mooncake), builtin (about 7; needs a vLLM of 0.10.2 to 0.23), first-token (about 8), first-token-load (about 8), dense (about 7), calibrate (about 24)
# or, on one, one-gpu (about 26); default: all but the last eight.
# No step begins later than SECONDS after the start; each leaves a folder and a log in OUT and prints one line; one that fails ends no other.
# CONNECTORS names those of rivals (default: all, with commas between). MODEL is a model folder (default: DeepSeek-V2-Lite's shape with random weights, made in OUT), PDBENCH_PYTHON the Python that has pdbench and vLLM.
set -u
out=$(mkdir -p "${1:?usage: benchmarks/gpu_results.sh OUT SECONDS [GROUP...]}" && cd "$1" && pwd)
end=$(($(date +%s) + ${2:?how many seconds it may take}))
shift 2
[ $# -eq 0 ] && set -- two-gpu connector tensor-parallel tensor-parallel-load dense-lanes fleet fleet-tuned fleet-512 rivals
cd "$(dirname "$0")/.." || exit 1
python=${PDBENCH_PYTHON:-python3}
export PYTHONUNBUFFERED=1 COLUMNS=140
model=${MODEL:-$out/deepseek-v2-lite}
[ -e "$model/config.json" ] || "$python" -m pdbench.serving.models deepseek-v2-lite "$model" || exit 1
case "$*" in *dense*) "$python" -m pdbench.serving.models llama-3.1-8b "$out/llama-3.1-8b" || exit 1 ;; esac

# Graphs for every batch of decode and for one or two prompts of 2,048 tokens with it: others are launched kernel by kernel.
vllm_args_of() { # vllm_args_of RECIPE
    sed -n 's/^vllm_args = "\(.*\)"$/\1/p' "recipes/$1.toml"
}
graphs=$(vllm_args_of gpu-1p1d-graphs)
alone="$graphs --kv-cache-memory-bytes 33000000000"
resident="$graphs --kv-cache-memory-bytes 4000000000"
lane_b="--prefill-gpus 2 --decode-gpus 3 --prefill-port 9100 --decode-port 9200 --proxy-port 9000 --single-port 9000 --kv-port 22001"
short="--input-tokens 512 --output-tokens 512"
short_graphs="--cudagraph-capture-sizes 1 2 4 8 16 24 32 48 64 96 128 192 256 384 512 576 640 768 1024 1152 1280 2048"
short_tuned="$short_graphs --max-num-batched-tokens 2048 --kv-cache-memory-bytes 33000000000"
slo="--slo ttft=300,tbt=15"
slo_run="--slo-ttft-ms 300 --slo-tbt-ms 15"

left() { echo $((end - $(date +%s))); }

step() { # step NAME LIMIT_S COMMAND...: at most LIMIT_S seconds, then Ctrl-C, which keeps what was measured
    local name=$1 limit=$2 begun code
    shift 2
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    if [ "$limit" -lt 25 ]; then
        echo "$name: no time left"
        return
    fi
    begun=$(date +%s)
    timeout -s INT -k 30 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    echo "$(date +%T) $name: exit code $code after $(($(date +%s) - begun)) s, $(left) s left"
}

measure() { # measure NAME LIMIT_S COMMAND RECIPE OPTIONS...: a command of pdbench; `vllm` holds its vLLM arguments
    local name=$1 limit=$2 command=$3 recipe=$4
    shift 4
    step "$name" "$limit" "$python" -m pdbench "$command" "recipes/$recipe.toml" --model "$model" --load-format dummy --idle-s 1 --cooldown-s 2 \
        --log-dir "$out/logs/$name" --out "$out/$name" "--vllm-args=$vllm" "$@"
}

sweep() { # sweep NAME LIMIT_S RECIPE OPTIONS...
    local name=$1 limit=$2 recipe=$3
    shift 3
    vllm=$alone measure "$name" "$limit" sweep "$recipe" --vary rate=4,8,16,24 --duration-s 36 $slo "$@"
}

pairs() { # pairs NAME RECIPE OPTIONS...
    local name=$1 recipe=$2
    shift 2
    vllm=$resident measure "$name" 800 run "$recipe" --resident --against replicas,disaggregated --pairs 6 --rate 16 --requests 576 $slo_run \
        --gpu-memory-utilization 0.92 "$@"
}

search() { # search NAME RECIPE RATE MINUTES OPTIONS...
    local name=$1 recipe=$2 rate=$3 minutes=$4
    shift 4
    vllm=$alone measure "$name" 420 search "$recipe" $slo --precision 5% --nonce 7c31d5aa --rate "$rate" --max-minutes "$minutes" "$@"
}

two_gpu_a() {
    sweep rates 620 gpu-1p1d-graphs --against replicas,disaggregated
    pairs pairs gpu-1p1d-graphs
    search search-1p1d gpu-1p1d-graphs 20 4.5 --against disaggregated
}

two_gpu_b() {
    sweep rates-chunks-512 420 gpu-1p1d-chunks $lane_b --against replicas
    sweep rates-single 330 gpu-1p1d-graphs $lane_b --single-gpus 2 --against single &
    search search-single gpu-1p1d-graphs 6 4.5 --prefill-gpus 3 --decode-gpus 2 --single-gpus 3 --single-port 9400 --against single &
    wait
    pairs pairs-chunks-512 gpu-1p1d-chunks $lane_b
    search search-replicas gpu-1p1d-graphs 14 4.5 $lane_b --against replicas
}

connector_a() {
    step wire 420 env CUDA_VISIBLE_DEVICES=0,1 "$python" benchmarks/kv_transfer.py --out "$out/wire" --connectors p2p-nccl --model "$model" \
        --requests 1000 --limit-s 390 "--vllm-args=--load-format dummy $alone"
}

connector_b() { # connector_b LANE: options that choose its two GPUs
    cost $1
    kv_tests $1
}

kv_tests() { # both halves at once: they take a fifth of each GPU's memory and measure nothing
    local gpus=0,1
    [ $# -gt 0 ] && gpus=2,3
    step tests-gpu-caches 420 env CUDA_VISIBLE_DEVICES=$gpus "$python" -m pytest -v -p no:cacheprovider -m gpu tests/gpu/test_kv_nccl.py -k other_caches &
    step tests-gpu 480 env CUDA_VISIBLE_DEVICES=$gpus "$python" -m pytest -v -p no:cacheprovider -m gpu tests/gpu/test_kv_nccl.py -k "not other_caches"
    wait $!
}

connector_checks() { # the connector's tests and, beside them, the gate of vLLM's MooncakeConnector: none of them measures
    kv_tests &
    vllm=$alone measure mooncake 460 run gpu-1p1d-graphs --against disaggregated --connector mooncake --rate 4 --requests 60 --pairs 1 --gpu-memory-utilization 0.5
    wait $!
}

builtin() { # vLLM's own P2pNcclConnector
    step builtin 460 env CUDA_VISIBLE_DEVICES=0,1 "$python" benchmarks/kv_transfer.py --out "$out/builtin" --connectors builtin-p2p-nccl --model "$model" \
        --requests 1000 --limit-s 380 "--vllm-args=--load-format dummy $alone"
}

rivals() {
    step rivals 1700 env CUDA_VISIBLE_DEVICES=0,1 "$python" benchmarks/kv_transfer.py --out "$out/rivals" --connectors "${CONNECTORS:-p2p-nccl,mooncake,nixl,nixl-push}" \
        --model "$model" --requests 2000 --limit-s 1600 "--vllm-args=--load-format dummy $alone"
}

first_token() { # first_token NAME RATES SECONDS [LANE]
    vllm=$alone measure "$1" 700 sweep gpu-1p1d-graphs $4 --against disaggregated --vary "rate=$2" first_token=prefill,either --duration-s "$3" $slo
}

dense() { # dense NAME DEPLOYMENTS [LANE]: another shape, for the planner
    local model=$out/llama-3.1-8b
    vllm=$alone measure "$1" 900 sweep gpu-1p1d-graphs $3 --against "$2" --vary rate=2,4,8 --duration-s 24 $slo
}

dense_lanes() {
    dense dense-replicas replicas "" &
    dense dense-1p1d disaggregated "$lane_b"
    wait
}

calibrate() { # then loads of other rates, lengths and bursts, and two replicas, for `pdbench plan OUT/calibrate --check OUT/held-out/*/*_results`
    local vllm="$(vllm_args_of calibrate) --kv-cache-memory-bytes 33000000000"
    measure calibrate 800 calibrate calibrate --against disaggregated,single --max-minutes 12.5
    measure held-out 760 sweep calibrate --against disaggregated,replicas --vary trace=$("$python" benchmarks/held_out.py "$out/loads" --seconds 20) $slo
}

one_gpu() { # three ways to use one GPU, Mooncake's gate, the ways with several instances under CUDA's Multi-Process Service
    local sweep="--prefill-gpus 0 --decode-gpus 0 --vary rate=4,8,12 --duration-s 24 $slo" vllm=$graphs
    measure one-gpu 1000 sweep gpu-1p1d-graphs --against single,replicas,disaggregated $sweep
    measure mooncake 270 run gpu-1p1d-graphs --prefill-gpus 0 --decode-gpus 0 --against disaggregated --connector mooncake --rate 4 --requests 60 --pairs 1
    if nvidia-cuda-mps-control -d; then
        measure one-gpu-mps 560 sweep gpu-1p1d-graphs --against disaggregated,replicas $sweep
        echo quit | nvidia-cuda-mps-control
    fi
    step tests-victims 250 "$python" -m pytest -v -p no:cacheprovider -m gpu tests/gpu/test_kv_nccl.py -k "victim and 9"
}

second_turn() {
    step second-turn 240 env CUDA_VISIBLE_DEVICES=0,1 "$python" benchmarks/second_turn.py --connector p2p-nccl --model "$model" --conversations 10 \
        --prompt 2048 --answer 384 --new 64 "--vllm-args=--load-format dummy $alone"
}

cost() { # what counters, canaries and a watched page cost the other requests
    local serve port=8000
    [ $# -gt 0 ] && port=9000
    "$python" -m pdbench serve recipes/gpu-1p1d-graphs.toml --model "$model" --load-format dummy "$@" --log-dir "$out/logs/cost" \
        "--vllm-args=$alone" >"$out/cost-serve.log" 2>&1 &
    serve=$!
    until grep -q "^ready: " "$out/cost-serve.log" || ! kill -0 $serve 2>/dev/null || [ "$(left)" -lt 60 ]; do sleep 1; done
    step cost 330 "$python" benchmarks/record_cost.py --url http://127.0.0.1:$port --rounds 6 --rate 8 --requests 56 --input-tokens 2048 --output-tokens 128
    kill -INT $serve 2>/dev/null
    wait $serve
}

tensor_parallel() {
    step tests-tensor-parallel 660 "$python" -m pytest -q -m slow tests/kv/test_tensor_parallel.py
    step wire-tp2 300 "$python" benchmarks/kv_transfer.py --out "$out/wire-tp2" --connectors p2p-nccl --tensor-parallel 2 --model "$model" --requests 500 \
        --limit-s 270 "--vllm-args=--load-format dummy $alone"
}

tensor_parallel_load() {
    local load="--tensor-parallel 2 --vary rate=8,16 --trials 3 --duration-s 30 $slo"
    vllm=$alone measure tp2-single 560 sweep gpu-1p1d-graphs --against single $load &
    first_token first-token 4,8,16 33 "$lane_b" # on the two GPUs that the single instance leaves
    wait
    vllm=$alone measure tp2 900 sweep gpu-1p1d-graphs --against replicas,disaggregated $load
    step tests-mla-1-2 240 "$python" -m pytest -v -p no:cacheprovider -m slow tests/kv/test_tensor_parallel.py -k mla-1-2
}

fleet() {
    local two_each="--prefill-instances 2 --decode-instances 2"
    search search-2p2d gpu-1p1d-graphs 40 3.8 $two_each --against disaggregated
    search search-4-replicas gpu-1p1d-graphs 40 3.8 $two_each --against replicas
    search search-3p1d gpu-1p1d-graphs 30 3.8 --prefill-instances 3 --against disaggregated
    search search-1p3d gpu-1p1d-graphs 20 3.3 --decode-instances 3 --against disaggregated
    step fleet-faults 300 "$python" benchmarks/fleet_faults.py --out "$out/fleet-faults" -- recipes/gpu-1p1d-graphs.toml --load-format dummy --model "$model" \
        "--vllm-args=$alone"
    local alone="$short_graphs --kv-cache-memory-bytes 33000000000"
    search search-512-2p2d gpu-1p1d-graphs 40 4 $two_each $short --against disaggregated
    search search-512-4-replicas gpu-1p1d-graphs 30 4 $two_each $short --against replicas
}

fleet_tuned() { # with the remedies of what ended the searches of fleet: steps within the graphs, two API servers where tokens are sent
    local alone="$alone --max-num-batched-tokens 4224" two_each="--prefill-instances 2 --decode-instances 2"
    local servers="--decode-args=--api-server-count=2 --replica-args=--api-server-count=2"
    search tuned-2p2d gpu-1p1d-graphs 50 4.5 $two_each $servers --against disaggregated
    search tuned-4-replicas gpu-1p1d-graphs 50 4.5 $two_each $servers --against replicas
    search tuned-3p1d gpu-1p1d-graphs 35 4 --prefill-instances 3 $servers --against disaggregated
    alone="$short_tuned"
    search tuned-512-2p2d gpu-1p1d-graphs 25 5.5 $two_each $short $servers --against disaggregated
    search tuned-512-4-replicas gpu-1p1d-graphs 38 5.5 $two_each $short $servers --against replicas
}

fleet_512() { # as many tokens out as in: what fleet-tuned left
    local alone="$short_tuned" servers="--decode-args=--api-server-count=4 --replica-args=--api-server-count=4"
    search short-1p3d gpu-1p1d-graphs 50 5.5 --decode-instances 3 $short $servers --against disaggregated
    search short-4-replicas gpu-1p1d-graphs 60 5.5 --prefill-instances 2 --decode-instances 2 $short $servers --against replicas
    search short-3p1d gpu-1p1d-graphs 15 4.5 --prefill-instances 3 $short $servers --against disaggregated
}

for group in "$@"; do
    case $group in
    two-gpu)
        two_gpu_a &
        two_gpu_b &
        wait
        ;;
    connector)
        if [ "$(nvidia-smi --list-gpus | wc -l)" -lt 4 ]; then
            cost
            connector_a
            kv_tests
        else
            connector_a &
            connector_b "$lane_b" &
            wait
        fi
        second_turn
        ;;
    tensor-parallel) tensor_parallel ;;
    tensor-parallel-load) tensor_parallel_load ;;
    fleet) fleet ;;
    fleet-tuned) fleet_tuned ;;
    fleet-512) fleet_512 ;;
    rivals) rivals ;;
    wire) connector_a ;;
    connector-checks) connector_checks ;;
    builtin) builtin ;;
    first-token) first_token first-token 4,8,16 33 "" ;;
    first-token-load) first_token first-token-load 24,28,32 30 "" ;; # where prefill has a queue
    dense) dense dense replicas,disaggregated "" ;;
    dense-lanes) dense_lanes ;;
    calibrate) calibrate ;;
    one-gpu) one_gpu ;;
    *)
        echo "no group $group: two-gpu, connector, tensor-parallel, tensor-parallel-load, fleet, fleet-tuned, fleet-512, rivals, wire, connector-checks, builtin, first-token, first-token-load, dense, dense-lanes, calibrate, one-gpu" >&2
        exit 2
        ;;
    esac
done
