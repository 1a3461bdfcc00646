"""Retrieval at scale against raw FAISS: recall, seconds and memory of exact search, IVF-Flat and IVF-PQ, ours and FAISS's, in one run.

    python benchmarks/retrieval.py FOLDER [--n 1000000] [--queries 1000] [--seed 1] [--out benchmarks/results/retrieval.json]
    python benchmarks/retrieval.py FOLDER --tune        # recall by lists and candidates on other data (seed 0) and other queries

FOLDER takes the vectors (4 n d bytes) and is not emptied. Each variant runs in a process of its own with one thread. The raw variant is what one
writes with FAISS alone: the same index type and settings, trained on the same rows, asked for as many candidates, which are compared again with
the rows of the memory map. It returns row numbers; ours returns ids and leaves out copies. Both processes of a pair live at the same time and
are asked in turn, five times; the median counts. Ratios are of processor time, which with one thread is the wall time of a machine that does
nothing else; wall times are kept beside them. Two processes with the same index differ by some percent, by where its lists lie in memory, so the raw
search is also asked of our process and our index ("search, same index"). Peak memory is VmHWM of Linux, with the pages of the mapped file that
were touched. Started by hand only.
"""
import argparse, json, os, platform, statistics, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import faiss
from realign_nb.retrieval import KnowledgeBase
from realign_nb.vectors import index_settings

K, KINDS, RESULTS = 10, ("flat", "ivf", "ivfpq"), Path(__file__).parent / "results"
WIDTH, SPREAD, BLOCK = .45, .2, 50_000


def clustered(folder, n, d, seed):
    """Gaussian clusters, 50 vectors each on average: sizes from an exponential distribution, the variance of the i-th axis as 1/i within and between
    clusters, standard deviation within a cluster WIDTH times that between them (log-normal over clusters, SPREAD), turned by a random rotation,
    moved by a common offset as long as a centre, scaled to length 1."""
    file, labels = folder / f"vectors-{n}-{d}-{seed}.npy", folder / f"labels-{n}-{d}-{seed}.npy"
    if labels.exists(): return file, labels
    rng, clusters = np.random.default_rng([seed, 0]), max(50, n // 50)
    scale = (1 / np.sqrt(1 + np.arange(d))).astype(np.float32)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0].astype(np.float32)
    offset = rng.standard_normal(d, dtype=np.float32)
    offset *= np.linalg.norm(scale) / np.linalg.norm(offset)
    centres = rng.standard_normal((clusters, d), dtype=np.float32) * scale
    width = np.exp(rng.normal(np.log(WIDTH), SPREAD, clusters)).astype(np.float32)
    share = rng.exponential(size=clusters)
    out, of = np.lib.format.open_memmap(file, "w+", np.float32, (n, d)), np.empty(n, np.int32)
    for b, a in enumerate(range(0, n, BLOCK)):
        rng, m = np.random.default_rng([seed, 1, b]), min(BLOCK, n - a)
        of[a:a+m] = c = rng.choice(clusters, m, p=share / share.sum())
        x = (centres[c] + width[c, None] * scale * rng.standard_normal((m, d), dtype=np.float32)) @ turn + offset
        out[a:a+m] = x / np.linalg.norm(x, axis=1, keepdims=True)
    out.flush()
    np.save(labels, of)
    return file, labels


def raw_index(x, kind):
    "FAISS alone, with the settings and the training rows of `realign_nb.vectors.ivf_index`."
    (n, d), ip = x.shape, faiss.METRIC_INNER_PRODUCT
    s, centres = index_settings(n, d, kind), faiss.IndexFlatIP(d)
    if kind == "flat":
        centres.add(x)
        return centres
    index = faiss.IndexIVFFlat(centres, d, s["nlist"], ip) if kind == "ivf" else faiss.IndexIVFPQ(centres, d, s["nlist"], s["m"], 8, ip)
    index.train(x[np.sort(np.random.default_rng(0).choice(n, s["train"], replace=False, shuffle=False))])
    index.add(x)
    index.nprobe = s["nprobe"]
    return index


