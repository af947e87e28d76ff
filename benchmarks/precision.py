"""Emulates TF32 and bfloat16 on any device to measure a repair's accuracy in them.

    python -m benchmarks.precision [--golden=FOLDER] [--out=FILE]

    recorded model --float32--> reference run --compare--> a row of the table
    recorded model --some numbers rounded--> run --------^

A CPU multiplies in float32 whatever `matmul_precision` says. So this finds the products
of the traced step by the precision that they request and rounds their operands to the
nearest even: to 10 bits of mantissa for TF32, 7 for bfloat16. Sums stay float32, as do
norms, softmax, loss and SGD. Hardware that truncates instead is up to twice as far off.
The runs are the recorded ones (`tests/golden`); the reference is our own float32 run,
within 1.4e-4 of the recorded ε.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

import convert
from sinder_jax import repair, search, vit
from sinder_jax.placement import WHOLE
from tests.support import golden

TF32, BFLOAT16 = 10, 7  # bits of mantissa
MARKED = (lax.Precision.HIGH,) * 2  # precision requested by the products to emulate

# --- Products in another arithmetic ---------------------------------------------------

Product = Callable[[Any, Any], Any]
Arithmetic = Callable[[Product, Any, Any], Any]  # product, a, b -> result


def keep(bits: int, x: Any) -> Any:
    """Rounds `x` to `bits` of mantissa, to the nearest even."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits)


def rounded(bits: int) -> Arithmetic:
    """Products of operands with `bits` of mantissa, summed in float32."""
    return lambda product, a, b: product(keep(bits, a), keep(bits, b))


def three_passes(product: Product, a: Any, b: Any) -> Any:
    """Operands split into two bfloat16 parts; skips the product of the small parts."""
    high_a, high_b = keep(BFLOAT16, a), keep(BFLOAT16, b)
    low_a, low_b = keep(BFLOAT16, a - high_a), keep(BFLOAT16, b - high_b)
    return product(high_a, high_b) + (product(high_a, low_b) + product(low_a, high_b))


