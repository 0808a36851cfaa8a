"""GAN, DCGAN, WGAN, WGAN-GP: two players who take turns. Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028.

    python recipes/gan_train.py claim        # eight Gaussians on a ring; mnist: DCGAN, digits in three minutes
    torchrun --nproc-per-node 8 recipes/gan_train.py dcgan --shards 'lsun-{000..299}.tar'

`--objective gan` is the non-saturating one (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661, section 3), `wgan`
clamps the critic's weights (Arjovsky et al. 2017, https://arxiv.org/abs/1701.07875, algorithm 1), `wgan-gp` penalises
every sample's gradient (algorithm 1 here). On images both players are DCGAN's (Radford et al. 2015,
https://arxiv.org/abs/1511.06434). The discriminator is called critic throughout. A step is one player's
turn: `critic_steps` of the critic, then one of the generator. What is logged, `mnist` and `gpu`: docs/gan.md.

Departs from the papers: the noise is normal everywhere; batch normalisation has no running averages; every turn, the
generator's too, reads new rows; on the ring two hidden layers of 64 and a penalty of 0.1, as in the authors' toy code.
Not under zero1 to zero3 or --lanes 0, which want every parameter in every step's loss. Measured: recipes/README.md.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import dltrain


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    shards: str = "ring"  # 8 Gaussians; or published:mnist/train, cifar10/train; or a webdataset pattern of images
    objective: Literal["gan", "wgan", "wgan-gp"] = "wgan-gp"
    critic_steps: int = 5  # turns of the critic before one of the generator
    penalty: float = 10.0  # weight of wgan-gp's; lambda in the paper
    clamp: float = 0.01  # wgan: the critic's weights are kept in -clamp ... clamp
    average: float = 0.99  # decay of the running average of the generator's weights, per turn of the generator
    batch: int = 128  # real rows of a turn, over all ranks
    clip: float = 0.0
    lr: float = 1e-3
    beta1: float = 0.5  # of Adam; wgan has RMSprop
    beta2: float = 0.9
    latent: int = 2  # dimensions of the noise
    width: int = 64  # hidden units; channels at half the image's size
    size: int = 32  # pixels of an image: a power of two


IMAGES = Config(
    shards="published:cifar10/train", average=0.999, batch=64, lr=1e-4, latent=128, width=128, workers=2, log_every=600,
    eval_every=12_000, save_every=12_000,
)  # fmt: skip
DCGAN = replace(IMAGES, objective="gan", critic_steps=1, lr=2e-4, beta2=0.999, latent=100)
LSUN = {"shards": "lsun-*.tar", "size": 64}
PRESETS = {
    "debug": Config(steps=12, batch=24, lanes=4, width=16, penalty=0.1, log_every=1, eval_every=6, save_every=6),
    "claim": Config(seed=2, steps=7200, penalty=0.1, log_every=240, eval_every=240),
    "gpu": replace(IMAGES, steps=48_000, eval_every=6000),
    "paper": replace(IMAGES, steps=1_200_000),  # the authors' CIFAR-10 code: 200,000 turns of the generator
    "mnist": replace(DCGAN, shards="published:mnist/train", width=16, average=0.99, steps=5000, eval_every=1000),
    "wgan": replace(IMAGES, **LSUN, objective="wgan", latent=100, width=64, lr=5e-5, steps=1_200_000),
    "dcgan": replace(DCGAN, **LSUN, batch=128, steps=240_000),
}  # fmt: skip

if __name__ == "__main__":
    dltrain.answer_help(Config, PRESETS)  # before torch is imported, which takes over a second

import math
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dltrain.claim import Figure, judge, logged
from dltrain.convert.ready import image_shards
from dltrain.data.crops import CentreCrop
from dltrain.data.images import ImageRows, blank
from dltrain.data.ring import RingRows, densities, modes, sliced_wasserstein
from dltrain.data.sheet import contact_sheet
from dltrain.errors import UserError
from dltrain.flops import Work
from dltrain.models.gan import ImageCritic, ImageGenerator, PointCritic, PointGenerator
from dltrain.optim import Builder, take_turns
from dltrain.report import conclude, concluded
from dltrain.rundir import write_atomic
from dltrain.seeds import key
from dltrain.strategy import materialise

# B rows of a micro-batch, or to measure; Z latent dimensions; a row is a point [2] or an image [C, H, W] in -1 ... 1


def rows_of(cfg: Config) -> RingRows | ImageRows:
    if cfg.shards == "ring":
        return RingRows(cfg.seed)
    return ImageRows(image_shards(cfg.shards), cfg.size, CentreCrop(1.0), seed=cfg.seed)


def real_of(batch: dict[str, Tensor]) -> Tensor:
    return batch["points_B2"] if "points_B2" in batch else batch["images_BCHW"].float() / 127.5 - 1


class Players(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        points = cfg.shards == "ring"
        generator = partial(PointGenerator, 2) if points else partial(ImageGenerator, cfg.size)
        self.generator, self.average = (generator(cfg.latent, cfg.width) for _ in range(2))
        self.average.requires_grad_(False)
        normed = cfg.objective != "wgan-gp"
        self.critic = PointCritic(2, cfg.width) if points else ImageCritic(cfg.size, cfg.width, normed)

    def forward(self, batch: dict[str, Tensor], turn: Literal["critic", "generator", "sample"]) -> dict[str, Tensor]:
        """Sums over the rows, the loss being that of the player whose turn it is; or samples from the noise given."""
        real, weights_B = real_of(batch), batch["weights_B"]
        if turn == "sample":  # here, because under fsdp the weights are whole in forward alone
            now, average = self.generator(batch["z_BZ"]), self.average(batch["z_BZ"])
            _, _, distance_B = self.scored(self.critic(real), self.critic(now))
            return {"now": now, "average": average, "distance": distance_B.mean()}
        z_BZ = torch.randn(len(real), self.cfg.latent, device=real.device)
        with torch.set_grad_enabled(turn == "generator"):
            fake = self.generator(z_BZ)
        weights = {name: p if turn == "critic" else p.detach() for name, p in self.critic.named_parameters()}
        real_B, fake_B = (functional_call(self.critic, weights, (x,)) for x in (real, fake))
        critic_B, generator_B, distance_B = self.scored(real_B, fake_B)
        if self.cfg.objective == "wgan-gp" and turn == "critic":
            critic_B = critic_B + self.cfg.penalty * self.penalty(real, fake)
        losses = {"loss": critic_B if turn == "critic" else generator_B, "generator_loss": generator_B}
        return {name: (value_B * weights_B).sum() for name, value_B in (losses | {"distance": distance_B}).items()}

    def scored(self, real_B: Tensor, fake_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The critic's loss without penalty, the generator's, and the distance that the critic sees."""
        if self.cfg.objective == "gan":
            critic_B = F.softplus(-real_B) + F.softplus(fake_B)
            return critic_B, F.softplus(-fake_B), 2 * math.log(2) - critic_B
        return fake_B - real_B, -fake_B, real_B - fake_B

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """[B]: (|gradient| - 1)^2 of each row's own score, between a real row and a fake one (section 4)."""
        share = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square()


