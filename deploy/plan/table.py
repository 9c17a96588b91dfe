"""The tables of `ratchet plan`: who runs where, and the memory of each process by its parts. Runs in the driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.table import Table

from common.memory import GIB, MIB
from deploy.plan.needs import Need, Parts
from deploy.plan.placement import Node, Place, Placement, gpu_share


def size(count: float) -> str:
    """Bytes for people."""
    if count < 10 * MIB:
        return f"{count / MIB:.1f} MiB"
    return f"{count / MIB:.0f} MiB" if count < GIB else f"{count / GIB:.1f} GiB"


def who_runs_where(placement: Placement) -> Table:
    """For each node, or for several that look alike: its processes, and what is left."""
    table = _table("Who runs where")
    for name, justify in (("process", "left"), ("CPUs", "right"), ("memory", "right"), ("GPUs", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("memory of a GPU", justify="right")
    for nodes in _alike(placement):
        first, on_it = nodes[0], _places_on(placement, nodes[0])
        node = placement.nodes[first]
        table.add_section()
        table.add_row(f"[bold]{_node_names(placement, nodes)}[/]", *map(_bold, _capacity(node)))
        for places in _same_role(on_it):
            table.add_row(*_process_row(places, node))
        table.add_row(*_free_row(node, on_it))
    without = {
        "[bold red]no room[/]": [missing.need for missing in placement.no_room],
        "[bold yellow]waits for a node[/]": placement.waiting,
    }
    for heading, needs in without.items():
        if needs:
            table.add_section()
            table.add_row(heading, "", "", "", "")
        for places in _same_role([Place(need, -1) for need in needs]):
            table.add_row(*_process_row(places, None))
    return table


def memory_by_parts(needs: Sequence[Need], names: Mapping[str, str]) -> list[Table]:
    """The parts of the memory of each kind of process: on its machine, and on each of its GPUs. `names`: longer names
    of parts."""
    kinds: dict[str, Need] = {}
    for need in needs:
        kinds.setdefault(_role(need), need)
    on_machines = {role: need.host for role, need in kinds.items()}
    tables = [_parts_table("Memory of each process on its machine, by parts", on_machines, names)]
    on_gpus = {role: need.device for role, need in kinds.items() if need.device}
    if on_gpus:
        tables.append(_parts_table("Memory of each process on each of its GPUs, by parts", on_gpus, names))
    return tables


def _parts_table(title: str, columns: Mapping[str, Parts], names: Mapping[str, str]) -> Table:
    """A row for each part, in the order in which the processes have them, and a column for each process."""
    table = _table(title)
    table.add_column("")
    for role in columns:
        table.add_column(role, justify="right")
    for part in _in_order(columns.values()):
        table.add_row(
            names.get(part, part), *(size(parts[part]) if parts.get(part) else "" for parts in columns.values())
        )
    table.add_section()
    table.add_row("[bold]in all[/]", *(_bold(size(sum(parts.values()))) for parts in columns.values()))
    return table


def _in_order(all_parts: Iterable[Parts]) -> list[str]:
    """The names of parts that take anything, without repetition."""
    return list(dict.fromkeys(name for parts in all_parts for name, taken in parts.items() if taken))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", pad_edge=False)


def _bold(text: str) -> str:
    return f"[bold]{text}[/]" if text else ""


# Nodes


def _places_on(placement: Placement, node: int) -> list[Place]:
    return [place for place in placement.places if place.node == node]


def _alike(placement: Placement) -> list[list[int]]:
    """Groups of nodes with equal resources and equal processes."""
    groups: dict[object, list[int]] = {}
    for index, node in enumerate(placement.nodes):
        same = [(_role(p.need), p.need.cpus, p.need.memory, p.gpus) for p in _places_on(placement, index)]
        groups.setdefault((_capacity(node), tuple(same)), []).append(index)
    return list(groups.values())


def _node_names(placement: Placement, nodes: Sequence[int]) -> str:
    names = [placement.nodes[index].name for index in nodes]
    return names[0] if len(names) == 1 else f"{len(names)} nodes alike: {names[0]} to {names[-1]}"


def _capacity(node: Node) -> tuple[str, str, str, str]:
    """CPUs, memory, GPUs and the memory of each GPU."""
    gpu_memory = f"{size(node.gpu_memory)} each" if node.gpu_memory else ""
    return f"{node.cpus:g}", size(node.memory), f"{node.gpus:g}" if node.gpus else "", gpu_memory


def _free_row(node: Node, places: Sequence[Place]) -> tuple[str, ...]:
    cpus, gpus, memory = (sum(getattr(p.need, key) for p in places) for key in ("cpus", "gpus", "memory"))
    left = f"{max(0.0, node.gpus - gpus):g}" if node.gpus else ""
    return "[dim]left[/]", f"[dim]{node.cpus - cpus:g}[/]", f"[dim]{size(node.memory - memory)}[/]", left, ""


# Processes


def _role(need: Need) -> str:
    return need.name.partition("(")[0]


def _same_role(places: Sequence[Place]) -> list[list[Place]]:
    """The processes of each role with equal needs, in the order of their numbers."""
    ordered = sorted(places, key=lambda p: (_role(p.need), _number(p.need)))
    return [
        list(same)
        for _, same in groupby(ordered, key=lambda p: (_role(p.need), p.need.cpus, p.need.gpus, p.need.memory))
    ]


def _number(need: Need) -> int:
    number = need.name.partition("(")[2].rstrip(")")
    return int(number) if number.isdecimal() else 0


def _process_row(places: Sequence[Place], node: Node | None) -> tuple[str, ...]:
    """A row for processes with equal needs; numbers are those of one process."""
    need = places[0].need
    name = need.name if len(places) == 1 else f"{_role(need)} {numbers([_number(p.need) for p in places])}"
    used = sorted({gpu for place in places for gpu in place.gpus})
    which = numbers(used) if used else ""
    if need.gpus:
        share = "" if need.gpus >= 1 else f"{need.gpus:g} of "
        which = f"{share}{which or f'{need.gpus:g}'}"
    return f"  {name}", f"{need.cpus:g}", size(need.memory), which, _gpu_memory(need, node)


def _gpu_memory(need: Need, node: Node | None) -> str:
    """The memory that it takes of each GPU, and the memory of its share."""
    if not need.device:
        return ""
    taken = sum(need.device.values())
    if node is None or not node.gpu_memory:
        return size(taken)
    room = node.gpu_memory * gpu_share(need)
    return f"{taken / GIB:.1f} / {room / GIB:.1f} GiB {100 * taken / room:3.0f} %"


def numbers(chosen: Sequence[int]) -> str:
    """Numbers in ascending order with ranges, such as 0-3, 6."""
    runs: list[list[int]] = []
    for number in chosen:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
