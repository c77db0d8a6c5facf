"""The public names, their documentation and the order of the modules."""

import ast
import doctest
import graphlib
import inspect
import pathlib
import pydoc
import re
import sys
import typing

import jax
import jax.numpy as jnp
import pytest

import softjax as sj
from tests.catalogue import CATALOGUE

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "softjax"

# A module imports only from those before it.
ORDER = [
    *("_mesh", "_cpu", "_slices", "_inputs", "_api", "_autodiff", "_float", "_elementary"),
    *("_scores", "_scan", "_own_transpose", "_accelerators"),
    *("_rootfinding", "_threshold", "_softmax"),
    *("_softmax_stats", "_divergence", "_online", "_uint64", "_random", "_inverse_cdf"),
    *("_closures", "_tiles"),
    *("reductions", "dense", "sparse", "top_k", "segments", "scores", "filters", "decoding"),
    *("entropies", "losses", "output_layers", "contrastive", "sampling", "subsets"),
    *("gradients", "estimators", "policies", "calibration", "masks", "attentions", "testing"),
    *("__init__",),
]
# Their names are not the package's own: `softjax.masks.Causal`.
NAMESPACES = {"masks", "testing"}
SECTIONS = ["Args", "Returns", "Raises", "Example", "Note", "Reference"]

FUNCTIONS = sorted(name for name in sj.__all__ if name != "__version__")
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def modules():
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room(path):
    """`attention/tiles.py` belongs to the room `attention`."""
    return path.parts[0].removesuffix(".py")


# What has no place in the catalogue, whose functions have values and derivatives of their own.
APART = {
    **dict.fromkeys(
        ("clip_gradient", "reverse_gradient", "score_function", "straight_through"),
        "the derivative is not that of the value: test_gradients",
    ),
    **dict.fromkeys(
        ("gumbel_softmax", "rao_blackwell_gumbel_softmax", "reinmax"),
        "the derivative is an estimate: test_estimators",
    ),
    "alibi_slopes": "of no array: test_attention_shaping",
    "explain_attention": "a text: test_attention_backends",
    **dict.fromkeys(
        ("zigzag_permutation", "inverse_zigzag_permutation"),
        "of no array: test_ring",
    ),
    "check_labels": "an error, and no value of its own: test_losses",
    "prediction_sets": "of bools: test_calibration",
    "gumbel": "random, of no array: test_sampling",
    "sample": "random integers: test_sampling",
    "weighted_subset": "its derivative is an estimator's: test_subsets",
}


def test_every_public_function_is_in_the_catalogue():
    assert sorted({*(entry.name for entry in CATALOGUE), *APART}) == FUNCTIONS
    assert not APART.keys() & {entry.name for entry in CATALOGUE}


def test_every_public_function_is_in_the_readme():
    """In a table whose first cell is the name in backquotes, with or without arguments."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(?:sj\.)?(\w+)", cell)}
    assert set(FUNCTIONS) <= named, sorted(set(FUNCTIONS) - named)


@pytest.mark.slow
def test_the_readme_runs_from_top_to_bottom():
    """In one session, and `attend`, which reads names of its block, still runs at the end."""
    pytest.importorskip("optax")
    text, scope = (ROOT / "README.md").read_text(encoding="utf-8"), {}
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            exec(block, scope)
        out = scope["attend"](*[scope["q"]] * 3)
    assert out.shape == scope["q"].shape


def test_names_are_sorted_unique_and_there():
    assert len(set(sj.__all__)) == len(sj.__all__)
    for name in sj.__all__:
        assert hasattr(sj, name), name
    public = {n for n in vars(sj) if not n.startswith("_")}
    assert {n for n in public if callable(getattr(sj, n))} == set(FUNCTIONS)


def test_dir_and_help_show_the_public_names():
    assert dir(sj) == sorted([*FUNCTIONS, "masks"])
    text = pydoc.plain(pydoc.render_doc(sj))
    sections = re.split(r"\n(?=[A-Z][A-Z ]*\n)", text)
    by_title = {s.split("\n")[0]: s for s in sections}
    shown = re.findall(r"^    (\w+)\(", by_title["FUNCTIONS"], re.MULTILINE)
    assert sorted(shown) == FUNCTIONS
    assert "CLASSES" not in by_title
    assert "DATA" not in by_title


def test_the_docstring_of_the_package_tells_the_rooms():
    rooms = {room(path) for path in modules()} - {"__init__"}
    told = re.findall(r"^    (\w+) {2,}\S", sj.__doc__, re.MULTILINE)
    assert sorted(told) == sorted(name for name in rooms if not name.startswith("_"))
    assert told == [name for name in ORDER if name in told]


def test_each_module_lists_what_the_package_exports():
    listed = []
    for path in modules():
        if path.name != "__init__.py" and not room(path).startswith("_"):
            if room(path) in NAMESPACES:
                continue
            tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
            for node in tree.body:
                is_assignment = isinstance(node, ast.Assign)
                if is_assignment and ast.unparse(node.targets[0]) == "__all__":
                    listed += ast.literal_eval(node.value)
    assert sorted(listed) == FUNCTIONS


def test_no_function_is_named_as_a_module():
    assert not {room(path) for path in modules()} & set(FUNCTIONS)


def test_imports_point_one_way():
    for path in modules():
        assert room(path) in ORDER, path
        tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                names = [node.module]
                if node.module == "softjax":
                    names = [f"softjax.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name == "softjax" or name.startswith("softjax."):
                    other = name.split(".")[1] if "." in name else "__init__"
                    inside = other == room(path) and len(path.parts) > 1
                    before = ORDER.index(other) < ORDER.index(room(path))
                    assert inside or before, (path, name)


def test_the_modules_of_a_room_import_each_other_without_a_circle():
    """Their order is what `graphlib` finds; a room's `__init__` is its last."""
    imported = {}
    for path in modules():
        if len(path.parts) > 1:
            name = ".".join(("softjax", *path.with_suffix("").parts))
            tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
            froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            inside = {n.module for n in froms if n.module.startswith(f"softjax.{room(path)}")}
            imported[name] = {f"{m}.__init__" if m.count(".") == 1 else m for m in inside}
    order = list(graphlib.TopologicalSorter(imported).static_order())
    for name in imported:
        last = f"{name.rpartition('.')[0]}.__init__"
        assert order.index(name) <= order.index(last), name


