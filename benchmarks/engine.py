"""The call engine against the bare client in one run, and its memory as the questions grow.

    python benchmarks/engine.py [--items 960] [--repeats 5] [--out benchmarks/results/engine.json]

The server is a process of its own on loopback and waits 200 ms before each answer. Both sides ask the same questions about the same pictures, 32 at a
time, through the official client; the bare loop is a semaphore around it and keeps the texts in memory, the engine checks, records and
flushes every answer as always. They take turns. Memory is the peak of a fresh process for each number of questions, read from the kernel.
Started by hand only.
"""
import argparse, asyncio, json, os, platform, statistics, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
from faults import FaultServer
from realign_nb.engine import Asking, Calls
from realign_nb.models import load_vlm
from realign_nb.servers import image_uri
from realign_nb.world import draw, make_scenes

PACKAGES = ("openai", "torch", "transformers", "numpy", "pillow")
ANSWER = "In the picture there is a {0} dog and a {1} car on a road. " + "The dog is left of the car, and behind both of them some people wait for a bus. "*3 # some 300 letters


def answer(prompt, image): return ANSWER.format(len(prompt), len(image))


def serve(latency):
    "A server until its input ends; its address is the first line of its output."
    with FaultServer(answer=answer, latency=latency) as server:
        print(server.url, flush=True); sys.stdin.read()


class Served:
    "The address of a server in a process of its own."
    def __init__(self, latency): self.latency = latency

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", str(self.latency)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self.process.stdout.readline().strip()

    def __exit__(self, *args): self.process.stdin.close(); self.process.wait(20)


def pictures(folder, n, side):
    "World pictures of this size, as files."
    paths = [Path(folder)/f"{s.id}.png" for s in make_scenes(n, "pairs", seed=0)]
    for p, s in zip(paths, make_scenes(n, "pairs", seed=0)): draw(s).resize((side, side)).save(p)
    return [str(p) for p in paths]


def questions(n, paths): return {f"sample-{i:06}": (f"Question number {i}: what is there in the picture, and where is it? Describe it in detail.", paths[i % len(paths)]) for i in range(n)}


def engine(items, url, concurrency, file):
    "Seconds of one `Calls.map` over all questions."
    calls = Calls(file, asking=Asking(concurrency=concurrency))
    start = time.perf_counter()
    replies = calls.map("answer", items, load_vlm(f"server:tiny@{url}"), 256)
    seconds = time.perf_counter()-start
    assert len(replies)==len(items)==calls.asked and not any(r.reason for r in replies.values())
    return seconds


def bare(items, url, concurrency, file):
    "Seconds of the client alone: a task per question, a semaphore, and the texts in a dict."
    from openai import AsyncOpenAI
    async def run():
        gate, texts = asyncio.Semaphore(concurrency), {}
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=6, timeout=60) as client:
            async def one(i, prompt, image):
                async with gate:
                    content = [dict(type="image_url", image_url=dict(url=image_uri(image))), dict(type="text", text=prompt)]
                    r = await client.chat.completions.create(model="tiny", messages=[dict(role="user", content=content)], max_tokens=256, temperature=0.)
                    texts[i] = r.choices[0].message.content
            await asyncio.gather(*(one(i, *q) for i, q in items.items()))
        return texts
    start = time.perf_counter()
    assert len(asyncio.run(run()))==len(items)
    return time.perf_counter()-start


def peak():
    "Highest resident memory of this process, MB."
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))/1024


def memory(n, a):
    "In a fresh process: peaks before and after so many questions."
    with tempfile.TemporaryDirectory() as d, Served(.005) as url:
        paths = pictures(d, 50, a.side)
        engine(questions(32, paths), url, a.concurrency, None)                             # imports, pools and buffers
        before = peak()
        seconds = engine(questions(n, paths), url, a.concurrency, f"{d}/calls.jsonl")
        print(json.dumps(dict(questions=n, before=round(before, 1), peak=round(peak(), 1), seconds=round(seconds, 1), file=round(os.path.getsize(f"{d}/calls.jsonl")/2**20, 1))))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--items", type=int, default=960, help="questions of one turn")
    p.add_argument("--repeats", type=int, default=5, help="turns of each side")
    p.add_argument("--concurrency", type=int, default=32, help="questions under way")
    p.add_argument("--latency", type=float, default=.2, help="seconds the server waits before each answer")
    p.add_argument("--side", type=int, default=336, help="of the pictures, pixels")
    p.add_argument("--sizes", type=int, nargs="+", default=[1000, 20000], help="questions of the memory part")
    p.add_argument("--out", default=str(Path(__file__).parent/"results"/"engine.json"))
    p.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    p.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.serve is not None: return serve(a.serve)
    if a.memory: return memory(a.memory, a)
    with tempfile.TemporaryDirectory() as d, Served(a.latency) as url:
        items, turns = questions(a.items, pictures(d, 50, a.side)), dict(engine=[], bare=[])
        for f in (engine, bare): f(dict(list(items.items())[:64]), url, a.concurrency, None) # first calls import and connect
        for n in range(a.repeats):
            for f in (engine, bare) if n%2 else (bare, engine): turns[f.__name__].append(round(a.items/f(items, url, a.concurrency, f"{d}/{n}.jsonl"), 2))
            print(f"turn {n+1}: engine {turns['engine'][-1]}, bare client {turns['bare'][-1]} calls a second", flush=True)
    command = [sys.executable, __file__, "--side", str(a.side), "--concurrency", str(a.concurrency), "--memory"]
    sizes = [json.loads(subprocess.run([*command, str(n)], check=True, capture_output=True, text=True).stdout) for n in a.sizes]
    median = {k: statistics.median(v) for k, v in turns.items()}
    ratio, growth = median["engine"]/median["bare"], sizes[-1]["peak"]/sizes[0]["peak"]
    result = dict(items=a.items, repeats=a.repeats, concurrency=a.concurrency, latency=a.latency, picture=a.side, calls_per_second=turns, median=median, ratio=round(ratio, 3),
        most_possible=a.concurrency/a.latency, memory_mb=sizes, growth=round(growth, 3), load=[round(x, 1) for x in os.getloadavg()],
        machine=dict(cpus=os.cpu_count(), processor=platform.machine(), python=platform.python_version(), **{m: version(m) for m in PACKAGES}))
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text(json.dumps(result, indent=1)+"\n", encoding="utf-8")
    print(f"engine {median['engine']:.1f}, bare client {median['bare']:.1f} calls a second: ratio {ratio:.3f}")
    print("peak memory " + ", ".join(f"{m['peak']:.0f} MB at {m['questions']}" for m in sizes) + f": {growth:.3f} times")
    sys.exit(not (ratio>=.9 and growth<=1.1))


if __name__ == "__main__":
    main()
