"""Brackets of the largest singular value: exact values inside, and misses as rare as stated."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gradpen.spectral import Bracket, dense_bracket, exact_bracket, lanczos_bracket, normal_start

N = 40
SPECTRA = {  # singular values
    "gap": torch.cat([torch.tensor([2.0]), torch.linspace(0, 1, N - 1)]),
    "uniform": torch.linspace(0, 1, N),
    "clustered_at_the_top": 1 - 0.9 * torch.linspace(0, 1, N) ** 4,
    "decaying": 0.7 ** torch.arange(N),
    "two_values": torch.cat([torch.tensor([1.5]), torch.ones(N - 1)]),
    "nearly_flat": torch.cat([torch.tensor([1.01]), torch.ones(5), torch.linspace(0, 1, N - 6)]),
    "identity": torch.ones(N),
    "rank_one": torch.cat([torch.tensor([3.0]), torch.zeros(N - 1)]),
    "zero": torch.zeros(N),
    "tiny": 1e-20 * torch.linspace(0, 1, N, dtype=torch.float64),
    "huge": 1e20 * torch.linspace(0, 1, N, dtype=torch.float64),
}


def diagonal(values, batch=1):
    """u ↦ J Jᵀ u for J = diag(values): a Lanczos run with a random start sees the eigenvalues alone."""
    squares = values.double().square()
    return (lambda u: u * squares.to(u.dtype)), torch.randn(batch, len(values), dtype=torch.float64)


def contains(bracket, exact, slack):
    return (bracket.lower <= exact * (1 + slack)).all() and (exact <= bracket.upper * (1 + slack)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 4, 5), (2, 1, 6), (2, 6, 1), (1, 1, 1), (4, 4)])
def test_dense_brackets(shape, dtype):
    matrices = torch.randn(shape, dtype=dtype)
    bracket, exact = dense_bracket(matrices), torch.linalg.svdvals(matrices.double())[..., 0]
    assert bracket.lower.dtype == torch.float64 and bracket.lower.shape == shape[:-2]
    assert contains(bracket, exact, 1e-14)
    torch.testing.assert_close(bracket.upper, exact, rtol=1e-4 if dtype == torch.float32 else 1e-13, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_a_second_vector_that_is_mostly_rounding(seed):
    """The start is nearly an eigenvector; what the Ritz value then exceeds the eigenvalue by is allowed for."""
    torch.manual_seed(seed)
    gram, start = diagonal(SPECTRA["two_values"], batch=500)
    bracket = lanczos_bracket(gram, start.float(), delta=1e-6)
    assert contains(bracket, SPECTRA["two_values"].double().max(), 2e-6)


@pytest.mark.parametrize("size", [1e-19, 1e-16, 1e-11, 1e-6, 1e8, 1e16])
@pytest.mark.parametrize("name", ["gap", "uniform", "decaying", "rank_one"])
def test_squares_out_of_the_range_of_float32(name, size):
    """Row b is multiplied by J Jᵀ, whose own square would under- or overflow."""
    squares = torch.stack([SPECTRA[name].double(), size * SPECTRA[name].double(), torch.zeros(N)]).square().float()
    bracket = lanczos_bracket(lambda u: u * squares, torch.randn(3, N), delta=1e-6)
    exact = squares.double().amax(1).sqrt()
    assert contains(bracket, exact, 4e-6)
    assert (bracket.width <= 0.05).all()


def test_a_smaller_support_beside_larger_ones():
    """What lies behind a sample's own dimension does not count, whoever goes on beside it."""
    squares = torch.linspace(1, 2, 60, dtype=torch.float64)
    start = torch.randn(4, 60, dtype=torch.float64)
    start[:3, 20:] = 0
    together = lanczos_bracket(lambda u: u * squares, start, delta=1e-6, rtol=1e-4)
    alone = lanczos_bracket(lambda u: u * squares, start[:3], delta=1e-6, rtol=1e-4)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[:3], b, rtol=1e-9, atol=0)


