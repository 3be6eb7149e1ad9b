"""Layer by layer: every layer is calibrated behind the pruned layers before it, in a single pass through its block."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import pytest
import torch
from greenlet import greenlet
from torch import Tensor, nn

from lit_prune.calibration.collector import Collector
from lit_prune.errors import InputError, NumericalError
from lit_prune.models.experts import take_apart
from lit_prune.models.load import load_model
from lit_prune.ops import LayerStats, Unstructured
from lit_prune.pruning import PruningPlan, Reconstruction, prune
from lit_prune.pruning.progress import Position
from lit_prune.scorers import GBLM, Wanda
from lit_prune.solvers import SparseGPT
from support.fixtures import CONFIGS

PLAN = PruningPlan(Unstructured(0.5), solver=SparseGPT(), sequential=True)
MIXTURE = {**CONFIGS["llama"], "model_type": "mixtral", "num_local_experts": 4}


def build(model_type: str, tiny_model: Callable[..., nn.Module]) -> nn.Module:
    if model_type != "mixtral":
        return tiny_model(model_type).double()
    torch.manual_seed(0)
    return load_model("random", config=MIXTURE).double()


WRITERS = {
    **dict.fromkeys(("llama", "qwen2"), ("self_attn.o_proj", "mlp.down_proj")),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "gemma3_text": (),  # a norm stands between
    "mixtral": (),  # the router's weights do
}
"""Layers whose outputs a block adds to its input, in the order of their calls."""


def recorded(model: nn.Module, module: nn.Module, batches: list[Tensor], outputs: bool = False) -> list[Tensor]:
    """Return the first input, or the output, of every call of a module, from whole passes of the model."""
    found: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        found.append(output if outputs else args[0] if args else kwargs["hidden_states"])

    hook = module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(batch, use_cache=False)
    hook.remove()
    return found


def residual_stream(model: nn.Module, block: str, earlier: Iterable[str], batches: list[Tensor]) -> list[Tensor]:
    """Return a block's input plus the outputs of some of its layers, for each batch."""
    found = recorded(model, model.get_submodule(block), batches)
    for name in earlier:
        written = recorded(model, model.get_submodule(f"{block}.{name}"), batches, outputs=True)
        found = [stream + output.reshape(stream.shape) for stream, output in zip(found, written, strict=True)]
    return found


@pytest.mark.parametrize("model_type", [*CONFIGS, "mixtral"])
@pytest.mark.parametrize(("correction", "residual"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.4, 0.7)])
@pytest.mark.filterwarnings("ignore:plan.residual_correction has no effect")
def test_it_is_what_whole_passes_would_give(
    model_type: str, correction: float, residual: float, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    """The straightforward way: before each layer, the whole model runs, with all layers before it pruned."""
    plan = replace(PLAN, correction=correction, residual_correction=residual)
    model, expected, dense = (build(model_type, tiny_model) for _ in range(3))
    report = prune(model, tokens, plan)
    for each in (model, expected, dense):
        take_apart(each)
    blocks, targets = plan.find_targets(expected)
    writers = WRITERS[model_type]
    for name in _in_order_of_calls(dense, [target.name for target in targets], tokens):
        layer, block = expected.get_submodule(name), next(b.name for b in blocks if name.startswith(f"{b.name}."))
        local = name.removeprefix(f"{block}.")
        here, there = (recorded(one, one.get_submodule(name), tokens) for one in (expected, dense))
        drifts: list[Tensor | None] = [None] * len(tokens)
        if residual and local in writers:
            before = writers[: writers.index(local)]
            streams = [residual_stream(one, block, before, tokens) for one in (dense, expected)]
            drifts = [of_dense - of_pruned for of_dense, of_pruned in zip(*streams, strict=True)]
        stats, streams_drift = LayerStats(plan.needs), LayerStats(plan.needs)
        for batch, inputs, of_dense, drift in zip(tokens, here, there, drifts, strict=True):
            stats.update(inputs, len(batch), None if "experts" in name else of_dense)
            streams_drift.update(inputs, len(batch), None, drift)
        transposed = model_type == "gpt2"
        weight = layer.weight.data.T if transposed else layer.weight.data
        change = streams_drift.correct_drift(weight, 0.0) - weight
        corrected = stats.correct_drift(weight, correction) + residual * change
        solution = plan.solve(name, corrected, stats, plan.grouped_pattern)
        layer.weight.data.copy_(solution.weight.T if transposed else solution.weight)
    for target in targets:
        got, wanted = (one.get_submodule(target.name).weight for one in (model, expected))
        # float64: sums over 96 tokens, a damped Gram matrix's condition below 1e4, three blocks behind one another
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10, msg=lambda text, t=target: f"{t.name}: {text}")
    assert [layer.name for layer in report.layers] == [target.name for target in targets]


