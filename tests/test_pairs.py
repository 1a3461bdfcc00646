"""Algorithm 1 through servers that fail, and through kills: every image is accounted for, nothing is asked twice, no key is written."""
import os, signal, threading, time
from pathlib import Path

import pytest
from faults import FAULTS, FaultServer, spread
from soak import soak

from realign_nb.core import read_jsonl
from realign_nb.stages import CallSettings, PairsSettings, make_pairs, reopen
from realign_nb.world import draw, make_scenes

KEY = "sk-test-SECRET-0123456789abcdef"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Five hundred pictures."
    folder = tmp_path_factory.mktemp("photos")
    for s in make_scenes(500, "pairs", seed=5): draw(s).save(folder / f"{s.id}.png")
    return folder


def account(folder, photos, server, n, caplog):
    "Run Algorithm 1 with every model behind the server; each image must end in exactly one place."
    limit = None if n == 500 else n
    s = PairsSettings(images=str(photos), limit=limit, annotator=f"server:quick@{server.url}", policy_server=f"server:quick@{server.url}", masker="prompt", k=2, text_encoder="minilm")
    how = CallSettings(concurrency=64, timeout=.5, max_retries=2, give_up=200)
    pairs, misses = make_pairs(folder, s, how=how)
    ids = [r.id for r in [*pairs, *misses]]
    assert len(ids) == len(set(ids)) == n
    failed = [m for m in misses if m.reason.startswith("failed at ")]
    assert all(m.reason and ":" in m.reason for m in misses)
    replies = [r["key"] for line in read_jsonl(folder / "calls.jsonl") for r in line["replies"] if not r["failed"]]
    assert len(replies) == len(set(replies))
    for f in folder.rglob("*"): assert not f.is_file() or KEY.encode() not in f.read_bytes()
    assert KEY not in caplog.text and {f"Bearer {KEY}"} >= server.keys
    return s, how, pairs, misses, failed


@pytest.fixture(autouse=True)
def key(monkeypatch, caplog): monkeypatch.setenv("OPENAI_API_KEY", KEY); caplog.set_level("DEBUG")


def test_all_faults_then_what_failed_is_asked_again(tmp_path, photos, caplog):
    with FaultServer(spread(.6), seed=3) as server:
        s, how, pairs, misses, failed = account(tmp_path / "run", photos, server, 120, caplog)
        assert len(server.faults) == len(FAULTS) and pairs and failed
        asked, server.rates = server.requests, {}
        reopen(tmp_path / "run")
        again, rest = make_pairs(tmp_path / "run", s, how=how)
    assert not [m for m in rest if m.reason.startswith("failed at ")]
    assert {p.id for p in pairs} <= {p.id for p in again} and len(again) + len(rest) == 120
    plain = lambda ps: {p.id: (p.chosen, p.rejected, p.masked, p.retrieved_image) for p in ps}
    assert plain(pairs).items() <= plain(again).items()                                        # what was there has not changed
    assert server.requests - asked <= 4 * len(failed)                                          # only those were asked


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_five_hundred_images_with_every_fault_at_a_fifth(tmp_path, photos, fault, caplog):
    with FaultServer({fault: .2}, seed=3) as server:
        _, _, pairs, misses, failed = account(tmp_path / "run", photos, server, 500, caplog)
    print(f"{fault}: {server.faults[fault]} faults in {server.requests} requests; {len(pairs)} pairs, {len(misses) - len(failed)} misses, {len(failed)} failed")
    assert server.faults[fault] > 50 and len(pairs) > 300


@pytest.mark.slow
def test_killed_three_times_ends_as_an_unbroken_run(tmp_path):
    whole, broken, done = soak(tmp_path, kills=3, images=40)
    assert whole == broken and done == 3 and len(whole[0]) > 10


def kill_a_worker(log, killed):
    "Wait for the first answer, then kill one of Ray's workers."
    while not killed:
        time.sleep(.05)
        if not log.exists() or not log.stat().st_size: continue
        for proc in Path("/proc").glob("[0-9]*"):
            try: busy = (proc / "cmdline").read_bytes().startswith(b"ray::MapWorker")
            except OSError: continue
            if busy: os.kill(int(proc.name), signal.SIGKILL); killed.append(proc.name); break


@pytest.mark.slow
def test_ray_workers_make_the_same_pairs_though_one_is_killed(tmp_path, photos):
    s = PairsSettings(images=str(photos), limit=140, annotator="self", k=2)          # three batches a stage
    killed = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray/calls.jsonl", killed), daemon=True)
    here = make_pairs(tmp_path / "here", s)
    killer.start()
    there = make_pairs(tmp_path / "ray", s, how=CallSettings(engine="ray", ray_workers=2))
    assert killed
    plain = lambda rs: ([(p.id, p.chosen, p.rejected, p.masked, p.retrieved_image, p.provenance["rank"]) for p in rs[0]], [(m.id, m.reason) for m in rs[1]])
    assert plain(there) == plain(here)
    for a, b in zip(here[0], there[0]):
        assert a.provenance["image_similarity"] == pytest.approx(b.provenance["image_similarity"], abs=1e-5)
        assert a.provenance["text_similarity"] == pytest.approx(b.provenance["text_similarity"], abs=1e-5)
