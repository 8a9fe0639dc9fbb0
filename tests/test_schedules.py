"""Schedules, passes and the proof of plans.

The second opinion is `simulate` below: it runs a plan rank by rank with rendezvous messages (no buffering at all) and
shares no code with check.py. What it says and what `check` says must agree, on right plans and on broken ones.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import PlanError
from engine.pipeline import check as check_module
from engine.pipeline.actions import Action, Op, Plan, Step, grid, parse_action, parse_plan, parse_step, partner_of
from engine.pipeline.check import check, peak_live
from engine.pipeline.passes import add_communication, add_reduce, batch_communication, complete
from engine.pipeline.schedules import SCHEDULES, build, forward_only, gpipe, one_f_one_b

# --- a simulator of its own ------------------------------------------------------------------------------------------


class Broken(Exception):
    """Why a plan does not run to a right end."""


class Simulator:
    """Runs a plan with rendezvous messages: a step that posts messages ends when all of them have met their partner."""

    def __init__(self, plan: Plan):
        self.plan, self.at = plan, [0] * plan.num_ranks
        self.has: set[tuple[str, int, int]] = set()  # what was made or received; a stage lives on one rank only
        self.posted: dict[tuple[str, int, int], list[Action]] = {}  # ("send" | "receive", from, to) -> in order
        self.open: list[list[tuple[Action, tuple[str, int, int], int]] | None] = [None] * plan.num_ranks

    def run(self) -> str:
        try:
            while sum(self.advance(rank) for rank in range(self.plan.num_ranks)):
                pass
            if any(at < len(program) for at, program in zip(self.at, self.plan.programs)):
                return "deadlock"
            self.verify_end()
        except Broken as broken:
            return str(broken)
        return "ok"

    def advance(self, rank: int) -> bool:
        if self.at[rank] == len(self.plan.programs[rank]):
            return False
        step = self.plan.programs[rank][self.at[rank]]
        if not step[0].op.name.startswith(("SEND", "RECV")):
            self.compute(rank, *step[0])
        elif self.open[rank] is None:
            self.open[rank] = [self.post(rank, action) for action in step]
            return True
        elif not all(len(self.posted.get(other(key), [])) > index for _, key, index in self.open[rank]):
            return False
        else:
            for action, key, index in self.open[rank]:
                self.meet(action, self.posted[other(key)][index])
            self.open[rank] = None
        self.at[rank] += 1
        return True

    def post(self, rank: int, action: Action) -> tuple[Action, tuple[str, int, int], int]:
        op, stage, mb = action
        if self.plan.placement[stage] != rank:
            raise Broken("misplaced")
        peer = self.plan.placement[stage + (1 if op in ("SEND_F", "RECV_B") else -1)]
        if op in ("SEND_F", "SEND_B"):
            self.need("output" if op == "SEND_F" else "input gradient", stage, mb)
            key = ("send", rank, peer)
        else:
            key = ("receive", peer, rank)
        self.posted.setdefault(key, []).append(action)
        return action, key, len(self.posted[key]) - 1

    def meet(self, action: Action, partner: Action) -> None:
        kinds = {action.op, partner.op}
        near = abs(action.stage - partner.stage) == 1 and action.microbatch == partner.microbatch
        forwards = kinds == {"SEND_F", "RECV_F"}
        up = [a.stage for a in (action, partner) if a.op in ("RECV_F", "SEND_B")]
        down = [a.stage for a in (action, partner) if a.op in ("SEND_F", "RECV_B")]
        if not near or not (forwards or kinds == {"SEND_B", "RECV_B"}) or len(up) != 1 or up[0] != down[0] + 1:
            raise Broken("mismatch")
        if action.op in ("RECV_F", "RECV_B"):
            self.make("input" if forwards else "output gradient", action.stage, action.microbatch)

    def compute(self, rank: int, op: str, stage: int, mb: int) -> None:
        place, last = self.plan.placement, len(self.plan.placement) - 1
        if place[stage] != rank:
            raise Broken("misplaced")
        if op == "F":
            if stage > 0:
                self.need("input", stage, mb)
            self.make("output", stage, mb)
            if stage < last and place[stage + 1] == rank:
                self.make("input", stage + 1, mb)
        elif op in ("B", "I"):
            self.need("output", stage, mb)
            if stage < last:
                self.need("output gradient", stage, mb)
            self.make("input gradient", stage, mb)
            if stage > 0 and place[stage - 1] == rank:
                self.make("output gradient", stage - 1, mb)
            self.make("half" if op == "I" else "whole", stage, mb)
        elif op == "W":
            self.need("half", stage, mb)
            self.make("whole", stage, mb)
        else:
            for each in range(self.plan.microbatches):
                self.need("whole", stage, each)
            self.make("reduced", stage, 0)

    def need(self, *what: object) -> None:
        if what not in self.has:
            raise Broken("order")

    def make(self, what: str, stage: int, mb: int) -> None:
        if (what, stage, mb) in self.has:
            raise Broken("twice")
        self.has.add((what, stage, mb))

    def verify_end(self) -> None:
        for stage in range(len(self.plan.placement)):
            for mb in range(self.plan.microbatches):
                if not {("output", stage, mb), ("whole" if self.plan.backward else "output", stage, mb)} <= self.has:
                    raise Broken("incomplete")
            if self.plan.backward and ("reduced", stage, 0) not in self.has:
                raise Broken("incomplete")


def other(key: tuple[str, int, int]) -> tuple[str, int, int]:
    return ("receive" if key[0] == "send" else "send", *key[1:])


def simulate(plan: Plan) -> str:
    return Simulator(plan).run()


def verdict(plan: Plan) -> str:
    """check's answer: "ok", or the first line of its error without the place."""
    try:
        check(plan)
    except PlanError as error:
        return str(error).splitlines()[0]
    return "ok"


