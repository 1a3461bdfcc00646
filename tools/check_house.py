"""The house rules, checked without running a notebook. Prints one line per breach; exit status 1 if there is any.

    python tools/check_house.py [NOTEBOOK ...]      without names: all of nbs/, the library and the texts around it
"""
import argparse, ast, io, re, subprocess, sys, tokenize
from pathlib import Path

from common import LIB, NBS, ROOT, body, directives, machine_paths, notebooks, output_text, read_nb

MODULE_LINES, CELL_LINES, NB_BYTES, ALL_BYTES = 300, 30, 300_000, 6_000_000
EXPORT = {"export", "exports"}
KNOWN = EXPORT | {"default_exp", "hide", "echo", "eval", "notest", "gpu", "api", "slow", "label", "output", "warning", "code-fold",
                  "fig-cap", "fig-alt", "tbl-cap", "column", "layout-ncol"}
LIGHT = ["core", "masking", "similarity", "retrieval", "join", "bench", "yes_no", "choice", "vqa", "judged", "chair", "tables", "eval_cli", "plots"]     # and realign_nb itself
HEAVY = ["torch", "transformers", "pandas", "trl", "peft", "datasets", "sentence_transformers", "faiss"]
# the objectives registry finds later objectives by name, when asked for one
LATE = {("dpo", "rdpo")}
IMPORT = (ast.Import, ast.ImportFrom)


def parse(cell):
    "The cell's syntax tree, or None for text, magics and the like."
    if cell["cell_type"] != "code": return None
    try: return ast.parse(body(cell["source"]))
    except SyntaxError: return None


def is_export(cell): return cell["cell_type"] == "code" and bool(EXPORT & set(directives(cell["source"])))


def is_docstring(node): return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_import_cell(tree): return tree is not None and bool(tree.body) and all(isinstance(n, IMPORT) or is_docstring(n) for n in tree.body)


def public_names(tree):
    "Names without a leading underscore that a cell's top level defines."
    names = []
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): names.append(n.name)
        if isinstance(n, (ast.Assign, ast.AnnAssign)):
            for target in n.targets if isinstance(n, ast.Assign) else [n.target]:
                names += [t.id for t in getattr(target, "elts", [target]) if isinstance(t, ast.Name)]
    return list(dict.fromkeys(n for n in names if not n.startswith("_")))


def commented_lines(source):
    "Numbers of the lines that carry a comment."
    return {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}


def own_nodes(fn):
    "A function's nodes without those of functions inside it."
    for n in ast.iter_child_nodes(fn):
        if not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield n
            yield from own_nodes(n)


def check_docments(fn, comments):
    "Docstring, one commented line per argument, one for what is returned."
    if not ast.get_docstring(fn): yield f"{fn.name} has no docstring"
    a = fn.args
    args = [x for x in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if x and x.arg not in ("self", "cls")]
    ends = {x.arg: x.end_lineno for x in args}
    for names, values in ((a.posonlyargs + a.args, a.defaults), (a.kwonlyargs, a.kw_defaults)):
        for x, value in zip(names[len(names) - len(values):], values):
            if value is not None: ends[x.arg] = value.end_lineno          # the comment follows the default
    for name, line in ends.items():
        if line not in comments: yield f"{fn.name}: argument {name} has no comment"
        elif list(ends.values()).count(line) > 1: yield f"{fn.name}: argument {name} shares its line"
    gives = any(isinstance(n, ast.Return) and n.value is not None or isinstance(n, (ast.Yield, ast.YieldFrom)) for n in own_nodes(fn))
    # the comment stands on a line between the last argument and the first statement
    if gives and not comments & (set(range(fn.lineno, fn.body[0].lineno)) - set(ends.values())):
        yield f"{fn.name}: no comment on what it returns"


def check_export(cell, tree):
    "One public name, short, documented."
    source = body(cell["source"])
    n = len(source.splitlines())
    if n > CELL_LINES: yield f"{n} lines exported, at most {CELL_LINES}: split the function"
    names = public_names(tree)
    if len(names) > 1: yield f"exports {len(names)} names ({', '.join(names)}): one per cell"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield from check_docments(node, commented_lines(source))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"{node.name} has no docstring"


def modules(node):
    "Full names of the modules an import names; the library's own as realign_nb.x, however they are written."
    if isinstance(node, ast.Import): return [x.name for x in node.names]
    base = ("realign_nb." if node.level else "") + (node.module or "")
    return [f"realign_nb.{x.name}" for x in node.names] if base.strip(".") == "realign_nb" else [base]


def check_imports(cell, tree, stem, homes):
    "Imports alone, nothing by star, nothing from a later notebook; the library without fastcore and nbdev."
    found = [n for n in ast.walk(tree) if isinstance(n, IMPORT)]
    top = any(n in tree.body for n in found)
    mixed = not is_import_cell(tree) and (top if is_export(cell) else bool(found))
    if mixed: yield "imports stand in cells of their own"
    for n in found:
        if any(x.name == "*" for x in n.names): yield "imports by star"
        for m in modules(n):
            if is_export(cell) and m.split(".")[0] in ("fastcore", "nbdev", "execnb"): yield f"the library imports {m}"
            ours = m.split(".")[1] if m.startswith("realign_nb.") else None
            if later(ours, stem, homes, is_export(cell)): yield f"imports {ours} from {homes[ours]}, which is not a lower number"


def later(module, stem, homes, exported):
    "True where a module comes from a notebook after this one (or from this one, in an exported cell)."
    home = homes.get(module)
    if home is None or stem == "index" or any((homes.get(a), b) == (stem, module) for a, b in LATE): return False
    return home > stem or home == stem and exported


