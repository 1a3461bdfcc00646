"""Retrieval at its edges: kills, memory maps, three kinds of index, duplicates, files; and a stand-alone CLIP."""
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from realign_nb.core import image_hash, open_image
from realign_nb.models import load_text_encoder, load_vlm
from realign_nb.retrieval import KnowledgeBase, embed_file, load_kb, save_kb
from realign_nb.similarity import l2_normalise
from realign_nb.vectors import UnitRows, flat_index, index_settings, ivf_index, ivf_search
from realign_nb.world import draw, make_scenes

KINDS = ("flat", "ivf", "ivfpq")


def vectors(n, d=32, clusters=200, width=.5, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, d))
    return l2_normalise(centres[rng.integers(clusters, size=n)] + width * rng.normal(size=(n, d)))


def by_definition(rows, ids, hashes, i, k, near=2.):
    "Algorithm 1, line 8, without an index: cosines in float64, rounded to six digits, ties by id."
    u = rows.astype(np.float64)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    s = (u.astype(np.float32).astype(np.float64) @ u[i].astype(np.float32).astype(np.float64)).clip(-1, 1).round(6)
    return sorted((-s[j], ids[j]) for j in range(len(ids)) if hashes[j] != hashes[i] and s[j] < near)[:k]


def found(hits): return [(-h.similarity, h.id) for h in hits]


# ---------------------------------------------------------------- embed_file

CHILD = """
import sys, time
import numpy as np
sys.path.insert(0, {root!r})
from realign_nb.retrieval import embed_file
def encode(paths):
    time.sleep(.02)
    print(len(paths), flush=True)
    return np.stack([np.random.default_rng(int(p)).normal(size=50) for p in paths])
embed_file({file!r}, [str(i) for i in range(230)], encode, 8)
"""


def rows_of(paths): return np.stack([np.random.default_rng(int(p)).normal(size=50) for p in paths])


def test_killed_at_any_moment_and_resumed_is_the_unbroken_file(tmp_path):
    paths, file = [str(i) for i in range(230)], tmp_path / "killed.npy"
    embed_file(tmp_path / "whole.npy", paths, rows_of, 8)
    code, kills, rng = CHILD.format(root=str(Path(__file__).resolve().parents[1]), file=str(file)), 0, np.random.default_rng(0)
    batches = 0                                                             # that the encoder was asked for, over all starts
    while not file.exists():
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(int(rng.integers(1, 14))): batches += p.stdout.readline() != ""
        time.sleep(rng.uniform(0, .03))
        if kills < 4: p.send_signal(signal.SIGKILL)
        batches += len(p.stdout.read().splitlines())
        kills += p.wait() != 0
    assert kills >= 3 and file.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert 29 <= batches <= 29 + kills                                      # a kill costs the batch it hits, no more
    assert not Path(f"{file}.part").exists()


def test_torn_at_any_byte_only_whole_batches_are_kept(tmp_path):
    paths, calls = [f"{i}" for i in range(11)], []
    encode = lambda ps: calls.append(list(ps)) or np.stack([np.arange(3) + 1. + int(p) for p in ps])
    whole = embed_file(tmp_path / "whole.npy", paths, encode, 4)
    data = (tmp_path / "whole.npy").read_bytes()
    header = len(data) - 11 * 12
    note = (tmp_path / "whole.npy.json").read_text()
    for size in range(len(data) + 1):
        file = tmp_path / f"{size}.npy"
        Path(f"{file}.part").write_bytes(data[:size])
        Path(f"{file}.json").write_text(note)
        calls.clear()
        assert np.array_equal(embed_file(file, paths, encode, 4), whole) and file.read_bytes() == data
        rows = max(0, size - header) // 12
        done = 11 if rows == 11 else rows // 4 * 4
        assert calls == [paths[a:a + 4] for a in range(done, 11, 4)]       # the batches of an unbroken run, no others


