#!/usr/bin/env bash
# Starts the development service. What it does lies in start-backend.sh, so that the two cannot drift apart.
set -euo pipefail
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/start-backend.sh" --as-development "$@"