@pytest.mark.parametrize("model_type", ["gemma3_text", "mixtral"])
def test_a_block_without_a_plain_residual_stream_is_named(
    model_type: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    with pytest.warns(UserWarning, match="residual_correction has no effect on model.layers.0 and"):
        prune(build(model_type, tiny_model), tokens, replace(PLAN, residual_correction=0.5))


def _in_order_of_calls(model: nn.Module, names: Iterable[str], tokens: list[Tensor]) -> list[str]:
    called: dict[str, None] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, __, name=name: called.setdefault(name))
        for name in names
    ]
    with torch.no_grad():
        model(tokens[0], use_cache=False)
    for hook in hooks:
        hook.remove()
    return list(called)


def suspended() -> list[greenlet]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, greenlet) and one.gr_frame is not None]


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, correction=0.3), replace(PLAN, reconstruction=Reconstruction(3))])
def test_nothing_stays_suspended(plan: PruningPlan, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    before = len(suspended())
    prune(tiny_model(), tokens, plan)
    assert len(suspended()) == before


@pytest.mark.parametrize("place", ["mlp.act_fn", "mlp.down_proj"])
def test_an_error_in_a_pass_leaves_nothing_suspended(
    place: str, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    model, before = tiny_model(), len(suspended())
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:  # while the first batch waits, or has ended
            raise ArithmeticError("of this layer")

    model.get_submodule(f"model.layers.1.{place}").register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="of this layer"):
        prune(model, tokens, PLAN)
    assert len(suspended()) == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_pass_is_enough(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    """Each block runs once on each batch, and once more in the dense model if the plan compares with it."""
    for plan, passes in ((PLAN, 1), (replace(PLAN, correction=0.3), 2)):
        model = tiny_model()
        calls: list[int] = []
        model.get_submodule("model.layers.1.self_attn").register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        prune(model, tokens, plan)
        assert len(calls) == passes * len(tokens)


def test_autocast_ends_with_each_pass(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    """The solves between two layers of a pass are outside of it, and the context is entered anew behind them."""
    seen: list[tuple[str, bool]] = []

    def note(position: Position) -> None:
        seen.append((position.stage, torch.is_autocast_enabled("cpu")))

    model, dtypes = tiny_model(), set()
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(lambda *call: dtypes.add(call[2].dtype))
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    report = prune(model, tokens, replace(PLAN, correction=0.3), forward_context=context, on_progress=note)
    assert dtypes == {torch.bfloat16} and report.sparsity == 0.5
    assert ("solve", False) in seen and not any(enabled for _, enabled in seen)


def test_the_target_of_outputs_belongs_to_one_layer() -> None:
    """A layer that writes to the residual stream may read what others read, which do not write to it."""
    collector, seen = Collector(frozenset({"gram", "output_target"})), []
    inputs, target = torch.ones(1, 2, 3), torch.ones(1, 2, 5)
    for name in ("before", "writer", "after"):
        collector.output_targets = {name: target} if name == "writer" else {}
        collector.add(name, inputs, seen)
    weight = torch.zeros(5, 3)
    assert collector.stats["after"] is collector.stats["before"]
    assert collector.stats["before"].correct_drift(weight, 1.0) is weight
    assert (collector.stats["writer"].correct_drift(weight, 1.0) > 0).all()


@pytest.mark.parametrize("scorer", [Wanda(), GBLM()])
def test_a_scorer_alone_is_calibrated_too(
    scorer: Wanda | GBLM, tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    plan = PruningPlan(Unstructured(0.5), scorer, sequential=True, output_error=False)
    report = prune(tiny_model(), tokens, plan)
    assert report.sparsity == 0.5 and "propagate" not in report.seconds


def test_experts_with_few_tokens_are_pruned_with_the_statistics_of_all(tokens: list[Tensor]) -> None:
    model = load_model("random", config={**MIXTURE, "num_local_experts": 16})
    with pytest.warns(UserWarning, match="pooled"):
        report = prune(model, tokens, PLAN)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3) and len(report.layers) == 3 * (4 + 16 * 2)


class Twice(nn.Module):
    """Calls a layer twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(self.layer(hidden))


class Mixed(nn.Module):
    """Calls a layer in an autocast context of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(hidden)


@pytest.mark.parametrize(
    ("wrapper", "reason"), [(Twice, "is called twice in its block"), (Mixed, "is called in an autocast or grad")]
)
def test_a_block_that_cannot_be_suspended_is_refused(
    wrapper: Callable[[nn.Module], nn.Module],
    reason: str,
    tiny_model: Callable[..., nn.Module],
    tokens: list[Tensor],
) -> None:
    model = tiny_model()
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.o_proj = wrapper(attention.o_proj)
    with pytest.raises(
        InputError, match=rf"layers\.1\.self_attn\.o_proj\.layer {reason}.*: set plan\.sequential to false$"
    ):
        prune(model, tokens, PLAN)
    prune(model, tokens, replace(PLAN, sequential=False))


def test_sharing_that_ends_is_noticed(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    """From the second block on, k_proj is pruned together with q_proj, as in the first block."""
    model = tiny_model()
    layer = model.get_submodule("model.layers.1.self_attn.k_proj")
    forward = type(layer).__call__

    class Cloning(type(layer)):  # type: ignore[misc]
        def __call__(self, hidden: Tensor) -> Tensor:
            return forward(self, hidden.clone())

    layer.__class__ = Cloning
    with pytest.raises(NumericalError, match=r"layers\.1\.self_attn\.k_proj shares its input .* but not here"):
        prune(model, tokens, PLAN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequential": "yes"}, "plan.sequential is 'yes'"),
        ({"sequential": True, "propagate": "dense"}, "plan.sequential needs .* 'pruned'"),
        ({"sequential": True, "residual_correction": 1.5}, "plan.residual_correction is 1.5: it must be in"),
        ({"sequential": False, "residual_correction": 0.5}, "plan.residual_correction .*: set plan.sequential to true"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PruningPlan(Unstructured(0.5), Wanda(), **options)  # type: ignore[arg-type]


def test_a_layer_that_only_the_pruned_model_calls_is_named(
    tiny_model: Callable[..., nn.Module], tokens: list[Tensor]
) -> None:
    """The block decides by its input whether it runs the MLP, and the input has drifted."""
    model = tiny_model()
    mlp = model.get_submodule("model.layers.1.mlp")
    forward, calls = mlp.forward, []

    def some(hidden: Tensor) -> Tensor:
        calls.append(1)
        return hidden if len(calls) == 1 else forward(hidden)  # the dense model's pass goes first

    mlp.forward = some
    reason = r"is called on some batches in the pruned model only.*: set plan.sequential to false and plan.residual"
    with pytest.raises(InputError, match=rf"layers\.1\.mlp\.gate_proj {reason}"):
        prune(model, tokens, replace(PLAN, correction=0.3, residual_correction=0.6))


def test_statistics_are_freed_behind_their_stage(tiny_model: Callable[..., nn.Module], tokens: list[Tensor]) -> None:
    """From the second block on, when it is known which layers share their inputs, one stage has a Gram matrix."""
    alive: list[int] = []

    def grams() -> int:
        gc.collect()
        return sum(isinstance(one, LayerStats) and one._gram is not None for one in gc.get_objects())

    def count(position: Position) -> None:
        if position.block and position.stage == "solve":
            alive.append(grams() - others)

    others = grams()
    prune(tiny_model(), tokens, PLAN, on_progress=count)  # keeps Gram matrices, to measure the errors with them
    assert alive == [1] * 2 * 4