WITHIN_FLOAT32 = [name for name in SPECTRA if name not in {"tiny", "huge"}]  # the squares of these are not


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.float64) for n in SPECTRA] + [(n, torch.float32) for n in WITHIN_FLOAT32]
)
def test_lanczos_brackets_hold_the_exact_value(name, dtype):
    gram, start = diagonal(SPECTRA[name], batch=50)
    bracket = lanczos_bracket(gram, start.to(dtype), delta=1e-6)
    exact = SPECTRA[name].double().max()
    assert bracket.lower.shape == (50,) and bracket.lower.dtype == torch.float64
    assert contains(bracket, exact, 1e-6 if dtype == torch.float32 else 1e-12)
    assert (bracket.width <= 0.05).all()


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("name", SPECTRA)
def test_few_steps_give_a_wide_bracket_not_a_wrong_one(name, steps):
    gram, start = diagonal(SPECTRA[name], batch=50)
    bracket = lanczos_bracket(gram, start, delta=1e-6, rtol=0.0, max_steps=steps)
    assert contains(bracket, SPECTRA[name].double().max(), 1e-12)
    assert (bracket.lower <= bracket.upper).all() and bracket.upper.isfinite().all()


@pytest.mark.parametrize("delta", [0.3, 0.1, 0.01])
@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("name", ["gap", "uniform", "clustered_at_the_top", "decaying", "two_values", "nearly_flat"])
def test_the_upper_end_misses_no_more_often_than_stated(name, steps, delta):
    gram, start = diagonal(SPECTRA[name], batch=2000)
    bracket = lanczos_bracket(gram, start, delta=delta, rtol=0.0, max_steps=steps)
    misses = (bracket.upper < SPECTRA[name].max() * (1 - 1e-9)).double().mean()
    assert misses <= delta + 4 * math.sqrt(delta * (1 - delta) / 2000)


@pytest.mark.parametrize("delta", [0.3, 0.1])
def test_the_stated_probability_is_not_a_generous_one(delta):
    gram, start = diagonal(SPECTRA["gap"], batch=2000)
    bracket = lanczos_bracket(gram, start, delta=delta, rtol=0.0, max_steps=4)
    misses = (bracket.upper < SPECTRA["gap"].max()).double().mean()
    assert misses >= delta - 4 * math.sqrt(delta * (1 - delta) / 2000)


@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_the_probability_is_exact_where_the_polynomials_are(dimension):
    """With degree n − 1 the Christoffel number is the weight itself, so only its distribution is left to be right."""
    gram, start = diagonal(torch.linspace(0.5, 1, dimension), batch=4000)
    bracket = lanczos_bracket(gram, start, delta=0.1, rtol=0.0, max_steps=dimension - 1)
    misses = (bracket.upper < 1).double().mean().item()
    assert misses == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 4000))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (64, 64)])
def test_matrices_of_every_sample(shape):
    matrices = torch.randn(6, *shape, dtype=torch.float64) * torch.logspace(-3, 3, 6)[:, None, None]
    gram = lambda u: (matrices @ (matrices.transpose(1, 2) @ u.unsqueeze(2))).squeeze(2)  # noqa: E731
    start = normal_start((6, shape[0]), None, matrices, seed=0)
    bracket = lanczos_bracket(gram, start, delta=1e-6)
    assert contains(bracket, torch.linalg.svdvals(matrices)[:, 0], 1e-12)
    assert (bracket.width <= 0.05).all()


def test_a_smaller_delta_gives_a_wider_bracket():
    gram, start = diagonal(SPECTRA["uniform"], batch=20)
    upper = [lanczos_bracket(gram, start, delta=delta, max_steps=8).upper for delta in (0.1, 1e-3, 1e-9)]
    assert (upper[0] < upper[1]).all() and (upper[1] < upper[2]).all()


