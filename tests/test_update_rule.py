"""D and S in closed form against torch's own optimizers, which are run for real."""

import copy
import inspect

import pytest
import torch
from oracles import first_order_factor, real_step, relative_error, secant, smoothed_slope
from torch import nn
from torch.optim import SGD, Adam, AdamW

from hf_datashapley.directions.first_order import FirstOrder
from hf_datashapley.directions.owen import smoothed
from hf_datashapley.directions.update_rule import AdamStep, UpdateRule, blocks_of
from hf_datashapley.directions.weights import weights_at


RULES = {
    "SGD": (SGD, {"lr": 0.3}),
    "SGD decay": (SGD, {"lr": 0.3, "weight_decay": 0.2}),
    "SGD momentum": (SGD, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.2}),
    "SGD dampening": (SGD, {"lr": 0.3, "momentum": 0.8, "dampening": 0.4}),
    "SGD Nesterov": (SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.2}),
    "SGD fused": (SGD, {"lr": 0.3, "momentum": 0.9, "fused": True}),
    "Adam": (Adam, {"lr": 0.01}),
    "Adam coupled L2": (Adam, {"lr": 0.01, "weight_decay": 0.3}),
    "Adam decoupled": (Adam, {"lr": 0.01, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    "Adam without first moment": (Adam, {"lr": 0.01, "betas": (0.0, 0.9)}),
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.3}),
    "AdamW foreach": (AdamW, {"lr": 0.01, "foreach": True}),
    "AdamW fused": (AdamW, {"lr": 0.01, "weight_decay": 0.3, "fused": True}),
    "AdamW, tensor learning rate": (AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64), "foreach": False}),
    "AdamW, other betas": (AdamW, {"lr": 0.01, "betas": (0.7, 0.8), "eps": 1e-3}),
}
SHAPE = (300, 1100)  # more than one block


def stepped(rule, steps, dtype, shape=(7, 5)):
    """A parameter after some steps, with the gradient of the next one; some coordinates never had any."""
    optimizer_class, settings = RULES[rule]
    generator = torch.Generator().manual_seed(steps)
    parameter = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    other = nn.Parameter(torch.ones(2, dtype=dtype))
    # Two groups, so that the wrong group's settings would show.
    optimizer = optimizer_class([{"params": [other], "lr": 77.0}, {"params": [parameter]}], **settings)
    for count in range(steps + 1):
        parameter.grad = (torch.randn(shape, generator=generator) * 10.0 ** -(count % 3)).to(dtype)
        parameter.grad[:2] = 0.0  # never touched
        parameter.grad[2] *= count == steps  # touched for the first time
        parameter.grad[3] *= count != steps  # touched before, not now
        if count < steps:
            optimizer.step()
    return parameter, optimizer


def group_of(optimizer):
    return {key: value for key, value in optimizer.param_groups[1].items() if key != "params"}


def truth(parameter, optimizer):
    """D in float64, by torch's optimizer."""
    state = copy.deepcopy(optimizer.state.get(parameter, {}))
    weight = parameter.detach().clone()
    return lambda x: real_step(type(optimizer), group_of(optimizer), state, weight, x)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)], ids=["32", "64"])