# --- plans written by hand -------------------------------------------------------------------------------------------

V_SHAPED = parse_plan("""
plan v microbatches=2 placement=0,1,1,0 backward=yes
rank 0: 0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1
rank 1: 1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1
""")

ZERO_BUBBLE = parse_plan("""
plan zb-h1 microbatches=3 placement=0,1 backward=yes
rank 0: 0F0 0F1 0I0 0F2 0I1 0W0 0I2 0W1 0W2
rank 1: 1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
""")

# Rank 0 sends to rank 1 and receives from rank 2 at once, and the message it receives depends on the one it sends.
LOOP = parse_plan("""
plan loop microbatches=1 placement=0,1,2,0 backward=no
rank 0: 0F0 3F0
rank 1: 1F0
rank 2: 2F0
""")


def test_gpipe_as_text() -> None:
    assert str(gpipe(2, 1, 3)) == (
        "plan gpipe microbatches=3 placement=0,1 backward=yes\n"
        "rank 0: 0F0 0F1 0F2 0B0 0B1 0B2\n"
        "rank 1: 1F0 1F1 1F2 1B0 1B1 1B2"
    )


def test_1f1b_as_text() -> None:
    assert str(one_f_one_b(4, 1, 4)) == (
        "plan 1f1b microbatches=4 placement=0,1,2,3 backward=yes\n"
        "rank 0: 0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3\n"
        "rank 1: 1F0 1F1 1F2 1B0 1F3 1B1 1B2 1B3\n"
        "rank 2: 2F0 2F1 2B0 2F2 2B1 2F3 2B2 2B3\n"
        "rank 3: 3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3"
    )
    assert str(build("1f1b", 4, 1, 4)) == (
        "plan 1f1b microbatches=4 placement=0,1,2,3 backward=yes\n"
        "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0F2 0SEND_F2 0F3 (0SEND_F3;0RECV_B0) 0B0 0RECV_B1 0B1 0RECV_B2 0B2"
        " 0RECV_B3 0B3 0REDUCE\n"
        "rank 1: 1RECV_F0 1F0 (1SEND_F0;1RECV_F1) 1F1 (1SEND_F1;1RECV_F2) 1F2 (1SEND_F2;1RECV_B0) 1B0"
        " (1SEND_B0;1RECV_F3) 1F3 (1SEND_F3;1RECV_B1) 1B1 (1SEND_B1;1RECV_B2) 1B2 (1SEND_B2;1RECV_B3) 1B3 1REDUCE"
        " 1SEND_B3\n"
        "rank 2: 2RECV_F0 2F0 (2SEND_F0;2RECV_F1) 2F1 (2SEND_F1;2RECV_B0) 2B0 (2SEND_B0;2RECV_F2) 2F2"
        " (2SEND_F2;2RECV_B1) 2B1 (2SEND_B1;2RECV_F3) 2F3 (2SEND_F3;2RECV_B2) 2B2 (2SEND_B2;2RECV_B3) 2B3 2REDUCE"
        " 2SEND_B3\n"
        "rank 3: 3RECV_F0 3F0 3B0 (3SEND_B0;3RECV_F1) 3F1 3B1 (3SEND_B1;3RECV_F2) 3F2 3B2 (3SEND_B2;3RECV_F3) 3F3 3B3"
        " 3REDUCE 3SEND_B3"
    )


