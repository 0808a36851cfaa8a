"""DQN: Q-learning from replayed transitions, towards a target network. Mnih et al. 2015, doi:10.1038/nature14236.

    python recipes/dqn_train.py claim                            # CartPole, with and without replay
    python recipes/dqn_train.py gpu --game atari/pong            # sixteen games side by side

Algorithm 1 and the values of extended data table 1 are preset `paper`. A lost life is terminal for the learner, but the
game goes on; an episode that a limit of time ends is not terminal: its last state has a value.

A turn is one action of each actor, and then come `updates` steps of the learner; the row of a step is a transition.
Every process plays all games, and an episode is a function of (seed, actor, turn) and its actions: nothing is
exchanged, and a run that resumes goes back exactly, by the turns kept in replay/. At the end the best checkpoint plays.

Departs from the paper: four actors with one action each, for one actor's four; torch's RMSProp, its epsilon outside
the root; vectors are divided by their spread in the first, random turns; five minutes a game at most in training too.

The same bits under single, ddp and fsdp. Not under zero1 to zero3 or --lanes 0: the target network is in no loss.
Measured: `claim` in recipes/README.md. `gpu` and `paper`: not yet measured.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import dltrain


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    game: str = "CartPole-v1"  # gymnasium's name, or atari/ROM
    actors: int = 2  # games side by side
    updates: int = 1  # steps of the learner after a turn of the actors
    memory: int = 50_000  # transitions
    frames: int = 1  # of a state
    warm: int = 1000  # random actions before the first step
    explore: int = 3000  # actions over which epsilon falls from 1
    epsilon: float = 0.05  # then on
    eval_epsilon: float = 0.0
    gamma: float = 0.99  # discount
    target_every: int = 50  # steps from one target network to the next
    optimizer: Literal["adam", "rmsprop"] = "adam"
    lr: float = 1e-3
    width: int = 128  # units of a hidden layer
    episodes: int = 20  # of an evaluation
    batch: int = 64
    clip: float = 10.0


PONG = Config(
    game="atari/pong", actors=16, updates=2, memory=400_000, frames=4, warm=20_000, explore=200_000, epsilon=0.02,
    eval_epsilon=0.01, target_every=1000, lr=2.5e-4, width=512, log_every=1000, episodes=30, eval_every=20_000,
    save_every=20_000, keep=20, steps=200_000,
)  # fmt: skip
PRESETS = {
    "debug": Config(
        steps=24, batch=24, lanes=4, actors=4, updates=2, memory=100, frames=2, warm=60, explore=50, target_every=5,
        width=16, episodes=3, log_every=1, eval_every=12, save_every=6, keep=4,
    ),
    "claim": Config(seed=30, steps=3000, gamma=0.98, log_every=60, eval_every=60, save_every=60, keep=50),
    "gpu": PONG,
    "paper": replace(
        PONG, steps=12_500_000, batch=32, actors=4, updates=1, memory=1_000_000, warm=50_000, explore=1_000_000,
        epsilon=0.1, eval_epsilon=0.05, target_every=10_000, optimizer="rmsprop", clip=0.0, eval_every=250_000,
        save_every=250_000, keep=50,
    ),
}  # fmt: skip

if __name__ == "__main__":
    dltrain.answer_help(Config, PRESETS)  # before torch is imported, which takes over a second

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain import checkpoint, rundir
from dltrain.claim import Figure, judge
from dltrain.data.sheet import animation
from dltrain.environments import Actors, film
from dltrain.errors import UserError
from dltrain.flops import Work
from dltrain.models.q_network import q_network
from dltrain.replay import Replay
from dltrain.report import conclude, farewell, figure
from dltrain.seeds import key

# M rows of a micro-batch, U actions, A actors or, in an evaluation, episodes


class Learner(nn.Module):
    unit: Tensor  # what a frame's numbers are divided by

    def __init__(self, cfg: Config, actors: Actors):
        super().__init__()
        self.online, self.target = (q_network((cfg.frames, *actors.shape), actors.actions, cfg.width) for _ in range(2))
        self.target.requires_grad_(False)
        self.gamma = cfg.gamma
        self.register_buffer("unit", torch.empty(actors.shape))

    def reset_parameters(self) -> None:
        self.unit.fill_(255.0)  # pixels; the numbers of a vector are measured before the first step

    def forward(self, batch: dict[str, Tensor], act: bool = False) -> dict[str, Tensor]:
        """Sums over the transitions; or the best actions, here, because under fsdp the weights are whole in forward."""
        values_MU = self.online(batch["states"] / self.unit)
        if act:
            return {"actions_A": values_MU.argmax(1)}
        q_M = values_MU.gather(1, batch["actions_M"][:, None])[:, 0]
        with torch.no_grad():
            next_M = self.target(batch["next"] / self.unit).amax(1)
            goal_M = batch["rewards_M"].clamp(-1, 1) + self.gamma * (1 - batch["ends_M"]) * next_M
        loss_M = F.smooth_l1_loss(q_M, goal_M, reduction="none")
        return {name: (value_M * batch["weights_M"]).sum() for name, value_M in (("loss", loss_M), ("q", q_M))}


def build_optimizer(cfg: Config, learner: Any) -> torch.optim.Optimizer:
    rmsprop = partial(torch.optim.RMSprop, alpha=0.95, eps=0.1 / 32, centered=True)
    return (torch.optim.Adam if cfg.optimizer == "adam" else rmsprop)(learner.online.parameters(), cfg.lr, foreach=True)


def work(cfg: Config, actors: Actors) -> Work:
    states, one = torch.zeros(1, cfg.frames, *actors.shape), torch.zeros(1)
    row = dict.fromkeys(("rewards_M", "ends_M", "weights_M"), one)
    row |= {"states": states, "next": states, "actions_M": one.long()}
    return Work(lambda: Learner(cfg, actors), partial(build_optimizer, cfg), row)


@torch.no_grad()
def renew(learner: Any) -> None:
    """The target network becomes the online one."""
    for target, p in zip(learner.target.parameters(), learner.online.parameters(), strict=True):
        target.copy_(p)


@torch.no_grad()
def choose(network: Any, replay: Replay, actors: Actors, epsilon: float, device: torch.device) -> np.ndarray:
    """Everyone's action in the coming turn: a random one with probability epsilon, else the best."""
    random = np.random.Generator(np.random.Philox(key=key("act", actors.what, actors.seed, replay.turn)))
    explores_A, actions_A = random.random(replay.actors) < epsilon, random.integers(actors.actions, size=replay.actors)
    if explores_A.all():
        return actions_A
    best_A = network({"states": replay.states().to(device)}, act=True)["actions_A"].cpu().numpy()
    return np.where(explores_A, actions_A, best_A)


