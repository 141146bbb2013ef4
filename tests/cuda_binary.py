"""What is inside libhalfbyte_cuda.so, as cuobjdump shows it: architectures, and registers and instructions of
each kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

TOOLS = ("cuobjdump", "nvdisasm")  # the first calls the second


def find_tools(into: Path) -> Path | None:
    """A folder with both tools, of PATH or of the wheels nvidia-cuda-cuobjdump and -nvdisasm; or None.

    The wheels bring them without the right to be executed, so `into` gets copies.
    """
    if all(shutil.which(name) for name in TOOLS):
        return Path(shutil.which(TOOLS[0])).parent
    spec = find_spec("nvidia")
    for place in spec.submodule_search_locations if spec else ():
        for folder in sorted(Path(place).glob("*/bin")):
            if all((folder / name).is_file() for name in TOOLS):
                for name in TOOLS:
                    shutil.copyfile(folder / name, into / name)
                    (into / name).chmod(0o755)
                return into
    return None


@dataclass
class Kernel:
    """One kernel's machine code for one architecture."""

    name: str
    arch: str
    resources: dict[str, int]  # REG, STACK, SHARED, LOCAL
    opcodes: set[str] = field(default_factory=set, repr=False)  # such as HMMA.16816.F32

    def has(self, mnemonic: str) -> bool:
        return any(code == mnemonic or code.startswith(mnemonic + ".") for code in self.opcodes)


class Binary:
    """A library and the tools to look into it."""

    def __init__(self, library: Path, tools: Path) -> None:
        self.library, self.tools = library, tools

    def _lines(self, *options: str) -> Iterator[str]:
        env = os.environ | {"PATH": f"{self.tools}{os.pathsep}{os.environ.get('PATH', '')}"}
        command = [str(self.tools / "cuobjdump"), *options, str(self.library)]
        with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) as process:
            yield from process.stdout
        assert process.returncode == 0, command

    @cached_property
    def elf(self) -> set[str]:
        """Architectures that there is machine code for."""
        return set(re.findall(r"\.(sm_\w+)\.cubin", "".join(self._lines("-lelf"))))

    @cached_property
    def ptx(self) -> set[str]:
        """Architectures that there is PTX for."""
        return set(re.findall(r"\.(sm_\w+)\.ptx", "".join(self._lines("-lptx"))))

    @cached_property
    def kernels(self) -> list[Kernel]:
        """Every kernel of every architecture, with its resources and instructions."""
        found: dict[tuple[str, str], Kernel] = {}
        arch = name = ""
        for line in self._lines("-res-usage"):
            if match := re.match(r"arch = (\w+)", line):
                arch = match[1]
            elif match := re.match(r"\s*Function (\S+):", line):
                name = match[1]
            elif "REG:" in line:
                numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
                found[arch, name] = Kernel(name, arch, numbers)
        kernel = None
        instruction = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)")
        for line in self._lines("-sass"):
            if match := instruction.match(line):
                kernel.opcodes.add(match[1])
            elif match := re.match(r"\s*code for (\w+)", line):
                arch = match[1]
            elif match := re.match(r"\s*Function : (\S+)", line):
                kernel = found[arch, match[1]]
        return list(found.values())