def emulated(
    function: Callable[..., Any], arithmetic: Arithmetic, chosen: Callable[[Any], bool]
) -> Callable[..., Any]:
    """Jits `function` with `arithmetic` in the products that `chosen` selects.

    Args:
      function: takes and returns trees of arrays; traced at the first call.
      arithmetic: how the selected products are computed.
      chosen: takes the equation of a product (`dot_general`), returns True to select.
    """

    def replaced(equation: Any) -> Any:
        product = functools.partial(equation.primitive.bind, **equation.params)
        operands = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals(equation))
        program = jax.make_jaxpr(jax.jit(functools.partial(arithmetic, product)))
        (call,) = program(*operands).jaxpr.eqns
        return call.replace(invars=equation.invars, outvars=equation.outvars)

    def within(value: Any) -> Any:
        """Rewrites an equation's parameter: loops, branches and calls hold programs."""
        if isinstance(value, core.Jaxpr):  # since JAX 0.12 a ClosedJaxpr is one, too
            return value.replace(eqns=[rewritten(equation) for equation in value.eqns])
        if isinstance(value, core.ClosedJaxpr):
            return value.replace(jaxpr=within(value.jaxpr))
        return tuple(map(within, value)) if type(value) is tuple else value

    def rewritten(equation: Any) -> Any:
        if equation.primitive.name == "dot_general":
            return replaced(equation) if chosen(equation) else equation
        inner = {name: within(value) for name, value in equation.params.items()}
        return equation.replace(params=inner)

    def call(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = core.jaxpr_as_fun(within(program))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return jax.jit(call)


def avals(equation: Any) -> list[Any]:
    """Shapes and dtypes of an equation's operands."""
    return [operand.aval for operand in equation.invars]


# --- Variants -------------------------------------------------------------------------


class Variant(NamedTuple):
    """What differs from float32 in a run.

    Attributes:
      name: name in the table.
      products: which products: "none"; "matmul_precision", those of model and step;
        "but patches", the same without the patch embedding; "everything", merging and
        cosines too; "search", and of these only "query-key" or those in blocks "before"
        the window of the deepest defect; "way back", those of the backward pass.
      arithmetic: how these products are computed.
      stored: what is stored in bfloat16: "query-key" kernels, "factors" (U and V) or
        "kernels" (merged).
      adds: True to merge a kernel as W + V·diag(ε)·Uᵀ instead of V·diag(σ + ε)·Uᵀ.
    """

    name: str
    products: str = "none"
    arithmetic: Arithmetic = rounded(23)
    stored: str = "none"
    adds: bool = False


FLOAT32 = Variant("")
VARIANTS = (
    Variant("float32, emulated", "matmul_precision"),
    Variant("one bit less than float32", "matmul_precision", rounded(22)),
    Variant("TF32 products", "matmul_precision", rounded(TF32)),
    Variant("TF32 products, merging and cosines", "everything", rounded(TF32)),
    Variant("bfloat16 products", "matmul_precision", rounded(BFLOAT16)),
    Variant("bfloat16 products but patches", "but patches", rounded(BFLOAT16)),
    Variant("bfloat16 products in three passes", "matmul_precision", three_passes),
    Variant("bfloat16 search", "search", rounded(BFLOAT16)),
    Variant("bfloat16 query-key in the search", "query-key", rounded(BFLOAT16)),
    Variant("bfloat16 before the window", "before", rounded(BFLOAT16)),
    Variant("bfloat16 way back", "way back", rounded(BFLOAT16)),
    Variant("TF32 way back", "way back", rounded(TF32)),
    Variant("query-key kernels stored in bfloat16", stored="query-key"),
    Variant("U, V stored in bfloat16", stored="factors"),
    Variant("U, V stored in bfloat16, W + V·diag(ε)·Uᵀ", stored="factors", adds=True),
    Variant("merged kernels stored in bfloat16", stored="kernels"),
)


class Case(NamedTuple):
    """A recorded model and its repair before the first step."""

    config: vit.ViTConfig
    options: repair.RepairOptions
    frozen: repair.Frozen
    state: repair.RepairState
    images: np.ndarray  # [n, height, width, 3]
    steps: int
    before: int  # blocks before the window of the deepest defect


@functools.cache
def load(name: str) -> Case:
    """Loads a recorded repair."""
    arrays, meta = golden.load(name)
    config = vit.ViTConfig(**golden.architecture(meta))
    _, params = convert.from_torch(golden.state(arrays), config.num_heads)
    options = repair.RepairOptions(**golden.options(meta))
    start = repair.init(config, params, options, arrays["singular_defects"])
    images = np.moveaxis(arrays["images"], 1, 3)
    deepest = max(step["layer"] or 0 for step in meta["log"])
    before = max(0, deepest + 1 - (options.active_blocks or config.depth))
    return Case(config, options, *start, images, meta["steps"], before)


def marked(walk: Any) -> Any:
    """A walk of `search` that marks its products for emulation."""
    options = dataclasses.replace(walk.options, matmul_precision="high")
    return dataclasses.replace(walk, options=options)


@contextlib.contextmanager
def changed_library(case: Case, variant: Variant) -> Iterator[None]:
    """Patches the library while a step is traced, as the variant demands."""
    advance, back = search._Walk._advance, search._Walk._back_through

    def marked_advance(walk, *args):
        emulated_block = functools.partial(advance, marked(walk), *args)
        if variant.products != "before":
            return emulated_block()
        _, block, _ = args
        exact_block = functools.partial(advance, walk, *args)
        return lax.cond(block < case.before, emulated_block, exact_block)

    def marked_back(walk, *args):
        return back(marked(walk), *args)

    def added(factors, eps, *_):  # a block whose ε is zero adds zero
        product = functools.partial(jnp.einsum, "lis,ls,los->lio", precision="highest")
        return {
            name: kernel + product(factors.v[name], eps[name], factors.u[name])
            for name, kernel in case.state.merged.items()
        }

    with contextlib.ExitStack() as changes:
        change = mock.patch.object
        if variant.products in ("search", "query-key", "before"):
            changes.enter_context(change(search._Walk, "_advance", marked_advance))
        if variant.products == "way back":
            changes.enter_context(change(search._Walk, "_back_through", marked_back))
        if variant.adds:
            changes.enter_context(change(repair, "_merge_touched", added))
        yield


def is_chosen(config: vit.ViTConfig, products: str, equation: Any) -> bool:
    """True if the equation's product is one of the variant's `products`."""
    shapes, width = [x.shape for x in avals(equation)], config.embed_dim
    if products == "everything":
        return True
    if products == "query-key" and (width, 2 * width) not in shapes:
        return False
    if products == "but patches" and (3 * config.patch_size**2, width) in shapes:
        return False
    return equation.params["precision"] == MARKED


@functools.cache
def make_step(name: str, variant: Variant) -> Callable[..., Any]:
    """`repair.make_step` for one image, emulated.

    Returns:
      step(state, frozen, image [1, height, width, 3]) -> (state, metrics, search); the
      last is what the search found.
    """
    case = load(name)
    options = case.options
    if variant.products in ("matmul_precision", "but patches", "everything"):
        options = dataclasses.replace(options, matmul_precision="high")
    model = vit.ViT(case.config, precision=options.matmul_precision)
    grid = vit.patch_grid(case.config, *case.images.shape[1:3])

    def step(state, frozen, image):
        with changed_library(case, variant):
            walk = search._Walk(case.config, options, state, frozen, WHOLE, grid)
            tokens = model.apply({"params": frozen.params}, image, method="embed")
            found = walk.search(tokens)
            results = jax.tree.map(lambda x: x[None], walk.result(found))
            valid = jnp.ones(1, bool)
            state, metrics = repair._update(
                options, state, frozen, results, valid, WHOLE
            )
            return state, metrics, found._replace(traces=None)

    chosen = functools.partial(is_chosen, case.config, variant.products)
    return emulated(step, variant.arithmetic, chosen)


# --- Runs -----------------------------------------------------------------------------


class Run(NamedTuple):
    """A finished repair, one image per step."""

    metrics: list[repair.Metrics]
    searches: list[search.Search]
    state: repair.RepairState
    left: int  # images that still have a defect, in float32


def stored(
    what: str, frozen: repair.Frozen, state: repair.RepairState
) -> tuple[repair.Frozen, repair.RepairState]:
    """Rounds one part of the frozen model or the state to bfloat16."""
    half = functools.partial(jax.tree.map, functools.partial(keep, BFLOAT16))
    if what == "kernels":
        state = dataclasses.replace(state, merged=half(state.merged))
    if what == "factors":
        u, v = half((frozen.factors.u, frozen.factors.v))
        frozen = frozen.replace(factors=frozen.factors.replace(u=u, v=v))
    if what == "query-key":
        params = jax.tree.map(lambda x: x, frozen.params)  # a tree of its own
        query_key = params["blocks"]["attn"]["qk"]
        query_key["kernel"] = half(query_key["kernel"])
        frozen = frozen.replace(params=params)
    return frozen, state


@functools.cache
def run(name: str, variant: Variant) -> Run:
    """Repeats a recorded repair with a variant's number formats."""
    case, metrics, searches = load(name), [], []
    step = make_step(name, variant._replace(name="", stored="none"))
    frozen, state = stored(variant.stored, case.frozen, case.state)
    for number in range(case.steps):
        image = case.images[number % len(case.images)]
        state, after, found = step(state, frozen, image[None])
        _, state = stored(variant.stored, frozen, state)
        metrics.append(jax.device_get(after))
        searches.append(jax.device_get(found))
    exact = make_step(name, FLOAT32)
    ends = [exact(state, case.frozen, image[None])[1].layer for image in case.images]
    left = int(np.sum(np.array(ends) >= 0))
    return Run(metrics, searches, jax.device_get(state), left)


def relative(actual: Any, expected: Any, unit: Any = None) -> float:
    """Norm of the difference over the norm of `unit` (None: of `expected`)."""
    norm = np.linalg.norm(expected if unit is None else unit)
    return float(np.linalg.norm(np.asarray(actual) - expected) / norm)


def compared(name: str, variant: Variant) -> dict[str, Any]:
    """A row of the table: the largest relative errors against the float32 run.

    Compares loss and α at the steps whose defect is in the same block, tokens at the
    defect of the first step, and ε and kernels one by one after the last step.
    """
    case, ours, exact = load(name), run(name, variant), run(name, FLOAT32)
    steps = list(zip(ours.metrics, exact.metrics, strict=True))
    masks = [
        np.array_equal(a.mask, b.mask)
        for a, b in zip(ours.searches, exact.searches, strict=True)
    ]
    same = [(a, b) for a, b in steps if a.layer == b.layer >= 0]
    eps, kernels, repairs, parts = [], [], [], []
    for kernel, stack in exact.state.eps.items():
        for block in np.flatnonzero(stack.any(axis=1)):
            before = np.asarray(case.state.merged[kernel][block])
            got, want = (x.state.merged[kernel][block] for x in (ours, exact))
            eps.append(relative(ours.state.eps[kernel][block], stack[block]))
            kernels.append(relative(got, want))
            repairs.append(relative(got, want, unit=want - before))
            parts.append([np.linalg.norm(x) for x in (got - want, want - before)])
    return {
        "run": name,
        "not float32": variant.name,
        "same block": f"{sum(bool(a.layer == b.layer) for a, b in steps)}/{len(steps)}",
        "same mask": f"{sum(masks)}/{len(steps)}",
        "loss": max((relative(a.loss, b.loss) for a, b in same), default=np.nan),
        "α": max((relative(a.alpha, b.alpha) for a, b in same), default=np.nan),
        "ε": max(eps),
        "kernels": max(kernels),
        "kernels / repair": max(repairs),
        "all kernels / all repairs": float(np.divide(*np.linalg.norm(parts, axis=0))),
        "tokens": relative(ours.searches[0].tokens, exact.searches[0].tokens),
        "defects left": f"{ours.left}/{len(case.images)}",
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for each in rows:
        cells = each.values()
        lines.append([f"{x:.1e}" if isinstance(x, float) else x for x in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision")
    parser.add_argument("--golden", type=Path, default=golden.FOLDER)
    parser.add_argument("--out", type=Path, help="file to write the table to")
    args = parser.parse_args()
    golden.FOLDER = args.golden
    rows = [
        compared(name, variant)
        for variant in VARIANTS
        for name in golden.REPAIRED
        if variant.products != "before" or load(name).before
    ]
    table = markdown(rows)
    print(table, end="")
    if args.out:
        args.out.write_text(table)


if __name__ == "__main__":
    main()
