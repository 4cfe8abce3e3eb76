#!/usr/bin/env python3
"""The search of one query on one thread, beside FAISS: 131,072 keys of 128 elements, k 128 and 2,048.

    python -m venv venv && venv/bin/pip install -r benches/peers/requirements.txt
    venv/bin/python benches/peers/cpu.py [--rounds N] [--json]

The bench `cpu` of this crate and FAISS take turns, so that both see the same machine; of each round the median counts,
and of the rounds the best. JSON lines are those of the benches, with the library in `by`. FAISS's scores are inner
products like ours; its fast scan returns what rounded tables rank first, ours the exact ranking.
"""

import argparse
import json
import pathlib
import subprocess
import time

import faiss
import numpy as np

KEYS, HEAD_DIM, QUERIES = 131_072, 128, 16
KS = (128, 2048)
IP = faiss.METRIC_INNER_PRODUCT
# Our case and what it measures; FAISS's index; bytes that a search must read.
PEERS = [
    ("pq-16x8", "search", lambda: faiss.IndexPQ(HEAD_DIM, 16, 8, IP), KEYS * 16 + 256 * HEAD_DIM * 4),
    ("pq-2x6", "search", lambda: faiss.IndexPQ(HEAD_DIM, 2, 6, IP), KEYS * 2 + 64 * HEAD_DIM * 4),
    ("pq-32x4", "fast_scan", lambda: faiss.IndexPQFastScan(HEAD_DIM, 32, 4, IP), KEYS * 16 + 16 * HEAD_DIM * 4),
    ("flat", "search", lambda: faiss.IndexFlatIP(HEAD_DIM), KEYS * HEAD_DIM * 4),
]


def ours():
    """Rows of one run of our bench."""
    command = ["cargo", "bench", "--quiet", "--bench", "cpu", "--", "--json", "--case", "pq"]
    root = pathlib.Path(__file__).resolve().parents[2]
    lines = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [{**json.loads(line), "by": "candle-pq-attn"} for line in lines if line.startswith("{")]


def theirs(indexes, queries):
    for (case, what, _, size), index in zip(PEERS, indexes):
        for k in KS:
            us = []
            for i in range(105):
                query = queries[i % QUERIES : i % QUERIES + 1]
                start = time.perf_counter()
                index.search(query, k)
                us.append((time.perf_counter() - start) * 1e6)
            p20, p50, p80 = np.percentile(us[5:], [20, 50, 80]).round(2)
            yield {
                "case": f"{case}-k{k}", "what": what, "mode": "eager", "us_p20": p20, "us_p50": p50, "us_p80": p80,
                "launches": 0, "bytes": size, "gb_per_s": round(size / p50 / 1e3, 2), "by": f"faiss {faiss.__version__}",
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="JSON lines of the best rounds alone")
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    random = np.random.default_rng(0)
    keys = random.standard_normal((KEYS, HEAD_DIM), dtype=np.float32)
    queries = random.standard_normal((QUERIES, HEAD_DIM), dtype=np.float32)
    indexes = []
    for _, _, make, _ in PEERS:
        index = make()
        index.train(keys[:16_384])
        index.add(keys)
        indexes.append(index)
    best = {}
    for _ in range(args.rounds):
        for row in [*theirs(indexes, queries), *ours()]:
            key = (row["case"], row["what"], row["by"])
            if key not in best or row["us_p50"] < best[key]["us_p50"]:
                best[key] = row
    if args.json:
        for row in best.values():
            print(json.dumps(row, sort_keys=True))
        return
    print(f"{'case':16} {'what':10} {'faiss us':>9} {'ours us':>9} {'ratio':>6}")
    for (case, what, by), row in best.items():
        if by.startswith("faiss"):
            mine = best.get((case, what, "candle-pq-attn"))
            columns = f"{mine['us_p50']:>9.1f} {mine['us_p50'] / row['us_p50']:>6.2f}" if mine else f"{'':>9} {'':>6}"
            print(f"{case:16} {what:10} {row['us_p50']:>9.1f} {columns}")


if __name__ == "__main__":
    main()