def play(cfg: Config, network: Any, what: str, epsilon: float, device: torch.device) -> tuple[float, list[int]]:
    """The mean return of `episodes` episodes, the same at every call, and the first one's seed and actions."""
    actors = Actors(cfg.game, cfg.episodes, what, cfg.seed)
    replay, first = Replay(actors, 1, cfg.frames), [int(actors.seeds(0)[0])]
    returns_A, open_A = np.zeros(cfg.episodes), np.ones(cfg.episodes, bool)
    while open_A.any():
        actions_A = choose(network, replay, actors, epsilon if replay.turn else 1.0, device)
        seen = actors.turn(replay.turn, actions_A)
        returns_A += np.where(open_A, seen.rewards_A, 0)
        if open_A[0] and replay.turn:  # the first turn begins the episodes
            first.append(int(actions_A[0]))
        open_A &= ~actors.over_A
        replay.append(actions_A, seen)
    return float(returns_A.mean()), first


def conclusion(cfg: Config, actors: Actors, device: torch.device) -> dict[str, Any]:
    """The best checkpoint's episodes, beside random play, and the first of them as episode.gif."""
    out = Path(cfg.out)
    rows, paths = rundir.read_rows(out / "metrics.jsonl"), checkpoint.steps(out / "checkpoints")
    scores = {row["step"]: row["eval/return"] for row in rows if "eval/return" in row}
    best = max((p for p in paths if int(p.name[5:]) in scores), key=lambda p: (scores[int(p.name[5:])], p.name))
    learner = Learner(cfg, actors).to(device)
    learner.load_state_dict(checkpoint.read(best))
    score, (seed, *actions) = play(cfg, learner, "test", cfg.eval_epsilon, device)
    baseline, _ = play(cfg, learner, "test", 1.0, device)
    rundir.write_atomic(out / "episode.gif", animation(list(film(cfg.game, seed, actions))[::4], seconds=0.08))
    figures = [figure("return", score, baseline, "higher")]
    note = f"{cfg.episodes} episodes of {best.name}, the best of {len(paths)} checkpoints; the baseline is random play"
    return {"figures": figures, "samples": [], "pictures": ["episode.gif"], "notes": [note]}


