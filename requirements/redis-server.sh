#!/bin/sh
# Makes sure that a redis-server is installed, from the system's own packages; says how where it can't.
set -eu

if command -v redis-server >/dev/null 2>&1; then
  exit 0
fi

if command -v apt-get >/dev/null 2>&1; then
  if [ "$(id -u)" = 0 ]; then
    as_root=""
  elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root="sudo"
  else
    echo "The tests need redis-server. Install it and run make test again:" >&2
    echo "    sudo apt-get install redis-server" >&2
    exit 1
  fi
  $as_root apt-get update
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends redis-server
elif command -v brew >/dev/null 2>&1; then
  brew install redis
else
  echo "The tests need redis-server (version 6 or newer) on the PATH." >&2
  echo "Install it with your system's package manager (dnf install redis, pacman -S redis, apk add redis)," >&2
  echo "then run make test again." >&2
  exit 1
fi

command -v redis-server >/dev/null 2>&1 || { echo "redis-server was installed but isn't on the PATH." >&2; exit 1; }