def shows(cell, tree):
    "True for a cell that is run, is not exported and does more than import."
    return tree is not None and bool(tree.body) and not is_export(cell) and not is_import_cell(tree) \
        and directives(cell["source"]).get("eval", "").lower() != "false" and "default_exp" not in directives(cell["source"])


def check_shown(cells, trees):
    "Each exported public function or class is followed within three cells by one that shows or tests; tables and helpers do not count."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [t is not None and is_export(c) and any(isinstance(n, kinds) and not n.name.startswith("_") for n in t.body)
              for c, t in zip(cells, trees)]
    for i in (i for i, p in enumerate(public) if p):
        after = [j for j in range(i + 1, len(cells)) if public[j] or not is_export(cells[j])][:3]
        if not any(shows(cells[j], trees[j]) for j in after): yield i, "no cell within the next three shows or tests it"


def check_title(cell):
    "The first cell becomes the page's front matter; anything else in it would be lost."
    lines = [l for l in cell["source"].splitlines() if l.strip()]
    if cell["cell_type"] != "markdown" or len(lines) < 2 or not lines[0].startswith("# ") or not lines[1].startswith("> ") \
            or any(not l.startswith("- ") for l in lines[2:]):
        yield "the first cell holds '# title' and '> one-line description', nothing else"


def check_cell(cell, tree, stem, homes):
    "All rules for one cell by itself."
    d = directives(cell["source"])
    yield from (f"unknown directive '#| {k}'" for k in d if k not in KNOWN)
    yield from (f"holds a path of one machine: {p}" for p in machine_paths(cell["source"]))
    for o in cell.get("outputs", []):
        shown = output_text(o)
        if o["output_type"] == "error" or "Traceback (most recent call last)" in shown: yield "a traceback is saved in its output"
        if o.get("name") == "stderr": yield "a warning or progress bar is saved in its output"
        yield from (f"its output holds a path of one machine: {p}" for p in machine_paths(shown))
    if tree is None: return
    if d.get("eval", "").lower() != "false": yield from check_imports(cell, tree, stem, homes)
    if is_export(cell): yield from check_export(cell, tree)


def check_notebook(path, homes):
    "All rules for one notebook."
    cells = read_nb(path)["cells"]
    trees = [parse(c) for c in cells]
    found = [(0, m) for m in check_title(cells[0])] + list(check_shown(cells, trees))
    for i, (c, t) in enumerate(zip(cells, trees)):
        if is_export(c) and t is None: found.append((i, "is exported but is not plain Python"))
        found += [(i, m) for m in check_cell(c, t, path.stem, homes)]
    size = path.stat().st_size
    if size > NB_BYTES: yield f"{path.name}: {size // 1000} kB, at most {NB_BYTES // 1000}: smaller or fewer pictures"
    yield from (f"{path.name} cell {i} ({cells[i].get('id')}): {m}" for i, m in sorted(set(found)))


def module_homes(paths):
    "Module name -> stem of the notebook it is made from."
    return {m[1]: p.stem for p in paths for c in read_nb(p)["cells"] if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c["source"], re.M))}


def check_modules(homes):
    "The exported files: short, and each with a notebook."
    for f in sorted(LIB.glob("*.py")):
        if f.stem in ("__init__", "_modidx"): continue
        n = len(f.read_text(encoding="utf-8").splitlines())
        if n >= MODULE_LINES: yield f"{f.name}: {n} lines, fewer than {MODULE_LINES}: split the notebook"
        if f.stem not in homes: yield f"{f.name}: no notebook exports it; delete it"


def check_stems(paths):
    "nbdev names pages and links by what follows the number."
    pages = {}
    for p in paths: pages.setdefault(re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem.lower()), []).append(p.name)
    return [f"{' and '.join(v)} would share one page" for v in pages.values() if len(v) > 1]


def check_texts():
    "No path of one machine in code, texts and logs that are shipped."
    globs = ["*.md", "*.cff", "*.ini", "*.txt", "*.yml", "Makefile", "tools/*.py", "tests/**/*.py", "benchmarks/**/*", "realign_nb/*.py",
             "realign_nb/assets/**/*", "nbs/*.yml", ".ci/*"]
    for f in sorted({f for g in globs for f in ROOT.glob(g) if f.is_file()}):
        try: lines = f.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError: continue                               # pictures and weights
        for i, line in enumerate(lines, 1):
            if line.startswith("#!"): continue
            yield from (f"{f.relative_to(ROOT)}:{i}: holds a path of one machine: {p}" for p in machine_paths(line))


def check_light():
    "The scorers and the core must import without the heavy packages."
    names = ["realign_nb"] + [f"realign_nb.{m}" for m in LIGHT if (LIB / f"{m}.py").exists()]
    for name in names:
        code = f"import sys, {name}; print(*[m for m in {HEAVY} if m in sys.modules])"
        r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        if r.returncode: yield f"{name} does not import: {r.stderr.strip().splitlines()[-1]}"
        elif r.stdout.strip(): yield f"import {name} pulls in {r.stdout.strip()}: import it inside the function that needs it"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebooks", nargs="*", type=Path)
    named, everything = p.parse_args().notebooks, notebooks()
    homes = module_homes(everything)
    bad = [m for nb in named or everything for m in check_notebook(nb, homes)]
    if not named:
        total = sum(nb.stat().st_size for nb in everything)
        if total > ALL_BYTES: bad.append(f"all notebooks together: {total // 1000} kB, at most {ALL_BYTES // 1000}")
        bad += [*check_stems(everything), *check_modules(homes), *check_texts(), *check_light()]
    print(*bad, sep="\n", end="\n" if bad else "")
    print(f"{len(named or everything)} notebooks, {len(bad)} breaches of the house rules")
    return int(bool(bad))


if __name__ == "__main__": sys.exit(main())
