#!/bin/sh
# The entry point of the server's container in compose.yaml: runs `perft serve` with the keys in the secret files and the
# arguments given. Without arguments it builds the demo base once (`python -m server.demo.base`) and serves it with the
# demo's adapters.
set -eu

secrets=${SECRETS_FOLDER:-/run/secrets}
for name in api_keys admin_key metrics_key; do
  if [ ! -s "$secrets/$name" ]; then
    echo "found no secret $name in $secrets: run deploy/make-secrets.sh first" >&2
    exit 1
  fi
  if [ ! -r "$secrets/$name" ]; then
    echo "found $(ls -ln "$secrets/$name"), expected a file that user $(id -u) may read: run chmod 444 on the host's" \
      "file, in a folder that only its owner enters" >&2
    exit 1
  fi
done
PERFT_API_KEYS=$(grep -v '^#' "$secrets/api_keys" | paste -s -d , -)
if [ -z "$PERFT_API_KEYS" ]; then
  echo "found no key in $secrets/api_keys, expected one LABEL=KEY per line: without one everybody may ask the server" >&2
  exit 1
fi
PERFT_ADMIN_KEY=$(cat "$secrets/admin_key")
PERFT_METRICS_KEY=$(cat "$secrets/metrics_key")
export PERFT_API_KEYS PERFT_ADMIN_KEY PERFT_METRICS_KEY

if [ "$#" -eq 0 ]; then
  python -m server.demo.base
  base=$(python -c 'from server.demo.base.build import default_folder; print(default_folder())')
  demo=$(python -c 'import server.demo; print(*server.demo.__path__)')
  set -- "$base" --served-model-name demo-base --dtype float32 --max-model-len 2048 --gpu-memory-utilization 0.5
  for adapter in "$demo"/adapters/*/; do
    set -- "$@" --adapter "$(basename "$adapter")=${adapter%/}"
  done
fi
exec perft serve "$@" --host 0.0.0.0 --port 8000