def test_change_is_the_optimizers_own_step(rule, steps, dtype, tolerance):
    """D(cG), before the step, is what the very optimizer then does; D(0) what it would have done."""
    parameter, optimizer = stepped(rule, steps, dtype)
    before = parameter.detach().clone()
    with_gradient = truth(parameter, optimizer)(parameter.grad)
    no_gradient = truth(parameter, optimizer)(torch.zeros_like(before))
    change, at_zero = torch.empty_like(before), torch.empty_like(before)
    UpdateRule(optimizer).path_change(parameter, 1.0, change)
    UpdateRule(optimizer).path_change(parameter, 0.0, at_zero)
    optimizer.step()
    assert change.isfinite().all() and at_zero.isfinite().all()
    # The optimizer adds its change to the weights, which rounds it: compared are the weights that it made.
    torch.testing.assert_close(before + change, parameter.detach(), rtol=tolerance, atol=tolerance)
    assert relative_error(change, with_gradient) < 10 * tolerance
    assert relative_error(at_zero, no_gradient) < 10 * tolerance


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-7)], ids=["32", "64"])
def test_secant(rule, steps, dtype, tolerance):
    parameter, optimizer = stepped(rule, steps, dtype)
    directions = torch.ones(2, *parameter.shape, dtype=dtype)
    directions[1] = 3.0
    UpdateRule(optimizer).scale_by_secant(parameter, directions, "immediate")
    expected = secant(truth(parameter, optimizer), parameter.grad.double())
    assert directions.isfinite().all()
    touched = parameter.grad != 0
    assert relative_error(directions[0][touched], -expected[touched]) < tolerance
    if steps:
        # Where the gradient is 0, S is a limit, which the oracle takes by a difference of 1e-9.
        assert relative_error(directions[0][3], -expected[3]) < 1e-4
    torch.testing.assert_close(directions[1], 3 * directions[0])


@pytest.mark.parametrize("rule", ["SGD momentum", "SGD dampening", "SGD Nesterov", "Adam", "AdamW"])
@pytest.mark.parametrize("steps", [0, 2])
def test_unrolled_is_the_sum_of_a_gradients_later_effects(rule, steps):
    """With everything else held, and no gradient after: learning rate and second moment as in the next step."""
    parameter, optimizer = stepped(rule, steps, torch.float64)
    ratio = float(UpdateRule(optimizer).unrolled_over_immediate(parameter))
    group = group_of(optimizer)
    if "momentum" in group:
        buffer = 1.0 if steps == 0 else 1 - group["dampening"]
        acts = []
        for number in range(2000):
            own = 1.0 if number == 0 else 0.0
            acts.append(own + group["momentum"] * buffer if group["nesterov"] else buffer)
            buffer *= group["momentum"]
        assert ratio == pytest.approx(sum(acts) / acts[0], rel=1e-9)
    else:
        beta1 = group["betas"][0]
        assert ratio == pytest.approx((1 - beta1 ** (steps + 1)) / (1 - beta1))


@pytest.mark.parametrize("rule", ["SGD Nesterov", "AdamW", "Adam coupled L2"])
def test_path_goes_in_blocks_from_nothing_to_the_step(rule):
    parameter, optimizer = stepped(rule, 2, torch.float64, SHAPE)
    found, change = UpdateRule(optimizer), truth(parameter, optimizer)
    for s in (0.0, 0.3, 1.0):
        out = torch.empty_like(parameter, requires_grad=False)
        found.path_change(parameter, s, out)
        expected = (1 - s) * change(torch.zeros_like(out)) + s * change(parameter.grad)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-13)
    directions = torch.ones(1, *SHAPE, dtype=torch.float64)
    found.scale_by_secant(parameter, directions, "immediate")
    touched = parameter.grad != 0
    assert relative_error(directions[0][touched], -secant(change, parameter.grad)[touched]) < 1e-6


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_read_and_not_computed_in(rule, steps):
    """Of the same rounded weights, gradient and state, to the accuracy of float32 (bfloat16 has 4e-3)."""
    parameter, optimizer = stepped(rule, steps, torch.bfloat16)
    change, state = truth(parameter, optimizer), copy.deepcopy(optimizer.state.get(parameter, {}))
    for s in (0.0, 0.3, 1.0):
        out = torch.empty(parameter.shape)
        UpdateRule(optimizer).path_change(parameter, s, out)
        expected = (1 - s) * change(torch.zeros_like(parameter)) + s * change(parameter.grad)
        assert relative_error(out, expected) < 2e-5
    touched = parameter.grad != 0
    directions = torch.ones(1, *parameter.shape)
    UpdateRule(optimizer).scale_by_secant(parameter, directions, "immediate")
    assert relative_error(directions[0][touched], -secant(change, parameter.grad.double())[touched]) < 3e-6
    for momentum in ("immediate", "unrolled"):
        order = FirstOrder(optimizer, {"": parameter}, "auto", momentum)
        (direction,) = order.directions({"": torch.ones(1, *parameter.shape)}).values()
        factor = first_order_factor(type(optimizer), group_of(optimizer), state, momentum)
        assert relative_error(direction[0], -torch.as_tensor(factor).expand(parameter.shape)) < 3e-6
    step = UpdateRule(optimizer).step_of(parameter)
    if isinstance(step, AdamStep):
        squares = torch.rand(parameter.shape) + 0.1
        (block,) = blocks_of(step, parameter)
        found, slope = smoothed(step, block, 0.5, (squares * 0.25 * 2 / 3).sqrt())
        expected_slope, expected = smoothed_slope(change, parameter.grad.double(), squares.double(), 3, 0.5)
        assert relative_error(found, expected) < 2e-5 and relative_error(slope, expected_slope) < 2e-5


