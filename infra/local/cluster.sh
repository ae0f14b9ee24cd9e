#!/usr/bin/env bash
# The cluster on one machine: a Ray head with token authentication, an S3 server (moto) and an MLflow server with
# artifact proxy, each on a free port of 127.0.0.1. Stays in the foreground; Ctrl-C ends what it started.
#   infra/local/cluster.sh FOLDER     keeps the MLflow database, token, logs and cluster.env in FOLDER
# The S3 server keeps its objects in memory: they are gone when it ends.
set -euo pipefail
mkdir -p "${1:?usage: infra/local/cluster.sh FOLDER}"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."  # Ray starts where pipelines/ is, as in the image
PATH="$PWD/.venv/bin:$PATH"
unset RAY_ADDRESS

pids=()
end() {
  trap - EXIT INT TERM
  rm -f "$folder/cluster.env"
  ((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null || true
  wait
}
trap end EXIT
trap 'exit 0' INT TERM

start() {  # NAME COMMAND...
  "${@:2}" >"$folder/$1.log" 2>&1 &
  pids+=($!)
}

answers() {  # NAME URL: waits until the server answers, or says where its log is
  for _ in $(seq 240); do
    curl --silent --output /dev/null --max-time 2 "$2" && return
    kill -0 "${pids[-1]}" 2>/dev/null || break
    sleep 0.5
  done
  echo "the $1 server does not answer, see $folder/$1.log" >&2
  exit 1
}

read -r s3 mlflow gcs dashboard agent client < <(python - <<'PY'
import socket

probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
print(*(probe.getsockname()[1] for probe in probes))
PY
)

umask 077
python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$folder/token"
cat >"$folder/settings" <<EOF
export AWS_ENDPOINT_URL=http://127.0.0.1:$s3
export AWS_ACCESS_KEY_ID=local
export AWS_SECRET_ACCESS_KEY=local
export AWS_DEFAULT_REGION=us-east-1
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
export MLFLOW_TRACKING_URI=http://127.0.0.1:$mlflow
export CASCADE_STORAGE=s3://cascade/runs
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$folder/token"
EOF
source "$folder/settings"

start s3 python -m moto.server --host 127.0.0.1 --port "$s3"
answers s3 "$AWS_ENDPOINT_URL/moto-api/"
python -c 'import s3fs; [s3fs.S3FileSystem().mkdir(bucket) for bucket in ("cascade", "mlflow")]'

start mlflow mlflow server --host 127.0.0.1 --port "$mlflow" --workers 1 --serve-artifacts \
  --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination s3://mlflow
answers mlflow "$MLFLOW_TRACKING_URI/health"

# More logical CPUs than cores: they are tokens, and several stages and their readers must run at once.
# GPUs are those that torch can use: Ray itself also counts Apple's.
# Workers as nice as this script, and 503 where a service's own process is lost: both for `cascade serve`.
export RAY_worker_niceness=0
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=image_cascade.components.serving.middleware:middlewares
cores=$(getconf _NPROCESSORS_ONLN)
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
start ray ray start --head --block --disable-usage-stats \
  --num-cpus $((4 * cores > 8 ? 4 * cores : 8)) --num-gpus "$gpus" \
  --node-ip-address 127.0.0.1 --port "$gcs" --ray-client-server-port "$client" \
  --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --dashboard-agent-listen-port "$agent"
answers ray "$RAY_API_SERVER_ADDRESS/api/version"

mv "$folder/settings" "$folder/cluster.env"
echo "Ready. In another terminal:"
echo "  source $folder/cluster.env"
echo "  ray job submit -- python pipelines/full_cascade.py --recipe smoke"
wait -n "${pids[@]}"
echo "one of the servers ended, see the logs in $folder" >&2
exit 1
