#!/usr/bin/env bash
# Starts the production service from this checkout, or with --as-development, which start-backend-dev.sh passes, the
# development service.
set -euo pipefail

usage() {
  cat <<END
Usage: ./$NAME [--check | --prepare | --demo [--port N]]

Starts the $KIND service on port $USUAL_PORT. docs/operate.md lists the branches that it runs from.
Settings come from the environment or from a file .env next to this script.

  --check     check the branch, create or update venv/, and check the port, but do not start
  --prepare   like --check, but do not check the port, because a running service will hand it over
  --demo      start the service with a stand-in for the gateway and a temporary database, and print
              the curl commands of a first chat; needs no settings and no particular branch, and
              listens on 127.0.0.1 only
  --port N    use this port; only with --demo
  --help      print this text

Environment: PYTHON=/path/to/python3 selects the Python to use (3.11 or newer).
Exit status: 2 wrong options, 3 wrong branch, 4 the port is already in use, 5 the directory run/
cannot be used, 1 any other failure.
END
}

say() { printf '%s: %s\n' "$NAME" "$1" >&2; }

# fail MESSAGE [STATUS]: prints the message and exits, with status 1 by default.
fail() {
  say "$1"
  exit "${2:-1}"
}

read_options() {
  CHECK='' PREPARE='' DEMO='' PORT=''
  while (($#)); do
    case $1 in
      --check) CHECK=1 ;;
      --prepare) PREPARE=1 ;;
      --demo) DEMO=1 ;;
      --port)
        PORT=${2:-}
        if ! [[ $PORT =~ ^[1-9][0-9]{0,4}$ ]] || ((PORT > 65535)); then
          fail "--port requires a number from 1 to 65535." 2
        fi
        shift
        ;;
      -h | --help) usage && exit ;;
      *) fail "Unknown option: $1. See ./$NAME --help" 2 ;;
    esac
    shift
  done
  [[ -z $PORT || -n $DEMO ]] || fail "--port is allowed only with --demo; the $KIND service uses port $USUAL_PORT." 2
  PORT=${PORT:-$USUAL_PORT}
}

is_recent_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if is_recent_python "$candidate"; then
      PYTHON=$candidate
      return
    fi
    [[ $candidate != "${PYTHON:-}" ]] || fail "PYTHON=$PYTHON is not Python 3.11 or newer. Correct it or unset it."
  done
  fail "Python 3.11 or newer was not found. Install it, or set PYTHON=/path/to/python3."
}

# checkout.py defines which branch may run which service; the app imports it too, for /health.
check_branch() {
  local refused
  refused=$("$PYTHON" checkout.py "$KIND") || fail "$refused" 3
}

# Prints what venv/ depends on, in two lines: the Python version and the path; the SHA-256 of requirements.lock.
# venv/.stamp contains what they were when it was built.
describe_venv() {
  "$PYTHON" - <<'END'
import hashlib, pathlib, sys
print(sys.version.split()[0], pathlib.Path("venv").absolute())
print(hashlib.sha256(pathlib.Path("requirements.lock").read_bytes()).hexdigest())
END
}

# Runs a command, and shows its output only if it fails.
quietly() {
  local output
  output=$("$@" 2>&1) || fail "This command failed: $*
$output"
}

# Builds an environment for another Python next to the old one and renames it once it is complete, because a service
# may be running on the old one.
replace_venv() {
  quietly rm -rf venv.new venv.old
  quietly "$PYTHON" -m venv venv.new
  quietly venv.new/bin/python -m pip install "$@" --require-hashes -r requirements.lock
  [[ ! -d venv ]] || mv venv venv.old
  mv venv.new venv
  quietly "$PYTHON" -m venv venv # rewrites the activation scripts, which contain the old path
  rm -rf venv.old
}

