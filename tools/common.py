"""What the tools share: where things are, how a notebook is read, and what a machine's own path looks like."""
import json, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
LIB = ROOT / "realign_nb"
# Folders that exist on somebody's machine only. The look-behind spares addresses (https://x.org/home/) and closing tags (</code>).
MACHINE_PATH = re.compile(r"(?<![\w.:/<-])/(?:home|root|Users|tmp|private|work|workspace|opt|usr|var|mnt|media|data|scratch)/"
                          r"[\w.~-]+[^\s\"'<>\\]*"
                          r"|\b[A-Za-z]:\\\\?(?:Users|home|work)\\")


def notebooks():
    "All notebooks, in reading order."
    return sorted(NBS.glob("*.ipynb"))


def text(value):
    "Notebook files hold text as one string or as a list of lines."
    return value if isinstance(value, str) else "".join(value)


def read_nb(path):
    "The notebook as plain dicts, every source and stream as one string."
    nb = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        cell["source"] = text(cell["source"])
    return nb


def directives(source):
    "The `#| key: value` lines at the top of a cell, as a dict."
    found = {}
    for line in source.splitlines():
        m = re.match(r"\s*#\s*\|\s*([\w-]+):?\s*(.*)", line)
        if m: found[m[1]] = m[2].strip()
        elif line.strip(): break
    return found


def body(source):
    "A cell's source without its directives."
    lines = source.splitlines()
    while lines and (re.match(r"\s*#\s*\|", lines[0]) or not lines[0].strip()): lines.pop(0)
    return "\n".join(lines)


def skipped(cell, flags=()):
    "True for a cell that is shown but not run: not code, `eval: false`, or marked with one of the flags."
    d = directives(cell["source"])
    return cell["cell_type"] != "code" or d.get("eval", "").lower() == "false" or bool(set(flags) & set(d))


def output_text(output):
    "All text of one output; pictures inside it are left out."
    parts = [text(output.get("text", "")), *output.get("traceback", [])]
    parts += [text(v) for k, v in sorted(output.get("data", {}).items()) if k.startswith("text/") or k == "image/svg+xml"]
    return re.sub(r"data:image/[^\"')\s]+", "data:image", "\n".join(parts))


def machine_paths(string):
    "Absolute paths of one machine that occur in the string."
    return sorted({m[0] for m in MACHINE_PATH.finditer(string)})
