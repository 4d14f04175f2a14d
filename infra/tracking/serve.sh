#!/usr/bin/env bash
# The tracking stack as plain commands, without containers: PostgreSQL 15 or newer, the MLflow server
# behind it and optuna-dashboard (if installed), in one folder, on loopback, until Ctrl-C.
#
#   infra/tracking/serve.sh ~/prunefield-tracking
#
# Artifacts go to the folder, or to ARTIFACTS=s3://bucket/prefix with the usual AWS_… variables.
# MLFLOW_PORT, OPTUNA_PORT and POSTGRES_PORT change the ports (5000, 8080, 5433).
set -euo pipefail
umask 077

root=$(realpath -m "${1:?usage: serve.sh FOLDER}")
mlflow_port=${MLFLOW_PORT:-5000}
optuna_port=${OPTUNA_PORT:-8080}
postgres_port=${POSTGRES_PORT:-5433}
artifacts=${ARTIFACTS:-$root/artifacts}
tools=${POSTGRES_BIN:-$(dirname "$(command -v initdb || echo /usr/lib/postgresql/15/bin/initdb)")}

if [ "$(id -u)" = 0 ]; then
    echo "PostgreSQL refuses to run as root: use another user" >&2
    exit 1
fi
mkdir -p "$root"
data=$root/postgres
secret=$root/password
if [ ! -s "$secret" ]; then
    python3 -c 'import secrets; print(secrets.token_hex(24))' >"$secret"
fi
if [ ! -s "$data/PG_VERSION" ]; then
    "$tools/initdb" -D "$data" -U prunefield --auth=scram-sha-256 --pwfile="$secret" \
        --encoding=UTF8 --locale=C >/dev/null
fi
PGPASSWORD=$(cat "$secret")
export PGPASSWORD PGHOST=127.0.0.1 PGPORT=$postgres_port PGUSER=prunefield

servers=()
end() {
    trap - EXIT TERM INT
    for server in "${servers[@]}"; do kill "$server" 2>/dev/null || true; done
    wait "${servers[@]}" 2>/dev/null || true
    "$tools/pg_ctl" -D "$data" -m fast -w stop >/dev/null || true
}
trap end EXIT
trap 'exit 0' TERM INT

"$tools/pg_ctl" -D "$data" -w -l "$root/postgres.log" \
    -o "-p $postgres_port -c listen_addresses=127.0.0.1 -c unix_socket_directories='$root'" \
    start >/dev/null
for database in mlflow optuna; do
    "$tools/psql" -d postgres -Atc "SELECT 1 FROM pg_database WHERE datname = '$database'" |
        grep -q 1 || "$tools/createdb" "$database"
done

# libpq reads the password from PGPASSWORD: it is in no command line and in no address.
MLFLOW_BACKEND_STORE_URI="postgresql+psycopg://prunefield@127.0.0.1:$postgres_port/mlflow" \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
    mlflow server --host 127.0.0.1 --port "$mlflow_port" --workers 1 \
    --artifacts-destination "$artifacts" >"$root/mlflow.log" 2>&1 &
servers+=($!)
echo "tracking: {uri: http://127.0.0.1:$mlflow_port}"
if command -v optuna-dashboard >/dev/null; then
    studies="postgresql+psycopg://prunefield@127.0.0.1:$postgres_port/optuna"
    # It makes the tables, without which the dashboard ends at once.
    optuna studies --storage "$studies" >"$root/optuna.log" 2>&1
    optuna-dashboard --host 127.0.0.1 --port "$optuna_port" "$studies" \
        >>"$root/optuna.log" 2>&1 &
    servers+=($!)
    echo "optuna-dashboard: http://127.0.0.1:$optuna_port"
fi
echo "logs in $root; Ctrl-C ends it"
wait -n "${servers[@]}"