@pytest.mark.parametrize("name", [*SCHEDULES, "forward_only"])
def test_every_size_is_right(name: str) -> None:
    for ranks in range(1, 9):
        for microbatches in range(1, 17):
            plan = build(name, ranks, 1, microbatches)  # build checks
            assert simulate(plan) == "ok", (ranks, microbatches)
            expected = {
                "gpipe": [microbatches] * ranks,
                "1f1b": [min(microbatches, ranks - rank) for rank in range(ranks)],
                "forward_only": [1] * ranks,
            }[name]
            assert peak_live(plan) == expected
            for rank in range(ranks):  # same order of backwards everywhere: gradients sum to the same bits
                backwards = [a.microbatch for r, _, a in plan.walk() if r == rank and a.op is Op.B]
                assert backwards == list(range(microbatches)) * plan.backward


def test_v_shaped_placement() -> None:
    plan = complete(V_SHAPED)
    check(plan)
    assert simulate(plan) == "ok"
    assert str(plan).splitlines()[2] == (  # nothing is sent between stages 1 and 2, both on rank 1
        "rank 1: 1RECV_F0 1F0 2F0 (2SEND_F0;1RECV_F1) 1F1 2F1 (2SEND_F1;2RECV_B0) 2B0 1B0 (1SEND_B0;2RECV_B1) 2B1 "
        "2REDUCE 1B1 1REDUCE 1SEND_B1"
    )
    assert plan.stages_of(0) == (0, 3) and plan.stages_of(1) == (1, 2) and plan.num_stages == 4
    assert peak_live(plan) == [3, 4]


def test_split_backward() -> None:
    plan = complete(ZERO_BUBBLE)
    check(plan)
    assert simulate(plan) == "ok"
    assert str(plan).splitlines()[1] == (  # the gradient leaves after I, and REDUCE waits for the last W
        "rank 0: 0F0 0SEND_F0 0F1 (0SEND_F1;0RECV_B0) 0I0 0F2 (0SEND_F2;0RECV_B1) 0I1 0W0 0RECV_B2 0I2 0W1 0W2 0REDUCE"
    )
    assert peak_live(plan) == [3, 2]  # an activation lives until W, not I


# --- deadlock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_unbatched_1f1b_deadlocks(ranks: int) -> None:
    """Each message posted and waited for alone, as torch.distributed.pipelining's lowering has it."""
    plan = add_reduce(add_communication(one_f_one_b(ranks, 1, 4)))
    assert simulate(plan) == "deadlock"
    with pytest.raises(PlanError, match="deadlock with zero buffering") as error:
        check(plan)
    if ranks == 2:
        assert str(error.value) == (
            "plan '1f1b' rank 0 step 3 0SEND_F1: deadlock with zero buffering: each of these ranks waits for a step "
            "that the next one never comes to\n"
            "  rank 0 step 3 0SEND_F1 waits for rank 1 step 4 1RECV_F1\n"
            "  rank 1 step 3 1SEND_B0 waits for rank 0 step 4 0RECV_B0\n"
            "step    0         1         2    3           4           5    6    7         8\n"
            "rank 0  0F0       0SEND_F0  0F1  >0SEND_F1<  >0RECV_B0<  0B0  0F2  0SEND_F2  0RECV_B1\n"
            "rank 1  1RECV_F0  1F0       1B0  >1SEND_B0<  >1RECV_F1<  1F1  1B1  1SEND_B1  1RECV_F2\n"
            "(part of 2 ranks x 17 steps)"
        )


