"""The commands as a user types them: one process each, a small world, photographs, bad input, and kills at bad moments."""
import json, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
from PIL import Image

SMALL = "--n-images 24 --n-scenes 12 --arms rdpo --workers 1".split()


def start(command, *args):
    code = f"import sys; from realign_nb.cli import main_{command}; sys.exit(main_{command}())"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(command, *args, fails=False):
    p = start(command, *args)
    out = p.communicate(timeout=600)[0]
    assert bool(p.returncode) == fails, out[-3000:]
    return out


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()] if Path(path).exists() else []


def rounded(x):
    "Floats to 6 decimals, everything else as it is."
    if isinstance(x, float): return round(x, 6)
    if isinstance(x, dict): return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else x


def results(folder):
    return [rounded(lines(folder / f"{name}.jsonl")) for name in ("pairs", "misses", "scores")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run("run", folder, *SMALL)


def test_run_writes_pairs_adapter_scores_and_report(whole):
    folder, out = whole
    pairs, misses, scores = results(folder)
    answers = [r for line in lines(folder / "calls.jsonl") if line["stage"] == "answer" for r in line["replies"]]
    assert len(pairs) + len(misses) == len(answers) == 3 * 24
    assert {s["arm"] for s in scores} == {"base", "rdpo"}
    assert (folder / "arms/rdpo-seed0/adapter/adapter_model.safetensors").exists()
    page = (folder / "report/report.html").read_text(encoding="utf-8")
    assert "CHAIR" in page and "http" not in page.replace("http://www.w3.org", "") and str(folder) not in page
    assert (folder / "report/report.md").exists() and "report" in out


def test_same_command_again_changes_nothing_and_calls_nobody(whole):
    folder, _ = whole
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")}
    run("run", folder, *SMALL)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl") if p.name != "scores.jsonl"} == {p: t for p, t in before.items() if p.name != "scores.jsonl"}


MOMENTS = [  # conditions on the run folder at which the process is killed
    lambda d: (d / "calls.jsonl").exists(),
    lambda d: sum("complete/1" in line for line in lines_or_torn(d / "calls.jsonl")) > 0,
    lambda d: (d / "pairs.jsonl").exists(),
    lambda d: (d / "arms/rdpo-seed0/manifest.json").exists(),
    lambda d: (d / "eval/rdpo-seed0/calls-pope.jsonl").exists(),
]


def lines_or_torn(path):
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).exists() else []


def test_killed_at_five_moments_ends_as_an_unbroken_run(whole, tmp_path):
    folder = tmp_path / "broken"
    for moment in MOMENTS:
        p = start("run", folder, *SMALL)
        deadline = time.time() + 300
        while not moment(folder) and p.poll() is None and time.time() < deadline: time.sleep(.02)
        assert p.poll() is None, "the run ended before the moment came:\n" + p.communicate()[0][-2000:]
        p.send_signal(signal.SIGKILL); p.communicate()
    with open(folder / "calls.jsonl", "a") as f: f.write('{"stage": "complete/1", "mo')   # and a torn line on top
    run("run", folder, *SMALL)
    assert results(folder) == results(whole[0])


def test_other_settings_are_refused_by_name(whole):
    assert "tau: 0.95 there, 0.9 now" in run("run", whole[0], *SMALL, "--tau", ".9", fails=True)


def photographs(folder, crops=4):
    "Real pictures that scikit-image and scikit-learn carry, and crops of them."
    import numpy as np
    from skimage import data
    from sklearn.datasets import load_sample_images
    sources = {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    sources |= dict(zip(("china", "flower"), load_sample_images().images))
    folder.mkdir()
    for name, a in sources.items():
        im = Image.fromarray(np.asarray(a)).convert("RGB"); w, h = im.size
        for n in range(crops): im.crop((n % 2 * w // 3, n // 2 * h // 3, n % 2 * w // 3 + 2 * w // 3, n // 2 * h // 3 + 2 * h // 3)).save(folder / f"{name}{n}.jpg")
    return len(sources) * crops


def test_photographs_of_ones_own(tmp_path):
    from realign_nb.masking import check_mask
    n = photographs(tmp_path / "photos")
    (tmp_path / "photos/broken.jpg").write_bytes(b"not a picture"); shutil.copy(tmp_path / "photos/coffee0.jpg", tmp_path / "photos/again.jpg")
    out = run("run", tmp_path / "run", "--images", tmp_path / "photos", "--annotator", "self", "--masker", "rule", "--arms", "rdpo", "--workers", 1)
    pairs = lines(tmp_path / "run/pairs.jsonl")
    assert n >= 20 and len(pairs) >= 10, out
    assert all(check_mask(p["chosen"], p["masked"]) for p in pairs) and all(p["provenance"]["on_policy"] for p in pairs)
    assert not any({p["image"], p["retrieved_image"]} == {"coffee0.jpg", "again.jpg"} for p in pairs)       # a duplicate is no negative
    assert [m["id"] for m in lines(tmp_path / "run/skipped.jsonl")] == ["broken.jpg"] and "broken.jpg" in out
    assert lines(tmp_path / "run/arms/rdpo-seed0/log.jsonl")
    from realign_nb.models import load_vlm
    adapted = load_vlm("tiny", adapter=tmp_path / "run/arms/rdpo-seed0/adapter", device="cpu")
    assert adapted.generate(["Describe this image in detail."], [tmp_path / "photos/coffee0.jpg"])[0]


def test_model_is_any_local_llava(tmp_path):
    from realign_nb.tinyvlm import build
    model, processor = build(seed=7)
    model.save_pretrained(tmp_path / "model"); processor.save_pretrained(tmp_path / "model")
    run("run", tmp_path / "run", "--model", tmp_path / "model", "--n-images", 6, "--n-scenes", 4, "--text-encoder", "minilm", "--arms", "rdpo", "--epochs", 1)
    assert json.loads((tmp_path / "run/arms/rdpo-seed0/manifest.json").read_text())["settings"]["profile"] == "paper"
    assert lines(tmp_path / "run/arms/rdpo-seed0/log.jsonl") and {s["arm"] for s in lines(tmp_path / "run/scores.jsonl")} == {"base", "rdpo"}


def test_no_pairs_is_a_failure_with_the_yield_table(tmp_path):
    out = run("run", tmp_path / "run", *SMALL, "--accept", "above", "--tau", "1", fails=True)
    assert "no pairs" in out and "too different" in out


@pytest.mark.parametrize("args, text", [
    (["--images", "nowhere"], "no such folder"),
    (["--k", "30", "--n-images", "8"], "k=30"),
    (["--model", "./nothing"], "no such model folder"),
    (["--n-images", "6", "--annotator", "self", "--images", "EMPTY"], "needs at least two"),
])
def test_bad_input_says_what_to_do(tmp_path, args, text):
    (tmp_path / "EMPTY").mkdir()
    out = run("pairs", tmp_path / "run", *[tmp_path / a if a == "EMPTY" else a for a in args], fails=True)
    assert text in out and "Traceback" not in out
