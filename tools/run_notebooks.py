"""Run notebooks from the top, each in a fresh process, and keep (or compare) their outputs.

    python tools/run_notebooks.py [NOTEBOOK ...]         run in place and save the outputs; follow with nbdev_clean
    python tools/run_notebooks.py --check -j 2           write nothing; text outputs must equal the saved ones
    python tools/run_notebooks.py --dry --flags gpu      write nothing, compare nothing, run the `#| gpu` cells too

Cells marked `eval: false` or with one of settings.ini's tst_flags are skipped, as nbdev_test does. Without names: all of nbs/.
"""
import argparse, difflib, os, re, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import NBS, ROOT, machine_paths, notebooks, output_text, read_nb, skipped, text

NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?|-?\d+e[-+]?\d+|-?\d+")


def close(a, b):
    "Whole numbers must be equal; decimals may differ by what another CPU's rounding does: one step of the last digit, or 0.1 %."
    if a == b: return True
    if "." not in a and "e" not in a: return False
    step = 10.0 ** -len(re.sub(r"e.*", "", a).partition(".")[2]) * 10.0 ** int((re.findall(r"e(.*)", a) or ["0"])[0])
    return abs(float(a) - float(b)) <= max(1.01 * step, 1e-3 * abs(float(a)))


def same_text(a, b):
    "Equal words, equal whole numbers, close decimals; runs of spaces count as one, since tables pad their columns."
    words = lambda s: re.sub(r"[ \t]+", " ", NUMBER.sub("#", s)).strip()
    return a == b or words(a) == words(b) and all(map(close, NUMBER.findall(a), NUMBER.findall(b)))


def summary(cell):
    "What a cell's outputs are compared by: all their text, and which kinds of picture there are."
    pictures = [k for o in cell["outputs"] for k in sorted(o.get("data", {})) if k.startswith("image/")]
    return "".join(output_text(o) for o in cell["outputs"]), pictures


def changes(old, new, skip):
    "One message for each cell whose new outputs differ from the saved ones."
    found = []
    for i, (a, b) in enumerate(zip(old["cells"], new["cells"])):
        if a["cell_type"] != "code" or a["id"] in skip: continue
        (told, pold), (tnew, pnew) = summary(a), summary(b)
        if pold != pnew: found.append(f"cell {i} ({a['id']}): saved pictures {pold}, new {pnew}")
        if not same_text(told, tnew):
            lines = list(difflib.unified_diff(told.splitlines(), tnew.splitlines(), "saved", "new", lineterm="", n=1))
            found.append(f"cell {i} ({a['id']}): the text differs\n    " + "\n    ".join(line[:160] for line in lines[:30]))
    return found


def problems_in_outputs(nb, skip):
    "Paths of this machine and warnings must not get into saved outputs."
    own = [str(p) for p in (ROOT, Path.home(), sys.prefix) if len(str(p)) > 1]
    found = []
    for i, cell in enumerate(nb["cells"]):
        if cell["cell_type"] != "code" or cell["id"] in skip: continue
        shown = "".join(output_text(o) for o in cell["outputs"])
        paths = machine_paths(shown) + [p for p in own if p in shown]
        if paths: found.append(f"cell {i} ({cell['id']}): prints a path of this machine: {paths[0]}")
        noise = "".join(text(o["text"]) for o in cell["outputs"] if o.get("name") == "stderr")
        if noise: found.append(f"cell {i} ({cell['id']}): warnings or a progress bar on stderr: {noise.strip()[:300]}")
    return found


def run_one(path, mode, force):
    "Run one notebook in this process; returns the exit status."
    from execnb.nbio import dict2nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    path, start = Path(path).resolve(), time.time()
    flags = set(get_config(path=ROOT).tst_flags.split()) - set(force)
    old = read_nb(path)
    skip = {c["id"] for c in old["cells"] if skipped(c, flags) or "nbdev_export" + "(" in c["source"]}
    nb = dict2nb(read_nb(path))
    for cell in nb.cells:                                    # old outputs must not pass for new ones
        if cell.cell_type == "code" and cell.id not in skip: cell.outputs = []
    os.environ["IN_TEST"] = "1"
    os.chdir(path.parent)
    shell = CaptureShell(path, mpl_format="png")             # not "retina": four times the bytes
    shell.run_all(nb, preproc=lambda c: c.id in skip or shell.exc)   # after the first error nothing more is run
    clean_nb(nb)
    failed = [c for c in nb.cells if c.cell_type == "code" and any(o["output_type"] == "error" for o in c.outputs)]
    if failed:
        trace = "\n".join(text(o["traceback"]) for o in failed[0].outputs if o["output_type"] == "error")
        print(f"{path.name}: cell {nb.cells.index(failed[0])} ({failed[0].id}) raised\n\n{failed[0].source}\n\n{trace}")
        return 1
    bad = problems_in_outputs(nb, skip)
    if mode == "check": bad += changes(old, nb, skip)
    if mode == "write" and not bad: write_nb(nb, path)
    seconds = time.time() - start
    print(f"{path.name}: {'FAILED' if bad else 'ok'}, {seconds:.1f} s{' (should be under 30)' * (seconds > 30)}", *bad, sep="\n  ")
    return int(bool(bad))


def start_one(path, mode, force):
    "Run one notebook in a fresh process; returns (exit status, printed text)."
    env = dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
               PYTHONDONTWRITEBYTECODE="1") | os.environ | dict(PYTHONPATH=str(ROOT))   # the library of this checkout
    cmd = [sys.executable, __file__, "--one", str(path), "--mode", mode, "--flags", " ".join(force)]
    r = subprocess.run(cmd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return r.returncode, r.stdout + (r.stderr if r.returncode else "")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebooks", nargs="*", type=Path, help="default: all of nbs/")
    p.add_argument("--check", action="store_const", const="check", dest="mode", help="compare, write nothing")
    p.add_argument("--dry", action="store_const", const="dry", dest="mode", help="only run, write nothing")
    p.add_argument("--flags", default="", help="tst_flags whose cells are run too, e.g. 'gpu slow'")
    p.add_argument("-j", type=int, default=1, help="notebooks at a time")
    p.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--mode", default="write", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return run_one(a.one, a.mode, a.flags.split())
    todo = a.notebooks or notebooks()
    if not todo: sys.exit("no notebooks in nbs/")
    start, before = time.time(), set(NBS.rglob("*"))
    with ThreadPoolExecutor(a.j) as pool:
        jobs = [pool.submit(start_one, nb, a.mode or "write", a.flags.split()) for nb in todo]
        results = []
        for job in jobs:
            results.append(job.result()); print(results[-1][1].rstrip(), flush=True)
    failed = sum(code != 0 for code, _ in results)
    left = sorted(f.relative_to(ROOT).as_posix() for f in set(NBS.rglob("*")) - before if f.suffix != ".ipynb") if a.mode else []
    if left: print("notebooks left files behind:", *left)
    print(f"{len(todo)} notebooks, {failed} failed, {time.time() - start:.0f} s")
    return int(failed > 0 or bool(left))


if __name__ == "__main__": sys.exit(main())
