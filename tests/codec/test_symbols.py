import numpy as np
import pytest

from quintic.codec import Plan
from quintic.codec.symbols import from_sequence, random_symbols, to_sequence
from quintic.core import ConfigError

PLANS = [
    Plan((-900, 0, 600, 700), (4, 0, 7)),
    Plan((-900, 0, 600), (4, 7), rule="grouped"),
    Plan((-900, 0), (3,), book="gaussian", size=60, rule="pursuit", coefficient_bits=2),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_sequence_holds_all_symbols_of_all_images(plan):
    codes = random_symbols(plan, 3, 20, seed=0)
    back = from_sequence(to_sequence(codes), plan, 3, 20)
    assert len(back) == len(codes) and all((a == b).all() for a, b in zip(back, codes, strict=True))


def test_random_symbols_reach_every_atom():
    (ids,) = random_symbols(Plan((-9, 9), (1,), book="gaussian", size=3, rule="single"), 300, 20, seed=0)
    assert np.bincount(ids.ravel(), minlength=3).min() > 70


def changed(sequence, place, value):
    sequence = sequence.copy()
    sequence[place] = value
    return sequence


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_no_code_of_the_plan_is_refused(plan):
    sequence = to_sequence(random_symbols(plan, 3, 20, seed=0))
    step = f"the tokens of step {len(plan.atoms) - 1} are not 3 x"
    last = plan.step_rule(len(plan.atoms) - 1)
    radix = last.radices(plan.size or 20, joint=False)[-1]
    for wrong, words in (
        (sequence[:-1], step),
        (np.append(sequence, 0), f"{len(sequence) + 1} tokens where the plan has {len(sequence)}"),
        (changed(sequence, -1, -1), step),
        (changed(sequence, -1, radix), step),
        (changed(sequence, -1, 1 << 40), step),
    ):
        with pytest.raises(ConfigError, match=words):
            from_sequence(wrong, plan, 3, 20)


def test_an_atom_named_twice_is_refused():
    sequence = to_sequence(random_symbols(PLANS[0], 3, 20, seed=0))
    with pytest.raises(ConfigError, match="step 0 must name each atom once, in rising order"):
        from_sequence(changed(sequence, 1, sequence[0] ^ 1), PLANS[0], 3, 20)
