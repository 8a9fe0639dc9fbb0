"""Proves that a plan is correct before any rank runs it: `check(plan)` returns, or raises PlanError with the spot.

It proves, in this order (each proof relies on the ones before):

1. Complete. Every (stage, microbatch) has exactly one F, and exactly one B or one I with one W; every edge between
   stages on different ranks has its send and its receive; every stage has one REDUCE; there is no other action, and
   each action is on the rank that holds its stage. Without backward only the forward part applies.
2. In order on each rank. The inputs of an action come from earlier steps: RECV_F < F < SEND_F, F < B or I,
   RECV_B < B or I < SEND_B, I < W, every B and W of a stage < its REDUCE, and between neighbouring stages on the same
   rank, which exchange no message, F < F of the next stage and B or I < B or I of the previous one.
3. Matched. NCCL has no tags: the k-th send from rank a to rank b is received by the k-th receive on b from a. So these
   two must be the same tensor of the same microbatch. Order inside a step counts.
4. Free of deadlock with zero buffering (a send ends only when its receive has been posted, as for large messages over
   NCCL). Dependencies between ranks need no separate proof: they are messages, and messages wait.
5. Within memory, if a cap is given: no rank keeps more activations alive than that (received inputs that wait for their
   use are not counted).

Together these guarantee that a rank at the end of its program has nothing in flight: every message it sent is received
and every message for it has arrived (1, 3), its gradients are complete and their reductions started (1, 2). So the next
optimizer step may start after waiting for those reductions, and finds all channels empty. Plans that overlap with the
next step (ZB-H2 without its barrier) cannot be written in this form.

Collectives need no proof. Those inside F, B, I and W (tensor, context and expert parallel) and the reductions that
REDUCE starts (data parallel) run over ranks that hold the same stages and run the same program. So all members of a
group issue the same sequence by construction, in any order of stages. Nor can they form a cycle with the messages, even
if REDUCE waited for its result: all replicas of the pipeline have the same graph of events. If it has no cycle, all
replicas can execute it in the same order, and then the members of a group reach each collective together.

The model of 4. A step X has two events: posted(X), and completed(X), after which the next step of the rank is posted.
  - posted(X) -> completed(X) -> posted(next step)
  - for an action of X matched with an action of Y: posted(Y) -> completed(X), and posted(X) -> completed(Y)
The plan runs to its end under every timing if and only if this graph of events has no cycle: an acyclic graph has an
order in which each event finds what it waits for, and along a cycle each event waits for itself.

With one action per step, this is the same as contracting each matched send and receive into one node, because X and Y
complete at the same moment, when both are posted. With batches, contraction is too strict. It makes all steps that
messages connect, over any number of ranks, complete at one moment. Really, rank 1 continues as soon as *its* messages
have met their partners, even if the batch of rank 0 that served it still waits for rank 2. If rank 2 needs the next
action of rank 1, contraction reports a deadlock that cannot happen; the graph of events does not.

The graph is never built: the check runs a plan that passed 1 to 3, which visits the events in such an order or stops at
a cycle. completed(X) is the moment at which the rank continues with its next step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from engine.errors import PlanError
from engine.pipeline.actions import (
    COMMUNICATION,
    SENDS,
    Action,
    Op,
    Plan,
    format_step,
    grid,
    partner_of,
)
from engine.pipeline.simulate import live_memory

Spot = tuple[int, int]  # (rank, position of the step in its program)


def check(plan: Plan, memory_cap: float | None = None) -> None:
    """Return if the plan is correct; else raise PlanError with the action, the place, the reason and the grid.

    memory_cap: the most activations that a rank may keep alive, in microbatches of one stage.
    """
    where = _check_complete(plan)
    _check_order(plan, where)
    partners = _check_channels(plan)
    _check_deadlock(plan, partners)
    if memory_cap is not None:
        _check_memory(plan, memory_cap)


def _at(plan: Plan, problem: str, spots: Sequence[Spot]) -> str:
    """The message of a problem at the first spot; the grid marks all spots."""
    rank, position = spots[0]
    program = plan.programs[rank]
    step = format_step(program[position]) if position < len(program) else "(end of program)"
    return f"plan {plan.name!r} rank {rank} step {position} {step}: {problem}\n{grid(plan, spots)}"


# 1. complete


def _check_complete(plan: Plan) -> dict[Action, Spot]:
    """The spot of each action, after proving that the plan holds exactly the actions it needs."""
    where: dict[Action, Spot] = {}
    for rank, position, action in plan.walk():
        holder = plan.rank_of(action.stage)
        if holder != rank:
            raise PlanError(
                "pipeline.action-misplaced",
                _at(
                    plan,
                    f"{action} is on rank {rank}, but stage {action.stage} is on rank {holder}",
                    [(rank, position)],
                ),
            )
        if action in where:
            raise PlanError(
                "pipeline.action-twice",
                _at(plan, f"{action} is there twice; it must be done exactly once", [(rank, position), where[action]]),
            )
        where[action] = (rank, position)
    needed: set[Action] = set()
    for action in _needed(plan, where):
        if action not in where:
            raise PlanError(
                "pipeline.action-missing",
                _at(plan, f"{action} is missing: {_why_needed(plan, action)}", [_nearest(plan, where, action)]),
            )
        needed.add(action)
    for action, spot in where.items():
        if action not in needed:
            raise PlanError(
                "pipeline.action-too-much", _at(plan, f"{action} must not be there: {_why_not(plan, action)}", [spot])
            )
    return where


def _needed(plan: Plan, where: dict[Action, Spot]) -> Iterator[Action]:
    """Every action the plan must hold. A backward counts as split if either half of it is present."""
    for stage in range(plan.num_stages):
        above, below = _apart(plan, stage - 1, stage), _apart(plan, stage, stage + 1)
        for microbatch in range(plan.microbatches):
            ops = [Op.RECV_F] * above + [Op.F] + [Op.SEND_F] * below
            if plan.backward:
                ops += [Op.RECV_B] * below + [*_backward_ops(where, stage, microbatch)] + [Op.SEND_B] * above
            for op in ops:
                yield Action(op, stage, microbatch)
        if plan.backward:
            yield Action(Op.REDUCE, stage)


def _backward_ops(where: dict[Action, Spot], stage: int, microbatch: int) -> tuple[Op, ...]:
    """(I, W) if this backward is split, else (B,); the first one uses and produces the gradients of activations."""
    split = Action(Op.I, stage, microbatch) in where or Action(Op.W, stage, microbatch) in where
    return (Op.I, Op.W) if split else (Op.B,)


def _apart(plan: Plan, stage: int, following: int) -> bool:
    """Whether both stages exist and are on different ranks, so that messages pass between them."""
    return stage >= 0 and following < plan.num_stages and plan.placement[stage] != plan.placement[following]


def _why_needed(plan: Plan, action: Action) -> str:
    if action.op in COMMUNICATION:
        partner = partner_of(action)
        return (
            f"stage {action.stage} is on rank {plan.rank_of(action.stage)} and stage {partner.stage} on rank "
            f"{plan.peer_of(action)}, so {action} must meet {partner}"
        )
    if action.op is Op.REDUCE:
        return "each stage needs exactly one REDUCE, after its last B or W"
    if action.op is Op.F:
        return "each stage needs exactly one F of each microbatch"
    return "each stage needs of each microbatch exactly one B, or one I with one W"


def _why_not(plan: Plan, action: Action) -> str:
    if not plan.backward and action.op not in (Op.F, Op.SEND_F, Op.RECV_F):
        return "the plan is without backward"
    if action.op in COMMUNICATION:
        return f"stages {action.stage} and {partner_of(action).stage} are on the same rank, where nothing is sent"
    return "this backward is also split into I and W; keep B, or I with W"


def _nearest(plan: Plan, where: dict[Action, Spot], missing: Action) -> Spot:
    """The spot to mark for a missing action: the last of the same stage and microbatch, else the end of the program."""
    rank = plan.rank_of(missing.stage)
    related = [
        spot
        for action, spot in where.items()
        if action.stage == missing.stage and missing.microbatch in (action.microbatch, -1)
    ]
    return max(related, default=(rank, len(plan.programs[rank])))


# 2. in order on each rank


def _check_order(plan: Plan, where: dict[Action, Spot]) -> None:
    """Prove that on each rank every action comes after the ones whose results it uses."""
    for before, after, why in _order(plan, where):
        early, late = where.get(before), where.get(after)
        # If a communication action is absent, its neighbour is on the same rank and another constraint covers it.
        if early is not None and late is not None and early >= late:
            raise PlanError(
                "pipeline.order-wrong", _at(plan, f"{after} must come after {before}: {why}", [late, early])
            )


def _order(plan: Plan, where: dict[Action, Spot]) -> Iterator[tuple[Action, Action, str]]:
    """Every ordering constraint on a rank as (earlier, later, why)."""
    for stage in range(plan.num_stages):
        local_above = stage > 0 and plan.rank_of(stage - 1) == plan.rank_of(stage)
        local_below = stage + 1 < plan.num_stages and plan.rank_of(stage + 1) == plan.rank_of(stage)
        reduce = Action(Op.REDUCE, stage)
        for mb in range(plan.microbatches):
            forward = Action(Op.F, stage, mb)
            yield Action(Op.RECV_F, stage, mb), forward, "it computes on the received activation"
            yield forward, Action(Op.SEND_F, stage, mb), "it sends the computed activation"
            if local_above:
                yield Action(Op.F, stage - 1, mb), forward, "the previous stage, on the same rank, makes its input"
            if not plan.backward:
                continue
            ops = _backward_ops(where, stage, mb)
            first, last = Action(ops[0], stage, mb), Action(ops[-1], stage, mb)
            yield forward, first, "a backward uses the activations of its forward"
            yield Action(Op.RECV_B, stage, mb), first, "it starts from the gradient that is received"
            yield first, Action(Op.SEND_B, stage, mb), "it sends the gradient that is computed"
            if last != first:
                yield first, last, "W uses tensors that I saves"
            yield last, reduce, "REDUCE needs the gradients of all microbatches"
            if local_below:
                upstream = Action(_backward_ops(where, stage + 1, mb)[0], stage + 1, mb)
                yield upstream, first, "the next stage, on the same rank, makes its gradient"


# 3. matched


def _check_channels(plan: Plan) -> dict[Spot, list[Spot]]:
    """For each communication step, the partner steps of its actions, after proving that sends and receives match."""
    sends: defaultdict[tuple[int, int], list[tuple[Action, Spot]]] = defaultdict(list)
    receives: defaultdict[tuple[int, int], list[tuple[Action, Spot]]] = defaultdict(list)
    for rank, position, action in plan.walk():
        if action.op in COMMUNICATION:
            peer = plan.peer_of(action)
            if action.op in SENDS:
                sends[rank, peer].append((action, (rank, position)))
            else:
                receives[peer, rank].append((action, (rank, position)))
    partners: defaultdict[Spot, list[Spot]] = defaultdict(list)
    for channel, sent in sends.items():
        # As many sends as receives: the plan is complete, and every send has its receive on the same channel.
        for count, ((send, here), (receive, there)) in enumerate(zip(sent, receives[channel], strict=True)):
            if partner_of(send) != receive:
                raise PlanError(
                    "pipeline.messages-mismatched",
                    _at(
                        plan,
                        f"message {count} from rank {channel[0]} to rank {channel[1]} is sent by {send}, but received "
                        f"by {receive} (rank {there[0]} step {there[1]}): messages are matched by their order alone, "
                        f"so both ranks must list them in the same order",
                        [here, there],
                    ),
                )
            partners[here].append(there)
            partners[there].append(here)
    return partners


# 4. free of deadlock


def _check_deadlock(plan: Plan, partners: dict[Spot, list[Spot]]) -> None:
    """Prove that the graph of events in the module docstring has no cycle.

    It runs the plan: a rank completes a step once all partner steps have been posted. The order in which ranks are
    tried does not matter; if some ranks can never continue, there is a cycle.
    """
    at = [0] * plan.num_ranks  # the step that each rank has posted last; the end of its program when it has finished
    moving = True
    while moving:
        moving = False
        for rank, program in enumerate(plan.programs):
            start = at[rank]
            while at[rank] < len(program) and not _awaited(partners, (rank, at[rank]), at):
                at[rank] += 1
            moving = moving or at[rank] > start
    hanging = [rank for rank, program in enumerate(plan.programs) if at[rank] < len(program)]
    if not hanging:
        return
    # Each hanging rank waits for a step of another hanging rank, so following these edges must reach a cycle.
    seen: dict[int, tuple[Spot, Spot]] = {}  # rank -> (the step it waits in, the step it waits for)
    rank = hanging[0]
    while rank not in seen:
        needed = _awaited(partners, (rank, at[rank]), at)[0]
        seen[rank] = ((rank, at[rank]), needed)
        rank = needed[0]
    cycle = list(seen.values())[list(seen).index(rank) :]  # drop the path that leads to the cycle
    lines = [f"  {_name(plan, waiting)} waits for {_name(plan, needed)}" for waiting, needed in cycle]
    problem = "deadlock with zero buffering: each of these ranks waits for a step that the next one never reaches"
    raise PlanError(
        "pipeline.deadlock", _at(plan, "\n".join([problem, *lines]), [spot for pair in cycle for spot in pair])
    )


def _awaited(partners: dict[Spot, list[Spot]], spot: Spot, at: Sequence[int]) -> list[Spot]:
    """The partner steps of the step at `spot` that have not been posted."""
    return [(rank, position) for rank, position in partners.get(spot, ()) if at[rank] < position]


def _name(plan: Plan, spot: Spot) -> str:
    return f"rank {spot[0]} step {spot[1]} {format_step(plan.programs[spot[0]][spot[1]])}"


# 5. within memory


def _check_memory(plan: Plan, memory_cap: float) -> None:
    """Prove that no rank keeps more than `memory_cap` activations alive."""
    for rank, alive in enumerate(live_memory(plan)):
        for position, live in enumerate(alive):
            if live > memory_cap:
                raise PlanError(
                    "pipeline.cap-exceeded",
                    _at(
                        plan,
                        f"{live:g} microbatches of one stage are alive on rank {rank} here, and {max(alive):g} at its "
                        f"peak, but memory_cap = {memory_cap:g}: choose a schedule that keeps fewer, or raise the cap",
                        [(rank, position)],
                    ),
                )
