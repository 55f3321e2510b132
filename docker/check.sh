#!/bin/sh
# Lints the Dockerfile and the scripts, and validates the compose files: `make check-containers`.
set -eu
cd "$(dirname "$0")"

hadolint Dockerfile
shellcheck ./*.sh

# What docker/.env holds in earnest.
export GRAFANA_ADMIN_PASSWORD=x S3_ACCESS_KEY=x S3_SECRET_KEY=x
for file in compose.yaml monitoring.yaml; do
  if docker compose version >/dev/null 2>&1; then
    docker compose --file "$file" --profile '*' config --quiet
  elif command -v docker-compose >/dev/null; then
    # The first Compose, which Debian 12 has, knows no `name`.
    sed '/^name:/d' "$file" | docker-compose --file - --project-directory . config --quiet
  else
    echo "docker/$file was NOT validated: there is neither docker compose nor docker-compose" >&2
  fi
done