@pytest.mark.parametrize("rule", ["SGD Nesterov", "AdamW", "Adam coupled L2"])
def test_weights_at_a_node_are_rounded_once(rule):
    """To the nearest number of bfloat16, which has 8 significant bits."""
    parameter, optimizer = stepped(rule, 2, torch.bfloat16, SHAPE)
    change = truth(parameter, optimizer)
    for s in (0.3, 1.0):
        out = {parameter: torch.empty_like(parameter, requires_grad=False)}
        UpdateRule(optimizer).path_weights(s, out)
        moved = (1 - s) * change(torch.zeros_like(parameter)) + s * change(parameter.grad)
        exact = parameter.detach().double() + moved
        half_a_step = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)
        assert ((out[parameter].double() - exact).abs() <= half_a_step * (1 + 1e-3) + 1e-7).all()


def test_a_parameter_without_gradient_does_not_move():
    parameter, optimizer = stepped("AdamW", 2, torch.float32)
    parameter.grad = None
    rule = UpdateRule(optimizer)
    assert rule.moving == []
    directions = torch.ones(1, *parameter.shape)
    rule.scale_by_secant(parameter, directions, "immediate")
    assert not directions.any()


def test_the_proxy_is_plain_sgd():
    parameter, optimizer = stepped("AdamW", 2, torch.float32)
    rule = UpdateRule(optimizer, "sgd")
    assert rule.is_linear
    change = torch.empty_like(parameter, requires_grad=False)
    rule.path_change(parameter, 1.0, change)
    torch.testing.assert_close(change, -0.01 * parameter.grad)


@pytest.mark.parametrize("setting", ["amsgrad", "maximize"])
def test_unknown_settings(setting):
    with pytest.raises(ValueError, match=f"{setting}.*value_optimizer='sgd'"):
        UpdateRule(AdamW([nn.Parameter(torch.ones(1))], **{setting: True}))


def test_every_setting_of_the_known_optimizers_is_looked_at():
    """A setting that a later torch adds has to be read before it may pass."""
    known = {
        SGD: "params lr momentum dampening weight_decay nesterov maximize foreach differentiable fused",
        Adam: "params lr betas eps weight_decay amsgrad foreach maximize capturable differentiable fused "
        "decoupled_weight_decay",
        AdamW: "params lr betas eps weight_decay amsgrad maximize foreach capturable differentiable fused",
    }
    for optimizer, settings in known.items():
        assert set(inspect.signature(optimizer).parameters) == set(settings.split())


@pytest.mark.parametrize("fails", [False, True])
def test_weights_come_back_bit_for_bit(fails):
    model = nn.Linear(3, 2)
    memory = [parameter.data_ptr() for parameter in model.parameters()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    others = {parameter: torch.randn_like(parameter) for parameter in model.parameters()}
    try:
        with weights_at(others):
            assert torch.equal(model.weight, others[model.weight])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [parameter.data_ptr() for parameter in model.parameters()] == memory
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
