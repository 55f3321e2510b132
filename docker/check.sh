#!/bin/sh
# Lints the Dockerfile and validates the compose files: `make check-containers`.
set -eu
cd "$(dirname "$0")"

hadolint Dockerfile

if docker compose version >/dev/null 2>&1; then
  set -- docker compose
elif command -v docker-compose >/dev/null; then
  set -- docker-compose
else
  echo "neither docker compose nor docker-compose is here: compose files were NOT validated" >&2
  exit 0
fi
# What docker/.env holds in earnest.
export GRAFANA_ADMIN_PASSWORD=x S3_ACCESS_KEY=x S3_SECRET_KEY=x
for file in compose.yaml monitoring.yaml; do
  "$@" --file "$file" config --quiet
done