def players_optimizer(cfg: Config) -> Builder:
    """One parameter group for each player."""

    def build(players: Any) -> torch.optim.Optimizer:
        groups = [{"params": list(p.parameters()), "turn": True} for p in (players.generator, players.critic)]
        adam = partial(torch.optim.Adam, betas=(cfg.beta1, cfg.beta2))
        optimizer = (torch.optim.RMSprop if cfg.objective == "wgan" else adam)(groups, lr=cfg.lr, foreach=True)
        materialise(optimizer)  # a checkpoint between the first turns has both players' moments
        return take_turns(optimizer)

    return build


@torch.no_grad()
def clamp_or_average(cfg: Config, players: Any, turn: str, rounds: int) -> None:
    """WGAN's clamp, or the running average, which at first is a plain mean."""
    if turn == "critic" and cfg.objective == "wgan":
        for p in players.critic.parameters():
            p.clamp_(-cfg.clamp, cfg.clamp)
    if turn == "generator":
        decay = min(cfg.average, rounds / (rounds + 1))
        for average, p in zip(players.average.parameters(), players.generator.parameters(), strict=True):
            average.lerp_(p, 1 - decay)


@torch.no_grad()
def sample(run: dltrain.Run, players: nn.Module, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """As many samples as `known` rows, from the same noise at every step. All ranks call it."""
    n, noise = len(known["weights_B"]), torch.Generator().manual_seed(key("noise", run.cfg.seed))
    batch = known | {"z_BZ": torch.randn(n, players.cfg.latent, generator=noise)}  # type: ignore[call-overload]
    return {k: v.float().cpu() for k, v in players({k: v.to(run.device) for k, v in batch.items()}, "sample").items()}


def measure(fakes: dict[str, Tensor], real: Tensor) -> dict[str, float]:
    """The generator's distance from the data, as its critic sees it and as it is; on the ring the average's modes."""
    figures = {"distance": float(fakes["distance"]), "sliced_wasserstein": sliced_wasserstein(fakes["now"], real)}
    return figures | ({"modes": modes(fakes["average"])} if real.ndim == 2 else {})


def picture(fakes: dict[str, Tensor], real: Tensor) -> bytes:
    """PNG: the ring, the generator and its average side by side, or a grid of the average's images."""
    if real.ndim == 2:
        return densities(real, fakes["now"], fakes["average"])
    return contact_sheet(list(((fakes["average"][:64] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()))


def work(cfg: Config) -> Work:
    turns = ("critic",) * cfg.critic_steps + ("generator",)
    steps = [lambda task, batch, turn=turn: task(batch, turn)["loss"] for turn in turns]
    row = {"points_B2": torch.zeros(1, 2), "weights_B": torch.ones(1)} if cfg.shards == "ring" else blank(cfg.size)
    return Work(lambda: Players(cfg), players_optimizer(cfg), row, steps=steps)


def main(cfg: Config) -> None:
    if cfg.debug:
        raise UserError("the checklist of --debug is for one falling loss, here are two players: use preset debug")
    with dltrain.Run(cfg) as run:
        if run.cfg.strategy.startswith("zero") or cfg.lanes == 0:
            raise run.alike(UserError("two players take turns: not under zero1 to zero3, nor with --lanes 0; use ddp"))
        rows, does = run.everywhere(lambda: rows_of(cfg)), work(cfg)
        run.measure(does)
        players, optimizer = run.prepare(does.task, does.optimizer)
        index_N = np.arange(min(4096, len(rows)))
        known, data = rows.batch(np.zeros_like(index_N), index_N), run.batches(rows)
        for step in run.steps():
            rounds, place = divmod(step, cfg.critic_steps + 1)
            turn = "critic" if place < cfg.critic_steps else "generator"
            for group, player in zip(optimizer.param_groups, ("generator", "critic"), strict=True):
                group["turn"] = player == turn
            for batch in run.lanes(data):
                run.backward(players(batch, turn))
            norm = run.step()
            clamp_or_average(cfg, players, turn, rounds)
            if run.due(cfg.log_every):
                run.report(grad_norm=norm)
            if run.due(cfg.eval_every):
                run.report_eval("eval", measure(sample(run, players, known), real_of(known)))
            if run.due(cfg.save_every):
                run.save()
        if not concluded(run):
            fakes = sample(run, players, known)
            run.first(lambda: write_atomic(Path(cfg.out) / "samples.png", picture(fakes, real_of(known))))
            conclude(run, lambda: {"figures": [], "samples": [], "pictures": ["samples.png"]})
        run.say(f"\nSamples        {cfg.out}/samples.png\nReport         {cfg.out}/report.html")


def claim(cfg: Config) -> None:
    """On the ring: modes covered, and whether the critic's distance follows the sliced Wasserstein distance."""
    seeds = range(cfg.seed, cfg.seed + 3)
    games = {"wgan-gp": cfg, "gan": replace(cfg, objective="gan", critic_steps=1)}
    follows: dict[str, dict[int, float]] = {name: {} for name in games}
    for name, seed in product(games, seeds):
        out = f"{cfg.out}/{name}-{seed}"
        main(replace(games[name], seed=seed, out=out))
        pairs = logged(out, "eval/distance"), logged(out, "eval/sliced_wasserstein")
        follows[name][seed] = float(np.corrcoef(*pairs)[0, 1])
    covered = {seed: logged(f"{cfg.out}/wgan-gp-{seed}", "eval/modes")[-1] for seed in seeds}
    what = "correlation of the critic's distance with the sliced Wasserstein distance"
    figures = [
        Figure("WGAN-GP: modes covered, of 8", covered, paper="all (no count)", least=8),
        Figure(f"WGAN-GP: {what}", follows["wgan-gp"], paper="follows", least=0.8),
        Figure(f"GAN: {what}", follows["gan"], paper="does not", most=0.6, of="median"),
    ]
    judge(cfg, figures, tuned_on=(0, 1), pictures=[Path(cfg.out) / f"{name}-{cfg.seed}/samples.png" for name in games])


if __name__ == "__main__":
    dltrain.cli(main, Config, PRESETS, claim)
