"""What Triton's compiler makes of our launches for an H100 or H200, without one: registers, spills, instructions.

A file `hopper_<op>.py` beside this one has `launches()`, which yields (name, function): each function calls our own
launchers with tensors of the meta device. In a process of its own (the interpreter is chosen when Triton is imported)
every kernel that they launch is compiled for sm_90 with the configuration of configs/sm90.json and taken apart with the
tools in Triton's wheel. So the gate sees what would run, types, alignment, constants and all.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one block may have on Hopper


@dataclass(frozen=True)
class Binary:
    """One compiled kernel. `loads` and `stores` count the instructions to and from global memory by their width."""

    launch: str  # the name that launches() gave
    kernel: str
    registers: int
    spills: int  # instructions that store to or load from local memory
    shared: int  # bytes
    warps: int
    hgmma: int  # Hopper's tensor core instructions, and below those of older GPUs, at half the speed
    hmma: int
    tma: int
    loads: dict[str, int]  # "128" -> how many, in bits
    stores: dict[str, int]

    def check(self, *, matmul: bool = False, wide: bool = True) -> None:
        """Raise AssertionError where it spills, misses the tensor cores, needs too much memory or loads narrowly."""
        assert self.spills == 0, f"{self.launch}: {self.kernel} spills ({self.registers} registers)"
        assert self.shared <= SHARED_LIMIT, f"{self.launch}: {self.kernel} has {self.shared} bytes of shared memory"
        assert not matmul or (self.hgmma and not self.hmma), f"{self.launch}: {self.kernel} is not on Hopper's cores"
        assert not wide or self.tma or self.loads.get("128"), f"{self.launch}: {self.kernel} loads {self.loads}"


def compiled(hopper: str) -> list[Binary]:
    """All kernels that `tests/kernels/<hopper>.py` launches. Raises AssertionError with the compiler's words."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "DLTRAIN_KERNELS")}
    done = subprocess.run(
        [sys.executable, __file__, hopper],
        env=env | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [Binary(**binary) for binary in json.loads(done.stdout.splitlines()[-1])]


class Hopper:
    """Stands for the driver of a machine with an H200."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _compile(hopper: str) -> list[Binary]:
    import importlib

    import triton
    from triton.runtime.jit import JITFunction

    from dltrain.kernels import launch

    driver: Any = Hopper()
    triton.runtime.driver.set_active(driver)
    launch.architecture = lambda device: "sm90"
    launch.processors = lambda device: 132
    run, found, name = JITFunction.run, {}, ""

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel: Any = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in found:
            found[kernel.hash] = _inspect(name, kernel)
        return kernel

    JITFunction.run = only_compile
    sys.path.insert(0, str(Path(__file__).parent))
    for name, call in importlib.import_module(hopper).launches():  # noqa: B007, only_compile reads it
        call()
    return list(found.values())


def _inspect(name: str, kernel: Any) -> Binary:
    import triton.backends.nvidia as nvidia

    tool = str(Path(next(iter(nvidia.__path__))) / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return Binary(
        launch=name,
        kernel=kernel.metadata.name,
        registers=int(registers[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        hgmma=len(re.findall(r"\bHGMMA\b", code)),
        hmma=len(re.findall(r"\bHMMA\b", code)),
        tma=len(re.findall(r"\bUTMALDG\b", code)),
        loads=_widths(r"\b(?:LDG|LDGSTS)\.E((?:\.\w+)*)", code),
        stores=_widths(r"\bSTG\.E((?:\.\w+)*)", code),
    )


def _widths(instruction: str, code: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for suffixes in re.findall(instruction, code):
        width = next((s for s in ("128", "64", "U16", "S16", "U8", "S8") if s in suffixes.split(".")), "32").strip("US")
        found[width] = found.get(width, 0) + 1
    return found


if __name__ == "__main__":
    print(json.dumps([asdict(binary) for binary in _compile(sys.argv[1])]))
