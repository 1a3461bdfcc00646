"""The training-step benchmark: its FLOPs are those that one counts by hand, and every variant it compares computes the same loss."""
import importlib.util
from pathlib import Path
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
SCRIPT = Path(__file__).resolve().parents[1]/"benchmarks"/"train_step.py"
N_PAIRS = 2


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


def by_hand(g):
    "FLOPs of a naive step for one pair: three rows, policy and reference, all logits, an encoding per row and model."
    patches = (g["side"]//14)**2
    d, ff, r, n, T = g["hidden"], g["ff"], g["rank"], patches+1, patches+g["prompt"]+g["response"]
    shapes = [(d, d)]*4+[(d, ff), (d, ff), (ff, d)]                                                    # q k v o gate up down
    linear, lora = sum(2*a*b for a, b in shapes), sum(2*r*(a+b) for a, b in shapes)                    # per token and layer
    attention, head = 4*T*T*d, 2*d*g["vocabulary"]*T                                                       # per row
    forward = g["layers"]*(T*linear+attention)+head
    # backward: inputs of frozen matrices, both sides of LoRA's, five products of attention against two; the embeddings need no gradient, so in
    # the first layer q, k, v and their LoRA A give none to their inputs
    backward = g["layers"]*(T*(linear+2*lora)+2.5*attention)+head-T*3*(2*d*d+2*r*d)
    v, vff = g["tower_hidden"], g["tower_ff"]
    tower = 2*3*14*14*v*patches+g["tower"]*(n*2*(4*v*v+2*v*vff)+4*n*n*v)+2*patches*(v*d+d*d)
    return 3*(2*forward+g["layers"]*T*lora+backward+2*tower)


def test_flops_are_those_counted_by_hand(bench):
    g = bench.GEOMETRY["smoke"]
    found = bench.measure("naive", g, N_PAIRS, steps=1)
    assert found["gflop"]*1e9==pytest.approx(N_PAIRS*by_hand(g), rel=1e-9)
    tokens = 4+g["prompt"]+g["response"]
    assert (found["tokens"], found["encodings"])==(N_PAIRS*6*tokens, N_PAIRS*6)


def test_every_variant_has_the_same_loss_and_ours_costs_less(bench):
    g = bench.GEOMETRY["smoke"]
    names = ["naive", "released style", "TRL, exact rDPO", "ours, flat, stored", "ours, shared, on the fly", "ours, shared, stored, checkpointing",
             "ours, shared, stored"]
    found = {name: bench.measure(name, g, N_PAIRS, steps=1) for name in names}
    bench.agree(found)
    assert found["naive"]["loss"]!=pytest.approx(2*torch.log(torch.tensor(2.)).item(), abs=1e-4)       # policy and reference differ
    image, prompt, response = 4, g["prompt"], g["response"]
    assert found["ours, shared, stored"]["tokens"]==N_PAIRS*(2*(image+prompt)+3*response)              # two prefixes, three responses, no padding
    assert found["ours, shared, stored"]["encodings"]==2*N_PAIRS
    assert found["ours, shared, stored"]["gflop"]<.5*found["released style"]["gflop"]
    found["ours, shared, stored"]["gradient_norm"] *= 1.001
    with pytest.raises(AssertionError, match="ours, shared, stored: gradient_norm"): bench.agree(found)
