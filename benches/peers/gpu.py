#!/usr/bin/env python3
"""Dense attention and top-k of PyTorch and FlashInfer on a GPU, beside the decode step of this crate.

    python -m venv venv && venv/bin/pip install -r benches/peers/requirements-gpu.txt
    venv/bin/python benches/peers/gpu.py [--with-ours [COMMAND]] [--case PREFIX] [--rounds N] [--json]

Cases, modes and fields are those of `benches/decode.rs`, with the library in `by` and a top-k's k in `k`. Results are
checked in float32 first. Queries, keys and values alternate between two sets, larger each than a GPU's second-level
cache; scores rotate over eight. A copy's bytes are those read and written. "Group as rows" are the query heads of a KV
head as so many queries of one head, the same attention without a mask. Of each round the median counts, and of the
rounds the best. What a machine cannot run is said on stderr.

With ours, the bench `decode`, or COMMAND in the root of the repository, runs in turn with them, and each `forward` is
put beside the fastest dense attention over as many keys, by graphs: the ratio is how many times as long that takes.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import pathlib
import re
import shlex
import subprocess
import sys
import time

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

try:
    import flashinfer
except ImportError:
    flashinfer = None

DEVICE = "cuda"
HEAD_DIM, CALLS, COPIED = 128, 20, 1 << 30
CHUNK = 65_536  # keys of which the reference takes float32 copies at a time
PAGE = 16  # keys in a page of FlashInfer's batch decode
BENCH = "cargo bench --quiet --features cuda --bench decode --"
# Sequences, query heads, KV heads, keys, type.
CASES = {
    "seed-w0": (1, 32, 32, 32_000, torch.float32),
    "gqa-32k": (1, 32, 8, 32_768, torch.bfloat16),
    "gqa-128k": (1, 32, 8, 131_072, torch.bfloat16),
    "gqa-1m": (1, 32, 8, 1_048_576, torch.bfloat16),
    "batch8-32k": (8, 32, 8, 32_768, torch.bfloat16),
}


@contextlib.contextmanager
def skipping(what):
    """Says what a library or a device cannot do, and goes on."""
    try:
        yield
    except Exception as error:
        print(f"skipped: {what}: {' '.join(str(error).split())[:300]}", file=sys.stderr)


def reference(q, k, v):
    """Attention in float32."""
    grouped = q.float().unflatten(1, (k.shape[1], -1)).squeeze(3) / math.sqrt(HEAD_DIM)
    scores = [grouped @ part.float().mT for part in k.split(CHUNK, 2)]
    weights = torch.cat(scores, -1).softmax(-1).split(CHUNK, -1)
    return sum(weight @ part.float() for weight, part in zip(weights, v.split(CHUNK, 2))).reshape(q.shape)


def eager(call):
    """Wall times of single calls, in µs: 50 of them, fewer of long ones."""

    def wall(i):
        start = time.perf_counter()
        call(i)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6

    for i in range(2):
        wall(i)
    return [wall(i) for i in range(int(np.clip(500_000 / wall(2), 5, 50)))]


def replays(call):
    """Times of a call within a replayed graph, in µs, and the launches of one call."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(CALLS):
            call(i)
    nodes = ctypes.c_size_t()
    ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(nodes))
    graph.instantiate()

    def replay():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / CALLS

    for _ in range(2):
        replay()
    count = int(np.clip(200_000 / (replay() * CALLS), 3, 50))
    return [replay() for _ in range(count)], nodes.value // CALLS


def measure(case, what, by, size, call, **more):
    """A row for each mode, without the percentage of the copy's bandwidth."""
    times, launches = {"eager": eager(call)}, 0
    with skipping(f"{case} {what} by {by}, as a graph"):
        times["graph"], launches = replays(call)
    for mode, us in times.items():
        p20, p50, p80 = np.percentile(us, [20, 50, 80]).round(2)
        yield {
            "case": case, "what": what, "mode": mode, "us_p20": p20, "us_p50": p50, "us_p80": p80,
            "launches": launches, "bytes": size, "gb_per_s": round(size / p50 / 1e3, 2), "by": by, **more,
        }


def attentions(b, h, h_kv, n, dtype):
    """Ways to attend: the library, a context, what it makes of queries, keys and values beforehand, the call."""
    half = dtype == torch.bfloat16
    grouped = functools.partial(scaled_dot_product_attention, enable_gqa=h != h_kv)
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if half else ("EFFICIENT_ATTENTION", "MATH"):
        by = f"torch {torch.__version__} {backend.removesuffix('_ATTENTION').lower()}"
        backend = getattr(SDPBackend, backend)
        yield by, sdpa_kernel(backend), lambda *qkv: qkv, grouped
        if h != h_kv:
            as_rows, attend = lambda q, k, v: (q.view(b, h_kv, -1, HEAD_DIM), k, v), scaled_dot_product_attention
            yield f"{by}, group as rows", sdpa_kernel(backend), as_rows, attend
    for cores in ("CUDA", "tensor") if flashinfer and half else ():
        make = single_decode if b == 1 else batch_decode
        yield f"flashinfer {flashinfer.__version__}, {cores} cores", contextlib.nullcontext(), *make(cores == "tensor")


def single_decode(tensor_cores):
    options = {"kv_layout": "HND", "use_tensor_cores": tensor_cores}
    attend = functools.partial(flashinfer.single_decode_with_kv_cache, **options)
    return lambda q, k, v: (q[0, :, 0], k[0], v[0]), attend


