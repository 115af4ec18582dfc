#!/usr/bin/env bash
# Starts the development service from this checkout. start-backend.sh contains the code of both services, so that they
# are checked and started in the same way.
set -euo pipefail
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/start-backend.sh" --as-development "$@"