def test_more_steps_narrow_the_bracket():
    gram, start = diagonal(SPECTRA["uniform"], batch=20)
    brackets = [lanczos_bracket(gram, start, delta=1e-6, rtol=0.0, max_steps=steps) for steps in (4, 8, 16, 32)]
    for wide, narrow in itertools.pairwise(brackets):
        assert (wide.lower <= narrow.lower).all() and (narrow.upper <= wide.upper).all()


def test_it_stops_as_soon_as_every_bracket_is_narrow_enough():
    products = []

    def counting(u):
        products.append(len(u))
        return gram(u)

    gram, start = diagonal(SPECTRA["gap"], batch=20)
    assert (lanczos_bracket(counting, start, delta=1e-6, rtol=0.05).width <= 0.05).all()
    assert len(products) < N / 2 and set(products) == {20}


def test_samples_that_are_done_leave_and_have_the_brackets_that_they_had_in_company():
    """Fast and slow spectra side by side, each row with its own operator."""
    names = ["two_values", "uniform", "decaying", "clustered_at_the_top", "rank_one", "nearly_flat", "zero", "identity"]
    squares = torch.stack([SPECTRA[name].double().square() for name in names for _ in range(8)])
    asked = []

    def restrict(samples):
        asked.append(samples)
        return lambda u: u * squares[samples]

    start = torch.randn(squares.shape, dtype=torch.float64)
    bracket = lanczos_bracket(lambda u: u * squares, start, delta=1e-6, restrict=restrict)
    assert asked and all(
        len(later) < len(earlier) for earlier, later in itertools.pairwise([range(len(start)), *asked])
    )
    assert contains(bracket, squares.amax(1).sqrt(), 1e-12) and (bracket.width <= 0.05).all()
    stayed = lanczos_bracket(lambda u: u * squares, start, delta=1e-6)
    assert (bracket.lower <= stayed.upper).all() and (stayed.lower <= bracket.upper).all()


def test_each_sample_may_have_its_own_delta():
    gram, start = diagonal(SPECTRA["uniform"], batch=20)
    delta = torch.tensor([0.1, 1e-9], dtype=torch.float64).repeat(10)
    upper = lanczos_bracket(gram, start, delta=delta, rtol=0.0, max_steps=8).upper
    for value, own in ((0.1, upper[::2]), (1e-9, upper[1::2])):
        alone = lanczos_bracket(gram, start, delta=value, rtol=0.0, max_steps=8).upper
        torch.testing.assert_close(own, alone[(0 if value == 0.1 else 1) :: 2], rtol=1e-12, atol=0)


