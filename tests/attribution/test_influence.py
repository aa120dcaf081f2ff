"""Every method against a dense float64 inverse or a literal loop over its equation."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from layered import FACTORS, SHAPES, Layers, Streamed, factors_of, gradients, pair
from scipy import stats

import datainf
from datainf import scaling
from datainf.attribution.damping import layer_damping
from datainf.attribution.methods import METHODS, exact, largest_eigenvalue, lissa_scaled, takes
from datainf.errors import InputError
from datainf.storage.rows import Rows, double_on, gram, second_moment

WIDE, TALL = (9, 40), (60, 12)  # (n, d): d > n takes exact's dual system, d <= n its primal one


def damped_hessian(G: torch.Tensor, lam: float) -> torch.Tensor:
    return sum(torch.outer(g, g) for g in G) / len(G) + lam * torch.eye(G.shape[1], dtype=G.dtype)


def oracle(method: str, G: torch.Tensor, V: torch.Tensor, lam: float) -> torch.Tensor:
    """The definition of each method with dense d x d matrices, one query at a time."""
    n, d = G.shape
    identity = torch.eye(d, dtype=G.dtype)
    H = damped_hessian(G, lam)

    def iterate(A: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        r = v.clone()
        for _ in range(10):
            r = v + (identity - A) @ r
        return r

    def solve(v: torch.Tensor) -> torch.Tensor:
        if method == "hessian_free":
            return v
        if method == "datainf":  # the right-hand side of the paper's Eq. 4, literally
            return sum(torch.linalg.inv(torch.outer(g, g) + lam * identity) for g in G) @ v / n
        if method == "exact":
            return torch.linalg.inv(H) @ v
        if method == "lissa":
            return iterate(H, v)
        if method == "lissa_as_published":
            return iterate(H - 2 * lam * identity, v)
        if method == "lissa_scaled":
            step = 1 / (largest_eigenvalue(G) + lam)
            return step * iterate(step * H, v)
        if method in ("kronecker", "ekfac"):
            matrices = [g.view(SHAPES[d]) for g in G]
            sides = [sum(g @ g.T for g in matrices), sum(g.T @ g for g in matrices)]
            U, W = (torch.linalg.eigh(side).eigenvectors for side in (sides, factors_of(SHAPES[d]))[method == "ekfac"])
            basis = torch.kron(U, W)  # whose columns are vectors of d
            return basis @ torch.diag(1 / (torch.diag(basis.T @ (H - lam * identity) @ basis) + lam)) @ basis.T @ v
        if method == "generalized_fisher":
            out, width = SHAPES[d]
            matrices = [g.view(out, width) for g in G]
            if width >= out:
                F = sum(g.T @ g for g in matrices) / (n * out)
                shared = torch.kron(torch.eye(out, dtype=G.dtype), F)
            else:
                F = sum(g @ g.T for g in matrices) / (n * width)
                shared = torch.kron(F, torch.eye(width, dtype=G.dtype))
            return torch.linalg.inv(shared + lam * identity) @ v
        raise AssertionError(method)

    return torch.stack([solve(v) for v in V])


def of_layer(method: str, d: int):
    """The method as a function of G, V and lam alone."""
    function = METHODS[method]
    told = {"shape": SHAPES[d], "factors": factors_of(SHAPES[d])}
    return partial(function, **{name: value for name, value in told.items() if takes(function, name)})


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", [WIDE, TALL, (1, 7)])
@pytest.mark.parametrize("method", METHODS)
def test_method_equals_its_definition(method, shape):
    G, V = gradients(*shape), gradients(5, shape[1], seed=1)
    lam = layer_damping(G)
    assert relative_error(of_layer(method, shape[1])(G, V, lam), oracle(method, G, V, lam)) <= 1e-10


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("method", METHODS)
def test_float32_gradients_stay_close_to_float64(method, shape):
    G, V = gradients(*shape), gradients(5, shape[1], seed=1)
    lam = layer_damping(G)
    function = of_layer(method, shape[1])
    found = function(G.float(), V.float(), lam)
    assert found.dtype == torch.float32
    assert relative_error(found.double(), function(G, V, lam)) <= 2e-5


def test_exact_in_float32_survives_bad_conditioning():
    """One gradient a million times the others, damping 1e-6: float32 arithmetic alone would lose every digit."""
    G, V = gradients(30, 20, dtype=torch.float32), gradients(4, 20, seed=1, dtype=torch.float32)
    G[0] *= 1e3
    lam = layer_damping(G, 1e-6)
    expected = V.double() @ torch.linalg.inv(damped_hessian(G.double(), lam))
    assert relative_error(exact(G, V, lam).double(), expected) <= 1e-6


def test_exact_primal_and_dual_agree():
    """Zero columns change d and so the system that is solved, but not the first 12 entries of the solution."""
    G, V = gradients(*TALL), gradients(3, 12, seed=1)
    lam = layer_damping(G)
    padded = [torch.nn.functional.pad(matrix, (0, 100)) for matrix in (G, V)]
    assert relative_error(exact(*padded, lam)[:, :12], exact(G, V, lam)) <= 1e-10


def test_datainf_is_exact_for_one_example():
    G, V = gradients(1, 30), gradients(4, 30, seed=1)
    lam = layer_damping(G)
    assert relative_error(METHODS["datainf"](G, V, lam), exact(G, V, lam)) <= 1e-10


def test_datainf_is_exact_for_equal_gradients_and_not_otherwise():
    G, V = gradients(6, 30), gradients(4, 30, seed=1)
    repeated = G[:1].repeat(6, 1)
    lam = layer_damping(G)
    assert relative_error(METHODS["datainf"](repeated, V, lam), exact(repeated, V, lam)) <= 1e-10
    assert relative_error(METHODS["datainf"](G, V, lam), exact(G, V, lam)) > 1e-2


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_scaled_lissa_converges_to_exact(shape):
    G, V = gradients(*shape), gradients(3, shape[1], seed=1)
    lam = layer_damping(G)
    errors = [relative_error(lissa_scaled(G, V, lam, iterations=k), exact(G, V, lam)) for k in (1, 10, 100, 8000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1e-10


def test_lissa_converges_below_two_and_diverges_above():
    G, V = gradients(*TALL), gradients(3, 12, seed=1)
    top = largest_eigenvalue(G)
    tame, wild = G * (1.5 / top) ** 0.5, G * (2.5 / top) ** 0.5
    lam = 0.1
    assert relative_error(METHODS["lissa"](tame, V, lam, iterations=500), exact(tame, V, lam)) <= 1e-6
    assert METHODS["lissa"](wild, V, lam, iterations=500).norm() > 1e3 * exact(wild, V, lam).norm()


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_largest_eigenvalue(shape):
    G = gradients(*shape)
    top = torch.linalg.eigvalsh(G.T @ G / len(G))[-1].item()
    assert 0.95 * top <= largest_eigenvalue(G) <= top * (1 + 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_influence_sums_layers_with_the_sign_of_the_paper(method):
    """Algorithm 1's loops, literally: over layers, queries and training examples."""
    train, query = pair()
    expected = torch.zeros(4, 9, dtype=torch.float64)
    for name, G in train.items():
        lam = 0.1 * sum(g @ g for g in G).item() / G.numel()
        R = oracle(method, G, query[name], lam)
        for j in range(4):
            for k in range(9):
                expected[j, k] -= R[j] @ G[k]
    assert relative_error(datainf.influence(train, query, method=method, factors=FACTORS), expected) <= 1e-10