def contracted_is_acyclic(plan: Plan) -> bool:
    """The stricter criterion: every set of steps that messages connect is one node."""
    spot_of = {action: (rank, position) for rank, position, action in plan.walk()}
    node: dict[tuple[int, int], tuple[int, int]] = {spot: spot for spot in spot_of.values()}

    def root(spot: tuple[int, int]) -> tuple[int, int]:
        return spot if node[spot] == spot else root(node[spot])

    for action, spot in spot_of.items():
        if action.op.startswith(("SEND", "RECV")):
            node[root(spot)] = root(spot_of[partner_of(action)])
    edges: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for rank, position in node:
        if position:
            edges.setdefault(root((rank, position)), set()).add(root((rank, position - 1)))
    try:
        TopologicalSorter(edges).prepare()
    except CycleError:
        return False
    return True


def test_no_false_alarm_for_batches() -> None:
    plan = complete(LOOP)
    assert "(0SEND_F0;3RECV_F0)" in str(plan)
    assert not contracted_is_acyclic(plan)
    assert simulate(plan) == "ok"
    check(plan)
    assert contracted_is_acyclic(build("1f1b", 4, 1, 4))  # the criterion itself is not simply wrong


def random_plan(rng: random.Random) -> Plan:
    """A random placement, a random order of the work that respects all dependencies, random batches, some swaps."""
    ranks, chunks, microbatches = rng.randint(2, 4), rng.choice([1, 1, 2]), rng.randint(1, 4)
    placement = list(range(ranks)) * chunks
    if rng.random() < 0.5:
        rng.shuffle(placement)
    stages, tidy = len(placement), rng.choice([1.0, 0.9, 0.5])
    split = rng.random() < 0.3
    after: dict[Action, set[Action]] = {}
    for stage in range(stages):
        for mb in range(microbatches):
            grad = Op.I if split else Op.B
            after[Action(Op.F, stage, mb)] = {Action(Op.F, stage - 1, mb)} if stage else set()
            after[Action(grad, stage, mb)] = {
                Action(grad, stage + 1, mb) if stage + 1 < stages else Action(Op.F, stage, mb)
            }
            if split:
                after[Action(Op.W, stage, mb)] = {Action(Op.I, stage, mb)}
    programs: list[list[Step]] = [[] for _ in range(ranks)]
    while after:
        ready = sorted(action for action, needs in after.items() if not needs)
        tidily = rng.random() < tidy
        pick = min(ready, key=lambda a: (a.microbatch, rng.random())) if tidily else rng.choice(ready)
        programs[placement[pick.stage]].append((pick,))
        del after[pick]
        for needs in after.values():
            needs.discard(pick)
    plan = add_communication(Plan("random", microbatches, tuple(placement), tuple(map(tuple, programs))))
    if rng.random() < 0.5:
        plan = batch_communication(plan)
    plan = add_reduce(plan)
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        plan = swap(plan, rng.randrange(ranks), rng.randrange(1000), None)
    return plan


def swap(plan: Plan, rank: int, first: int, second: int | None) -> Plan:
    """Swaps two steps of a rank; the second is the one after the first if it is None."""
    program = list(plan.programs[rank])
    i = first % len(program)
    j = (i + 1 if second is None else second) % len(program)
    program[i], program[j] = program[j], program[i]
    return with_program(plan, rank, program)


def with_program(plan: Plan, rank: int, program: list[Step]) -> Plan:
    return replace(plan, programs=(*plan.programs[:rank], tuple(program), *plan.programs[rank + 1 :]))


def assert_agreement(plan: Plan) -> str:
    """check and the simulator agree; returns what check says. Only on deadlock must both give the same reason: order
    and matching are properties of the text for check, while the simulator may hang before it comes to them."""
    said, happened = verdict(plan), simulate(plan)
    assert (said == "ok") == (happened == "ok"), (said, happened, str(plan))
    if "deadlock" in said:
        assert happened == "deadlock", (said, str(plan))
    return said