def test_the_dimension_bounds_the_number_of_products():
    products = []
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    bracket = lanczos_bracket(
        lambda u: products.append(0) or u * values.square(),
        torch.randn(2, 3, dtype=torch.float64),
        delta=1e-6,
        rtol=0.0,
    )
    assert len(products) <= 3
    torch.testing.assert_close(bracket.lower, torch.full((2,), 3.0, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(bracket.upper, torch.full((2,), 3.0, dtype=torch.float64), rtol=1e-9, atol=0)


def test_one_dimension_is_exact():
    bracket = lanczos_bracket(lambda u: 9 * u, torch.randn(4, 1, dtype=torch.float64), delta=1e-6)
    torch.testing.assert_close(bracket.lower, torch.full((4,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(bracket.upper, torch.full((4,), 3.0, dtype=torch.float64))


def test_rows_that_are_off_are_left_out_of_the_start():
    """Dead units: J has rows of zeros, and every sample has others."""
    alive = torch.rand(30, N) < 0.3
    alive[0], alive[1] = False, torch.arange(N) == 5  # all off, one on
    matrices = torch.randn(30, N, 25, dtype=torch.float64) * alive[:, :, None]
    gram = lambda u: (matrices @ (matrices.transpose(1, 2) @ u.unsqueeze(2))).squeeze(2)  # noqa: E731
    start = normal_start((30, N), alive, matrices, seed=3)
    assert torch.equal(start != 0, alive)
    bracket = lanczos_bracket(gram, start, delta=1e-6)
    exact = torch.linalg.svdvals(matrices)[:, 0]
    assert contains(bracket, exact, 1e-12) and (bracket.width <= 0.05).all()
    assert bracket.lower[0] == bracket.upper[0] == 0
    assert bracket.upper[1].item() == pytest.approx(exact[1].item(), rel=1e-9)


def test_samples_do_not_disturb_each_other():
    """A zero, a rank-one and a slow operator side by side."""
    values = torch.stack([torch.zeros(N), SPECTRA["rank_one"], SPECTRA["uniform"], 1e-8 * SPECTRA["decaying"]]).double()
    bracket = lanczos_bracket(lambda u: u * values.square(), torch.randn(4, N, dtype=torch.float64), delta=1e-6)
    assert contains(bracket, values.max(1).values, 1e-12)
    assert (bracket.width <= 0.05).all() and not bracket.upper.isnan().any()


@pytest.mark.parametrize("size", [1e-12, 1e-20, 1e-28, 1e-35])
def test_products_that_underflow_are_taken_from_longer_vectors(size):
    """One sample's squares are below the smallest number of its type, another's operator is 0, the third is ordinary."""
    sizes = torch.tensor([[size], [0.0], [1.0]])
    values = SPECTRA["uniform"].float() * torch.ones_like(sizes)

    def gram_of(sizes, values):
        return lambda u: u * values * sizes * sizes * values  # as Jᵀ and J would, one after the other

    bracket = lanczos_bracket(
        gram_of(sizes, values),
        torch.randn(3, N),
        delta=1e-6,
        restrict=lambda kept: gram_of(sizes[kept], values[kept]),
    )
    exact = sizes.squeeze(1).double() * SPECTRA["uniform"].max()
    assert contains(bracket, exact, 1e-4) and (bracket.width <= 0.06).all()
    assert bracket.upper[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_steps_after_convergence_bring_no_ghosts(dtype):
    values = torch.cat([torch.tensor([100.0, 50.0]), torch.linspace(0, 1, 198)])
    gram, start = diagonal(values, batch=10)
    bracket = lanczos_bracket(gram, start.to(dtype), delta=1e-6, rtol=0.0, max_steps=90)
    assert contains(bracket, torch.tensor(100.0, dtype=torch.float64), 1e-5 if dtype == torch.float32 else 1e-12)
    assert (bracket.width < 1e-4).all() if dtype == torch.float32 else (bracket.width < 1e-9).all()


def test_the_start_has_a_generator_of_its_own():
    state = torch.get_rng_state()
    like = torch.zeros(1, dtype=torch.float64)
    first, second = (normal_start((3, 7), None, like, seed=1) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float64
    assert not torch.equal(first, normal_start((3, 7), None, like, seed=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_width_is_relative_and_zero_for_zero():
    bracket = Bracket(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 2.0, 2.0]))
    assert bracket.width.tolist() == [0.0, 0.5, 0.0]
    exact = exact_bracket(torch.tensor([3.0]))
    assert exact.lower == exact.upper == 3 and exact.lower.dtype == torch.float64


def test_a_row_does_not_depend_on_the_rows_beside_it():
    """Processes that share the samples out among them get the brackets of one that has them all."""
    jacobians = torch.randn(6, 60, 80, dtype=torch.float64) * torch.logspace(0, 2, 6).reshape(6, 1, 1)
    jacobians[1] *= torch.logspace(0, -4, 60).unsqueeze(1)  # converges much earlier than the others
    start = torch.randn(1, 60, dtype=torch.float64).expand(6, 60)

    def bracket(rows):
        J = jacobians[rows]
        gram = lambda u: torch.bmm(J, torch.bmm(J.mT, u.unsqueeze(2))).squeeze(2)  # noqa: E731
        return lanczos_bracket(gram, start[rows], delta=1e-6, rtol=0.1)

    together = bracket(slice(None))
    for row in range(6):
        alone = bracket(slice(row, row + 1))
        torch.testing.assert_close(together.lower[row], alone.lower[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(together.upper[row], alone.upper[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_a_row_that_stops_early_does_not_see_what_came_after_it_had_stopped(seed):
    """Its lower end is the Ritz value of the steps that count, not of coefficients that the iteration went on to make."""
    torch.manual_seed(seed)
    eigenvalues = torch.rand(12, 60)
    eigenvalues[:6] **= torch.tensor([2.0, 4.0, 8.0, 10.0, 15.0, 20.0]).unsqueeze(1)
    eigenvalues[6:] = torch.linspace(0, 1, 60) ** 0.02  # these take many more steps
    start = torch.randn(12, 60)
    delta = torch.tensor([1e-1, 1e-2, 1e-6] * 2 + [1e-30] * 6, dtype=torch.float64)
    together = lanczos_bracket(lambda u: u * eigenvalues, start, delta=delta, rtol=0.02)
    for row in range(12):
        one = slice(row, row + 1)
        alone = lanczos_bracket(lambda u, one=one: u * eigenvalues[one], start[one], delta=delta[one], rtol=0.02)
        torch.testing.assert_close(together.lower[one], alone.lower, rtol=1e-6, atol=0)
        torch.testing.assert_close(together.upper[one], alone.upper, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_dead_rows_beside_others_warn_of_nothing():
    torch.manual_seed(0)
    diagonal = torch.rand(5, 40).sort(1).values
    diagonal[0] = 0
    start = torch.randn(5, 40) * (diagonal != 0)
    found = lanczos_bracket(lambda u: u * diagonal, start, delta=1e-6, rtol=0.01)
    assert found.lower[0] == found.upper[0] == 0


def test_one_step_has_a_closed_form():
    values, delta = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), 0.9
    gram, start = diagonal(values, batch=20)
    bracket = lanczos_bracket(gram, start, delta=delta, max_steps=1)
    q = start / start.norm(dim=1, keepdim=True)
    alpha = (q * gram(q)).sum(1)
    beta = (gram(q) - alpha.unsqueeze(1) * q).norm(dim=1)
    largest_k = (2 / (delta * math.pi / 2)) ** 2  # 1/t, with B(1/2, 3/2) = π/2, is K(μ) = 1 + ((μ − α)/β)²
    excess = (bracket.upper**2 - alpha) / (beta * (largest_k - 1) ** 0.5)
    assert (excess >= 1 - 1e-9).all() and (excess <= math.exp(0.05)).all()
    torch.testing.assert_close(bracket.lower**2, alpha)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("dimension", [70, 75, 94])
def test_a_ritz_value_beyond_its_target_costs_no_upper_end_whatever_the_scale(dimension, size):
    """So narrow a bracket is out of reach: the largest Ritz value overtakes the last target long before the last step."""
    torch.manual_seed(0)
    eigenvalues = size * torch.linspace(0, 1.57, dimension, dtype=torch.float64).cos() ** 2
    start = torch.randn(20, dimension, dtype=torch.float64)
    bracket = lanczos_bracket(lambda u: u * eigenvalues, start, delta=1e-6, rtol=1e-6, max_steps=dimension - 1)
    assert contains(bracket, eigenvalues.max().sqrt(), 1e-12) and (bracket.width <= 0.01).all()


@pytest.mark.parametrize("rtol", [1.0, 1e6, math.inf])
def test_any_width_will_do(rtol):
    products = []
    gram, start = diagonal(SPECTRA["uniform"], batch=5)
    lanczos_bracket(lambda u: products.append(0) or gram(u), start, delta=1e-6, rtol=rtol)
    assert len(products) == 4
