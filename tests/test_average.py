import torch
from torch import nn

from dltrain.average import Average, averaging
from dltrain.optim import sgd


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.average = net(), Average(net(), decay=0.75)


def test_at_first_a_mean_then_the_decay_and_buffers_too():
    torch.manual_seed(0)
    pair, seen, variances = Pair(), [], []
    model, average = pair.model, pair.average.model
    optimizer = averaging(sgd(0.1), lambda task: (task.model, task.average))(pair)
    want = torch.zeros(2, 3)
    for n in range(6):
        model(torch.randn(5, 3)).exp().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(model.get_parameter("0.weight").detach().clone())
        variances.append(model.get_buffer("1.running_var").clone())
        decay = min(0.75, n / (n + 1))
        want = decay * want + (1 - decay) * seen[-1]
        torch.testing.assert_close(average.get_parameter("0.weight"), want)
        if n < 4:
            torch.testing.assert_close(want, torch.stack(seen).mean(0))
            torch.testing.assert_close(average.get_buffer("1.running_var"), torch.stack(variances).mean(0))
    assert int(pair.average.steps) == int(average.get_buffer("1.num_batches_tracked")) == 6
    assert not torch.equal(seen[0], seen[-1])


def test_only_the_model_is_trained():
    pair = Pair()
    (group,) = averaging(sgd(0.1), lambda task: (task.model, task.average))(pair).param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in pair.model.parameters()}
    x = torch.randn(4, 3)
    pair.average.update(pair.model)
    torch.testing.assert_close(pair.eval().average(x), pair.model(x))
