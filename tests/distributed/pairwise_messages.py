"""Run by test_pairwise.py on several ranks: what each gets, in all of them and in groups of two."""

import sys

import torch
import torch.distributed as dist

from quintic.engine.mesh import join_ranks
from quintic.engine.pairwise import AllGather, ReduceScatter


def parts_of(rank, count, n):
    """What a rank has for each of so many; of different magnitudes, so that the order of a sum shows."""
    values = torch.randn(count, n, generator=torch.Generator().manual_seed(rank))
    return values * 10.0 ** (3 * rank)


def check(group, dtype, n):
    members, own = dist.get_process_group_ranks(group), group.rank()
    given = [parts_of(rank, len(members), n).to(dtype) for rank in members]

    gather = AllGather()
    wanted = torch.stack([each[0] for each in given])
    for inside in (True, False):  # the part lies where it belongs in the whole, or elsewhere
        out = gather.allocate((len(members) * n,), dtype=dtype, device=torch.device("cpu")).fill_(-1.0)
        part = out.view(len(members), n)[own] if inside else given[own][0].clone()
        part.copy_(given[own][0])
        gather(out, part, group)
        assert torch.equal(out.view(len(members), n), wanted)

    total = torch.full((n,), -1.0, dtype=dtype)
    before = given[own].clone()
    ReduceScatter()(total, given[own].view(-1), group, dist.ReduceOp.SUM)
    wanted = given[0][own]
    for each in given[1:]:
        wanted = wanted + each[own]
    assert torch.equal(total, wanted) and torch.equal(given[own], before)


def main():
    with join_ranks(torch.device("cpu"), int(sys.argv[1])) as ranks:
        for group in (dist.group.WORLD, ranks.mesh.get_group("shard")):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                for n in (1, 7, 100_000):
                    check(group, dtype, n)
        if ranks.is_main:
            print("all agree")


if __name__ == "__main__":
    main()
