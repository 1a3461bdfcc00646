"""Make README.md from nbs/index.ipynb without Quarto.

    python tools/make_readme.py [--check]       --check: write nothing, fail when README.md or its pictures differ

Markdown stays as it is (links get the folder nbs/, call-outs become quotes), code is fenced, text outputs are fenced, pictures are
saved as images/index-1.png and so on. Of an output with several forms the first of picture, Markdown, text is taken: a repository
page shows neither inline styles nor embedded pictures, so HTML is left out.
"""
import argparse, base64, os, re, sys

from common import NBS, ROOT, body, directives, read_nb, text

WARNING = "<!-- Made from nbs/index.ipynb by tools/make_readme.py: edit the notebook, not this file. -->"


def relink(words):
    "Links and pictures relative to nbs/ become relative to the root."
    def fix(m):
        if re.match(r"\w+:|#|/", m[2]): return m[0]
        return m[1] + os.path.normpath(os.path.join("nbs", m[2])).replace(os.sep, "/")
    return re.sub(r"(\]\(|src=\")([^)\s\"]+)", fix, words)


def quote_callouts(words):
    "`::: {.callout-note}` blocks become block quotes."
    def fix(m):
        title = re.sub(r"^## *(.+)$", r"**\1**", m[1].strip(), flags=re.M)
        return "\n".join(("> " + line).rstrip() for line in title.splitlines())
    return re.sub(r"^::: *\{[^}\n]*\} *\n(.*?)^::: *$", fix, words, flags=re.S | re.M)


def fence(words, language=""):
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`{3,}", words)), default=2))
    return f"{ticks}{language}\n{words.rstrip()}\n{ticks}"


def outputs(cell, pictures):
    "The Markdown of a cell's outputs; pictures are added to `pictures`, file name -> bytes."
    said = ""                                                # text that follows text goes into one block
    for o in cell["outputs"]:
        data = o.get("data", {})
        if "image/png" in data:
            if said: yield fence(said); said = ""
            name = f"images/index-{len(pictures) + 1}.png"
            pictures[name] = base64.b64decode(text(data["image/png"]))
            yield f"![{directives(cell['source']).get('fig-cap', '')}]({name})"
        elif "text/markdown" in data:
            if said: yield fence(said); said = ""
            yield relink(text(data["text/markdown"]).strip())
        elif o.get("name") != "stderr":
            said += text(o.get("text", data.get("text/plain", ""))).rstrip("\n") + "\n"
    if said.strip(): yield fence(said)


def code_cell(cell, pictures):
    d = directives(cell["source"])
    if d.keys() & {"hide", "default_exp", "export"} or d.get("include") == "false": return
    if d.get("echo") != "false" and body(cell["source"]).strip(): yield fence(body(cell["source"]), "python")
    if d.get("output") != "false": yield from outputs(cell, pictures)


def readme(nb):
    "(text of README.md, its pictures)."
    title, *rest = nb["cells"]
    lines = title["source"].splitlines()
    parts, pictures = [lines[0], WARNING, "\n".join(l for l in lines[1:] if l.startswith("> "))], {}
    for cell in rest:
        if cell["cell_type"] == "markdown": parts.append(quote_callouts(relink(cell["source"].strip())))
        if cell["cell_type"] == "code": parts += code_cell(cell, pictures)
    return "\n\n".join(p for p in parts if p) + "\n", pictures


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true")
    check = p.parse_args().check
    words, pictures = readme(read_nb(NBS / "index.ipynb"))
    new = {ROOT / "README.md": words.encode()} | {ROOT / name: data for name, data in pictures.items()}
    stale = [f for f in (ROOT / "images").glob("index-*.png") if f not in new]
    changed = [f for f, data in new.items() if not f.exists() or f.read_bytes() != data] + stale
    if check and changed:
        names = [f.relative_to(ROOT).as_posix() for f in changed]
        print("not what nbs/index.ipynb gives (run make outputs, or tools/make_readme.py):", *names)
        return 1
    if not check:
        for f, data in new.items():
            f.parent.mkdir(exist_ok=True)
            f.write_bytes(data)
        for f in stale: f.unlink()
    print(f"README.md: {len(words.splitlines())} lines, {len(pictures)} pictures, {'unchanged' if not changed else 'written'}")
    return 0


if __name__ == "__main__": sys.exit(main())