def test_check_agrees_with_simulation_on_random_plans() -> None:
    rng = random.Random(20240607)
    seen: Counter[str] = Counter()
    for _ in range(1500):
        said = assert_agreement(random_plan(rng))
        seen[next(word for word in ("ok", "deadlock", "message", "must come after") if word in said)] += 1
    assert min(seen.values()) > 60 and len(seen) == 4, seen  # each kind of answer was put to the test


# --- broken plans ----------------------------------------------------------------------------------------------------

RIGHT = [build(name, p, 1, m) for name in (*SCHEDULES, "forward_only") for p, m in [(1, 2), (2, 1), (2, 3), (3, 4)]]
RIGHT += [complete(V_SHAPED), complete(ZERO_BUBBLE), complete(LOOP)]

spots = st.sampled_from(RIGHT).flatmap(
    lambda plan: st.integers(0, plan.num_ranks - 1).flatmap(
        lambda rank: st.tuples(st.just(plan), st.just(rank), st.integers(0, len(plan.programs[rank]) - 1))
    )
)


@settings(max_examples=150, deadline=None)
@given(spots)
def test_any_drop_is_refused(spot: tuple[Plan, int, int]) -> None:
    plan, rank, position = spot
    program = list(plan.programs[rank])
    del program[position]
    with pytest.raises(PlanError, match="is missing"):
        check(with_program(plan, rank, program))


@settings(max_examples=150, deadline=None)
@given(spots, st.integers(0, 1000))
def test_any_duplicate_is_refused(spot: tuple[Plan, int, int], target: int) -> None:
    plan, rank, position = spot
    program = list(plan.programs[rank])
    program.insert(target % (len(program) + 1), program[position])
    with pytest.raises(PlanError, match="is there twice"):
        check(with_program(plan, rank, program))


@settings(max_examples=400, deadline=None)
@given(spots, st.integers(0, 1000))
def test_a_swap_is_refused_if_and_only_if_it_breaks_something(spot: tuple[Plan, int, int], target: int) -> None:
    plan, rank, position = spot
    assert_agreement(swap(plan, rank, position, target))


@settings(max_examples=150, deadline=None)
@given(spots, st.randoms(use_true_random=False))
def test_order_inside_a_batch_counts(spot: tuple[Plan, int, int], rng: random.Random) -> None:
    plan, rank, position = spot
    program = list(plan.programs[rank])
    program[position] = tuple(rng.sample(program[position], len(program[position])))
    assert_agreement(with_program(plan, rank, program))


def test_order_inside_a_batch_is_matched() -> None:
    """Two stages apart, two messages of one batch on one channel: only the order tells them apart."""
    text = """plan x microbatches=2 placement=0,1 backward=no
    rank 0: 0F0 0F1 (0SEND_F0;0SEND_F1)
    rank 1: (1RECV_F0;1RECV_F1) 1F0 1F1"""
    check(parse_plan(text))
    with pytest.raises(
        PlanError, match="message 0 from rank 0 to rank 1 is sent by 0SEND_F0, but received by 1RECV_F1"
    ):
        check(parse_plan(text.replace("(1RECV_F0;1RECV_F1)", "(1RECV_F1;1RECV_F0)")))


# --- every refusal, with its words -----------------------------------------------------------------------------------

PAIR = str(build("1f1b", 2, 1, 1))
PAIR_SPLIT = PAIR.replace("0B0", "0I0 0W0").replace("1B0", "1I0 1W0")
ONE_RANK = """plan local microbatches=1 placement=0,0 backward=yes
rank 0: 0F0 1F0 1B0 1REDUCE 0B0 0REDUCE"""
ONE_RANK_SPLIT = """plan local microbatches=1 placement=0,0 backward=yes
rank 0: 0F0 1F0 1I0 0I0 1W0 1REDUCE 0W0 0REDUCE"""

