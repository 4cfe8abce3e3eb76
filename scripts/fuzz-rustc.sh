#!/usr/bin/env bash
# The compiler of scripts/fuzz.sh. What it compiles of the crate, and of others into it, counts what is reached and checks
# arithmetic; all else, the targets themselves too, is as in a release build.
case " $* " in
  *" --crate-name candle_pq_attn "*) ;;
  *) exec "$@" ;;
esac
exec "$@" -Cdebug-assertions=on -Coverflow-checks=on -Cdebuginfo=line-tables-only -Cpasses=sancov-module \
  -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
  -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares
