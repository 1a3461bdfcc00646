"""Check the docs where Quarto is missing: nbdev's own processing into _proc/, then a stand-in site in _check/ with smalldocs.

    python tools/check_docs.py

It calls the functions below nbdev_proc_nbs, never the command: without Quarto the command tries to download and install it.
"""
import os, re, shutil, subprocess, sys
from pathlib import Path

import yaml

from common import NBS, ROOT, directives, notebooks, read_nb

# what smalldocs says on a sound site: options it does not have, its closing count; and, for each page again, what check_sidebar says once
HARMLESS = re.compile(r"html-math-method is ignored|format \w+ is not built|thing\(s\) to look at|broken link /\w+\.ipynb|^\s*$")


def process():
    "Make _proc/ as nbdev_proc_nbs does; imports and exported cells are executed on the way. Returns (_proc, nbdev's settings)."
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    pointer = NBS / "_quarto.yml"
    if not pointer.exists(): sys.exit("nbs/_quarto.yml is missing: nbdev would write a default one, which hides ../_quarto.yml")
    sys.path.insert(0, str(ROOT))                            # the library of this checkout, here and in the worker processes
    os.environ["PYTHONPATH"] = str(ROOT)
    refresh_quarto_yml()                                     # nbs/nbdev.yml from settings.ini
    return proc_nbs(n_workers=2, force=True), get_config()


def listed(node):
    "Every notebook that a part of _quarto.yml names."
    if isinstance(node, dict): return [x for v in node.values() for x in listed(v)]
    if isinstance(node, list): return [x for v in node for x in listed(v)]
    return [node] if isinstance(node, str) and node.endswith(".ipynb") and "*" not in node else []


def check_sidebar():
    "The sidebar and the folder hold the same notebooks."
    have = {p.name for p in notebooks()}
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    side, other = listed(site["sidebar"]), set(listed(site))
    return [f"{n}: not in the sidebar of _quarto.yml" for n in sorted(have - set(side))] \
        + [f"_quarto.yml names {n}, which does not exist" for n in sorted((set(side) | other) - have)] \
        + [f"_quarto.yml names {n} twice in the sidebar" for n in sorted(set(side)) if side.count(n) > 1]


def prose(path):
    "A notebook's Markdown without code in it."
    words = "\n".join(c["source"] for c in read_nb(path)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"```.*?```|`[^`\n]*`", "", words, flags=re.S)


def check_links():
    "Links to files exist; an address is not tried."
    for p in notebooks():
        for target in re.findall(r"\]\(([^)\s]+)", prose(p)):
            file = target.split("#")[0]
            if file and not re.match(r"\w+:", file) and not (NBS / file).exists(): yield f"{p.name}: broken link {target}"


def check_crossrefs():
    "Each @fig- @tbl- @eq- @sec- has a target (smalldocs prints them as text, Quarto resolves them)."
    for p in notebooks():
        cells = read_nb(p)["cells"]
        have = {d["label"] for c in cells if "label" in (d := directives(c["source"]))}
        have |= set(re.findall(r"\{#((?:fig|tbl|eq|sec)-[\w-]+)", "\n".join(c["source"] for c in cells)))
        yield from (f"{p.name}: @{r} is not defined" for r in sorted(set(re.findall(r"@((?:fig|tbl|eq|sec)-[\w-]+)", prose(p))) - have))


def check_callouts():
    "Every ::: block is closed, else Quarto swallows the rest of the page."
    for p in notebooks():
        for i, c in enumerate(read_nb(p)["cells"]):
            fences = re.findall(r"^:::+(.*)$", c["source"], re.M) if c["cell_type"] == "markdown" else []
            if sum(1 if f.strip() else -1 for f in fences): yield f"{p.name} cell {i}: a ::: block is not closed in its cell"


def page_names(proc):
    "nbdev renames 01_x.ipynb to x.html through front matter; smalldocs does not know that, so the copies are renamed."
    names = {}
    for f in proc.rglob("*.ipynb"):
        front = "".join(c["source"] for c in read_nb(f)["cells"] if c["cell_type"] == "raw")
        if m := re.search(r"^output-file:\s*(\S+)\.html\s*$", front, re.M): names[f.name] = m[1] + ".ipynb"
    return names


def stand_in(proc, names):
    "Copy _proc/ to _check/ with nbdev's page names and the root _quarto.yml inlined."
    site = ROOT / "_check"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(proc, site, ignore=shutil.ignore_patterns(".quarto", "_docs"))
    renamed = lambda s: re.sub("|".join(map(re.escape, names)) or "$^", lambda m: names[m[0]], s)
    for f in [*site.rglob("*.ipynb"), *site.glob("*.yml")]:
        words = renamed(f.read_text(encoding="utf-8"))
        if f.suffix == ".ipynb": words = re.sub(r"output-file:[^\n\\]*\\n", "", words)
        f.write_text(words, encoding="utf-8")
        if f.name in names: f.rename(f.with_name(names[f.name]))
    settings = renamed((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    (site / "_quarto.yml").write_text(settings + "\nmetadata-files: [nbdev.yml]\n", encoding="utf-8")
    return site


def smalldocs(command, site):
    r = subprocess.run([sys.executable, "-m", "smalldocs.cli", command, str(site)], capture_output=True, text=True)
    return r.returncode, r.stdout + r.stderr


def check_site():
    "Render the stand-in: every notebook has a page, and smalldocs finds no broken link."
    proc, cfg = process()
    names = page_names(proc)
    site = stand_in(proc, names)
    code, said = smalldocs("render", site)
    if code: return 0, [f"smalldocs render failed:\n{said}"]
    bad = [line for line in smalldocs("check", site)[1].splitlines() if not HARMLESS.search(line)]
    pages = {p.stem for p in (site / cfg.doc_path.name).rglob("*.html")}
    bad += [f"no page for {n}" for n in sorted({Path(names.get(f.name, f.name)).stem for f in proc.rglob("*.ipynb")} - pages)]
    return len(pages), bad


def main():
    bad = [*check_sidebar(), *check_links(), *check_crossrefs(), *check_callouts()]
    pages, more = check_site()
    bad += more
    print(*bad, sep="\n", end="\n" if bad else "")
    print(f"{pages} pages, {len(bad)} problems in the docs")
    return int(bool(bad))


if __name__ == "__main__": sys.exit(main())                  # the guard matters: proc_nbs starts processes