CHECK_ERRORS = [
    # plan text, what is replaced, by what, what the error says
    (PAIR, "0B0 0REDUCE", "0B0 0REDUCE 1F0", r"rank 0 step 4 1F0: 1F0 is on rank 0, but stage 1 is on rank 1"),
    (PAIR, "0F0", "0F0 0F0", r"rank 0 step 1 0F0: 0F0 is there twice; it must be done exactly once"),
    (PAIR, " 1F0", "", r"1F0 is missing: each stage needs exactly one F of each microbatch"),
    (PAIR, " 1B0", "", r"1B0 is missing: each stage needs of each microbatch exactly one B, or one I with one W"),
    (PAIR, "0B0", "0I0", r"rank 0 step 2 0I0: 0W0 is missing: each stage needs of each microbatch exactly one B, or"),
    (PAIR, " 1REDUCE", "", r"1REDUCE is missing: each stage needs exactly one REDUCE, after its last B or W"),
    (PAIR, "1RECV_F0 ", "", r"1RECV_F0 is missing: stage 1 is on rank 1 and stage 0 on rank 0, so .* meet 0SEND_F0"),
    (PAIR, "backward=yes", "backward=no", r"0RECV_B0 is too much: the plan is without backward"),
    (PAIR, "0B0", "0I0 0W0 0B0", r"0B0 is too much: this backward is also split into I and W; keep B, or I with W"),
    (ONE_RANK, "1F0", "0SEND_F0 1F0", r"0SEND_F0 is too much: stages 0 and 1 are on the same rank, where nothing is"),
    (PAIR, "1RECV_F0 1F0", "1F0 1RECV_F0", r"rank 1 step 0 1F0: 1F0 must come after 1RECV_F0: it computes on what is"),
    (PAIR, "0F0 (0SEND_F0;0RECV_B0)", "(0SEND_F0;0RECV_B0) 0F0", r"0SEND_F0 must come after 0F0: it sends what is"),
    (ONE_RANK, "0F0 1F0", "1F0 0F0", r"1F0 must come after 0F0: the previous stage, on the same rank, makes its input"),
    (PAIR, "1F0 1B0", "1B0 1F0", r"1B0 must come after 1F0: a backward uses the activations of its forward"),
    (PAIR, "(0SEND_F0;0RECV_B0) 0B0", "0SEND_F0 0B0 0RECV_B0", r"0B0 must come after 0RECV_B0: it starts from the"),
    (PAIR, "1B0 1REDUCE 1SEND_B0", "1SEND_B0 1B0 1REDUCE", r"1SEND_B0 must come after 1B0: it sends the gradient"),
    (PAIR_SPLIT, "1I0 1W0", "1W0 1I0", r"1W0 must come after 1I0: W uses what I leaves behind"),
    (PAIR, "1B0 1REDUCE", "1REDUCE 1B0", r"1REDUCE must come after 1B0: REDUCE needs the gradients of all"),
    (PAIR_SPLIT, "1W0 1REDUCE", "1REDUCE 1W0", r"1REDUCE must come after 1W0: REDUCE needs the gradients of all"),
    (ONE_RANK_SPLIT, "1I0 0I0", "0I0 1I0", r"0I0 must come after 1I0: the next stage, on the same rank, makes its"),
    (ONE_RANK, "1B0 1REDUCE 0B0", "0B0 1B0 1REDUCE", r"0B0 must come after 1B0: the next stage, on the same rank,"),
]


@pytest.mark.parametrize(("text", "old", "new", "message"), CHECK_ERRORS)
def test_what_check_says(text: str, old: str, new: str, message: str) -> None:
    check(parse_plan(text))
    assert old in text
    plan = parse_plan(text.replace(old, new, 1))
    with pytest.raises(PlanError, match=message) as error:
        check(plan)
    assert ">" in str(error.value).splitlines()[-1] or ">" in str(error.value).splitlines()[-2]  # the spot is marked
    assert simulate(plan) != "ok" or "too much" in message