def test_the_two_halves_make_the_whole():
    train, query = pair()
    halves = datainf.scores(train, datainf.ihvp(train, query, method="datainf"))
    assert torch.equal(halves, datainf.influence(train, query, method="datainf"))
    # Exact finds the scores without the ihvp where n < d.
    halves = datainf.scores(train, datainf.ihvp(train, query, method="exact"))
    torch.testing.assert_close(halves, datainf.influence(train, query, method="exact"), rtol=1e-11, atol=1e-11)


def test_positive_means_harmful():
    """A training example with the query's own gradient is helpful; with the opposite gradient it is harmful."""
    v = gradients(1, 8)
    G = torch.cat([v, -v, gradients(6, 8, seed=3)])
    for method in ("hessian_free", "datainf", "exact", "lissa_scaled"):
        scores = datainf.influence({"layer": G}, {"layer": v}, method=method, factors=FACTORS)
        assert scores[0, 0] < 0 < scores[0, 1]


def least_memory(train, query, method) -> int:
    """What the refusal of too little memory says is needed."""
    with pytest.raises(ValueError, match=r"memory=.* is too little: .* needs at least") as refused:
        datainf.influence(train, query, method=method, factors=FACTORS, memory=1)
    number, unit = re.search(r"at least ([\d.]+)(k?)B", str(refused.value)).groups()
    return int(float(number) * (1000 if unit else 1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", [1.0, 1.3, 2, 10])
def test_memory_bounds_the_tensors_and_not_the_result(method, more):
    """From the least that is accepted: blocks of one row, one query at a time."""
    train, query = (Streamed(side) for side in pair(n=50, m=20))
    memory = int(more * least_memory(train, query, method))
    whole = datainf.influence(*pair(n=50, m=20), method=method, factors=FACTORS)
    found = []
    peak = scaling.peak_bytes(
        lambda: found.append(datainf.influence(train, query, method=method, factors=FACTORS, memory=memory))
    )
    assert relative_error(found[0], whole) <= 1e-10
    assert peak <= memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_memory_bounds_what_a_store_on_disk_takes(method, dtype, tmp_path):
    sides = []
    for name, side in zip(("train", "query"), pair(n=24, m=8, dtype=dtype), strict=True):
        sides.append(
            datainf.GradientStore(side, shapes=side.shapes).save(tmp_path / name, shard_bytes=16 * 66 * dtype.itemsize)
        )
    whole = datainf.influence(*sides, method=method, factors=FACTORS)
    least = least_memory(*sides, method)
    for memory in (least, 2 * least):
        found = []
        options = {"method": method, "factors": FACTORS, "memory": memory}
        peak = scaling.peak_bytes(lambda: found.append(datainf.influence(*sides, **options)))  # noqa: B023
        assert relative_error(found[0], whole) <= 1e-6
        assert peak <= memory


@pytest.mark.parametrize("method", ["hessian_free", "datainf", "exact"])
def test_memory_bounds_self_influence(method):
    train, _ = pair(n=50)
    memory = 2 * least_memory(Streamed(train), Streamed(train), method)
    peak = scaling.peak_bytes(
        lambda: datainf.self_influence(Streamed(train), method=method, factors=FACTORS, memory=memory)
    )
    assert peak <= memory


def test_memory_bounds_a_function_that_is_given_the_whole_layer():
    train, query = (Streamed(side) for side in pair(n=50, m=20))
    own = lambda G, V, lam: V / lam  # noqa: E731
    memory = least_memory(train, query, own)
    assert scaling.peak_bytes(lambda: datainf.influence(train, query, own, memory=memory)) <= memory


def test_memory_is_a_size():
    train, query = pair()
    expected = datainf.influence(train, query)
    for memory in (10**9, 1.5e9, "1GB", "0.5 GiB", "700mb"):
        torch.testing.assert_close(datainf.influence(train, query, memory=memory), expected)
    for memory in ("lots", "2", -1, 0, "0GB", "infGB", "nanGB", float("inf"), float("nan"), True, [2], b"2GB", ""):
        with pytest.raises(InputError, match="memory must be a number of bytes or a size such as"):
            datainf.influence(train, query, memory=memory)


def test_rows_product_shapes():
    G = gradients(7, 5)
    rows = Rows.of(G, block_bytes=2 * 5 * 8)
    assert len(list(rows.blocks())) == 1  # a tensor in memory is one block, which takes no memory
    rows = Streamed(G=G).rows("G").to(block_bytes=132)
    assert len(list(rows.blocks())) == 4 and len(list(rows.column_blocks())) == 5
    assert torch.equal(rows.tensor(), G) and torch.equal(rows.tensor(slice(2, 5)), G[2:5])
    torch.testing.assert_close(gradients(3, 5, seed=1) @ rows.T, gradients(3, 5, seed=1) @ G.T)
    torch.testing.assert_close(gradients(3, 7, seed=1) @ rows, gradients(3, 7, seed=1) @ G)
    weights = gradients(1, 7, seed=2)[0]
    for matrix in (G, rows):
        torch.testing.assert_close(gram(matrix).tril(), (G @ G.T).tril())
        torch.testing.assert_close(gram(matrix.T).tril(), (G.T @ G).tril())
        expected = gradients(3, 5, seed=1) @ G.T @ torch.diag(weights) @ G / 7
        torch.testing.assert_close(second_moment(matrix, gradients(3, 5, seed=1), weights), expected)
    torch.testing.assert_close(rows @ gradients(3, 5, seed=1).T, G @ gradients(3, 5, seed=1).T)


@pytest.mark.parametrize("method", METHODS)
def test_permuting_examples_permutes_scores(method):
    train, query = pair()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    permuted = datainf.influence(
        Layers({name: G[order] for name, G in train.items()}), query, method=method, factors=FACTORS
    )
    torch.testing.assert_close(permuted, datainf.influence(train, query, method=method, factors=FACTORS)[:, order])


@pytest.mark.parametrize("method", ["datainf", "kronecker"])
def test_ranks_add_up_layer_by_layer(method):
    """Equal scores have equal ranks; a layer may be as small as it likes."""
    train, query = pair()
    for G in train.values():
        G[3] = G[5]
    train["a"] *= 1e-3
    query["a"] *= 1e-3
    found = datainf.influence(train, query, method=method, aggregate="ranks")
    expected = 0
    for name, G in train.items():
        alone = Layers({name: G})
        scores = datainf.influence(alone, {name: query[name]}, method=method)
        expected = expected + (2 * stats.rankdata(scores, axis=1) - 1 - len(G)) / len(G)
    assert np.allclose(found, expected)
    assert torch.equal(found[:, 3], found[:, 5])


def test_ranks_are_refused_where_there_are_no_layers():
    with pytest.raises(InputError, match="aggregate must be 'sum' or 'ranks', not 'mean'"):
        datainf.influence(*pair(), aggregate="mean")
    with pytest.raises(InputError, match="joint takes all layers together, so that there are no ranks to add"):
        datainf.influence(*pair(), "joint", aggregate="ranks")


@pytest.mark.parametrize("method", ["datainf", "exact", "kronecker"])
def test_a_layer_may_have_its_own_damping(method):
    train, query = pair()
    own = {"a": 0.5, "b": 2, "c": 10}
    expected = sum(
        datainf.influence(Layers({name: G}), {name: query[name]}, method, own[name]) for name, G in train.items()
    )
    torch.testing.assert_close(datainf.influence(train, query, method, own), expected)
    R = datainf.ihvp(train, query, method, own)
    torch.testing.assert_close(datainf.scores(train, R), expected)
    of_itself = datainf.influence(train, train, method, own).diagonal()
    torch.testing.assert_close(datainf.self_influence(train, method, own), of_itself)
    with pytest.raises(InputError, match="damping says nothing of layer 'c'"):
        datainf.influence(train, query, method, {"a": 1, "b": 1})
    with pytest.raises(InputError, match="damping must be positive and finite"):
        datainf.influence(train, query, method, own | {"b": 0})


def test_the_damping_of_a_training_is_its_definition():
    train, _ = pair()
    found = datainf.damping_of_training(Streamed(train), 0.4, 32, share=0.25)
    for name, G in train.items():
        variance = (G.square().mean(dim=0) - G.mean(dim=0).square()) / 32
        step = 0.4 / (variance + G.mean(dim=0).square()).mean().sqrt()  # the length of all steps, by Adam's division
        assert found[name] * G.square().mean() == pytest.approx(0.25 / step)


def test_the_damping_of_a_training_is_refused():
    train, query = pair()
    with pytest.raises(InputError, match="total_learning_rate must be a number above zero, not 0"):
        datainf.damping_of_training(train, 0, 32)
    with pytest.raises(InputError, match="joint has one damping for all layers"):
        datainf.influence(train, query, "joint", {"a": 1, "b": 1, "c": 1})
    train["b"][:] = 0
    with pytest.raises(InputError, match="The gradients of layer 'b' are all zero"):
        datainf.damping_of_training(train, 1, 32)


def test_scores_are_linear_in_the_query():
    train, query = pair()
    mean = {name: V.mean(dim=0, keepdim=True) for name, V in query.items()}
    torch.testing.assert_close(
        datainf.influence(train, mean), datainf.influence(train, query).mean(dim=0, keepdim=True)
    )


@pytest.mark.parametrize("method", ["hessian_free", "datainf", "exact"])
@pytest.mark.parametrize("memory", [None, 12_000])
def test_self_influence_is_the_diagonal_and_never_positive(method, memory):
    train, _ = pair()
    found = datainf.self_influence(train, method=method, factors=FACTORS, memory=memory)
    torch.testing.assert_close(found, datainf.influence(train, train, method=method, factors=FACTORS).diagonal())
    assert (found <= 0).all()


def test_a_function_is_a_method():
    train, query = pair()

    def scaled(G, V, lam, power=1):
        assert isinstance(G, torch.Tensor)
        return V / lam**power

    ours = datainf.influence(train, query, method=scaled, power=2)
    expected = -sum(query[name] @ G.T / layer_damping(G) ** 2 for name, G in train.items())
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("method", METHODS)
def test_h_may_be_of_other_rows(method):
    """With the rows of `curvature`, H and the damping are theirs; with the training rows themselves nothing changes."""
    train, query = pair()
    other = Layers({name: 2 * gradients(13, G.shape[1], seed=20) for name, G in train.items()})
    found = datainf.influence(train, query, method=method, factors=FACTORS, curvature=other)
    expected = torch.zeros(4, 9, dtype=torch.float64)
    for name, C in other.items():
        expected -= oracle(method, C, query[name], layer_damping(C)) @ train[name].T
    assert relative_error(found, expected) <= 1e-10
    R = datainf.ihvp(train, query, method=method, factors=FACTORS, curvature=other)
    torch.testing.assert_close(datainf.scores(train, R), found)
    same = Layers({name: G.clone() for name, G in train.items()})
    torch.testing.assert_close(
        datainf.influence(train, query, method=method, factors=FACTORS, curvature=same),
        datainf.influence(train, query, method=method, factors=FACTORS),
    )
    streamed = (Streamed(side) for side in (train, query))
    torch.testing.assert_close(
        datainf.influence(*streamed, method=method, factors=FACTORS, curvature=Streamed(other)), found
    )
    of_own = datainf.self_influence(train, method=method, factors=FACTORS, curvature=other)
    torch.testing.assert_close(
        of_own, datainf.influence(train, train, method=method, factors=FACTORS, curvature=other).diagonal()
    )


def test_what_makes_h_is_looked_at():
    train, query = pair()
    few = Layers({name: G for name, G in train.items() if name != "b"})
    with pytest.raises(ValueError, match="layer 'b' is missing from the curvature gradients"):
        datainf.influence(train, query, curvature=few)
    spoiled = Layers(train)
    spoil(spoiled, "b", 6, float("nan"))
    with pytest.raises(ValueError, match="The gradient of curvature example 6 in layer 'b' is not finite"):
        datainf.influence(train, query, curvature=spoiled)
    with pytest.raises(ValueError, match="The gradient of training example 6 in layer 'b' is not finite"):
        datainf.influence(spoiled, query, curvature=train)


@pytest.mark.parametrize("method", ["kronecker", "generalized_fisher"])
def test_a_matrix_whose_shape_nobody_knows_is_refused(method):
    train, query = pair()
    with pytest.raises(InputError, match=f"{method} must know which matrix layer 'a' is of: give a GradientStore"):
        datainf.influence(dict(train), query, method=method, factors=FACTORS)


def test_kronecker_is_exact_for_vectors():
    """Of a matrix of one row the two sides' eigenvectors are H's own."""
    G, V = gradients(*TALL), gradients(3, 12, seed=1)
    lam = layer_damping(G)
    for shape in ((1, 12), (12, 1)):
        assert relative_error(METHODS["kronecker"](G, V, lam, shape=shape), exact(G, V, lam)) <= 1e-10


def test_kronecker_is_exact_for_gradients_of_independent_sides():
    """H is a Kronecker product where both sides of all gradients vary independently, here in all combinations."""
    left, right = gradients(6, 4), gradients(8, 5, seed=1)
    G = torch.einsum("ao,bi->aboi", left, right).reshape(48, 20)
    V, lam = gradients(3, 20, seed=2), 0.01
    assert relative_error(METHODS["kronecker"](G, V, lam, shape=(4, 5)), exact(G, V, lam)) <= 1e-10
    some = G[[0, 9, 18, 27, 36, 45, 5]]
    assert relative_error(METHODS["kronecker"](some, V, lam, shape=(4, 5)), exact(some, V, lam)) > 1e-2


@pytest.mark.parametrize("kind", ["in memory", "streamed", "bounded"])
@pytest.mark.parametrize("other", [False, True])
def test_joint_is_exact_with_one_h_for_all_layers(kind, other):
    train, query = pair()
    curvature = Layers({name: 2 * gradients(13, G.shape[1], seed=20) for name, G in train.items()}) if other else None
    G, V, C = (torch.cat(list(side.values()), dim=1) for side in (train, query, curvature or train))
    lam = layer_damping(C)
    expected = -oracle("exact", C, V, lam) @ G.T
    sides = [train, query, curvature]
    if kind != "in memory":
        sides = [side and Streamed(side) for side in sides]
    memory = {"memory": 40_000} if kind == "bounded" else {}
    found = datainf.influence(*sides[:2], method="joint", curvature=sides[2], **memory)
    assert relative_error(found, expected) <= 1e-10
    of_itself = datainf.self_influence(sides[0], method="joint", curvature=sides[2])
    torch.testing.assert_close(of_itself, -(oracle("exact", C, G, lam) * G).sum(dim=1))


def test_what_takes_all_layers_together_has_no_r_of_a_layer():
    train, query = pair()
    for method in ("joint", "cosine"):
        with pytest.raises(InputError, match=f"{method} takes all layers together and gives no R of a layer"):
            datainf.ihvp(train, query, method=method, factors=FACTORS)
    with pytest.raises(ValueError, match="layer 'b' is missing from the query gradients"):
        datainf.influence(train, {name: V for name, V in query.items() if name != "b"}, method="joint")


def test_cosine_is_that_of_the_whole_gradients():
    train, query = pair()
    G, V = (torch.cat(list(side.values()), dim=1) for side in (train, query))
    expected = -torch.nn.functional.cosine_similarity(V[:, None], G[None], dim=2)
    torch.testing.assert_close(datainf.influence(train, query, method="cosine"), expected)
    torch.testing.assert_close(datainf.influence(Streamed(train), Streamed(query), method="cosine"), expected)
    train["a"][3], train["b"][3], train["c"][3] = 0, 0, 0  # a gradient of nothing is like no other
    assert (datainf.influence(train, query, method="cosine")[:, 3] == 0).all()


def test_a_function_that_takes_the_shape_is_told_it():
    train, query = pair()
    seen = []

    def own(G, V, lam, shape):
        seen.append((G.shape[1], shape))
        return V

    datainf.influence(train, query, method=own)
    assert seen == [(40, (4, 10)), (5, (5, 1)), (21, (3, 7))]


def test_options_reach_the_method():
    train, query = pair()
    close = datainf.influence(train, query, method="lissa_scaled", iterations=5000)
    torch.testing.assert_close(close, datainf.influence(train, query, method="exact"), rtol=1e-8, atol=1e-8)


def test_half_precision_gradients_are_computed_in_float32():
    train, query = pair(dtype=torch.bfloat16)
    scores = datainf.influence(train, query)
    assert scores.dtype == torch.float32
    expected = datainf.influence(*({n: G.float() for n, G in side.items()} for side in (train, query)))
    torch.testing.assert_close(scores, expected)


def test_divergence_is_said_aloud():
    train = {"layer": 1e20 * gradients(5, 8, dtype=torch.float32).clamp(-1, 1)}
    train["layer"] /= 1e5
    with pytest.warns(UserWarning, match="lissa diverged in layer 'layer'"):
        datainf.influence(train, train, method="lissa")


def spoil(side, name, row, value):
    side[name] = side[name].clone()
    side[name][row, 2] = value


BAD_INPUT = {
    "unknown method": (lambda t, q: {"method": "datainv"}, "choose one of hessian_free, datainf, lissa"),
    "unknown option": (lambda t, q: {"iterations": 3}, "datainf takes no option 'iterations'"),
    **{
        f"damping {value!r}": (lambda t, q, value=value: {"damping": value}, "damping must be positive and finite, a")
        for value in (0.0, -0.1, float("nan"), float("inf"), "0.1", None, True, [0.1], torch.ones(2), 1j)
    },
    "damping that vanishes": (lambda t, q: {"damping": 5e-324}, "damping=4.94066e-324 gives layer 'a' the damping 0:"),
    **{
        f"iterations {value!r}": (
            lambda t, q, value=value: {"method": "lissa", "iterations": value},
            "iterations must be a whole number, 1 at least, not",
        )
        for value in (0, -1, 2.5, "10", float("nan"), None, True)
    },
    "no iterations": (lambda t, q: {"method": "lissa(0)"}, "iterations must be a whole number, 1 at least, not 0."),
    "no such device": (lambda t, q: {"device": "gpu"}, "The device 'gpu' cannot be used here: give one such as"),
    "a device that is not there": (lambda t, q: {"device": "mps:7"}, "The device 'mps:7' cannot be used here"),
    "layer missing from query": (
        lambda t, q: q.pop("b") is None or {},
        "layer 'b' is missing from the query",
    ),
    "layer missing from train": (
        lambda t, q: t.pop("c") is None or {},
        "layer 'c' is missing from the training",
    ),
    "other width": (
        lambda t, q: q.update(b=gradients(4, 6)) or {},
        "Layer 'b' has shape (9, 5) in train and (4, 6)",
    ),
    "no examples": (
        lambda t, q: t.update({n: G[:0] for n, G in t.items()}) or {},
        "There are no training examples",
    ),
    "no queries": (
        lambda t, q: q.update({n: G[:0] for n, G in q.items()}) or {},
        "There are no query examples",
    ),
    "ragged": (
        lambda t, q: t.update(c=t["c"][:5]) or {},
        "Layer 'c' has 5 training rows where the others have 9",
    ),
    "nan in train": (lambda t, q: spoil(t, "b", 6, float("nan")) or {}, "training example 6 in layer 'b'"),
    "inf in query": (lambda t, q: spoil(q, "c", 1, float("inf")) or {}, "query example 1 in layer 'c'"),
    "all-zero layer": (lambda t, q: t.update(c=torch.zeros_like(t["c"])) or {}, "layer 'c' is zero"),
    "no layers": (lambda t, q: (t.clear(), q.clear()) and {}, "There are no layers"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_in_one_sentence(case):
    change, message = BAD_INPUT[case]
    train, query = pair()
    arguments = change(train, query)
    with pytest.raises(ValueError, match=re.escape(message)):
        datainf.influence(train, query, **arguments)


@pytest.mark.parametrize("damping", [np.float32(0.25), torch.tensor(0.25), 1, 10**3])
def test_damping_may_be_any_number(damping):
    train, query = pair()
    torch.testing.assert_close(
        datainf.influence(train, query, damping=damping), datainf.influence(train, query, damping=float(damping))
    )


def test_the_second_half_refuses_what_is_not_of_the_first():
    train, query = pair()
    R = datainf.ihvp(train, query)

    def refused(message, train=train, ihvp=R, **arguments):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            datainf.scores(train, ihvp, **arguments)
        assert "\n" not in str(caught.value)

    refused("There are no layers: the training gradients are an empty mapping.", train={})
    refused("There are no query examples: `ihvp` has no layers or no rows.", ihvp={})
    refused("There are no query examples", ihvp={name: vectors[:0] for name, vectors in R.items()})
    refused("There are no training examples: layer 'a' has no rows.", train={name: G[:0] for name, G in train.items()})
    refused("Layer 'z' of `ihvp` is missing from the training gradients.", ihvp={"z": R["a"]})
    refused("Layer 'a' has shape (9, 40) in train and (4, 5) in ihvp: d_l differs.", ihvp={"a": R["b"]})
    refused("memory must be a number of bytes", memory="lots")


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_a_device_without_float64_leaves_it_to_the_cpu(shape, monkeypatch):
    asked = []
    monkeypatch.setattr("datainf.storage.rows.double_on", lambda device: asked.append(device) or torch.device("cpu"))
    G, V = gradients(*shape, dtype=torch.float32), gradients(5, shape[1], seed=1, dtype=torch.float32)
    lam = layer_damping(G)
    assert len(asked) == 1
    found = exact(Rows.of(G), V, lam)
    assert len(asked) == 3 and found.dtype == torch.float32 and found.device == V.device
    assert relative_error(found.double(), oracle("exact", G.double(), V.double(), lam)) <= 1e-6


def test_which_devices_have_float64():
    there = {name: double_on(torch.device(name)).type for name in ("cpu", "cuda", "mps", "mps:0")}
    assert there == {"cpu": "cpu", "cuda": "cuda", "mps": "cpu", "mps:0": "cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_scores_of_a_gpu_whose_float64_is_left_to_the_cpu(shape, monkeypatch):
    G, V = gradients(*shape, dtype=torch.float32).cuda(), gradients(5, shape[1], seed=1, dtype=torch.float32).cuda()
    expected = datainf.influence({"": G}, {"": V}, method="exact")
    monkeypatch.setattr("datainf.storage.rows.double_on", lambda device: torch.device("cpu"))
    found = datainf.influence({"": G}, {"": V}, method="exact")
    assert found.is_cuda and relative_error(found, expected) <= 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_gpu_equals_cpu(method):
    train, query = pair()
    on_gpu = datainf.influence(train, query, method=method, factors=FACTORS, device="cuda")
    assert on_gpu.device.type == "cuda"
    assert relative_error(on_gpu.cpu(), datainf.influence(train, query, method=method, factors=FACTORS)) <= 1e-10


def test_suspects_are_ranked_the_right_way_round():
    train, query = pair()
    by_queries, by_themselves = datainf.suspects(train, query, "exact"), datainf.suspects(train, method="exact")
    harm = datainf.influence(train, query, "exact").mean(dim=0)
    assert (harm[by_queries].diff() <= 0).all()
    own = datainf.self_influence(train, "exact")
    assert by_themselves[0] == own.argmin() and (own[by_themselves].diff() >= 0).all()
