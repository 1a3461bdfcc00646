"""Every check, in order, each with its time; the tree is left as it was.

    python tools/check.py                  all of them
    python tools/check.py house docs       only these

The first two ask whether a command would change anything (in a copy), not whether git sees a difference: they work in a dirty tree.
"""
import argparse, difflib, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

from common import LIB, NBS, ROOT

ENV = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")
TOOLS = ROOT / "tools"


def run(*args, cwd=ROOT):
    "Run a Python command, its output shown as it comes; True if it succeeded."
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=os.environ | ENV, stdin=subprocess.DEVNULL).returncode == 0


def texts(folder, pattern):
    return {f.name: f.read_text(encoding="utf-8") for f in sorted(Path(folder).glob(pattern))}


def changes_nothing(command, folder, pattern):
    "Run one of nbdev's commands in a copy of the project and compare what it writes with what is here."
    with tempfile.TemporaryDirectory() as copy:
        copy = Path(copy)
        shutil.copy(ROOT / "settings.ini", copy)
        for part in (NBS, LIB):
            shutil.copytree(part, copy / part.name, ignore=shutil.ignore_patterns("__pycache__", "assets", ".ipynb_checkpoints"))
        if not run("-c", f"import nbdev.{command[0]} as m; m.{command[1]}()", cwd=copy): return False
        old, new = texts(folder, pattern), texts(copy / folder.name, pattern)
    differ = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    for name in differ:
        print(f"{command[1]} changes {folder.name}/{name}:")
        diff = difflib.unified_diff(old.get(name, "").splitlines(), new.get(name, "").splitlines(), "here", "made", lineterm="", n=1)
        print(*[f"    {line[:160]}" for line in list(diff)[:20]], sep="\n")
    print(f"{command[1]}: {len(new)} files compared, {len(differ)} would change")
    return not differ


def export(): return changes_nothing(("doclinks", "nbdev_export"), LIB, "*.py")


def clean(): return changes_nothing(("clean", "nbdev_clean"), NBS, "*.ipynb")


def house(): return run(TOOLS / "check_house.py")


def notebooks(): return run(TOOLS / "run_notebooks.py", "--check", "-j", 2)


def tests(): return run("-m", "pytest", "tests", "-m", "not slow", "--durations=5", "-q", "-n", "2", "--dist", "loadfile") # fixtures belong to files


def docs(): return run(TOOLS / "make_readme.py", "--check") & run(TOOLS / "check_docs.py")


STEPS = dict(export=(export, "nbdev_export changes nothing"), clean=(clean, "nbdev_clean changes nothing"), house=(house, "house rules"),
             notebooks=(notebooks, "notebooks run from the top, offline, and say what is saved in them"),
             tests=(tests, "tests/"), docs=(docs, "README and docs, without Quarto"))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("steps", nargs="*", choices=[[], *STEPS], metavar="STEP", help=", ".join(STEPS))
    names, report = p.parse_args().steps or list(STEPS), []
    for i, name in enumerate(names, 1):
        step, title = STEPS[name]
        print(f"\n=== {i}/{len(names)} {name}: {title}", flush=True)
        start = time.time()
        ok = step()
        report.append((name, ok, time.time() - start))
        print(f"--- {name}: {'ok' if ok else 'FAILED'}, {report[-1][2]:.0f} s", flush=True)
    print("\n=== summary", *(f"{name:<10} {'ok' if ok else 'FAILED':<7} {s:5.0f} s" for name, ok, s in report), sep="\n")
    return int(not all(ok for _, ok, _ in report))


if __name__ == "__main__": sys.exit(main())