def raw_search(index, x, queries, m):
    "The K nearest other rows: m candidates of the index, compared again."
    q, out = x[queries], []
    for i, v, rows in zip(queries, q, index.search(q, m)[1]):
        rows = rows[(rows >= 0) & (rows != i)]
        out.append(rows[np.argsort(-(x[rows] @ v), kind="stable")[:K]])
    return out


def memory():
    "Peak resident memory, and what of it is not pages of the mapped file now; bytes."
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("VmHWM", "RssAnon")))
    return dict(peak=int(lines["VmHWM"].split()[0]) * 1024, anonymous=int(lines["RssAnon"].split()[0]) * 1024)


def timed(f):
    wall, cpu = time.perf_counter(), time.process_time()
    out = f()
    return out, dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def child(who, kind, file, n_queries, seed):
    "Build, then search as often as the parent asks; one line of JSON each."
    x = np.load(file, mmap_mode="r")
    queries = np.sort(np.random.default_rng([seed, 2]).choice(len(x), n_queries, replace=False))
    if who == "raw":
        index, seconds = timed(lambda: raw_index(np.asarray(x), kind))
    else:
        ids = [f"{i:08d}.jpg" for i in range(len(x))]                     # the caller's; building starts with them
        kb, seconds = timed(lambda: KnowledgeBase(x, ids, index=kind))
        search = lambda: kb.search([ids[i] for i in queries], K)
        index = kb.faiss or SimpleNamespace(search=lambda q, m: faiss.knn(q, x, m, metric=faiss.METRIC_INNER_PRODUCT))
    raw = lambda: raw_search(index, np.asarray(x), queries, max(100, 20*K) if kind == "ivfpq" else K+8)
    print(json.dumps(seconds), flush=True)
    for line in sys.stdin:
        if line.strip() == "one": index.nprobe = 1
        found, seconds = timed(search if who == "ours" and line.strip() == "search" else raw)
        if isinstance(found, dict): found = [[kb.row[h.id] for h in hits] for hits in found.values()]
        print(json.dumps(dict(seconds, memory=memory(), found=[[int(r) for r in f] for f in found])), flush=True)