def test_rows_are_never_mixed(tmp_path):
    paths, two = list("abcdef"), lambda ps: np.ones((len(ps), 2))
    def stops(ps):
        if "e" in ps: raise RuntimeError("out of memory")
        return two(ps)
    file = tmp_path / "e.npy"
    with pytest.raises(RuntimeError): embed_file(file, paths, stops, 2, encoder="A")
    with pytest.raises(ValueError, match="another encoder"): embed_file(file, paths, two, 2, encoder="B")
    with pytest.raises(ValueError, match="other images, or another order"): embed_file(file, paths[::-1], two, 2, encoder="A")
    with pytest.raises(ValueError, match="another number of images"): embed_file(file, paths[:5], two, 2, encoder="A")
    with pytest.raises(ValueError, match="batches of 2, not 3"): embed_file(file, paths, two, 3, encoder="A")
    with pytest.raises(ValueError, match="2 rows of 3 numbers for 2 images of 2"): embed_file(file, paths, lambda ps: np.ones((len(ps), 3)), 2, encoder="A")
    assert np.allclose(embed_file(file, paths, two, 2, encoder="A"), .5 ** .5)
    with pytest.raises(ValueError, match="another encoder"): embed_file(file, paths, two, encoder="B")
    keyed = embed_file(tmp_path / "k.npy", paths, two, 2, keys=list("uvwxyz"))   # by content: a moved folder is the same, an edited picture is not
    assert np.array_equal(embed_file(tmp_path / "k.npy", [f"moved/{p}" for p in paths], None, keys=list("uvwxyz")), keyed)
    with pytest.raises(ValueError, match="other images, or another order"): embed_file(tmp_path / "k.npy", paths, two, keys=list("uvwxyy"))
    old = tmp_path / "old.npy"                                             # without a note: only the number can be checked
    np.save(old, np.eye(6, dtype=np.float32))
    assert np.array_equal(embed_file(old, paths, None), np.eye(6))
    with pytest.raises(ValueError, match="another number"): embed_file(old, paths[:5], two)


def test_a_stream_of_batches_and_a_bar(tmp_path):
    paths, seen, bars = [f"{i}" for i in range(10)], [], []

    class Bar:
        def __init__(self, total, done, name): self.args, self.n, self.closed = (total, done, name), done, False; bars.append(self)

        def update(self, n): self.n += n

        def close(self): self.closed = True

    def many(rest, size, stop=99):
        seen.append((rest, size))
        for n, a in enumerate(range(0, len(rest), size)):
            if n == stop: return
            yield np.stack([np.arange(4) + 1. + int(p) for p in rest[a:a + size]])
    with pytest.raises(ValueError, match="gave 4 rows for 10 images"): embed_file(tmp_path / "e.npy", paths, None, 4, Bar, many=lambda r, s: many(r, s, 1))
    rows = embed_file(tmp_path / "e.npy", paths, None, 4, Bar, many=many)
    assert seen == [(paths, 4), (paths[4:], 4)] and [b.args for b in bars] == [(10, 0, "embed"), (10, 4, "embed")]
    assert bars[1].n == 10 and bars[1].closed and np.allclose(rows, l2_normalise([np.arange(4) + 1. + i for i in range(10)]))
    assert not rows.flags.writeable


# ---------------------------------------------------------------- rows and index

@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_any_kind_are_searched_alike(dtype, order):
    raw = np.asarray(vectors(300, 16) * np.random.default_rng(1).uniform(.1, 9, (300, 1)), dtype, order)
    ids, hashes = [f"{i}" for i in range(300)], [f"{i // 3}" for i in range(300)]
    want = {i: by_definition(raw, ids, hashes, int(i), 9, .97) for i in ids}
    for backend in ("faiss", "numpy"):
        kb = KnowledgeBase(raw[:170], ids[:170], hashes[:170], backend, near=.97)
        kb.add(raw[170:], ids[170:], hashes[170:])
        got = kb.search(ids, 9)
        for i in ids:
            assert [j for _, j in found(got[i])] == [j for _, j in want[i]]
            assert np.allclose(found(got[i])[0][0], want[i][0][0], atol=2e-6)


