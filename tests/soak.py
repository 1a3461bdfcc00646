"""Kill `realign-pairs` at random moments, start it again, and compare what it ends with to an unbroken run.

    python tests/soak.py --kills 30          about five minutes; `pytest -m slow` does it with three

The annotator is a server on loopback that takes a while to answer (faults.py), the completer is the packaged model in the killed process: both kinds of
calls are broken off. Half of the kills come a random while after the process has written something new, the others a random while after its start.
"""
import argparse, json, os, random, subprocess, sys, tempfile, time
from pathlib import Path

from faults import FaultServer

from realign_nb.world import draw, make_scenes


def start(folder, photos, url):
    args = [folder, "--images", photos, "--annotator", f"server:soak@{url}", "--masker", "prompt", "--k", "3", "--take", "last", "--concurrency", "4"]
    code = "import sys; from realign_nb.cli import main_pairs; sys.exit(main_pairs())"
    log = open(f"{folder}.log", "a")
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=log, stderr=subprocess.STDOUT, env=os.environ | dict(OPENAI_API_KEY="sk-soak-secret-0123456789"))


def written(folder):
    "How much the run has written so far."
    return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) if Path(folder).exists() else 0


def rounded(x):
    if isinstance(x, float): return round(x, 6)
    if isinstance(x, dict): return {k: rounded(v) for k, v in x.items() if k != "seconds"}
    return [rounded(v) for v in x] if isinstance(x, list) else x


def ending(folder):
    "Pairs and misses as they are, replies by their keys; a key that is there twice is an error."
    read = lambda name: [json.loads(line) for line in (Path(folder) / name).read_text(encoding="utf-8").splitlines()]
    replies = [(r["key"], rounded(r)) for line in read("calls.jsonl") for r in line["replies"]]
    assert len(dict(replies)) == len(replies), "a question was recorded twice"
    return rounded(read("pairs.jsonl")), rounded(read("misses.jsonl")), dict(replies)


def soak(folder, kills, images=60, seed=0, say=lambda text: None):
    "The endings of an unbroken and of a broken run, and how often it was killed before it was done."
    folder, rng, done = Path(folder), random.Random(seed), 0
    photos = folder / "photos"
    photos.mkdir()
    for s in make_scenes(images, "pairs", seed=seed): draw(s).save(photos / f"{s.id}.png")
    with FaultServer(latency=.05) as server:
        assert start(folder / "whole", photos, server.url).wait(900) == 0, Path(f"{folder / 'whole'}.log").read_text()[-3000:]
        for n in range(kills):
            p, before, begin = start(folder / "broken", photos, server.url), written(folder / "broken"), time.time()
            if n % 2: time.sleep(rng.uniform(0, 8))
            else:
                while p.poll() is None and written(folder / "broken") == before: time.sleep(.01)
                time.sleep(rng.uniform(0, .4))
            if p.poll() is not None: say(f"finished before kill {n + 1}"); break
            p.kill(); p.wait(); done += 1
            say(f"kill {n + 1} after {time.time() - begin:.1f} s, {written(folder / 'broken') - before} new bytes")
        assert start(folder / "broken", photos, server.url).wait(900) == 0, Path(f"{folder / 'broken'}.log").read_text()[-3000:]
    for f in folder.rglob("*"): assert not f.is_file() or b"sk-soak-secret" not in f.read_bytes(), f"the key is in {f.name}"
    return ending(folder / "whole"), ending(folder / "broken"), done


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=30)
    p.add_argument("--images", type=int, default=400)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d: whole, broken, done = soak(d, a.kills, a.images, a.seed, print)
    same = whole == broken
    print(f"{done} kills, {len(whole[0])} pairs, {len(whole[1])} misses, {len(whole[2])} replies: {'identical' if same else 'DIFFERENT'}")
    return int(not same or done < a.kills)


if __name__ == "__main__": sys.exit(main())
