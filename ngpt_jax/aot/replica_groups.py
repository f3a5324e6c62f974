"""Which devices a collective joins, read from the text of its instruction."""

import math
import re
from collections.abc import Sequence

import numpy as np

from ngpt_jax.aot.hlo_text import Instruction

_IOTA = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"  # [to]<=[of]T(order)
_AXIS = r"'([^']*)'(?::\((\d+)\)(\d+))?"  # 'name', or 'name':(before)size


def groups(text: str) -> list[list[int]]:
    """Groups of devices, by their numbers in the program; empty: all devices are one group.

    XLA writes them in three ways:

    >>> groups("replica_groups={{0,1},{2,3}}, dimensions={0}")
    [[0, 1], [2, 3]]
    >>> groups("replica_groups=[2,3]<=[3,2]T(1,0), dimensions={0}")
    [[0, 2, 4], [1, 3, 5]]
    >>> groups("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}, more={0}")
    [[0, 1], [2, 3]]
    >>> groups("source_target_pairs={{0,1},{1,0}}")
    [[0, 1], [1, 0]]
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)={([\d,{} ]*)}[, ]?", text)
    if listed:
        return [
            [int(n) for n in re.findall(r"\d+", g)] for g in re.findall(r"{([^}]+)}", listed[1])
        ]
    if iota := re.search(r"replica_groups=" + _IOTA, text):
        return _numbers(iota).reshape([int(n) for n in iota[1].split(",")]).tolist()
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? {([^}]*)}", text)
    return _on_mesh(*mesh.groups()) if mesh else []


def _numbers(iota: re.Match[str]) -> np.ndarray:
    """Numbers from 0 on, laid out as ``of`` (or ``to``) and then transposed."""
    of = [int(n) for n in (iota[2] or iota[1]).split(",")]
    order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(of))
    return np.arange(math.prod(of)).reshape(of).transpose(order)


def _on_mesh(axes: str, ids: str | None, along: str) -> list[list[int]]:
    """Groups along axes of a mesh, 'b', or along a part of one: 'b':(before)size."""
    sizes, joined = [], []
    parts = {n: (int(b or 1), int(s or 0)) for n, b, s in re.findall(_AXIS, along)}
    for name, size in re.findall(r"'([^']*)'=(\d+)", axes):
        before, own = parts.get(name, (int(size), 1))
        own = own or int(size) // before
        sizes += [before, own, int(size) // (before * own)]
        joined += [False, name in parts, False]
    iota = re.match(_IOTA, (ids or f"[{math.prod(sizes)}]") + ")")
    numbers = _numbers(iota) if iota else np.array([int(n) for n in re.findall(r"\d+", ids or "")])
    order = sorted(range(len(sizes)), key=lambda axis: joined[axis])
    count = math.prod(size for size, is_joined in zip(sizes, joined) if is_joined)
    return numbers.reshape(sizes).transpose(order).reshape(-1, count).tolist()


def joins_hosts(i: Instruction, hosts: Sequence[int]) -> bool:
    """Whether a group of a collective has devices on several hosts.

    Args:
      i: the collective.
      hosts: the host of each device, in the order of the program's numbers.
    """
    found = groups(i.text) or [list(range(len(hosts)))]
    return any(len({hosts[device] for device in group}) > 1 for group in found)