build_venv() {
  local wanted found= options=(--quiet --disable-pip-version-check --no-input)
  wanted=$(describe_venv)
  [[ ! -f venv/.stamp ]] || found=$(<venv/.stamp)
  [[ $found != "$wanted" ]] || return 0
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$PYTHON has no module venv. On Debian and Ubuntu: apt-get install python3-venv"
  say "Installing the packages of requirements.lock into venv/; this takes about a minute."
  if [[ ${found%%$'\n'*} != "${wanted%%$'\n'*}" ]]; then
    replace_venv "${options[@]}"
  elif [[ $found == "${wanted%%$'\n'*}" ]]; then
    options+=(--force-reinstall) # the last installation was interrupted and may have left incomplete packages
  fi
  # The packages are installed in place, because a service may be running on them. The stamp gets its second line only
  # afterwards, so that the next start repeats an interrupted installation.
  printf '%s\n' "${wanted%%$'\n'*}" >venv/.stamp
  quietly venv/bin/python -m pip install "${options[@]}" --require-hashes -r requirements.lock
  printf '%s\n' "$wanted" >venv/.stamp
}

refresh_venv() {
  (
    flock --nonblock 9 || { say "Another start script is updating venv/, waiting until it is done." && flock 9; }
    build_venv
  ) 9<.
}

check_port() {
  local problem holder
  problem=$("$PYTHON" - "$HOST" "$PORT" 2>&1 <<'END'
import socket, sys
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((sys.argv[1], int(sys.argv[2])))
    except OSError as error:
        sys.exit(error.strerror)
END
  ) && return
  [[ $problem == 'Address already in use' ]] || fail "Cannot listen on $HOST:$PORT: $problem." 4
  holder=$(ss -Hltnp "sport = :$PORT" 2>/dev/null | sed -nE 's/.*pid=([0-9]+).*/process \1/p' | head -n 1) || holder=''
  holder=${holder:-another process}
  fail "Port $PORT is already in use by $holder. Stop that process${DEMO:+, or choose another port with --port}." 4
}

# Sets a database of its own for development, unless the environment or .env sets DB_PATH.
choose_database() {
  [[ $KIND == development ]] || return 0
  if ! grep -qiE "^\s*(export\s+)?DB_PATH\s*=\s*[\"']?[^\"'#[:space:]]" .env 2>/dev/null; then
    export DB_PATH="${DB_PATH:-clawdbot_adapter_dev.db}"
  fi
}

# Replaces this script by the front (see serve.py). Before it starts a worker, the front calls this script again, with
# --check or --prepare.
serve_under_pm2() {
  exec "$PYTHON" serve.py --host "$HOST" --port "$PORT" --front "./$NAME" \
    ${NODE_CHANNEL_FD:+--pm2 "$NODE_CHANNEL_FD"}
}

serve() {
  local options=(--host "$HOST" --port "$PORT") directory
  [[ $KIND == development ]] || exec venv/bin/python serve.py "${options[@]}"
  # Agents write code below projects/, which must not restart the service. uvicorn excludes only directories that exist.
  mkdir -p projects
  options+=(--no-access-log --timeout-graceful-shutdown 10 --reload)
  for directory in projects tests venv; do options+=(--reload-exclude "$PWD/$directory"); done
  exec venv/bin/python -m uvicorn app:app "${options[@]}"
}

demo() {
  DEMO_DIR=$(mktemp -d)
  DEMO_TOKEN=$("$PYTHON" -c 'import secrets; print(secrets.token_hex(16))')
  DEMO_PIDS=()
  trap end_demo EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  env -i PATH="$PATH" venv/bin/python demo.py --token "$DEMO_TOKEN" \
    --port-file "$DEMO_DIR/port" >&2 &
  DEMO_PIDS+=($!)
  wait_for $! "The stand-in gateway" test -s "$DEMO_DIR/port"
  serve_demo "http://127.0.0.1:$(<"$DEMO_DIR/port")" >&2 &
  DEMO_PIDS+=($!)
  wait_for $! "The service" is_healthy
  first_chat
  # `wait -n` would miss one that ended just before it.
  while kill -0 "${DEMO_PIDS[0]}" 2>/dev/null && kill -0 "${DEMO_PIDS[1]}" 2>/dev/null; do sleep 0.2; done
  fail "The demo ended by itself; see above."
}