def batch_decode(tensor_cores):
    def prepare(q, k, v):
        (b, h, _, d), (h_kv, n) = q.shape, k.shape[1:3]
        pages, ints = n // PAGE, functools.partial(torch.arange, dtype=torch.int32, device=DEVICE)
        workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
        tables = ints(b + 1) * pages, ints(b * pages), ints(b) * 0 + PAGE
        wrapper.plan(*tables, h, h_kv, d, PAGE, q_data_type=q.dtype, kv_data_type=k.dtype)
        return wrapper, q[:, :, 0], [x.unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1) for x in (k, v)]

    return prepare, lambda wrapper, q, kv: wrapper.run(q, tuple(kv))


def dense(case, b, h, h_kv, n, dtype):
    """Rows of every way to attend to all keys."""
    shapes = (b, h, 1, HEAD_DIM), (b, h_kv, n, HEAD_DIM), (b, h_kv, n, HEAD_DIM)
    sets = [[torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes] for _ in range(2)]
    want = reference(*sets[0])
    size = 2 * b * h_kv * n * HEAD_DIM * dtype.itemsize
    for by, context, prepare, attend in attentions(b, h, h_kv, n, dtype):
        with context, skipping(f"{case} dense by {by}"):
            inputs = [prepare(*tensors) for tensors in sets]
            error = ((attend(*inputs[0]).float().reshape(want.shape) - want).norm() / want.norm()).item()
            if not error < 2e-2:
                sys.exit(f"{case}: {by} is off by {error}")
            yield from measure(case, "dense", by, size, lambda i: attend(*inputs[i % len(inputs)]))


def topk(case, b, h, _, n, __):
    """Rows of the selection of each row's 1% of largest scores."""
    k = math.ceil(n / 100)
    scores = [torch.randn(b * h, n, device=DEVICE) for _ in range(8)]
    want = scores[0].sort().values[:, -k:]
    selects = {f"torch {torch.__version__}": functools.partial(torch.topk, k=k, sorted=False)}
    if hasattr(flashinfer, "top_k"):
        selects[f"flashinfer {flashinfer.__version__}"] = functools.partial(flashinfer.top_k, k=k)
    for by, select in selects.items():
        with skipping(f"{case} topk by {by}"):
            if not torch.equal(select(scores[0])[0].sort().values, want):
                sys.exit(f"{case}: {by} selects other scores")
            size = 4 * scores[0].numel()
            yield from measure(case, "topk", by, size, lambda i: select(scores[i % len(scores)]), k=k)


def copy():
    """Rows of a large copy."""
    src, dst = (torch.zeros(COPIED, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    yield from measure("copy", "copy", f"torch {torch.__version__}", 2 * COPIED, lambda _: dst.copy_(src))


def theirs(prefix):
    copies = list(copy())
    bandwidth = max(row["gb_per_s"] for row in copies)
    cases = [(case, *shape) for case, shape in CASES.items() if case.startswith(prefix)]
    for rows in [copies, *(bench(*case) for case in cases for bench in (dense, topk))]:
        for row in rows:
            yield {**row, "pct_of_copy_bandwidth": round(100 * row["gb_per_s"] / bandwidth, 2)}


def ours(command):
    """Rows of one run of our bench, which finds free what PyTorch keeps of the memory."""
    torch.cuda.empty_cache()
    command = [*shlex.split(command), "--json"]
    root = pathlib.Path(__file__).resolve().parents[2]
    lines = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [{**json.loads(line), "by": "candle-pq-attn"} for line in lines if line.startswith("{")]


def compare(rows):
    """Each of our forwards beside the fastest dense attention over as many keys."""
    graphs = [row for row in rows if row["mode"] == "graph"]
    print(f"\n{'case':18} {'ours us':>9} {'dense us':>9} {'ratio':>6}  by")
    for mine in [row for row in graphs if row["what"] == "forward"]:
        case = re.sub("^(residual|tail)-", "gqa-", mine["case"].removesuffix("-by-query"))
        peers = [row for row in graphs if row["what"] == "dense" and row["case"] == case and row["by"] != mine["by"]]
        for best in sorted(peers, key=lambda row: row["us_p50"])[:1]:
            us, ratio = best["us_p50"], best["us_p50"] / mine["us_p50"]
            print(f"{mine['case']:18} {mine['us_p50']:>9.1f} {us:>9.1f} {ratio:>6.2f}  {best['by']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with-ours", metavar="COMMAND", nargs="?", const=BENCH, help=f"default: {BENCH}")
    parser.add_argument("--case", metavar="PREFIX", default="", help="peers' cases whose names start with it")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="JSON lines of the best rounds alone")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU")
    if flashinfer is None:
        print("skipped: flashinfer: it is not installed", file=sys.stderr)
    best = {}
    for _ in range(args.rounds):
        for row in [*theirs(args.case), *(ours(args.with_ours) if args.with_ours else [])]:
            key = (row["case"], row["what"], row["mode"], row["by"])
            if key not in best or row["us_p50"] < best[key]["us_p50"]:
                best[key] = row
    if args.json:
        for row in best.values():
            print(json.dumps(row, sort_keys=True))
        return
    print(f"{torch.cuda.get_device_name()}\n{'case':11} {'what':6} {'mode':6} {'p50 us':>9} {'#':>3} {'GB/s':>6}  by")
    for row in best.values():
        if row["by"] != "candle-pq-attn":
            columns = f"{row['case']:11} {row['what']:6} {row['mode']:6} {row['us_p50']:>9.1f} {row['launches']:>3}"
            print(f"{columns} {row['gb_per_s']:>6.0f}  {row['by']}")
    if args.with_ours:
        compare(best.values())


if __name__ == "__main__":
    main()
