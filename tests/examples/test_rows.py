"""Beyond pictures: draws of rows, and the three scripts."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from comet_examples import rows
from comet_examples.rows import Fitted, Rows, breast_cancer, compare, contaminated, digits
from comet_meta import SoftConfidentWeighter

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_shipped_tables_are_whole():
    (tumours,) = breast_cancer()
    assert tumours.normal.shape == (357, 30)
    assert tumours.anomalous.shape == (212, 30)
    cases = digits()
    assert sum(len(case.normal) for case in cases) == 1797
    assert {len(case.normal) + len(case.anomalous) for case in cases} == {1797}


def test_the_power_series_are_whole():
    try:
        (days,) = rows.power_demand()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert days.normal.shape[1] == 24
    assert len(days.normal) + len(days.anomalous) == 1096
    both = torch.cat([days.normal, days.anomalous])
    torch.testing.assert_close(both.mean(dim=1), torch.zeros(1096), atol=1e-3, rtol=0)


def test_without_the_package_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(rows, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps aeon"):
        rows.power_demand()


def test_contamination_has_the_share_that_is_asked_for_and_no_row_twice():
    case = Rows(torch.randn(100, 3) * 2 + 5, torch.randn(40, 3) + 50)
    draw = contaminated(case, 0.3, seed=1)
    assert (len(draw.train), int(draw.bad.sum())) == (100, 30)  # 70 normal ones
    assert (len(draw.test), int(draw.anomalous.sum())) == (40, 10)
    together = torch.cat([draw.train, draw.test])
    assert len(together.unique(dim=0)) == 140
    torch.testing.assert_close(draw.train.mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(draw.train.std(dim=0), torch.ones(3))
    # Bad rows are those that stand out here, and so are anomalous ones in the test.
    assert draw.train[draw.bad].min() > draw.train[~draw.bad].max()
    assert draw.test[draw.anomalous].min() > draw.test[~draw.anomalous].max()
    assert torch.equal(contaminated(case, 0.3, seed=1).train, draw.train)
    assert not torch.equal(contaminated(case, 0.3, seed=2).train, draw.train)
    with pytest.raises(ValueError, match=r"takes 70 of 40 anomalous rows.*take less noise"):
        contaminated(case, 0.5, seed=0)


def test_every_method_gets_the_rows_and_weights_that_it_stands_for():
    asked = []

    def fit(train, weights, contamination):
        asked.append((len(train), weights))
        assert contamination == 0.2
        weighter = None if weights == "none" else SoftConfidentWeighter(len(train))
        if weighter is not None:
            weighter.fit(train.norm(dim=1))
        # Plainly trained models know nothing, others everything.
        clean = weights != "none" or len(train) == 70
        scores = torch.Tensor.norm if clean else torch.rand_like
        return Fitted(lambda batch: scores(batch, dim=1) if clean else batch[:, 0] * 0, weighter)

    case = Rows(torch.randn(100, 3), torch.randn(40, 3) * 40)
    table = compare(fit, [case], noise=0.125, seeds=[3, 4], contamination=0.2)
    assert asked == [(80, "none"), (70, "none"), (80, "prior"), (80, "own")] * 2
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in table.splitlines()[2:]
    }
    assert cells["plain"] == ["0.500 ± 0.000", "-", "-"]
    assert float(cells["comet"][0].split()[0]) > 0.95
    assert float(cells["comet"][2].split()[0]) > 0.9
    assert cells["oracle"][1].startswith("+0.4") or cells["oracle"][1].startswith("+0.5")


@pytest.mark.parametrize(
    ("script", "case"),
    [
        ("tabular_autoencoder", "breast_cancer"),
        ("tabular_deep_svdd", "digits"),
        ("timeseries_reconstruction", "power_demand"),
    ],
)
def test_the_scripts_train_and_print_a_table(script, case, monkeypatch, capsys):
    """On three dozen rows of a plane, with bad ones beside it."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(60, 2, generator=generator) @ torch.randn(2, 24, generator=generator)
    few = [Rows(plane, 3 * torch.randn(30, 24, generator=generator))]
    monkeypatch.setattr(rows, case, lambda: few)
    monkeypatch.setattr(
        rows, "compare", lambda fit, cases, **told: compare(fit, cases, seeds=[0, 1], **told)
    )
    monkeypatch.setattr(sys, "argv", [script, "--contamination", "0.1"])
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    aurocs = [float(value) for value in re.findall(r"\| ([\d.]+) ± [\d.]+ +\| ", printed)]
    assert len(re.findall(r"^\| (plain|oracle|comet)", printed, re.MULTILINE)) == 4
    assert min(aurocs[:4]) > 0.5
    # Weights of bad rows fall: the prior finds rows off the plane.
    assert float(re.findall(r"([\d.]+) ± [\d.]+ +\|$", printed, re.MULTILINE)[-2]) > 0.8
