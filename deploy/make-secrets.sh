#!/bin/sh
# Makes the secret files of compose.yaml beside this script (or in the folder given). Existing files are kept.
# Other users cannot enter the folder; its files are readable by all, because containers read them as their own users.
set -eu

folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
chmod 700 "$folder"

random() {
  od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

make() {
  [ -s "$folder/$1" ] && return
  printf '%s\n' "$2" >"$folder/$1.new"
  chmod 444 "$folder/$1.new"
  mv "$folder/$1.new" "$folder/$1"
  echo "made $folder/$1"
}

make api_keys "first=$(random)"
make admin_key "$(random)"
make metrics_key "$(random)"
make grafana_password "$(random)"
