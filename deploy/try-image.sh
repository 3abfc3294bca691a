#!/bin/bash
# Builds the image of the Dockerfile's target `cpu`, runs it as compose.yaml runs its server, asks it, and stops it.
#
#   deploy/try-image.sh [docker|podman|buildah] [ARGUMENTS OF THE BUILD ...]
#
# Without a first argument: docker if its daemon answers, else podman, else buildah. The server serves the demo base,
# which it builds at its first start. TRY_HOME=VOLUME (or a folder that belongs to user 10001) keeps its home, with the
# demo base in it, for the next run. It answers on PORT (8000) of 127.0.0.1. buildah needs root, has no read-only root
# file system, and its server is on the host's network, always on 8000; where it cannot start containers,
# BUILDAH_ISOLATION=chroot runs them in a changed root.
set -euo pipefail

deploy=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
image=perft-server:cpu
name=perft-try-$$
user=10001
port=${PORT:-8000}
ready_limit_s=1200
started=$SECONDS

fail() {
  echo "try-image: $*" >&2
  if [[ -s ${log:-} ]]; then tail -n 30 "$log" >&2; fi
  exit 1
}

say() { printf 'try-image: %4d s  %s\n' $((SECONDS - started)) "$*"; }

tool=${1:-}
if [[ $# -gt 0 ]]; then shift; fi
if [[ -z $tool ]]; then
  if docker info >/dev/null 2>&1; then tool=docker
  elif podman info >/dev/null 2>&1; then tool=podman
  else tool=buildah; fi
fi
[[ $tool == docker || $tool == podman || $tool == buildah ]] || fail "found $tool, expected docker, podman or buildah"
command -v "$tool" >/dev/null || fail "found no $tool, expected docker with its daemon, podman or buildah: install one"
if [[ $tool == buildah ]]; then port=8000; fi
if curl -s -o /dev/null "http://127.0.0.1:$port"; then fail "port $port is taken, expected a free one: set PORT"; fi

work=$(mktemp -d)
log=$work/log
home=${TRY_HOME:-}
server= # of buildah: the process that runs the container

clean_up() {
  case $tool in
    buildah)
      if [[ -n $server ]]; then signal_server KILL || true; fi
      buildah rm "$name" >/dev/null 2>&1 || true
      ;;
    *)
      "$tool" rm --force "$name" >/dev/null 2>&1 || true
      if [[ -z ${TRY_HOME:-} ]]; then "$tool" volume rm "$name" >/dev/null 2>&1 || true; fi
      ;;
  esac
  rm -rf "$work"
}
trap clean_up EXIT

# ---- what differs between the tools ----

build() {
  case $tool in
    buildah) buildah bud --layers --format docker --target cpu --tag "$image" "$@" "$deploy/.." ;;
    *) "$tool" build --target cpu --tag "$image" "$@" "$deploy/.." ;;
  esac
}

start() {
  local -a mounts=(--volume "$deploy/start-server.sh:/usr/local/bin/start-server:ro")
  for secret in api_keys admin_key metrics_key; do
    mounts+=(--volume "$work/secrets/$secret:/run/secrets/$secret:ro")
  done
  if [[ $tool == buildah ]]; then
    home=${home:-$work/home}
    if [[ ! -d $home ]]; then install -d -o $user -g $user "$home"; fi
    buildah from --pull-never --name "$name" "$image" >/dev/null
    buildah run --network host --cap-drop ALL "${mounts[@]}" --volume "$home:/home/perft" "$name" -- \
      sh /usr/local/bin/start-server >"$log" 2>&1 &
    server=$!
  else
    "$tool" run --detach --name "$name" --entrypoint sh --publish "127.0.0.1:$port:8000" --shm-size 2g \
      --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
      "${mounts[@]}" --volume "${home:-$name}:/home/perft" "$image" /usr/local/bin/start-server >/dev/null
  fi
}

is_running() {
  if [[ $tool == buildah ]]; then kill -0 "$server" 2>/dev/null
  else [[ $("$tool" inspect --format '{{.State.Running}}' "$name") == true ]]; fi
}

inside() {
  if [[ $tool == buildah ]]; then buildah run "$name" -- "$@"; else "$tool" exec "$name" "$@"; fi
}