def test_what_check_says_on_a_mismatch() -> None:
    plan = parse_plan(str(build("gpipe", 2, 1, 2)).replace("1RECV_F0 1F0 1RECV_F1 1F1", "1RECV_F1 1F1 1RECV_F0 1F0"))
    assert simulate(plan) == "mismatch"
    with pytest.raises(PlanError) as error:
        check(plan)
    assert str(error.value) == (
        "plan 'gpipe' rank 0 step 1 0SEND_F0: message 0 from rank 0 to rank 1 is sent by 0SEND_F0, but received by "
        "1RECV_F1 (rank 1 step 0): messages are matched by their order alone, so both ranks must list them in the same "
        "order\n"
        "step    0           1           2         3                    4    5\n"
        "rank 0  0F0         >0SEND_F0<  0F1       (0SEND_F1;0RECV_B0)  0B0  0RECV_B1\n"
        "rank 1  >1RECV_F1<  1F1         1RECV_F0  1F0                  1B0  1SEND_B0\n"
        "(part of 2 ranks x 9 steps)"
    )


def small_plan(**change: object) -> Plan:
    fields = {"name": "x", "microbatches": 1, "placement": (0,), "programs": (((Action(Op.F, 0, 0),),),)}
    return Plan(**{**fields, **change})  # type: ignore[arg-type]


