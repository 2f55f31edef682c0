"""Memories trained alone by ``evaluate --train``: what is kept of blocks below, gradients, choice, the report."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from transformers_support import WIDTH, tiny, tokens  # isort: skip (may skip the module)
from neighbours_support import Letters

from memkernels._evaluate import command, texts, trained, trained_report, training
from memkernels.integrations import transformers as mkt

pytestmark = pytest.mark.filterwarnings("ignore")

DOCUMENTS = [texts.Document(str(n), tokens(23, seed=n)) for n in range(6)]


def beside(layer=1, **options):
    model = tiny("llama", **options).requires_grad_(False)
    torch.manual_seed(2)
    handle = mkt.attach(model, mkt.ProductKeys([layer], n=8, heads=2, k=4))
    torch.nn.init.normal_(handle.memories[0].parts[str(layer)].project_out.weight, std=0.1)
    return handle


@pytest.mark.parametrize("layer", (0, 1, 2))
def test_what_is_kept_gives_the_loss_and_the_gradients_of_the_whole_model(layer):
    """Rows of different lengths; the whole model reads every window by itself."""
    handle = beside(layer)
    place = handle.place
    with handle.disabled():
        kept = training.rows(place, layer, training.windows(DOCUMENTS, 9))
    assert [len(row.ids) for row in kept] == [9, 9, 5] * 6
    windows = [ids for document in DOCUMENTS[:1] for ids in document.ids.split(9)]
    losses = []
    for ids in windows:
        logits = handle.model(ids[None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, ids[1:], reduction="sum"))
    count = sum(len(ids) - 1 for ids in windows)
    whole = sum(losses) / count
    whole.backward()
    wanted = {name: p.grad.clone() for name, p in handle.memories[0].named_parameters()}
    handle.model.zero_grad()
    with training.only_above(place, layer):
        hidden, targets = training._hidden(place, kept[:3])
        loss = training.backward(place.model.get_output_embeddings(), hidden, targets)
        assert training.mean_loss(place, kept[:3]) == pytest.approx(float(whole), abs=1e-5)
    assert loss == pytest.approx(float(whole), abs=1e-5)
    for name, p in handle.memories[0].named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], atol=1e-5, rtol=1e-3, msg=name)
    assert all("forward" not in vars(block) for block in place.blocks)
    assert float(handle.model(DOCUMENTS[0].ids[None, :9], labels=DOCUMENTS[0].ids[None, :9]).loss) == pytest.approx(
        float(losses[0] / 8), abs=1e-5
    )


def trained_once(seed, steps=12, rate=1e-2):
    handle = beside()
    with handle.disabled():
        kept = training.rows(handle.place, 1, training.windows(DOCUMENTS, 9))
    with training.only_above(handle.place, 1):
        done = training.train(
            handle, kept[3:], kept[:3], steps=steps, rate=rate, batch=2, seed=seed, looks=3, progress=iter
        )
        left = training.mean_loss(handle.place, kept[:3])
    return handle, done, left


def test_the_same_seed_gives_the_same_losses_and_the_best_step_is_kept():
    handle, done, left = trained_once(0)
    assert done.losses == trained_once(0)[1].losses != trained_once(1)[1].losses
    assert [step for step, _ in done.validation] == [4, 8, 12]
    assert (done.best, left) == min(done.validation, key=lambda pair: pair[1])
    assert done.best < 12  # random texts: what is learned of some does not help with others
    assert done.tokens == sum(2 * (9 - 1) for _ in range(8)) + sum(2 * 4 for _ in range(4)) or done.tokens > 100
    assert all(p.grad is None for n, p in handle.model.named_parameters() if not n.startswith("mk_memory"))


def test_it_learns():
    """Texts that repeat what was trained: the memory alone tells them."""
    handle = beside()
    with handle.disabled():
        kept = training.rows(handle.place, 1, training.windows(DOCUMENTS[:2], 23))
    with training.only_above(handle.place, 1):
        done = training.train(handle, kept, kept, steps=80, rate=1e-2, batch=2, seed=0, looks=2, progress=iter)
    assert done.losses[0] > 4 and done.validation[-1][1] < 1


def test_sizes_of_the_controls():
    handle = beside()
    memory = handle.memories[0]
    values = 8 * 8 * WIDTH
    total = sum(p.numel() for p in memory.parameters())
    assert training.active(memory) == total - values + 2 * 4 * WIDTH
    handle.detach()
    for wanted in (total, training.active(memory)):
        control = training.FeedForward(1, training.hidden_of(wanted, WIDTH))
        mkt.attach(handle.model, control).detach()
        assert abs(sum(p.numel() for p in control.parameters()) - wanted) <= WIDTH + 1
    handle = mkt.attach(tiny("llama"), training.FeedForward(1, 4))
    assert torch.equal(handle.model(tokens(1, 5)).logits, tiny("llama")(tokens(1, 5)).logits)  # zero at first


def test_the_command_measures_each_document_with_each(tmp_path, monkeypatch, capsys):
    """With a tiny model and made-up manuals: the whole run, its JSON, its tables and its picture."""
    model = tiny("llama", num_hidden_layers=28)
    monkeypatch.setattr(texts, "language_model", lambda: (model, Letters()))
    monkeypatch.setattr(texts, "missing", list)
    monkeypatch.setattr(texts, "SHORTEST", 100)
    monkeypatch.setattr(trained, "KINDS", {"product-keys": trained.Kind("product keys", _small)})
    for folder, count in (("manual", 40), ("far", 2)):
        (tmp_path / folder).mkdir()
        for n in range(count):
            (tmp_path / folder / f"{n}.txt").write_text(f"{folder} {n}: what was read is found again. " * 9)
    out, picture = tmp_path / "result.json", tmp_path / "picture.png"
    code = command.main(
        [f"--texts={tmp_path / 'manual'}", f"--unrelated={tmp_path / 'far'}", "--train=product-keys", "--quick"]
        + [f"--out={out}", f"--picture={picture}", "--window=64"]
    )
    said = capsys.readouterr()
    assert code == 0, said.err
    result = json.loads(out.read_text())
    (run,) = result["runs"]
    names = [row["name"] for row in run["trained"]]
    assert names[0] == "product keys" and len(names) == 3 and all(name.startswith("MLP of ") for name in names[1:])
    assert {row["texts"] for row in run["test"]} == {"manual", "far"} and picture.exists()
    assert not {row["document"] for row in run["test"] if row["texts"] == "manual"} & set(run["validation"])
    for row in run["test"]:
        file = tmp_path / row["texts"] / row["document"]
        ids = torch.tensor(Letters()(file.read_text())["input_ids"])[: row["tokens"] + 1]
        own = float(mkt.score(model, ids, window=64).double().mean())
        assert row["nats"][""] == pytest.approx(own, abs=1e-6) and set(row["nats"]) == {"", *names}
        assert all(abs(row["nats"][name] - own) > 1e-6 for name in names)  # each was attached when it was measured
    assert {row["rate"] for row in run["trained"]} <= set(trained.RATES)
    for row in run["trained"]:
        assert row["rate"] == min(row["tuning"], key=lambda pair: pair[1])[0] and row["steps"] == trained.QUICK.steps
    assert not hasattr(model, "mk_memory")
    table = trained_report.table(result)
    assert table in said.out and trained_report.documents(result) in said.out
    manual = [row for row in run["test"] if row["texts"] == "manual"]
    count = sum(row["tokens"] for row in manual)
    means = [sum(row["nats"][name] * row["tokens"] for row in manual) / count for name in ("", "product keys")]
    change = torch.tensor(means[1] - means[0]).double().expm1()
    line = next(line for line in table.splitlines() if "product keys" in line)
    assert f"**{100 * float(change):+.1f}%**" in line


def _small(layer):
    return mkt.ProductKeys([layer], n=8, heads=2, k=4)
