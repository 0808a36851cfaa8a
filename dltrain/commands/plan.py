"""dltrain plan: what a training would take on GPUs that are not there."""

import argparse
from pathlib import Path

from dltrain import config
from dltrain.commands.trained import recipe_of
from dltrain.errors import UserError
from dltrain.meter import duration, human
from dltrain.plan.machines import MACHINES, machine
from dltrain.plan.plan import Plan, fit, plan

ABOUT = """Memory, time and failures of a recipe on a machine; all other arguments are the recipe's own:
dltrain plan recipes/gpt_pretrain.py gpt3-xl --world 64 --gpu h100 --strategy fsdp"""


def main(argv: list[str]) -> None:
    """`dltrain plan ARGV`. UserError with every conflict of the configuration."""
    parser = argparse.ArgumentParser("dltrain plan", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--world", type=int, default=1, help="GPUs, one process for each")
    parser.add_argument("--gpu", default="h100", help=", ".join(MACHINES))
    parser.add_argument("--fit", action="store_true", help="the fastest strategies, micro-batches and remat that fit")
    parser.add_argument("--price", type=float, default=0.0, help="of a GPU's hour, in any currency")
    parser.add_argument("--rows", type=float, default=0.0, help="of an epoch, for the number of epochs")
    parser.add_argument("--scaling", default="", metavar="PNG", help="draw the efficiency on 1 to 4,096 GPUs")
    asked, command = parser.parse_known_args(argv)
    if not command or command[0].startswith("-"):
        raise UserError("which recipe? dltrain plan recipes/gpt_pretrain.py gpt2 --world 8 --gpu h100")
    recipe, where = recipe_of(command[0]), machine(asked.gpu)
    name, described = Path(command[0]).stem, (recipe.__doc__ or "").split("\n")[0]
    cfg = config.parse(recipe.Config, recipe.PRESETS, name, command[1:], described)
    if not isinstance(cfg, config.Config):
        raise UserError(f"{command[0]} is a study of many small runs: there is nothing to plan")
    if asked.world < 1:
        raise UserError(f"--world {asked.world} must be at least 1")
    if asked.fit:
        print(fitting(fit(recipe, cfg, asked.world, where), asked.world, where.name))
        return
    planned = plan(recipe, cfg, asked.world, where)
    print(page(planned, asked.price, asked.rows))
    if asked.scaling:
        from dltrain.plan.scaling import draw

        print(draw(Path(asked.scaling)))


def _gib(size: float) -> str:
    return f"{size / 2**30:9.2f} GiB"


def page(p: Plan, price: float = 0.0, epoch: float = 0.0) -> str:
    """What `dltrain plan` prints."""
    cfg, m, s, f = p.cfg, p.memory, p.step, p.failures
    tokens = p.work.tokens
    lines = [
        f"{human(p.parameters)} parameters, {p.place.world} x {p.machine.name}, {cfg.strategy}, {cfg.precision}, "
        f"{cfg.batch} rows a step in {cfg.lanes or 'no'} lanes, {s.micro_batches} micro-batches a process, "
        f"remat {cfg.remat}",
        "",
        "Memory of a rank",
    ]
    classes = {
        "weights": m.parameters, "gradients": m.gradients, "optimizer": m.optimizer, "buffers": m.buffers,
        "lanes that wait": m.tree, "weights put together": m.whole, "activations": m.activations, "batch": m.batch,
        "margin (assumed)": m.margin,
    }  # fmt: skip
    lines += [f"  {name:<22}{_gib(size)}" for name, size in classes.items() if size >= 2**20]
    verdict = "fits" if p.fits else "DOES NOT FIT"
    lines += [f"  {'together':<22}{_gib(m.total)} of {p.machine.memory / 2**30:.1f}: {verdict}"]
    lines += [f"  a layer keeps {_gib(p.trace.layer).strip()} for backward"] if p.trace.layer else []
    needed = p.flops.needed / tokens if tokens else p.flops.needed
    unit, rate = ("token", p.rows_per_second * tokens) if tokens else ("row", p.rows_per_second)
    lines += [
        "",
        "A step (predicted; what of the peaks is reached is assumed: docs/plan.md)",
        f"  {human(needed)} FLOPs a {unit}; {human(s.sent)}B sent by a rank",
        f"  {s.seconds:.3f} s: compute {s.compute:.3f}, waiting for others {s.exposed:.3f} "
        f"(of {s.gather:.3f} for weights and {s.reduce:.3f} for gradients), update {s.update:.3f}",
        f"  {human(rate)} {unit}s/s, {human(rate / p.place.world)} a GPU; MFU {p.used(p.flops.needed):.1%}, "
        + (f"by 6 N {p.used(p.flops.by_parameters):.1%}, " if tokens else "")
        + f"HFU {p.used(p.flops.run):.1%}",
    ]
    hours = p.seconds / 3600 * p.place.world
    total = cfg.steps * cfg.batch
    lines += [
        "",
        "The training",
        f"  {cfg.steps:,} steps, {human(total)} rows"
        + (f", {human(total * tokens)} tokens" if tokens else "")
        + (f", {total / epoch:.2f} epochs" if epoch else ""),
        f"  {duration(p.seconds)}, {human(hours)} GPU-hours"
        + (f", {hours * price:,.0f} at {price:g} an hour" if price else "")
        + f", {human(hours * p.machine.watts / 1000)} kWh in the GPUs at their limit",
        f"  a checkpoint: {human(p.checkpoint)}B in {p.save:.1f} s",
        f"  {f.expected:.2g} failures expected; save every {duration(f.interval)} "
        f"(--save_every {max(1, round(f.interval / s.seconds))}); failures and checkpoints cost {f.lost:.1%}",
    ]
    return "\n".join(lines)


def fitting(found: list[Plan], world: int, name: str, most: int = 8) -> str:
    """A table of what `--fit` found."""
    if not found:
        return f"nothing fits on {world} x {name}: take more GPUs, or a smaller row"
    lines = [f"{'strategy':<10}{'remat':<11}{'micro_batch':>12}{'memory':>14}{'step':>10}{'MFU':>8}"]
    for p in found[:most]:
        lines.append(
            f"{p.cfg.strategy:<10}{p.cfg.remat:<11}{p.cfg.micro_batch:>12}{_gib(p.memory.total):>14}"
            f"{p.step.seconds:>9.3f}s{p.used(p.flops.needed):>8.1%}"
        )
    best = found[0].cfg
    chosen = f"--strategy {best.strategy} --remat {best.remat} --micro_batch {best.micro_batch}"
    return "\n".join([*lines, "", f"the fastest: {chosen}"])