class Child:
    def __init__(self, who, kind, file, queries, seed):
        self.p = subprocess.Popen([sys.executable, __file__, str(file.parent), "--child", who, kind, str(file), "--queries", str(queries), "--seed", str(seed)],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.build = self.read()

    def read(self):
        line = self.p.stdout.readline()
        if not line: raise SystemExit("a measured process ended early; see above")
        return json.loads(line)

    def ask(self, what="search"):
        print(what, file=self.p.stdin, flush=True)
        return self.read()

    def end(self): self.p.stdin.close(); self.p.wait()


def recall(found, true): return float(np.mean([len({*f} & {*t}) / K for f, t in zip(found, true)]))


def pair(kind, file, queries, seed, repeats=5):
    "Ours and FAISS's: build one after the other, search in turn."
    both = {who: Child(who, kind, file, queries, seed) for who in (("raw", "ours") if kind != "ivf" else ("ours", "raw"))}
    for c in both.values(): c.ask()                                       # the first search maps the pages
    asked = {"ours": [], "raw": [], "same": []}
    for _ in range(repeats):
        for who, c in both.items(): asked[who].append(c.ask())
        asked["same"].append(both["ours"].ask("raw"))
    one = both["raw"].ask("one")["found"] if kind == "ivf" else None
    for c in both.values(): c.end()
    middle = lambda who, key: statistics.median(a[key] for a in asked[who])
    out = {who: dict(build={k: round(v, 4) for k, v in both[who].build.items()}, search={k: round(middle(who, k), 3) for k in ("wall", "cpu")},
                     searches=[round(a["wall"], 3) for a in asked[who]], memory=asked[who][-1]["memory"]) for who in ("ours", "raw")}
    o, r = out["ours"], out["raw"]
    out["ratio"] = {"build": o["build"]["cpu"] / r["build"]["cpu"], "search": o["search"]["cpu"] / r["search"]["cpu"],
                    "search, same index": o["search"]["cpu"] / middle("same", "cpu"), "peak memory": o["memory"]["peak"] / r["memory"]["peak"],
                    "build, wall": o["build"]["wall"] / r["build"]["wall"], "search, wall": o["search"]["wall"] / r["search"]["wall"]}
    out["ratio"] = {k: round(v, 3) for k, v in out["ratio"].items()}
    return out, {who: asked[who][-1]["found"] for who in both}, one


def difficulty(x, of, queries, true, one):
    "How hard the vectors are, in numbers that do not depend on our code."
    q, t = x[queries], np.array(true)
    sims = np.einsum("qd,qkd->qk", q, x[t])
    return {"cosine of random pairs": float(np.mean(np.sum(q * q[::-1], 1))), "cosine of the nearest": float(sims[:, 0].mean()),
            "cosine of the tenth": float(sims[:, -1].mean()), "neighbours of another cluster": float((of[t] != of[queries][:, None]).mean()),
            "recall of one list": one}


def machine():
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    kb = int(next(line for line in open("/proc/meminfo") if line.startswith("MemTotal")).split()[1])
    return dict(cpu=cpu[0], cores=len(cpu), memory_gb=round(kb / 2**20), threads=1, load=[round(v, 1) for v in os.getloadavg()], system=platform.system(),
                python=platform.python_version(), numpy=np.__version__, faiss=faiss.__version__, faiss_options=faiss.get_compile_options().strip())


def tune(x, seed, n_queries):
    "Recall by number of lists searched and of candidates compared."
    queries = np.sort(np.random.default_rng([seed, 3]).choice(len(x), n_queries, replace=False))
    exact, out = raw_index(x, "flat"), {}
    true = raw_search(exact, x, queries, K+8)
    del exact
    for kind in KINDS[1:]:
        index = raw_index(x, kind)
        for index.nprobe in (1, 16, 32, 64, 96, 128, 160, 192):
            for m in (K+8,) if kind == "ivf" else (50, 100, 200):
                found, seconds = timed(lambda: raw_search(index, x, queries, m))
                out.setdefault(kind, []).append(dict(lists=index.nprobe, candidates=m, recall=round(recall(found, true), 4),
                                                     ms=round(1000 * seconds["cpu"] / n_queries, 2)))
                print(kind, out[kind][-1], flush=True)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path); p.add_argument("--n", type=int, default=1_000_000); p.add_argument("--d", type=int, default=768)
    p.add_argument("--queries", type=int, default=1000); p.add_argument("--seed", type=int, default=1); p.add_argument("--out", type=Path)
    p.add_argument("--tune", action="store_true"); p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return child(*a.child, a.queries, a.seed)
    seed = 0 if a.tune else a.seed
    file, labels = clustered(a.folder, a.n, a.d, seed)
    x, s = np.load(file, mmap_mode="r"), {kind: index_settings(a.n, a.d, kind) for kind in KINDS[:2 if a.n < 9984 else 3]}
    data = dict(n=a.n, d=a.d, queries=a.queries, k=K, seed=seed, clusters=max(50, a.n // 50), width=WIDTH, spread=SPREAD,
                generator=" ".join(clustered.__doc__.split()), settings=s, machine=machine())
    if a.tune:
        for v in s.values(): v.pop("nprobe")                              # what is varied
        data["recall"] = tune(np.asarray(x), seed, a.queries)
    else:
        data["chosen_on"] = "lists searched and candidates: seed 0 and other queries, retrieval_tuning.json"
        found, results = {}, {}
        for kind in s:
            results[kind], found[kind], one = pair(kind, file, a.queries, a.seed)
            true = found["flat"]["ours"]
            for who in ("ours", "raw"): results[kind][who]["recall"] = round(recall(found[kind][who], true), 4)
            if one: one_list = round(recall(one, true), 4)
            print(kind, json.dumps(results[kind]), flush=True)
        queries = np.sort(np.random.default_rng([a.seed, 2]).choice(a.n, a.queries, replace=False))
        hard = difficulty(np.asarray(x), np.load(labels), queries, true, one_list)
        data |= dict(difficulty={k: round(v, 4) for k, v in hard.items()}, results=results)
    out = a.out or RESULTS / ("retrieval_tuning.json" if a.tune else "retrieval.json")
    out.write_text(json.dumps(data, indent=1) + "\n")
    print(out.name)


if __name__ == "__main__": main()
