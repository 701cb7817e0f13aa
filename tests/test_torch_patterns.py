"""Patterns of torch's own optimizer tests, and the table of them in the documentation."""

import pytest

from snippets import ROOT

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")

import torch_patterns

PAGE = (ROOT / "docs/reliability.md").read_text()


@pytest.mark.parametrize("pattern", torch_patterns.PATTERNS)
def test_the_row_of_the_table_is_what_comes_out(pattern):
    assert torch_patterns.row(pattern) in PAGE.splitlines()


def test_the_table_names_all_patterns_and_no_failure():
    rows = [line for line in PAGE.splitlines() if line.endswith("| LBFGS | none |")]
    assert len(rows) == len(torch_patterns.PATTERNS)
