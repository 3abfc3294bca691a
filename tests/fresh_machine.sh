#!/bin/bash
# Walks through README.md on a machine that has nothing: a fresh Debian 12 in a chroot, as a user without rights.
#
#   tests/fresh_machine.sh [serve|test|all] [FOLDER]
#
# serve: `make serve` until GET /ready answers, two requests, Ctrl-C. test: `make test`. all (the default): both.
# The commit HEAD is what is tried. The system is made in FOLDER, which is kept and used again (10 GB), else in a
# temporary folder that is deleted at the end. Needs root, debootstrap, and an apt that is set up for Debian 12.
# pip in there looks where pip on this machine looks. Everything is mounted in a mount namespace of its own, and every
# process started in a process namespace of its own: when the script ends, however it ends, both are gone.
set -euo pipefail

suite=bookworm
packages=python3,python3-venv,make,git,curl,ca-certificates
user=stranger
ready_limit_s=1800
script=$(readlink -f "${BASH_SOURCE[0]}")
project=$(dirname "$(dirname "$script")")

fail() {
  echo "fresh_machine: $*" >&2
  exit 1
}

# Says how long a step took: step NAME COMMAND...
step() {
  local name=$1 started=$SECONDS
  shift
  "$@"
  printf 'fresh_machine: %-50s %5d s\n' "$name" $((SECONDS - started))
}

# ---- outside: check, make the folder, go into namespaces of our own ----

outside() {
  local mode=${1:-all}
  [[ $mode == serve || $mode == test || $mode == all ]] || fail "found $mode, expected serve, test or all"
  [[ $(id -u) == 0 ]] || fail "found user $(id -un), expected root: debootstrap and chroot need it"
  command -v debootstrap >/dev/null || fail "found no debootstrap: apt-get install debootstrap"
  git -C "$project" diff --quiet HEAD || echo "fresh_machine: changes that are not committed are left out" >&2
  if [[ -n ${2:-} ]]; then
    folder=$(readlink -m "$2")
    mkdir -p "$folder"
  else
    folder=$(mktemp -d)
    trap 'rm -rf --one-file-system "$folder"' EXIT
  fi
  unshare --mount --pid --fork --kill-child bash "$script" --inside "$mode" "$folder"
}

# ---- inside the namespaces ----

inside() {
  local mode=$1 root=$2/root
  make_system "$root"
  mount_system "$root"
  pass_network "$root"
  pass_pip "$root"
  copy_project "$root"
  check_libnuma "$root"
  if [[ $mode != test ]]; then try_serve "$root"; fi
  if [[ $mode != serve ]]; then step "make test" as_user "$root" "cd perft-server && make test"; fi
  say_sizes "$root"
}

make_system() {
  local root=$1 mirror
  if [[ -e $root/.made ]]; then return; fi
  mirror=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages' 'Component: main' |
    awk -v suite=$suite '$1 == suite { print $2; exit }')
  [[ -n $mirror ]] || fail "apt of this machine has no source for Debian $suite"
  rm -rf --one-file-system "$root"
  step "debootstrap of Debian $suite" run_quietly \
    debootstrap --variant=minbase --include="$packages" "$suite" "$root" "$mirror"
  chroot "$root" useradd --create-home "$user"
  touch "$root/.made"
}

run_quietly() {
  local log
  log=$(mktemp)
  "$@" >"$log" 2>&1 || { tail -n 20 "$log" >&2; rm "$log"; fail "$1 failed"; }
  rm "$log"
}

mount_system() {
  mount -t proc proc "$1/proc"
  mount --rbind /sys "$1/sys"
  mount --rbind /dev "$1/dev"
}

pass_network() {
  cp -L /etc/resolv.conf /etc/hosts "$1/etc/"
}

