"""Ray workers: the same answers as one process, also when a worker is killed, and errors that arrive at home."""
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="pip install 'realign_nb[scale]'")
psutil = pytest.importorskip("psutil")

from realign_nb.cluster import RayWorkers, WorkersLost, answer, embed
from realign_nb.core import batch_plan
from realign_nb.models import ServerVLM, load_vlm
from realign_nb.world import DESCRIBE, draw, make_scenes, question


@pytest.fixture(scope="module")
def workers():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])     # workers cannot import this file
    w = RayWorkers(2, gpus=0, concurrency=6)
    yield w
    w.close()


@pytest.fixture(scope="module")
def vlm(): return load_vlm("tiny", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    "60 questions about 30 pictures: {id: (prompt, path)}."
    folder, out = tmp_path_factory.mktemp("images"), {}
    for s in make_scenes(30, "pairs", seed=5):
        path = str(folder / f"{s.id}.png")
        draw(s).save(path)
        out |= {f"{s.id}#0": (DESCRIBE, path), f"{s.id}#1": (question(s.kinds[0]), path)}
    return out


class Here:
    "Runs in the worker: says which process answers."
    def generate(self, prompts, images, max_new_tokens):
        time.sleep(.1)
        if prompts[0] == "bad": raise ValueError("the picture is torn")
        if prompts[0] == "worse": raise MemoryError("no room")
        if prompts[0] == "deadly": os.kill(os.getpid(), signal.SIGKILL)
        return [f"{p} {os.getpid()}" for p in prompts]


def workers_of_ray():
    "Processes of the actors that are under way."
    return [p for p in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(p.cmdline()) + p.name()]


def test_same_texts_with_a_killed_worker(workers, vlm, questions):
    ids = batch_plan({i: len(p) for i, (p, _) in questions.items()}, 4)
    plan = [[questions[i] for i in batch] for batch in ids]
    got, killed = {}, []
    for n, texts in workers.replies(plan, vlm, 24):
        assert n not in got, "a batch came twice"
        got[n] = texts
        if not killed:
            killed = workers_of_ray()[:1]
            killed[0].kill()
    assert killed and len(plan) == 15
    assert {i: t for n, texts in got.items() for i, t in zip(ids[n], texts, strict=True)} == \
        {i: t for n, batch in enumerate(plan) for i, t in zip(ids[n], answer(vlm, batch, 24), strict=True)}


def test_same_embeddings_in_order(workers, vlm, questions):
    paths = [im for _, im in questions.values()][::2]
    arrays = list(workers.embed(paths, vlm, 7))
    assert [len(a) for a in arrays] == [7, 7, 7, 7, 2]
    assert np.abs(np.concatenate(arrays) - embed(vlm, paths)).max() < 1e-5


def test_every_batch_once_when_a_worker_is_killed_in_its_batch(workers):
    plan, got, killed = [[(str(i), "x")] for i in range(40)], [], None
    for n, (text,) in workers.replies(plan, Here()):
        got.append(n)
        prompt, pid = text.split()
        assert int(prompt) == n and int(pid) != os.getpid()
        if len(got) == 5: killed = int(pid); os.kill(killed, signal.SIGKILL)
    assert sorted(got) == list(range(40)) and killed


def test_errors_come_home(workers):
    with pytest.raises(ValueError, match="^the picture is torn$"):
        list(workers.replies([[("a", "x")], [("bad", "x")]], Here()))


@pytest.mark.slow
def test_errors_of_other_kinds_come_home_too(workers):
    with pytest.raises(RuntimeError, match="in a worker: MemoryError: no room"):
        list(workers.replies([[("a", "x")], [("worse", "x")]], Here()))


@pytest.mark.slow
def test_a_batch_that_kills_every_worker_ends_the_run(workers):
    w, got = RayWorkers(2, gpus=0, patience=20), []
    with pytest.raises(WorkersLost, match="may kill every worker"):
        for n, _ in w.replies([[("a", "x")], [("deadly", "x")], [("b", "x")]], Here()): got.append(n)
    assert sorted(got) in ([0], [0, 2])


def test_what_cannot_work(workers, tmp_path):
    with pytest.raises(ValueError, match="1000 GPUs for each worker, and Ray sees"):
        list(RayWorkers(1, gpus=1000).replies([[("a", "x")]], Here()))
    assert list(workers.replies([], Here())) == [] and list(workers.embed([], Here())) == []


class Chat(BaseHTTPRequestHandler):
    "A chat endpoint: answers with the question in capitals after 0.1 s, and counts the questions that are with it."
    here, most, keys, lock = 0, 0, set(), threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with Chat.lock:
            Chat.here += 1
            Chat.most = max(Chat.most, Chat.here)
            Chat.keys.add(self.headers["authorization"])
        time.sleep(.1)
        text = next(c["text"] for c in body["messages"][0]["content"] if c["type"] == "text").upper()
        with Chat.lock: Chat.here -= 1
        out = json.dumps(dict(id="1", object="chat.completion", created=1, model="loud-1", usage=dict(prompt_tokens=9, completion_tokens=2, total_tokens=11),
                              choices=[dict(index=0, finish_reason="stop", message=dict(role="assistant", content=text))])).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def log_message(self, *_): pass


def test_a_server_is_asked_many_questions_at_once(workers, questions):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        vlm = ServerVLM("loud", f"http://127.0.0.1:{server.server_port}/v1", api_key="sk-of-this-process-only")
        batches = [list(questions.values())[i:i + 4] for i in range(0, 40, 4)]
        w = RayWorkers(1, concurrency=6)
        got = dict(w.replies(batches, vlm, 8))
    finally: server.shutdown()
    assert [[r.text for r in got[n]] for n in range(10)] == [[p.upper() for p, _ in b] for b in batches]
    assert {(r.model, r.prompt_tokens, r.reason) for replies in got.values() for r in replies} == {("loud-1", 9, None)}
    assert 4 < Chat.most <= 6, "two batches of four overlap, within the limit of six"
    assert not any("sk-of-this" in k for k in Chat.keys), "a key is not sent to workers"
