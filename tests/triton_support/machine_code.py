"""Read the machine code of a compiled Triton kernel: SASS by the nvdisasm and cuobjdump that come with triton, and the
assembly that LLVM prints for AMD.

How instructions are counted. A loop is what belongs to an edge back: from the blocks of instructions and the branches
between them, the blocks that lie on a way from a block to a branch back to it, where every way there leads through that
block. Of loops within loops the innermost counts. All its instructions are counted, branches and predicated ones with
them, but no NOP; on AMD those of the vector and memory units, because scalar ones issue beside them. The bytes that its
loads fetch say how many columns a thread takes in one turn, however often the compiler has unrolled it.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Loop(NamedTuple):
    """One turn of an innermost loop that loads from global memory."""

    instructions: int
    loaded: int  # bytes of a thread


@dataclass(frozen=True)
class Report:
    """What the machine code of a kernel shows."""

    registers: int
    stack: int  # bytes per thread
    local_accesses: int  # LDL and STL, or scratch loads and stores
    spills: int
    loads: int  # of global memory, inside loops
    wide_loads: int  # those of 128 bits or more
    stores: int
    wide_stores: int
    waits: int  # barriers and exchanges between threads inside loops
    loops: tuple[Loop, ...]

    @property
    def wide_share(self) -> float:
        return self.wide_loads / self.loads if self.loads else 1.0


@dataclass(frozen=True)
class _Language:
    """Patterns of an assembly. The first group of an instruction is its name; that of a load or store its width."""

    label: re.Pattern[str]
    branch: re.Pattern[str]
    final: re.Pattern[str]  # what is never followed by the next line
    instruction: re.Pattern[str]
    load: re.Pattern[str]
    store: re.Pattern[str]
    wait: re.Pattern[str]
    widths: dict[str, int]  # bytes of a load; what is not named has 4


_SASS = _Language(
    label=re.compile(r"^(\.L_x_\d+):"),
    branch=re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)"),
    final=re.compile(r"\*/\s+(?:BRA(?:\.\w+)*\s+`|EXIT|RET)"),
    instruction=re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?!NOP)([A-Z][A-Z0-9_.]*)"),
    load=re.compile(r"\bLDG\.?(\S*)"),
    store=re.compile(r"\bSTG\.?(\S*)"),
    wait=re.compile(r"\b(?:BAR|SHFL|LDS|STS)\b"),
    widths={"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1},
)
_AMDGCN = _Language(
    label=re.compile(r"^(\.LBB\d+_\d+):"),
    branch=re.compile(r"\bs_c?branch\S*\s+(\.LBB\d+_\d+)"),
    final=re.compile(r"\b(?:s_branch|s_endpgm|s_setpc_b64)\b"),
    instruction=re.compile(r"^\s+((?:v|global|buffer|flat|scratch|ds)_\w+)"),
    load=re.compile(r"\b(?:global|buffer)_load_(\w+)"),
    store=re.compile(r"\b(?:global|buffer)_store_(\w+)"),
    wait=re.compile(r"\b(?:s_barrier|ds_\w+)"),
    widths={"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1},
)


def read_report(compiled: Any) -> Report:
    return _read_amd(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _read_nvidia(compiled.asm["cubin"])


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def _blocks(lines: list[str], language: _Language) -> tuple[list[range], list[list[int]]]:
    """Lines without a label or branch between them, and the blocks that may follow each."""
    starts = {0}
    for index, line in enumerate(lines):
        if language.label.match(line):
            starts.add(index)
        if language.branch.search(line) or language.final.search(line):
            starts.add(index + 1)
    edges = [*sorted(start for start in starts if start < len(lines)), len(lines)]
    blocks = [range(a, b) for a, b in itertools.pairwise(edges)]
    labels = {match[1]: i for i, block in enumerate(blocks) if (match := language.label.match(lines[block.start]))}
    following = []
    for i, block in enumerate(blocks):
        last = lines[block.stop - 1]
        branch = language.branch.search(last)
        after = [labels[branch[1]]] if branch and branch[1] in labels else []
        if not language.final.search(last) and i + 1 < len(blocks):
            after.append(i + 1)
        following.append(after)
    reached, pending = set(), [0]
    while pending:
        block = pending.pop()
        if block not in reached:
            reached.add(block)
            pending += following[block]
    return blocks, [after if i in reached else [] for i, after in enumerate(following)]


def _dominators(following: list[list[int]]) -> list[set[int]]:
    """The blocks that every way to a block leads through, itself among them; all for one that nothing leads to."""
    preceding: list[list[int]] = [[] for _ in following]
    for i, after in enumerate(following):
        for j in after:
            preceding[j].append(i)
    everything = set(range(len(following)))
    found = [{0}] + [set(everything) for _ in following[1:]]
    changed = True
    while changed:
        changed = False
        for i in range(1, len(following)):
            new = set.intersection(everything, *(found[j] for j in preceding[i])) | {i}
            changed |= new != found[i]
            found[i] = new
    return found


def _loops(lines: list[str], language: _Language) -> list[set[int]]:
    """The lines of every loop; those with one beginning are one."""
    blocks, following = _blocks(lines, language)
    dominators = _dominators(following)
    bodies: dict[int, set[int]] = {}
    for source, after in enumerate(following):
        for head in after:
            if head not in dominators[source]:
                continue
            body, pending = bodies.setdefault(head, {head}), [source]
            while pending:
                block = pending.pop()
                if block not in body:
                    body.add(block)
                    pending += [i for i, ways in enumerate(following) if block in ways]
    return [{line for block in body for line in blocks[block]} for body in bodies.values()]


def _bytes(suffix: str, language: _Language) -> int:
    return next((size for part in re.split(r"[._]", suffix) if (size := language.widths.get(part))), 4)


def _sizes(lines: list[str], pattern: re.Pattern[str], language: _Language) -> list[int]:
    return [_bytes(match[1], language) for line in lines if (match := pattern.search(line))]


def innermost(text: str, language: _Language = _SASS) -> tuple[Loop, ...]:
    """The innermost loops that load from global memory."""
    lines = text.splitlines()
    loops = _loops(lines, language)
    found = []
    for loop in loops:
        if any(other < loop for other in loops):
            continue
        body = [lines[index] for index in sorted(loop)]
        loaded = sum(_sizes(body, language.load, language))
        if loaded:
            found.append(Loop(sum(bool(language.instruction.search(line)) for line in body), loaded))
    return tuple(found)


def _read(text: str, language: _Language, **known: int) -> Report:
    lines = text.splitlines()
    inside = [lines[index] for index in sorted(set().union(*_loops(lines, language)))]
    loads, stores = (_sizes(inside, pattern, language) for pattern in (language.load, language.store))
    return Report(
        **known,
        loads=len(loads),
        wide_loads=sum(size >= 16 for size in loads),
        stores=len(stores),
        wide_stores=sum(size >= 16 for size in stores),
        waits=sum(bool(language.wait.search(line)) for line in inside),
        loops=innermost(text, language),
    )


def _read_nvidia(cubin: bytes) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return _read(sass, _SASS, registers=registers, stack=stack, local_accesses=local, spills=local)


def _read_amd(assembly: str) -> Report:
    def number(pattern: str) -> int:
        return int(re.search(pattern, assembly)[1])  # type: ignore[index]

    return _read(
        assembly,
        _AMDGCN,
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        stack=number(r"; ScratchSize: (\d+)"),
        local_accesses=len(re.findall(r"\bscratch_(?:load|store)", assembly)),
        spills=number(r"\.vgpr_spill_count:\s+(\d+)"),
    )