def main(cfg: Config) -> None:
    if cfg.debug:
        raise UserError("the checklist of --debug is for rows that lie ready, here they are played: use preset debug")
    with dltrain.Run(cfg) as run:
        if run.cfg.strategy.startswith("zero") or cfg.lanes == 0 or cfg.workers:
            raise run.alike(UserError("not under zero1 to zero3, with --lanes 0 or with --workers; use ddp"))
        actors = run.everywhere(lambda: Actors(cfg.game, cfg.actors, "train", cfg.seed))
        does = work(cfg, actors)
        run.measure(does)
        learner: Any = run.prepare(does.task, does.optimizer)[0]
        replay = Replay(actors, cfg.memory, cfg.frames, Path(cfg.out) / "replay", writes=run.me.rank == 0)
        warm = -(-cfg.warm // cfg.actors) + cfg.frames

        def turns(step: int) -> int:  # before the first, and then one before every `updates` steps
            return warm + -(-step // cfg.updates) if step else 0

        def turn(epsilon: float) -> None:
            actions_A = choose(learner, replay, actors, epsilon, run.device)
            replay.append(actions_A, actors.turn(replay.turn, actions_A))

        run.first(lambda: replay.rewind(turns(run.step_done)))
        if run.step_done:
            replay.resume(turns(run.step_done), actors)
        else:
            renew(learner)
            for _ in run.track(range(warm), "random turns"):
                turn(1.0)
            if len(actors.shape) == 1:
                learner.unit.copy_(replay.spread())
        data = run.batches(replay)
        for step in run.steps():
            epsilon = max(cfg.epsilon, 1 - (1 - cfg.epsilon) * step / cfg.updates * cfg.actors / cfg.explore)
            if step % cfg.updates == 0:
                turn(epsilon)
            for batch in run.lanes(data):
                run.backward(learner(batch))
            norm = run.step()
            if run.step_done % cfg.target_every == 0:
                renew(learner)
            if run.due(cfg.log_every):
                run.report(grad_norm=norm, epsilon=epsilon, actions=replay.turn * cfg.actors)
            if run.due(cfg.eval_every):
                run.report_eval("eval", {"return": play(cfg, learner, "eval", cfg.eval_epsilon, run.device)[0]})
            if run.due(cfg.save_every):
                replay.flush()
                run.save()
                kept = [int(path.name[5:]) for path in checkpoint.steps(Path(cfg.out) / "checkpoints")]
                replay.prune(turns([0, *kept][-2]))  # should the newest be torn, the one before goes on
        conclude(run, lambda: conclusion(cfg, actors, run.device))
        farewell(run, "\nEpisode        {out}/episode.gif")


def claim(cfg: Config) -> None:
    """On CartPole: the return with replay, and with the latest four transitions alone."""
    seeds, memories = range(cfg.seed, cfg.seed + 3), {"replay": cfg.memory, "latest": 4}
    returns: dict[str, dict[int, float]] = {name: {} for name in memories}
    for name, seed in product(memories, seeds):
        out = f"{cfg.out}/{name}-{seed}"
        main(replace(cfg, seed=seed, memory=memories[name], out=out))
        returns[name][seed] = rundir.read_json(Path(out) / "results.json")["figures"][0]["value"]
    gain = {seed: returns["replay"][seed] - returns["latest"][seed] for seed in seeds}
    figures = [
        Figure("CartPole's return, of 500", returns["replay"], paper="none", least=450, of="median"),
        Figure("the same minus that of the latest transitions alone", gain, paper="positive", least=100, of="median"),
    ]
    pictures = [Path(f"{cfg.out}/replay-{cfg.seed}/episode.gif")]
    judge(cfg, figures, tuned_on=(0, 1, 2, 3, 10, 11, 12, 20, 21, 22), pictures=pictures)


if __name__ == "__main__":
    dltrain.cli(main, Config, PRESETS, claim)