# Where this machine's pip looks: its configuration files, its environment, and the local paths that these name.
pass_pip() {
  local root=$1 file path home=/home/$user
  local -a files=(/etc/pip.conf "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf" "$HOME/.pip/pip.conf")
  local -a system_files
  IFS=: read -ra system_files <<<"${XDG_CONFIG_DIRS:-/etc/xdg}"
  mkdir -p "$root$home/.config/pip"
  {
    for file in "${system_files[@]/%//pip/pip.conf}" "${files[@]}"; do
      if [[ ! -f $file ]]; then continue; fi
      if [[ $file == "$HOME"/* ]]; then
        cp "$file" "$root$home/.config/pip/pip.conf"
      else
        install -D -m 644 "$file" "$root$file"
      fi
      cat "$file"
    done
    env | grep -E '^PIP_' || true
  } >"$root/.pip-settings"
  if [[ -f ${PIP_CONFIG_FILE:-} ]]; then cat "$PIP_CONFIG_FILE" >>"$root/.pip-settings"; fi
  # Local paths, file:// ones too; a folder /x/simple is an index whose pages link to files beside it.
  sed -E 's#https?://[^[:space:]]*##g; s#file://##g' "$root/.pip-settings" | grep -oE '/[^[:space:],;=]+' |
    sed 's#/simple/*$##' | sort -u | while read -r path; do
    if [[ -d $path ]] && ! mountpoint -q "$root$path"; then
      mkdir -p "$root$path"
      mount --rbind "$path" "$root$path"
    elif [[ -f $path ]]; then
      install -D -m 644 "$(readlink -f "$path")" "$root$path"
    fi
  done
  rm "$root/.pip-settings"
  chroot "$root" chown -R "$user:$user" "$home/.config"
}

copy_project() {
  local root=$1 home=/home/$user
  git -C "$project" bundle create --quiet "$root/perft-server.bundle" HEAD
  if [[ -d $root$home/perft-server ]]; then
    as_user "$root" "cd perft-server && git fetch --quiet /perft-server.bundle HEAD && git reset --quiet --hard FETCH_HEAD"
  else
    as_user "$root" "git -c advice.detachedHead=false clone --quiet /perft-server.bundle perft-server"
  fi
  echo "fresh_machine: $(as_user "$root" "git -C perft-server log -1 --format='%h %s'")"
}

# Runs a shell command in the system as the user, with nothing of this machine's environment but the way to the network.
as_user() {
  local root=$1 command=$2 setting
  local -a kept=()
  while IFS= read -r -d '' setting; do
    if [[ $setting =~ ^(PIP_[A-Z_]+|https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY)= ]]; then kept+=("$setting"); fi
  done < <(env -0)
  chroot --userspec="$user:$user" "$root" env -i HOME="/home/$user" USER="$user" LANG=C.UTF-8 \
    PATH=/usr/local/bin:/usr/bin:/bin "${kept[@]}" bash -c "cd && $command"
}

# Without libnuma1 the set-up asks for it by name before anything is downloaded; then it is installed as it says.
check_libnuma() {
  local root=$1 said
  if [[ -e $root/usr/lib/x86_64-linux-gnu/libnuma.so.1 ]]; then return; fi
  if said=$(as_user "$root" "cd perft-server && make serve" 2>&1); then fail "make serve ran without libnuma.so.1"; fi
  echo "$said"
  [[ $said == *"apt-get install libnuma1"* ]] || fail "the message does not name libnuma1"
  [[ ! -e $root/home/$user/perft-server/.venv ]] || fail "something was installed before the message"
  step "apt-get install libnuma1" run_quietly chroot "$root" apt-get install -y libnuma1
}

try_serve() {
  local root=$1 port log=$1/tmp/serve.log started=$SECONDS server
  [[ ! -e $root/usr/bin/g++ && ! -e $root/usr/bin/cc ]] || fail "found a compiler, expected a system without one"
  port=$(chroot "$root" python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
  set -m # the server as a process group of its own, to be interrupted as a whole
  as_user "$root" "cd perft-server && exec make serve PORT=$port" >"$log" 2>&1 &
  server=$!
  set +m
  until curl -sf -o /dev/null "http://127.0.0.1:$port/ready"; do
    kill -0 "$server" 2>/dev/null || { tail -n 40 "$log" >&2; fail "make serve ended before it was ready"; }
    ((SECONDS - started < ready_limit_s)) || { tail -n 40 "$log" >&2; fail "not ready after $ready_limit_s s"; }
    sleep 1
  done
  printf 'fresh_machine: %-50s %5d s\n' "make serve until it is ready" $((SECONDS - started))
  step "a chat completion with log-probabilities" ask "$root" "$port" Paris '{"model": "pirate", "temperature": 0,
    "max_tokens": 40, "logprobs": true, "messages": [{"role": "user", "content": "What is the capital of France?"}]}'
  step "a structured answer" ask "$root" "$port" 'answer\":' '{"model": "demo-base", "temperature": 0,
    "max_tokens": 40, "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 20}}, "required": ["answer"]}}}}'
  printf 'fresh_machine: %-50s %5d MB\n' "memory of all its processes" "$(memory_of "$root")"
  kill -INT -- "-$server" # Ctrl-C
  step "until it has ended" wait_for_end "$server" "$port"
}

ask() {
  local root=$1 port=$2 expected=$3 body=$4 answer
  answer=$(as_user "$root" "curl -sS http://127.0.0.1:$port/v1/chat/completions \
    -H 'Content-Type: application/json' -d '$body'")
  [[ $answer == *"$expected"* ]] || fail "found $answer, expected $expected in it"
  echo "fresh_machine: $(head -c 300 <<<"$answer") ..."
}

# Proportional set size, in MB, of every process of the user.
memory_of() {
  local uid
  uid=$(chroot "$1" id -u "$user")
  find /proc -maxdepth 1 -regex '/proc/[0-9]+' -uid "$uid" -exec cat {}/smaps_rollup \; 2>/dev/null |
    awk '/^Pss:/ { sum += $2 } END { printf "%d", sum / 1000 }'
}

wait_for_end() {
  local server=$1 port=$2 limit=$((SECONDS + 60))
  while kill -0 -- "-$server" 2>/dev/null; do
    ((SECONDS < limit)) || fail "the server's processes are still there after 60 s"
    sleep 0.2
  done
  if curl -s -o /dev/null "http://127.0.0.1:$port/health"; then fail "something still listens on port $port"; fi
}

say_sizes() {
  as_user "$1" "du -sm perft-server/.venv .cache/*" | sed 's/^\([0-9]*\)\t/fresh_machine: \1 MB in /'
}

if [[ ${1:-} == --inside ]]; then
  mount -t proc proc /proc # of our own process namespace
  inside "${@:2}"
else
  outside "$@"
fi
