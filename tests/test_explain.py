"""Explanations: every alternative is what the simulator says of the plan with one node moved."""

import random
from pathlib import Path

import pytest
from graphs import Table, random_graph, random_order, random_system

import hetsched
from hetsched.errors import InfeasiblePlan, PlanError
from hetsched.explain import Account, difference, moved
from hetsched.graph import Graph
from hetsched.plan import Plan, make_plan, read_recipe, simulate
from hetsched.system import System

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def plan() -> Plan:
    graph = hetsched.read_onnx(DATA / "digits_branch.onnx")
    return hetsched.partition(graph, System.load(DATA / "two_cores.toml"), partitioner="task")


def other(plan: Plan, node: str) -> str:
    return next(d.name for d in plan.system.devices if d.name != plan.placement[node])


def test_an_alternative_is_the_plan_with_one_node_moved(plan: Plan) -> None:
    account = Account(plan.recipe)
    for node in account.nodes():
        explanation = account.explanation(node)
        assert explanation.device == plan.placement[node]
        assert explanation.chosen.change == 0
        there = other(plan, node)
        (alternative,) = (a for a in explanation.alternatives if a.device == there)
        placement = dict(plan.placement) | {node: there}
        following = plan.order[plan.order.index(node) + 1 :][:1]
        cuts = plan.cuts | {node, *following} | {part.groups[0].name for part in plan.parts}
        same = make_plan(
            plan.graph, plan.system, plan.prices, placement, plan.order, "by hand", cuts
        )
        assert alternative.change == pytest.approx(
            simulate(same).makespan - simulate(plan).makespan, abs=1e-12
        )
        assert f"{abs(alternative.change or 0) * 1e6:.1f} us" in explanation.reason


def test_transfers_of_an_alternative_are_what_would_cross(plan: Plan) -> None:
    node = plan.order[0]
    (first,) = (group for group in plan.graph.groups if group.name == node)
    there = other(plan, node)
    explanation = Account(plan.recipe).explanation(node)
    (alternative,) = (a for a in explanation.alternatives if a.device == there)
    tensor = first.outputs[0]
    readers = [group for group in plan.graph.groups if tensor in group.inputs]
    link = plan.system.link(there, plan.placement[node])
    assert link is not None
    crossing = [g for g in readers if plan.placement[g.name] != there]
    assert alternative.transfer_seconds == pytest.approx(
        len(crossing) * link.transfer_seconds(tensor.nbytes)
    )


def test_every_part_has_a_reason_to_begin(plan: Plan) -> None:
    borders = Account(plan.recipe).borders()
    assert [border.part for border in borders] == [part.name for part in plan.parts]
    assert len(plan.parts) > 2
    for border, part in zip(borders, plan.parts, strict=True):
        assert border.first == part.groups[0].name
        told = ("the first on", "it waits for '", "hands '")
        assert any(text in border.reason for text in told), border


def test_a_refusal_is_the_reason() -> None:
    rng = random.Random(5)
    for _ in range(60):
        graph = random_graph(rng)
        system = random_system(rng)
        try:
            plan = _random_plan(rng, graph, system)
        except InfeasiblePlan:
            continue
        account = Account(plan.recipe)
        for node in account.nodes():
            explanation = account.explanation(node)
            able = plan.prices.seconds[node]
            for alternative in explanation.alternatives:
                assert (alternative.seconds is None) == (alternative.device not in able)
                if alternative.seconds is None:
                    reason = plan.prices.refusals[node][alternative.device]
                    assert alternative.refusal == reason
                    assert alternative.change is None
                else:
                    assert (alternative.change is None) == bool(alternative.obstacle)
            if len(able) == 1:
                assert explanation.reason == f"only '{explanation.device}' can run it"
        assert len(account.borders()) == len(plan.parts)


def _random_plan(rng: random.Random, graph: Graph, system: System) -> Plan:
    costs = Table(rng).prices(graph, system)
    placement = {name: rng.choice(sorted(row)) for name, row in costs.seconds.items()}
    return make_plan(graph, system, costs, placement, random_order(rng, graph), "random")


def test_moving_keeps_all_nodes_in_order(plan: Plan) -> None:
    for node in plan.order:
        recipe = moved(plan.recipe, node, other(plan, node))
        assert [name for _, _, names in recipe.parts for name in names] == list(plan.order)
        assert recipe.placement == dict(plan.placement) | {node: other(plan, node)}


def test_an_operation_inside_of_a_group_is_found(plan: Plan) -> None:
    group = next(group for group in plan.graph.groups if len(group.ops) > 1)
    (found,) = hetsched.explain(plan, group.ops[-1].name)
    assert found.node == group.name
    with pytest.raises(PlanError, match=r"no node 'nonsense' in the plan; there are .*, \.\.\."):
        hetsched.explain(plan, "nonsense")
    with pytest.raises(PlanError, match="there are /a/Conv"):
        Account(plan.recipe).explanation("/A/")


def test_what_two_plans_differ_in(plan: Plan) -> None:
    same = difference(plan.recipe, read_recipe(plan.to_json()), {"x": ("1", "1")})
    assert same.empty
    node = plan.order[0]
    changed = difference(plan.recipe, moved(plan.recipe, node, other(plan, node)), {})
    assert [(move.node, move.before, move.after) for move in changed.moves] == [
        (node, plan.placement[node], other(plan, node))
    ]
    assert not changed.empty
    assert not changed.order_changed
    single = hetsched.partition(plan.graph, plan.system, partitioner="single:device=cpu:0")
    found = difference(plan.recipe, single.recipe, {"partitioner": ("task", "single")})
    assert {move.node for move in found.moves} == {
        name for name, device in plan.placement.items() if device != "cpu:0"
    }
    assert found.facts == {"partitioner": ("task", "single")}
