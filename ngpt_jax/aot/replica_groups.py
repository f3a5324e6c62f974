"""Which devices a collective joins, read from the text of its instruction."""

import re
from collections.abc import Sequence

import numpy as np

from ngpt_jax.aot.hlo_text import Instruction


def groups(text: str) -> list[list[int]]:
    """Groups of devices, by their numbers in the program; empty: all devices are one group.

    >>> groups("replica_groups={{0,1},{2,3}}, dimensions={0}")
    [[0, 1], [2, 3]]
    >>> groups("replica_groups=[2,3]<=[3,2]T(1,0), dimensions={0}")
    [[0, 2, 4], [1, 3, 5]]
    >>> groups("source_target_pairs={{0,1},{1,0}}")
    [[0, 1], [1, 0]]
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)={({[\d,{} ]*})}", text)
    if listed:
        return [
            [int(n) for n in re.findall(r"\d+", g)] for g in re.findall(r"{([^}]*)}", listed[1])
        ]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not iota:
        return []
    to, of, order = ([int(n) for n in (g or "").split(",") if n] for g in iota.groups())
    numbers = np.arange(np.prod(of)).reshape(of).transpose(order or range(len(of)))
    return numbers.reshape(to).tolist()


def joins_hosts(i: Instruction, hosts: Sequence[int]) -> bool:
    """Whether a group of a collective has devices on several hosts.

    Args:
      i: the collective.
      hosts: the host of each device, in the order of the program's numbers.
    """
    found = groups(i.text) or [list(range(len(hosts)))]
    return any(len({hosts[device] for device in group}) > 1 for group in found)
