"""The data of the loops: rows on a line, of which the first ones lie beside it."""

import torch

BAD, N = 16, 256
LINE = torch.tensor([1.0, 2.0, -1.0, 0.5])


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(N, 1, generator=generator) * LINE
    beside = torch.randn(BAD, 4, generator=generator)
    beside -= (beside @ LINE)[:, None] * LINE / LINE.square().sum()
    data[:BAD] = 4 * beside / beside.norm(dim=1, keepdim=True)
    return data + 0.1 * torch.randn(N, 4, generator=generator)
