"""Algorithm 1 through a server that is not ours: `transformers serve` with the tiny VLM on loopback, asked through the openai client."""
import os, socket, subprocess, sys, time, urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from realign_nb.core import read_jsonl
from realign_nb.models import TINY
from realign_nb.stages import PairsSettings, make_pairs
from realign_nb.world import draw, make_scenes


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "The address of a running `transformers serve`."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    log = open(tmp_path_factory.mktemp("serve") / "log", "w+")
    cmd = [str(Path(sys.executable).with_name("transformers")), "serve", str(TINY), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    p = subprocess.Popen(cmd, stdout=log, stderr=subprocess.STDOUT, env=os.environ | dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"))
    try:
        for _ in range(240):
            time.sleep(.5)
            assert p.poll() is None, Path(log.name).read_text()[-3000:]
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2); break
            except OSError: continue
        else: raise AssertionError(Path(log.name).read_text()[-3000:])
        yield f"server:{TINY}@http://127.0.0.1:{port}/v1"
    finally: p.terminate(); p.wait(20); log.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for s in make_scenes(12, "pairs", seed=21): draw(s).save(folder / f"{s.id}.png")
    return folder


def texts(folder, records):
    "What was said, whoever said it."
    said = {}
    for line in read_jsonl(folder / "calls.jsonl"):
        for r in line["replies"]: said.setdefault((line["stage"], r["prompt"], r["image"]), r["text"])
    return said, [(r.id, r.chosen, r.rejected, r.masked, Path(r.retrieved_image).name, round(r.provenance["text_similarity"], 5)) for r in records[0]], [(m.id, m.reason) for m in records[1]]


@pytest.mark.parametrize("masker, completer", [("rule", "policy"), ("prompt", "policy"), ("rule", "annotator")])
def test_the_whole_of_algorithm_1_is_the_same_through_the_server(server, photos, tmp_path, masker, completer):
    s = PairsSettings(images=str(photos), annotator="self", masker=masker, completer=completer, k=3)
    here = texts(tmp_path / "here", make_pairs(tmp_path / "here", s))
    there = texts(tmp_path / "there", make_pairs(tmp_path / "there", replace(s, annotator=server, policy_server=server)))
    assert there == here
    said, pairs, misses = there
    assert len(pairs) + len(misses) == 12
    assert {stage for stage, *_ in said} >= ({"answer", "mask"} if masker == "prompt" else {"answer", "complete/1"})
    assert pairs or masker == "prompt"                     # the tiny model was never taught to mask: all misses, the same ones


def test_provenance_names_model_prompt_settings_and_usage(server, photos, tmp_path):
    pairs, _ = make_pairs(tmp_path / "run", PairsSettings(images=str(photos), annotator=server, policy_server=server, k=2))
    for note in pairs[0].provenance["calls"].values():
        assert note["model"].startswith(str(TINY)) and len(note["prompt"]) == 16 and note["settings"]["max_new_tokens"] == 64
        assert note["settings"]["temperature"] == 0 and min(note["tokens"]) > 0
    recorded = {r["key"]: r for line in read_jsonl(tmp_path / "run/calls.jsonl") for r in line["replies"]}
    for p in pairs:
        assert recorded[p.provenance["calls"]["answer"]["key"]]["text"] == p.chosen
        assert recorded[p.provenance["calls"]["complete"]["key"]]["text"] == p.rejected


def test_replay_gives_the_same_pairs_without_a_server(server, photos, tmp_path):
    s = PairsSettings(images=str(photos), annotator=server, policy_server=server, k=2)
    first = make_pairs(tmp_path / "run", s)
    replay = f"replay:{tmp_path / 'run/calls.jsonl'}"
    again = make_pairs(tmp_path / "again", replace(s, annotator=replay, policy_server=replay))
    plain = lambda rs: ([(p.id, p.chosen, p.rejected, Path(p.retrieved_image).name) for p in rs[0]], [(m.id, m.reason) for m in rs[1]])
    assert plain(again) == plain(first)