def steps(*texts: str) -> tuple[tuple[Step, ...], ...]:
    return (tuple(parse_step(text) for text in texts),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_action("2X0"), r"'2X0' is not an action: expected <stage><op><microbatch>.*for example 2F0"),
        (lambda: parse_action("0F"), "'0F' is not an action"),
        (lambda: parse_action("0REDUCE1"), "'0REDUCE1' is not an action"),
        (lambda: parse_action("F0 "), "'F0 ' is not an action"),
        (lambda: parse_action("9" * 5000 + "F0"), "is not an action"),
        (lambda: parse_step("(0F1;)"), "'' is not an action"),
        (lambda: small_plan(name="a b"), "plan name 'a b' must be one word"),
        (lambda: small_plan(microbatches=0), "plan 'x' has microbatches = 0; at least 1 is needed"),
        (lambda: small_plan(placement=(0, 1)), r"plan 'x' has placement \(0, 1\) for 1 programs: every stage"),
        (lambda: small_plan(placement=(), programs=()), r"plan 'x' has placement \(\) for 0 programs"),
        (lambda: small_plan(programs=(((),),)), r"plan 'x' rank 0 step 0 \(\): a step holds at least one action"),
        (lambda: small_plan(programs=steps("0F0", "(0F0;0B0)")), r"step 1 \(0F0;0B0\): only communication actions can"),
        (lambda: small_plan(programs=steps("1F0")), "1F0: stage 1 is outside the 1 stages"),
        (lambda: small_plan(programs=steps("0F1")), "0F1: microbatch 1 is outside the 1 microbatches"),
        (lambda: small_plan(programs=(((Action(Op.REDUCE, 0, 0),),),)), "REDUCE concerns all microbatches and names"),
        (lambda: small_plan(programs=steps("0SEND_F0")), "0SEND_F0 has no partner: stage 0 is the end of the pipeline"),
        (lambda: small_plan(programs=steps("0RECV_F0")), "0RECV_F0 has no partner"),
        (lambda: parse_plan(""), "'' is not the header of a plan: expected 'plan <name>"),
        (lambda: parse_plan("plan x microbatches=1"), "'plan x microbatches=1' is not the header of a plan"),
        (lambda: parse_plan(PAIR.replace("rank 1", "rank 2")), "should start with 'rank 1:': one line per rank"),
        (lambda: add_communication(complete(one_f_one_b(2, 1, 1))), "step 1: 0SEND_F0 is already there; add_comm"),
        (lambda: add_reduce(complete(one_f_one_b(2, 1, 1))), "step 3: 0REDUCE is already there; add_reduce takes"),
        (lambda: build("1f1b", 0, 1, 4), "schedule '1f1b' with ranks = 0, microbatches = 4: both must be >= 1"),
        (lambda: gpipe(2, 1, 0), "schedule 'gpipe' with ranks = 2, microbatches = 0: both must be >= 1"),
        (lambda: forward_only(2, 2, 1), "schedule 'forward_only' with chunks = 2: it places exactly one stage on each"),
        (lambda: build("1f1b", 2, 3, 4), "chunks = 3: .*Set chunks to 1, or choose a schedule for several chunks"),
        (lambda: build("1F1B", 2, 1, 4), "unknown schedule '1F1B': did you mean '1f1b'\\? Known: gpipe, 1f1b, forward"),
        (lambda: build("gpip", 2, 1, 4), "unknown schedule 'gpip': did you mean 'gpipe'"),
    ],
)
def test_what_the_others_say(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


def test_build_refuses_a_wrong_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(ranks: int, chunks: int, microbatches: int) -> Plan:
        plan = gpipe(ranks, chunks, microbatches)
        return with_program(plan, 0, list(reversed(plan.programs[0])))

    monkeypatch.setitem(SCHEDULES, "wrong", wrong)
    with pytest.raises(PlanError, match="must come after"):
        build("wrong", 2, 1, 2)


# --- text and grid ---------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any well-formed plan, right or not."""
    ranks, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    extra = draw(st.lists(st.integers(0, ranks - 1), max_size=4))
    placement = draw(st.permutations([*range(ranks), *extra]))
    stages, mbs = st.integers(0, len(placement) - 1), st.integers(0, microbatches - 1)
    compute = st.builds(Action, st.sampled_from([Op.F, Op.B, Op.I, Op.W]), stages, mbs)
    single = st.one_of(compute, st.builds(Action, st.just(Op.REDUCE), stages, st.just(-1))).map(
        lambda action: (action,)
    )
    step: st.SearchStrategy[Step] = single
    if len(placement) > 1:
        down = st.builds(Action, st.sampled_from([Op.SEND_F, Op.RECV_B]), st.integers(0, len(placement) - 2), mbs)
        up = st.builds(Action, st.sampled_from([Op.RECV_F, Op.SEND_B]), st.integers(1, len(placement) - 1), mbs)
        step = st.one_of(single, st.lists(st.one_of(up, down), min_size=1, max_size=3).map(tuple))
    programs = draw(st.lists(st.lists(step, max_size=6).map(tuple), min_size=ranks, max_size=ranks))
    name = draw(st.from_regex(r"[a-z0-9_\-]{1,8}", fullmatch=True))
    return Plan(name, microbatches, tuple(placement), tuple(programs), draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_text_round_trip(plan: Plan) -> None:
    assert parse_plan(str(plan)) == plan
    assert hash(parse_plan(str(plan))) == hash(plan)
    for _, _, action in plan.walk():
        assert parse_action(str(action)) == action
    grid(plan, [(plan.num_ranks - 1, len(plan.programs[-1]))])  # a mark past the end is no error


def test_actions_print_as_the_field_writes_them() -> None:
    assert str(Action(Op.F, 2, 0)) == f"{Action(Op.F, 2, 0)}" == "2F0"
    assert str(Action(Op.SEND_F, 0, 1)) == "0SEND_F1"
    assert str(Action(Op.REDUCE, 3)) == "3REDUCE"
    assert partner_of(parse_action("0SEND_F1")) == parse_action("1RECV_F1")
    assert partner_of(parse_action("1SEND_B4")) == parse_action("0RECV_B4")


def test_grid() -> None:
    plan = build("1f1b", 32, 1, 64)
    assert grid(parse_plan(PAIR), [(1, 5)]) == (
        "step    1                    2    3        4         5\n"
        "rank 0  (0SEND_F0;0RECV_B0)  0B0  0REDUCE\n"
        "rank 1  1F0                  1B0  1REDUCE  1SEND_B0  ><\n"
        "(part of 2 ranks x 5 steps)"
    )
    shown = grid(plan, [(20, 100)])
    assert ">" in shown and "rank 16 " in shown and "rank 24 " in shown and "rank 25 " not in shown
    assert len(grid(plan, [(0, 0), (31, 100)]).splitlines()) == 18  # never more than 16 ranks


def test_a_fault_in_the_check_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the deadlock proof the comparison with the simulator must fail, or it compares nothing."""
    monkeypatch.setattr(check_module, "_check_deadlock", lambda plan, partners: None)
    with pytest.raises(AssertionError):
        test_check_agrees_with_simulation_on_random_plans()
