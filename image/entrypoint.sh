#!/bin/sh
# The image's entry point: a command is run as it is (`selectmoe run ...`, `mlflow server ...`, what KFP gives);
# nothing, or options alone, are for selectmoe (`docker run select-moe:dev --help`).
set -eu
case "${1:-}" in
  "" | -*) set -- selectmoe "$@" ;;
esac
exec "$@"
