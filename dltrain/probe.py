"""What frozen features are worth: a linear classifier and nearest neighbours on them; both without chance.

Legend: N rows to learn from, T rows to test, D features, K classes, k neighbours.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.data.loader import Rows, n_micro, nth
from dltrain.lanes import all_gather
from dltrain.run import Run

CHUNK = 1024  # test rows at a time


@torch.no_grad()
def features(
    run: Run, encode: Callable[[dict[str, Tensor]], Tensor], rows: Rows, what: str = "features"
) -> tuple[Tensor, Tensor]:
    """`encode(batch) -> h_MD` of all rows, in order: float32 h_ND and int64 labels_N, on every process, on its device.

    Micro-batches are dealt round-robin, so all processes call it, and their number changes nothing. `batch` has
    labels_B and weights_B; the label of a row of weight 0 is -1, and it is neither learnt from nor counted below.
    """
    micro = run.cfg.micro_batch or run.cfg.batch // run.strategy.lanes
    world, rank = run.me.world, run.me.rank
    mine: list[Tensor] = []
    rounds = -(-n_micro(rows, micro) // world)
    for j in run.track(range(rank, rounds * world, world), what):
        batch = {k: v.to(run.device) for k, v in nth(rows, micro, j).items() if isinstance(v, Tensor)}
        h_MD = encode(batch).float()
        known_M = torch.where(batch["weights_B"] > 0, batch["labels_B"], -1)
        mine.append(torch.cat([h_MD, known_M[:, None].float()], 1))
    here = torch.stack(mine)
    everyone = here
    if world > 1:
        everyone = here.new_empty(world * rounds, *here.shape[1:])
        all_gather(everyone, here)
        everyone = everyone[[j % world * rounds + j // world for j in range(n_micro(rows, micro))]]
    table = everyone.flatten(0, 1)[: len(rows)]
    return table[:, :-1], table[:, -1].long()


def _known(labelled: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    h_ND, labels_N = labelled
    return h_ND[labels_N >= 0], labels_N[labels_N >= 0]


def linear(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, l2: float = 1e-3, iterations: int = 200
) -> float:
    """Accuracy of multinomial logistic regression, by L-BFGS from zero on standardised features.

    `l2` weighs half the squared weights beside the mean cross-entropy.
    """
    train, test = _known(train), _known(test)
    h_ND, labels_N = train
    K = int(torch.cat([labels_N, test[1]]).max()) + 1
    mean_D, std_D = h_ND.mean(0), h_ND.std(0) + 1e-6
    x_ND = (h_ND - mean_D) / std_D
    weight_KD, bias_K = (
        torch.zeros(shape, device=h_ND.device, requires_grad=True) for shape in ((K, h_ND.shape[1]), K)
    )
    solver = torch.optim.LBFGS([weight_KD, bias_K], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x_ND @ weight_KD.T + bias_K, labels_N) + l2 / 2 * weight_KD.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    logits_TK = (test[0] - mean_D) / std_D @ weight_KD.detach().T + bias_K.detach()
    return float((logits_TK.argmax(1) == test[1]).double().mean())


@torch.no_grad()
def nearest(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, k: int = 200, temperature: float = 0.1
) -> float:
    """Accuracy of the `k` nearest rows by cosine, each with a vote of exp(cosine / temperature).

    Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4.
    """
    (h_ND, labels_N), test = _known(train), _known(test)
    votes_NK = F.one_hot(labels_N, int(torch.cat([labels_N, test[1]]).max()) + 1).float()
    right = 0
    for h_TD, labels_T in zip(test[0].split(CHUNK), test[1].split(CHUNK), strict=True):
        cosine_Tk, index_Tk = neighbours(h_ND, h_TD, k)
        score_TK = (votes_NK[index_Tk] * (cosine_Tk / temperature).exp()[..., None]).sum(1)
        right += int((score_TK.argmax(1) == labels_T).sum())
    return right / len(test[1])


def neighbours(h_ND: Tensor, h_TD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of each row of h_TD the `k` nearest of h_ND, the nearest first: cosine_Tk and index_Tk."""
    cosine_TN = F.normalize(h_TD, dim=1) @ F.normalize(h_ND, dim=1).T
    found = cosine_TN.topk(min(k, len(h_ND)), dim=1)
    return found.values, found.indices
