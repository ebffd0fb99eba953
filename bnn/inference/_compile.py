"""Compile: a function of tensors becomes a flat graph of operations, and that becomes a program.

A graph holds no Python: branches on values have been decided, random numbers drawn, sizes fixed.
Where that changes what the function computes it does so without a word, so whoever uses a program
compares it with the function first.
"""

import copy
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

_ATEN = torch.ops.aten
_MANY = 4  # rows for each column of a product that is turned
_VECTOR = 16  # numbers that a loop takes at once, at most
# Their decompositions fail unless half of the inductor happens to be imported: the route, and so
# the draws, would depend on what ran before.
_POOLS = (_ATEN.max_pool2d_with_indices.default, _ATEN.max_pool3d_with_indices.default)


def graph_of(function: Callable[..., Any], *examples: Tensor) -> GraphModule:
    """The operations that a function does to tensors of these shapes, constants folded.

    Raises:
        Exception: of many kinds, where the function branches on a value or cannot be traced.
    """
    with _quiet_inductor():  # torch tells of its own deprecations while it is imported
        from torch._inductor.decomposition import select_decomp_table

    table = dict(select_decomp_table())
    for pool in _POOLS:
        table.pop(pool, None)
    with torch.no_grad():
        pure: Any = functionalize(function)  # in-place operations on a buffer would fold wrongly
        return _unchecked(_fold(make_fx(pure, decomposition_table=table)(*examples)))


def traced(graph: GraphModule, *examples: Tensor) -> Callable[..., Any]:
    """The graph run by TorchScript: no Python between operations, and no compiler needed."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch announces the end of torch.jit in 3.0
        script: Any = torch.jit.trace(_recorded(graph), examples, check_trace=False)
        run: Any = torch.jit.freeze(script.eval())

    def program(*args: Tensor) -> Any:
        with torch.inference_mode():
            return run(*args)

    return program


def compiled(graph: GraphModule, *examples: Tensor) -> Callable[..., Any]:
    """The graph as machine code, by torch's inductor: loops fused, about 10 us a call.

    Raises:
        Exception: of many kinds, where there is no C++ compiler or an operation has no code.
    """
    with _quiet_inductor():
        from torch._guards import TracingContext, tracing
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

    if examples[0].dtype == torch.float32:
        graph = _rational_tanh(graph)
    graph = _uniform(_rows_last(graph))
    # In a context with shapes the inductor looks up on disk what it has made of the same graph and
    # constants; the processor's own flags need no trial programs, which take a second each; and a
    # product and a sum may be one operation, rounded once.
    settings = {"cpp.vec_isa_ok": True, "cpp.enable_floating_point_contract_flag": "fast"}
    shapes = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with torch.no_grad(), _quiet_inductor(), tracing(TracingContext(shapes)):
        with config.patch(settings):
            program: Any = compile_fx_inner(graph, list(examples))
    with torch.no_grad():
        program(list(examples))

    def run(*args: Tensor) -> Any:
        return program(list(args))

    return run


def _recorded(graph: GraphModule) -> GraphModule:
    """A copy that TorchScript can record: it has no record of a convolution's backward pass."""
    backward = _ATEN.convolution_backward.default
    if not any(node.target is backward for node in graph.graph.nodes):
        return graph
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        if node.target is operator.getitem and node.args[0].target is backward:
            whole, which = node.args
            node.target, node.args = _convolution_slope, (*whole.args[:-1], which)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _convolution_slope(*args: Any) -> Tensor:
    return _convolution_slope_script()(*args)


@cache
def _convolution_slope_script() -> Any:
    @torch.jit.script
    def slope(
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: list[int] | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
        which: int,
    ) -> Tensor:
        slopes = torch.ops.aten.convolution_backward(
            out, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups,
            [which == 0, which == 1, which == 2],
        )  # fmt: skip
        if which == 0:
            return slopes[0]
        return slopes[1] if which == 1 else slopes[2]

    return slope


