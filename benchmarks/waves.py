"""Algorithm 1 in waves against one image at a time, in one run.

    python benchmarks/waves.py [--images 200] [--threads 1] [--out benchmarks/results/waves.json]

Both versions use the same samples, masks, embeddings, neighbours, models and dtype. The plain version walks sample by sample, as the
algorithm is printed: per candidate one generate call, and one encode call on the chosen and the candidate text. Masking, search and
`check_mask` are part of both times; loading and embedding of none. Started by hand only.
"""
import argparse, json, os, platform, statistics, sys, time
from importlib.metadata import version
from pathlib import Path
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from realign_nb.core import Sample
from realign_nb.generate import accepted, generate_pairs, yield_table
from realign_nb.masking import check_mask, complete_prompt, rule_mask
from realign_nb.models import load_text_encoder, load_vlm
from realign_nb.retrieval import KnowledgeBase
from realign_nb.world import DESCRIBE, KINDS, ask, caption, draw, make_scenes, question

K, TAU, TOKENS = 5, .95, 64
PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")


class Clock:
    "Counts the calls of a function, the items of its first argument, and the processor time in it."
    def __init__(self, f): self.f, self.calls, self.items, self.seconds = f, 0, 0, 0.

    def __call__(self, xs, *args, **kw):
        start = time.process_time()
        try: return self.f(xs, *args, **kw)
        finally: self.calls, self.items, self.seconds = self.calls+1, self.items+len(xs), self.seconds+time.process_time()-start

    def read(self): return dict(calls=self.calls, items=self.items, cpu=round(self.seconds, 2))


def world_samples(scenes, pictures, seed):
    "A description, a simple question and a yes/no question per picture, answered from the scene."
    for i, s in scenes.items():
        rng = np.random.default_rng([seed, int(i, 16)])
        kind = s.kinds[0] if rng.random()<.5 else KINDS[rng.integers(len(KINDS))]
        q, a = ask(s, rng, "count")
        yield Sample(f"{i}-0", DESCRIBE, pictures[i], caption(s, rng))
        yield Sample(f"{i}-1", q, pictures[i], a)
        yield Sample(f"{i}-2", question(kind), pictures[i], "Yes." if kind in s.kinds else "No.")


def one_by_one(samples, vlm, kb, encoder, pictures):
    "Algorithm 1 as printed, with the acceptance of section 3.1: [(sample id, rejected text, retrieved image)]."
    out = []
    for s in sorted(samples, key=lambda s: s.id):
        masked = rule_mask(s.answer); check_mask(s.answer, masked)
        image = s.id.split("-")[0]
        for hit in kb.search([image], K)[image]:
            y_c = vlm.generate([complete_prompt(masked, s.prompt)], [pictures[hit.id]], max_new_tokens=TOKENS)[0]
            w, c = encoder.encode([s.answer, y_c], normalize_embeddings=True)
            if y_c and y_c!=s.answer and accepted(float(w@c), TAU): out.append((s.id, y_c, hit.id)); break
    return out


def in_waves(samples, vlm, kb, encoder, pictures):
    "The library's version: the same triples."
    pairs, misses = generate_pairs(samples, vlm, kb, encoder, "rule", k=K, tau=TAU, images=pictures, max_new_tokens=TOKENS)
    names = {id(im): i for i, im in pictures.items()}
    in_waves.yields = yield_table(pairs, misses).to_dict("records")
    return [(p.id, p.rejected, names[id(p.retrieved_image)]) for p in pairs]


def timed(f, samples, vlm, kb, encoder, pictures):
    "The result of one run and its seconds: wall, processor, and by part."
    generate, encode = vlm.generate, encoder.encode
    vlm.generate, encoder.encode = Clock(generate), Clock(encode)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        result = f(samples, vlm, kb, encoder, pictures)
        return result, dict(wall=round(time.perf_counter()-wall, 2), cpu=round(time.process_time()-cpu, 2),
                            generate=vlm.generate.read(), encode=encoder.encode.read())
    finally: vlm.generate, encoder.encode = generate, encode


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--images", type=int, default=200, help="pictures of the world, three samples each")
    p.add_argument("--seed", type=int, default=0, help="of the pictures and questions")
    p.add_argument("--repeats", type=int, default=3, help="runs in waves; the one of median time counts")
    p.add_argument("--threads", type=int, default=1, help="of torch, for both versions")
    p.add_argument("--out", default=str(Path(__file__).parent/"results"/"waves.json"))
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    vlm, encoder = load_vlm("tiny", device="cpu"), load_text_encoder("minilm")
    encoder.to("cpu")
    scenes = {s.id: s for s in make_scenes(a.images, "pairs", a.seed)}
    pictures = {i: draw(s) for i, s in scenes.items()}
    samples = list(world_samples(scenes, pictures, a.seed))
    kb = KnowledgeBase(vlm.embed(list(pictures.values())), list(pictures))
    args = (vlm, kb, encoder, pictures)
    for f in (in_waves, one_by_one): f(samples[:6], *args)      # first calls set up both models
    waves = [timed(in_waves, samples, *args) for _ in range(a.repeats)]
    plain, slow = timed(one_by_one, samples, *args)
    median = statistics.median_low(t["wall"] for _, t in waves)
    quick, fast = next(w for w in waves if w[1]["wall"]==median)
    same = all(w==plain for w, _ in waves)
    result = dict(images=a.images, samples=len(samples), candidates=slow["generate"]["calls"], pairs=len(plain), seed=a.seed, k=K, tau=TAU, model="tiny",
        text_encoder="minilm", dtype=str(vlm.model.dtype), threads=torch.get_num_threads(), one_by_one=slow, in_waves=fast, repeats=a.repeats,
        ratio={k: round(slow[k]/fast[k], 2) for k in ("wall", "cpu")} | {k: round(slow[k]["cpu"]/max(fast[k]["cpu"], .01), 2) for k in ("generate", "encode")},
        identical_pairs=same, differing=len(set(quick)^set(plain)), yields=in_waves.yields,
        machine=dict(cpus=os.cpu_count(), processor=platform.machine(), python=platform.python_version(), **{m: version(m) for m in PACKAGES}))
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text(json.dumps(result, indent=1)+"\n", encoding="utf-8")
    print(f"{a.images} pictures, {len(samples)} samples, {result['candidates']} candidates, {len(plain)} pairs")
    print(f"one by one {slow['wall']:.1f} s, in waves {fast['wall']:.1f} s: {result['ratio']['wall']} times faster "
          f"(processor time {result['ratio']['cpu']}; generating {result['ratio']['generate']}, encoding {result['ratio']['encode']})")
    print("accepted pairs identical" if same else f"ACCEPTED PAIRS DIFFER in {result['differing']} entries")
    sys.exit(not same)


if __name__ == "__main__":
    main()