def test_the_package_needs_jax_alone():
    for path in modules():
        tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                top = name.split(".")[0]
                allowed = top in ("jax", "softjax", "numpy") or top in sys.stdlib_module_names
                assert allowed, (path, name)


def sections(doc):
    return re.findall(r"^(\w+):$", doc, flags=re.M)


@every_function
def test_docstring(name):
    doc = inspect.getdoc(getattr(sj, name))
    assert doc
    summary = doc.split("\n\n")[0].replace("\n", " ")
    assert re.fullmatch(r"[A-Z][a-z]+s\b.*\.", summary), (
        f"not a verb and a full stop: {summary}"
    )
    found = [s for s in sections(doc) if s in SECTIONS]
    assert found == [s for s in SECTIONS if s in found], "in another order than the template"
    for section in ("Args", "Returns", "Example"):
        assert section in found, section
    assert ".. math::" in doc.split("Args:")[0] or ":math:" in doc.split("Args:")[0]
    assert ">>> " in doc


@every_function
def test_docstring_names_every_argument(name):
    doc = inspect.getdoc(getattr(sj, name))
    body = doc.split("Args:\n")[1].split("\n\n")[0]
    described = re.findall(r"^ {4}(\w+(?:, \w+)*):", body, flags=re.M)
    described = [n for names in described for n in names.split(", ")]
    assert described == list(inspect.signature(getattr(sj, name)).parameters)


@pytest.mark.slow
@pytest.mark.optimized
@every_function
def test_example(name):
    fn = getattr(sj, name)
    scope = {"jnp": jnp, "jax": jax, "sj": sj, "softjax": sj, name: fn}
    scope |= vars(inspect.getmodule(inspect.unwrap(fn)))
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(fn), scope, name, None, 0)
    report = []
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        failed, tried = doctest.DocTestRunner(
            optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False
        ).run(test, out=report.append)
    assert tried > 0
    assert not failed, "".join(report)


@every_function
def test_signature(name):
    """Annotated in full; no catch-all arguments; options after the arrays, by keyword."""
    fn = getattr(sj, name)
    signature = inspect.signature(fn)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.name in ("axis", "where", "temperature", "keepdims", "sink", "kind"):
            assert parameter.kind == parameter.KEYWORD_ONLY, parameter


RETURNS = {  # arguments of the functions whose result depends on an option
    "attention": ("q, q, q", "return_lse"),
    "cross_entropy": ("z, y", "return_z_loss"),
    "gumbel_softmax": ("key, z, temperature=1.0", "return_log"),
    "linear_cross_entropy": ("z, z, y", "return_z_loss"),
    "logsumexp": ("z", "return_sign"),
}


def test_results_that_depend_on_an_option_have_overloads():
    """One for each value of the option, and one for a bool that is not known."""
    # `explain_attention` takes every option of `attention`, and always returns a text.
    for name in set(FUNCTIONS) - {"explain_attention"}:
        fn = inspect.unwrap(getattr(sj, name))
        asked = [p for p in inspect.signature(fn).parameters if p.startswith("return_")]
        assert asked == ([RETURNS[name][1]] if name in RETURNS else []), name
        assert len(typing.get_overloads(fn)) == 3 * len(asked), name


@pytest.mark.slow
def test_the_type_checker_knows_the_results(tmp_path):
    api = pytest.importorskip("mypy.api")
    lines = [
        "from typing import assert_type",
        "import softjax as sj",
        "from jax import Array",
        "def check(z: Array, y: Array, q: Array, key: Array, some: bool) -> None:",
    ]
    pair = "tuple[Array, Array]"
    for name, (args, option) in RETURNS.items():
        for value, result in (
            ("", "Array"),
            (f", {option}=False", "Array"),
            (f", {option}=True", pair),
            (f", {option}=some", f"Array | {pair}"),
        ):
            lines.append(f"    assert_type(sj.{name}({args}{value}), {result})")
    script = tmp_path / "script.py"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = str(ROOT / "pyproject.toml")
    found, errors, _ = api.run(
        [str(script), "--config-file", config, "--cache-dir", str(tmp_path / "cache")]
    )
    told = [line for line in found.splitlines() if "script.py" in line]
    assert not told, "\n".join(told)
    assert "Found" in found or "Success" in found, found + errors


def executed(node):
    """The parts of an expression that run at once: not the bodies of its lambdas."""
    yield node
    if not isinstance(node, ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from executed(child)


def test_importing_runs_no_array_code():
    """Modules hold definitions and plain constants: no call of jnp at the top level."""
    for path in modules():
        tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr) and node.value:
                for call in executed(node.value):
                    called = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
                    assert not called.startswith(("jnp.", "jax.numpy")), path