@contextmanager
def _quiet_inductor() -> Iterator[None]:
    """What fails to compile is run another way; the inductor's own report would only alarm."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def work(graph: GraphModule) -> tuple[int, int]:
    """Operations in a graph, and numbers that they write."""
    written = 0
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor):
            written += value.numel()
    return sum(node.op == "call_function" for node in graph.graph.nodes), written


def first_line(error: Exception) -> str:
    """The kind of an error and the start of what it says, for a notice."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _fold(graph: GraphModule) -> GraphModule:
    """Evaluates every operation that does not depend on an input, and drops those without effect.

    Random operations stay: folded, they would draw once for ever.
    """
    known: dict[Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known[node] = _attribute(graph, node.target)
        elif node.op == "call_function" and _fixed(node, known):
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    for number, (node, value) in enumerate(known.items()):
        used = any(user not in known for user in node.users)
        if node.op == "call_function" and used and isinstance(value, Tensor):
            graph.register_buffer(f"_folded_{number}", value.detach().clone())
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(f"_folded_{number}")
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in (
            _ATEN.detach.default,
            _ATEN.alias.default,
        ):
            node.replace_all_uses_with(node.args[0])
    for node in reversed(graph.graph.nodes):  # checks, too, which have an effect and have passed
        if node in known and not node.users:
            graph.graph.erase_node(node)
    _share(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _unchecked(graph: GraphModule) -> GraphModule:
    """What has no factors gets NaN for them, in its lane, in place of a check that ends the call.

    TorchScript would leave the check out, and go on with what the failed attempt wrote.
    """
    call = graph.graph.call_function
    for check in graph.graph.find_nodes(
        op="call_function", target=_ATEN._linalg_check_errors.default
    ):
        info = check.args[0]
        if info.target is not operator.getitem:
            raise NotImplementedError(f"a check of {info.name}, which is no factorisation's own")
        source = info.args[0]
        source.append(info)
        with graph.graph.inserting_after(info):
            failed = call(_ATEN.ne.Scalar, (info, 0))
        for out in [node for node in source.users if node.meta["val"].is_floating_point()]:
            with graph.graph.inserting_after(out):
                shape = info.meta["val"].shape
                axes = [1] * (out.meta["val"].ndim - len(shape))
                lanes = call(_ATEN.view.default, (failed, [*shape, *axes]))
            like = {"dtype": out.meta["val"].dtype, "device": out.meta["val"].device}
            with graph.graph.inserting_after(lanes):
                none = call(_ATEN.full.default, ([], float("nan")), like)
            with graph.graph.inserting_after(none):
                right = call(_ATEN.where.self, (lanes, none, out))
            right.meta = dict(out.meta)
            out.replace_all_uses_with(right, delete_user_cb=lambda user, own=right: user is not own)
        graph.graph.erase_node(check)
    graph.recompile()
    return graph


def _share(graph: GraphModule) -> None:
    """Does each operation once on the same arguments: the first layer, where two runs have one."""
    met: dict[str, Node] = {}
    for node in graph.graph.nodes:
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            met.clear()
            continue
        if node.op == "get_attr":
            what: Any = id(_attribute(graph, node.target))
        elif node.op == "call_function" and not _random(node):
            what = node.target, node.args, node.kwargs
        else:
            continue
        same = met.setdefault(repr(what), node)
        if same is not node:
            node.replace_all_uses_with(same)


def _attribute(graph: GraphModule, name: str) -> Any:
    return operator.attrgetter(name)(graph)


def _fixed(node: Node, known: dict[Node, Any]) -> bool:
    return not _random(node) and all(other in known for other in node.all_input_nodes)


def _random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _rows_last(graph: GraphModule) -> GraphModule:
    """Products of many rows and few columns, in place, as transposes of (column, row).

    What follows loops along the last axis by vectors: 50 columns are three of them and a rest of
    two numbers, which takes as long, and a sum over them has to end within a vector.
    """
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.target is not _ATEN.bmm.default or value is None:
            continue
        rows, columns = value.shape[1:]
        if columns == 1 or columns % _VECTOR == 0 or rows < _MANY * columns:
            continue
        with graph.graph.inserting_before(node):
            turned = lambda x: graph.graph.call_function(_ATEN.permute.default, (x, [0, 2, 1]))
            left, right = node.args
            product = graph.graph.call_function(node.target, (turned(right), turned(left)))
            node.replace_all_uses_with(turned(product))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _uniform(graph: GraphModule) -> GraphModule:
    """Constants that are one number throughout, such as the scale of a prior, as that number.

    As tensors they are read at every call: as many numbers as there are weights.
    """
    for node in graph.graph.find_nodes(op="get_attr"):
        value = _attribute(graph, node.target)
        if value.numel() <= _VECTOR or not value.is_floating_point():
            continue
        first = value.flatten()[0]
        if (value == first).all():
            like = {"dtype": value.dtype, "device": value.device}
            with graph.graph.inserting_before(node):
                full = (list(value.shape), first.item())
                number = graph.graph.call_function(_ATEN.full.default, full, like)
            number.meta = dict(node.meta)
            node.replace_all_uses_with(number)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


# tanh(x) = x P(x^2) / Q(x^2) on the interval where it is not +-1 in float32; highest power first.
# The quotient of Eigen and XLA: within 2e-7.
_TANH_END = 7.90531110763549805
_TANH_P = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def _rational_tanh(graph: GraphModule) -> GraphModule:
    """Each float32 tanh as a quotient of polynomials, in place: two to three times as fast."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.target is _ATEN.tanh.default and value is not None and value.dtype == torch.float32:
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(_quotient(graph.graph, node.args[0], value.device))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _quotient(graph: torch.fx.Graph, x: Any, device: torch.device) -> Node:
    call = graph.call_function
    like = {"dtype": torch.float32, "device": device}
    lower, upper = (call(_ATEN.full.default, ([], e), like) for e in (-_TANH_END, _TANH_END))
    x = call(_ATEN.minimum.default, (call(_ATEN.maximum.default, (x, lower)), upper))
    square = call(_ATEN.mul.Tensor, (x, x))

    def horner(coefficients: tuple[float, ...]) -> Node:
        total: Any = coefficients[0]
        for coefficient in coefficients[1:]:
            total = call(_ATEN.mul.Tensor, (square, total))
            total = call(_ATEN.add.Tensor, (total, coefficient))
        return total

    above = call(_ATEN.mul.Tensor, (x, horner(_TANH_P)))
    return call(_ATEN.div.Tensor, (above, horner(_TANH_Q)))
