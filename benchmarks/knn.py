"""Our exact k-NN against faiss and scikit-learn, in one run: `python benchmarks/knn.py [--threads 1] [--k 20]`.

Seconds to find the k nearest of every query by cosine, best of the repeats, which are taken in turn: from float32 features to sorted
cosines and rows, the normalisation and building the index included. Beside it the share of neighbours that are ours, and by how much
the process's peak memory rose during the search (each in a process of its own, the features and the answers not counted). Needs
faiss: `pip install faiss-cpu`.
"""

import argparse
import multiprocessing
import os
import resource
import time
from multiprocessing.connection import Connection

import numpy as np

Answer = tuple[np.ndarray, np.ndarray]


def ours(bank: np.ndarray, queries: np.ndarray, k: int) -> Answer:
    import torch

    from ssl_vit_eval.probes.neighbours import Vectors, neighbours

    X, Q = (Vectors(torch.from_numpy(part), torch.arange(len(part))) for part in (bank, queries))
    similarity, rows = zip(*neighbours(X, Q, k, torch.device("cpu")), strict=True)
    return torch.cat(similarity).numpy(), torch.cat(rows).numpy()


def faiss_flat(bank: np.ndarray, queries: np.ndarray, k: int) -> Answer:
    import faiss

    bank, queries = bank.copy(), queries.copy()
    faiss.normalize_L2(bank)
    faiss.normalize_L2(queries)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    similarity, rows = index.search(queries, k)
    return similarity, rows


def sklearn_brute(bank: np.ndarray, queries: np.ndarray, k: int) -> Answer:
    from sklearn.neighbors import KNeighborsClassifier

    probe = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(bank, np.zeros(len(bank), dtype=int))
    distance, rows = probe.kneighbors(queries)
    return 1 - distance, rows


def sklearn_euclidean(bank: np.ndarray, queries: np.ndarray, k: int) -> Answer:
    """scikit-learn's fastest way to the same neighbours: Euclidean distances of unit vectors have a fused search."""
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import normalize

    probe = KNeighborsClassifier(k, algorithm="brute").fit(normalize(bank), np.zeros(len(bank), dtype=int))
    distance, rows = probe.kneighbors(normalize(queries))
    return 1 - distance**2 / 2, rows


SIDES = {"ours": ours, "faiss IndexFlatIP": faiss_flat, "sklearn brute, cosine": sklearn_brute, "sklearn brute, unit": sklearn_euclidean}


def serve(side: str, n: int, m: int, d: int, k: int, pipe: Connection) -> None:
    """In a process of its own: one search for each message, answered by its seconds; at the end the peak's rise and the neighbours."""
    rng = np.random.default_rng(0)
    bank, queries = (rng.standard_normal((rows, d), dtype=np.float32) for rows in (n, m))
    SIDES[side](bank[: 2 * k], queries[:2], k)  # imports what it needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while pipe.recv():
        start = time.perf_counter()
        answer = SIDES[side](bank, queries, k)
        pipe.send(time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pipe.send((grown / 1024 - sum(part.nbytes for part in answer) / 2**20, answer[1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"bank": 50_000, "queries": 10_000, "width": 384, "k": 20, "threads": 1, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    values = parser.parse_args()
    for library in ("OMP", "MKL", "OPENBLAS"):  # read when a process loads it
        os.environ[f"{library}_NUM_THREADS"] = str(values.threads)
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for side in SIDES:
        pipes[side], theirs = spawn.Pipe()
        spawn.Process(target=serve, args=(side, values.bank, values.queries, values.width, values.k, theirs), daemon=True).start()
        theirs.close()
    seconds = {side: float("inf") for side in SIDES}
    for _ in range(values.repeats):
        for side, pipe in pipes.items():
            pipe.send(True)
            seconds[side] = min(seconds[side], pipe.recv())
    what = f"{values.bank} x {values.width}, {values.queries} queries, k {values.k}, {values.threads} threads"
    print(f"{what:56s} {'seconds':>8s} {'ratio':>6s} {'same':>9s} {'peak + MB':>10s}")
    reference = None
    for side, pipe in pipes.items():
        pipe.send(False)
        grown, rows = pipe.recv()
        reference = rows if reference is None else reference
        same = (rows == reference).mean()
        print(f"{side:56s} {seconds[side]:8.2f} {seconds[side] / seconds['ours']:6.2f} {same:9.6f} {grown:10.0f}", flush=True)


if __name__ == "__main__":
    main()
