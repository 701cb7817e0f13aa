"""The whole method in plain lines, without speed: what the library must compute. Read this first.

s: anomaly scores (N,). w: weights (N,). losses, anomalous: L_i and A_i, the losses of the samples
taken as normal and taken as anomalous, (B,). theta: parameters, a list of tensors. Step numbers as
in CoMetOptimizerWrapper.
"""

import math

import torch


def trimmed_weights(s, contamination):
    """Step 1, our rule: w and P(bad) of each sample, for a given contamination > 0."""
    return 1 - left_out(s, min(contamination + 0.1, 0.5)), left_out(s, contamination)


def trimmed_parts(s, w):
    """Step 1 with scores of parts (N, P): the tenth is one of the parts of samples with w > 0.

    A sample's weight is then 1 - left_out(s, contamination), and L_i the mean over its parts of
    part weight times part loss.
    """
    counting = w > 0
    part_weights = torch.ones(s.shape)
    part_weights[counting] -= left_out(s[counting].flatten(), 0.1).reshape(s[counting].shape)
    return part_weights


def left_out(s, fraction):
    """1 for the highest scores and 0 for the others: a ramp from 3/4 to 5/4 of the fraction."""
    values = []
    for score in s:
        above, up_to = (s > score).sum(), (s >= score).sum()  # equal scores share these ranks
        rank = (above + (up_to - above) * (torch.arange(1000) + 0.5) / 1000) / len(s)
        values.append(1 - ((rank - 0.75 * fraction) / (0.5 * fraction)).clamp(0, 1).mean())
    return torch.stack(values)


def ratio_weights(s, kappa=1.5):
    """Step 1, the paper's rule for scores >= 0: w = min(1, tau / s)."""
    q1, q3 = torch.quantile(s, 0.25), torch.quantile(s, 0.75)
    tau = q3 + kappa * (q3 - q1)
    return torch.stack([(tau / score).clamp(max=1) for score in s])


def strength(pairs, base_strength, gamma):
    """Step 4, lambda(Sigma), from the last pairs of training and validation loss, (W, 2)."""
    sigma = torch.zeros(2, 2)
    if len(pairs) >= 2:
        z = (pairs - pairs.mean(dim=0)) / pairs.std(dim=0)
        sigma = z.T @ z / (len(pairs) - 1)
    d = math.log(1 + min(max(float(torch.det(sigma)), 1e-6), 100)) / math.log(101)
    return base_strength * (1 + gamma * d)


def objective(theta, losses, anomalous, w, p_bad, exposure, lambda_sigma):
    """Steps 3 and 4: mean_i (w_i L_i + exposure P(bad)_i A_i) + lambda(Sigma) ||theta||^2."""
    count = len(losses)
    total = sum(w[i] * losses[i] + exposure * p_bad[i] * anomalous[i] for i in range(count))
    return total / count + lambda_sigma * sum((p**2).sum() for p in theta)


def gradient(theta, objective_at, support, query, mode, inner_lr):
    """Step 5, with one inner step: the gradient, support loss and query loss.

    objective_at(theta, rows) is the objective of some rows of the batch.
    """
    support_loss = objective_at(theta, support)
    if mode == "none":
        both = torch.cat([support, query])
        found = torch.autograd.grad(objective_at(theta, both), theta)
        return found, support_loss, objective_at(theta, query)
    at_theta = torch.autograd.grad(support_loss, theta, create_graph=True)
    adapted = [p - inner_lr * g for p, g in zip(theta, at_theta, strict=True)]  # theta'
    query_loss = objective_at(adapted, query)
    if mode == "maml":  # derivative through the inner step
        return torch.autograd.grad(query_loss, theta), support_loss, query_loss
    at_adapted = torch.autograd.grad(query_loss, adapted)
    n, n_query = len(support) + len(query), len(query)
    found = {
        "fomaml": at_adapted,
        "reptile": [(p - q) / inner_lr for p, q in zip(theta, adapted, strict=True)],
        "mldg": [
            (n - n_query) / n * g + n_query / n * h
            for g, h in zip(at_theta, at_adapted, strict=True)
        ],
    }
    return found[mode], support_loss, query_loss