read_log() {
  if [[ $tool != buildah ]]; then "$tool" logs "$name" >"$log" 2>&1; fi
}

# A signal to the container's first process. buildah passes none on: that process is the last of a chain of children.
signal_server() {
  local process=$server child
  if [[ $tool != buildah ]]; then "$tool" kill --signal "$1" "$name" >/dev/null; return; fi
  while child=$(pgrep --parent "$process" --oldest) && ! is_perft "$process"; do process=$child; done
  kill -s "$1" "$process"
}

is_perft() { [[ $(tr '\0' ' ' <"/proc/$1/cmdline") == *"perft serve"* ]]; }

# Sets `status` to that of the container's first process. (Only the shell that started buildah can wait for it.)
wait_for_end() {
  status=0
  if [[ $tool == buildah ]]; then wait "$server" || status=$?; server=
  else status=$("$tool" wait "$name"); fi
}

# ---- the same for all ----

ask() { curl -sS --max-time 120 "http://127.0.0.1:$port$1" "${@:2}"; }

status_of() { ask "$1" -o /dev/null -w '%{http_code}' "${@:2}"; }

# expect WHAT FOUND EXPECTED: numbers are compared, other text must be part of what was found.
expect() {
  local what=$1 found=$2 expected=$3
  [[ $found == "$expected" || $expected == *[!0-9]* && $found == *"$expected"* ]] || fail "$what: found ${found:-nothing}, expected $expected"
  say "$what: ${found:0:160}"
}

build "$@" >"$log" 2>&1 || fail "the image could not be built"
say "built $image"
bash "$deploy/make-secrets.sh" "$work/secrets" >/dev/null

api_key=$(cut -d = -f 2 "$work/secrets/api_keys")
start
until ask /ready -f -o /dev/null 2>/dev/null; do
  is_running || { read_log; fail "the server ended before it was ready"; }
  ((SECONDS - started < ready_limit_s)) || { read_log; fail "not ready after $ready_limit_s s"; }
  sleep 1
done
read_log
say "ready; of its log: $(grep -h -m 1 -o 'built in [0-9]* s' "$log" || echo 'the demo base was there')"

expect "the image's user" "$(inside id -u)" $user
expect "compilers in the image" "$(inside sh -c 'command -v cc gcc g++ clang || echo none')" none
expect "its health check" "$(inside curl -fsS http://127.0.0.1:8000/ready && echo passed)" passed
expect "a completion without a key" "$(status_of /v1/completions -d '{}' -H 'Content-Type: application/json')" 401
request='"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0'
expect "a completion by an adapter" "$(ask /v1/chat/completions -H "Authorization: Bearer $api_key" \
  -H 'Content-Type: application/json' -d "{\"model\": \"pirate\", $request, \"max_tokens\": 40, \"logprobs\": true}" |
  grep -o '"content":"[^"]*"' | head -n 1)" Paris
expect "/metrics without a key" "$(status_of /metrics)" 401
expect "/metrics with its key" "$(ask /metrics -H "Authorization: Bearer $(cat "$work/secrets/metrics_key")" |
  grep '^perft_adapter_generation_tokens_total.*pirate')" pirate

ask /v1/chat/completions -N -H "Authorization: Bearer $api_key" -H 'Content-Type: application/json' \
  -d "{\"model\": \"pirate\", $request, \"max_tokens\": 200, \"ignore_eos\": true, \"stream\": true}" >"$work/stream" &
stream=$!
until grep -q '"content":"[^"]' "$work/stream"; do kill -0 $stream 2>/dev/null || fail "no stream"; sleep 0.1; done
signal_server TERM
say "SIGTERM, while a stream is running"
until [[ $(status_of /ready) == 503 ]]; do sleep 0.1; done
say "/ready says 503"
wait $stream || fail "the stream was cut off"
expect "the stream's last line" "$(grep . "$work/stream" | tail -n 1)" 'data: [DONE]'
say "the stream's events: $(grep -c '^data: {' "$work/stream")"
wait_for_end
read_log
expect "the container's exit status" "$status" 0
say "the last line of its log: $(tail -n 1 "$log")"
