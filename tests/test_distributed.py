"""Two processes on the CPU against one."""

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import docs_ranks
import ranks
from comet_meta import CovarianceMetaRegularizer, SoftConfidentWeighter, distributed
from comet_meta.meta import step as meta_step
from comet_meta.tasks import Task

try:
    from torch.distributed.fsdp import fully_shard  # noqa: F401

    FSDP2 = True
except ImportError:
    FSDP2 = False

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.slow,  # it takes two processes some ten seconds to start
]


def torchrun(script: Path, *args: object, **environment: str) -> None:
    """Run a script in two processes; its output is shown when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(part) for part in (script, *args)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(Path(ranks.__file__), folder, COMET_TEST_FSDP=str(int(FSDP2)))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)] + [folder]


def same_on_both(first: dict, second: dict) -> None:
    for key in ("parameters", "pairs", "weights"):
        for ours, theirs in zip(first[key], second[key], strict=True):
            assert torch.equal(ours, theirs), key
    assert first["ungraded"] == second["ungraded"]
    assert torch.equal(first["random"], second["random"])


def close(found: dict, alone: dict) -> None:
    for ours, theirs in zip(found["parameters"], alone["parameters"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_the_drop_in_step_under_ddp_equals_one_process(both):
    same_on_both(both[0]["drop_in"], both[1]["drop_in"])
    close(both[0]["drop_in"], ranks.drop_in(ranks.Model(), ranks.UNEVEN))


def test_the_weighted_full_step_equals_one_process(both):
    same_on_both(both[0]["none"], both[1]["none"])
    alone = ranks.full(ranks.Model(), ranks.UNEVEN, meta="none")
    close(both[0]["none"], alone)


def test_a_parameter_that_no_process_uses_gets_no_gradient(both):
    same_on_both(both[0]["no penalty"], both[1]["no penalty"])
    alone = ranks.full(ranks.Model(), ranks.UNEVEN, meta="none", regularizer=None)
    close(both[0]["no penalty"], alone)
    assert both[0]["no penalty"]["ungraded"] == alone["ungraded"]
    assert alone["ungraded"].count(True) == 2


def joined_tasks(both, name: str, monkeypatch) -> None:
    """Make one process deal its batches into the tasks that the two processes had."""
    steps = zip(both[0][name]["tasks"], both[1][name]["tasks"], count())
    sizes = [len(batch[0]) for batch in ranks.UNEVEN]
    dealt = iter(
        [Task(s, q) for s, q in ours] + [Task(s + sizes[k], q + sizes[k]) for s, q in theirs]
        for ours, theirs, k in steps
    )
    monkeypatch.setattr(meta_step, "split_tasks", lambda *_: next(dealt))


def test_a_meta_step_equals_one_process_with_the_same_tasks(both, monkeypatch):
    same_on_both(both[0]["mldg"], both[1]["mldg"])
    joined_tasks(both, "mldg", monkeypatch)
    alone = ranks.full(ranks.Model(), ranks.EVEN, meta="mldg", inner_lr=0.1, tasks=4)
    close(both[0]["mldg"], alone)


def test_a_meta_step_on_an_uneven_batch_counts_processes_by_their_rows(both):
    """Against MLDG by hand: each task's support and query gradients, by numbers of rows."""
    same_on_both(both[0]["mldg uneven"], both[1]["mldg uneven"])
    model = ranks.Model()
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    weighter = SoftConfidentWeighter(ranks.N, rule=ranks.falling)
    weighter.fit(ranks.SCORES)
    theta = list(model.parameters())
    strength = CovarianceMetaRegularizer(gamma=0.0).strength

    def gradient(index: torch.Tensor) -> list[torch.Tensor]:
        objective = (weighter(index).double() * model(index)).mean()
        objective = objective + strength * sum(p.square().sum() for p in theta)
        return list(torch.autograd.grad(objective, theta))

    for k, batch in enumerate(ranks.UNEVEN):
        total = [torch.zeros_like(p) for p in theta]
        for rank, rows in enumerate(batch):
            index = torch.tensor(list(rows))
            tasks = both[rank]["mldg uneven"]["tasks"]
            tasks = tasks[k] if len(rows) > 1 else []
            found = [gradient(index)] if not tasks else []
            for support, query in tasks:
                share = len(query) / (len(support) + len(query))
                before = [p.detach().clone() for p in theta]
                first = gradient(index[support])
                with torch.no_grad():
                    for p, g in zip(theta, first, strict=True):
                        p.sub_(0.1 * g)
                second = gradient(index[query])
                with torch.no_grad():
                    for p, old in zip(theta, before, strict=True):
                        p.copy_(old)
                found.append(
                    [(1 - share) * a + share * b for a, b in zip(first, second, strict=True)]
                )
            part = len(rows) / sum(len(r) for r in batch) / len(found)
            for gradients in found:
                for sum_, g in zip(total, gradients, strict=True):
                    sum_ += part * g
        for p, g in zip(theta, total, strict=True):
            p.grad = g
        adam.step()
    close(both[0]["mldg uneven"], {"parameters": [p.detach() for p in theta]})