@pytest.mark.parametrize("unit", [True, False])
def test_a_memory_map_is_never_copied(tmp_path, unit):
    "64 MB of rows; what numpy and Python allocate meanwhile stays far below."
    n, d = 125_000, 128
    rows = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (n, d))
    for a in range(0, n, 25_000): rows[a:a + 25_000] = vectors(25_000, d, seed=a) * (1 if unit else 3)
    rows.flush()
    rows, ids = np.load(tmp_path / "x.npy", mmap_mode="r"), [f"{i}" for i in range(n)]
    tracemalloc.start()
    base = tracemalloc.get_traced_memory()[0]
    kb = KnowledgeBase(rows, ids)
    kb.search(ids[:50], 5)
    save_kb(kb, tmp_path / "kb")
    peak = tracemalloc.get_traced_memory()[1] - base
    tracemalloc.stop()
    assert np.shares_memory(kb.unit.parts[0], rows) and kb.unit.ready == [unit]
    assert peak < .75 * 4 * n * d, f"{peak / 1e6:.0f} MB"                   # ids take 15 MB, one block of scaled rows 12 MB
    again = load_kb(tmp_path / "kb")
    assert isinstance(again.unit.parts[0].base, np.memmap) and again.search(ids[:50], 5) == kb.search(ids[:50], 5)


