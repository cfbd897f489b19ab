#!/bin/sh
# Makes deploy/secrets: one file for each secret of docker-compose.yml, readable by you alone. Never replaces one.
set -eu
umask 077
cd "$(dirname "$0")"
if [ -e secrets ]; then
  echo "error: deploy/secrets is there already, and the database was made with what is in it" >&2
  exit 1
fi
mkdir secrets

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

postgres=$(random)
redis=$(random)
printf '*\n' > secrets/.gitignore
printf '%s' "$postgres" > secrets/postgres_password
printf 'postgresql://hone:%s@postgres:5432/hone' "$postgres" > secrets/database_url
printf '%s' "$redis" > secrets/redis_password
printf 'redis://:%s@redis:6379/0' "$redis" > secrets/redis_url
random > secrets/secret_key
echo "made deploy/secrets; containers read it as you: HONE_UID=$(id -u) docker compose --profile cpu up -d --build"