@pytest.mark.parametrize("kind", ["", ", losses", ", broken", ", losses, broken"])
def test_one_object_trains_as_in_one_process(both, kind):
    """Weights, steps and suspects of ``CoMet``, also where one process has a NaN."""
    first, second = (found[f"one object{kind}"] for found in both[:2])
    alone = ranks.one_object(5 if "broken" in kind else None, scored="losses" not in kind)
    assert first["taken"] == second["taken"] == alone["taken"]
    assert first["taken"].count(False) == ("broken" in kind)
    for name in ("weights", "suspects", "scores"):
        assert torch.equal(first[name], second[name])
    for ours, theirs in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(ours, theirs)
    close(first, alone)
    assert torch.equal(first["weights"], alone["weights"])
    assert first["weights"].sum() < ranks.EVERY - 5
    torch.testing.assert_close(first["scores"], alone["scores"], rtol=1e-4, atol=1e-6)


def test_one_object_goes_on_where_a_process_has_nothing_but_nan(both):
    first, second = (found["one object, losses, lost"] for found in both[:2])
    assert torch.equal(first["weights"], second["weights"])
    # Every other sample never had a finite loss: nothing is known of it.
    assert (first["weights"][1::2] == 1).all()
    assert (first["weights"][::2] < 1).any()


def test_streamed_scores_reach_every_process(both):
    assert torch.equal(both[0]["streamed"], both[1]["streamed"])
    assert torch.equal(both[0]["streamed"], ranks.streamed())


def test_collected_scores_reach_every_process(both):
    assert torch.equal(both[0]["collected"], both[1]["collected"])
    torch.testing.assert_close(both[0]["collected"], ranks.DATA.sum(dim=1).float())


def test_two_processes_resume_the_first_ones_checkpoint_exactly(both):
    for found in both[:2]:
        same_on_both(found["resume"]["uninterrupted"], found["resume"]["resumed"])
    same_on_both(both[0]["resume"]["resumed"], both[1]["resume"]["resumed"])


def test_one_process_resumes_the_checkpoint_of_two(both):
    saved = torch.load(both[2] / "checkpoint.pt", weights_only=True)
    model = ranks.Model()
    comet = ranks.wrapped(model.parameters(), regularizer=CovarianceMetaRegularizer())
    model.load_state_dict(saved["model"])
    comet.load_state_dict(saved["optimizer"])
    assert torch.equal(comet.regularizer.count, torch.tensor(2))
    assert torch.equal(comet.weighter(), both[0]["drop_in"]["weights"])
    index = torch.arange(16, 21)
    comet.step(lambda rows: model(index[rows]), index)
    # Other tasks than the two processes deal, so only as near as the meta-step is to the plain one.
    for ours, theirs in zip(
        model.parameters(), both[0]["resume"]["resumed"]["parameters"], strict=True
    ):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not FSDP2, reason="this torch has no FSDP2 (fully_shard)")
class TestFSDP2:
    """Sharded parameters, first order; inner steps are those of the joined batch."""

    @pytest.mark.parametrize("name", ["drop_in", "none"])
    def test_plain_weighted_steps_equal_one_process(self, both, name):
        first, second = (found["fsdp"][name] for found in both[:2])
        same_on_both(first, second)
        run = ranks.drop_in if name == "drop_in" else ranks.full
        close(first, run(ranks.Plain(), ranks.UNEVEN, meta="none"))

    @pytest.mark.parametrize(
        ("meta", "inner"), [("mldg", "sgd"), ("fomaml", "adam"), ("reptile", "sgd")]
    )
    def test_meta_steps_equal_one_process_with_the_joined_task(
        self, both, monkeypatch, meta, inner
    ):
        first, second = (found["fsdp"][meta] for found in both[:2])
        same_on_both(first, second)
        joined = iter(
            [Task(torch.cat([s, S + 4]), torch.cat([q, Q + 4]))]
            for [(s, q)], [(S, Q)] in zip(first["tasks"], second["tasks"], strict=True)
        )
        monkeypatch.setattr(meta_step, "split_tasks", lambda *_: next(joined))
        settings = {"inner_optimizer": inner, "inner_lr": 0.1, "inner_steps": 2}
        close(first, ranks.full(ranks.Plain(), ranks.EVEN, meta=meta, **settings))

    def test_second_order_is_refused(self, both):
        assert "FSDP2" in both[0]["fsdp"]["maml"]


def test_buckets_keep_kinds_apart_and_stay_small(monkeypatch):
    monkeypatch.setattr(distributed, "_BUCKET_BYTES", 16)
    tensors = [torch.zeros(n) for n in (1, 2, 3, 9, 1)] + [torch.zeros(1, dtype=torch.float64)]
    sizes = [[len(t) for t in bucket] for bucket in distributed._buckets(tensors)]
    assert sizes == [[1, 2], [3], [9], [1], [1]]


@pytest.mark.parametrize("names", [["ddp", "full", "save"], ["ddp", "fsdp"], ["one"]])
def test_the_documented_loops(tmp_path, names):
    if "fsdp" in names and not FSDP2:
        pytest.skip("this torch has no FSDP2 (fully_shard)")
    torchrun(docs_ranks.__file__, tmp_path, *names)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    assert len(set(first["suspects"].tolist()) & set(range(20))) >= 17
    for ours, theirs in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(ours, theirs)
    assert (tmp_path / "checkpoint.pt").exists() == ("save" in names)