def test_the_index_is_chosen_by_size_and_its_numbers_are_those_stated():
    assert [index_settings(n, 768)["index"] for n in (2, 11_000, 1_000_000, 1_000_001, 5_208_333, 5_208_334)] == ["flat"] * 3 + ["ivf", "ivf", "ivfpq"]
    assert index_settings(10**6, 768, "ivf") == dict(index="ivf", nlist=4096, nprobe=128, m=96, train=163_840)
    assert index_settings(10**8, 1024) == dict(index="ivfpq", nlist=32_768, nprobe=128, m=128, train=1_310_720)
    for n in (2, 39, 40, 1000, 20_000):
        s = index_settings(n, 24, "ivf")
        assert 1 <= s["nprobe"] <= s["nlist"] <= max(1, n // 39) and s["train"] <= n
    for d in range(1, 70): assert d % index_settings(20_000, d, "ivfpq")["m"] == 0


@pytest.mark.parametrize("kind", KINDS[1:])
def test_lists_and_codes_find_nearly_all_and_state_exact_similarities(kind, capfd):
    x, k = vectors(12_000), 10
    ids, ask = [f"{i:05d}" for i in range(12_000)], [f"{i:05d}" for i in range(0, 12_000, 60)]
    exact, kb = KnowledgeBase(x, ids).search(ask, k), KnowledgeBase(x, ids, index=kind)
    got = kb.search(ask, k)
    assert np.mean([len({h.id for h in got[i]} & {h.id for h in exact[i]}) / k for i in ask]) > .97
    for i, hits in got.items():
        s = [float(x[int(i)].astype(np.float64) @ x[int(h.id)].astype(np.float64)) for h in hits]
        assert np.allclose([h.similarity for h in hits], s, atol=1e-6) and [h.rank for h in hits] == list(range(1, k + 1))
        assert found(hits) == sorted(found(hits)) and i not in {h.id for h in hits}
    assert KnowledgeBase(x, ids, index=kind).search(ask, k) == got          # the same rows give the same index
    kb.faiss.nprobe = kb.faiss.nlist
    all_lists = kb.search(ask, k)
    assert np.mean([len({h.id for h in all_lists[i]} & {h.id for h in exact[i]}) / k for i in ask]) > (.999 if kind == "ivf" else .97)
    assert "WARNING" not in "".join(capfd.readouterr())                     # FAISS had rows enough to learn from


@pytest.mark.parametrize("kind", KINDS)
def test_crowds_of_copies_and_near_copies_never_hide_the_others(kind):
    rng, d = np.random.default_rng(4), 32
    crowd = l2_normalise(vectors(1, d) + .003 * rng.normal(size=(4000, d)))   # one scene, photographed over and over
    others = vectors(8000, d, seed=6)
    rows, ids = np.concatenate([crowd, others]), [f"{i:05d}" for i in range(12_000)]
    hashes = ["copy"] * 2000 + ids[2000:]
    hits = KnowledgeBase(rows, ids, hashes, index=kind).search(["00000"], 8)["00000"]
    assert len(hits) == 8 and all(2000 <= int(h.id) < 4000 for h in hits)     # near copies, no copy
    hits = KnowledgeBase(rows, ids, hashes, index=kind, near=.95).search(["00000", "03000"], 8)
    for i, h in hits.items():
        assert len(h) == 8 and all(int(x.id) >= 4000 and x.similarity < .95 for x in h)
        if kind == "flat": assert [x.id for x in h] == [j for _, j in by_definition(rows, ids, hashes, int(i), 8, .95)]


@pytest.mark.parametrize("backend", ["faiss", "numpy"])
def test_ties_at_the_end_are_broken_by_id_wherever_the_rows_stand(backend):
    "Forty others tie; the four of the smallest ids are found, not the four that the index names first."
    x = np.repeat(vectors(2), [20, 41], axis=0)
    order = np.random.default_rng(0).permutation(61)
    ids = [f"{i:02d}" for i in range(61)]
    kb = KnowledgeBase(x[order], [ids[i] for i in order], backend=backend)
    assert [h.id for h in kb.search(["60"], 4)["60"]] == ["20", "21", "22", "23"]


def test_more_hits_than_exist_are_not_invented():
    x, ids = vectors(400), [f"{i}" for i in range(400)]
    for kind in KINDS[:2]:
        kb = KnowledgeBase(x, ids, ["a"] * 397 + ["b", "c", "d"], index=kind)
        assert sorted(h.id for h in kb.search(["0"], 5)["0"]) == ["397", "398", "399"]
        assert kb.search(["399"], 399)["399"][-1].rank == 399
        assert KnowledgeBase(x, ids, ["a"] * 400, index=kind).search(["7"], 5) == {"7": []}


def test_a_search_fills_up_with_minus_one_and_widens():
    unit = UnitRows(vectors(2000))
    index = ivf_index(unit, index_settings(2000, 32, "ivf"))
    index.nprobe = 1
    missing = [(ivf_search(index)(unit[:20], 500, wide) < 0).sum() for wide in (1, 4, 16)]
    assert missing[0] > missing[1] > missing[2]
    assert np.array_equal(np.sort(ivf_search(index)(unit[:20], 2000)), np.tile(np.arange(2000), (20, 1)))
    assert np.array_equal(ivf_search(index)(unit[:20], 10, 999), flat_index(unit)(unit[:20], 10))


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_added_to_and_saved_over_itself(tmp_path, kind):
    x, ids = vectors(14_000), [f"{i:05d}" for i in range(14_000)]
    ask = ids[::200]
    kb = KnowledgeBase(x[:11_000], ids[:11_000], index=kind, near=.999)
    save_kb(kb, tmp_path)
    again = load_kb(tmp_path)
    assert again.search(ask[:50], 6) == kb.search(ask[:50], 6) and (again.index, again.near) == (kind, .999)
    for base in (kb, again): base.add(x[11_000:], ids[11_000:])
    assert again.search(ask, 6) == kb.search(ask, 6) and len(again) == 14_000
    save_kb(again, tmp_path)                                                 # its own rows are mapped from the file it replaces
    assert load_kb(tmp_path).search(ask, 6) == kb.search(ask, 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["embeddings.npy", "images.json"] + ["index.faiss"] * (kind != "flat")
    save_kb(KnowledgeBase(x[:50], ids[:50]), tmp_path)                       # a smaller base leaves no index behind
    assert load_kb(tmp_path).index == "flat" and not (tmp_path / "index.faiss").exists()


def test_a_save_that_was_killed_between_two_files_is_noticed(tmp_path):
    x, ids = vectors(200), [f"{i}" for i in range(200)]
    save_kb(KnowledgeBase(x, ids), tmp_path / "a")
    save_kb(KnowledgeBase(x[::-1], ids), tmp_path / "b")
    os.replace(tmp_path / "b" / "embeddings.npy", tmp_path / "a" / "embeddings.npy")
    with pytest.raises(ValueError, match="not of one save"): load_kb(tmp_path / "a")
    with pytest.raises(ValueError, match="no embeddings.npy"): load_kb(tmp_path / "b")


def test_folders_of_the_first_version_can_be_read(tmp_path):
    x, ids = vectors(60), [f"{i}" for i in range(60)]
    np.save(tmp_path / "embeddings.npy", x)
    (tmp_path / "images.json").write_text(json.dumps(dict(ids=ids, hashes=ids)))
    assert load_kb(tmp_path).search(ids, 4) == KnowledgeBase(x, ids).search(ids, 4)


# ---------------------------------------------------------------- encoders

def tiny_clip(folder):
    "A CLIP with random weights, saved as transformers saves one."
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer
    torch.manual_seed(0)
    layers = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    processor = CLIPProcessor(CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)),
                              CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")))
    model = CLIPModel(CLIPConfig(text_config=dict(layers, vocab_size=8, max_position_embeddings=16, bos_token_id=0, eos_token_id=1),
                                 vision_config=dict(layers, image_size=32, patch_size=8), projection_dim=24)).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def test_a_stand_alone_clip_makes_the_rows(tmp_path):
    "D5: a plain folder of transformers' CLIPModel through load_text_encoder gives the model's projected image features."
    import torch
    paths = [str(tmp_path / f"{s.id}.png") for s in make_scenes(9, "pairs", seed=2)]
    for s, p in zip(make_scenes(9, "pairs", seed=2), paths): draw(s).save(p)
    model, processor = tiny_clip(tmp_path / "clip")
    clip = load_text_encoder(str(tmp_path / "clip"))
    rows = embed_file(tmp_path / "clip.npy", paths, lambda ps: clip.encode([open_image(p) for p in ps], show_progress_bar=False), 4, encoder="clip")
    with torch.no_grad(): want = model.get_image_features(**processor(images=[open_image(p) for p in paths], return_tensors="pt"))
    assert np.allclose(rows, l2_normalise(getattr(want, "pooler_output", want).numpy()), atol=1e-5)
    vlm = load_vlm("tiny", device="cpu")
    own = embed_file(tmp_path / "vlm.npy", paths, vlm.embed, 4, encoder=vlm.name)
    hashes = [image_hash(p) for p in paths]
    a, b = (KnowledgeBase(e, paths, hashes).search(paths, 3) for e in (rows, own))
    assert all(len(h) == 3 for base in (a, b) for h in base.values()) and a != b and own.shape != rows.shape


@pytest.mark.slow
def test_the_benchmark_runs_in_small(tmp_path):
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "retrieval.py"
    subprocess.run([sys.executable, str(script), str(tmp_path), "--n", "20000", "--d", "64", "--queries", "100", "--out", str(tmp_path / "r.json")], check=True)
    r = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [r[kind]["ours"]["recall"] >= low for kind, low in (("flat", 1), ("ivf", .99), ("ivfpq", .95))] == [True] * 3
    for kind in KINDS: assert r[kind]["ratio"]["peak memory"] < 1.1 and abs(r[kind]["ours"]["recall"] - r[kind]["raw"]["recall"]) < .01