# Nothing of the caller's settings gets in. Each is named here, for one that is not set would be read from .env.
serve_demo() {
  exec env -i PATH="$PATH" HOME="${HOME:-/}" LANG=C.UTF-8 \
    DB_PATH="$DEMO_DIR/demo.db" DATA_DIR="$DEMO_DIR" PROJECTS_DIR="$DEMO_DIR/projects" \
    CLAWDBOT_BASE_URL="$1" CLAWDBOT_TOKEN="$DEMO_TOKEN" CLAWDBOT_TIMEOUT=600 \
    PUBLIC_BASE_URL="http://$HOST:$PORT" CORS_ORIGINS='*' JWT_SECRET="$DEMO_TOKEN$DEMO_TOKEN" TOKEN_TTL=86400 \
    SIGNUP=open LOG_LEVEL=WARNING LOG_FORMAT=plain METRICS_TOKEN="$DEMO_TOKEN" PING_SECONDS=10 DRAIN_SECONDS=1 \
    venv/bin/python -m uvicorn app:app --host "$HOST" --port "$PORT" --no-access-log --log-level warning \
    --timeout-graceful-shutdown 2
}

# wait_for PID NAME COMMAND...: until the command succeeds, half a minute at most.
wait_for() {
  local pid=$1 name=$2 tries
  shift 2
  for ((tries = 0; tries < 150; tries++)); do
    if "$@"; then return; fi
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.2
  done
  fail "$name did not start; see above."
}

is_healthy() {
  "$PYTHON" -c 'import sys, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=2)' \
    "http://$HOST:$PORT/health" 2>/dev/null
}

end_demo() {
  trap '' INT TERM HUP
  kill "${DEMO_PIDS[@]}" 2>/dev/null || true
  wait
  rm -rf -- "$DEMO_DIR"
}

first_chat() {
  cat <<END
The demo runs on http://$HOST:$PORT until you press Ctrl-C, with a stand-in in place of an agent.
Paste this into another terminal for a first chat:

END
  printf "URL='http://%s:%s'\n" "$HOST" "$PORT"
  cat <<'END'
JSON='Content-Type: application/json'
EMAIL="demo-$RANDOM$RANDOM@example.com"
# an account
TOKEN=$(curl -sS "$URL/auth/signup" -H "$JSON" -d '{"email": "'$EMAIL'", "password": "correct horse"}' | sed -E 's/.*"access_token": *"([^"]+)".*/\1/')
# a project
PROJECT=$(curl -sS "$URL/projects" -H "Authorization: Bearer $TOKEN" -H "$JSON" -d '{"name": "First project"}' | sed -E 's/.*"id": *([0-9]+).*/\1/')
# a session in it
SESSION=$(curl -sS "$URL/projects/$PROJECT/sessions" -H "Authorization: Bearer $TOKEN" -H "$JSON" -d '{}' | sed -E 's/.*"session_key": *"([^"]+)".*/\1/')
# a message, and the reply as it arrives
curl -sSN "$URL/chat/stream" -H "Authorization: Bearer $TOKEN" -H "$JSON" -d '{"session_key": "'$SESSION'", "messages": [{"role": "user", "content": "Good morning. Who are you?"}]}'

END
}

main() {
  NAME=start-backend.sh KIND=production USUAL_PORT=8002 HOST=0.0.0.0
  if [[ ${1:-} == --as-development ]]; then
    NAME=start-backend-dev.sh KIND=development USUAL_PORT=8001
    shift
  fi
  read_options "$@"
  [[ -z $DEMO ]] || HOST=127.0.0.1
  cd -- "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
  find_python
  choose_database
  # PM2 sets pm_id. The front inherits it and passes it on to this script when it calls it with --check or --prepare.
  [[ -z ${pm_id:-} || -n $CHECK$PREPARE$DEMO ]] || serve_under_pm2
  [[ -n $DEMO ]] || check_branch
  refresh_venv
  [[ -n $PREPARE ]] || check_port
  [[ -z $CHECK$PREPARE ]] || return 0
  if [[ -n $DEMO ]]; then demo; else serve; fi
}

main "$@"
